"""The parts of a fine-tuning run: classes, the weights of its source, and its config."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config, save_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.manifest import Manifest, ManifestError
from hpm_video.files.weights import CheckpointError
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.recognition.labels import class_names
from hpm_video.runs.finetuning import (
    Finetuning,
    load_pretrained,
    resolve,
)
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.checkpoint import save_checkpoint
from hpm_video.training.optim import OptimizerState

MODEL = "encoder: {dim: 16, depth: 2, num_heads: 2}, patch_size: [2, 8, 8]"
DATA = "data: {train: LIST, num_frames: 4, frame_size: [32, 24]}"
RECIPE = "epochs: 1, batch_size: 2, warmup_epochs: 0"
PRETRAIN = f"""
model: {{{MODEL}, decoder: {{dim: 8, depth: 1, num_heads: 2}}}}
{DATA}
recipe: {{{RECIPE}}}
masking: {{ratio: 0.5}}
"""
FINETUNE = f"""
model: {{{MODEL}}}
{DATA}
recipe: {{{RECIPE}}}
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")

    def read(schema, *overrides):
        path = folder / f"{schema.__name__}.yaml"
        path.write_text(PRETRAIN if schema is PretrainConfig else FINETUNE)
        return load_config(schema, path, list(overrides))

    return read


def randomise(module, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.5, generator=draw)
    return module


def save(folder, config, **modules):
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    place = folder / "update-00000001"
    weights = {name: module.state_dict() for name, module in modules.items()}
    save_checkpoint(
        place,
        weights,
        optimizer=OptimizerState(0, {}),
        state={"update": 1},
        attached=[folder / "config.yaml"],
    )
    return place


@pytest.fixture(scope="module")
def pretrained(load, tmp_path_factory):
    """The checkpoint of a pre-training run, in which student and teacher differ."""
    config = load(PretrainConfig)
    student, teacher = (randomise(build_student(config), seed) for seed in (1, 2))
    return save(tmp_path_factory.mktemp("pretrained"), config, model=student, teacher=teacher)


@pytest.fixture(scope="module")
def classified(load, tmp_path_factory):
    """A checkpoint of a classifier with 5 classes."""
    config = load(FinetuneConfig, "model.pretrained_grid=[8,14,14]")
    model = randomise(build_classifier(config, 5), 3)
    return save(tmp_path_factory.mktemp("classified"), config, model=model)


CPU = torch.device("cpu")
NAMES = ("a", "b", "c", "d", "e")
FRESH = ("head.", "fc_norm.", "head_norm.", "attn_pool.")


