"""Check of files: their properties, and whether all of each decodes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hpm_video.config.choices import DecoderChoice
from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.decoding.orientation import upright_size
from hpm_video.decoding.reader import DecodeError, VideoReader, as_decode_error
from hpm_video.decoding.registry import open_video
from hpm_video.decoding.video_stream import VideoStream
from hpm_video.files.failures import Failure
from hpm_video.files.wording import counted
from hpm_video.preparation.findings import (
    BETWEEN_REASONS,
    Finding,
    decoder_for,
    digest_of,
    stamp_of,
)
from hpm_video.preparation.jobs import Journal, Steps, paced, run_jobs
from hpm_video.workers.pool import Limits
from hpm_video.workers.progress_bar import ProgressBar

SHORTEST = 16  # frames of a usual clip; shorter videos are suspicious
FARTHEST = 250  # limit of the key-frame distance: the default of encoders; 12 is better here
UNEVEN_SHARE = 0.05  # share of the gaps between frames that may differ by more than ``UNEVEN``
UNEVEN = 0.1  # tolerance as a share of the median gap
TICKS = 1.6  # tolerance in ticks of the container's clock, which rounds times
ANEW = "encode it anew with tools/transcode.py"
AGAIN = "download it again"
MORE = "where it is only large or slow, give more --memory or --seconds"

_GIVEN_UP = (0, 1, 2, 4, 8, 16, 32)  # frames to give up where the last before damage are no use
_REORDERED = 24  # limit of the frames by which a frame of a wrong time may come too early


@dataclass(frozen=True)
class Checker:
    """Work of a process that checks files."""

    decoder: DecoderChoice = "auto"

    def __call__(self, file: str) -> Iterator[Finding | None]:
        return paced(examine(file, self.decoder))


def check_files(
    files: Iterable[str],
    same: Mapping[str, Finding],
    journal: Journal,
    check: Checker,
    workers: int,
    limits: Limits,
) -> dict[str, Finding]:
    """Check all files except those that are the ``same`` as before. -> the findings of all

    Each is noted in the journal, unless it exceeded the limits of this start.
    """
    found = {**same}
    left = {file: file for file in files if file not in same}
    num_bad = sum(finding.verdict == "bad" for finding in same.values())
    with (
        closing(ProgressBar(len(found) + len(left), "files", first=len(found))) as bar,
        closing(run_jobs(check, left, workers, limits)) as results,
    ):
        for file, result in results:
            is_lost, finding = isinstance(result, Failure), result
            if is_lost:
                finding = Finding("bad", (f"{result.reason}: {MORE}",), **stamp_of(file)._asdict())
            found[file] = replace(finding, decoder=decoder_for(file, check.decoder))
            if not is_lost:
                journal.append({"file": file, **found[file].cells()})
            num_bad += found[file].verdict == "bad"
            bar.advance(note=f"{num_bad} bad")
    return found


def examine(file: str, decoder: DecoderChoice) -> Steps[Finding]:
    """Decode a file up to its first fault. Of all that can happen only MemoryError is raised."""
    stamp = stamp_of(file)
    try:
        with as_decode_error(file), open_video(file, decoder) as reader:
            check = _check_images if is_frame_folder(file) or is_image(file) else _check_video
            finding = yield from check(reader, file)
            finding = replace(finding, content=(yield from digest_of(file)))
    except DecodeError as error:
        finding = Finding("bad", (error.reason,))
    # Each on one line, and without the separator of reasons.
    short = (re.sub(r"\[Errno -?\d+\] ", "", reason) for reason in finding.reasons)
    reasons = tuple(" ".join(each.split()).replace(BETWEEN_REASONS, ", ") for each in short)
    return replace(finding, reasons=reasons, **stamp._asdict())


def _check_images(reader: VideoReader, file: str) -> Steps[Finding]:
    """Check an image or a folder of frames, read as training reads them."""
    (height, width), count = reader.frame_size, reader.num_frames
    sound, why = count, ""
    for number in range(count):
        yield
        try:
            reader.read([number])
        except DecodeError as error:
            sound, why = number, error.reason
            break
    size = {"height": height, "width": width}
    finding = Finding("fine", num_frames=sound, **size, key_frame_distance=1)
    doubts = [*doubts_of_length(sound)] if is_frame_folder(file) else []
    return _with_verdict(finding, doubts, count, why, f"{AGAIN}, or {ANEW}")


def _check_video(reader: VideoReader, file: str) -> Steps[Finding]:
    with closing(VideoStream(file)) as stream:
        yield from stream.survey()
        sound, fault = yield from _sound_frames(stream)
    count = stream.num_frames
    if not count:
        raise DecodeError("it has no frames")
    if not sound:
        remedy = AGAIN if stream.damage else ANEW
        raise DecodeError(f"none of its {count} frames can be read ({fault}): {remedy}")
    # Without times training counts frames as they are counted here.
    sound = min(sound, reader.num_frames) if stream.times else sound
    sound, unreadable = yield from _readable(reader, sound)
    fps, (height, width) = float(stream.rate) if stream.rate else None, stream.size
    finding = Finding(
        "fine",
        num_frames=sound,
        fps=fps,
        duration=sound / fps if fps else None,
        height=height,
        width=width,
        codec=stream.codec,
        pixel_format=stream.pixel_format,
        key_frame_distance=stream.key_distance,
        rotation=stream.rotation,
    )
    doubts = [*doubts_of_stream(stream), *doubts_of_length(sound)]
    if stream.times and reader.num_frames != count:
        doubts.append(f"the chosen decoder counts {reader.num_frames} frames, PyAV {count}")
    remedy = f"{AGAIN}, or {ANEW}" if stream.damage else ANEW
    return _with_verdict(finding, doubts, count, unreadable or fault, remedy)


def _sound_frames(stream: VideoStream) -> Steps[tuple[int, str]]:
    """Decode a video up to its first fault. -> the number of frames before it, and the fault"""
    frames = stream.frames()
    for sound, timed in enumerate(frames):
        yield
        size = upright_size(timed.frame)
        if size != stream.size:
            before, now = (f"{width} x {height}" for height, width in (stream.size, size))
            why = f"frame {sound} differs in size from those before: {before}, then {now}"
            return sound, why
        if sound < len(stream.times) and timed.pts != stream.times[sound]:
            if stream.times[sound] in [later.pts for later in islice(frames, _REORDERED)]:
                return sound, "the times of its frames contradict their order"
            return sound, f"frame {sound} does not come out of the decoder"
    sound = stream.num_read
    missing = f"frame {sound} does not come out of the decoder" if sound < stream.num_frames else ""
    return sound, stream.damage or missing


def _readable(reader: VideoReader, sound: int) -> Steps[tuple[int, str]]:
    """Return how many frames training can read, and the reason where that is not all."""
    why = ""  # training seeks, and to get a frame the decoder may have to go on into damage
    for given_up in _GIVEN_UP:
        last = sound - given_up - 1
        if last < 0:
            break
        try:
            for index in sorted({0, last // 2, last}):
                reader.read([index])
                yield
        except (DecodeError, IndexError) as error:
            why = why or (error.reason if isinstance(error, DecodeError) else str(error))
        else:
            return last + 1, why
    return 0, why


def doubts_of_stream(stream: VideoStream) -> Iterator[str]:
    """Yield reasons why a video that decodes is suspicious."""
    if cut := stream.cut_off():
        yield f"{cut}: if it was cut off, {AGAIN}"
    if (distance := stream.key_distance) > FARTHEST:
        yield (
            f"{distance} frames from one key frame to the next, so reading from the middle is "
            f"slow: {ANEW}"
        )
    if stream.left_out:
        some = counted(stream.left_out, "frame")
        yield f"its first {some} cannot be decoded (it begins inside a group), and are left out"
    if not stream.has_order:
        yield f"its times do not tell the order of its frames, so reading is slow: {ANEW}"
    if stream.num_tracks > 1:
        yield f"it has {stream.num_tracks} video streams, and one is read: check that it is right"
    tick, times = float(stream.tick), np.array(stream.times, dtype=np.float64)
    yield from doubts_of_gaps(np.diff(times) * tick, tick)


def doubts_of_gaps(gaps: NDArray[np.float64], tick: float) -> Iterator[str]:
    """Yield a doubt where gaps between frames vary: (K,) in seconds"""
    if len(gaps) < 2:
        return
    usual = float(np.median(gaps))
    allowed = max(UNEVEN * usual, TICKS * tick)
    share = float(np.mean(np.abs(gaps - usual) > allowed))
    if share > UNEVEN_SHARE:
        low, high = 1000 * gaps.min(), 1000 * gaps.max()
        yield (
            f"a varying frame rate, {low:.0f} to {high:.0f} ms from frame to frame, mostly "
            f"{1000 * usual:.0f}, so a stride is not a fixed time: {ANEW} --fps {1 / usual:.3g}"
        )


def doubts_of_length(num_frames: int) -> Iterator[str]:
    """Yield a doubt where a video has few frames."""
    if num_frames < SHORTEST:
        some = counted(num_frames, "frame")
        yield f"{some}, fewer than a clip of {SHORTEST}: some are shown repeatedly"


def _with_verdict(
    finding: Finding, doubts: list[str], count: int, why: str, remedy: str
) -> Finding:
    """Return the finding with its verdict. ``count``: frames that the file should have."""
    sound = finding.num_frames or 0
    if sound < count:
        some = f"only the first {sound}" if sound else "none"
        why = why.partition(". ")[0]  # without its own remedy
        reason = f"{some} of {count} frames can be read ({why}): {remedy}"
        if sound < SHORTEST:
            duration = finding.duration if sound else None
            known = replace(finding, num_frames=sound or None, duration=duration)
            return replace(known, verdict="bad", reasons=(reason,))
        doubts = [reason, *doubts]
    return replace(finding, verdict="suspicious" if doubts else "fine", reasons=tuple(doubts))
