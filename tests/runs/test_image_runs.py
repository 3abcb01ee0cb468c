"""Whole runs on images, and on images and videos together, on real small files."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import TRACED, finish, lines_of

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.failures import TooManyBadFiles
from hpm_video.files.weights import CheckpointError
from hpm_video.runs.finetuning import evaluate_run, finetune
from hpm_video.runs.pretraining import load_run
from hpm_video.runs.pretraining import pretrain as run_pretraining
from hpm_video.training import fast

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_curves")]
TINY = "test_vit.r160_in1k"  # width 64, patches of 16, images of 160
TINTS = ("red", "green", "blue")
COMMON = """
engine: {precision: fp32, threads: 1, device: cpu}
logging: {every_updates: 1, validate_every_epochs: 4, picture_every_epochs: 8, trackers: [jsonl]}
checkpoint: {every_updates: 5}
"""
MODEL = """
model:
  encoder: {dim: 16, depth: 1, num_heads: 2}
  patch_size: [1, 8, 8]
  positions: space_time
  class_token: true
  conventions: mae
"""
DATA = """
data:
  train: TRAIN
  validation: VALIDATION
  num_frames: 1
  frame_size: [32, 24]
  workers: 0
  flip: true
  interpolation: bicubic
  validation_short_side: 36
"""
IMAGES = f"""{MODEL}  decoder: {{dim: 16, depth: 1, num_heads: 2}}
{DATA}  crop: random_resized
masking: {{ratio: 0.75}}
mining: {{target: raw, momentum: warmup, last_momentum: 0.9}}
recipe: {{epochs: 20, batch_size: 6, base_lr: 0.2, min_lr: 0, warmup_epochs: 1, clip_grad: 5.0}}
{COMMON}"""
CLASSES = f"""{MODEL}  init: xavier
{DATA}init_weights: INIT
recipe: {{epochs: 6, batch_size: 6, base_lr: 0.4, warmup_epochs: 1, layer_decay: 0.9}}
augmentation: {{area: [0.5, 1.0], rand_augment: rand-m3-n1, mixup: 0.0, cutmix: 0.0}}
test: {{clips: 1, crops: 1}}
{COMMON}"""


def picture(seed: int, tint: int) -> Image.Image:
    """Tinted blocks. Sizes vary, as in real data."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(36, 70, 2)
    blocks = np.kron(rng.integers(0, 120, (9, 9, 3)), np.ones((8, 8, 1)))[:height, :width]
    blocks[..., tint] += 120
    return Image.fromarray(blocks.astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Folders ``train`` with 12 and ``validation`` with 6 images, in class folders by tint."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in {"train": 4, "validation": 2}.items():
        for tint, name in enumerate(TINTS):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                suffix, mode = (("png", "RGB"), ("JPEG", "CMYK"))[index % 2]
                seed = 10 * tint + index + (100 if split == "validation" else 0)
                made = picture(seed, tint).convert(mode)
                made.save(folder / split / name / f"{index}.{suffix}", quality=95)
    return folder


def write_config(path: Path, text: str, images: Path, init: object = None) -> Path:
    text = text.replace("TRAIN", str(images / "train"))
    text = text.replace("VALIDATION", str(images / "validation"))
    path.write_text(text.replace("INIT", "null" if init is None else str(init)))
    return path


def load_images_config(folder: Path, images: Path, *overrides: str) -> PretrainConfig:
    path = write_config(folder / "images.yaml", IMAGES, images)
    return load_config(PretrainConfig, path, [f"output_dir={folder / 'run'}", *overrides])


@pytest.fixture(scope="module")
def image_run(images, tmp_path_factory) -> Path:
    """A finished run on images."""
    return run_pretraining(load_images_config(tmp_path_factory.mktemp("image run"), images))


def test_a_run_on_images_learns_measures_and_draws(image_run):
    assert len(lines_of(image_run, "train")) == 40
    first, *_, measures = lines_of(image_run, "validation")
    assert measures["relative_error"] < 0.8 * first["relative_error"]
    assert 0 <= measures["teacher_ranking"] <= 1
    assert "ranking_by_variance" in measures
    assert "ranking_by_motion" not in measures, "one frame has no motion"
    assert len(list((image_run / "pictures").glob("*.png"))) == 3, "after 8, 16 and 20 epochs"


@pytest.mark.filterwarnings("default")  # torch itself warns while it traces
def test_images_are_fine_tuned_and_tested_by_the_same_programs(
    image_run, images, tmp_path, monkeypatch, caplog
):
    """The second time blocks are traced as if they were to be compiled."""
    monkeypatch.setattr(fast, "HOW", TRACED)
    caplog.set_level("INFO")
    start = image_run / "checkpoints" / "last"
    path = write_config(tmp_path / "classes.yaml", CLASSES, images, start)
    for pooling, mode in {"mean_norm": "auto", "class_token": "blocks"}.items():
        run = tmp_path / pooling
        overrides = [f"output_dir={run}", f"model.pooling={pooling}", f"engine.compile={mode}"]
        config = load_config(FinetuneConfig, path, overrides)
        result = evaluate_run(config, finetune(config))
        assert result["top1"] >= 5 / 6, "three tints are easy"
        assert (result["videos"], result["test"]["clips"]) == (6, 1)
        before = load_file(start / "model.safetensors")["cls_token"]
        after = load_file(run / "checkpoints" / "last" / "model.safetensors")["cls_token"]
        assert not torch.equal(before, after)
        reports = caplog.text.count("compiling (engine.compile=blocks)")
        assert reports == (2 if mode == "blocks" else 0), "for training and for the test"
    assert ", compiled (blocks)" in caplog.text


def test_a_class_token_that_pretraining_had_not_is_refused(image_run, images, tmp_path):
    start = image_run / "checkpoints" / "last"
    path = write_config(tmp_path / "classes.yaml", CLASSES, images, start)
    overrides = [f"output_dir={tmp_path / 'run'}", "model.class_token=false"]
    with pytest.raises(ConfigError, match="model.class_token: True -> False"):
        finetune(load_config(FinetuneConfig, path, overrides))
    assert not (tmp_path / "run").exists()


def test_tools_take_images(image_run, images, call_tool, tmp_path):
    checkpoint = image_run / "checkpoints" / "last"
    one = images / "validation" / "red" / "1.JPEG"
    png = images / "validation" / "red" / "0.png"
    code, text = call_tool("show_masks", checkpoint, png, "--output", png.parent)
    assert code == 2
    assert "would overwrite" in text
    code, text = call_tool("show_masks", checkpoint, one, "--output", tmp_path / "pictures")
    assert (code, [path.name for path in (tmp_path / "pictures").iterdir()]) == (0, ["1.png"]), text
    few = ("recipe.epochs=2", "recipe.warmup_epochs=1", "recipe.batch_size=6")
    code, text = call_tool(
        "probe",
        checkpoint,
        "--train",
        images / "train",
        "--validation",
        images / "validation",
        "--neighbours",
        3,
        "--workers",
        0,
        "--probes",
        "knn",
        "linear_images",
        "--output",
        tmp_path / "probe",
        "--set",
        *few,
        "engine.micro_batch=6",
        "engine.threads=1",
    )
    assert code == 0, text
    probes = json.loads((tmp_path / "probe" / "probe.json").read_text())["probes"]
    assert [*probes] == ["3 nearest neighbours", "linear_images"]
    assert probes["3 nearest neighbours"]["top1"] >= 4 / 6, "three tints are easy"


def test_the_teachers_features_as_target_with_and_without_a_predictor(images, tmp_path):
    plain = ("mining.predictor=none", "masking.strategy=random")
    for name, overrides in {"mining": (), "plain": plain}.items():
        (tmp_path / name).mkdir()
        run = run_pretraining(
            load_images_config(
                tmp_path / name, images, "mining.target=ema", "recipe.epochs=2", *overrides
            )
        )
        checkpoint = run / "checkpoints" / "last"
        assert (checkpoint / "teacher.safetensors").is_file()
        _, student, objective = load_run(checkpoint, torch.device("cpu"))
        assert student.reconstructor.head.out_features == 16
        assert (objective.ema.difficulty_decoder is None) == (name == "plain")
        assert list((run / "pictures").glob("*.png")), "a sheet without a reconstruction"


def test_a_file_that_is_no_weights_stops_a_run_before_it_begins(images, tmp_path):
    file = tmp_path / "dino.pth"
    torch.save({"head.weight": torch.zeros(2, 2)}, file)
    options = ("mining.target=dino", f"mining.feature_weights={file}", "data.frame_size=[32,32]")
    config = load_images_config(tmp_path, images, *options)
    config = replace(config, model=replace(config.model, patch_size=(1, 16, 16)))
    with pytest.raises(CheckpointError, match=r"missing patch_embed\.proj\.weight"):
        run_pretraining(config)
    assert not (tmp_path / "run").exists()


def test_other_weights_of_a_feature_model_are_refused_and_moved_ones_taken(images, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        save_file(timm.create_model(TINY, num_classes=0).state_dict(), file)
    options = ["mining.target=dino", f"mining.feature_model={TINY}", "recipe.epochs=2"]
    options += ["data.frame_size=[160,160]", "data.validation_short_side=null"]
    options += ["model.patch_size=[1,16,16]", "checkpoint.every_updates=2"]

    def start(file: Path, *more: str) -> Path:
        override = f"mining.feature_weights={file}"
        return run_pretraining(load_images_config(tmp_path, images, *options, override, *more))

    run = start(files[0])
    newest = (run / "checkpoints" / "last").resolve()
    shutil.rmtree(newest)  # so that some updates are left to do
    with pytest.raises(ConfigError, match="began with other weights than mining.feature_weights"):
        start(files[1])
    files[0].rename(moved := tmp_path / "moved.safetensors")
    assert (start(moved) / "checkpoints" / "last").resolve() == newest
    moved.unlink()
    start(moved)  # it is complete, and no longer needs the weights


@pytest.fixture(scope="module")
def mix(images) -> list[str]:
    """Overrides that mix images into the tiny run on videos, in every third update."""
    values = {
        "weight": 0.5,
        "data.train": images / "train",
        "data.validation": images / "validation",
        "data.num_frames": 2,
        "data.frame_size": "[24,40]",
        "masking.ratio": 0.5,
    }
    named = [f"mix.images.{name}={value}" for name, value in values.items()]
    return ["model.positions=space_time", "recipe.epochs=4", *named]


@pytest.fixture(scope="module")
def mixed_run(pretrain, mix, tmp_path_factory) -> Path:
    """A finished run on videos and images."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    finish(pretrain(run, *mix))
    return run


def test_a_mixed_run_trains_on_both_and_measures_each(mixed_run):
    lines = lines_of(mixed_run, "train")
    assert len(lines) == 14 * 3 // 2 * 4 // 4, "4 epochs of 14 videos and half as many images"
    of_images = ["images/reconstruction" in line for line in lines]
    assert sum(of_images) == len(lines) // 3
    assert all(
        ("reconstruction" in line) != flag for line, flag in zip(lines, of_images, strict=True)
    )
    measures = lines_of(mixed_run, "validation")[-1]
    assert {"relative_error", "images/relative_error", "images/teacher_ranking"} <= set(measures)
    assert len(list((mixed_run / "pictures" / "images").glob("*.png"))) == 1
    assert len(list((mixed_run / "pictures").glob("*.png"))) == 1


def test_a_mixed_run_that_was_killed_ends_with_the_same_bits(pretrain, mix, mixed_run, tmp_path):
    run = tmp_path / "run"
    blind = [*mix, "data.validation=null", "mix.images.data.validation=null"]
    finish(pretrain(run, *blind, place="update"), code=-signal.SIGKILL)
    assert "resuming at update 5" in finish(pretrain(run, *blind, "data.workers=1"))
    for name in ("model", "teacher"):
        ours, theirs = (
            load_file(folder / "checkpoints" / "last" / f"{name}.safetensors")
            for folder in (run, mixed_run)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_bad_files_are_counted_for_each_source(mix, config_file, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(24):
        picture(index, 0).save(folder / f"{index:02d}.png")
        if index % 8 == 0:
            (folder / f"{index:02d}.png").write_bytes(b"no picture")
    overrides = [*mix, f"mix.images.data.train={folder}", "mix.images.data.validation=null"]
    overrides += [f"output_dir={tmp_path / 'run'}", "data.max_bad_share=0.09"]
    with pytest.raises(TooManyBadFiles, match="3 of 24 files do not decode"):
        run_pretraining(load_config(PretrainConfig, config_file, overrides))
    assert len((tmp_path / "run" / "bad_files_images.csv").read_text().splitlines()) == 4
    assert not (tmp_path / "run" / "bad_files.csv").exists()


def test_files_of_another_source_are_named(mixed_run, mix, config_file, images):
    renamed = images / "train" / "red" / "0.png"
    moved = renamed.rename(renamed.with_name("other.png"))
    try:
        with pytest.raises(ConfigError, match=r"the files of mix\.images\.data\.train: 12 files"):
            run_pretraining(
                load_config(PretrainConfig, config_file, [*mix, f"output_dir={mixed_run}"])
            )
    finally:
        moved.rename(renamed)


def test_other_images_of_a_mixed_run_are_refused(config_file, mix, mixed_run, images):
    other = f"mix.images.data.train={images / 'validation'}"
    config = load_config(PretrainConfig, config_file, [*mix, f"output_dir={mixed_run}", other])
    with pytest.raises(ConfigError, match=r"mix\.images\.data\.train: "):
        run_pretraining(config)


@pytest.mark.parametrize("kind", ["videos", "images"])
def test_a_mixed_checkpoint_is_fine_tuned_on_either(
    mixed_run, labelled_videos, images, tmp_path, kind
):
    folder = labelled_videos if kind == "videos" else images
    path = write_config(
        tmp_path / "classes.yaml", CLASSES, folder, mixed_run / "checkpoints" / "last"
    )
    overrides = ["model.class_token=false", "model.conventions=videomae", "recipe.epochs=10"]
    overrides += ["model.patch_size=[2,8,8]", f"output_dir={tmp_path / 'run'}"]
    overrides += ["data.num_frames=4" if kind == "videos" else "data.num_frames=2"]
    config = load_config(FinetuneConfig, path, overrides)
    result = evaluate_run(config, finetune(config))
    assert result["top1"] >= 4 / 6, "three tints are easy"
    used = load_config(FinetuneConfig, tmp_path / "run" / "config.yaml", [])
    assert used.model.pretrained_grid == (2, 4, 5), "the most along each axis"
