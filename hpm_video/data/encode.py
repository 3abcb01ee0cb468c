"""Writing a video file: H.264 in MP4, the same bytes for the same frames."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from hpm_video.whole_files import written_beside


def write_video(
    path: Path | str,
    frames: Iterable[NDArray[np.uint8]],
    *,
    fps: int = 25,
    crf: int = 20,
    gop: int = 12,
) -> int:
    """Encode RGB frames of (H, W, 3) uint8, H and W even; return how many there were.

    ``crf`` is the quality, from 0 (lossless but for the halved colour planes) to 51; ``gop`` the
    number of frames from one key frame to the next, which a decoder that seeks has to go through.
    The file is written beside ``path`` and renamed, so what lies at ``path`` is always whole.
    """
    with written_beside(Path(path)) as beside:
        return _encode(beside, iter(frames), fps=fps, crf=crf, gop=gop)


def _encode(
    path: Path, frames: Iterator[NDArray[np.uint8]], *, fps: int, crf: int, gop: int
) -> int:
    first = next(frames, None)
    if first is None:
        raise ValueError("a video needs at least one frame, got none")
    _check(first, first.shape)
    count = 0
    with av.open(str(path), "w", format="mp4") as container:
        # One thread: with several, rate control and so the bytes depend on their number.
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        for frame in chain([first], frames):
            _check(frame, first.shape)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode(None))
    return count


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
