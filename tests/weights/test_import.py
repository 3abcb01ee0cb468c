"""Every family is recognised, fits our models to the last tensor, and computes the same results."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpm_video.config.choices import TransformerSize
from hpm_video.files.weights import CheckpointError
from hpm_video.models.positions import position_table
from hpm_video.recognition.trained_model import TrainedAutoencoder, TrainedClassifier
from hpm_video.tokens.grid import TokenGrid
from hpm_video.weights.express import official as by_official_names
from hpm_video.weights.express import tables_of
from hpm_video.weights.families import by_our_names, prefixes_of, recognise
from hpm_video.weights.files import Source
from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import describe, import_weights
from hpm_video.weights.verify import compare

pytestmark = pytest.mark.slow

ENCODER, DECODER = (48, 2), (24, 2)
CLIP_PATCH, PATCH, TOKENS = (2, 8, 8), 8, 16
GIVEN = Overrides(heads=4, decoder_heads=2, num_frames=4, frame_size=(32, 32))
B, B_CLIP_DECODER, B_IMAGE_DECODER = (768, 12), (384, 4), (512, 8)


@pytest.fixture
def official(layouts_of):
    """Small checkpoints in the official layouts, by family."""
    of, fill = layouts_of, layouts_of.fill
    with_qkv_bias = of.videomae_classifier(ENCODER, CLIP_PATCH, 5, of.of_mae)
    fine_tuned = of.vit(ENCODER, PATCH, TOKENS)
    for part in ("weight", "bias"):
        fine_tuned[f"fc_norm.{part}"] = fine_tuned.pop(f"norm.{part}")
    encoder = {
        name.removeprefix("encoder."): shape
        for name, shape in of.videomae(ENCODER, DECODER, CLIP_PATCH).items()
        if name.startswith("encoder.")
    }
    return {
        "hpm": fill(of.hpm(ENCODER, DECODER, PATCH, TOKENS)),
        "mae": fill(of.mae(ENCODER, DECODER, PATCH, TOKENS)),
        "vit": fill(of.vit(ENCODER, PATCH, TOKENS)),
        "vit_classifier": fill({**fine_tuned, **of.affine("head", 5, 48)}),
        "vit_classifier on the class token": fill(
            {**of.vit(ENCODER, PATCH, TOKENS), **of.affine("head", 5, 48)}
        ),
        "videomae": fill(of.videomae(ENCODER, DECODER, CLIP_PATCH)),
        "videomae_classifier": fill(of.videomae_classifier(ENCODER, CLIP_PATCH, 5)),
        "videomae_classifier with qkv bias": fill(with_qkv_bias),
        "videomae_encoder": fill(encoder),
        "mae_st": fill(of.mae_st(ENCODER, DECODER, CLIP_PATCH, (2, TOKENS))),
    }


OFFICIAL = (
    "hpm",
    "mae",
    "vit",
    "vit_classifier",
    "vit_classifier on the class token",
    "videomae",
    "videomae_classifier",
    "videomae_classifier with qkv bias",
    "videomae_encoder",
    "mae_st",
)
WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "model": "a name", "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}, "epoch": 3},
    "module": lambda state: {"module": state, "global_steps": 7, "epoch": 3},
    "model_state": lambda state: {"model_state": state, "cfg": "text", "epoch": 3},
    "": lambda state: state,
}


@pytest.fixture
def saved(tmp_path):
    def save(content, name="weights.pth"):
        path = tmp_path / name
        torch.save(content, path)
        return path

    return save


def given_for(name, **options):
    small = dict(vars(GIVEN))
    if name in ("vit", "videomae_encoder", "mae_st"):
        small["decoder"] = TransformerSize(24, 2, 2)
    return Overrides(**(small | options))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layout_computes_what_an_independent_implementation_does(official, saved, name):
    if not name.startswith(("vit", "mae_st")):
        pytest.importorskip("transformers")
    path = saved({"model": official[name]})
    imported = import_weights(path, given_for(name))
    assert imported.family.name == name.partition(" ")[0]
    report = compare(imported, 1e-5)
    assert report.holds
    assert not report.not_checked
    expected = {"classifier": {"logits"}, "encoder": {"tokens"}}.get(
        imported.family.holds, {"tokens", "hidden patches"}
    )
    if name == "hpm":
        expected = expected | {"difficulty"}
    assert {found.of for found in report.differences} == expected
    assert imported.model.config.model.positions == (
        "given"
        if name == "mae_st"
        else {"mae": "space_time", "videomae": "sequence"}[imported.family.conventions]
    )
    for found in report.differences:
        assert found.share < 1e-5
        assert found.largest_value > 0.1 or found.of == "difficulty"


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "a.b_c.net0."])
@pytest.mark.parametrize("name", OFFICIAL)
def test_recognised_in_any_wrapper_and_under_any_prefix(official, name, prefix, wrapper):
    state = {prefix + key: value for key, value in official[name].items()}
    found = recognise(Source("file", {wrapper: state}))
    assert found.family.name == name.partition(" ")[0]
    assert found.prefix == prefix + ("encoder." if name == "videomae" else "")
    assert {*found.names.values(), *found.left_out} <= state.keys()


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_in_a_file(official, saved, wrapper):
    path = saved(WRAPPED[wrapper](official["videomae"]))
    imported = import_weights(path, GIVEN)
    assert imported.family.name == "videomae"
    assert imported.source.epoch == (3 if wrapper else None)


def once_for_each_config(make):
    """Cache models, which are only inspected here: making one takes 90 % of an import."""
    made = {}

    def cached(model):
        key = repr(model.config)
        if key not in made:
            made[key] = make(model)
        return made[key]

    return cached


@pytest.fixture
def read(monkeypatch):
    """Import a state dict without a file."""
    for kind in (TrainedAutoencoder, TrainedClassifier):
        monkeypatch.setattr(kind, "make", once_for_each_config(kind.make))

    def read(state, given):
        monkeypatch.setattr(
            "hpm_video.weights.importing.read_source", lambda path: Source(path, {"model": state})
        )
        return import_weights(Path("file"), given)

    return read


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_number_is_used_or_left_out_with_a_reason(official, read, name):
    """Gradients show it: if any number in a file changes, something imported changes."""
    state = {key: value.requires_grad_() for key, value in official[name].items()}
    imported = read(state, given_for(name))
    assert all(imported.left_out.values())
    if name != "mae_st":
        assert imported.left_out.keys() <= {"pos_embed", "decoder_pos_embed"}
    sum(value.sum() for value in imported.model.tensors.values()).backward()
    for key, value in state.items():
        if key not in imported.left_out:
            assert value.grad is not None, key
            assert value.grad.all(), key


ODD = {
    "a number": lambda _: torch.tensor(1.0),
    "a row": lambda _: torch.ones(7),
    "whole": lambda value: value.to(torch.int8),
    "complex": lambda value: value.to(torch.complex64),
    "without data": lambda value: value.to("meta"),
    "empty": lambda value: value[:0],
    "sparse": lambda value: value.to_sparse(),
    "not finite": lambda value: value * torch.nan,
}


DECIDE = (
    "cls_token",
    "pos_embed",
    "pos_embed_spatial",
    "patch_embed.proj.weight",
    "blocks.0.attn.qkv.weight",
    "reconstructor.head.weight",
    "difficulty_decoder.head.weight",
)
"""Tensors by which a family is recognised; without one the file is of another family or none."""


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_tensor_that_is_missing_or_odd_is_named(official, read, name):
    """One tensor of each kind, with any fault, is named as in the file or by our name."""
    given = given_for(name)
    every = official[name]
    state = {key: every[key] for key in every if not re.search(r"blocks\w*\.1\.", key)}
    whole = read(state, given)
    left_out = {"pos_embed_class", *whole.left_out} - {"pos_embed", "decoder_pos_embed"}
    names = list(state)
    for key, value in state.items():
        rest = {other: state[other] for other in state if other != key}
        changed = {"missing": rest} | {what: rest | {key: of(value)} for what, of in ODD.items()}
        for what, tensors in changed.items():
            any_shape = what in ("missing", "a number", "a row")
            if (any_shape and key in left_out) or (not any_shape and key not in names[:4]):
                continue
            if what == "missing" and key.endswith(".attn.k.bias"):  # the softmax ignores this one
                continue
            with pytest.raises(CheckpointError) as error:
                read(tensors, given)
            message = str(error.value)
            ours = by_our_names(state, prefixes_of(state)[0])[key]
            joined = re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", ours)
            decides = joined in DECIDE or ours.startswith("head.")
            is_named = any(name in message for name in (key, ours, joined))
            assert is_named or (any_shape and decides), (what, message)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "mae_st"])
def test_an_extra_a_missing_and_a_misshapen_tensor_are_named(official, saved, name):
    state = official[name]
    last = next(key for key in reversed(state) if key.endswith("proj.bias"))
    with pytest.raises(CheckpointError, match=r"left over something\.else"):
        import_weights(
            saved({"model": {**state, "something.else": torch.ones(3)}}), given_for(name)
        )
    less = {key: value for key, value in state.items() if key != last}
    with pytest.raises(CheckpointError, match=r"missing \S+attn\.proj\.bias"):
        import_weights(saved({"model": less}), given_for(name))
    with pytest.raises(CheckpointError, match=r"attn\.proj\.bias has shape \(7,\)"):
        import_weights(saved({"model": {**state, last: torch.ones(7)}}), given_for(name))


def officially(imported, tensors=None):
    """The tensors of a model, in the layout of its original file."""
    model = imported.model
    model = model if tensors is None else replace(model, held=tensors)
    clips = imported.family.name.startswith("videomae")
    tensors = model.tensors if clips else model.tensors | tables_of(model)
    return by_official_names(tensors, "videomae" if clips else "mae")


@pytest.mark.parametrize("name", ["hpm", "mae", "videomae", "videomae_classifier"])
def test_round_trip_is_the_identity(official, saved, name):
    imported = import_weights(saved({"model": official[name]}), GIVEN)
    back = officially(imported)
    assert back.keys() == official[name].keys()
    for key, value in back.items():
        assert value.shape == official[name][key].shape
        if "pred_losspred" not in key:
            assert torch.equal(value, official[name][key]), key
    again = import_weights(saved({"model": back}), GIVEN).model.tensors
    for key, value in again.items():
        assert torch.equal(value, imported.model.tensors[key]), key


def test_hpm_student_and_teacher(official, layouts_of, saved):
    teacher = layouts_of.fill(layouts_of.hpm(ENCODER, DECODER, PATCH, TOKENS), seed=1)
    student = {f"module.{name}": value for name, value in official["hpm"].items()}
    path = saved({"state_dict": student, "ema_state_dict": teacher, "epoch": 199, "model": "vit"})
    imported = import_weights(path, GIVEN)
    assert imported.state.prefix == "module."
    assert imported.teacher.keys() == imported.model.tensors.keys()
    head = "decoder_pred_losspred.weight"
    for found, state in ((imported.model.tensors, official["hpm"]), (imported.teacher, teacher)):
        folded = found["difficulty_decoder.head.weight"]
        torch.testing.assert_close(folded, state[head].mean(dim=0, keepdim=True))
    assert "ema_state_dict" not in imported.left_out
    assert imported.left_out["model"] == "no weights"
    chosen = import_weights(path, given_for("hpm", entry="ema_state_dict"))
    assert torch.equal(chosen.model.tensors["mask_token"], imported.teacher["mask_token"])
    assert chosen.teacher is None
    assert compare(imported).holds
    with pytest.raises(CheckpointError, match="no state dict 'ema'"):
        import_weights(path, given_for("hpm", entry="ema"))


@pytest.mark.parametrize(
    ("name", "count", "parameters"),
    [
        ("videomae", 218, 94_210_944),
        ("videomae_classifier", 162, None),
        ("hpm", 354, 137_521_920),
    ],
)
def test_official_sizes_of_b(layouts_of, monkeypatch, name, count, parameters):
    of = layouts_of
    shapes = {
        "videomae": lambda: of.videomae(B, B_CLIP_DECODER, (2, 16, 16)),
        "videomae_classifier": lambda: of.videomae_classifier(B, (2, 16, 16), 400),
        "hpm": lambda: of.hpm(B, B_IMAGE_DECODER, 16, 196),
    }[name]()
    assert len(shapes) == count
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if parameters is not None:
        assert sum(value.numel() for value in tensors.values()) == parameters
    monkeypatch.setattr("hpm_video.weights.families._check_numbers", lambda *_: None)
    monkeypatch.setattr(
        "hpm_video.weights.importing.read_source", lambda path: Source(path, {"model": tensors})
    )
    monkeypatch.setattr("hpm_video.weights.importing._to_own_positions", lambda *_: 0.0)
    imported = import_weights(Path("file"))
    model, config = imported.model, imported.model.config.model
    with torch.device("meta"):
        shaped = model.make().state_dict()
    own = {key: torch.zeros(value.shape) for key, value in shaped.items()}
    expected = officially(imported, own)
    assert expected.keys() == tensors.keys()
    assert all(value.shape == tensors[key].shape for key, value in expected.items())
    assert config.patch_size == ((1, 16, 16) if name == "hpm" else (2, 16, 16))
    assert config.encoder == TransformerSize(768, 12, 12)
    assert model.config.data.clip_size == ((1 if name == "hpm" else 16), 224, 224)
    if name != "videomae_classifier":
        assert config.decoder.num_heads == {"videomae": 6, "hpm": 16}[name]
    else:
        assert len(model.label_names) == 400


def test_assumptions_are_reported_and_arguments_of_the_run_are_read(official, saved):
    bare = import_weights(
        saved({"model": official["videomae"]}), Overrides(heads=4, decoder_heads=2)
    )
    assert bare.model.config.data.clip_size == (16, 224, 224)
    text = "; ".join(bare.assumed)
    assert "number of frames 16" in text
    assert "frame stride 4" in text
    arguments = argparse.Namespace(
        num_frames=8, input_size=64, sampling_rate=2, normlize_target=False
    )
    full = import_weights(
        saved({"model": official["videomae"], "args": arguments}),
        Overrides(heads=4, decoder_heads=2),
    )
    assert full.model.config.data.clip_size == (8, 64, 64)
    assert full.model.config.data.frame_stride == 2
    assert full.model.config.mining.target == "raw"
    assert [line.split()[0] for line in full.assumed] == ["mean", "resizing"]


def test_heads_are_never_guessed(official, saved):
    with pytest.raises(CheckpointError, match="width 48 is none of the known.*--heads"):
        import_weights(saved({"model": official["videomae"]}), Overrides(decoder_heads=2))
    with pytest.raises(CheckpointError, match="--decoder-heads"):
        import_weights(saved({"model": official["videomae"]}), Overrides(heads=4))


def test_a_stranger_is_refused_with_what_was_seen(saved):
    state = {f"layers.{i}.conv.weight": torch.ones(2, 2) for i in range(3)}
    with pytest.raises(CheckpointError, match=r"none of hpm, mae.*\n  layers\.0\.conv\.wei"):
        import_weights(saved({"model": state}))


def test_two_families_in_one_are_refused(official, saved):
    state = official["videomae"] | official["videomae_classifier"]
    with pytest.raises(CheckpointError, match=r"several models, .* begin with 'encoder\.' or ''"):
        import_weights(saved({"model": state}), GIVEN)


def of_lightning(state, prefix="model.backbone."):
    """A Lightning module that trains an encoder, with a head, a metric and a loss beside it."""
    found = {
        f"{prefix}{name}" if not name.startswith("head.") else f"model.{name}": value
        for name, value in state.items()
    }
    return {"state_dict": found, "epoch": 3, "pytorch-lightning_version": "2.5", "loops": {}}


@pytest.mark.parametrize("name", ["vit_classifier on the class token", "videomae_encoder"])
def test_a_wrappers_prefix_is_taken_off_by_itself(official, saved, name):
    imported = import_weights(saved(of_lightning(official[name]), "last.ckpt"), given_for(name))
    assert imported.state.prefix == "model.backbone."
    lines = describe(imported)
    assert "prefix: model.backbone." in lines
    plain = import_weights(saved({"model": official[name]}), given_for(name))
    assert imported.model.tensors.keys() == plain.model.tensors.keys()
    for key, value in plain.model.tensors.items():
        assert torch.equal(imported.model.tensors[key], value), key


def test_what_lies_beside_a_prefix_is_named_and_left_out_if_asked(official, saved):
    content = of_lightning(official["videomae_encoder"])
    content["state_dict"]["loss.weight"] = torch.ones(5)
    path = saved(content)
    with pytest.raises(
        CheckpointError, match=r"--prefix model\.backbone\. .*\n  left over loss\.w"
    ):
        import_weights(path, given_for("videomae_encoder"))
    imported = import_weights(path, given_for("videomae_encoder", prefix="model.backbone."))
    assert imported.left_out["loss.weight"] == "it does not begin with the prefix"
    with pytest.raises(CheckpointError, match="none of hpm, mae"):
        import_weights(path, given_for("videomae_encoder", prefix="model.head."))


def test_two_models_under_two_prefixes_are_not_chosen_from(official, saved):
    every = official["videomae_encoder"]
    state = {f"student.{name}": value for name, value in every.items()}
    state |= {f"teacher.{name}": value + 1 for name, value in every.items()}
    path = saved({"state_dict": state})
    with pytest.raises(CheckpointError, match=r"'student\.' or 'teacher\.'; choose with --prefix"):
        import_weights(path, given_for("videomae_encoder"))
    imported = import_weights(path, given_for("videomae_encoder", prefix="teacher."))
    name = "blocks.0.norm1.bias"
    assert torch.equal(imported.model.tensors[name], every[name] + 1)
    assert "student.norm.weight" in imported.left_out


def test_several_unknown_state_dicts_are_not_chosen_from(official, saved):
    path = saved({"a": official["mae"], "b": official["mae"]})
    with pytest.raises(CheckpointError, match="several state dicts: 'a', 'b'"):
        import_weights(path, GIVEN)
    assert import_weights(path, given_for("mae", entry="b")).family.name == "mae"


@pytest.mark.parametrize("name", ["vit", "vit_classifier", "mae", "hpm"])
def test_learned_positions_are_kept(official, saved, name):
    state = dict(official[name])
    for table in ("pos_embed", "decoder_pos_embed"):
        if table in state:
            state[table] = torch.randn_like(state[table])
            state[table][:, 0] *= table == "pos_embed"
    imported = import_weights(saved({"model": state}), given_for(name))
    assert imported.model.config.model.positions == "given"
    assert "pos_embed" not in imported.left_out
    assert torch.equal(imported.model.tensors["pos_embed"], state["pos_embed"][:, 1:])
    assert torch.equal(
        imported.model.tensors["cls_token"], state["pos_embed"][:, :1] + state["cls_token"]
    )
    assert "positions='given'" in describe(imported)[0]
    assert compare(imported, 1e-5).holds


def test_a_position_of_the_class_token_goes_into_it(official, saved):
    state = dict(official["vit"])
    state["pos_embed"] = state["pos_embed"].clone()
    state["pos_embed"][0, 0] = 0.5
    imported = import_weights(saved({"model": state}), given_for("vit"))
    assert imported.model.config.model.positions == "space_time"
    assert compare(imported, 1e-5).holds


def test_classifier_for_pretraining_is_an_encoder_with_a_fresh_decoder(official, saved):
    imported = import_weights(
        saved({"model": official["videomae_classifier"]}),
        given_for("videomae_encoder", encoder_only=True),
    )
    assert not imported.model.is_classifier
    assert imported.left_out["head.weight"] == imported.left_out["fc_norm.bias"]
    starts = {name.split(".")[0] for name in imported.fresh}
    assert starts == {"norm", "mask_token", "decoder_embed", "reconstructor"}
    assert compare(imported, 1e-5).holds


@pytest.mark.parametrize("name", ["mae", "hpm", "videomae"])
def test_encoder_of_an_autoencoder_alone(official, saved, name):
    given = given_for("vit", encoder_only=True)
    imported = import_weights(saved({"model": official[name]}), given)
    assert all(not name.startswith("norm.") for name in imported.fresh)
    assert compare(imported, 1e-5).holds


@pytest.mark.parametrize("name", ["vit", "videomae_encoder"])
def test_a_fresh_decoder_is_as_the_papers_choose_it(official, saved, name):
    imported = import_weights(saved({"model": official[name]}), GIVEN)
    expected = (512, 8, 16) if name == "vit" else (24, 4, 2)
    assert imported.model.config.model.decoder == TransformerSize(*expected)


def test_an_mlp_of_another_width_is_read(official, saved):
    """VideoMAE V2's ViT-g has an MLP of 6144 at a width of 1408, not four times that."""
    state = dict(official["videomae_classifier"])
    draw = torch.Generator().manual_seed(1)
    for i in range(2):
        for name, shape in {
            "fc1.weight": (200, 48),
            "fc1.bias": (200,),
            "fc2.weight": (48, 200),
        }.items():
            state[f"blocks.{i}.mlp.{name}"] = 0.1 * torch.randn(shape, generator=draw)
    imported = import_weights(saved({"model": state}), GIVEN)
    assert imported.model.config.model.encoder.mlp_dim == 200
    report = compare(imported, 1e-5)
    assert report.holds
    assert report.differences


