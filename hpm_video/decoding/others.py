"""Videos with torchcodec and decord, of which only the files are read that they get right."""

import io
import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpm_video.decoding.orientation import orientation_of
from hpm_video.decoding.pyav import PyavReader, open_container
from hpm_video.decoding.reader import TRANSCODE, DecodeError, Frames, VideoReader, size_change

_TORCHCODEC_KNOWS = ("mov", "matroska", "flv", "asf", "gif", "yuv4mpegpipe")
_DECORD_KNOWS = ("mov", "matroska", "avi", "flv", "asf", "yuv4mpegpipe")
_LIST = re.compile(rb"[^\0]*<(mpd|compositionplaylist|smoothstreamingmedia)", re.IGNORECASE)
"""How a file begins that FFmpeg may take for a list of others, though it looks like a video."""
_OTHER_SIZE = re.compile(r"tensor of shape (\d+)x(\d+)x3, got \[(\d+), (\d+), 3\]")


class CheckedReader(VideoReader):
    """A video that another library decodes, as :func:`check_exact` allows; PyAV has its times."""

    def __init__(self, path: str, source: str | bytes) -> None:
        super().__init__(path)
        self._source = source

    def seconds(self, count: int) -> NDArray[np.float64]:
        with PyavReader(self.path, self._source) as reader:
            return reader.seconds(count)


class TorchcodecReader(CheckedReader):
    """Goes through all packets first, and seeks then. It turns upright."""

    def __init__(self, path: str, source: str | bytes) -> None:
        super().__init__(path, source)
        check_exact(source, "torchcodec", _TORCHCODEC_KNOWS, shows_all=False)
        from torchcodec.decoders import (  # type: ignore[import-not-found, unused-ignore]
            VideoDecoder,
        )

        self._decoder: Any = VideoDecoder(
            source, seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC"
        )

    def _count(self) -> int:
        return len(self._decoder)

    def _decode(self, indices: list[int]) -> Frames:
        try:
            frames: Frames = self._decoder.get_frames_at(indices).data.numpy()
        except RuntimeError as error:
            if sizes := _OTHER_SIZE.search(str(error)):
                height, width, *before = map(int, sizes.groups())
                raise size_change((before[0], before[1]), (height, width)) from error
            raise
        return frames

    def close(self) -> None:
        self._decoder = None


class DecordReader(CheckedReader):
    """Decodes from the first frame on, for decord's seeks are not exact. It turns upright."""

    def __init__(self, path: str, source: str | bytes) -> None:
        super().__init__(path, source)
        check_exact(source, "decord", _DECORD_KNOWS, shows_all=True)
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


def check_exact(
    source: str | bytes, library: str, formats: Collection[str], *, shows_all: bool
) -> None:
    """Raise a DecodeError unless a library is known to return the right frames of a video.

    PyAV says what the file is, for the FFmpeg of others cannot be kept from opening further files.
    ``formats``: FFmpeg's names of the containers on which the library was found exact.
    ``shows_all``: it reads the first stream, and also the frames that are not to be shown.
    """
    container, stream = open_container(source)
    with container:
        name = container.format.name.partition(",")[0]
        if isinstance(source, str):
            with Path(source).open("rb") as file:
                source = file.read(4096)
        if name not in formats or _LIST.match(source[:4096]):
            raise DecodeError(
                f"{library} is not known to be exact on this container, {name}, only on "
                f"{', '.join(formats)}; use PyAV"
            )
        why = ""
        if shows_all:
            tracks = container.streams.video
            entries = [*stream.index_entries] if name == "mov" else []
            if stream is not tracks[0]:
                why = f"it has {len(tracks)} video streams, and the one to read is not the first"
            elif any(entry.is_discard for entry in entries) or (
                name == "mov" and len(entries) < stream.frames
            ):
                why = "its container says that some frames are not to be shown"
        frames = islice(container.decode(stream), 1)
        if not why and any(orientation_of(frame).is_mirrored for frame in frames):
            why = "it is mirrored"
    if why:
        raise DecodeError(f"{why}, which {library} gets wrong and PyAV does not. {TRANSCODE}")
