"""Small runs of two processes over gloo and their references of one, in as few starts as can be."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import AUTOENCODER, CLASSIFIER, ENGINE, noisy_clip, write_all, write_classes

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
logging: {{every_updates: 1, validate_every_epochs: 9, picture_every_epochs: 9, trackers: [jsonl]}}
checkpoint: {{every_updates: 100, keep_last: 1}}
"""
CONFIGS = {
    "video": AUTOENCODER + "  patch_size: [2, 8, 8]\n  drop_path: 0.1\n" + PRETRAINING,
    "images": AUTOENCODER
    + """  patch_size: [1, 8, 8]
  positions: space_time
  class_token: true
  conventions: mae
"""
    + PRETRAINING,
    "classes": CLASSIFIER
    + """
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
""",
}


@pytest.fixture(scope="session")
def small_data(make_once) -> Path:
    """Folders ``videos``, ``images`` and ``labelled`` with ``train`` (14, 14, 9) and ``validation``
    (4, 4, 6)."""

    def fill(folder: Path) -> None:
        write_all(folder / "videos", noisy_clip, "{:03d}")
        for video in (folder / "videos").rglob("*.mp4"):
            image = folder / "images" / video.parent.name / f"{video.stem}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy_clip(int(video.stem))[0]).save(image)
        write_classes(folder / "labelled", lambda channel, seed: noisy_clip(10 * channel + seed))

    return make_once("small data", fill)


@pytest.fixture(scope="session")
def small_configs(small_data, tmp_path_factory) -> dict[str, Path]:
    """Of each kind of run its config: 10 updates of 4 videos or images, or 11."""
    folder = tmp_path_factory.mktemp("small configs")

    values = {
        "video": {"data": "videos", "frames": 4, "crop": "multi_scale", "clip": 0.15},
        "images": {"data": "images", "frames": 1, "crop": "random_resized", "clip": "null"},
        "classes": {"data": "labelled"},
    }
    for kind, text in CONFIGS.items():
        data = small_data / values[kind].pop("data")
        values[kind] |= {split: data / split for split in ("train", "validation")}
        config = (text + ENGINE + COMMON).format(**values[kind])
        (folder / f"{kind}.yaml").write_text(config)
    return {kind: folder / f"{kind}.yaml" for kind in CONFIGS}


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
        programs = self.start_job(processes, JOB, path, self.folder, WITH_CURVES="yes")
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
