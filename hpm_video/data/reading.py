"""Reading of clips: a file becomes the pixels of the clips that are requested.

A :class:`DataConfig` defines what a clip is. An image is a video of one frame.
"""

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderChoice
from hpm_video.config.data import DataConfig
from hpm_video.data.batch import Sample
from hpm_video.data.sampling import (
    Indices,
    train_indices,
    train_segments,
    view_indices,
    view_segments,
    window_indices,
)
from hpm_video.data.transforms import (
    ClipTransform,
    cut,
    view_crops,
)
from hpm_video.decoding.registry import (
    DecodeError,
    DecoderError,
    VideoReader,
    choose_decoder,
    open_video,
)
from hpm_video.files.failures import Failure
from hpm_video.randomness import generator, key_of


@dataclass(frozen=True)
class Views:
    """The views of a video for validation and tests: so many clips, and so many crops of each."""

    clips: int = 1
    crops: int = 1
    every: int | None = None
    """Where given, the clips are instead those of a window that slides over the video by so many
    frames at a time."""

    def __post_init__(self) -> None:
        if min(self.clips, self.crops) < 1:
            raise ValueError(
                f"a video needs at least 1 x 1 view (clips x crops), got {self.clips} x "
                f"{self.crops}"
            )

    @property
    def count(self) -> int:
        """Views of each video (R), where their number does not depend on its length."""
        return self.clips * self.crops


MIDDLE = Views(1, 1)
"""One clip: of dense ones that in the middle of the video, of segments the first frame of each;
and the middle of its frames."""


def draw_frames(data: DataConfig, num_video_frames: int, draw: np.random.Generator) -> Indices:
    """The frames of a training clip: -> (T,)"""
    if data.sampling == "segments":
        return train_segments(num_video_frames, draw.random(data.num_frames).tolist())
    longest = data.max_frame_stride or data.frame_stride
    stride = int(draw.integers(data.frame_stride, longest, endpoint=True))
    return train_indices(num_video_frames, data.num_frames, stride, draw.random())


def view_frames(data: DataConfig, num_video_frames: int, views: Views) -> Indices:
    """The frames of each clip of the views of a video, by their first frame: -> (clips, T)"""
    num_frames, stride = data.num_frames, data.frame_stride
    if views.every is not None:
        return window_indices(num_video_frames, num_frames, stride, views.every)
    if data.sampling == "segments":
        return view_segments(num_video_frames, num_frames, views.clips)
    return view_indices(num_video_frames, num_frames, stride, views.clips)


@dataclass(frozen=True)
class Request:
    """One file, and what is to be taken from it. Small: it goes to the process that decodes."""

    path: str
    label: int
    num_frames: int
    """Frames that the file is known to have, -1 where that is unknown."""
    keys: tuple[tuple[int | str, ...], ...]
    """Keys that the random draws of each clip derive from."""


@dataclass(frozen=True)
class ClipReader(ABC):
    """Reads the clips of a file that are asked for, in any process. Picklable, and small."""

    data: DataConfig
    decoder: DecoderChoice
    source: str

    def prepare(self) -> None:
        """Import what takes long to import, before the first file is read."""
        prepare_decoder(self.decoder)

    def __call__(self, request: Request) -> Sample:
        """The clips of a file.

        Raises:
            DecodeError: it does not decode, or its frames have other channels than the data.
        """
        with open_video(request.path, self.decoder) as video:
            clips = self.read(video, known_frames(request.num_frames, video), request)
        keys = tuple(key_of(*key) for key in request.keys)
        return Sample(clips, keys, request.label, request.path, source=self.source)

    @abstractmethod
    def read(self, video: VideoReader, num_frames: int, request: Request) -> Tensor:
        """The clips of an open video: -> (R, C, T, H, W) uint8"""


@dataclass(frozen=True)
class TrainReader(ClipReader):
    """Reads training clips: their frames and crops are drawn by their keys."""

    transform: ClipTransform
    same_frames: bool

    def prepare(self) -> None:
        """Import what takes long to import."""
        super().prepare()
        self.transform.prepare()

    def read(self, video: VideoReader, num_frames: int, request: Request) -> Tensor:
        """Draw frames and crops, and read what they need of the video."""
        draws = [generator("clip", *key) for key in request.keys]
        clips = [draw_frames(self.data, num_frames, draw) for draw in draws]
        if self.same_frames:
            clips = clips[:1] * len(clips)
        frames, places = _read(self.data, video, clips)
        height, width = frames.shape[1:3]
        drawn = [self.transform.draw((height, width), self.data.frame_size, d) for d in draws]
        return torch.stack(
            [each(cut(frames, each.box)[place]) for place, each in zip(places, drawn, strict=True)]
        )


@dataclass(frozen=True)
class EvalReader(ClipReader):
    """Reads validation clips: views that are spread evenly over the file."""

    views: Views

    def read(self, video: VideoReader, num_frames: int, request: Request) -> Tensor:  # noqa: ARG002 - nothing is drawn
        """Crop and resize once per frame and box, however many clips it belongs to."""
        clips = list(view_frames(self.data, num_frames, self.views))
        frames, places = _read(self.data, video, clips)
        crops = view_crops(frames, self.data, self.views.crops)
        return torch.stack([crop[:, place] for place in places for crop in crops])


def read_or_fail(reader: ClipReader, request: Request) -> Sample | Failure:
    """What is asked for, or why it does not decode."""
    try:
        return reader(request)
    except DecodeError as error:
        return Failure(request.path, error.reason)


def prepare_decoder(decoder: DecoderChoice) -> None:
    """Import the decoder, so that no file has to wait for it. There may be none, for images."""
    with suppress(DecoderError):
        choose_decoder(decoder)


def known_frames(stated: int, video: VideoReader) -> int:
    """Return the number of frames; where the container only promises it, the stated one counts."""
    return video.frames_stated(stated) if stated > 0 else video.num_frames


def clip_bytes(data: DataConfig) -> int:
    """Return the bytes of a clip's pixels."""
    num_frames, height, width = data.clip_size
    return data.channels * num_frames * height * width


def read_frames(data: DataConfig, video: VideoReader, indices: Indices) -> NDArray[np.uint8]:
    """Frames of the channels that the data state: (K,) -> (K, H, W, C)

    Raises:
        DecodeError: they do not decode, or have others.
    """
    frames = video.read(indices)
    if frames.shape[-1] != data.channels:
        raise DecodeError(
            f"its frames have {frames.shape[-1]} channels, and data.mean has values for "
            f"{data.channels}; set model.channels, data.mean and data.std for its channels, or "
            "choose a reader that gives others (data.decoder)"
        )
    return frames


def _read(
    data: DataConfig, video: VideoReader, clips: list[Indices]
) -> tuple[NDArray[np.uint8], list[Indices]]:
    """The frames of several clips, and where in them each clip finds its own."""
    distinct = np.unique(np.concatenate(clips))
    return read_frames(data, video, distinct), [np.searchsorted(distinct, clip) for clip in clips]
