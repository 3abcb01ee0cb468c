"""Videos with torchcodec, which uses the FFmpeg that is installed on the machine."""

import re
from typing import TYPE_CHECKING, Any

from hpm_video.decoding.containers import MATROSKA, MP4, known_container
from hpm_video.decoding.reader import (
    DecodeError,
    Frames,
    Size,
    Stack,
    VideoReader,
    size_change,
)

if TYPE_CHECKING:
    from hpm_video.decoding.reader import Box


_EXACT_ON = (MP4, MATROSKA, "FLV", "ASF", "GIF", "YUV4MPEG")
_OTHER_SIZE = re.compile(r"tensor of shape (\d+)x(\d+)x3, got \[(\d+), (\d+), 3\]")


class TorchcodecReader(VideoReader):
    """Goes through all packets first, and seeks then. It turns upright."""

    def __init__(self, path: str, source: str | bytes, head: bytes) -> None:
        super().__init__(path)
        kind = known_container(head)  # its FFmpeg cannot be told what to leave alone
        if kind not in _EXACT_ON:
            raise DecodeError(
                f"torchcodec is not known to be exact on this container, {kind}, only on "
                f"{', '.join(_EXACT_ON)}; PyAV is"
            )
        from torchcodec.decoders import (  # type: ignore[import-not-found, unused-ignore]
            VideoDecoder,
        )

        self._decoder: Any = VideoDecoder(
            source, seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC"
        )

    def _count(self) -> int:
        return len(self._decoder)

    def _measure(self) -> Size:
        height, width = self._decoder[0].shape[:2]
        return height, width

    def _decode(self, indices: list[int], box: "Box | None") -> Frames:
        stack = Stack(len(indices), self._size, box)
        try:
            frames = self._decoder.get_frames_at(indices).data
        except RuntimeError as error:
            if found := _OTHER_SIZE.search(str(error)):
                height, width, *before = map(int, found.groups())
                raise size_change((before[0], before[1]), (height, width)) from error
            raise
        for frame in frames:
            stack.add(frame.numpy())
        self._size = stack.size
        return stack.frames()

    def close(self) -> None:
        self._decoder = None
