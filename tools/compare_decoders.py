"""Which frames decoders really return: python tools/compare_decoders.py.

Writes short videos whose frames carry their number, reads random frames of them, and counts the
wrong ones: for decord and torchcodec as they seek by themselves, and for the readers of this
package, which refuse what a decoder gets wrong.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from numpy.typing import NDArray

from hpm_video.decoding.registry import DecodeError, available_decoders, open_video
from hpm_video.randomness import generator

FRAMES, HEIGHT, WIDTH, BITS = 120, 64, 96, 7
VIDEOS = {  # name -> ending, encoder, its options
    "H.264, mp4": (".mp4", "libx264", {}),
    "H.264 with open groups of pictures, mp4": (".mp4", "libx264", {"x264-params": "open-gop=1"}),
    "HEVC, mp4": (".mp4", "libx265", {"x265-params": "log-level=none"}),
    "VP9, webm": (".webm", "libvpx-vp9", {"cpu-used": "8"}),
    "MPEG-4 with B-frames, mp4": (".mp4", "mpeg4", {}),
    "MPEG-4 with B-frames, avi": (".avi", "mpeg4", {}),
    "H.264, avi": (".avi", "libx264", {}),
    "wmv": (".wmv", "wmv2", {}),
    "AV1, mp4": (".mp4", "libsvtav1", {"preset": "10"}),
    "H.264, MPEG transport stream": (".ts", "libx264", {}),
}
Read = Callable[[str, list[int]], NDArray[np.uint8]]


def main() -> int:
    """Print how many of the frames that were read are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--reads", type=int, default=12, help="random frames read of each video")
    reads = parser.parse_args().reads
    os.environ.setdefault("SVT_LOG", "1")  # the encoder of AV1 would print a page
    readers: dict[str, Read] = {name: read_with(name) for name in available_decoders()}
    if "torchcodec" in readers:
        readers = {"torchcodec itself": read_with_torchcodec, **readers}
    if "decord" in readers:
        readers = {"decord, seeking": read_with_seeks, **readers}
    print(f"wrong frames of {reads}".ljust(44) + "".join(name.rjust(18) for name in readers))
    with tempfile.TemporaryDirectory() as folder:
        for name, (ending, encoder, options) in VIDEOS.items():
            path = str(Path(folder) / f"video{ending}")
            try:
                write_numbered(path, encoder, options)
            except (av.error.FFmpegError, ValueError) as error:
                print(f"{name:44}not written here: {error}")
                continue
            wrong = [count_wrong(read, path, reads) for read in readers.values()]
            print(name.ljust(44) + "".join(word.rjust(18) for word in wrong))
    return 0


def count_wrong(read: Read, path: str, reads: int) -> str:
    """How many frames carry another number than the one that was asked for."""
    asked = generator("compare decoders").integers(FRAMES, size=reads).tolist()
    try:
        frames = [read(path, [index])[0] for index in asked]
    except DecodeError:
        return "refused"
    except Exception:  # noqa: BLE001 - native libraries raise anything
        return "an error"
    return str(sum(number_of(frame) != index for frame, index in zip(frames, asked, strict=True)))


def read_with(decoder: str) -> Read:
    """This package's reader."""

    def read(path: str, indices: list[int]) -> NDArray[np.uint8]:
        with open_video(path, decoder) as video:
            return video.read(indices)

    return read


def read_with_seeks(path: str, indices: list[int]) -> NDArray[np.uint8]:
    """Decord as its documentation shows it."""
    import decord

    frames: NDArray[np.uint8] = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    return frames


def read_with_torchcodec(path: str, indices: list[int]) -> NDArray[np.uint8]:
    """Torchcodec as its documentation shows it."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found, unused-ignore]

    video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    frames: NDArray[np.uint8] = video.get_frames_at(indices).data.numpy()
    return frames


def write_numbered(path: str, encoder: str, options: dict[str, str]) -> None:
    """A video whose frames show their number as black and white squares, with B-frames."""
    with av.open(path, "w") as container:
        video = cast("av.VideoStream", container.add_stream(encoder, rate=25, options=options))
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        video.codec_context.gop_size = 12
        if encoder not in ("wmv2", "libvpx-vp9"):
            video.codec_context.max_b_frames = 2
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(paint(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def paint(number: int) -> NDArray[np.uint8]:
    """A grey frame with a row of squares, one a bit: -> (H, W, 3)"""
    frame = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    for bit in range(BITS):
        frame[16:48, 12 * bit + 2 : 12 * bit + 12] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: NDArray[np.uint8]) -> int:
    """(H, W, 3) -> the number that was painted"""
    bits: Sequence[bool] = [frame[24:40, 12 * b + 5 : 12 * b + 9].mean() > 127 for b in range(BITS)]
    return sum(bit << place for place, bit in enumerate(bits))


if __name__ == "__main__":
    sys.exit(main())
