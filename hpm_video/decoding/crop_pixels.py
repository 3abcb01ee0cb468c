"""The colours of a part of a decoded frame, without those of the rest."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from hpm_video.decoding.reader import Frames, Size

if TYPE_CHECKING:
    import av

_SHARING = {"yuv420p": 2, "yuvj420p": 2, "yuv422p": 1, "yuvj422p": 1}
"""Formats whose pixels FFmpeg converts each by itself, and the rows that share their colour."""
_COLUMNS = 64
"""FFmpeg converts so many columns at a time, or fewer, and what is left over by other means, which
round otherwise: a part begins and ends where these do, or with the frame."""
WORTH = 2**17
"""Pixels that must be saved: to cut out a part takes as long as converting so many."""


@dataclass(frozen=True)
class Part:
    """Rows and columns of a frame as it is stored."""

    rows: slice
    columns: slice

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def area(self) -> int:
        """Pixels."""
        return self.size[0] * self.size[1]

    def grown(self, height: int, width: int) -> "Part":
        """To rows and columns that can be converted by themselves, of a frame of that size."""
        top, left = self.rows.start // 2 * 2, self.columns.start // _COLUMNS * _COLUMNS
        bottom, right = self.rows.stop + self.rows.stop % 2, -(-self.columns.stop // _COLUMNS)
        return Part(slice(top, min(height, bottom)), slice(left, min(width, right * _COLUMNS)))

    def within(self, part: "Part") -> tuple[slice, slice]:
        """Where in this one a part of it lies."""
        top, left = self.rows.start, self.columns.start
        return (
            slice(part.rows.start - top, part.rows.stop - top),
            slice(part.columns.start - left, part.columns.stop - left),
        )


class PixelCropper:
    """Converts parts of frames to RGB: the same values as if the whole frame were converted."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        # One for all frames: making one takes longer than converting a small frame.
        self._reformatter = VideoReformatter()
        self._scratch: av.VideoFrame | None = None
        self._planes: list[NDArray[np.uint8]] = []

    def crop(self, frame: "av.VideoFrame", part: Part) -> Frames:
        """In memory that may belong to the decoder, and is good for as long as the array is.

        -> (rows, columns, 3)
        """
        grown = part.grown(frame.height, frame.width)
        if not _divides(frame) or frame.height * frame.width - grown.area < WORTH:
            return self._converted(frame)[part.rows, part.columns]
        scratch = self._scratch_like(frame, grown)
        for index, (plane, room) in enumerate(zip(frame.planes, self._planes, strict=True)):
            by_row, by_column = (_SHARING[frame.format.name], 2) if index else (1, 1)
            room[...] = _lines(plane, plane.width)[
                grown.rows.start // by_row : grown.rows.stop // by_row,
                grown.columns.start // by_column : grown.columns.stop // by_column,
            ]
        return self._converted(scratch)[grown.within(part)]

    def _converted(self, frame: "av.VideoFrame") -> Frames:
        """In one thread, since the loader's workers take the cores. -> (H, W, 3)"""
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        return _lines(rgb.planes[0], 3 * rgb.width).reshape(rgb.height, rgb.width, 3)

    def _scratch_like(self, frame: "av.VideoFrame", part: Part) -> "av.VideoFrame":
        """A frame for that part, whose values mean the same colours."""
        import av

        height, width = part.size
        name = frame.format.name
        held = self._scratch
        if held is None or (held.format.name, held.height, held.width) != (name, height, width):
            held = self._scratch = av.VideoFrame(width, height, name)
            self._planes = [_lines(plane, plane.width) for plane in held.planes]
        for meaning in ("colorspace", "color_range", "color_trc", "color_primaries"):
            if hasattr(frame, meaning):  # an older PyAV has but two of them
                setattr(held, meaning, getattr(frame, meaning))
        return held


def _divides(frame: "av.VideoFrame") -> bool:
    """Whether parts of a frame can be converted by themselves.

    Frames of odd size, and all other formats, are converted with a look at the neighbours; a
    length below 0 means a plane that is stored upside down.
    """
    known = frame.format.name in _SHARING and not (frame.height % 2 or frame.width % 2)
    return known and all(plane.line_size > 0 for plane in frame.planes)


def _lines(plane: "av.video.plane.VideoPlane", width: int) -> NDArray[np.uint8]:
    """The values of a plane, without what fills up its lines in memory: -> (rows, width)"""
    values: NDArray[np.uint8] = np.frombuffer(cast("memoryview", plane), np.uint8)
    return values.reshape(-1, plane.line_size)[: plane.height, :width]
