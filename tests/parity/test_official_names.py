"""Files with the official names against models of transformers, by an independent table of names.

So a mistake in the package's own table cannot cancel out: our model, with a file that holds random
weights by their official names, must compute what transformers computes with these weights.
"""

import re

import pytest
import torch
from torch import nn

from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import import_weights
from hpm_video.weights.verify import outputs_of, trial_of

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-6,
}
DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 96,
}
MODELS = {
    "videomae": ("VideoMAEForPreTraining", {"num_frames": 4, "use_mean_pooling": False, **DECODER}),
    "videomae_classifier": (
        "VideoMAEForVideoClassification",
        {"num_frames": 4, "use_mean_pooling": True, "num_labels": 3},
    ),
    "mae": ("ViTMAEForPreTraining", DECODER),
    "hpm": ("ViTMAEForPreTraining", DECODER),
    "vit_classifier": ("ViTForImageClassification", {"num_labels": 3}),
}
OVERRIDES = Overrides(heads=4, decoder_heads=2, num_frames=4, frame_size=(32, 32))
BLOCKS = (
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"(?<!attention)\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.attention\.([qv])_bias$", r".attn.\1.bias"),
)
VIDEOMAE = (
    (r"^videomae\.embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^videomae\.encoder\.layer\.", "encoder.blocks."),
    (r"^videomae\.layernorm\.", "encoder.norm."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
)
IMAGES = (
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.(encoder\.layer|layers)\.", "blocks."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.decoder_(embed|norm|pred|pos_embed)", r"decoder_\1"),
    (r"^classifier\.", "head."),
)
NAMES = {
    "videomae": VIDEOMAE,
    "videomae_classifier": (
        *((theirs, official.removeprefix("encoder.")) for theirs, official in VIDEOMAE),
        (r"^classifier\.", "head."),
    ),
    "mae": IMAGES,
    "hpm": IMAGES,
    "vit_classifier": IMAGES,
}


def official(name, state):
    """Tensors of transformers, renamed as in the official projects."""
    found = {}
    for key, value in state.items():
        for pattern, replacement in (*BLOCKS, *NAMES[name]):
            key = re.sub(pattern, replacement, key)
        found[key] = value.detach().clone()
    for key in [key for key in found if ".attn.q." in key]:
        parts = [found.pop(key.replace(".q.", f".{part}."), None) for part in "qkv"]
        if key.endswith("weight") or not name.startswith("videomae"):
            found[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        else:
            assert parts[1] is None
            found |= {
                key.replace(".q.bias", f".{p}_bias"): parts[i] for i, p in ((0, "q"), (2, "v"))
            }
    return found


@pytest.fixture
def model_of():
    def make(name, seed=0):
        kind, options = MODELS[name]
        config = re.sub("For.*", "Config", kind)
        model = getattr(transformers, kind)(
            getattr(transformers, config)(**SIZES, **options)
        ).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-6
        return model

    return make


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_files_of_official_names_compute_what_transformers_does(model_of, tmp_path, name):
    model = model_of(name)
    state = official(name, model.state_dict())
    if name == "hpm":
        other = model_of(name, seed=1)
        decoder = other.decoder.state_dict()
        for key, value in model.state_dict().items():
            if key.startswith(("vit.", "decoder.mask_token", "decoder.decoder_embed.")):
                other.state_dict()[key].copy_(value)
        for key, value in official(name, {f"decoder.{k}": v for k, v in decoder.items()}).items():
            if key.startswith(("decoder_blocks", "decoder_norm", "decoder_pred")):
                state[re.sub(r"^(decoder_[a-z]+)", r"\1_losspred", key)] = value
    torch.save({"model": state}, tmp_path / "file.pth")
    imported = import_weights(tmp_path / "file.pth", OVERRIDES)
    assert imported.family.name == name
    trial = trial_of(imported.model)
    ours, theirs = outputs_of(imported.model.build(), trial), outputs_of(model, trial)
    if name == "hpm":
        theirs["difficulty"] = outputs_of(other, trial)["hidden patches"].mean(dim=-1)
    compared = ours.keys() & theirs.keys()
    assert len(compared) == {"videomae": 2, "mae": 2, "hpm": 3}.get(name, 1)
    for key in compared:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-5)
