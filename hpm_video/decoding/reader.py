"""What reads the frames of one video, whatever it is made of, and how that fails."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

Frames = NDArray[np.uint8]
"""(K, H, W, 3) uint8, RGB."""
Size = tuple[int, int]
"""Height and width."""
TRANSCODE = "Encode it anew: tools/transcode.py"
"""A remedy."""


class DecodeError(Exception):
    """A video or an image that cannot be decoded. The message names the file and the reason."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason, path)
        self.reason = " ".join(reason.split())
        self.path = path

    def __str__(self) -> str:
        return f"cannot decode {self.path}: {self.reason}" if self.path else self.reason


class SizeChange(DecodeError):  # noqa: N818 - it says what is wrong
    """A frame of another size than those before it."""


class NoSuchFrame(DecodeError, IndexError):  # noqa: N818 - it says what is wrong
    """A video ends before a frame, which was found out only by decoding it."""


class DecoderError(RuntimeError):
    """No usable decoder. The message says what to install."""


class VideoReader(ABC):
    """An open video or image."""

    def __init__(self, path: str) -> None:
        """``path``: its place, as :mod:`hpm_video.decoding.locations` has it."""
        self.path = path
        self._num_frames: int | None = None
        self._counts_by_decoding = False
        self._size: Size | None = None

    @property
    def num_frames(self) -> int:
        """Frames that can be read. Of some containers they are counted by decoding them all."""
        if self._num_frames is None:
            with as_decode_error(self.path):
                self._num_frames = self._count()
        return self._num_frames

    @property
    def height(self) -> int:
        """Of the frames, upright."""
        return self._measured()[0]

    @property
    def width(self) -> int:
        """Of the frames, upright."""
        return self._measured()[1]

    def read(
        self, indices: Sequence[int] | NDArray[np.integer[Any]], box: "Box | None" = None
    ) -> Frames:
        """Frames in the order asked; each distinct one is decoded once: K indices -> (K, H, W, 3)

        With ``box`` that part of each, the same pixels: -> (K, box.height, box.width, 3)

        Raises:
            IndexError: the video has no such frame. (A DecodeError too, where nobody knew that.)
            ValueError: the box does not lie in the frames.
            DecodeError: a frame cannot be decoded, or is not of the size of the others.
        """
        distinct, where = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if not len(distinct) or distinct[0] < 0 or not self._may_have(int(distinct[-1])):
            raise IndexError(
                f"frame indices must lie in 0..{self.num_frames - 1} for {self.path}, got "
                f"{list(indices)}"
            )
        if box is not None:
            self._check(box)
        with as_decode_error(self.path):
            frames = self._decode(distinct.tolist(), box)
        return frames if np.array_equal(where, np.arange(len(frames))) else frames[where]

    def frames_stated(self, stated: int) -> int:
        """How many of ``stated`` frames there are, where that is known without decoding."""
        return stated if self._must_count() else min(stated, self.num_frames)

    def _may_have(self, index: int) -> bool:
        """Whether there is such a frame, as far as that is known without decoding."""
        return self._must_count() or index < self.num_frames

    def _must_count(self) -> bool:
        """Whether frames have to be decoded to know how many there are."""
        return self._num_frames is None and self._counts_by_decoding

    def _measured(self) -> Size:
        if self._size is None:
            with as_decode_error(self.path):
                self._size = self._measure()
        return self._size

    def _check(self, box: "Box") -> None:
        height, width = self._measured()
        down = 0 <= box.top < box.top + box.height <= height
        if not (down and 0 <= box.left < box.left + box.width <= width):
            raise ValueError(f"{box} does not lie in frames of {height} x {width} of {self.path}")

    @abstractmethod
    def _count(self) -> int:
        """Find out how many frames there are."""

    @abstractmethod
    def _measure(self) -> Size:
        """Find out how large the frames are, upright."""

    @abstractmethod
    def _decode(self, indices: list[int], box: "Box | None") -> Frames:
        """Frames of ascending indices, none twice."""

    @abstractmethod
    def close(self) -> None:
        """Free what the decoder holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stack:
    """Frames as they come out of a decoder, in one array: they are all of one size."""

    def __init__(self, count: int, size: Size | None, box: "Box | None") -> None:
        """``size``: of the whole frames, where it is known."""
        self._count = count
        self.box = box
        self.size = size
        self.filled = 0
        self._frames: Frames | None = None

    def add(self, frame: Frames) -> None:
        """A whole frame, upright: (H, W, 3)"""
        self.admit((frame.shape[0], frame.shape[1]))[...] = cut(frame, self.box)

    def admit(self, size: Size) -> Frames:
        """Room for the part that is asked for, of the next frame, which is of that size whole."""
        if self.size is None:
            self.size = size
        if size != self.size:
            raise size_change(self.size, size)
        if self._frames is None:
            part = (self.box.height, self.box.width) if self.box else size
            self._frames = np.empty((self._count, *part, 3), dtype=np.uint8)
        self.filled += 1
        room: Frames = self._frames[self.filled - 1]
        return room

    def frames(self) -> Frames:
        """All of them: (K, H, W, 3)"""
        if self._frames is None or self.filled < self._count:
            raise DecodeError(
                f"only {self.filled} of {self._count} frames came out of the decoder. {TRANSCODE}"
            )
        return self._frames


def cut(frame: Frames, box: "Box | None") -> Frames:
    """The part of a frame that lies in a box, or all of it: (H, W, 3) -> (h, w, 3)"""
    if box is None:
        return frame
    return frame[box.top : box.top + box.height, box.left : box.left + box.width]


@contextlib.contextmanager
def as_decode_error(path: str) -> Iterator[None]:
    """Whatever goes wrong becomes an error that names the file, except the lack of memory."""
    try:
        yield
    except DecodeError as error:
        raise type(error)(error.reason, path) from error.__cause__
    except MemoryError:  # it says nothing about the file
        raise
    except FileNotFoundError as error:
        raise DecodeError("there is no such file", path) from error
    except IsADirectoryError as error:
        why = "it is a folder. Where its images are the frames of a video, end its path in a slash"
        raise DecodeError(why, path) from error
    except Exception as error:  # noqa: BLE001 - native libraries raise anything
        raise DecodeError(f"{type(error).__name__}: {error}"[:500], path) from error


def size_change(before: Size, size: Size) -> SizeChange:
    """What to say of a frame of another size."""
    return SizeChange(f"its frames change size, from {by(before)} to {by(size)}. {TRANSCODE}")


def by(size: Size) -> str:
    """As users write it, the width first."""
    return f"{size[1]}x{size[0]}"


@dataclass(frozen=True)
class Box:
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int
