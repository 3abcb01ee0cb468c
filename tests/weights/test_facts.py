"""Facts stored beside weights are used if our models support them, and refused otherwise."""

import json
import logging
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from hpm_video.config.choices import TransformerSize
from hpm_video.files.weights import CheckpointError
from hpm_video.models.positions import resize_positions
from hpm_video.tokens.grid import TokenGrid
from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import describe, import_weights
from hpm_video.weights.verify import compare

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
GIVEN = Overrides(heads=4, decoder_heads=2, num_frames=4, frame_size=(32, 32))


def drawn(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def of_timm(tmp_path):
    """Make a folder as timm saves it."""
    logging.getLogger("timm").setLevel(logging.WARNING)

    def make(**arguments):
        arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 5, **arguments}
        model = drawn(timm.create_model("vit_small_patch16_224", **arguments))
        folder = tmp_path / "timm"
        folder.mkdir(exist_ok=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        pretrained = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
        table = {
            "architecture": "vit_small_patch16_224",
            "num_classes": 5,
            "global_pool": arguments.get("global_pool", "token"),
            "model_args": arguments,
            "pretrained_cfg": {**pretrained, "interpolation": "bicubic", "crop_mode": "center"},
        }
        (folder / "config.json").write_text(json.dumps(table))
        return model, folder

    return make


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_heads": 12},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"no_embed_class": True},
    ],
)
def test_the_config_of_timm_decides_what_is_imported(of_timm, arguments):
    model, folder = of_timm(**arguments)
    imported = import_weights(folder)
    assert imported.model.config.model.encoder.num_heads == arguments.get("num_heads", 6)
    assert imported.model.config.model.positions == "given"
    report = compare(imported, 1e-5)
    assert not any("heads" in note for note in report.notes)
    ours = imported.model.build().eval()
    ours.load_state_dict(imported.model.tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGE.unsqueeze(2)), model(IMAGE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv_bias": False}, "qkv_bias': False"),
        ({"global_pool": "avg", "fc_norm": False}, "global_pool='avg'.*--encoder-only"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"global_pool": "avgmax"}, "global_pool='avgmax'"),
        ({"act_layer": "relu"}, "act_layer': 'relu'"),
        ({"act_layer": "gelu_tanh"}, "act_layer': 'gelu_tanh'"),
    ],
)
def test_a_config_of_timm_that_ours_cannot_have_is_refused(of_timm, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        import_weights(of_timm(**arguments)[1])


def changed(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_other_keys_of_a_config_are_left_to_the_comparison(of_timm):
    _, folder = of_timm(global_pool="avg", pool_include_prefix=True)
    with pytest.raises(CheckpointError, match="output differs from our"):
        compare(import_weights(folder))
    config = json.loads((folder / "config.json").read_text())
    changed(folder, model_args=config["model_args"] | {"novelty": 3})
    with pytest.raises(CheckpointError, match="does not make the model of .*novelty"):
        compare(import_weights(folder))


def test_parity_reads_the_config_for_itself(of_timm, monkeypatch):
    """So a mistake in reading a config does not affect both models."""
    _, folder = of_timm(num_heads=12)
    wrong = import_weights(folder, Overrides(heads=6))
    with pytest.raises(CheckpointError, match="output differs from our"):
        compare(wrong)
    changed(folder, architecture="hf-hub:timm/vit_small_patch16_224")
    with pytest.raises(CheckpointError, match="does not make the model of"):
        compare(import_weights(folder))


def test_pixels_of_timm(of_timm):
    imported = import_weights(of_timm()[1])
    data = imported.model.config.data
    assert (data.mean, data.std) == ((0.5,) * 3, (0.5,) * 3)
    text = "; ".join(imported.assumed)
    assert "heads 6" in text
    assert "bicubic, of a short side of 37" in text


@pytest.fixture
def of_transformers(tmp_path):
    """Make a classifier of clips as transformers saves it, with changes to its config."""
    transformers = pytest.importorskip("transformers")

    def make(**values):
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.VideoMAEConfig(
            image_size=32,
            patch_size=8,
            intermediate_size=192,
            num_frames=4,
            num_labels=3,
            use_mean_pooling=True,
            **sizes,
        )
        folder = tmp_path / "model"
        drawn(transformers.VideoMAEForVideoClassification(config)).save_pretrained(folder)
        changed(folder, **values)
        return folder

    return make


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act': 'relu'"),
        ({"qv_bias": False}, "qv_bias': False"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps': 0.1"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps': 'small'"),
        ({"model_type": "timesformer"}, "model_type': 'timesformer'"),
        ({"id2label": {"0": "a", "2": "b", "5": "c"}}, "from 0 on, got .*'b'"),
        ({"id2label": {"zero": "a", "1": "b", "2": "c"}}, "from 0 on"),
        ({"id2label": {"0": "a\nb", "1": "c", "2": "d"}}, "one line"),
        ({"id2label": {"0": "a", "1": "", "2": "d"}}, "one line"),
        ({"id2label": {"0": "a", "1": "c ", "2": "d"}}, "one line"),
        ({"num_frames": "x"}, "num_frames must be whole numbers of at least 1, got 'x'"),
        ({"num_frames": 4.0}, "num_frames must be whole numbers"),
        ({"image_size": [32, "a"]}, "image_size must be whole numbers"),
        ({"num_attention_heads": [3]}, r"num_attention_heads must be .* got \[3\]"),
    ],
)
def test_a_config_of_transformers_that_ours_cannot_have_is_refused(
    of_transformers, values, message
):
    with pytest.raises(CheckpointError, match=message):
        import_weights(of_transformers(**values))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bias_on_keys_that_transformers_does_not_have_is_taken(of_transformers):
    """It does not change what the model computes."""
    folder = of_transformers()
    tensors = load_file(folder / "model.safetensors")
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2))
    for i in range(2):
        tensors[f"videomae.encoder.layer.{i}.attention.attention.key.bias"] = bias.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    imported = import_weights(folder)
    for i in range(2):
        assert torch.equal(imported.model.tensors[f"blocks.{i}.attn.qkv.bias"][48:96], bias)
    report = compare(imported, 1e-5)
    assert "VideoMAEForVideoClassification" in report.with_what
    assert report.differences


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_file_in_a_folder_stands_for_it(of_transformers):
    folder = of_transformers()
    imported = import_weights(folder / "model.safetensors")
    assert imported.model.config.model.encoder.num_heads == 4
    assert imported.model.config.data.clip_size == (4, 32, 32)
    assert imported.source.path == folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mae", "hpm"])
