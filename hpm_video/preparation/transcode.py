"""Transcoding of one file, to be small and quick to read.

Work for :class:`hpm_video.workers.pool.Pool`, frame by frame. A file is done when its output has
been opened and decoded again.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from hpm_video.decoding.locations import base_name, frames_in, is_frame_folder, is_image
from hpm_video.decoding.orientation import upright_size
from hpm_video.decoding.reader import DecodeError, Size
from hpm_video.decoding.registry import choose_decoder, open_video
from hpm_video.decoding.video_stream import USUAL_RATE, Timed, VideoStream
from hpm_video.files.failures import Failure
from hpm_video.preparation.check import AGAIN, examine
from hpm_video.preparation.encode import Resizer, Tune, VideoWriter, fitted_size, picture_of
from hpm_video.preparation.findings import stamp_of
from hpm_video.preparation.jobs import Steps, attempt

if TYPE_CHECKING:
    from hpm_video.decoding.video_stream import VideoFrame

LONGEST_STILL = 600  # seconds; where a frame is shown for longer, its times are wrong
CLOCK = Fraction(1, 1000)  # seconds to which some containers round the times of frames


@dataclass(frozen=True)
class Recipe:
    """Format and quality of the outputs."""

    form: Literal["files", "frames", "shards"]
    short_side: int  # pixels, even; smaller frames keep their size
    fps: Fraction | None  # frames per second; none keeps the source's
    key_frames: int  # largest distance of key frames
    crf: int
    quality: int  # JPEG quality
    shard_bytes: int  # largest size of a shard of more than one sample
    copy: bool  # pack files into shards unchanged
    tune: Tune = "fastdecode"
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
            rate = source.rate or USUAL_RATE
            fps = self.recipe.fps or rate / self.recipe.keep_every
            selected: Iterator[Timed] = islice(source.frames(), job.num_frames)
            if job.cut:
                selected = takewhile(lambda timed: timed.time <= (job.cut or 0), selected)
            frames = (
                at_rate(selected, fps, rate)
                if self.recipe.fps
                else (timed.frame for timed in islice(selected, 0, None, self.recipe.keep_every))
            )
            first = next(frames, None)
            if first is None:
                why = f"none of its frames can be read ({source.damage}): {AGAIN}"
                raise ValueError(why if source.damage else "it has no frames")
            size = fitted_size(upright_size(first), self.recipe.short_side)
            all_frames = chain([first], frames)
            if job.target.endswith(".mp4"):
                count = yield from self._write_video(job.temporary, all_frames, size, fps)
            else:
                count = yield from self._write_pictures(job.temporary, all_frames, size)
        output = yield from check(job.temporary, count, size, fps)
        Path(job.target).parent.mkdir(parents=True, exist_ok=True)
        if is_frame_folder(job.target):  # a killed run may have left one
            shutil.rmtree(job.target, ignore_errors=True)
        Path(job.temporary).replace(job.target)
        if job.cut:
            return replace(output, share=min(1.0, float(job.cut * rate) / source.num_frames))
        return replace(output, note=_losses(source, job.num_frames))

    def _write_video(
        self, path: str, frames: Iterator["VideoFrame"], size: Size, fps: Fraction
    ) -> Steps[int]:
        resizer, to = Resizer(size), self.recipe
        with VideoWriter(Path(path), size, fps, to.crf, to.key_frames, True, to.tune) as writer:
            for frame in frames:
                small = resizer.yuv(frame)
                if not writer.count:
                    writer.describe_colours(small)
                writer.write(small)
                yield
        return writer.count

    def _write_pictures(self, path: str, frames: Iterator["VideoFrame"], size: Size) -> Steps[int]:
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
            rate, distance = source.rate or USUAL_RATE, source.key_distance
    with open_video(job.place, "pyav") as video:
        height, width = video.read([0]).shape[1:3]
        count = min(job.num_frames or video.num_frames, video.num_frames)
    size = stamp_of(job.place).bytes or 0
    return Output(count, height, width, float(rate), distance, size)


def check(place: str, num_frames: int, size: Size, fps: Fraction) -> Steps[Output]:
    """Decode all of an output; where it is not as expected, that is a ValueError."""
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
    held: Timed | None = None
    due = CLOCK
    for following in frames:
        if held is None:
            due += following.time
        elif (shown := following.time - held.time) > LONGEST_STILL:
            raise ValueError(
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
