"""A video -> the same one, small and quick to read: what is done to one file, in a process.

Everything here is work for :class:`hpm_video.workers.pool.Pool`. It reads frame by frame, says now
and then how far it is, and takes a file for done when what it wrote was opened again and decoded.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder, is_image
from hpm_video.decoding.reader import DecodeError, Size, VideoReader
from hpm_video.decoding.registry import choose_decoder, open_video
from hpm_video.decoding.video_stream import USUAL_RATE, Timed, VideoStream
from hpm_video.preparation.check import stamp_of
from hpm_video.preparation.shards import Packable, Packed, ShardError, opened, write_shard
from hpm_video.workers.heartbeat import Beat

if TYPE_CHECKING:
    from hpm_video.decoding.video_stream import VideoFrame


Form = Literal["files", "frames", "shards"]
CHECKED_BYTES = 2**25
"""Of the frames that are read at once when an output is checked."""
LONGEST_STILL = 600
"""Seconds for which a frame may be shown; longer than that its times are wrong."""
CLOCK = Fraction(1, 1000)
"""Seconds. Some containers round the times of frames to it."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


@dataclass(frozen=True)
class Recipe:
    """What videos are turned into."""

    form: Form
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
class Step:
    """Still at it."""

    frames: int


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
    seconds: float
    """That it took."""
    source_bytes: int = 0
    source_modified: str = ""
    """When the source was last written to, before it was read."""
    share: float = 1.0
    """Of the video, in a trial."""
    note: str = ""
    """What is odd about the source."""