def test_computed_positions_in_half_precision_are_no_learned_ones(
    layouts_of, tmp_path, dtype, name
):
    pytest.importorskip("transformers")
    shapes = getattr(layouts_of, name)((48, 2), (24, 2), 8, 16)
    state = {key: value.to(dtype) for key, value in layouts_of.fill(shapes).items()}
    torch.save({"model": state}, tmp_path / "half.pth")
    imported = import_weights(tmp_path / "half.pth", GIVEN)
    assert imported.model.config.model.positions == "space_time"
    assert compare(imported, 1e-5).holds
    assert "computed here" in imported.left_out["pos_embed"]


def test_the_teacher_is_compared_and_keeps_its_positions(layouts_of, tmp_path):
    pytest.importorskip("transformers")
    shapes = layouts_of.hpm((48, 2), (24, 2), 8, 16)
    teacher = layouts_of.fill(shapes, seed=1)
    teacher["pos_embed"] = teacher["pos_embed"] + 0.5
    teacher["pos_embed"][:, 0] = 0
    content = {"state_dict": layouts_of.fill(shapes), "ema_state_dict": teacher}
    torch.save(content, tmp_path / "hpm.pth")
    imported = import_weights(tmp_path / "hpm.pth", GIVEN)
    assert imported.model.config.model.positions == "given"
    tables = [each["pos_embed"] for each in (imported.model.tensors, imported.teacher)]
    torch.testing.assert_close(tables[1] - tables[0], torch.full((1, 16, 48), 0.5))
    compared = {found.of for found in compare(imported, 1e-5).differences}
    assert {"difficulty", "of the teacher: difficulty", "of the teacher: tokens"} <= compared