def test_a_head_on_something_else_is_refused(official, saved):
    state = dict(official["videomae_classifier"])
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = state.pop(f"fc_norm.{part}")
    with pytest.raises(CheckpointError, match="a head here stands on.*--encoder-only"):
        import_weights(saved({"model": state}), GIVEN)


def test_licences_are_reported(official, saved):
    for name in OFFICIAL:
        imported = import_weights(saved({"model": official[name]}), given_for(name))
        assert "CC-BY-NC 4.0" in imported.family.licence
        assert f"licence: {imported.family.licence}" in describe(imported)


def test_half_precision(official, saved):
    state = {name: value.half() for name, value in official["mae"].items()}
    imported = import_weights(saved({"model": state}), GIVEN)
    assert {value.dtype for value in imported.model.tensors.values()} == {torch.float32}
    assert compare(imported, 1e-3).holds


def test_blocks_must_have_no_gap(official, saved):
    state = {name.replace("blocks.1.", "blocks.2."): v for name, v in official["mae"].items()}
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.norm1\.weight"):
        import_weights(saved({"model": state}), GIVEN)


def test_an_incomplete_projection_is_named(official, saved):
    state = dict(official["mae_st"])
    del state["blocks.1.attn.k.weight"]
    with pytest.raises(CheckpointError, match=r"missing, .*blocks\.1\.attn\.k\.weight"):
        import_weights(saved({"model_state": state}), given_for("mae_st"))