@dataclass(frozen=True)
class Failed:
    """Why nothing came of a file."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """Why no file can be written any more: a full disk."""

    reason: str


Result = Step | Made | Failed | Broken


class UnwritableError(OSError):
    """The disk does not take what is written."""


class NotTheSameError(ValueError):
    """An output that does not hold what was to be written."""


@dataclass(frozen=True)
class Transcoder:
    """Does jobs by a recipe. -> steps, and at last what came of it"""

    recipe: Recipe

    def prepare(self) -> None:
        """Load what jobs need, before their time counts."""
        _load()

    def __call__(self, job: Job) -> Iterator[Result]:
        """Write an output, and put it into its place when it is found good."""
        try:
            yield from self._make(job)
        except UnwritableError as error:
            yield Broken(str(error))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - native libraries raise anything
            yield Failed(_reason(error))
        finally:
            remove(job.beside)

    def _make(self, job: Job) -> Iterator[Result]:
        began = time.perf_counter()
        stamp = stamp_of(job.place)
        beat = Beat()
        with contextlib.closing(_opened_source(job)) as source:
            for _ in source.survey():
                if beat.is_due():
                    yield Step(0)
            fps = self.recipe.fps or source.rate
            read = _Read(source.frames(), job)
            frames = at_rate(read, fps, source.rate) if self.recipe.fps else (t.frame for t in read)
            write = self._write_video if job.target.endswith(".mp4") else self._write_pictures
            written = yield from write(frames, fps, job, beat)
            share = min(1.0, read.count / max(source.num_packets, 1)) if job.cut else 1.0
            note = _short_of(source) if not job.cut else ""
        made = yield from check(job.beside, written, fps, beat)
        if is_image(job.place):
            made = replace(made, fps=0.0)
        with _writing():
            _put(job.beside, job.target)
        yield replace(
            made,
            seconds=time.perf_counter() - began,
            source_bytes=stamp.bytes or 0,
            source_modified=stamp.modified,
            share=share,
            note=note,
        )

    def _write_video(
        self, frames: Iterator["VideoFrame"], fps: Fraction, job: Job, beat: Beat
    ) -> Generator[Step, None, "Written"]:
        from hpm_video.preparation.encode import Resizer, VideoWriter, fitted_size, upright_size

        first = _first(frames)
        size = fitted_size(upright_size(first), self.recipe.short_side)
        resizer = Resizer(size)
        with _writing():
            writer = VideoWriter(
                Path(job.beside),
                size,
                fps=fps,
                crf=self.recipe.crf,
                gop=self.recipe.key_frames,
                faststart=True,
            )
        with writer:
            for frame in chain([first], frames):
                small = resizer.yuv(frame)
                if not writer.count:
                    writer.describe_colours(small)
                with _writing():
                    writer.write(small)
                if beat.is_due():
                    yield Step(writer.count)
            with _writing():
                writer.finish()
        return Written(writer.count, size)

    def _write_pictures(
        self, frames: Iterator["VideoFrame"], fps: Fraction, job: Job, beat: Beat
    ) -> Generator[Step, None, "Written"]:
        from PIL import Image

        from hpm_video.preparation.encode import Resizer, fitted_size, upright_size

        del fps
        first = _first(frames)
        size = fitted_size(upright_size(first), self.recipe.short_side)
        resizer, count = Resizer(size), 0
        if is_frame_folder(job.beside):
            with _writing():
                Path(job.beside).mkdir()
        for count, frame in enumerate(chain([first], frames), start=1):
            name = f"{count - 1:06d}.jpg" if is_frame_folder(job.beside) else ""
            picture = Image.fromarray(resizer.rgb(frame))
            with _writing():
                picture.save(job.beside + name, "JPEG", quality=self.recipe.quality)
            if beat.is_due():
                yield Step(count)
        return Written(count, size)


@dataclass(frozen=True)
class Written:
    """What an output has to hold."""

    num_frames: int
    size: Size


@dataclass(frozen=True)
class Prober:
    """Looks at files that are packed as they are: opens them, and decodes their first frame."""

    def prepare(self) -> None:
        """Load what jobs need, before their time counts."""
        _load()

    def __call__(self, job: Job) -> Iterator[Result]:
        """Nothing is written."""
        began = time.perf_counter()
        try:
            stamp = stamp_of(job.place)
            rate, distance = Fraction(0), 1
            if not is_image(job.place):
                with contextlib.closing(_opened_source(job)) as source:
                    beat = Beat()
                    for _ in source.survey():
                        if beat.is_due():
                            yield Step(0)
                    rate, distance = source.rate, source.key_distance
            with open_video(job.place, "pyav") as video, opened(job.place) as (_, size):
                height, width = video.read([0]).shape[1:3]
                count = min(job.num_frames or video.num_frames, video.num_frames)
            seconds = time.perf_counter() - began
            yield Made(
                count,
                height,
                width,
                float(rate),
                distance,
                size,
                seconds,
                source_bytes=stamp.bytes or 0,
                source_modified=stamp.modified,
            )
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - native libraries raise anything
            yield Failed(_reason(error))


@dataclass(frozen=True)
class Shard:
    """Samples that go into one tar file."""

    beside: str
    target: str
    samples: tuple[Packable, ...]


@dataclass(frozen=True)
class Packer:
    """Writes shards."""

    def __call__(self, shard: Shard) -> Iterator[Step | Broken | list[Packed]]:
        """-> steps, and at last where each sample lies"""
        beat, packed = Beat(), None
        try:
            for packed in write_shard(Path(shard.beside), shard.samples):
                if packed is None and beat.is_due():
                    yield Step(0)
            Path(shard.beside).replace(shard.target)
            yield packed or []
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the run is told, whatever it is
            yield Broken(f"{shard.target} cannot be written: {_reason(error)}")
        finally:
            remove(shard.beside)


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


def check(place: str, written: Written, fps: Fraction, beat: Beat) -> Generator[Step, None, Made]:
    """Open an output as training does, and decode all of it.

    Raises:
        NotTheSameError: it is not what was to be written.
    """
    distance, size = 1, 0
    if place.endswith(".mp4"):
        distance = yield from _check_times(place, written, fps, beat)
    with open_video(place, "pyav") as video:
        if video.num_frames != written.num_frames:
            raise NotTheSameError(
                f"what was written has {video.num_frames} frames instead of {written.num_frames}"
            )
        for shape in _decoded(video, written, distance):
            if shape != written.size:
                raise NotTheSameError(
                    f"what was written has frames of {shape} instead of {written.size}"
                )
            if beat.is_due():
                yield Step(written.num_frames)
    size = bytes_of(place)
    height, width = written.size
    return Made(written.num_frames, height, width, float(fps), distance, size, 0.0)


def _check_times(
    place: str, written: Written, fps: Fraction, beat: Beat
) -> Generator[Step, None, int]:
    """-> frames from one key frame to the next, at most"""
    with contextlib.closing(VideoStream(place)) as stream:
        for _ in stream.survey():
            if beat.is_due():
                yield Step(written.num_frames)
        if written.num_frames > 1 and abs(stream.rate / fps - 1) > 1e-3:
            raise NotTheSameError(
                f"what was written has {float(stream.rate):g} frames a second instead of "
                f"{float(fps):g}"
            )
        return stream.key_distance


def _decoded(video: VideoReader, written: Written, distance: int) -> Iterator[Size]:
    """All frames in turn, several at once. -> their sizes"""
    height, width = written.size
    run = max(1, CHECKED_BYTES // (3 * height * width) // distance) * distance
    for first in range(0, written.num_frames, run):
        frames = video.read(range(first, min(first + run, written.num_frames)))
        yield frames.shape[1], frames.shape[2]


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
        from hpm_video.preparation.encode import picture_of

        for number in range(self.num_packets):
            yield Timed(number / self.rate, picture_of(self._video.read([number])[0]))

    def close(self) -> None:
        self._video.close()


def _opened_source(job: Job) -> "VideoStream | _PictureStream":
    if is_image(job.place) or is_frame_folder(job.place):
        return _PictureStream(job.place, job.fps)
    return VideoStream(job.place)


class _Read:
    """Frames of a source, counted, as many as a job wants."""

    def __init__(self, frames: Iterator[Timed], job: Job) -> None:
        self.count = 0
        self._frames = frames
        self._job = job
        self._start: Fraction | None = None

    def __iter__(self) -> "_Read":
        return self

    def __next__(self) -> Timed:
        if self.count == self._job.num_frames:
            raise StopIteration  # before the next is decoded, which may be damaged
        timed = next(self._frames)
        self._start = timed.time if self._start is None else self._start
        if self._job.cut is not None and timed.time - self._start > self._job.cut:
            raise StopIteration
        self.count += 1
        return timed


def _load() -> None:
    import hpm_video.preparation.encode  # noqa: F401 - loads av

    choose_decoder("pyav")  # it decodes a test video


def _first(frames: Iterator[Any]) -> "VideoFrame":
    first: VideoFrame | None = next(frames, None)
    if first is None:
        raise ValueError("it has no frames")
    return first


def _short_of(source: "VideoStream | _PictureStream") -> str:
    """What to say where a file ends before its header says."""
    if source.num_packets >= source.stated_frames:
        return ""
    return (
        f"{source.num_packets} of the {source.stated_frames} frames are there that its header "
        f"announces: it may be cut off"
    )


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Tell a disk that takes nothing more from a file that cannot be encoded."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise UnwritableError(error.errno, error.strerror, error.filename) from error
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, DecodeError):
        return error.reason
    said = str(getattr(error, "strerror", None) or error)  # the rest is the path
    plain = type(error) is ValueError or isinstance(error, NotTheSameError | ShardError)
    return " ".join((said if plain else f"{type(error).__name__}: {said}").split())[:500]


def _put(beside: str, target: str) -> None:
    """Rename; a target that is there already is of a run that was killed, and is replaced."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if is_frame_folder(target):
        shutil.rmtree(target, ignore_errors=True)
    Path(beside).replace(target)


def remove(place: str) -> None:
    """Delete a file or a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if Path(place).is_dir():
            shutil.rmtree(place)
        else:
            Path(place).unlink()


def bytes_of(place: str) -> int:
    """How large a file is, a folder of frames or a member of a tar.

    Raises:
        OSError: it is not there.
    """
    if is_frame_folder(place):
        return sum(frame.stat().st_size for frame in frames_in(place))
    member = TarMember.parse(place)
    return member.size if member else os.stat(place).st_size  # noqa: PTH116 - a place is a string