def test_usual_heads_are_assumed_and_reported_as_not_verified(layouts_of, tmp_path):
    pytest.importorskip("transformers")
    shapes = layouts_of.videomae_classifier((384, 1), (2, 8, 8), 3)
    torch.save({"model": layouts_of.fill(shapes)}, tmp_path / "a.pth")
    imported = import_weights(tmp_path / "a.pth", Overrides(num_frames=4, frame_size=(32, 32)))
    assert "heads 6" in imported.assumed
    (note,) = compare(imported).notes
    assert "not verified: the number of heads" in note


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_a_part_with_a_prefix_beside_a_head_without(layouts_of, tmp_path, prefix):
    state = layouts_of.fill(layouts_of.videomae_classifier((48, 2), (2, 8, 8), 3))
    mixed = {
        name if name.startswith(("head.", "fc_norm.")) else f"{prefix}{name}": value
        for name, value in state.items()
    }
    torch.save({"model": mixed}, tmp_path / "a.pth")
    imported = import_weights(tmp_path / "a.pth", GIVEN)
    assert {*imported.state.names.values()} <= mixed.keys()
    assert imported.model.tensors.keys() <= imported.state.names.keys()
    assert f"prefix: {prefix}" in describe(imported)


def test_mae_without_a_class_token_is_refused(layouts_of, tmp_path):
    state = layouts_of.fill(layouts_of.mae((48, 2), (24, 2), 8, 16))
    for name in ("cls_token", "pos_embed", "decoder_pos_embed"):
        del state[name]
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="none of hpm, mae"):
        import_weights(tmp_path / "a.pth", GIVEN)


def test_a_fine_tuned_mae_st_does_not_lose_its_head_unasked(layouts_of, tmp_path):
    shapes = layouts_of.mae_st((48, 2), (24, 2), (2, 8, 8), (2, 16))
    shapes |= layouts_of.affine("head", 400, 48)
    torch.save({"model_state": layouts_of.fill(shapes)}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"--encoder-only leaves out a head.*\n  left over head\.weight"
    ):
        import_weights(tmp_path / "a.pth", replace(GIVEN, decoder=TransformerSize(24, 2, 2)))


def test_tied_tensors_and_values_that_are_no_tensors(layouts_of, tmp_path):
    state = layouts_of.fill(layouts_of.videomae_classifier((48, 2), (2, 8, 8), 3))
    state["blocks.0.norm2.weight"] = state["blocks.0.norm1.weight"]
    torch.save({"model": {**state, "step": 3}}, tmp_path / "a.pth")
    imported = import_weights(tmp_path / "a.pth", GIVEN)
    assert imported.left_out == {"model.step": "no weights"}
    first, second = (imported.model.tensors[f"blocks.0.norm{i}.weight"] for i in (1, 2))
    assert first.data_ptr() != second.data_ptr()
    torch.save({**state, "epoch": 3}, tmp_path / "b.pth")
    assert import_weights(tmp_path / "b.pth", GIVEN).left_out == {"epoch": "no weights"}
    save_file(imported.model.tensors, tmp_path / "c.safetensors")
    assert load_file(tmp_path / "c.safetensors").keys() == imported.model.tensors.keys()


def test_given_positions_are_resized_as_timm_does(of_timm):
    """For frames of another size, bicubically."""
    model, folder = of_timm(dynamic_img_size=True)
    imported = import_weights(folder)
    table = imported.model.tensors["pos_embed"][0]
    source, grid = TokenGrid(1, 4, 4), TokenGrid(1, 6, 5)
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed.detach(), [6, 5])
    torch.testing.assert_close(resize_positions(table, source, grid), expected[0, 1:])
