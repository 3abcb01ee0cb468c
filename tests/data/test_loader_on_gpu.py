"""Batches that go to a GPU from pinned memory, under ``-m gpu``. Without a GPU these tests are
skipped, or fail if HPM_REQUIRE_GPU=1."""

import os
from ctypes import addressof, sizeof

import pytest
import torch

from hpm_video.config.data import DataConfig
from hpm_video.data import loader
from hpm_video.data.buffers import Buffers, Sender
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import clip_batches
from hpm_video.data.manifest import read_manifest
from hpm_video.data.mixture import Place
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.preparation.benchmark import copy_seconds

REQUIRED = os.environ.get("HPM_REQUIRE_GPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device, or no -m gpu"
    ),
]
DATA = DataConfig(num_frames=4, frame_stride=2, frame_size=(112, 112), repeats=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_painted):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write_painted(folder / f"{number}.mp4", frames=20, size=(120, 160))
    return folder


def batches_of(folder, **options):
    stream = VideoClips(read_manifest(folder), DATA, MultiScaleCrop(flip=True), seed=3)
    places = [Place(0, position) for position in range(60)]
    return clip_batches([stream], places, batch_size=3, **options)


@pytest.mark.parametrize("pins", [True, False])
def test_batches_on_the_gpu_are_those_of_the_cpu(folder, monkeypatch, caplog, pins):
    """This includes copies that wait for a busy GPU, and memory that cannot be pinned."""
    made = []

    class Noted(Buffers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.shared)
            if not pins:  # memory that is pinned already cannot be pinned again
                place = addressof(self.shared), sizeof(self.shared)
                torch.cuda.cudart().cudaHostRegister(*place, 0)

    monkeypatch.setattr(loader, "Buffers", Noted)
    monkeypatch.setattr(loader, "JOB_BYTES", 1)  # one job per sample: few buffers
    gpu, kept = torch.device("cuda"), []
    for batch in batches_of(folder, workers=3, gpu=gpu):
        torch.cuda._sleep(20_000_000)
        assert batch.clips.is_cuda
        kept.append((batch.clips.float().mul(2), batch.keys + 0, batch.files))  # when it wakes up
    for (clips, keys, files), expected in zip(kept, batches_of(folder, workers=0), strict=True):
        assert torch.equal(clips.cpu(), expected.clips.float() * 2)
        assert torch.equal(keys.cpu(), expected.keys)
        assert files == expected.files
    assert len(kept) > sizeof(made[0]) / (3 * 2 * 3 * 4 * 112 * 112), "buffers were reused"
    assert len(caplog.messages) == (not pins)
    assert all("could not be pinned" in message for message in caplog.messages)
    torch.cuda.synchronize()
    if not pins:
        torch.cuda.cudart().cudaHostUnregister(addressof(made[0]))


def test_memory_is_pinned_until_the_sender_is_closed():
    ring, device = Buffers(2, 2**20), torch.device("cuda", 0)
    sender = Sender(device, ring.shared)
    part = torch.from_numpy(ring.take()[1])[1000:2000]
    assert part.is_pinned()
    sender.close()
    assert not part.is_pinned()


def test_the_transfer_of_a_clip_is_timed_by_the_gpu():
    clip = torch.zeros(1, 3, 16, 224, 224, dtype=torch.uint8)
    assert 1e-6 < copy_seconds(clip, 8, torch.device("cuda", 0)) < 0.1
