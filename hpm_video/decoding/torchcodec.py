"""Videos with torchcodec, which uses the FFmpeg that is installed on the machine."""

import re
from typing import Any

from hpm_video.decoding.exact import CheckedReader, check_exact
from hpm_video.decoding.reader import Frames, size_change

_EXACT_ON = ("mov", "matroska", "flv", "asf", "gif", "yuv4mpegpipe")
_OTHER_SIZE = re.compile(r"tensor of shape (\d+)x(\d+)x3, got \[(\d+), (\d+), 3\]")


class TorchcodecReader(CheckedReader):
    """Goes through all packets first, and seeks then. It turns upright."""

    def __init__(self, path: str, source: str | bytes) -> None:
        super().__init__(path, source)
        check_exact(source, "torchcodec", _EXACT_ON, shows_all=False)
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
