"""Videos whose frames carry their number, so that a test can tell which frame it got."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BITS, SQUARE = 8, 8


def _paint(number: int, height: int, width: int) -> np.ndarray:
    """Smooth colours that move, and the number as a row of black and white squares."""
    y, x = np.mgrid[:height, :width]
    waves = (np.sin((x + 3 * number) / 17), np.sin((y + x) / 23), np.cos((y - 2 * number) / 19))
    frame = (128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
    for bit in range(BITS):
        frame[: 2 * SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 255 * (number >> bit & 1)
    return frame


def _numbers_of(frames: np.ndarray) -> list[int]:
    """(K, H, W, 3) -> the number painted into each frame"""
    row = frames[:, SQUARE, SQUARE // 2 : BITS * SQUARE : SQUARE].mean(axis=-1) > 127
    return (row * 2 ** np.arange(BITS)).sum(axis=1).tolist()


def _write_painted(
    path: Path,
    *,
    frames: int = 40,
    size: tuple[int, int] = (64, 96),
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    **stream: Any,
) -> Path:
    """``times`` are milliseconds. B-frames are on, key frames 12 apart, unless told otherwise."""
    settings = {"pix_fmt": "yuv420p", "gop_size": 12, "max_b_frames": 2, "options": {}} | stream
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25)
        video.height, video.width = size
        video.pix_fmt, video.options = settings["pix_fmt"], settings["options"]
        video.codec_context.gop_size = settings["gop_size"]
        video.codec_context.max_b_frames = settings["max_b_frames"]
        video.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(_paint(number, *size), format="rgb24")
            frame.pts = times[number] if times is not None else 40 * number
            frame.time_base = Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


@pytest.fixture(scope="session")
def write_painted() -> Callable[..., Path]:
    return _write_painted


@pytest.fixture(scope="session")
def numbers_of() -> Callable[[np.ndarray], list[int]]:
    return _numbers_of


@pytest.fixture(scope="session")
def bad_videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind that does not decode."""
    folder = tmp_path_factory.mktemp("bad")
    whole = _write_painted(folder / "whole.mp4").read_bytes()
    bad = {
        name: folder / f"{name}.mp4" for name in ("missing", "empty", "text", "audio", "cut", "dir")
    }
    bad["empty"].touch()
    bad["text"].write_text("I am not a video\n" * 50)
    bad["cut"].write_bytes(whole[: len(whole) // 2])
    bad["dir"].mkdir()
    with av.open(str(bad["audio"]), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 8192), np.float32), format="fltp", layout="mono"
        )
        silence.rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    return bad
