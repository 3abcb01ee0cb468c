from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import DEFAULT_MODELS, TransformerSize
from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_any_config, load_config, result_differences, save_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.augment import Augmentation
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.models.positions import position_table
from hpm_video.recognition.trained_model import ClipChoice
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.finetuning import Finetuning
from hpm_video.runs.pretraining import Pretraining, build_objective
from hpm_video.tokens.grid import TokenGrid

ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
DEMO = ROOT / "configs" / "pretrain" / "demo.yaml"
CLASSIFIERS = sorted(
    path for folder in ("finetune", "probe") for path in (ROOT / "configs" / folder).glob("*.yaml")
)
FINETUNE_DEMO = ROOT / "configs" / "finetune" / "demo.yaml"
FINETUNE_RECIPES = {  # METHOD: classes -> epochs, batch, copies, peak learning rate, layer decay
    "k400_s": (400, 150, 384, 2, 7.5e-4, 0.75),
    "k400_b": (400, 75, 384, 2, 7.5e-4, 0.75),
    "k400_b800": (400, 100, 512, 1, 2e-3, 0.75),
    "k400_l": (400, 35, 128, 2, 1e-3, 0.75),
    "k400_h": (400, 50, 512, 2, 2e-3, 0.75),
    "ssv2_s": (174, 40, 384, 2, 1.5e-3, 0.7),
    "ssv2_b": (174, 30, 384, 2, 7.5e-4, 0.75),
    "ssv2_b800": (174, 50, 512, 1, 1e-3, 0.75),
    "ucf101_b": (101, 100, 128, 2, 2.5e-4, 0.7),
    "hmdb51_b": (51, 100, 128, 2, 2.5e-4, 0.7),
}
RECIPES = {  # METHOD, section 3: data and size -> epochs, batch, peak learning rate, decoder depth
    "k400_s": (1600, 1024, 6e-4, 4),
    "k400_b": (800, 2048, 1.2e-3, 4),
    "k400_l": (1600, 512, 3e-4, 12),
    "k400_h": (1600, 1024, 6e-4, 12),
    "ssv2_s": (2400, 1024, 6e-4, 4),
    "ssv2_b": (800, 2048, 1.2e-3, 4),
}
IMAGE_RECIPES = {  # the official ones: epochs, encoder width, whether by difficulty
    "in1k_mae_b": (200, 768, False),
    "in1k_hpm_b": (200, 768, True),
    "in1k_hpm_b800": (800, 768, True),
    "in1k_hpm_l": (800, 1024, True),
    "in1k_hpm_h": (800, 1280, True),
}
IMAGE_FINETUNE_RECIPES = {  # epochs, batch, peak learning rate
    "in1k_b": (100, 384, 7.5e-4),
    "in1k_l": (50, 512, 1e-3),
}
TOKENS = {
    **{"demo": 108, "demo_mixed": 108, "demo_images": 64},
    **{"cifar10": 64, "in1k": 196, "in1k_hpm_h": 256},
}
"""Tokens of a clip, by the name of a config or of the data that it starts with; otherwise 1568."""


def shallow(config):
    """The config with two blocks in the encoder; tests/first_house builds them all."""
    encoder = replace(config.model.encoder, depth=2)
    return replace(config, model=replace(config.model, encoder=encoder))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_shipped_config_loads_round_trips_and_builds(path, tmp_path):
    config = load_config(PretrainConfig, path, [])
    save_config(config, tmp_path / "used.yaml")
    assert load_config(PretrainConfig, tmp_path / "used.yaml", []) == config
    config = shallow(config)
    with torch.device("meta"):
        student = build_student(config)
        teacher = student if config.mining.has_teacher else None
        build_objective(config, teacher, torch.device("meta"))
    data = path.stem.split("_")[0]
    expected = TOKENS.get(path.stem, TOKENS.get(data, 1568))
    assert student.grid.num_tokens == expected


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


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_recipes_for_images_are_the_official_ones(name):
    config = load_config(PretrainConfig, DEMO.with_name(f"{name}.yaml"), [])
    recipe, model, data = config.recipe, config.model, config.data
    epochs, width, by_difficulty = IMAGE_RECIPES[name]
    assert (recipe.epochs, model.encoder.dim) == (epochs, width)
    assert recipe.base_lr * recipe.batch_size / 256 == pytest.approx(1.2e-3)
    assert model.decoder == TransformerSize(512, 8, 16)
    assert (model.positions, model.class_token, model.conventions) == ("space_time", True, "mae")
    assert (data.num_frames, data.frame_size, data.flip) == (1, (224, 224), True)
    assert (data.crop, data.crop_area, data.interpolation) == (
        "random_resized",
        (0.2, 1.0),
        "bicubic",
    )
    assert data.validation_short_side == 256
    assert (config.masking.ratio, config.mining.target) == (0.75, "raw")
    strategy, predictor = ("easy_to_hard", "relative") if by_difficulty else ("random", "none")
    assert (config.masking.strategy, config.mining.predictor) == (strategy, predictor)
    assert (recipe.clip_grad, recipe.min_lr, recipe.warmup_epochs) == (5.0, 0.0, 40)
    assert (recipe.betas, recipe.weight_decay) == ((0.9, 0.95), 0.05)
    assert (config.masking.count_rule, config.mining.momentum) == ("hpm", "paper")
    assert (config.mining.first_momentum, config.mining.last_momentum) == (0.999, 0.9999)