def test_frame_size_and_positions_must_agree(official, saved):
    with pytest.raises(
        CheckpointError, match=r"pos_embed has the shape \(1, 17, 48\).* 64 tokens.*--frame-size"
    ):
        import_weights(saved({"model": official["mae"]}), given_for("mae", frame_size=(64, 64)))


def test_rectangular_images(layouts_of, saved):
    state = layouts_of.fill(layouts_of.vit(ENCODER, PATCH, 8) | layouts_of.affine("head", 5, 48))
    table = position_table(TokenGrid(1, 2, 4), 48, "space_time")
    state["pos_embed"] = torch.cat([torch.zeros(1, 48), table]).unsqueeze(0)
    imported = import_weights(saved(state), given_for("mae", frame_size=(16, 32)))
    assert imported.model.config.data.clip_size == (1, 16, 32)
    assert compare(imported, 1e-5).holds


def small_options(**more):
    return {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        **more,
    }


DECODER_OPTIONS = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 96,
}
OF_TRANSFORMERS = {
    "videomae": (
        "VideoMAEForPreTraining",
        {"num_frames": 4, "use_mean_pooling": False, **DECODER_OPTIONS},
    ),
    "videomae_classifier": (
        "VideoMAEForVideoClassification",
        {
            "num_frames": 4,
            "use_mean_pooling": True,
            "id2label": {i: f"class {i}" for i in range(12)},
        },
    ),
    "videomae_encoder": (
        "VideoMAEModel",
        {"num_frames": 4, "use_mean_pooling": False},
    ),
    "mae": ("ViTMAEForPreTraining", DECODER_OPTIONS),
    "vit_classifier": ("ViTForImageClassification", {"num_labels": 5}),
    "vit": ("ViTModel", {}),
}


