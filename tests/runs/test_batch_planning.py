"""How a batch is split: tried out where a GPU's memory is limited, and shown by a dry run."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.from_config import build_student
from hpm_video.runs import autotune
from hpm_video.runs.autotune import choose_plan, find_micro_batch, trial_update
from hpm_video.runs.finetuning import Finetuning
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.distributed import Processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TINY = (
    "model.encoder={dim: 16, depth: 1, num_heads: 2}",
    "model.decoder={dim: 16, depth: 1, num_heads: 2}",
    "engine.device=cpu",
    "engine.precision=fp32",
)
WIDE = "model.encoder={dim: 768, depth: 2, num_heads: 12}"
SHALLOW = "model.decoder={dim: 192, depth: 1, num_heads: 3}"
"""The width of a ViT-B gives amounts worth showing in GB, and takes seconds to simulate."""
CPU = torch.device("cpu")
SIZES = [1, 2, 3, 4, 6, 8, 12, 24]


def config_of(*overrides):
    return load_config(PretrainConfig, CONFIGS / "pretrain" / "demo.yaml", [*TINY, *overrides])


@pytest.fixture
def tried(monkeypatch):
    """Real updates that run out of memory with more clips of a source than its limit."""
    clips_tried, limits = [], {}

    def make(task, device, precision, clips, *, source, **options):
        clips_tried.append((source, clips))
        update = trial_update(task, device, precision, clips, source=source, **options)

        def fails_where_it_is_too_large():
            if clips > limits.get(source, math.inf):
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            update()

        return fails_where_it_is_too_large

    monkeypatch.setattr(autotune, "trial_update", make)

    def find(config, sizes, **limited):
        limits.update({name.strip("_"): limit for name, limit in limited.items()})
        return find_micro_batch(Pretraining(config), CPU, "fp32", sizes)

    return find, clips_tried


@pytest.mark.parametrize(
    ("largest", "expected"), [(1, 1), (2, 2), (5, 4), (12, 12), (23, 12), (100, 24)]
)
def test_the_largest_micro_batch_that_fits_is_found(tried, largest, expected):
    find, clips = tried
    assert find(config_of("data.repeats=1"), SIZES, _=largest) == expected
    assert len(clips) <= 5


def test_repeats_count_as_clips(tried):
    find, _ = tried
    assert find(config_of("data.repeats=2"), SIZES, _=8) == 4


def test_every_source_of_a_mix_must_fit(tried):
    path = CONFIGS / "pretrain" / "demo_mixed.yaml"
    (name,) = load_config(PretrainConfig, path, []).mix
    single = ["data.repeats=1", f"mix.{name}.data.repeats=1"]
    config = load_config(PretrainConfig, path, [*TINY, *single])
    find, clips = tried
    assert find(config, [1, 2, 4], **{name: 2}) == 2
    assert {source for source, _ in clips} == {"", name}


def test_where_nothing_fits_the_remedies_are_named(tried):
    find, _ = tried
    with pytest.raises(ConfigError, match=r"micro_batch=1 does not fit.*checkpoint_activations"):
        find(config_of(), SIZES, _=0)


def test_on_a_cpu_a_process_takes_its_share_in_one_pass_by_default():
    for overrides, expected in (((), 4), (("engine.micro_batch=2",), 2)):
        task = Pretraining(config_of(*overrides))
        assert choose_plan(task, CPU, Processes(), "fp32").micro_batch == expected


def test_what_does_not_come_out_even_names_what_does():
    with pytest.raises(
        ConfigError, match=r"batch_size must be a multiple of 3 .* take recipe.batch_size=6"
    ):
        config_of().plan(3)
    with pytest.raises(ConfigError, match=r"micro_batch must be one of 1, 2 with .* got 4"):
        config_of("engine.micro_batch=4").plan(2)


def test_mixing_and_batch_norms_need_pairs():
    path = CONFIGS / "finetune" / "k400_b.yaml"
    overrides = ["data.train=x", "init_weights=x", "data.validation=null"]
    config = load_config(FinetuneConfig, path, overrides)
    assert config.multiple == 2
    with pytest.raises(ConfigError, match=r"an even micro-batch"):
        config.plan(384)
    without = load_config(
        FinetuneConfig, path, [*overrides, "augmentation.mixup=0", "augmentation.cutmix=0"]
    )
    assert without.multiple == 1
    assert without.plan(384).micro_batch == 1


def program(name):
    path = ROOT / "tools" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"{name}_tool", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def dry_run(capsys, tool, *arguments):
    code = program(tool).main([*map(str, arguments), "--dry-run"])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def table_of(output):
    """{micro-batch: (passes per update, GB)}"""
    rows = re.findall(r"^ +(\d+) +(\d+) +([\d.]+)$", output, re.MULTILINE)
    return {int(size): (int(passes), float(needed)) for size, passes, needed in rows}


@pytest.fixture
def manifest(videos):
    return videos / "train"


def test_a_dry_run_tells_the_plan_and_leaves_nothing(manifest, tmp_path, capsys):
    overrides = ["recipe.batch_size=64", "recipe.epochs=8", "engine.precision=auto"]
    code, output = dry_run(
        capsys,
        "pretrain",
        CONFIGS / "pretrain" / "k400_hpm_s.yaml",
        f"data.train={manifest}",
        "data.validation=null",
        f"output_dir={tmp_path / 'run'}",
        "recipe.warmup_epochs=1",
        WIDE,
        SHALLOW,
        *overrides,
        "--processes",
        8,
    )
    assert code == 0, output
    assert "64 files per update = 8 per forward pass x 1 pass x 8 processes" in output
    assert "activations in bf16" in output
    assert "planned for a GPU in each process, whatever this machine has" in output
    table = table_of(output)
    assert {size: passes for size, (passes, _) in table.items()} == {1: 8, 2: 4, 4: 2, 8: 1}
    needed = [gigabytes for _, gigabytes in table.values()]
    assert needed == sorted(needed)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_goes_without_lists_and_tells_the_hours(capsys):
    sizes = ["recipe.batch_size=64", "recipe.epochs=8", "recipe.warmup_epochs=1", WIDE]
    options = ["--files", 640, "--clips-per-second", 0.5]
    config = CONFIGS / "pretrain" / "k400_hpm_s.yaml"
    arguments = [config, "data.train=none.csv", "data.repeats=3", *sizes, SHALLOW]
    code, output = dry_run(capsys, "pretrain", *arguments, *options)
    assert code == 0, output
    assert "640 files to train on (none.csv), 3 clips of each" in output
    assert "8 epochs = 80 updates" in output
    assert "15,360 clips at 0.5 per second: 8.53 hours" in output
    code, output = dry_run(
        capsys,
        "finetune",
        CONFIGS / "finetune" / "ssv2_s.yaml",
        "init_weights=null",
        *sizes,
        *options,
    )
    assert code == 0, output
    assert "640 files to train on" in output


def test_a_dry_run_goes_without_lists_where_only_these_have_the_classes(capsys):
    config = CONFIGS / "finetune" / "demo.yaml"
    code, output = dry_run(capsys, "finetune", config, "data.train=none.csv", "--files", 30)
    assert code == 0, output
    assert "30 files to train on (none.csv)" in output


def test_a_dry_run_of_zero_shows_what_is_spread(manifest, capsys):
    config = CONFIGS / "pretrain" / "k400_hpm_s.yaml"
    overrides = [WIDE, SHALLOW, f"data.train={manifest}", "data.validation=null"]
    overrides += ["recipe.batch_size=64", "recipe.epochs=8", "recipe.warmup_epochs=1"]
    overrides += ["engine.name=deepspeed", "engine.zero_stage=3", "engine.micro_batch=8"]
    code, output = dry_run(capsys, "pretrain", config, *overrides, "--processes", 8)
    assert code == 0, output
    rows = re.findall(r"^(\w+) +([\d.]+) +[\d.]+$", output, re.MULTILINE)
    spread = {name: float(value) for name, value in rows}
    with torch.device("meta"):
        model = build_student(load_config(PretrainConfig, config, overrides))
    weights = 4 * sum(p.numel() for p in model.parameters()) / 1e9
    for name, size in {"weights": weights, "teacher": weights, "moments": 2 * weights}.items():
        assert spread[name] == pytest.approx(size / 8, abs=0.006), "rounded to 0.01 GB"


def test_a_dry_run_of_fine_tuning_needs_no_weights_yet(labelled_videos, capsys):
    code, output = dry_run(
        capsys,
        "finetune",
        CONFIGS / "finetune" / "ssv2_s.yaml",
        WIDE,
        f"data.train={labelled_videos / 'train'}",
        "data.validation=null",
        "init_weights=there/is/none",
        "model.num_classes=null",
        "recipe.batch_size=8",
        "recipe.epochs=8",
        "--processes",
        2,
    )
    assert code == 0, output
    assert "8 files per update = 4 per forward pass x 1 pass x 2 processes" in output
    assert set(table_of(output)) == {2, 4}


def test_a_dry_run_refuses_what_the_run_would(manifest, capsys):
    code, output = dry_run(
        capsys,
        "pretrain",
        CONFIGS / "pretrain" / "demo.yaml",
        f"data.train={manifest}",
        "data.validation=null",
        "--processes",
        3,
    )
    assert code == 2
    assert output.count("recipe.batch_size must be a multiple of 3 for processes=3") == 1


def test_an_update_of_a_classifier_pairs_its_clips(videos):
    config = load_config(
        FinetuneConfig,
        CONFIGS / "finetune" / "demo.yaml",
        [*(item for item in TINY if "decoder" not in item), "model.num_classes=3"],
    )
    trial_update(Finetuning(config), CPU, "fp32", 3)()
