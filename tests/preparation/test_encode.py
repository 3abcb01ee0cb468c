"""The settings of x264, read from its log, and whether it writes the same bytes again."""

from collections.abc import Iterator
from pathlib import Path

import av.logging
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpm_video.preparation.encode import write_video


@pytest.fixture
def log_level() -> Iterator[None]:
    before = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    yield
    av.logging.set_level(before)


def moving(num_frames: int) -> list[NDArray[np.uint8]]:
    """A detailed picture that moves by a pixel per frame: (96, 96, 3) each"""
    noise = np.random.default_rng(0).integers(0, 256, (18, 18, 3), dtype=np.uint8)
    picture = noise.repeat(6, axis=0).repeat(6, axis=1)
    return [np.roll(picture, shift, axis=1)[:96, :96] for shift in range(num_frames)]


@pytest.mark.usefixtures("log_level")
@pytest.mark.parametrize("quick", [False, True])
def test_x264_runs_the_code_that_was_chosen(tmp_path: Path, quick: bool) -> None:
    with av.logging.Capture() as log:
        write_video(tmp_path / "a.mp4", moving(1), quick=quick)
    messages = [message for _, _, message in log]
    assert not [message for message in messages if "Error parsing" in message]
    (line,) = [message for message in messages if "cpu capabilities" in message]
    sets = line.partition(": ")[2].split()
    assert sets != ["none!"]
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert sets[-1] == "SSSE3"
    assert "AVX512" not in sets


@pytest.mark.parametrize("quick", [False, True])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, quick: bool) -> None:
    """With AVX-512 code one of 8 to 20 files differed."""
    frames = moving(60)
    for number in range(40):
        write_video(tmp_path / f"{number}.mp4", frames, quick=quick)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_no_frame_refers_to_three_of_four_in_files_that_are_quick_to_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving(26), gop=12, quick=True)
    with av.open(str(tmp_path / "a.mp4")) as container:
        is_used = {
            packet.pts * packet.time_base * 25: bytes(packet)[4] & 0x60 > 0
            for packet in container.demux(video=0)
            if packet.size and not packet.is_keyframe
        }
    assert [int(number) for number in sorted(is_used) if is_used[number]] == [
        4,
        8,
        11,
        16,
        20,
        23,
        25,
    ]
