"""Transcoding of one file, to be small and quick to read.

Everything here is work for :class:`hpm_video.workers.pool.Pool`. It works frame by frame and
reports its progress; a file is done when its output has been opened and decoded again.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.decoding.orientation import upright_size
from hpm_video.decoding.reader import Size
from hpm_video.decoding.registry import choose_decoder, open_video
from hpm_video.decoding.video_stream import USUAL_RATE, Timed, VideoStream
from hpm_video.files.failures import Failure
from hpm_video.preparation.check import examine
from hpm_video.preparation.encode import Resizer, VideoWriter, fitted_size, picture_of
from hpm_video.preparation.findings import stamp_of
from hpm_video.preparation.jobs import Steps, attempt

if TYPE_CHECKING:
    from hpm_video.decoding.video_stream import VideoFrame

LONGEST_STILL = 600
"""Limit of the seconds for which a frame is shown; beyond it, its times are wrong."""
CLOCK = Fraction(1, 1000)  # seconds to which some containers round the times of frames


@dataclass(frozen=True)
class Recipe:
    """Format and quality of the outputs."""

    form: Literal["files", "frames", "shards"]
    short_side: int  # pixels, even; smaller frames keep their size
    fps: Fraction | None  # frames per second; none keeps every frame
    key_frames: int  # largest distance of key frames
    crf: int
    quality: int  # JPEG quality
    shard_bytes: int  # largest size of a shard of more than one sample
    copy: bool  # pack files into shards unchanged

    def suffix(self, place: str) -> str:
        """Return the end of an output's name."""
        if is_image(place):
            return ".jpg"
        return "/" if self.form == "frames" else ".mp4"


@dataclass(frozen=True)
class Job:
    """One file and the path of its output."""

    place: str
    temporary: str  # path to write to first, with the suffix of ``target``
    target: str
    fps: Fraction | None = None  # frame rate of a folder of frames, if its manifest has it
    num_frames: int | None = None  # number of frames to read from the start, if the manifest has it
    cut: float | None = None  # in a trial, the number of seconds to read from the start


@dataclass(frozen=True)
class Output:
    """Result of a job."""

    num_frames: int
    height: int
    width: int
    fps: float  # 0 for an image
    key_frame_distance: int
    bytes: int
    seconds: float = 0.0  # duration of the job
    source_bytes: int = 0
    source_modified: str = ""  # time of the source's last change before it was read
    share: float = 1.0  # share of the video that a trial read
    note: str = ""  # anything odd about the source


@dataclass(frozen=True)
class Transcoder:
    """Work of a process: writes outputs by a recipe, and moves each to its target once checked."""

    recipe: Recipe

    def prepare(self) -> None:
        """Load what jobs need, before they are timed."""
        choose_decoder("pyav")  # it decodes a test video

    def __call__(self, job: Job) -> Iterator[Output | Failure | None]:
        """Do a job."""
        return attempt(self._do(job), job.place, job.temporary)

    def _do(self, job: Job) -> Steps[Output]:
        began, stamp = time.perf_counter(), stamp_of(job.place)
        output = yield from _probe(job) if self.recipe.copy else self._transcode(job)
        return replace(
            output,
            fps=0.0 if is_image(job.place) else output.fps,
            seconds=time.perf_counter() - began,
            source_bytes=stamp.bytes or 0,
            source_modified=stamp.modified,
        )

    def _transcode(self, job: Job) -> Steps[Output]:
        with contextlib.closing(_open_source(job)) as source:
            yield from source.survey()
            fps = self.recipe.fps or source.rate
            selected = _select_frames(source.frames(), job)
            frames = (
                at_rate(selected, fps, source.rate)
                if self.recipe.fps
                else (timed.frame for timed in selected)
            )
            first = next(frames, None)
            if first is None:
                raise ValueError("it has no frames")
            size = fitted_size(upright_size(first), self.recipe.short_side)
            write = self._write_video if job.target.endswith(".mp4") else self._write_pictures
            count = yield from write(job.temporary, chain([first], frames), size, fps)
        output = yield from check(job.temporary, count, size, fps)
        Path(job.target).parent.mkdir(parents=True, exist_ok=True)
        if is_frame_folder(job.target):  # a killed run may have left one
            shutil.rmtree(job.target, ignore_errors=True)
        Path(job.temporary).replace(job.target)
        if job.cut:
            share = min(1.0, float(job.cut * source.rate) / max(source.num_packets, 1))
            return replace(output, share=share)
        if source.num_packets < source.stated_frames:
            note = (
                f"{source.num_packets} of the {source.stated_frames} frames are there that its "
                "header announces: it may be cut off"
            )
            return replace(output, note=note)
        return output

    def _write_video(
        self, path: str, frames: Iterator["VideoFrame"], size: Size, fps: Fraction
    ) -> Steps[int]:
        resizer, crf, gop = Resizer(size), self.recipe.crf, self.recipe.key_frames
        with VideoWriter(Path(path), size, fps=fps, crf=crf, gop=gop, faststart=True) as writer:
            for frame in frames:
                small = resizer.yuv(frame)
                if not writer.count:
                    writer.describe_colours(small)
                writer.write(small)
                yield
        return writer.count

    def _write_pictures(
        self, path: str, frames: Iterator["VideoFrame"], size: Size, _fps: Fraction
    ) -> Steps[int]:
        resizer, count = Resizer(size), 0
        if is_frame_folder(path):
            Path(path).mkdir()
        for count, frame in enumerate(frames, start=1):
            name = f"{count - 1:06d}.jpg" if is_frame_folder(path) else ""
            picture = Image.fromarray(resizer.rgb(frame))
            picture.save(path + name, "JPEG", quality=self.recipe.quality)
            yield
        return count