@pytest.fixture
def transformers_folder(tmp_path):
    transformers = pytest.importorskip("transformers")

    def make(name):
        kind, options = OF_TRANSFORMERS[name]
        config = kind.replace("ForPreTraining", "").replace("ForVideoClassification", "")
        config = config.replace("ForImageClassification", "").replace("Model", "") + "Config"
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**small_options(**options))
        model = getattr(transformers, kind)(settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
            for key, value in (*model.named_parameters(), *model.named_buffers()):
                if key.endswith(("position_embeddings", "decoder_pos_embed")):
                    table = position_table(TokenGrid(1, 4, 4), value.shape[-1], "space_time")
                    value.copy_(torch.cat([table[:1] * 0, table]))
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_folder_of_transformers(transformers_folder, name):
    _, folder = transformers_folder(name)
    imported = import_weights(folder, given_for(name))
    assert imported.family.name == name
    report = compare(imported)
    assert report.holds
    assert not report.not_checked
    assert all(found.share < 1e-5 for found in report.differences)
    assert all(found.largest_value > 0.1 for found in report.differences)
    if name == "videomae_classifier":
        assert imported.model.label_names == tuple(f"class {i}" for i in range(12))
        assert imported.model.config.data.clip_size == (4, 32, 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["videomae", "mae"])
def test_names_of_models_in_memory_are_read_as_those_of_files(transformers_folder, saved, name):
    model, folder = transformers_folder(name)
    from_folder = import_weights(folder, GIVEN)
    from_model = import_weights(saved(model.state_dict()), GIVEN)
    assert from_folder.model.tensors.keys() == from_model.model.tensors.keys()
    for key, value in from_folder.model.tensors.items():
        assert torch.equal(value, from_model.model.tensors[key]), key


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mean_and_deviation_of_the_preprocessor(transformers_folder):
    _, folder = transformers_folder("vit_classifier")
    table = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(table))
    data = import_weights(folder, GIVEN).model.config.data
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parity_fails_where_something_is_wrong(transformers_folder):
    imported = import_weights(transformers_folder("videomae_classifier")[1])
    imported.model.tensors["blocks.0.mlp.fc1.bias"] = torch.ones(192)
    with pytest.raises(CheckpointError, match="output differs from our.*\n.*logits"):
        compare(imported)
