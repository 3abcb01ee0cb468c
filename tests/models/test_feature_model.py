import argparse
import math
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from hpm_video.config.choices import DEFAULT_MODELS
from hpm_video.files.weights import CheckpointError
from hpm_video.models.feature_model import feature_width, load_feature_model
from hpm_video.weights.files import read_image_tower

TINY = "test_vit.r160_in1k"  # width 64, patches of 16, frames of 160
TINY_GRID = (10, 10)
HALF = (0.5, 0.5, 0.5)
CLIP = "vit_xsmall_patch16_clip_224"  # width 256, projected to 512
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH = (1, 16, 16)


def randomised(model, seed=0):
    """Weights unlike any initial values, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def clips_of(batch, frames, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, frames, *size), generator=generator, dtype=torch.uint8)


def normalised(images, mean, std):
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.fixture(scope="module")
def tiny():
    return randomised(timm.create_model(TINY, pretrained=False, num_classes=0))


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "weights.safetensors"
    save_file(tiny.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip():
    model = randomised(timm.create_model(CLIP, pretrained=False))
    nn.init.zeros_(model.head.bias)
    return model


@pytest.fixture(scope="module")
def clip_file(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "weights.safetensors"
    save_file(clip.state_dict(), path)
    return path


def load_tiny(path, frame_size=(160, 160), patch_size=PATCH):
    return load_feature_model(
        "dino", TINY, read_image_tower(path), path, frame_size=frame_size, patch_size=patch_size
    )


def load_clip(path, frame_size=(224, 224)):
    return load_feature_model(
        "clip", CLIP, read_image_tower(path), path, frame_size=frame_size, patch_size=PATCH
    )


def saved(content, tmp_path, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def openai_layout(weights):
    """The image tower with the names of OpenAI's CLIP in place of timm's."""
    names = [
        ("patch_embed.proj.", "conv1."),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
        ("norm1.", "ln_1."),
        ("norm2.", "ln_2."),
        ("norm_pre.", "ln_pre."),
        ("blocks.", "transformer.resblocks."),
    ]
    layout = {
        "class_embedding": weights["cls_token"].flatten(),
        "positional_embedding": weights["pos_embed"].squeeze(0),
        "proj": weights["head.weight"].T.contiguous(),
        "ln_post.weight": weights["norm.weight"],
        "ln_post.bias": weights["norm.bias"],
    }
    for name, value in weights.items():
        if name.startswith(("blocks.", "patch_embed.", "norm_pre.")):
            for of_timm, of_openai in names:
                name = name.replace(of_timm, of_openai)
            layout[name] = value
    return {f"visual.{name}": value for name, value in layout.items()}


TEXT_TOWER = {
    "positional_embedding": torch.zeros(77, 8),
    "text_projection": torch.zeros(8, 8),
    "logit_scale": torch.tensor(1.0),
    "token_embedding.weight": torch.zeros(9, 8),
    "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
    "ln_final.weight": torch.zeros(8),
    "input_resolution": 224,
}


# Features


def test_features_of_dino_are_timms_normed_patch_tokens(tiny, tiny_file):
    clips = clips_of(2, 1, (160, 160))
    with torch.no_grad():
        _, (expected,) = tiny.forward_intermediates(
            normalised(clips[:, :, 0], HALF, HALF), indices=1, norm=True, output_fmt="NLC"
        )
    features = load_tiny(tiny_file)(clips)
    assert features.shape == (2, math.prod(TINY_GRID), 64)
    torch.testing.assert_close(features, expected)


def test_features_of_clip_are_projected_one_by_one(clip, clip_file):
    clips = clips_of(1, 1, (224, 224))
    with torch.no_grad():
        tokens = clip.forward_features(normalised(clips[:, :, 0], CLIP_MEAN, CLIP_STD))
    expected = torch.stack([clip.head.weight @ token for token in tokens[0, 1:]])
    features = load_clip(clip_file)(clips)
    assert features.shape == (1, 196, 512)
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)


def test_image_model_sees_the_first_frame_of_each_time_step(tiny_file):
    model = load_tiny(tiny_file, patch_size=(2, 16, 16))
    clips = clips_of(2, 6, (160, 160))
    features = model(clips)
    single = [model(clips[:, :, i : i + 1]) for i in (0, 2, 4)]
    torch.testing.assert_close(features, torch.cat(single, dim=1))


def test_feature_is_of_the_patch_at_its_place_in_the_grid(tiny, tmp_path):
    weights = {name: value.clone() for name, value in tiny.state_dict().items()}
    for name in weights:
        if ".attn.proj." in name:
            weights[name].zero_()  # now tokens do not see each other
    path = saved(weights, tmp_path)
    model = load_tiny(path, frame_size=(32, 80))
    dark = torch.zeros(1, 3, 2, 32, 80, dtype=torch.uint8)
    marked = dark.clone()
    marked[:, :, 1, 16:, 48:64] = 255
    changed = (model(dark) != model(marked)).any(dim=-1).squeeze(0)
    assert changed.nonzero().flatten().tolist() == [1 * 10 + 1 * 5 + 3]


def test_positions_of_another_frame_size_are_those_that_timm_resamples(clip, clip_file):
    size = (48, 96)
    resized = timm.create_model(CLIP, pretrained=False, img_size=size).eval()
    resized.load_state_dict(checkpoint_filter_fn(clip.state_dict(), resized))
    clips = clips_of(1, 1, size)
    with torch.no_grad():
        images = normalised(clips[:, :, 0], CLIP_MEAN, CLIP_STD)
        expected = resized.head(resized.forward_features(images)[:, 1:])
    features = load_clip(clip_file, frame_size=size)(clips)
    assert features.shape[1] == 3 * 6
    torch.testing.assert_close(features, expected)


def test_model_is_frozen_and_its_features_are_float32_in_mixed_precision(clip_file):
    model = load_clip(clip_file, frame_size=(32, 32))
    clips = clips_of(1, 1, (32, 32))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    exact = model(clips)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(clips)
    assert mixed.dtype == exact.dtype == torch.float32
    assert 0 < (mixed - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_loading_draws_nothing_from_the_global_generator(tiny_file):
    before = torch.get_rng_state()
    load_tiny(tiny_file)
    assert torch.equal(torch.get_rng_state(), before)


# Names


def test_default_models_are_the_paper_s():
    assert {kind: feature_width(kind, name) for kind, name in DEFAULT_MODELS.items()} == {
        "dino": 768,
        "clip": 512,
    }
    clip = timm.create_model(DEFAULT_MODELS["clip"], pretrained=False, depth=1)
    assert type(clip.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert clip.pretrained_cfg["mean"] == CLIP_MEAN


@pytest.mark.parametrize(("kind", "name"), [("dino", TINY), ("clip", CLIP)])
def test_width_is_that_of_the_loaded_model(kind, name, request):
    path = request.getfixturevalue("tiny_file" if kind == "dino" else "clip_file")
    model = load_tiny(path) if kind == "dino" else load_clip(path)
    assert feature_width(kind, name) == model.width


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("dino", "vit_base_patch16_224.dinos", r"take vit_base_patch16_224\.dino "),
        ("dino", "hf-hub:timm/vit_base_patch16_224.dino", "no plain vision transformer 'hf-hub:"),
        ("dino", "resnet18", "no plain vision transformer 'resnet18'.*; take"),
        (
            "dino",
            "test_vit2",
            "no features of kind 'dino': .*norm after.*take 'vit_base_patch16_224.dino'",
        ),
        ("clip", "test_vit", "no features of kind 'clip'.*take 'vit_base_patch16_clip_quick"),
    ],
)
def test_name_without_such_features_is_refused(kind, name, message):
    with pytest.raises(ValueError, match=message):
        feature_width(kind, name)


def test_patches_must_be_the_students(tiny_file):
    with pytest.raises(ValueError, match="got 8 x 8 pixels and 16 x 16; give the student patches"):
        load_tiny(tiny_file, patch_size=(2, 8, 8))
    with pytest.raises(ValueError, match="width of a clip must be a multiple .* got 90"):
        load_tiny(tiny_file, frame_size=(80, 90))


# Layouts of weights


def full_dino(weights):
    """A checkpoint as DINO's training saves it."""
    head = {"mlp.0.weight": torch.ones(3), "last_layer.weight_g": torch.ones(3)}
    teacher = {f"backbone.{name}": value for name, value in weights.items()}
    teacher |= {f"head.{name}": value for name, value in head.items()}
    return {
        "student": {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()},
        "teacher": teacher,
        "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_base", local_crops_scale=(0.05, 0.4)),
    }


