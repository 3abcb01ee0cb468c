"""Keys of randomness are data: every draw equals that of the first house, to the bit.

These tests never name the purpose of a draw: it comes from the code that draws, so that a renamed
one is noticed. test_runs.py also covers what a run draws for its clips (``order``, ``clip``,
``mask``, ``drop path``, ``head dropout``, ``mixing``).
"""

import json
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpm_video.config.choices import TransformerSize
from hpm_video.config.data import AugmentationConfig, DataConfig
from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.augment import Augmentation
from hpm_video.data.batch import ClipBatch
from hpm_video.data.clips import ValidationClips, VideoClips
from hpm_video.data.manifest import Manifest, read_manifest
from hpm_video.data.mixture import Places, deal_out
from hpm_video.data.reading import Footage
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.decoding.locations import base_name, natural_order
from hpm_video.mining.objective import named
from hpm_video.mining.study import study_clips
from hpm_video.mining.validation import measure
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.models.vit import Transformer
from hpm_video.randomness import generator, global_generators, key_of, uniform
from hpm_video.recognition.objective import Classification, Mixing
from hpm_video.recognition.probes import split_in_folds
from hpm_video.runs.data import key_of_source, open_data
from hpm_video.runs.pretraining import Pretraining, load_run
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import STRATEGIES, MaskRule
from hpm_video.training.engine import Runner
from hpm_video.training.progress import Progress

KEYS = torch.tensor([0, 1, -1, 2**62 + 12345])
LINES = """path,label,label_name
a.mp4,0,cat
b/c.mp4,1,a  dog
frames of d/,0,cat
shard.tar::e/f.mp4@1536+20480,1,a dog
"""
MIXED = """
data: {train: videos, num_frames: 4, frame_size: [32, 32]}
model: {patch_size: [1, 8, 8]}
recipe: {epochs: 2, batch_size: 4, warmup_epochs: 1}
mix: {images: {weight: 0.5, data: {train: images, num_frames: 1, frame_size: [32, 32]}}}
"""
SIZES = {"long": (90, 160), "high": (64, 40)}


def generators():
    """The basic functions behind every draw."""
    with global_generators(-7):
        global_draws = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    return {
        "key_of": [
            key_of(),
            key_of("mask"),
            key_of(0, 3, 5, 1),
            key_of(0, "images", 3, 5, 1, 7),
            key_of(0, "mixing", 4, ("a.mp4", "b.mp4")),
        ],
        "uniform": uniform(KEYS, 3, "mask").tolist(),
        "generator": generator("clip", 0, 3, 5).random(3).tolist(),
        "integers": generator("order", 0, 3).integers(2**63, size=2).tolist(),
        "global": global_draws,
    }


def orders():
    """Files and keys of two streams: of the main source and of another."""
    manifest = Manifest(tuple("abcdefg"), (0,) * 7, (-1,) * 7)
    data = DataConfig(
        num_frames=4,
        frame_stride=1,
        max_frame_stride=2,
        frame_size=(32, 32),
        repeats=2,
        decoder="pyav",
        max_bad_share=0.5,
    )
    found = {}
    for source in ("", "images"):
        clips = VideoClips(
            manifest,
            data,
            MultiScaleCrop(flip=True),
            seed=3,
            source=source,
        )
        asked = [clips.request(position) for position in range(21)]
        clips.bad[asked[-1].path] = None
        asked.append(clips.request(20))
        found[source] = ["".join(each.path for each in asked), [each.keys for each in asked[-2:]]]
    validation_clips = ValidationClips(manifest, data, seed=3)
    return {**found, "held out": validation_clips.request(5).keys}


