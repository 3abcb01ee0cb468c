"""Writing a video file: H.264 in MP4.

The frames are arrays, or those that a decoder gives, which need not go through RGB. The same frames
give the same bytes, with the same version of x264 and on x86-64 processors that have AVX2. On
others nobody has counted, so nothing may depend on it.
"""

from collections.abc import Iterable
from fractions import Fraction
from functools import reduce
from itertools import chain
from operator import or_
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray
from typing_extensions import Self

from hpm_video.decoding.reader import Size
from hpm_video.files.atomic import written_beside

_FINE = reduce(
    or_,
    [
        Interpolation[name]
        for name in ("BICUBIC", "ACCURATE_RND", "FULL_CHR_H_INT")
        if name in Interpolation.__members__  # av 17 has the first alone
    ],
)
_RGB_MATRIX = 0


def write_video(  # noqa: PLR0913 - what is written, and how
    path: Path | str,
    frames: Iterable[NDArray[np.uint8]],
    *,
    fps: int | Fraction = 25,
    crf: int = 20,
    gop: int = 12,
    faststart: bool = False,
) -> int:
    """Encode RGB frames of (H, W, 3) uint8, H and W even; return how many there were.

    ``crf`` is the quality, from 0 (lossless but for the halved colour planes) to 51; ``gop`` the
    number of frames from one key frame to the next, which a decoder that seeks has to go through;
    ``faststart`` puts the index in front, so that what reads from a network need not fetch the end.
    The file is written beside ``path`` and renamed, so what lies at ``path`` is always whole.
    """
    source = iter(frames)
    first = next(source, None)
    if first is None:
        raise ValueError("a video needs at least one frame, got none")
    _check(first, first.shape)
    size = first.shape[0], first.shape[1]
    with (
        written_beside(Path(path)) as beside,
        VideoWriter(beside, size, fps=fps, crf=crf, gop=gop, faststart=faststart) as writer,
    ):
        for frame in chain([first], source):
            _check(frame, first.shape)
            writer.write(picture_of(frame))
        writer.finish()
    return writer.count


def picture_of(frame: NDArray[np.uint8]) -> av.VideoFrame:
    """An array as an encoder takes it: (H, W, 3) uint8"""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")


class VideoWriter:
    """A video file that grows frame by frame. It is whole after :meth:`finish`."""

    def __init__(  # noqa: PLR0913 - what is written, and how
        self,
        path: Path,
        size: Size,
        *,
        fps: int | Fraction,
        crf: int,
        gop: int,
        faststart: bool = False,
    ) -> None:
        """``size``: even numbers. The others as :func:`write_video` has them."""
        self.count = 0
        """Frames written."""
        index = {"movflags": "+faststart"} if faststart else {}
        self._tick = 1 / Fraction(fps)
        self._container = av.open(str(path), "w", format="mp4", options=index)
        # One thread: with several, rate control and so the bytes depend on their number.
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1", **_instruction_sets()}
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.gop_size = gop

    def describe_colours(self, frame: av.VideoFrame) -> None:
        """Say how to turn the colours back, as a frame that is to be written says it."""
        _copy_colours(frame, self._stream.codec_context)

    def write(self, frame: av.VideoFrame) -> None:
        """Append a frame: it is shown for 1 / fps seconds."""
        frame.pts, frame.time_base = self.count, self._tick
        # Of a decoded frame the encoder would take over where the source had its key frames.
        frame.pict_type = PictureType.NONE
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    def finish(self) -> None:
        """Write what the encoder holds back, and the index."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()


class Resizer:
    """Turns frames upright and makes them of one size, whatever size and format they come in."""

    def __init__(self, size: Size) -> None:
        """``size``: even numbers."""
        self.size = size
        # One for all frames: making one takes longer than converting a small frame.
        self._reformatter = VideoReformatter()

    def yuv(self, frame: av.VideoFrame) -> av.VideoFrame:
        """As H.264 has it: colour at half the resolution, values of limited range."""
        has_rgb = frame.format.is_rgb or frame.colorspace == _RGB_MATRIX
        small = self._reformat(
            frame,
            "yuv420p",
            dst_colorspace=Colorspace.ITU601 if has_rgb else None,
            dst_color_range=ColorRange.MPEG,
        )
        return _turned(small, _turns(frame)) if _turns(frame) else small

    def rgb(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """-> (H, W, 3)"""
        pixels = self._reformat(frame, "rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, _turns(frame)))

    def _reformat(self, frame: av.VideoFrame, form: str, **colours: Any) -> av.VideoFrame:
        height, width = self.size if _turns(frame) % 2 == 0 else self.size[::-1]
        return self._reformatter.reformat(
            frame, width, height, form, interpolation=_FINE, threads=1, **colours
        )


def upright_size(frame: av.VideoFrame) -> Size:
    """Of a frame that may have been filmed with the camera turned."""
    size = frame.height, frame.width
    return size if _turns(frame) % 2 == 0 else size[::-1]


def fitted_size(size: Size, short_side: int) -> Size:
    """The size of frames whose short side may be at most so long: even, never larger.

    An odd side that is short enough loses a pixel, in that the frame is resized to it.
    """
    shortest = min(size)
    if shortest <= short_side:
        height, width = (max(2, side // 2 * 2) for side in size)
    else:
        height, width = (max(2, round(side * short_side / shortest / 2) * 2) for side in size)
    return height, width


def _instruction_sets() -> dict[str, str]:
    """The option that has x264 run the same code on all processors that have AVX2.

    Left to itself it takes AVX-512 where there is any, and then 2 to 5 of 40 files of the same
    60 frames came out different on an AMD EPYC 9004. With AVX2 or SSSE3 none did. SSSE3 takes 4 %
    longer and gives the bytes of AVX2; that it was chosen can be read back on any of these
    processors. x264 does not check what it is told to use: where the processor lacks it the program
    crashes, and an unknown name stands for no instruction set at all. Whatever has AVX2 has SSSE3;
    what has no AVX2 has no AVX-512 either, and is left alone.
    """
    has_avx2 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # AVX2 or AVX512
    return {"x264-params": "asm=SSSE3"} if has_avx2 else {}


def _turns(frame: av.VideoFrame) -> int:
    """Quarter turns to the left that put a frame upright."""
    return round(frame.rotation / 90) % 4


def _turned(frame: av.VideoFrame, turns: int) -> av.VideoFrame:
    """A frame of yuv420p, turned plane by plane."""
    height, width = frame.height, frame.width
    packed = frame.to_ndarray()
    colours = packed[height:].reshape(2, height // 2, width // 2)
    planes = [np.rot90(plane, turns) for plane in (packed[:height], *colours)]
    flat = np.concatenate([plane.reshape(-1) for plane in planes])
    turned = av.VideoFrame.from_ndarray(flat.reshape(-1, planes[0].shape[1]), format="yuv420p")
    _copy_colours(frame, turned)
    return turned


def _copy_colours(frame: av.VideoFrame, other: Any) -> None:
    """Have a frame or a stream say how to turn its colours back, as ``frame`` says it."""
    for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
        setattr(other, name, getattr(frame, name))


def _check(frame: NDArray[Any], shape: tuple[int, ...]) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(
            f"a frame must be (height, width, 3) uint8, got {frame.shape} {frame.dtype}"
        )
    if frame.shape != shape:
        raise ValueError(f"all frames must be of one size, got {frame.shape} after {shape}")
    if frame.shape[0] % 2 or frame.shape[1] % 2:
        raise ValueError(
            f"height and width must be even (colour is stored at half resolution), got "
            f"{frame.shape[0]} x {frame.shape[1]}: crop or pad the frames"
        )
