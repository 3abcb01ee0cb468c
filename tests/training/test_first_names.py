"""Old names and layouts of weights. tests/first_house checks them on whole runs."""

import pytest
import torch
from safetensors.torch import save_file

from hpm_video.files.first_names import by_current_names
from hpm_video.training.checkpoint import read_optimizer, read_weights

PATCH = (2, 4, 4)
PLAIN = {
    "encoder.blocks.10.norm1.weight": "blocks.10.norm1.weight",
    "encoder.blocks.0.mlp.0.bias": "blocks.0.mlp.fc1.bias",
    "encoder.blocks.0.mlp.2.weight": "blocks.0.mlp.fc2.weight",
    "encoder.norm.bias": "norm.bias",
    "patch_embed.bias": "patch_embed.proj.bias",
    "to_decoder.weight": "decoder_embed.weight",
    "pixel_decoder.transformer.norm.bias": "reconstructor.norm.bias",
    "reconstructor.transformer.blocks.1.mlp.0.weight": "reconstructor.blocks.1.mlp.fc1.weight",
    "difficulty_decoder.transformer.blocks.0.norm2.bias": "difficulty_decoder.blocks.0.norm2.bias",
    "difficulty_decoder.head.bias": "difficulty_decoder.head.bias",
    "head.weight": "head.weight",
    "pooling.norm.weight": "fc_norm.weight",
    "pooling.norm.running_mean": "head_norm.running_mean",
    "pooling.norm.num_batches_tracked": "head_norm.num_batches_tracked",
    "pooling.norm1.bias": "attn_pool.norm1.bias",
    "pooling.k.weight": "attn_pool.k.weight",
    "pooling.mlp.2.bias": "attn_pool.mlp.fc2.bias",
}
RESHAPED = {
    "class_token": ("cls_token", (6,), (1, 1, 6)),
    "mask_token": ("mask_token", (4,), (1, 1, 4)),
    "pooling.query": ("attn_pool.latent", (6,), (1, 1, 6)),
    "encoder_positions.table": ("pos_embed", (8, 6), (1, 8, 6)),
    "decoder_positions.table": ("decoder_pos_embed", (8, 4), (1, 8, 4)),
}


def current(stored):
    return by_current_names(stored, PATCH)


def test_old_names_become_timms_and_timms_stay():
    stored = {name: torch.rand(2) for name in PLAIN}
    found = current(stored)
    assert list(found) == list(PLAIN.values())
    assert all(torch.equal(found[PLAIN[name]], value) for name, value in stored.items())
    assert current(found) == found


@pytest.mark.parametrize("name", RESHAPED)
def test_tokens_and_tables_get_the_axes_of_a_batch(name):
    now, before, after = RESHAPED[name]
    value = torch.rand(before)
    found = current({name: value})
    assert torch.equal(found[now], value.view(after))
    assert current(found)[now] is found[now]


@pytest.mark.parametrize("channels", [3, 5])
def test_the_patch_embedding_becomes_the_weight_of_a_convolution(channels):
    weight = torch.rand(7, channels, *PATCH)
    flat = weight.permute(0, 2, 3, 4, 1).reshape(7, -1)
    found = current({"patch_embed.weight": flat})["patch_embed.proj.weight"]
    assert torch.equal(found, weight)
    assert found.is_contiguous(), "fused optimizers depend on the layout of moments"
    other = torch.rand(7, 33)
    assert current({"patch_embed.weight": other})["patch_embed.proj.weight"] is other


@pytest.mark.parametrize("with_keys", [False, True])
def test_biases_of_queries_keys_and_values_are_joined(with_keys, tmp_path):
    """This holds for weights and for moments, whose missing keys' part starts at 0."""
    q, k, v = torch.rand(3, 4)
    at = "reconstructor.transformer.blocks.3.attn."
    stored = {f"{at}q_bias": q, f"{at}v_bias": v, **({f"{at}k_bias": k} if with_keys else {})}
    expected = torch.cat([q, k if with_keys else torch.zeros(4), v])
    save_file(stored, tmp_path / "teacher.safetensors")
    moments = {f"exp_avg.{name}": value for name, value in stored.items()}
    save_file(moments, tmp_path / "optimizer.safetensors", {"step": "3"})
    for found in (
        read_weights(tmp_path, PATCH, "teacher"),
        read_optimizer(tmp_path, PATCH).moments["exp_avg"],
    ):
        assert list(found) == ["reconstructor.blocks.3.attn.qkv.bias"]
        assert torch.equal(found["reconstructor.blocks.3.attn.qkv.bias"], expected)
