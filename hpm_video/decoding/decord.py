"""Videos with decord: exact and slow, since here it never seeks."""

import io
from typing import Any

from hpm_video.decoding.exact import CheckedReader, check_exact
from hpm_video.decoding.reader import DecodeError, Frames

_EXACT_ON = ("mov", "matroska", "avi", "flv", "asf", "yuv4mpegpipe")


class DecordReader(CheckedReader):
    """Decodes from the first frame on, for decord's seeks are not exact. It turns upright."""

    def __init__(self, path: str, source: str | bytes) -> None:
        super().__init__(path, source)
        check_exact(source, "decord", _EXACT_ON, shows_all=True)
        import torch  # noqa: F401, I001 - decord before torch can hang a DataLoader (decord#251)
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._open_video = decord.VideoReader
        self._open()
        self._num_frames = len(self._reader)

    def _open(self) -> None:
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        self._reader: Any = self._open_video(source, num_threads=1)
        self._next = 0
        self._frame: Frames | None = None

    def _count(self) -> int:
        return len(self._reader)

    def _decode(self, indices: list[int]) -> Frames:
        return self._stacked(map(self._frame_at, indices))

    def _frame_at(self, index: int) -> Frames:
        if index < self._next - 1:
            self._open()
        while self._next <= index:
            frame = self._reader.next()
            self._next += 1
            self._frame = frame.asnumpy() if self._next > index else None
        if self._frame is None or self._frame.shape[2] != 3:
            raise DecodeError("decord gets frames as small as these wrong; PyAV does not")
        return self._frame

    def close(self) -> None:
        self._reader = None