def test_every_config_for_images_is_in_the_table():
    assert {path.stem for path in ALL if path.stem.startswith("in1k")} == set(IMAGE_RECIPES)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_fast_configs_leave_out_work_and_all_others_are_exact(path):
    exact = load_config(PretrainConfig, path.with_stem(path.stem.removesuffix("_fast")), [])
    assert (exact.mining.teacher_sees, exact.mining.decoded_share) == ("all", 1.0)
    if path.stem.endswith("_fast"):
        assert result_differences(exact, load_config(PretrainConfig, path, [])) == [
            "mining.teacher_sees: all -> checkerboard"
        ]


FAMILIES = ["demo", "demo_images", "in1k_hpm_b", "k400_hpm_s", "k400_videomae_s"]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_of_each_family_takes_a_real_update_at_depth_1(name):
    config = load_config(PretrainConfig, DEMO.with_name(f"{name}.yaml"), [])
    model = replace(
        config.model,
        encoder=replace(config.model.encoder, depth=1),
        decoder=replace(config.model.decoder, depth=1),
    )
    trial_update(Pretraining(replace(config, model=model)), torch.device("cpu"), "fp32", clips=1)()


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
        ("data.fps=8", "data.fps=8 takes frames by time: make data.frame_stride=1 and .* null"),
        ("data.fps=0", "data.fps must be positive and finite, got 0"),
        ("data.fps=inf", "data.fps must be positive and finite, got inf"),
        ("data.clips_per_minute=inf", "clips_per_minute must be positive and finite, got inf"),
        ("data.clips_per_minute=0", "clips_per_minute must be positive and finite, got 0"),
        ("data.mean=[0.5]", "each of the 3 channels"),
        ("engine.micro_batch=3", "must be one of 1, 2, 4.*, got 3"),
        ("recipe.epochs=many", "many"),
        ("recipe.warmup_epochs=99", "warmup_epochs must lie in"),
        ("recipe.min_lr=1", "min_lr must be at most recipe.base_lr="),
        ("model.encoder.num_heads=5", "got dim 96, depth 3, num_heads 5"),
        ("model.conventions=beit", "beit"),
        ("data.crop=centre", "centre"),
        (
            "data.crop_area=[0,1]",
            r"crop_area must be two rising positive numbers up to 1, got \(0",
        ),
        ("data.crop_area=[0.5,0.2]", r"crop_area must be two rising .* \(0.5, 0.2\)"),
        ("data.interpolation=nearest", "nearest"),
        ("data.validation_short_side=47", r"at least data.frame_size \(48, 48\), got 47"),
        ("mining.target=dino", "needs the weights of vit_base_patch16_224.dino: give mining.feat"),
        ("mining.feature_weights=a.pth", "are for mining.target=dino or clip, got per_channel"),
        ("mining.feature_model=vit", "are for mining.target=dino or clip"),
        ("mining.target=pixels", "pixels"),
        ("mining.teacher_sees=half", "half"),
        ("mining.decoded_share=0", r"mining.decoded_share must lie in \(0, 1\], got 0"),
        ("mix.images.weight=0", "weight must be positive and finite, got 0"),
        ("mix.images.weight=.inf", "weight must be positive and finite, got inf"),
        ("mix.images.data.workers=3", "mix.images.data.workers has no effect"),
        ("mix.images.data.max_bad_share=0.5", "mix.images.data.max_bad_share has no effect"),
        ("mix=[1]", "cannot use"),
        (
            "mix.images.data.validation_short_side=8",
            "mix.images: data.validation_short_side must be",
        ),
        ("mix.images.masking.ratio=2", "mix.images: masking.ratio must lie"),
        ("mix.images.data.frames=2", "full_key: mix.images.data.frames"),
        ("mix.images.data.num_frames=1", "mix.images.data.num_frames, .* got 1 with patch 2"),
        ("mix.images.data.mean=[0,0,0]", r"mix.images.data.mean must be data.mean=.*, got \(0"),
        ("mix.images.data.std=[1,1]", "mix.images.data.std need a value for each of the 3"),
        ("mix.images.masking.ratio=0.999999", "mix.images.masking.ratio: .* hides 6272 of 6272"),
        ("mix.images.knn.k=3", "knn"),
        ("logging.every_updates=0", "every_updates must be at least 1, got 0"),
        ("seed", "section.key=value, got 'seed'"),
    ],
)
def test_a_value_that_cannot_be_run_is_named_with_its_rule(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(PretrainConfig, DEMO, [override])


@pytest.mark.parametrize("override", ["mining.target=ema", "mining.predictor=none"])
def test_a_teacher_that_does_more_or_less_than_scoring_sees_all(override):
    overrides = ["masking.strategy=random", override, "mining.teacher_sees=checkerboard"]
    with pytest.raises(ConfigError, match="a teacher that only scores.* mining.teacher_sees=all"):
        load_config(PretrainConfig, DEMO, overrides)
    load_config(PretrainConfig, DEMO, [*overrides[:2], "mining.decoded_share=0.5"])


def test_a_source_that_picks_needs_a_predictor_too():
    plain = ["mining.predictor=none", "masking.strategy=random"]
    with pytest.raises(ConfigError, match="take mix.images.masking.strategy=random"):
        load_config(PretrainConfig, DEMO, [*plain, "mix.images.masking.strategy=hardest"])
    load_config(PretrainConfig, DEMO, [*plain, "mix.images.masking.strategy=random"])


MIXED = [
    "mix.images.weight=0.5",
    "mix.images.data.num_frames=2",
    "mix.images.data.train=i.csv",
    "mix.images.data.frame_size=[64,64]",
    "mix.images.masking.ratio=0.5",
    "mix.images.data.crop=random_resized",
    "mix.clips.data.train=c.csv",
]


def test_sources_of_a_mixture_in_order_the_main_one_first(tmp_path):
    config = load_config(PretrainConfig, DEMO, MIXED)
    assert [*config.sources] == [*config.maskings] == ["", "images", "clips"]
    assert config.weights == (1, 0.5, 1)
    assert config.sources[""] == config.data
    assert config.sources["images"].frame_size == (64, 64)
    assert (config.maskings["images"].ratio, config.maskings["clips"].ratio) == (0.5, 0.9)
    save_config(config, tmp_path / "used.yaml")
    assert load_config(PretrainConfig, tmp_path / "used.yaml", []) == config
    plain = load_config(PretrainConfig, DEMO, [])
    assert (plain.sources, plain.weights) == ({"": plain.data}, (1,))


def test_a_mixture_is_built_with_a_grid_a_mask_and_a_crop_for_each_source():
    config = load_config(PretrainConfig, DEMO, MIXED)
    with torch.device("meta"):
        student = build_student(config)
    assert student.grid == TokenGrid(3, 6, 6)
    assert student.grids[1:] == (TokenGrid(1, 8, 8), TokenGrid(8, 28, 28))
    masks = build_objective(config, student, torch.device("cpu")).masks
    assert {name: rule.grid for name, rule in masks.items()} == {
        "": student.grid,
        "images": TokenGrid(1, 8, 8),
        "clips": TokenGrid(8, 28, 28),
    }
    assert masks["images"].num_masked == 32
    crops = Pretraining(config).transforms()
    assert (type(crops[""]), type(crops["clips"])) == (MultiScaleCrop, MultiScaleCrop)
    assert isinstance(crops["images"], Augmentation)
    assert crops["images"].area == config.mix["images"].data.crop_area


def test_a_random_resized_crop_changes_nothing_but_the_place():
    overrides = ["data.crop=random_resized", "data.crop_area=[0.3,0.6]", "data.flip=true"]
    config = load_config(PretrainConfig, DEMO, [*overrides, "data.interpolation=bicubic"])
    crop = Pretraining(config).transforms()[""]
    assert (crop.area, crop.ratio, crop.flip) == ((0.3, 0.6), (3 / 4, 4 / 3), True)
    assert (crop.rand_augment, crop.erasing, crop.interpolation) == (None, 0, "bicubic")


def test_what_differs_in_a_source_is_named():
    old = load_config(PretrainConfig, DEMO, MIXED)
    new = load_config(
        PretrainConfig,
        DEMO,
        [*MIXED, "mix.images.weight=0.75", "mix.clips.data.flip=true"],
    )
    assert result_differences(old, new) == [
        "mix.images.weight: 0.5 -> 0.75",
        "mix.clips.data.flip: False -> True",
    ]
    assert result_differences(load_config(PretrainConfig, DEMO, []), old) == [
        "mix: nothing -> images, clips"
    ]


def test_a_source_can_be_left_out():
    path = DEMO.with_name("demo_mixed.yaml")
    assert [*load_config(PretrainConfig, path, []).mix] == ["images"]
    assert [*load_config(PretrainConfig, path, ["mix.images=null"]).mix] == []


@pytest.mark.parametrize("positions", ["sequence", "space_time"])
@pytest.mark.parametrize(
    ("main", "other"), [((2, 64, 64), (6, 48, 48)), ((6, 48, 48), (2, 64, 64))]
)
def test_no_two_tokens_of_a_source_stand_at_one_place(positions, main, other):
    sizes = [
        f"{at}data.{name}"
        for at, (frames, *pixels) in {"": main, "mix.other.": other}.items()
        for name in (f"num_frames={frames}", f"frame_size=[{pixels[0]},{pixels[1]}]")
    ]
    overrides = [f"model.positions={positions}", "mix.other.masking.ratio=0.5", *sizes]
    student = build_student(load_config(PretrainConfig, DEMO, overrides))
    for grid in (student.grid, *student.grids):
        codes = position_table(grid, 96, positions, student.source_grid)
        apart = torch.cdist(codes, codes) + 9 * torch.eye(len(codes))
        assert apart.min() > 0.05
    assert student.source_grid == TokenGrid(3, 8, 8), "the most along each axis"


@pytest.mark.parametrize(
    ("target", "predictor", "needs_one", "pixels"),
    [
        ("raw", "relative", True, "raw"),
        ("joint", "none", False, "joint"),
        ("ema", "none", True, None),
        ("ema", "absolute", True, None),
    ],
)
def test_which_targets_need_a_teacher(target, predictor, needs_one, pixels):
    overrides = [f"mining.target={target}", f"mining.predictor={predictor}"]
    config = load_config(PretrainConfig, DEMO, [*overrides, "masking.strategy=random"])
    assert config.mining.has_teacher == needs_one
    assert config.mining.pixel_kind == pixels
    assert config.mining.feature_kind is None


def test_a_feature_model_is_named_by_its_kind_unless_the_config_names_one():
    weights = ["mining.feature_weights=w.pth"]
    for kind in ("dino", "clip"):
        mining = load_config(PretrainConfig, DEMO, [f"mining.target={kind}", *weights]).mining
        assert (mining.feature_kind, mining.feature_name) == (kind, DEFAULT_MODELS[kind])
        assert (mining.pixel_kind, mining.has_teacher) == (None, True)
    explicit = ["mining.target=dino", "mining.feature_model=vit_small_patch8_224.dino", *weights]
    name = load_config(PretrainConfig, DEMO, explicit).mining.feature_name
    assert name == "vit_small_patch8_224.dino"


def test_the_short_side_of_validation_frames_may_be_that_of_the_crop():
    for side in (48, 60):
        config = load_config(PretrainConfig, DEMO, [f"data.validation_short_side={side}"])
        assert config.data.validation_short_side == side
    wide = ["data.frame_size=[32,48]", "data.validation_short_side=40"]
    with pytest.raises(ConfigError, match=r"\(32, 48\), got 40"):
        load_config(PretrainConfig, DEMO, wide)


def test_keys_of_earlier_runs_are_read():
    old = "data.held_out_short_side=60"
    assert load_config(PretrainConfig, DEMO, [old]).data.validation_short_side == 60
    of_images = "mix.images.data.held_out_short_side=64"
    mixed = load_config(PretrainConfig, DEMO.with_name("demo_mixed.yaml"), [of_images])
    assert mixed.mix["images"].data.validation_short_side == 64


# --- Fine-tuning and probes ---------------------------------------------------------------------


def load_classifier(path, overrides=()):
    """A classifier's config; from scratch where it leaves the pre-trained weights open."""
    open_weights = ["init_weights=null"] if "init_weights: ???" in path.read_text() else []
    return load_config(FinetuneConfig, path, [*open_weights, *overrides])


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", CLASSIFIERS, ids=name_of)
def test_every_config_of_a_classifier_loads_round_trips_and_builds(path, tmp_path):
    config = load_classifier(path)
    save_config(config, tmp_path / "used.yaml")
    assert load_any_config(tmp_path / "used.yaml") == config
    config, classes = shallow(config), config.model.num_classes or 8
    with torch.device("meta"):
        model = build_classifier(config, classes)
        Finetuning(config).optimizer(model)
    assert model.head.out_features == classes
    assert model.frozen == (path.parent.name == "probe")
    task = Finetuning(replace(config, model=replace(config.model, num_classes=classes)))
    task.objective(None, torch.device("cpu"))
    task.transforms()


@pytest.mark.parametrize("path", CLASSIFIERS, ids=name_of)
def test_every_config_of_a_classifier_is_short_and_says_how_to_run_it(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 45
    assert any(line.startswith("# Run: ") for line in lines)


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_recipes_of_fine_tuning_are_videomaes(name):
    config = load_classifier(FINETUNE_DEMO.with_name(f"{name}.yaml"))
    recipe, model, how = config.recipe, config.model, config.augmentation
    peak = pytest.approx(recipe.base_lr * recipe.batch_size / 256)
    found = (model.num_classes, recipe.epochs, recipe.batch_size, config.data.repeats)
    assert (*found, peak, recipe.layer_decay) == FINETUNE_RECIPES[name]
    assert (recipe.optimizer, recipe.betas, recipe.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert recipe.warmup_epochs == 5
    strong = name in ("k400_h", "ucf101_b", "hmdb51_b")
    regularised = (model.drop_path, model.head_dropout, recipe.min_lr)
    assert regularised == ((0.2, 0.5, 1e-5) if strong else (0.1, 0.0, 1e-6))
    assert (model.pooling, model.init) == ("mean_norm", "truncated_normal")
    of_directions = name.startswith("ssv2")
    assert config.data.sampling == ("segments" if of_directions else "dense")
    assert config.data.flip != of_directions
    assert (config.data.num_frames, config.data.frame_size) == (16, (224, 224))
    assert (config.test.clips, config.test.crops) == ((2, 3) if of_directions else (5, 3))
    assert (how.mixup, how.cutmix, how.mix_probability, how.erasing) == (0.8, 1.0, 1.0, 0.25)
    assert (how.rand_augment, how.label_smoothing) == ("rand-m7-n4-mstd0.5-inc1", 0.1)


def test_every_config_of_fine_tuning_is_in_the_table():
    names = {path.stem for path in CLASSIFIERS if path.parent.name == "finetune"}
    of_our_own = {"demo", "demo_images", "cifar10"}
    assert names == {*FINETUNE_RECIPES, *IMAGE_FINETUNE_RECIPES, *of_our_own}


@pytest.mark.parametrize("name", IMAGE_FINETUNE_RECIPES)
def test_fine_tuning_on_images_sees_them_as_the_official_one_does(name):
    config = load_classifier(FINETUNE_DEMO.with_name(f"{name}.yaml"))
    recipe, model, data = config.recipe, config.model, config.data
    peak = pytest.approx(recipe.base_lr * recipe.batch_size / 256)
    assert (recipe.epochs, recipe.batch_size, peak) == IMAGE_FINETUNE_RECIPES[name]
    assert (model.num_classes, model.pooling, model.class_token) == (1000, "mean_norm", True)
    assert (model.positions, model.conventions) == ("space_time", "mae")
    assert (recipe.layer_decay, recipe.weight_decay) == (0.8, 0.05)
    assert (data.num_frames, data.frame_size, data.validation_short_side) == (1, (224, 224), 256)
    assert (data.interpolation, data.flip) == ("bicubic", True)
    how = config.augmentation
    assert how.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (how.mixup, how.cutmix, how.erasing, how.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert (model.drop_path, recipe.warmup_epochs, recipe.betas) == (0.1, 5, (0.9, 0.999))
    assert recipe.min_lr * recipe.batch_size / 256 == pytest.approx(1e-6, rel=1e-3)
    assert (config.test.clips, config.test.crops) == (1, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # the clips of a video
        (
            ["data.sampling=segments", "data.max_frame_stride=9"],
            "takes no data.max_frame_stride=9; leave",
        ),
        (["data.sampling=sparse"], "sparse"),
        (
            ["data.sampling=segments", "data.frame_stride=null", "data.fps=5"],
            "segments takes no data.fps=5.0; leave",
        ),
        (["data.repeats=0"], "repeats must be at least 1, got 0"),
        (["data.frame_size=[50,48]"], "height .* got 50 .* 48 and 56"),
        # the model
        (["model.num_classes=1"], "num_classes must be at least 2, got 1"),
        (["model.pretrained_grid=[0,6,6]"], r"pretrained_grid must be at least 1, got \(0, 6, 6"),
        (["model.pretrained_grid=[4,6]"], "pretrained_grid"),
        (["model.frozen=true"], "pooling=mean_norm leaves out; take model.pooling=batch_norm"),
        (["model.pooling=max"], "max"),
        (["model.init=zero"], "zero"),
        (["model.pooling=class_token"], "pooling=class_token needs model.class_token=true"),
        (["data.validation_short_side=47"], r"at least data.frame_size .*got 47"),
        (["data.crop=random_resized"], "crop"),
        (["model.head_dropout=1"], r"model.head_dropout must lie in \[0, 1\), got 1"),
        (["model.drop_path=-0.1"], r"model.drop_path must lie in \[0, 1\), got -0.1"),
        (["model.encoder={dim: 30, depth: 1, num_heads: 3}"], "widths divisible by 4, got 30"),
        (["model.channels=4"], "a value for each of the 4 channels"),
        (
            [
                "model.channels=1",
                "data.mean=[0.5]",
                "data.std=[0.5]",
                "augmentation.rand_augment=rand-m7-n4",
            ],
            "rand_augment needs model.channels=3, got 1; take augmentation.rand_augment=null",
        ),
        (
            ["model.pooling=batch_norm", "engine.micro_batch=1"],
            "must be one of 2, .* even .*batch norm.*, got 1",
        ),
        # the recipe
        (["recipe.layer_decay=0"], r"layer_decay must lie in \(0, 1\], got 0"),
        (["recipe.layer_decay=1.1"], r"layer_decay must lie in \(0, 1\], got 1.1"),
        (["recipe.average_momentum=1"], r"average_momentum must lie in \[0, 1\), got 1"),
        (["recipe.optimizer=lion"], "lion"),
        (
            ["recipe.average_momentum=0.9", "model.pooling=batch_norm"],
            "not average the statistics of model.pooling=batch_norm; leave one of them out",
        ),
        (["engine.micro_batch=3"], "must be one of 1, 2, 4.*, got 3"),
        (["init_from=pupil"], "pupil"),
        # the augmentation
        (["augmentation.area=[0,1]"], r"area must be two rising positive .* got \(0"),
        (["augmentation.area=[0.9,0.5]"], r"area must be two rising .* \(0.9, 0.5\)"),
        (["augmentation.area=[0.5,1.5]"], r"up to 1, got \(0.5, 1.5\)"),
        (["augmentation.ratio=[2,1]"], r"ratio must be two rising .* \(2"),
        (["augmentation.erasing=1.5"], r"erasing must lie in \[0, 1\], got 1.5"),
        (["augmentation.mix_probability=-1"], r"mix_probability must lie in \[0, 1\], got -1"),
        (["augmentation.cutmix_probability=2"], r"cutmix_probability must lie in .* got 2"),
        (["augmentation.mixup=-1"], "augmentation.mixup must be at least 0, got -1.0"),
        (["augmentation.label_smoothing=1"], r"label_smoothing must lie in \[0, 1\), got 1"),
        (["augmentation.rand_augment=strong"], "rand_augment must be timm's string.*got strong"),
        (
            ["augmentation.mixup=0.8", "engine.micro_batch=1"],
            r"must be one of 2, .* even micro-batch \(for mixup, CutMix .*got 1",
        ),
        (
            ["augmentation.cutmix=1", "recipe.batch_size=9", "data.repeats=2"],
            "multiple of 2 .*, got 9; take recipe.batch_size=10",
        ),
        # the test
        (["test.clips=0"], "clips must be at least 1, got 0"),
        (["test.crops=0"], "crops must be at least 1, got 0"),
        (["test.clips_per_pass=0"], "clips_per_pass must be at least 1, got 0"),
        (["test.checkpoint=worst"], "worst"),
        (
            ["test.weights=average", "recipe.average_momentum=null"],
            "test.weights=average needs recipe.average_momentum",
        ),
        (
            ["test.checkpoint=best", "data.validation=null"],
            "test.checkpoint=best needs data.validation",
        ),
    ],
)
def test_a_value_that_no_classifier_can_be_run_with_is_named_with_its_rule(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_classifier(FINETUNE_DEMO, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["augmentation.mixup=0.8", "engine.micro_batch=2", "data.repeats=3"],
        ["augmentation.mixup=0.8", "augmentation.mix_probability=0", "engine.micro_batch=1"],
        [
            "model.pooling=batch_norm",
            "engine.micro_batch=1",
            "data.repeats=2",
            "recipe.average_momentum=null",
            "test.weights=model",
        ],
        ["model.pooling=attentive", "model.frozen=true", "recipe.average_momentum=0.9"],
        ["test.weights=average", "recipe.average_momentum=0.9"],
        ["data.sampling=segments", "data.frame_stride=6"],
        ["data.frame_stride=null", "data.fps=7.5"],
        ["recipe.layer_decay=1", "recipe.optimizer=sgd"],
        ["model.pretrained_grid=[1,1,1]"],
        ["model.pooling=class_token", "model.class_token=true", "model.frozen=true"],
        ["data.validation_short_side=64", "data.interpolation=bicubic"],
    ],
)
def test_what_a_rule_lets_through(overrides):
    load_classifier(FINETUNE_DEMO, overrides)


def test_the_stride_is_4_unless_clips_have_a_rate(tmp_path):
    strides = [DataConfig().frame_stride, DataConfig(frame_stride=2).frame_stride]
    assert [*strides, DataConfig(fps=8).frame_stride] == [4, 2, None]
    for overrides in (["data.frame_stride=null"], ["data.frame_stride=null", "data.fps=8"]):
        config = load_classifier(FINETUNE_DEMO, overrides)
        save_config(config, tmp_path / "config.yaml")
        assert load_classifier(tmp_path / "config.yaml") == config
    assert config.data.pace == "8 frames/s"
    (tmp_path / "timed.yaml").write_text(
        "data: {fps: 8}\nmasking: {ratio: 0.75}\nmix: {more: {data: {fps: 5, num_frames: 8}}}"
    )
    timed = load_config(PretrainConfig, tmp_path / "timed.yaml", [])
    assert [data.pace for data in timed.sources.values()] == ["8 frames/s", "5 frames/s"]
    with pytest.raises(ConfigError, match=r"mix\.more: data\.fps=5 takes .*frame_stride=4 and"):
        load_config(PretrainConfig, tmp_path / "timed.yaml", ["mix.more.data.frame_stride=4"])
    assert ClipChoice(frame_stride=3).of(config.data).pace == "stride 3"
    assert ClipChoice().of(config.data).pace == "8 frames/s"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["knn.train=a.csv"], "give both knn.train=a.csv and knn.validation=None, or neither"),
        (["knn.validation=a.csv"], "give both knn.train=None and knn.validation=a.csv, or neither"),
        (["knn.k=0"], "k must be at least 1, got 0"),
        (["knn.videos=0"], "videos must be at least 1, got 0"),
        (["knn.every_epochs=0"], "must be positive, got 0"),
        (["knn.temperature=0"], "must be positive, got 0"),
    ],
)
def test_nearest_neighbours_that_cannot_be_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(PretrainConfig, DEMO, overrides)


