"""What reads the frames of one video, whatever it is made of, and how that fails."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from hpm_video.files.errors import ExpectedError

Frames = NDArray[np.uint8]
"""(K, H, W, C) uint8: RGB, unless a reader gives other channels."""
Size = tuple[int, int]  # height and width
TRANSCODE = "Encode it anew: tools/transcode.py"


class DecodeError(ExpectedError):
    """A video or an image that cannot be decoded. The message names the file and the reason."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason, path)
        self.reason = " ".join(reason.split())
        self.path = path

    def __str__(self) -> str:
        return f"cannot decode {self.path}: {self.reason}" if self.path else self.reason


class NoSuchFrame(DecodeError, IndexError):  # noqa: N818 - the name is the reason
    """A video ends before a frame, which was found out only by decoding it."""


class DecoderError(ExpectedError, RuntimeError):
    """No usable decoder. The message names what to install."""


class VideoReader(ABC):
    """An open video or image."""

    def __init__(self, path: str) -> None:
        """``path``: its place, as :mod:`hpm_video.decoding.locations` has it."""
        self.path = path
        self._num_frames: int | None = None
        self._counts_by_decoding = False  # whether to know their number takes decoding them all
        self._size: Size | None = None

    @property
    def num_frames(self) -> int:
        """Frames that can be read. Of some containers they are counted by decoding them all."""
        if self._num_frames is None:
            with as_decode_error(self.path):
                self._num_frames = self._count()
        return self._num_frames

    @property
    def frame_size(self) -> Size:
        """Height and width of the frames, upright."""
        if self._size is None:
            height, width = self.read([0]).shape[1:3]
            self._size = height, width
        return self._size

    def read(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Frames:
        """Read frames in the order asked, each distinct one once: K indices -> (K, H, W, C)

        Raises:
            IndexError: the video has no such frame. (A DecodeError too, where nobody knew that.)
            DecodeError: a frame cannot be decoded, or is not of the size of the others.
        """
        distinct, where = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if not len(distinct) or distinct[0] < 0 or not self._may_have(int(distinct[-1])):
            raise IndexError(
                f"frame indices must lie in 0..{self.num_frames - 1} for {self.path}, got "
                f"{list(indices)}"
            )
        with as_decode_error(self.path):
            frames = self._decode(distinct.tolist())
        return frames if np.array_equal(where, np.arange(len(frames))) else frames[where]

    def seconds(self, count: int) -> NDArray[np.float64]:  # noqa: ARG002 - images have no times
        """Say when each of the first ``count`` frames is shown, the first at 0: -> (count,)

        Raises DecodeError if it does not state that.
        """
        raise DecodeError("it states no times of its frames", self.path)

    def frames_stated(self, stated: int) -> int:
        """Return how many of ``stated`` frames there are, without decoding; -1 means all."""
        if stated <= 0:
            return self.num_frames
        return stated if self._must_count() else min(stated, self.num_frames)

    def _may_have(self, index: int) -> bool:
        return self._must_count() or index < self.num_frames

    def _must_count(self) -> bool:
        return self._num_frames is None and self._counts_by_decoding

    @abstractmethod
    def _count(self) -> int: ...

    @abstractmethod
    def _decode(self, indices: list[int]) -> Frames:
        """Frames of ascending indices, none twice."""

    def _stacked(self, frames: Iterable[Frames]) -> Frames:
        """Put frames into one array, which have the size of all: (H, W, C) each -> (K, H, W, C)"""
        found = []
        for frame in frames:
            size = frame.shape[0], frame.shape[1]
            self._size = self._size or size
            if size != self._size:
                raise size_change(self._size, size)
            found.append(frame)
        return np.stack(found)

    @abstractmethod
    def close(self) -> None:
        """Free what the decoder holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def size_change(before: Size, size: Size) -> DecodeError:
    """Make the error for a frame of another size. (Users write the width first.)"""
    old, new = f"{before[1]}x{before[0]}", f"{size[1]}x{size[0]}"
    return DecodeError(f"its frames change size, from {old} to {new}. {TRANSCODE}")


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
        raise DecodeError(f"there is no such file{_other_spelling(path)}", path) from error
    except IsADirectoryError as error:
        why = "it is a folder. If its images are the frames of a video, end its path in a slash"
        raise DecodeError(why, path) from error
    except Exception as error:  # noqa: BLE001 - native libraries raise anything
        raise DecodeError(f"{type(error).__name__}: {error}"[:500], path) from error


def _other_spelling(path: str) -> str:
    """Name a file that is there, and whose name differs only in how it is spelled."""
    for other in (path.replace("\\", "/"), normalize("NFC", path), normalize("NFD", path)):
        if other != path and Path(other).exists():
            return f", but there is {other!r}, spelled with slashes or other Unicode characters"
    return ""
