"""Video files of H.264 in MP4.

The same frames give the same bytes with the same version of x264, on x86-64 processors that have
AVX2. Others have not been tested, so nothing may depend on it.
"""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray
from typing_extensions import Self

from hpm_video.decoding.orientation import orientation_of
from hpm_video.decoding.reader import Size
from hpm_video.files.atomic import written_beside

_FINE: Any = Interpolation.BICUBIC
for _name in {"ACCURATE_RND", "FULL_CHR_H_INT"} & {*Interpolation.__members__}:  # from av 18 on
    _FINE |= Interpolation[_name]
_RGB_MATRIX = 0


def write_video(path: Path | str, frames: Iterable[NDArray[np.uint8]], **settings: Any) -> int:
    """Encode RGB frames, at least one of (H, W, 3) uint8, H and W even; return their number.

    ``settings``: those of :class:`VideoWriter`. The file is written atomically.
    """
    with written_beside(Path(path)) as beside, VideoWriter(beside, **settings) as writer:
        for frame in frames:
            writer.write(picture_of(frame))
    return writer.count


def picture_of(frame: NDArray[np.uint8]) -> av.VideoFrame:
    """Convert an array for :class:`VideoWriter`: (H, W, 3) uint8"""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")


@dataclass
class VideoWriter:
    """Writes a video file frame by frame; complete after ``with``.

    A ``quick`` one has its index in front, so that readers on a network need not fetch the end, and
    takes less than half the time to decode at a little more size: x264's tune ``fastdecode``, and
    always three frames in a row to which no other frame refers, so that reading every fourth frame
    decodes half of them at most.
    """

    path: Path
    fps: int | Fraction = 25
    crf: int = 20  # quality, from 0 (lossless but for the halved colour planes) to 51
    gop: int = 12  # distance of key frames, which a decoder that seeks has to go through
    quick: bool = False
    count: int = 0  # number of frames written

    def __post_init__(self) -> None:
        index = {"movflags": "+faststart"} if self.quick else {}
        self._container = av.open(str(self.path), "w", format="mp4", options=index)
        # One thread: with several, rate control and so the bytes depend on their number.
        options = {"crf": str(self.crf), "preset": "veryfast", "threads": "1"}
        parameters = _instruction_sets()
        if self.quick:
            options["tune"] = "fastdecode"
            parameters += ["bframes=3", "b-adapt=0", "b-pyramid=none"]
        options["x264-params"] = ":".join(parameters)
        self._stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        self._stream.pix_fmt = "yuv420p"
        self._stream.gop_size = self.gop

    def describe_colours(self, frame: av.VideoFrame) -> None:
        """Take over the colour space of a frame that is to be written."""
        for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
            setattr(self._stream.codec_context, name, getattr(frame, name))

    def write(self, frame: av.VideoFrame) -> None:
        """Append a frame of even sides, which is shown for 1 / fps seconds."""
        if not self.count:
            self._stream.height, self._stream.width = frame.height, frame.width
        frame.pts, frame.time_base = self.count, 1 / Fraction(self.fps)
        # Otherwise the encoder would take over the key frames of the source.
        frame.pict_type = PictureType.NONE
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with closing(self._container):
            if error is None:
                self._container.mux(self._stream.encode(None))  # the frames held back


class Resizer:
    """Converts frames of any size and format to upright ones of one size."""

    def __init__(self, size: Size) -> None:
        """``size``: even numbers."""
        self.size = size
        # One for all frames: making one takes longer than converting a small frame.
        self._reformatter = VideoReformatter()

    def yuv(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Convert to colour at half the resolution and values of limited range, as in H.264."""
        if any(orientation_of(frame)):
            frame = picture_of(self.rgb(frame))
        has_rgb = frame.format.is_rgb or frame.colorspace == _RGB_MATRIX
        matrix = Colorspace.ITU601 if has_rgb else None
        colours = {"dst_colorspace": matrix, "dst_color_range": ColorRange.MPEG}
        return self._reformat(frame, "yuv420p", **colours)

    def rgb(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """Convert to RGB: -> (H, W, 3) uint8"""
        pixels = self._reformat(frame, "rgb24").to_ndarray()
        return np.ascontiguousarray(orientation_of(frame).apply(pixels))

    def _reformat(self, frame: av.VideoFrame, form: str, **colours: Any) -> av.VideoFrame:
        height, width = self.size[::-1] if orientation_of(frame).transposed else self.size
        return self._reformatter.reformat(
            frame, width, height, form, interpolation=_FINE, threads=1, **colours
        )


def fitted_size(size: Size, short_side: int) -> Size:
    """Limit the short side: -> even height and width, never larger than before."""
    if (shortest := min(size)) <= short_side:
        height, width = (max(2, side // 2 * 2) for side in size)  # at most a pixel smaller
    else:
        height, width = (max(2, round(side * short_side / shortest / 2) * 2) for side in size)
    return height, width


def _instruction_sets() -> list[str]:
    """Return the parameter that makes x264 run the same code on all processors that have AVX2.

    With AVX-512, 2 to 5 of 40 files of the same frames differed on an AMD EPYC 9004, with SSSE3
    none. That takes 4 % longer, and whatever has AVX2 has it: x264 crashes on what lacks it.
    """
    import torch

    has_avx2 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # AVX2 or AVX512
    return ["asm=SSSE3"] if has_avx2 else []