def test_neighbours_change_no_result_of_pretraining():
    old = load_config(PretrainConfig, DEMO, [])
    new = load_config(PretrainConfig, DEMO, ["knn.train=a", "knn.validation=b", "knn.k=3"])
    assert result_differences(old, new) == []


def test_how_a_classifier_is_tested_changes_no_result_of_training():
    old = load_classifier(FINETUNE_DEMO)
    new = load_classifier(
        FINETUNE_DEMO, ["test.clips=9", "test.manifest=x", "augmentation.erasing=0.5"]
    )
    assert result_differences(old, new) == ["augmentation.erasing: 0.0 -> 0.5"]


def test_a_value_that_is_left_to_the_user_must_be_given():
    path = FINETUNE_DEMO.with_name("k400_b.yaml")
    with pytest.raises(ConfigError, match="has no init_weights; give init_weights=VALUE"):
        load_config(FinetuneConfig, path, [])
    assert load_config(FinetuneConfig, path, ["init_weights=X"]).init_weights == "X"
    assert load_config(FinetuneConfig, path, ["init_weights=null"]).init_weights is None


def test_the_kind_of_a_config_is_told_from_the_file(tmp_path):
    for schema, shipped in ((PretrainConfig, DEMO), (FinetuneConfig, FINETUNE_DEMO)):
        config = load_config(schema, shipped, [])
        assert load_any_config(shipped) == config
        save_config(config, tmp_path / "config.yaml")
        assert load_any_config(tmp_path / "config.yaml") == config
        changed = load_any_config(tmp_path / "config.yaml", ["seed=5"])
        assert changed == replace(config, seed=5)
    with pytest.raises(ConfigError, match=r"there is no folder .*none; give .*checkpoints/last"):
        load_any_config(tmp_path / "none" / "config.yaml")
    (tmp_path / "config.yaml").write_text("colour: blue\n")
    with pytest.raises(ConfigError, match="colour"):
        load_any_config(tmp_path / "config.yaml")


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
    strategy = load_config(PretrainConfig, DEMO, overrides).masking.mask_strategy
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


