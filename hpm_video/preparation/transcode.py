"""A video -> the same one, small and quick to read: what is done to one file, in a process.

Everything here is work for :class:`hpm_video.workers.pool.Pool`. It reads frame by frame, says now
and then how far it is, and takes a file for done when what it wrote was opened again and decoded.
"""

import contextlib
import errno
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.decoding.reader import Size
from hpm_video.decoding.registry import choose_decoder, open_video
from hpm_video.decoding.video_stream import USUAL_RATE, Timed, VideoStream
from hpm_video.files.failures import Failure
from hpm_video.preparation.check import examine, stamp_of
from hpm_video.preparation.encode import (
    Resizer,
    VideoWriter,
    fitted_size,
    picture_of,
    upright_size,
)
from hpm_video.preparation.jobs import (
    Broken,
    Step,
    Steps,
    WrongOutputError,
    paced,
    reason_of,
    remove,
)
from hpm_video.preparation.shards import opened

if TYPE_CHECKING:
    from hpm_video.decoding.video_stream import VideoFrame

LONGEST_STILL = 600
"""Seconds for which a frame may be shown; longer than that its times are wrong."""
CLOCK = Fraction(1, 1000)
"""Seconds. Some containers round the times of frames to it."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


@dataclass(frozen=True)
class Recipe:
    """What videos are turned into."""

    form: Literal["files", "frames", "shards"]
    short_side: int
    """Pixels, even; of larger frames alone."""
    fps: Fraction | None
    """Frames a second; none keeps every frame."""
    key_frames: int
    """Frames from one key frame to the next, at most."""
    crf: int
    quality: int
    """Of JPEG."""
    shard_bytes: int
    """Of a shard, at most, where it holds more than one sample."""
    copy: bool
    """Shards of the files as they are."""

    def suffix(self, place: str) -> str:
        """What the name of an output ends in."""
        if is_image(place):
            return ".jpg"
        return "/" if self.form == "frames" else ".mp4"


@dataclass(frozen=True)
class Job:
    """One file, and where what is made of it goes."""

    place: str
    beside: str
    """A path to write to first; it ends as ``target`` does."""
    target: str
    fps: Fraction | None = None
    """Of a folder of frames, where its manifest says."""
    num_frames: int | None = None
    """Frames to read, where the manifest says how many it has: the first ones."""
    cut: float | None = None
    """Seconds of the video, from its beginning, where only these are wanted: a trial."""


@dataclass(frozen=True)
class Made:
    """What came of a file."""

    num_frames: int
    height: int
    width: int
    fps: float
    """0 for an image."""
    key_frame_distance: int
    bytes: int
    seconds: float = 0.0
    """That it took."""
    source_bytes: int = 0
    source_modified: str = ""
    """When the source was last written to, before it was read."""
    share: float = 1.0
    """Of the video, in a trial."""
    note: str = ""
    """What is odd about the source."""


class UnwritableError(OSError):
    """The disk does not take what is written."""


class _Work(ABC):
    """Does jobs. -> steps, and at last what came of it"""

    def prepare(self) -> None:
        """Load what jobs need, before their time counts."""
        choose_decoder("pyav")  # it decodes a test video

    def __call__(self, job: Job) -> Iterator[Step | Made | Failure | Broken]:
        """Make what is wanted of a file."""
        return paced(self._do(job))

    def _do(self, job: Job) -> Steps[Made | Failure | Broken]:
        began = time.perf_counter()
        try:
            stamp = stamp_of(job.place)
            made = yield from self.make(job)
        except UnwritableError as error:
            return Broken(str(error))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - native libraries raise anything
            return Failure(job.place, reason_of(error))
        finally:
            remove(job.beside)
        return replace(
            made,
            fps=0.0 if is_image(job.place) else made.fps,
            seconds=time.perf_counter() - began,
            source_bytes=stamp.bytes or 0,
            source_modified=stamp.modified,
        )

    @abstractmethod
    def make(self, job: Job) -> Steps[Made]:
        """Read, write and check."""


@dataclass(frozen=True)
class Transcoder(_Work):
    """Writes outputs by a recipe, and puts each into its place when it is found good."""

    recipe: Recipe

    def make(self, job: Job) -> Steps[Made]:
        with contextlib.closing(_source(job)) as source:
            for _ in source.survey():
                yield Step()
            fps = self.recipe.fps or source.rate
            wanted = _wanted(source.frames(), job)
            frames = (
                at_rate(wanted, fps, source.rate)
                if self.recipe.fps
                else (timed.frame for timed in wanted)
            )
            first = next(frames, None)
            if first is None:
                raise ValueError("it has no frames")
            size = fitted_size(upright_size(first), self.recipe.short_side)
            write = self._write_video if job.target.endswith(".mp4") else self._write_pictures
            count = yield from write(job.beside, chain([first], frames), size, fps)
        made = yield from check(job.beside, Written(count, size), fps)
        with _writing():
            _put(job.beside, job.target)
        if job.cut:
            share = min(1.0, float(job.cut * source.rate) / max(source.num_packets, 1))
            return replace(made, share=share)
        if source.num_packets < source.stated_frames:
            note = (
                f"{source.num_packets} of the {source.stated_frames} frames are there that its "
                "header announces: it may be cut off"
            )
            return replace(made, note=note)
        return made

    def _write_video(
        self, path: str, frames: Iterator["VideoFrame"], size: Size, fps: Fraction
    ) -> Steps[int]:
        resizer, crf, gop = Resizer(size), self.recipe.crf, self.recipe.key_frames
        with _writing():
            writer = VideoWriter(Path(path), size, fps=fps, crf=crf, gop=gop, faststart=True)
        with writer:
            for frame in frames:
                small = resizer.yuv(frame)
                if not writer.count:
                    writer.describe_colours(small)
                with _writing():
                    writer.write(small)
                yield Step(writer.count)
            with _writing():
                writer.finish()
        return writer.count

    def _write_pictures(
        self, path: str, frames: Iterator["VideoFrame"], size: Size, _fps: Fraction
    ) -> Steps[int]:
        resizer, count = Resizer(size), 0
        if is_frame_folder(path):
            with _writing():
                Path(path).mkdir()
        for count, frame in enumerate(frames, start=1):
            name = f"{count - 1:06d}.jpg" if is_frame_folder(path) else ""
            picture = Image.fromarray(resizer.rgb(frame))
            with _writing():
                picture.save(path + name, "JPEG", quality=self.recipe.quality)
            yield Step(count)
        return count


@dataclass(frozen=True)
class Written:
    """What an output has to hold."""

    num_frames: int
    size: Size

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.num_frames} frames of {width} x {height}"


class Prober(_Work):
    """Looks at files that are packed as they are: opens them, and decodes their first frame."""

    def make(self, job: Job) -> Steps[Made]:
        rate, distance = Fraction(0), 1
        if not is_image(job.place):
            with contextlib.closing(_source(job)) as source:
                for _ in source.survey():
                    yield Step()
                rate, distance = source.rate, source.key_distance
        with open_video(job.place, "pyav") as video, opened(job.place) as (_, size):
            height, width = video.read([0]).shape[1:3]
            count = min(job.num_frames or video.num_frames, video.num_frames)
        return Made(count, height, width, float(rate), distance, size)


def at_rate(
    frames: Iterator[Timed], fps: Fraction, source_rate: Fraction
) -> Iterator["VideoFrame"]:
    """Frames for times 1 / fps apart: of each the last that is shown at it, or was before.

    The last frame is shown for as long as frames of its source are on average.
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


