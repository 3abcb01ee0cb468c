"""Reading of clips: a file becomes the pixels of the clips that are requested.

A dense clip takes frames at a stride and spans ``num_frames * stride`` of them. In a video shorter
than that it starts at the first frame, and the last frame that the stride reaches repeats. With
``data.fps`` the stride follows from the frame rate and need not be whole: it leads to moments, and
the frames are those that are shown nearest to them. A clip of segments takes one frame of each of
``num_frames`` equal parts of the video. Where a section of a file is meant, it is the video.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderChoice
from hpm_video.config.data import DataConfig
from hpm_video.data.batch import Sample
from hpm_video.data.transforms import ClipTransform, cut, view_crops
from hpm_video.decoding.locations import Section, is_frame_folder
from hpm_video.decoding.reader import DecodeError, DecoderError, VideoReader
from hpm_video.decoding.registry import choose_decoder, open_video
from hpm_video.files.failures import Failure
from hpm_video.randomness import generator, key_of

Indices = NDArray[np.int64]
ROUNDED = 0.5  # seconds that a section may end after the video: lists often have whole seconds
FIRST_RUN = 32  # frames that are read at first, before it is known how large they are
RUN_BYTES = 2**27  # of the frames that are read at once later on: about 20 of 1080p, 500 of 240p


@dataclass(frozen=True)
class Views:
    """The views of a video for validation and tests: so many clips, and so many crops of each.

    A single clip or crop is in the middle; one of segments has the first frame of each.
    """

    clips: int = 1
    crops: int = 1
    every: int | None = None
    """Frames by which a window slides over the video. The clips are then those of the window."""
    first: int | None = None
    """Where given, there is instead one dense clip that begins with this frame."""

    @property
    def count(self) -> int:
        """The number of views of each video (R), where it does not depend on its length."""
        return self.clips * self.crops


MIDDLE = Views()


@dataclass(frozen=True)
class Footage:
    """The frames of a file that clips may be taken from."""

    first: int
    count: int
    stride: float | None = None  # from one frame of a clip to the next, where time decides
    kept_every: int = 1
    """Strides of a config count the frames of a video of which the file holds every N-th."""
    seconds: NDArray[np.float64] | None = None  # (count,) when each frame is shown

    @classmethod
    def of(cls, data: DataConfig, video: VideoReader, request: "Request") -> "Footage":
        """Find the frames of the section that is requested, or of the whole file.

        Raises DecodeError if it is not in the video, or times matter and nothing states them.
        """
        section, count = Section.parse(request.path), video.frames_stated(request.num_frames)
        if data.fps is None and not section.mark:
            return cls(0, count, kept_every=request.kept_every)
        if is_frame_folder(section.file) and request.fps:
            seconds = np.arange(count) / request.fps
        else:
            seconds = video.seconds(count)
        length = seconds[-1] * count / max(count - 1, 1)
        first, end = np.searchsorted(seconds, (section.start, section.end)).tolist()
        if first >= end or length + ROUNDED < section.end < np.inf:
            until = "its end" if section.end == np.inf else f"{section.end:g} s"
            raise DecodeError(
                f"it lasts {length:.2f} s, so it has no section from {section.start:g} s to {until}"
            )
        seconds, count, stride = seconds[first:end], end - first, None
        if data.fps is not None:  # rounded, for times in a file are
            stride = round((count - 1) / ((seconds[-1] - seconds[0]) * data.fps or 1), 6) or 1.0
        return cls(first, count, stride, request.kept_every, seconds)

    def draw(self, data: DataConfig, draw: np.random.Generator) -> Indices:
        """Draw the frames of a training clip: -> (T,)"""
        if data.sampling == "segments":
            return self.first + train_segments(self.count, draw.random(data.num_frames).tolist())
        stride = self.stride
        if stride is None:
            shortest = data.frame_stride or 1
            longest = data.max_frame_stride or shortest
            ends = shortest // self.kept_every, longest // self.kept_every
            stride = int(draw.integers(*ends, endpoint=True))
        begin = int(draw.random() * (self._last_start(data, stride) + 1))
        return self._dense(data, stride, [begin])[0]

    def views(self, data: DataConfig, views: Views) -> Indices:
        """Choose the frames of each clip of the views: -> (clips, T), the first ascending

        Of several, the first starts with the video and the last ends with it. A window goes on as
        long as it fits; where it does not end with the video, one more clip does.

        Raises DecodeError if the video ends before the clip that was asked for.
        """
        stride = self.stride or (data.frame_stride or 1) // self.kept_every
        first, last = views.first, self._last_start(data, stride)
        if first is not None and first >= self.count:
            raise DecodeError(
                f"its clip must begin in frames 0 to {self.count - 1}, not in {first}"
            )
        if first is not None:
            starts = [first]
        elif views.every is not None:
            starts = [*range(0, last, views.every), last]
        elif data.sampling == "segments":
            return self.first + view_segments(self.count, data.num_frames, views.clips)
        elif views.clips > 1:
            starts = [view * last // (views.clips - 1) for view in range(views.clips)]
        else:
            starts = [last // 2]
        return self._dense(data, stride, starts)

    def _last_start(self, data: DataConfig, stride: float) -> int:
        """Return the last frame that a dense clip which fits into the video may begin with."""
        return int(max(self.count - data.num_frames * stride, 0))

    def _dense(self, data: DataConfig, stride: float, starts: Sequence[int]) -> Indices:
        """Return the dense clips that begin with these frames: -> (clips, T)"""
        begin = np.asarray(starts, dtype=np.int64)[:, None]
        last_reached = (self.count - 1 - begin) // stride
        positions = begin + stride * np.minimum(np.arange(data.num_frames), last_reached)
        if self.seconds is None or self.stride is None or self.count == 1:
            return (self.first + positions).astype(np.int64)
        shown, last_shown = self.seconds[[0, -1]]
        moments = shown + positions * (last_shown - shown) / (self.count - 1)
        between = (self.seconds[1:] + self.seconds[:-1]) / 2
        return self.first + np.searchsorted(between, moments)


def train_segments(num_video_frames: int, frame_draws: Sequence[float]) -> Indices:
    """Choose one frame of each segment by a draw in [0, 1): (num_frames,) -> (num_frames,)"""
    places = np.arange(len(frame_draws)) + np.asarray(frame_draws, dtype=np.float64)
    indices = np.floor(num_video_frames * places / len(frame_draws)).astype(np.int64)
    return np.minimum(indices, num_video_frames - 1)  # a draw just below 1 may be rounded up


def view_segments(num_video_frames: int, num_frames: int, num_views: int) -> Indices:
    """Choose clips of segments, each a share of a segment later: -> (num_views, num_frames)

    View k of n takes the frames floor(L / T (x + k / n)), x = 0 .. T - 1, of a video of L frames,
    T of which make a clip.
    """
    places = np.arange(num_frames) * num_views + np.arange(num_views)[:, None]
    return num_video_frames * places // (num_frames * num_views)


@dataclass(frozen=True)
class Request:
    """One row of a manifest, and what is to be taken from it. Small: it goes to another process."""

    path: str  # place of the file, or of the section of it that is meant
    label: int
    num_frames: int  # frames that the file is known to have, -1 where that is unknown
    keys: tuple[tuple[int | str, ...], ...]  # keys that the random draws of each clip derive from
    fps: float = 0.0
    """Frames per second that a folder of frames stands for, 0 where that is unknown."""
    kept_every: int = 1  # N where the file holds only every N-th frame of a video


@dataclass(frozen=True)
class Reader:
    """Reads a file that is asked for, in any process. Picklable, and small."""

    data: DataConfig
    decoder: DecoderChoice

    def prepare(self) -> None:
        """Import what takes long to import, before the first file is read."""
        with suppress(DecoderError):  # there may be none, for images
            choose_decoder(self.decoder)

    @contextmanager
    def open(self, request: Request) -> Iterator[tuple[VideoReader, Footage]]:
        """Open a file, and find the frames that its clips may be taken from.

        Raises DecodeError as :func:`open_video` and :meth:`Footage.of` do.
        """
        with open_video(Section.parse(request.path).file, self.decoder) as video:
            yield video, Footage.of(self.data, video, request)


@dataclass(frozen=True)
class ClipReader(Reader, ABC):
    """Reads the clips of a file."""

    source: str

    def __call__(self, request: Request) -> Sample:
        """Read the clips. Raises DecodeError as :func:`read_frames` does."""
        with self.open(request) as (video, footage):
            clips = self.read(video, footage, request)
        keys = tuple(key_of(*key) for key in request.keys)
        return Sample(clips, keys, request.label, request.path, source=self.source)

    @abstractmethod
    def read(self, video: VideoReader, footage: Footage, request: Request) -> Tensor:
        """Read the clips of an open video: -> (R, C, T, H, W) uint8"""


@dataclass(frozen=True)
class TrainReader(ClipReader):
    """Reads training clips: their frames and crops are drawn by their keys."""

    transform: ClipTransform
    same_frames: bool

    def prepare(self) -> None:
        super().prepare()
        self.transform.prepare()

    def read(self, video: VideoReader, footage: Footage, request: Request) -> Tensor:
        draws = [generator("clip", *key) for key in request.keys]
        clips = [footage.draw(self.data, draw) for draw in draws]
        if self.same_frames:
            clips = clips[:1] * len(clips)
        distinct = np.unique(np.concatenate(clips))
        frames = read_frames(self.data, video, distinct)
        height, width = frames.shape[1:3]
        made = []
        for clip, draw in zip(clips, draws, strict=True):
            box, change = self.transform.draw((height, width), self.data.frame_size, draw)
            made.append(change(cut(frames, box)[np.searchsorted(distinct, clip)]))
        return torch.stack(made)


@dataclass(frozen=True)
class EvalReader(ClipReader):
    """Reads validation clips: views that are spread evenly over the file, clip by clip."""

    views: Views

    def read(self, video: VideoReader, footage: Footage, request: Request) -> Tensor:  # noqa: ARG002 - nothing is drawn
        table = footage.views(self.data, self.views)
        return torch.cat([*read_views(self.data, video, table, self.views.crops)])


def read_or_fail(reader: ClipReader, request: Request) -> Sample | Failure:
    """Return what is asked for, or why it does not decode."""
    try:
        return reader(request)
    except DecodeError as error:
        return Failure(request.path, error.reason)


def read_views(
    data: DataConfig, video: VideoReader, clips: Indices, crops: int
) -> Iterator[Tensor]:
    """Yield the crops of each clip in bounded memory: (clips, T) -> (crops, C, T, h, w) uint8

    Each frame is read once, and its crops kept while a clip needs them: first frames must ascend.
    """

    def frames() -> Iterator[tuple[int, Tensor]]:
        wanted, run, at = np.unique(clips), FIRST_RUN, 0
        while at < len(wanted):
            indices = wanted[at : at + run]
            pixels = read_frames(data, video, indices)
            of_run = torch.stack(view_crops(pixels, data, crops))
            at, run = at + run, max(1, RUN_BYTES // pixels[0].nbytes)
            del pixels  # while the crops are used
            yield from zip(indices.tolist(), of_run.unbind(dim=2), strict=True)

    left = frames()
    held: dict[int, Tensor] = {}
    for clip in clips.tolist():
        held = {index: frame for index, frame in held.items() if index >= clip[0]}
        while clip[-1] not in held:
            index, frame = next(left)
            held[index] = frame
        yield torch.stack([held[index] for index in clip], dim=2)


def read_frames(data: DataConfig, video: VideoReader, indices: Indices) -> NDArray[np.uint8]:
    """Read frames: (K,) -> (K, H, W, C). Raises DecodeError if the data have other channels."""
    frames = video.read(indices)
    if frames.shape[-1] != data.channels:
        raise DecodeError(
            f"its frames have {frames.shape[-1]} channels, and data.mean has values for "
            f"{data.channels}; set model.channels, data.mean and data.std for its channels, or "
            "choose a reader that gives others (data.decoder)"
        )
    return frames
