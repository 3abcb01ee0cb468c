"""Small runs of two processes over gloo, and runs of one process to compare them with."""

from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import AUTOENCODER, CLASSIFIER, ENGINE, noisy_clip, write_all, write_classes

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
recipe: {{epochs: 2, batch_size: 4, base_lr: 0.1, min_lr: 0, warmup_epochs: 1, clip_grad: {clip}}}
knn: {{every_epochs: 1, k: 3}}
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
recipe: {{epochs: 4, batch_size: 4, base_lr: 0.1, warmup_epochs: 1, layer_decay: 0.9,
  clip_grad: 1.0, average_momentum: 0.8}}
augmentation: {{area: [0.5, 1.0], rand_augment: rand-m3-n1, mixup: 0.0, cutmix: 0.0}}
test: {{weights: average}}
""",
}


@pytest.fixture(scope="session")
def small_data(make_once) -> Path:
    """``videos`` and ``images``: folders ``train`` with 14 files and ``validation`` with 4.
    ``labelled``: with 9 and 6."""

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
    """The config of each kind of run: 7 updates of 4 videos or images; 9 of a classifier."""
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
