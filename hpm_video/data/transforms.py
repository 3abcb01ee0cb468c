"""Crops and resizing: frames of a video become the pixels of a clip."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hpm_video.config.choices import Interpolation
from hpm_video.config.data import DataConfig

LONGEST = 16  # ratio of sides from which on a frame is cut: resized, the rest would be huge
SCALES = (1.0, 0.875, 0.75, 0.66)
"""Sides of a multi-scale crop, as shares of those of the largest crop."""
SCALE_PAIRS = tuple(
    (height, width)
    for i, height in enumerate(SCALES)
    for j, width in enumerate(SCALES)
    if abs(i - j) <= 1
)
"""Scales of height and width: at most one step apart, so that the crop is hardly distorted."""
OFFSETS = (
    ((0, 0), (0, 4), (4, 0), (4, 4))  # corners
    + ((0, 2), (2, 0), (2, 2), (2, 4), (4, 2))  # middles of the sides, and of the frame
    + ((1, 1), (1, 3), (3, 1), (3, 3))  # halfway from the middle to the corners
)
"""Places of a multi-scale crop: quarters of the free way from the top and from the left."""


@dataclass(frozen=True)
class Box:
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


Change = Callable[[NDArray[np.uint8]], Tensor]
"""Turns a box of frames into a clip: (T, box.height, box.width, C) uint8 -> (C, T, h, w) uint8"""


class ClipTransform(ABC):
    """How the frames of a training clip become its pixels, at random."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Import what takes long to import."""

    @abstractmethod
    def draw(
        self, size: tuple[int, int], frame_size: tuple[int, int], draw: np.random.Generator
    ) -> tuple[Box, Change]:
        """Draw a box of frames of ``size``, height and width, and what becomes of it."""


@dataclass(frozen=True)
class MultiScaleCrop(ClipTransform):
    """A multi-scale crop, the same in all frames: the augmentation of pre-training."""

    flip: bool  # whether half of the clips are mirrored
    interpolation: Interpolation = "bilinear"

    def draw(
        self, size: tuple[int, int], frame_size: tuple[int, int], draw: np.random.Generator
    ) -> tuple[Box, Change]:
        box = multi_scale_box(*size, frame_size, draw)
        mirrored = self.flip and draw.random() < 0.5
        change = partial(resize, frame_size=frame_size, interpolation=self.interpolation)
        return box, partial(change, mirrored=mirrored)


def multi_scale_box(
    height: int, width: int, frame_size: tuple[int, int], generator: np.random.Generator
) -> Box:
    """Draw one of four heights, of the widths next to it, and of 13 places in the frame.

    The scales refer to the largest box of the shape of ``frame_size`` in the frame: for a square
    ``frame_size``, to the short side of the frame.
    """
    largest = centre_box(height, width, frame_size)
    scale_height, scale_width = SCALE_PAIRS[generator.integers(len(SCALE_PAIRS))]
    down, right = OFFSETS[generator.integers(len(OFFSETS))]
    box_height = max(1, int(largest.height * scale_height))
    box_width = max(1, int(largest.width * scale_width))
    return Box(
        (height - box_height) * down // 4, (width - box_width) * right // 4, box_height, box_width
    )


def centre_box(height: int, width: int, frame_size: tuple[int, int]) -> Box:
    """Return the largest box in the middle of a frame that has the shape of ``frame_size``."""
    rows, columns = frame_size
    if width * rows > height * columns:
        box_width = max(1, round(height * columns / rows))
        return Box(0, (width - box_width) // 2, height, box_width)
    box_height = max(1, round(width * rows / columns))
    return Box((height - box_height) // 2, 0, box_height, width)


def view_boxes(height: int, width: int, frame_size: tuple[int, int], count: int) -> list[Box]:
    """Spread boxes of the size of :func:`centre_box` evenly along the free axis; one is central."""
    return _spread(centre_box(height, width, frame_size), height, width, count)


def view_crops(frames: NDArray[np.uint8], data: DataConfig, count: int) -> list[Tensor]:
    """Crop frames, evenly spread along the free axis: (T, H, W, C) -> count x (C, T, h, w)

    Each is the largest box of the shape of ``data.frame_size``, resized to it. With
    ``data.validation_short_side`` the shorter side of the frames is first resized to that, and the
    crops are cut out as they are (ImageNet's customary 256 and 224); of frames more than
    ``LONGEST`` times as long as short, out of the middle of that length.
    """
    height, width = frames.shape[1:3]
    frame_size, short = data.frame_size, data.validation_short_side
    if short is None:
        boxes = view_boxes(height, width, frame_size, count)
        return [resize(cut(frames, box), frame_size, data.interpolation) for box in boxes]
    middle = _middle(height, width, (min(height, LONGEST * width), min(width, LONGEST * height)))
    # Rounded as torchvision's Resize does.
    scaled = (short, int(short * middle.width / middle.height))
    if middle.height >= middle.width:
        scaled = (int(short * middle.height / middle.width), short)
    resized = resize(cut(frames, middle), scaled, data.interpolation)
    middle = _middle(*scaled, frame_size)
    boxes = _spread(middle, *scaled, count)
    along = ("left", "top")[scaled[0] >= scaled[1]]  # the longer side alone
    boxes = [replace(middle, **{along: getattr(box, along)}) for box in boxes]
    height, width = frame_size
    return [resized[:, :, box.top :, box.left :][:, :, :height, :width] for box in boxes]


def cut(frames: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """Cut out a box without a copy: (T, H, W, C) -> (T, box.height, box.width, C)"""
    return frames[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resize(
    frames: NDArray[np.uint8],
    frame_size: tuple[int, int],
    interpolation: Interpolation,
    *,
    mirrored: bool = False,
) -> Tensor:
    """Resize frames, antialiased: (T, H, W, C) -> (C, T, h, w) uint8"""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = functional.interpolate(pixels, frame_size, mode=interpolation, antialias=True)
    clip = resized.transpose(0, 1).contiguous()
    return clip.flip(-1) if mirrored else clip


def _spread(middle: Box, height: int, width: int, count: int) -> list[Box]:
    """Spread boxes of the size of ``middle`` from end to end of a frame; one is ``middle``."""
    if count == 1:
        return [middle]
    down, right = height - middle.height, width - middle.width
    return [
        replace(middle, top=down * i // (count - 1), left=right * i // (count - 1))
        for i in range(count)
    ]


def _middle(height: int, width: int, size: tuple[int, int]) -> Box:
    """Rounded as torchvision's CenterCrop does."""
    return Box(round((height - size[0]) / 2), round((width - size[1]) / 2), *size)
