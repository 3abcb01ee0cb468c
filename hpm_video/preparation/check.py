"""Check of one file: its properties, and whether all of it decodes."""

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpm_video.config.choices import DecoderChoice
from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder, is_image, read_bytes
from hpm_video.decoding.reader import DecodeError, Size, VideoReader, as_decode_error
from hpm_video.decoding.registry import open_video
from hpm_video.preparation.findings import BETWEEN_REASONS, Finding, stamp_of
from hpm_video.preparation.jobs import Steps
from hpm_video.preparation.soundness import Stream, decode_all

SHORTEST = 16  # frames of a usual clip; shorter videos are suspicious
FARTHEST = 250
"""Limit of the key-frame distance: the default of encoders. 12 is better here."""
SMALLEST = 32  # limit of a side, in pixels
NARROWEST = 4.0  # limit of the aspect ratio, long side to short side
UNEVEN_SHARE = 0.05  # share of the gaps between frames that may differ by more than ``UNEVEN``
UNEVEN = 0.1  # tolerance as a share of the median gap
TICKS = 1.6  # tolerance in ticks of the container's clock, which rounds times
ANEW = "encode it anew with tools/transcode.py"

_GIVEN_UP = (0, 1, 2, 4, 8, 16, 32)
"""Numbers of frames to give up, in turn, where the last ones before damage cannot be read."""
_ENDS = 2**16  # bytes at the beginning and at the end of a file that enter its digest
_CLOCKWISE = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}
"""Degrees by the orientations of EXIF, mirrored or not."""


def examine(file: str, decoder: DecoderChoice) -> Steps[Finding]:
    """Decode all of a file.

    Any fault of the file is part of the finding; only a lack of memory is raised.
    """
    stamp = stamp_of(file)
    try:
        with as_decode_error(file), open_video(file, decoder) as reader:
            check = _check_images if is_frame_folder(file) or is_image(file) else _check_video
            finding = yield from check(reader, file)
            finding = replace(finding, content=_content_of(file, stamp.bytes))
    except DecodeError as error:
        finding = Finding("bad", (error.reason,))
    reasons = tuple(map(_normalised, finding.reasons))
    return replace(finding, reasons=reasons, bytes=stamp.bytes, modified=stamp.modified)


def _content_of(file: str, total: int | None) -> str:
    """Hash size, beginning and end of a file, and the names of frames."""
    digest = hashlib.blake2b(repr(total).encode(), digest_size=8)
    parts = [(Path(file), 0, total or 0)]
    if is_frame_folder(file):
        named = [(frame.name, frame.stat().st_size) for frame in frames_in(file)]
        digest.update(repr(named).encode())
        parts = [(Path(file, name), 0, size) for name, size in (named[0], named[-1])]
    elif member := TarMember.parse(file):
        parts = [(Path(member.tar), member.offset, member.size)]
    for path, start, size in parts:
        with path.open("rb") as opened:
            for at in (start, start + max(size - _ENDS, 0)):
                opened.seek(at)
                digest.update(opened.read(min(size, _ENDS)))
    return digest.hexdigest()


def _check_images(reader: VideoReader, file: str) -> Steps[Finding]:
    """Check an image or a folder of frames, read as training reads them."""
    size, count = reader.frame_size, reader.num_frames
    sound, why = count, ""
    for number in range(count):
        yield
        try:
            reader.read([number])
        except DecodeError as error:
            sound, why = number, error.reason
            break
    first = str(frames_in(file)[0]) if is_frame_folder(file) else file
    facts: dict[str, Any] = _image_properties(read_bytes(first)) | {"key_frame_distance": 1}
    finding = Finding("fine", num_frames=sound, height=size[0], width=size[1], **facts)
    doubts = [*doubts_of_size(size), *(doubts_of_length(sound) if is_frame_folder(file) else ())]
    return _with_verdict(finding, doubts, count, why)


def _image_properties(data: bytes) -> dict[str, Any]:
    """Return format, mode and rotation (degrees clockwise) of a readable image."""
    from PIL import ExifTags, Image

    orientation = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            with contextlib.suppress(Exception):  # damaged metadata does not matter
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            kind, mode = (image.format or "").lower(), image.mode
    return {"codec": kind, "pixel_format": mode, "rotation": _CLOCKWISE.get(orientation, 0)}