def check(place: str, written: Written, fps: Fraction) -> Steps[Made]:
    """Decode all of an output, as a check does.

    Raises:
        WrongOutputError: it is not what was to be written.
    """
    found = yield from examine(place, "pyav")
    if found.num_frames is None or found.verdict == "bad":
        raise WrongOutputError(f"what was written cannot be read: {'; '.join(found.reasons)}")
    there = Written(found.num_frames, (found.height or 0, found.width or 0))
    if there != written:
        raise WrongOutputError(f"what was written is {there} instead of {written}")
    if there.num_frames > 1 and found.fps and abs(found.fps / float(fps) - 1) > 1e-3:
        raise WrongOutputError(
            f"what was written has {found.fps:g} frames a second instead of {float(fps):g}"
        )
    distance, size = found.key_frame_distance or 1, found.bytes or 0
    return Made(written.num_frames, *written.size, float(fps), distance, size)


class _PictureStream:
    """A folder of frames, or an image, as a stream."""

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


def _source(job: Job) -> VideoStream | _PictureStream:
    if is_image(job.place) or is_frame_folder(job.place):
        return _PictureStream(job.place, job.fps)
    return VideoStream(job.place)


def _wanted(frames: Iterator[Timed], job: Job) -> Iterator[Timed]:
    """The frames of a source that a job wants; behind them nothing is decoded."""
    start = None
    for timed in islice(frames, job.num_frames):
        start = timed.time if start is None else start
        if job.cut is not None and timed.time - start > job.cut:
            return
        yield timed


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Tell a disk that takes nothing more from a file that cannot be encoded."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise UnwritableError(error.errno, error.strerror, error.filename) from error
        raise


def _put(beside: str, target: str) -> None:
    """Rename; a target that is there already is of a run that was killed, and is replaced."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if is_frame_folder(target):
        shutil.rmtree(target, ignore_errors=True)
    Path(beside).replace(target)
