"""Small runs of two processes over gloo and their references of one, in as few starts as can be."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpm_video.preparation.encode import write_video

JOB = Path(__file__).parent / "job.py"
PRETRAINING = """
data:
  train: {train}
  validation: {validation}
  num_frames: {frames}
  frame_size: [32, 32]
  crop: {crop}
  workers: 0
masking: {{ratio: 0.75, first_fraction: 0.3, last_fraction: 0.6}}
mining: {{momentum: warmup, last_momentum: 0.9}}
recipe: {{epochs: 3, batch_size: 4, base_lr: 0.1, min_lr: 0, warmup_epochs: 1, clip_grad: {clip}}}
knn: {{every_epochs: 2, k: 3}}
"""
COMMON = """
engine: {precision: fp32, threads: 1, device: cpu}
logging: {every_updates: 1, validate_every_epochs: 9, picture_every_epochs: 9, tensorboard: false}
checkpoint: {every_updates: 100, keep_last: 1}
"""
VIDEO = """
model:
  encoder: {dim: 16, depth: 1, num_heads: 2}
  decoder: {dim: 16, depth: 1, num_heads: 2}
  patch_size: [2, 8, 8]
  drop_path: 0.1
"""
IMAGES = """
model:
  encoder: {dim: 16, depth: 1, num_heads: 2}
  decoder: {dim: 16, depth: 1, num_heads: 2}
  patch_size: [1, 8, 8]
  positions: space_time
  class_token: true
  conventions: mae
"""
CLASSES = """
model:
  encoder: {{dim: 16, depth: 1, num_heads: 2}}
  patch_size: [2, 8, 8]
  drop_path: 0.2
  head_dropout: 0.2
  init: xavier
data:
  train: {train}
  validation: {validation}
  num_frames: 4
  frame_stride: 2
  frame_size: [32, 32]
  repeats: 2
  workers: 0
recipe:
  epochs: 5
  batch_size: 4
  base_lr: 0.1
  warmup_epochs: 1
  layer_decay: 0.9
  clip_grad: 1.0
  average_momentum: 0.8
augmentation: {{area: [0.5, 1.0], rand_augment: rand-m3-n1, mixup: 0.0, cutmix: 0.0}}
test: {{weights: average}}
"""


def noisy_clip(seed: int) -> np.ndarray:
    """A texture that slides, without flat patches: (8, 40, 40, 3) uint8

    Flat patches have errors so near to each other that rounding decides their order, and with it
    the ranking loss.
    """
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(0, 160, (11, 11, 3)), np.ones((5, 5, 1)))
    texture = coarse + rng.integers(0, 96, (55, 55, 3))
    down, right = rng.integers(0, 2, 2)
    steps = range(8)
    return np.stack([texture[down * i :, right * i :][:40, :40] for i in steps]).astype(np.uint8)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """Folders ``videos``, ``images`` and ``labelled`` with ``train`` (14, 14, 9) and ``validation``
    (4, 4, 6)."""
    folder = tmp_path_factory.mktemp("small data")
    for split, seeds in {"train": range(14), "validation": range(100, 104)}.items():
        for kind in ("videos", "images"):
            (folder / kind / split).mkdir(parents=True)
        for seed in seeds:
            frames = noisy_clip(seed)
            write_video(folder / "videos" / split / f"{seed:03d}.mp4", frames)
            Image.fromarray(frames[0]).save(folder / "images" / split / f"{seed:03d}.png")
    for split, seeds in {"train": range(3), "validation": range(100, 102)}.items():
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / "labelled" / split / name).mkdir(parents=True)
            for seed in seeds:
                frames = noisy_clip(10 * channel + seed) // 2
                frames[..., channel] += 120
                write_video(folder / "labelled" / split / name / f"{seed}.mp4", frames)
    return folder


@pytest.fixture(scope="session")
def small_configs(small_data, tmp_path_factory) -> dict[str, Path]:
    """Of each kind of run its config: 10 updates of 4 videos or images, or 11."""
    folder = tmp_path_factory.mktemp("small configs")

    def both(kind):
        return {split: small_data / kind / split for split in ("train", "validation")}

    texts = {
        "video": VIDEO
        + PRETRAINING.format(frames=4, crop="multi_scale", clip=0.15, **both("videos")),
        "images": IMAGES
        + PRETRAINING.format(frames=1, crop="random_resized", clip="null", **both("images")),
        "classes": CLASSES.format(**both("labelled")),
    }
    for kind, text in texts.items():
        (folder / f"{kind}.yaml").write_text(text + COMMON)
    return {kind: folder / f"{kind}.yaml" for kind in texts}


@dataclass
class Jobs:
    """What the cases of all jobs left."""

    folder: Path
    configs: dict[str, Path]
    start_job: Callable
    output: str = ""

    def case(self, name, kind, *overrides, run=None, listen=(), stop=None, curves=False):
        """A run in the folder ``run``, by default ``name``, see job.py."""
        return {
            "name": name,
            "program": "finetune" if kind in ("classes", "probe") else "pretrain",
            "config": str(self.configs[kind]),
            "overrides": [f"output_dir={self.run(run or name)}", *overrides],
            "listen": list(listen),
            "stop": stop,
            "curves": curves,
        }

    def start(self, processes, cases):
        """Run the cases one after the other, in the same processes."""
        path = self.folder / "cases.json"
        path.write_text(json.dumps(cases))
        programs = self.start_job(processes, JOB, path, self.folder)
        for program in programs:
            self.output += f"\n{program.communicate()[0]}\ncode {program.returncode}"

    def run(self, name) -> Path:
        """The directory of a run."""
        return self.folder / "runs" / name

    def seen(self, name, rank=0):
        """What a process saw of a case."""
        path = self.folder / f"{name}-{rank}.json"
        assert path.exists(), f"{name} did not end:\n{self.output[-8000:]}"
        return json.loads(path.read_text())


@pytest.fixture(scope="session")
def new_jobs(small_configs, start_job, tmp_path_factory):
    """Makes an empty :class:`Jobs`."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        (folder / "runs").mkdir()
        return Jobs(folder, small_configs, start_job)

    return make