def clips():
    """Frames and crops: the requests to a clip's generator, in order."""
    found = {}
    augmentation = Augmentation(
        area=(0.2, 1.0),
        ratio=(0.75, 1.3333),
        flip=True,
        rand_augment=None,
        erasing=0.25,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    four = partial(DataConfig, num_frames=4, frame_size=(32, 32))
    for key in ((0, 0, 0, 0), (0, "images", 4, 2, 1)):
        for name, data in {
            "stride": four(frame_stride=3),
            "strides": four(frame_stride=1, max_frame_stride=6),
            "segments": four(frame_stride=1, sampling="segments"),
        }.items():
            draw = generator("clip", *key)
            frames = Footage(0, 100).draw(data, draw).tolist()
            found[f"{name} {key}"] = [frames, draw.random()]
        for name, size in SIZES.items():
            box, change = MultiScaleCrop(flip=True).draw(size, (32, 48), generator("clip", *key))
            found[f"multi-scale {name} {key}"] = [asdict(box), change.keywords["mirrored"]]
            box, change = augmentation.draw(size, (32, 48), generator("clip", *key))
            drawn = [change.keywords[each] for each in ("mirrored", "change_key", "erase_key")]
            found[f"augmentation {name} {key}"] = [asdict(box), *drawn]
    erases = replace(augmentation, erasing=1.0)
    box, change = erases.draw(size, (32, 48), generator("clip", *key))
    noise = change(np.zeros((2, box.height, box.width, 3), np.uint8))
    found["erased"] = [int((noise > 0).any(0).sum()), int(noise.sum())]
    return found


def decoded():
    """Frames, crop and keys of a clip of images, which every decoder reads alike."""
    config = load_config(PretrainConfig, Path("runs/images/config.yaml"), [])
    manifest = read_manifest(Path("images"))
    data = DataConfig(
        num_frames=1,
        frame_stride=1,
        frame_size=(32, 32),
        repeats=2,
        decoder="pyav",
        max_bad_share=0.0,
    )
    stream = VideoClips(manifest, data, Pretraining(config).transforms()[""], seed=0)
    sample = stream[12]
    return [Path(sample.file).name, sample.keys, sample.clips.sum(dim=(1, 2, 3, 4)).tolist()]


def masks():
    """Hidden tokens, of which some are the hardest or the easiest."""
    found = {}
    for unit, grid in {"token": TokenGrid(2, 3, 4), "tube": TokenGrid(3, 4, 4)}.items():
        difficulty = torch.arange(grid.num_tokens).mul(7).remainder(11).float().expand(2, -1)
        for name, strategy in STRATEGIES.items():
            rule = MaskRule(grid, unit, 9, strategy)
            num_picked = rule.num_picked(5, 8)
            priority = uniform(KEYS[:2], rule.num_units, "mask")
            difficulties = difficulty + torch.arange(grid.num_tokens) / 100
            mask = rule.draw(difficulties, priority, num_picked)
            found[f"{unit} {name}"] = [num_picked, mask.masked_ids.tolist()]
    return found


def of_models():
    """Draws of models and objectives, under names of their own."""
    blocks = Transformer(TransformerSize(8, 2, 2), drop_path=0.5)
    config = load_config(
        FinetuneConfig,
        Path("runs/classes/config.yaml"),
        ["model.drop_path=0", "model.head_dropout=0.5", "model.pooling=attentive"],
    )
    classifier = build_classifier(config, 3)
    seen = []
    classifier.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0] == 0))
    classifier(torch.zeros(4, 3, 4, 32, 32), KEYS)
    student = build_student(load_config(PretrainConfig, Path("runs/video/config.yaml"), []))
    spread = student.patch_embed.proj.weight.detach().flatten().sort().values[::500]
    return {
        "drop path": blocks.draws(KEYS).tolist(),
        "head dropout": seen[0].nonzero().tolist(),
        # Sorted by size, so that the layout does not matter; the last bits depend on the processor.
        "weights": [round(each, 5) for each in spread.tolist()],
        "folds": split_in_folds(torch.arange(12) % 3, 4, seed=1).tolist(),
        "mixing": mixing(),
    }


