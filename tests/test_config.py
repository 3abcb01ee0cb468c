from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpm_video.config import (
    ConfigError,
    PretrainConfig,
    load_config,
    result_differences,
    save_config,
)
from hpm_video.pretrain import build_objective, build_student, make_update

ROOT = Path(__file__).parent.parent
ALL = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
DEMO = ROOT / "configs" / "pretrain" / "demo.yaml"
RECIPES = {  # METHOD, section 3: data and size -> epochs, batch, peak learning rate, decoder depth
    "k400_s": (1600, 1024, 6e-4, 4),
    "k400_b": (800, 2048, 1.2e-3, 4),
    "k400_l": (1600, 512, 3e-4, 12),
    "k400_h": (1600, 1024, 6e-4, 12),
    "ssv2_s": (2400, 1024, 6e-4, 4),
    "ssv2_b": (800, 2048, 1.2e-3, 4),
}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_shipped_config_loads_round_trips_and_builds(path, tmp_path):
    config = load_config(PretrainConfig, path, [])
    save_config(config, tmp_path / "used.yaml")
    assert load_config(PretrainConfig, tmp_path / "used.yaml", []) == config
    with torch.device("meta"):
        student = build_student(config)
        build_objective(config, student if config.mining.predictor != "none" else None)
    assert student.grid.num_tokens == (108 if path == DEMO else 1568)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_shipped_config_is_short_and_says_what_it_is(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    header = " ".join(line for line in lines if line.startswith("#"))
    for word in ("Reference:", "Cost:", "Run:"):
        assert word in header


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["hpm", "videomae"])
def test_recipes_are_those_of_the_papers(name, kind):
    data, size = name.split("_")
    config = load_config(PretrainConfig, DEMO.with_name(f"{data}_{kind}_{size}.yaml"), [])
    recipe = config.recipe
    peak = recipe.base_lr * recipe.batch_size / 256
    depth = config.model.decoder.depth
    assert (recipe.epochs, recipe.batch_size, pytest.approx(peak), depth) == RECIPES[name]
    assert recipe.clip_grad is None
    assert config.data.frame_stride == {"k400": 4, "ssv2": 2}[data]
    masking = (config.masking.unit, config.masking.count_rule, config.masking.strategy)
    expected = {
        "hpm": ("token", "hpm", "easy_to_hard"),
        "videomae": ("tube", "videomae", "random"),
    }
    assert masking == expected[kind]


FAMILIES = ["demo", "k400_hpm_s", "k400_videomae_s", "ssv2_hpm_s", "ssv2_videomae_s"]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_of_each_family_takes_a_real_update_at_depth_1(name):
    config = load_config(PretrainConfig, DEMO.with_name(f"{name}.yaml"), [])
    model = replace(
        config.model,
        encoder=replace(config.model.encoder, depth=1),
        decoder=replace(config.model.decoder, depth=1),
    )
    make_update(replace(config, model=model), torch.device("cpu"), "fp32", clips=1)()


def test_misspelt_key_is_an_error_that_knows_better():
    with pytest.raises(ConfigError, match="Did you mean one of: 'ratio'"):
        load_config(PretrainConfig, DEMO, ["masking.ration=0.5"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("masking.ratio=1.5", "masking.ratio must lie between 0 and 1, got 1.5"),
        ("masking.ratio=0.999", "hides 108 of 108"),
        ("masking.strategy=hard", "hard"),
        ("masking.first_fraction=2", r"must lie in \[0, 1\], got 2"),
        ("mining.predictor=none", "masking.strategy=random"),
        ("data.frame_size=[50,48]", "height .* got 50 .* 48 and 56"),
        ("data.max_frame_stride=0", "at least data.frame_stride"),
        ("data.mean=[0.5]", "each of the 3 channels"),
        ("engine.micro_batch=3", "nearest that does is 2|nearest that does is 4"),
        ("recipe.epochs=many", "many"),
        ("recipe.warmup_epochs=99", "warmup_epochs must lie in"),
        ("recipe.min_lr=1", "min_lr <= recipe.base_lr"),
        ("model.encoder.num_heads=5", "got dim 96, depth 3, num_heads 5"),
        ("logging.every_updates=0", "every_updates must be at least 1, got 0"),
        ("seed", "section.key=value, got 'seed'"),
    ],
)
def test_a_value_that_cannot_be_run_is_named_with_its_rule(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(PretrainConfig, DEMO, [override])


def test_missing_file_and_broken_yaml(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file"):
        load_config(PretrainConfig, tmp_path / "none.yaml", [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [1,\n")
    with pytest.raises(ConfigError, match="broken.yaml"):
        load_config(PretrainConfig, broken, [])


def test_numbers_are_read_as_numbers(tmp_path):
    config = load_config(PretrainConfig, DEMO, ["recipe.base_lr=1e-4", "recipe.min_lr=0"])
    assert config.recipe.base_lr == 1e-4


def test_parts_of_a_strategy_can_be_replaced():
    overrides = ["masking.pick=easiest", "masking.last_fraction=0.25"]
    strategy = load_config(PretrainConfig, DEMO, overrides).strategy
    assert (strategy.pick, strategy.first_fraction, strategy.last_fraction) == ("easiest", 0, 0.25)


def test_only_what_changes_the_result_counts_as_a_difference():
    old = load_config(PretrainConfig, DEMO, [])
    new = load_config(
        PretrainConfig,
        DEMO,
        [
            "output_dir=elsewhere",
            "data.workers=3",
            "data.decoder=pyav",
            "engine.threads=1",
            "logging.every_updates=1",
            "checkpoint.keep_last=9",
            "model.checkpoint_activations=true",
            "seed=1",
            "model.encoder.depth=2",
        ],
    )
    assert result_differences(old, old) == []
    assert result_differences(old, new) == ["seed: 0 -> 1", "model.encoder.depth: 3 -> 2"]