@pytest.mark.parametrize(
    ("text", "overrides", "named"),
    [
        ("output_dir: ${oc.env:HPM_SECRET}", [], "output_dir=${oc.env:HPM_SECRET}"),
        ("data: ${oc.env:HPM_SECRET}", ["data.train=a"], "data=${oc.env:HPM_SECRET}"),
        ("mix: ${oc.env:HPM_SECRET}", [], "mix=${oc.env:HPM_SECRET}"),
        ("mix: {a: '${oc.env:HPM_SECRET}'}", ["mix.a=null"], "mix.a=${oc.env"),
        ('seed: "\\x24{oc.env:HPM_SECRET}"', [], "seed=${oc.env"),
        ("data: {mean: [0, '${oc.decode:${oc.env:HPM_SECRET}}']}", [], "data.mean[1]=${oc.decode"),
        ("seed: ${recipe.epochs}", [], "seed=${recipe.epochs}"),
        ("data: {train: 'a/\\${seed}'}", [], "data.train=a/\\${seed}"),
        ("seed: 0", ["output_dir=a/${oc.env:HPM_SECRET}"], "output_dir=a/${oc.env:HPM_SECRET}"),
        ("seed: 0", ["data=${oc.env:HPM_SECRET}", "data.train=a"], "data=${oc.env"),
        ("seed: 0", ["data={train: '${oc.env:HPM_SECRET}'}"], "data.train=${oc.env"),
    ],
)
@pytest.mark.parametrize("load", [partial(load_config, PretrainConfig), load_any_config])
def test_nothing_is_filled_in_from_the_environment_or_other_keys(
    load, text, overrides, named, tmp_path, monkeypatch
):
    monkeypatch.setenv("HPM_SECRET", "hunter2")
    path = tmp_path / "config.yaml"
    path.write_text(f"{text}\n")
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    assert f"has {named}" in str(error.value)
    assert "write the value itself" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("load", [partial(load_config, PretrainConfig), load_any_config])
def test_a_config_that_is_not_utf_8_is_named(load, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("output_dir: Größe\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config.yaml is not text in UTF-8: byte 14 is 0xf6"):
        load(path, [])


def test_a_config_is_found_by_its_name():
    assert load_config(PretrainConfig, Path("k400_hpm_b"), []).output_dir == "runs/k400_hpm_b"
    with pytest.raises(ConfigError, match="k400_hpm_b.yaml is a config of pre-training"):
        load_config(FinetuneConfig, Path("k400_hpm_b"), [])


def test_a_config_of_the_other_kind_is_refused():
    with pytest.raises(ConfigError, match="is a config of pre-training; take one of fine-tuning"):
        load_config(FinetuneConfig, ROOT / "configs/pretrain/demo.yaml", [])
    with pytest.raises(ConfigError, match="is a config of fine-tuning; take one of pre-training"):
        load_config(PretrainConfig, ROOT / "configs/finetune/k400_b.yaml", [])


def test_sources_that_are_null_name_the_remedy():
    with pytest.raises(ConfigError, match="mix must name sources, got null; mix.NAME=null"):
        load_config(PretrainConfig, ROOT / "configs/pretrain/demo_mixed.yaml", ["mix=null"])
