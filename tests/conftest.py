"""Small real videos, and runs over them as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from hpm_video.data.encode import write_video

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent
CONFIG = """
model:
  encoder: {{dim: 16, depth: 1, num_heads: 2}}
  decoder: {{dim: 16, depth: 1, num_heads: 2}}
  patch_size: [2, 8, 8]
data:
  train: {train}
  validation: {validation}
  num_frames: 4
  frame_stride: 1
  max_frame_stride: 2
  frame_size: [32, 32]
  workers: 0
masking: {{ratio: 0.75}}
mining: {{momentum: warmup, last_momentum: 0.9}}
recipe: {{epochs: 8, batch_size: 4, base_lr: 0.1, min_lr: 0, warmup_epochs: 1}}
engine: {{precision: fp32, threads: 1, device: cpu}}
logging: {{every_updates: 1, validate_every_epochs: 4, picture_every_epochs: 8, tensorboard: false}}
checkpoint: {{every_updates: 5, keep_last: 1, keep_every_epochs: 4}}
"""


DISTURBED = """
import os, signal, sys
from hpm_video.training import checkpoint, run

def interrupt():
    os.killpg(os.getpgrp(), signal.{signal})

def at_update(self, progress, settings, original=run.Run.after_update):
    if progress.update == 6 and {place!r} == "update":
        interrupt()
    original(self, progress, settings)

def on_the_third_call(original, calls=[0]):
    def call(*args, **options):
        calls[0] += 1
        if calls[0] == 3:
            interrupt()
        return original(*args, **options)
    return call

run.Run.after_update = at_update
if {place!r} == "writing":
    checkpoint.torch.save = on_the_third_call(checkpoint.torch.save)
if {place!r} == "renamed":
    run.point_to_newest_and_best = on_the_third_call(run.point_to_newest_and_best)
if {place!r} == "linking":
    checkpoint.Path.symlink_to = on_the_third_call(checkpoint.Path.symlink_to)
sys.argv = {argv!r}
sys.path.insert(0, "tools")
import pretrain
sys.exit(pretrain.main())
"""
"""A run that gets a signal at a certain place, all processes of it."""


def moving_texture(seed: int, num_frames: int = 12, size: int = 40) -> np.ndarray:
    """A smooth random texture that slides: (K, H, W, 3) uint8"""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3))
    big = np.kron(coarse, np.ones((16, 16, 1)))
    start, step = rng.integers(0, 40, 2), rng.integers(0, 4, 2)
    corners = [start + step * frame for frame in range(num_frames)]
    return np.stack([big[y : y + size, x : x + size] for y, x in corners]).astype(np.uint8)


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Folder of a folder ``train`` with 14 videos and a folder ``validation`` with 4."""
    folder = tmp_path_factory.mktemp("videos with spaces")
    for split, seeds in {"train": range(14), "validation": range(100, 104)}.items():
        (folder / split).mkdir()
        for seed in seeds:
            write_video(folder / split / f"texture {seed}.mp4", moving_texture(seed))
    return folder


@pytest.fixture(scope="session")
def config_file(videos, tmp_path_factory) -> Path:
    """28 updates of 4 videos. Checkpoints in the middle of epochs (5, 10 ...), and at 14 and 28."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG.format(train=videos / "train", validation=videos / "validation"))
    return path


@pytest.fixture(scope="session")
def pretrain(config_file):
    """Start ``tools/pretrain.py`` in a process of its own."""

    def start(output_dir, *overrides, place=None, number="SIGKILL") -> subprocess.Popen:
        arguments = ["tools/pretrain.py", str(config_file), f"output_dir={output_dir}", *overrides]
        if place is not None:
            arguments = ["-c", DISTURBED.format(place=place, signal=number, argv=arguments)]
        environment = os.environ | {"PYTHONPATH": str(only_the_package(output_dir.parent))}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return start


def only_the_package(folder: Path) -> Path:
    """A folder from which ``hpm_video`` imports, and not the folder ``datasets`` beside it."""
    place = folder / "import"
    place.mkdir(exist_ok=True)
    link = place / "hpm_video"
    if not link.exists():
        link.symlink_to(ROOT / "hpm_video")
    return place


@pytest.fixture(scope="session")
def finished_run(pretrain, tmp_path_factory) -> Path:
    """The directory of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = pretrain(folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (folder.parent / "output.txt").write_text(output)
    return folder