def mixing():
    """The share of each label after mixup or CutMix, by update and names of files."""
    objective = Classification(
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        label_smoothing=0.0,
        mixing=Mixing(2, AugmentationConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.0)),
        seed=3,
    )
    pixels = torch.zeros(2, 3, 1, 16, 16, dtype=torch.uint8)
    pixels[1] = 255
    files = ("/data/a.mp4", "shard.tar::x/b.mp4@512+1")
    batch = ClipBatch(pixels, KEYS[:2], torch.tensor([0, 1]), files, ())
    found = []

    def student(clips, keys):
        found.append(round(clips.mean().item(), 4))
        found.append(round(clips[0].mean().item(), 4))
        return torch.zeros(2, 2)

    for update in range(3):
        objective.losses(student, batch, Progress(update, 0.0, 1))
    return found


def looks():
    """Masks for validation measures and for pictures of a trained model. -> measures, and masks"""
    _, student, objective = load_run(Path("runs/video/checkpoints/last"), torch.device("cpu"))
    stored = load_file("numbers/video.safetensors")["clips"][:4]
    batch = ClipBatch(stored, KEYS, torch.zeros(4).long(), ("x.mp4",) * 4, ())
    viewer = Runner(student, torch.device("cpu"), "fp32")
    measures = measure(objective, viewer, [batch])
    with torch.no_grad():
        (first, *_) = study_clips(objective, student, batch, num_masks=2, hard_fraction=0.5)
    return {
        "held out": measures,
        "picture": np.flatnonzero(first.masked).tolist(),
        "pictures": float(np.nanmean(first.true_error)),
        "measured in pictures": int(np.isfinite(first.true_error).sum()),
    }


def names():
    """Identifiers of data: fingerprints, and names of sources and quantities."""
    Path("list.csv").write_text(LINES)
    Path("mixed.yaml").write_text(MIXED)
    manifest = read_manifest(Path("list.csv"))
    fixed = replace(manifest, files=("/data/a.mp4", "/data/b.tar::c.mp4@512+9", "/f/", "/g.png"))
    config = load_config(PretrainConfig, Path("mixed.yaml"), [])
    data = open_data(config)
    places = [*map(str, read_manifest(Path("labelled")).files)]
    return {
        "fingerprint": data.fingerprint,
        "list": open_data(replace(config, data=replace(config.data, train="list.csv"))).fingerprint,
        "updates": data.timeline.num_updates,
        "digest": fixed.digest,
        "base names": [base_name(file) for file in manifest.files],
        "labels": [manifest.labels, manifest.label_names],
        "classes": ["/".join(place.split("/")[-2:]) for place in places],
        "natural order": sorted(["a10.png", "a9.png", "A1.png"], key=natural_order),
        "sources": [[*config.sources], key_of_source("images"), named("images", "loss")],
    }


def dealt():
    """The source of each update, and its samples."""
    three = deal_out([1.0, 0.5, 0.3], 24)
    places = Places(deal_out([1.0, 0.5], 6), 4, 2, rank=1, processes=2)
    return {"sources": three.tolist(), "places": [[*place] for place in places]}


PARTS = {
    part.__name__: part
    for part in (generators, orders, clips, decoded, masks, of_models, names, dealt)
}


@pytest.mark.parametrize("part", PARTS)
def test_draws_are_those_of_the_first_house(part, first_house):
    stored = json.loads(Path("draws.json").read_text())
    assert json.loads(json.dumps(PARTS[part]())) == stored[part]


@pytest.mark.slow
def test_a_model_is_looked_at_under_the_masks_of_the_first_house(first_house):
    stored = json.loads(Path("draws.json").read_text())["looks"]
    found = looks()
    assert found.pop("held out") == pytest.approx(stored.pop("held out"), rel=1e-3)
    assert found.pop("pictures") == pytest.approx(stored.pop("pictures"), rel=1e-5)
    assert found == stored
