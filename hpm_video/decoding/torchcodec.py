"""Videos with torchcodec, which uses the FFmpeg that is installed on the machine."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpm_video.decoding.containers import MATROSKA, MP4, exact_container
from hpm_video.decoding.pyav import MIRRORED, PyavReader, only_here
from hpm_video.decoding.reader import TRANSCODE, DecodeError, Frames, VideoReader, size_change

_EXACT_ON = (MP4, MATROSKA, "FLV", "ASF", "GIF", "YUV4MPEG")

_OTHER_SIZE = re.compile(r"tensor of shape (\d+)x(\d+)x3, got \[(\d+), (\d+), 3\]")


class TorchcodecReader(VideoReader):
    """Goes through all packets first, and seeks then. It turns upright."""

    def __init__(self, path: str, source: str | bytes, head: bytes) -> None:
        super().__init__(path)
        exact_container(head, "torchcodec", _EXACT_ON)
        if (why := only_here(source)) == MIRRORED:
            raise DecodeError(f"{why}, which torchcodec gets wrong and PyAV does not. {TRANSCODE}")
        from torchcodec.decoders import (  # type: ignore[import-not-found, unused-ignore]
            VideoDecoder,
        )

        self._source = source
        self._decoder: Any = VideoDecoder(
            source, seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC"
        )

    def seconds(self, count: int) -> NDArray[np.float64]:
        with PyavReader(self.path, self._source, b"") as reader:
            return reader.seconds(count)

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
