"""Transcoding of one file, to be small and quick to read: work for a pool, frame by frame."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from hpm_video.decoding.locations import base_name, frames_in, is_frame_folder, is_image
from hpm_video.decoding.orientation import upright_size
from hpm_video.decoding.reader import DecodeError, Size
from hpm_video.decoding.registry import open_video
from hpm_video.decoding.video_stream import USUAL_RATE, Timed, VideoStream
from hpm_video.files.failures import Failure
from hpm_video.preparation.check import AGAIN
from hpm_video.preparation.encode import Resizer, VideoWriter, fitted_size, picture_of
from hpm_video.preparation.findings import stamp_of
from hpm_video.preparation.jobs import Steps, attempt, remove

if TYPE_CHECKING:
    from hpm_video.decoding.video_stream import VideoFrame

LONGEST_STILL = 600  # seconds; where a frame is shown for longer, its times are wrong
CLOCK = Fraction(1, 1000)  # seconds to which some containers round the times of frames


@dataclass(frozen=True)
class Recipe:
    """Format and quality of the outputs."""

    form: Literal["files", "frames", "shards"]
    short_side: int  # pixels; smaller frames keep their size
    fps: Fraction | None  # frames per second; none keeps the source's
    key_frames: int  # largest distance of key frames
    crf: int
    quality: int  # JPEG quality
    shard_bytes: int  # largest size of a shard of more than one sample
    copy: bool  # pack files into shards unchanged
    keep_every: int = 1  # N keeps the first frame, and every N-th from there on

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


@dataclass(frozen=True)
class Output:
    """Result of a job."""

    num_frames: int
    height: int
    width: int
    fps: float  # 0 for an image
    key_frame_distance: int
    bytes: int
    source_bytes: int = 0
    source_modified: str = ""  # time of the source's last change before it was read
    note: str = ""  # anything odd about the source


@dataclass(frozen=True)
class Transcoder:
    """Work of a process: writes outputs by a recipe, and moves each to its target."""

    recipe: Recipe

    def __call__(self, job: Job) -> Iterator[Output | Failure | None]:
        """Do a job."""
        return attempt(self._do(job), job.place)

    def _do(self, job: Job) -> Steps[Output]:
        size, time = stamp_of(job.place)
        output = yield from _probe(job) if self.recipe.copy else self._transcode(job)
        fps = 0.0 if is_image(job.place) else output.fps
        return replace(output, fps=fps, source_bytes=size or 0, source_modified=time)

    def _transcode(self, job: Job) -> Steps[Output]:
        remove(job.temporary)  # of an attempt whose process was lost
        with closing(_open_source(job)) as source:
            yield from source.survey()
            rate = source.rate or USUAL_RATE
            fps = self.recipe.fps or rate / self.recipe.keep_every
            selected = islice(source.frames(), job.num_frames)
            frames = (
                at_rate(selected, fps, rate)
                if self.recipe.fps
                else (timed.frame for timed in islice(selected, 0, None, self.recipe.keep_every))
            )
            first = next(frames, None)
            if first is None:
                why = f"none of its frames can be read ({source.damage}): {AGAIN}"
                raise DecodeError(why if source.damage else "it has no frames")
            size = fitted_size(upright_size(first), self.recipe.short_side)
            write = self._write_video if job.target.endswith(".mp4") else self._write_pictures
            count, distance = yield from write(job.temporary, chain([first], frames), size, fps)
        Path(job.target).parent.mkdir(parents=True, exist_ok=True)
        remove(job.target)  # a killed run may have left a folder
        Path(job.temporary).replace(job.target)
        written, note = stamp_of(job.target).bytes or 0, _losses(source, job.num_frames)
        return Output(count, *size, float(fps), distance, written, note=note)

    def _write_video(
        self, path: str, frames: Iterator["VideoFrame"], size: Size, fps: Fraction
    ) -> Steps[tuple[int, int]]:
        """Write a video. -> the number of frames, and the largest distance of key frames"""
        resizer, to = Resizer(size), self.recipe
        with VideoWriter(Path(path), fps, to.crf, to.key_frames, quick=True) as writer:
            for frame in frames:
                small = resizer.yuv(frame)
                if not writer.count:
                    writer.describe_colours(small)
                writer.write(small)
                yield
        with closing(VideoStream(path)) as written:
            yield from written.survey()
        if written.num_frames != writer.count:
            raise DecodeError(f"{written.num_frames} frames were written instead of {writer.count}")
        return writer.count, written.key_distance

    def _write_pictures(
        self, path: str, frames: Iterator["VideoFrame"], size: Size, _: Fraction
    ) -> Steps[tuple[int, int]]:
        """Write an image, or a folder of frames, of which each is a key frame."""
        resizer, count = Resizer(size), 0
        if is_frame_folder(path):
            Path(path).mkdir()
        for count, frame in enumerate(frames, start=1):
            name = f"{count - 1:06d}.jpg" if is_frame_folder(path) else ""
            picture = Image.fromarray(resizer.rgb(frame))
            picture.save(path + name, "JPEG", quality=self.recipe.quality)
            yield
        return count, 1


def _probe(job: Job) -> Steps[Output]:
    """Open a file that is packed unchanged, and decode its first frame."""
    if is_frame_folder(job.place):
        raise DecodeError("a folder of frames cannot be packed as it is; leave out --copy")
    with closing(_open_source(job)) as source:
        yield from source.survey()
    with open_video(job.place, "pyav") as video:
        height, width = video.read([0]).shape[1:3]
        count = min(job.num_frames or video.num_frames, video.num_frames)
    size = stamp_of(job.place).bytes or 0
    rate = float(source.rate or USUAL_RATE)
    return Output(count, height, width, rate, source.key_distance, size)


def at_rate(
    frames: Iterator[Timed], fps: Fraction, source_rate: Fraction
) -> Iterator["VideoFrame"]:
    """Yield a frame for each multiple of 1 / fps: the one that is shown at that time.

    The last frame is shown for the average duration of the source's frames.
    """
    held: Timed | None = None
    due = CLOCK
    for following in frames:
        if held is None:
            due += following.time
        elif (shown := following.time - held.time) > LONGEST_STILL:
            raise DecodeError(
                f"its times are wrong: a frame would be shown for {float(shown):.0f} s"
            )
        while held and due < following.time:
            yield held.frame
            due += 1 / fps
        held = following
    while held and due < held.time + 1 / source_rate:
        yield held.frame
        due += 1 / fps


class _PictureStream:
    """Stream of a folder of frames or an image, with the interface of ``VideoStream``."""

    key_distance = 1
    stated_frames = num_read = 0
    damage = ""

    def __init__(self, place: str, fps: Fraction | None) -> None:
        self._files = [*map(str, frames_in(place))] if is_frame_folder(place) else [place]
        self.rate = fps
        self.num_frames = len(self._files)

    def survey(self) -> Iterator[None]:
        return iter(())

    def cut_off(self) -> str:
        return ""

    def frames(self) -> Iterator[Timed]:
        for number, file in enumerate(self._files):
            try:
                with open_video(file) as image:
                    picture = picture_of(image.read([0])[0])
            except DecodeError as error:
                if self.num_frames == 1:
                    raise
                self.damage = f"{base_name(file)}: {error.reason}"
                return
            self.num_read += 1
            yield Timed(number / (self.rate or USUAL_RATE), picture)

    def close(self) -> None:
        """Nothing is held."""


def _open_source(job: Job) -> VideoStream | _PictureStream:
    if is_image(job.place) or is_frame_folder(job.place):
        return _PictureStream(job.place, job.fps)
    return VideoStream(job.place)


def _losses(source: VideoStream | _PictureStream, wanted: int | None) -> str:
    """Say how many of the frames that were wanted are lost, and why; nothing where none is."""
    cut = source.cut_off()
    total = max(source.num_frames, source.stated_frames if cut else 0)
    total = min(total, wanted or total)
    if source.num_read >= total:
        return "" if wanted else cut
    why = source.damage or cut or "they do not come out of the decoder"
    return f"{total - source.num_read} of {total} frames are lost ({why})"