LAYOUTS = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model": lambda weights: {"model": weights},
    "parallel": lambda weights: {"module." + name: value for name, value in weights.items()},
    "with classes": lambda weights: weights | {"head.weight": torch.ones(2, 64)},
    "full": full_dino,
    "full, parallel": lambda weights: {
        "teacher": LAYOUTS["parallel"](full_dino(weights)["teacher"])
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_dino(layout, tiny, tiny_file, tmp_path):
    path = saved(LAYOUTS[layout](tiny.state_dict()), tmp_path)
    found, expected = load_tiny(path).state_dict(), load_tiny(tiny_file).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_other_suffixes_of_torch(suffix, tiny, tmp_path):
    path = saved(tiny.state_dict(), tmp_path, f"weights{suffix}")
    assert load_tiny(path).width == 64


@pytest.mark.parametrize("prefix", ["", "module."])
def test_layout_of_openai_and_openclip(prefix, clip, clip_file, tmp_path):
    layout = openai_layout(clip.state_dict())
    as_timm_reads_it = checkpoint_filter_fn(layout, clip)
    assert as_timm_reads_it.keys() == clip.state_dict().keys()
    whole = {prefix + name: value for name, value in (layout | TEXT_TOWER).items()}
    found = load_clip(saved({"state_dict": whole}, tmp_path)).state_dict()
    expected = load_clip(clip_file).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_weights_are_read_as_float32(tiny, tmp_path):
    path = saved({name: value.half() for name, value in tiny.state_dict().items()}, tmp_path)
    assert {value.dtype for value in load_tiny(path).state_dict().values()} == {torch.float32}


# Refusals


def test_every_weight_that_does_not_fit_is_named(tiny, tmp_path):
    weights = tiny.state_dict()
    del weights["norm.bias"]
    weights |= {"extra.a": torch.ones(1), "extra.b": torch.ones(1)}
    weights["pos_embed"] = weights["pos_embed"][:, :-1]
    weights["patch_embed.proj.weight"] = torch.ones(64, 3, 8, 8)  # timm would resample this
    with pytest.raises(CheckpointError) as error:
        load_tiny(saved(weights, tmp_path))
    for part in (
        "missing norm.bias",
        "left over extra.a",
        "left over extra.b",
        "pos_embed has shape (1, 100, 64), the model's (1, 101, 64)",
        "patch_embed.proj.weight has shape (64, 3, 8, 8)",
    ):
        assert part in str(error.value)


def test_what_is_not_known_of_clip_is_named(clip, tmp_path):
    weights = openai_layout(clip.state_dict())
    weights["visual.novelty"] = weights.pop("visual.proj")
    with pytest.raises(CheckpointError, match="left over novelty") as error:
        load_clip(saved(weights, tmp_path))
    assert "missing head.weight" in str(error.value)


def test_head_of_clip_must_be_a_projection(clip, tmp_path):
    weights = clip.state_dict() | {"head.bias": torch.ones(512)}
    with pytest.raises(CheckpointError, match=r"head.bias .* must be 0.*before fine-tuning"):
        load_clip(saved(weights, tmp_path))


def test_head_of_dino_s_training_is_left_over_in_clip(clip, tmp_path):
    weights = clip.state_dict() | {"head.mlp.0.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"left over head\.mlp\.0\.weight"):
        load_clip(saved(weights, tmp_path))


def test_code_in_a_file_is_not_run(tiny, tmp_path):
    class Sly:
        def __reduce__(self):
            return (zipfile.ZipFile, (str(tmp_path / "written"), "w"))

    path = saved({"model": tiny.state_dict(), "sly": Sly()}, tmp_path)
    with pytest.raises(CheckpointError, match="holds an object of zipfile"):
        load_tiny(path)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x02"])
def test_file_that_is_not_whole_is_refused(suffix, content, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a complete"):
        load_tiny(path)


def test_file_that_breaks_off_is_refused(tiny, tmp_path):
    path = saved(tiny.state_dict(), tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="is not a complete file.*fetch it anew"):
        load_tiny(path)


def test_weights_must_be_a_file_of_a_known_kind(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth does not exist.* Nothing is"):
        load_tiny(tmp_path / "absent.pth")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.pth.*got .*weights\.npz"):
        load_tiny(tmp_path / "weights.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "must hold a state dict, got Tensor"),
        ({}, "must hold a state dict"),
        ({"student": {"a": torch.ones(1)}, "epoch": 3}, "alone, .* got 'student'; save"),
    ],
)
def test_file_without_a_state_dict_is_refused(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_tiny(saved(content, tmp_path))