def _check_video(reader: VideoReader, file: str) -> Steps[Finding]:
    stream = yield from decode_all(file)
    if not stream.frames:
        raise DecodeError(stream.first_error or "it has no frames")
    sound, count, damage = stream.sound()
    # Without times training counts frames as they are counted here.
    sound = min(sound, reader.num_frames) if stream.shown else sound
    sound, why = yield from _readable(reader, sound)
    fps, (height, width) = stream.fps(), stream.sizes[0]
    finding = Finding(
        "fine",
        num_frames=sound,
        fps=fps,
        duration=sound / fps if fps else None,
        height=height,
        width=width,
        codec=stream.codec,
        pixel_format=stream.pixel_format,
        key_frame_distance=stream.key_distance(),
        rotation=stream.rotation,
    )
    doubts = [*doubts_of_stream(stream, sound)]
    if stream.shown and reader.num_frames != count:
        doubts.append(
            f"the decoder that is to be used counts {reader.num_frames} frames, PyAV {count}"
        )
    return _with_verdict(finding, doubts, count, why or damage)


def _readable(reader: VideoReader, sound: int) -> Steps[tuple[int, str]]:
    """Return how many frames training can read, and the reason where that is not all.

    Training seeks, and to get a frame out the decoder may have to go on into damage behind it.
    """
    why = ""
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


def doubts_of_stream(stream: Stream, sound: int) -> Iterator[str]:
    """Yield reasons why a video that decodes is suspicious."""
    fps = stream.fps()
    # Counts may differ (edit lists, repeated frames of AVI) as long as the duration is right.
    if stream.stated > stream.packets and fps and abs(stream.promised - stream.span()) > 2.5 / fps:
        yield (
            f"its header promises {stream.stated} frames in {stream.promised:.4g} s, and it holds "
            f"{stream.packets} in {stream.span():.4g} s: where it was cut off, download it again"
        )
    elif not stream.stated and stream.promised - stream.span() > max(2, stream.promised / 10):
        yield (
            f"its header promises {stream.promised:.4g} s, and its frames end after "
            f"{stream.span():.4g} s: where it was cut off, download it again"
        )
    yield from doubts_of_reading(stream)
    yield from doubts_of_gaps(stream.gaps(), stream.tick)
    yield from doubts_of_size(stream.sizes[0])
    yield from doubts_of_length(sound)


def doubts_of_reading(stream: Stream) -> Iterator[str]:
    """Yield what is odd about how a video has to be read."""
    if (distance := stream.key_distance()) > FARTHEST:
        yield (
            f"{distance} frames from one key frame to the next, so reading from the middle is "
            f"slow: {ANEW}"
        )
    if stream.left_out:
        some = f"{stream.left_out} frames" if stream.left_out > 1 else "frame"
        yield f"its first {some} cannot be decoded (it begins inside a group), and will be left out"
    if not stream.has_order:
        yield f"its times do not tell the order of its frames, so reading is slow: {ANEW}"
    if stream.tracks > 1:
        yield f"it has {stream.tracks} video streams, and one is read: look whether it is meant"


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
            f"{1000 * usual:.0f}, so a stride is no fixed time: {ANEW}"
        )


def doubts_of_size(size: Size) -> Iterator[str]:
    """Yield a doubt where height and width are unusual."""
    short, long = sorted(size)
    named = f"{size[1]} x {size[0]} pixels"
    if short < SMALLEST:
        yield f"{named}, a side of less than {SMALLEST}: look whether that is meant"
    elif long > NARROWEST * short:
        yield f"{named}, {long / short:.1f} times as long as wide, of which crops show a small part"


def doubts_of_length(num_frames: int) -> Iterator[str]:
    """Yield a doubt where a video has few frames."""
    if num_frames == 1:
        yield "a video of 1 frame: where a still is meant, save it as an image"
    elif num_frames < SHORTEST:
        yield f"{num_frames} frames, fewer than a clip of {SHORTEST}: some are shown repeatedly"


def _with_verdict(finding: Finding, doubts: list[str], count: int, why: str) -> Finding:
    """Return the finding with its verdict. ``count``: frames that the file should have."""
    sound = finding.num_frames or 0
    if sound < count:
        some = f"only the first {sound}" if sound else "none"
        why = why.partition(". ")[0]  # without its own remedy
        reason = f"{some} of {count} frames can be read ({why}): download it again, or {ANEW}"
        if sound < SHORTEST:
            duration = finding.duration if sound else None
            known = replace(finding, num_frames=sound or None, duration=duration)
            return replace(known, verdict="bad", reasons=(reason,))
        doubts = [reason, *doubts]
    return replace(finding, verdict="suspicious" if doubts else "fine", reasons=tuple(doubts))


def _normalised(why: str) -> str:
    """Make a reason one line without the separator of reasons."""
    why = re.sub(r"\[Errno -?\d+\] ", "", why)
    return " ".join(why.split()).replace(BETWEEN_REASONS, ", ")