# --- Weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init_from", "file"), [("student", "model"), ("teacher", "teacher")])
@pytest.mark.parametrize("pooling", ["mean_norm", "batch_norm", "attentive"])
def test_the_encoder_of_an_autoencoder_arrives_exactly(
    load, pretrained, init_from, file, pooling, caplog
):
    config = load(FinetuneConfig, f"init_from={init_from}", f"model.pooling={pooling}")
    model = build_classifier(config, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_pretrained(model, pretrained, config, NAMES)
    stored = load_file(pretrained / f"{file}.safetensors")
    fresh = set()
    for name, value in model.state_dict().items():
        if name.startswith(FRESH):
            assert torch.equal(value, before[name])
            fresh.add(name)
        else:
            assert torch.equal(value, stored[name])
    assert ("norm.weight" in model.state_dict()) == (pooling != "mean_norm")
    start, told_fresh, left_out = caplog.messages
    whose = "" if init_from == "student" else "the teacher's "
    assert start == f"start from {whose}weights of {pretrained}"
    assert set(told_fresh.removeprefix("  start fresh: ").split(", ")) == fresh
    left = set(left_out.removeprefix("  left out: ").split(", "))
    norm = {"norm.weight", "norm.bias"} if pooling == "mean_norm" else set()
    decoders = {"mask_token", "decoder_embed", "reconstructor", "difficulty_decoder"}
    assert left == norm | decoders


@pytest.mark.parametrize("pooling", ["mean_norm", "batch_norm", "attentive", "class_token"])
def test_an_encoder_with_a_class_token_arrives_with_it(load, tmp_path, pooling, caplog):
    like_mae = ("model.class_token=true", "model.conventions=mae")
    source = load(PretrainConfig, *like_mae)
    student = randomise(build_student(source), 4)
    place = save(tmp_path / "pretrained", source, model=student)
    overrides = (f"init_weights={place}", f"model.pooling={pooling}", *like_mae)
    config = resolve(load(FinetuneConfig, *overrides), 3)
    model = build_classifier(config, 3)
    with caplog.at_level(logging.INFO):
        load_pretrained(model, place, config, NAMES)
    stored, own = load_file(place / "model.safetensors"), model.state_dict()
    arrived = {name for name in own if not name.startswith(FRESH)}
    assert {"cls_token", "blocks.1.attn.qkv.bias"} <= arrived
    assert all(torch.equal(own[name], stored[name]) for name in arrived)
    assert "cls_token" not in caplog.messages[1] + caplog.messages[2]


def test_weights_may_be_a_file_of_their_own(load, pretrained, tmp_path):
    config = load(FinetuneConfig)
    model, of_folder = build_classifier(config, 3), build_classifier(config, 3)
    load_pretrained(of_folder, pretrained, config, NAMES)
    shutil.copy(pretrained / "model.safetensors", tmp_path / "exported.safetensors")
    load_pretrained(model, tmp_path / "exported.safetensors", config, NAMES)
    for name, value in of_folder.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_clips_of_another_size_take_the_same_weights(load, pretrained):
    config = load(FinetuneConfig, "data.num_frames=8", "data.frame_size=[48,48]")
    model = build_classifier(config, 3)
    load_pretrained(model, pretrained, config, NAMES)
    stored = load_file(pretrained / "model.safetensors")
    assert torch.equal(model.patch_embed.proj.weight, stored["patch_embed.proj.weight"])


def test_a_classifier_is_taken_with_its_head(load, classified, caplog):
    config = load(FinetuneConfig)
    model = build_classifier(config, 5)
    with caplog.at_level(logging.INFO):
        load_pretrained(model, classified, config, NAMES)
    stored = load_file(classified / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert caplog.messages[1:] == ["  start fresh: none", "  left out: none"]


def test_a_head_for_another_number_of_classes_starts_fresh(load, classified, caplog):
    config = load(FinetuneConfig)
    model = build_classifier(config, 4)
    before = model.head.weight.clone()
    with caplog.at_level(logging.INFO):
        load_pretrained(model, classified, config, NAMES)
    assert torch.equal(model.head.weight, before)
    stored = load_file(classified / "model.safetensors")
    assert torch.equal(model.fc_norm.weight, stored["fc_norm.weight"])
    assert caplog.messages[1] == "  start fresh: head.weight, head.bias"


def test_a_classifier_without_a_final_norm_is_no_frozen_encoder(load, classified):
    config = load(FinetuneConfig, "model.pooling=attentive", "model.frozen=true")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(build_classifier(config, 5), classified, config, NAMES)
    named = {line.strip() for line in str(caught.value).splitlines()[1:]}
    assert named == {"missing norm.weight", "missing norm.bias"}


@pytest.mark.parametrize("kind", ["an image model", "another model of videos"])
def test_weights_with_timms_names_that_are_no_checkpoint_are_to_be_imported(
    load, pretrained, tmp_path, kind
):
    """Most of their names are the same as ours."""
    weights = load_file(pretrained / "model.safetensors")
    if kind == "an image model":
        weights["patch_embed.proj.weight"] = torch.zeros(16, 3, 8, 8)
    else:
        weights = {f"encoder.{name}": value for name, value in weights.items()}
    save_file(weights, tmp_path / "other.safetensors")
    config = load(FinetuneConfig)
    with pytest.raises(CheckpointError, match=r"weights.py import FILE FOLDER"):
        load_pretrained(build_classifier(config, 3), tmp_path / "other.safetensors", config, NAMES)


def test_every_key_that_does_not_fit_is_named(load, pretrained, tmp_path):
    weights = load_file(pretrained / "model.safetensors")
    weights = {name.replace("blocks.1.", "blocks.7."): value for name, value in weights.items()}
    weights["patch_embed.proj.bias"] = torch.zeros(9)
    weights["cls_token"] = torch.zeros(1, 1, 16)
    del weights["blocks.0.attn.qkv.bias"]
    save_file(weights, tmp_path / "odd.safetensors")
    config = load(FinetuneConfig)
    model = build_classifier(config, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model, tmp_path / "odd.safetensors", config, NAMES)
    named = {line.strip() for line in str(caught.value).splitlines()[1:]}
    second = [name for name in before if name.startswith("blocks.1.")]
    assert named == {
        "patch_embed.proj.bias has shape (9,), the model's (16,)",
        "left over cls_token",
        "missing blocks.0.attn.qkv.bias",
        *(f"missing {name}" for name in second),
        *(f"left over {name.replace('blocks.1.', 'blocks.7.')}" for name in second),
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "weights that do not fit change nothing"


def test_a_teacher_that_is_not_there(load, classified):
    config = load(FinetuneConfig, "init_from=teacher")
    with pytest.raises(CheckpointError, match="teacher.safetensors does not exist"):
        load_pretrained(build_classifier(config, 5), classified, config, NAMES)


# --- What a config leaves open ------------------------------------------------------------------


def test_the_grid_of_pretraining_is_taken_from_beside_the_weights(load, pretrained, classified):
    def grid(*overrides):
        return resolve(load(FinetuneConfig, *overrides), 7).model.pretrained_grid

    assert grid(f"init_weights={pretrained}") == (2, 4, 3)
    assert grid(f"init_weights={pretrained}", "data.num_frames=8") == (2, 4, 3)
    assert grid(f"init_weights={classified}") == (8, 14, 14), "the grid of its own config"
    assert grid(f"init_weights={pretrained}", "model.pretrained_grid=[1,2,2]") == (1, 2, 2)
    assert grid(f"init_weights={pretrained / 'model.safetensors'}") == (2, 4, 3)
    assert grid("data.num_frames=8") is None


def test_the_number_of_classes_is_filled_in_and_nothing_else(load):
    config = load(FinetuneConfig, "data.num_frames=8")
    resolved = resolve(config, 7)
    assert resolved == replace(config, model=replace(config.model, num_classes=7))
    assert resolve(resolved, 7) == resolved


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.patch_size=[2,4,4]", r"model.patch_size: \(2, 8, 8\) -> \(2, 4, 4\)"),
        ("model.positions=space_time", "model.positions: sequence -> space_time"),
        ("model.class_token=true", "model.class_token: False -> True"),
        ("model.conventions=mae", "model.conventions: videomae -> mae"),
        ("model.encoder.depth=3", "model.encoder.depth: 2 -> 3"),
    ],
)
def test_an_encoder_of_another_shape_is_refused_with_what_differs(
    load, pretrained, override, words
):
    config = load(FinetuneConfig, f"init_weights={pretrained}", override)
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(config, 7)
    message = str(caught.value)
    assert f"init_weights={pretrained} differs" in message
    assert message.endswith("Take its values, or other weights.")
    assert message.count(" -> ") == 2  # in the heading and for one field


def test_pixels_standardised_otherwise_are_pointed_out(load, pretrained, caplog):
    resolve(load(FinetuneConfig, f"init_weights={pretrained}"), 7)
    assert not caplog.messages
    resolve(load(FinetuneConfig, f"init_weights={pretrained}", "data.mean=[0.5,0.5,0.5]"), 7)
    assert "was trained with data.mean=(0.485, 0.456, 0.406)" in caplog.messages[0]
    assert "(0.5, 0.5, 0.5)" in caplog.messages[0]


# --- Classes ------------------------------------------------------------------------------------


def manifest_of(*labels, names=None):
    files = tuple(f"/v/{i}.mp4" for i in range(len(labels)))
    return Manifest(files, labels, (-1,) * len(labels), names)


def names_of(config, train, validation=None):
    count, file = config.model.num_classes, config.data.label_names
    return class_names(train, validation, count=count, file=file)


def test_names_come_from_the_manifest_or_are_numbers(load):
    config = load(FinetuneConfig)
    assert names_of(config, manifest_of(0, 2, 1)) == ("0", "1", "2")
    assert names_of(config, manifest_of(0, 1, names=("a", "b"))) == ("a", "b")
    five = load(FinetuneConfig, "model.num_classes=5")
    assert names_of(five, manifest_of(0, 1, names=("a", "b"))) == ("a", "b", "2", "3", "4")
    assert names_of(five, manifest_of(0, 1)) == ("0", "1", "2", "3", "4")


def test_names_of_a_file_are_compared_with_the_manifest(load, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("run, fast\njump\nstand\n")
    config = load(FinetuneConfig, f"data.label_names={path}")
    with pytest.raises(ManifestError, match="class 0 is 'run, fast' .* 'a' in"):
        names_of(config, manifest_of(0, 1, names=("a", "b")))
    train = manifest_of(0, 1, names=("run, fast", "jump"))
    assert names_of(config, train) == ("run, fast", "jump", "stand")
    assert names_of(config, train, manifest_of(2)) == ("run, fast", "jump", "stand")
    for count in (2, 4):
        wrong = load(FinetuneConfig, f"data.label_names={path}", f"model.num_classes={count}")
        with pytest.raises(ManifestError, match=f"is {count}, but .* for 3 .*num_classes=3"):
            names_of(wrong, train)


def test_more_names_than_classes_are_refused(load):
    config = load(FinetuneConfig, "model.num_classes=2")
    with pytest.raises(ManifestError, match="is 2, but there are names for 3 classes"):
        names_of(config, manifest_of(0, 1, 2, names=("a", "b", "c")))


@pytest.mark.parametrize("labels", [(-1, -1), (0, 0)])
def test_a_classifier_needs_two_classes(load, labels):
    with pytest.raises(ManifestError, match="two classes at least, .* column label"):
        names_of(load(FinetuneConfig), manifest_of(*labels))


def test_labels_that_are_missing_or_beyond_the_classes_are_refused(load):
    config, train = load(FinetuneConfig), manifest_of(0, 1, 1)
    with pytest.raises(ManifestError, match=r"training videos need labels .*/v/1.mp4 has no label"):
        names_of(config, manifest_of(0, -1, 2))
    with pytest.raises(ManifestError, match=r"training videos .*/v/2.mp4 has label 2"):
        names_of(load(FinetuneConfig, "model.num_classes=2"), manifest_of(0, 1, 2))
    with pytest.raises(ManifestError, match=r"validation videos .*/v/1.mp4 has no label"):
        names_of(config, train, manifest_of(0, -1))
    with pytest.raises(ManifestError, match=r"validation videos .* 0 to 1, .*/v/0.mp4 has label 4"):
        names_of(config, train, manifest_of(4))


def test_manifests_that_number_the_classes_differently_are_refused(load):
    config, train = load(FinetuneConfig), manifest_of(0, 1, names=("a", "b"))
    with pytest.raises(ManifestError, match="class 0 is 'a' for training and 'b'"):
        names_of(config, train, manifest_of(0, 1, names=("b", "a")))
    assert names_of(config, train, manifest_of(0, 1, names=("a", "b"))) == ("a", "b")
    assert names_of(config, train, manifest_of(0, 1)) == ("a", "b")
    assert names_of(config, train, manifest_of(1, names=("0", "b"))) == ("a", "b")


# --- Parts --------------------------------------------------------------------------------------


def test_mixing_is_on_where_the_config_mixes(load):
    config = resolve(load(FinetuneConfig), 4)
    assert Finetuning(config).objective(None, CPU)._mixing is not None
    for override in (
        ["augmentation.mixup=0", "augmentation.cutmix=0"],
        ["augmentation.mix_probability=0"],
    ):
        config = resolve(load(FinetuneConfig, *override), 4)
        assert Finetuning(config).objective(None, CPU)._mixing is None


def test_the_augmentation_is_the_configs(load):
    config = load(
        FinetuneConfig,
        "data.flip=true",
        "augmentation.area=[0.3,0.6]",
        "augmentation.ratio=[1,1]",
        "augmentation.erasing=0.5",
        "augmentation.rand_augment=null",
    )
    how = Finetuning(config).transforms()[""]
    assert (how.area, how.ratio, how.flip) == ((0.3, 0.6), (1.0, 1.0), True)
    assert (how.erasing, how.rand_augment) == (0.5, None)
    assert (how.mean, how.std) == (config.data.mean, config.data.std)


def test_the_optimizer_is_the_configs(load):
    config = load(FinetuneConfig, "recipe.layer_decay=0.5", "recipe.weight_decay=0.1")
    model = build_classifier(config, 3)
    adamw = Finetuning(config).optimizer(model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert {group["lr_scale"] for group in adamw.param_groups} == {1, 0.5, 0.25, 0.125}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0, 0.1}
    assert adamw.defaults["betas"] == (0.9, 0.999)
    config = load(FinetuneConfig, "recipe.optimizer=sgd", "recipe.betas=[0.7,0.9]")
    sgd = Finetuning(config).optimizer(model)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.7
    assert {group["lr_scale"] for group in sgd.param_groups} == {1}


def decays(groups, model):
    """The weight decay of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize(("conventions", "of_tokens"), [("mae", 0.05), ("videomae", 0)])
def test_tokens_decay_in_pretraining_by_the_conventions_of_mae_alone(load, conventions, of_tokens):
    overrides = ("model.class_token=true", f"model.conventions={conventions}")
    config = load(PretrainConfig, *overrides)
    student = build_student(config)
    found = decays(Pretraining(config).optimizer(student).param_groups, student)
    assert found.keys() == dict(student.named_parameters()).keys()
    assert found["cls_token"] == found["mask_token"] == of_tokens
    assert found["patch_embed.proj.weight"] == 0.05
    others = [p for p in found if p.endswith(("bias", "norm.weight", "norm1.weight"))]
    assert {found[name] for name in others} == {0}

    config = load(FinetuneConfig, *overrides, "model.pooling=class_token")
    model = build_classifier(config, 3)
    optimizer = Finetuning(config).optimizer(model)
    assert decays(optimizer.param_groups, model)["cls_token"] == 0


def test_the_class_token_learns_as_the_patch_embedding_does(load):
    overrides = ("model.class_token=true", "recipe.layer_decay=0.5")
    config = load(FinetuneConfig, *overrides)
    model = build_classifier(config, 3)
    groups = Finetuning(config).optimizer(model).param_groups
    share = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert share[id(model.cls_token)] == share[id(model.patch_embed.proj.weight)] == 0.5**3