def _probe(job: Job) -> Steps[Output]:
    """Open a file that is packed unchanged, and decode its first frame."""
    rate, distance = Fraction(0), 1
    if not is_image(job.place):
        with contextlib.closing(_open_source(job)) as source:
            yield from source.survey()
            rate, distance = source.rate, source.key_distance
    with open_video(job.place, "pyav") as video:
        height, width = video.read([0]).shape[1:3]
        count = min(job.num_frames or video.num_frames, video.num_frames)
    size = stamp_of(job.place).bytes or 0
    return Output(count, height, width, float(rate), distance, size)


def check(place: str, num_frames: int, size: Size, fps: Fraction) -> Steps[Output]:
    """Decode all of an output, as ``tools/check_videos.py`` does.

    Raises:
        ValueError: it is not as expected.
    """
    found = yield from examine(place, "pyav")
    if found.verdict == "bad":
        raise ValueError(f"what was written cannot be read: {'; '.join(found.reasons)}")
    wanted = f"{num_frames} frames of {size[1]} x {size[0]}"
    written = f"{found.num_frames} frames of {found.width} x {found.height}"
    if written != wanted:
        raise ValueError(f"what was written is {written} instead of {wanted}")
    if num_frames > 1 and found.fps and abs(found.fps / float(fps) - 1) > 1e-3:
        raise ValueError(
            f"what was written has {found.fps:g} frames a second instead of {float(fps):g}"
        )
    distance = found.key_frame_distance or 1
    return Output(num_frames, *size, float(fps), distance, found.bytes or 0)


def at_rate(
    frames: Iterator[Timed], fps: Fraction, source_rate: Fraction
) -> Iterator["VideoFrame"]:
    """Yield a frame for each multiple of 1 / fps: the one that is shown at that time.

    The last frame is shown for the average duration of the source's frames.
    """
    held = next(frames, None)
    if held is None:
        return
    due = held.time + CLOCK
    for following in frames:
        if following.time - held.time > LONGEST_STILL:
            raise ValueError(
                f"its times are wrong: a frame would be shown for "
                f"{float(following.time - held.time):.0f} s"
            )
        while due < following.time:
            yield held.frame
            due += 1 / fps
        held = following
    end = held.time + 1 / source_rate
    while due < end:
        yield held.frame
        due += 1 / fps


class _PictureStream:
    """Stream of a folder of frames or an image, with the interface of ``VideoStream``."""

    stated_frames, key_distance = 0, 1

    def __init__(self, place: str, fps: Fraction | None) -> None:
        self._video = open_video(place)
        self.rate = fps or USUAL_RATE
        self.num_packets = self._video.num_frames

    def survey(self) -> Iterator[None]:
        return iter(())

    def frames(self) -> Iterator[Timed]:
        for number in range(self.num_packets):
            yield Timed(number / self.rate, picture_of(self._video.read([number])[0]))

    def close(self) -> None:
        self._video.close()


def _open_source(job: Job) -> VideoStream | _PictureStream:
    if is_image(job.place) or is_frame_folder(job.place):
        return _PictureStream(job.place, job.fps)
    return VideoStream(job.place)


def _select_frames(frames: Iterator[Timed], job: Job) -> Iterator[Timed]:
    """Yield the frames that a job needs, and decode none after them."""
    start = None
    for timed in islice(frames, job.num_frames):
        start = timed.time if start is None else start
        if job.cut is not None and timed.time - start > job.cut:
            return
        yield timed
