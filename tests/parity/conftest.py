"""Weights of VideoMAE in transformers, copied into our transformer."""

from collections.abc import Callable, Iterable

import pytest
import torch
from einops import rearrange
from torch import nn

from hpm_video.models.vit import Transformer


@torch.no_grad()
def _copy_blocks(ours: Transformer, layers: Iterable[nn.Module]) -> None:
    for block, layer in zip(ours.blocks, layers, strict=True):
        qkv = layer.attention.attention
        block.attn.qkv.weight.copy_(torch.cat([qkv.query.weight, qkv.key.weight, qkv.value.weight]))
        assert qkv.key.bias is None
        block.attn.q_bias.copy_(qkv.query.bias)
        block.attn.v_bias.copy_(qkv.value.bias)
        block.attn.proj.load_state_dict(layer.attention.output.dense.state_dict())
        block.mlp[0].load_state_dict(layer.intermediate.dense.state_dict())
        block.mlp[2].load_state_dict(layer.output.dense.state_dict())
        block.norm1.load_state_dict(layer.layernorm_before.state_dict())
        block.norm2.load_state_dict(layer.layernorm_after.state_dict())


@torch.no_grad()
def _copy_patch_embed(ours: nn.Linear, theirs: nn.Conv3d) -> None:
    weight = rearrange(theirs.weight, "d c pt ph pw -> d (pt ph pw c)")
    ours.load_state_dict({"weight": weight, "bias": theirs.bias})


@pytest.fixture(scope="session")
def copy_blocks() -> Callable[[Transformer, Iterable[nn.Module]], None]:
    return _copy_blocks


@pytest.fixture(scope="session")
def copy_patch_embed() -> Callable[[nn.Linear, nn.Conv3d], None]:
    return _copy_patch_embed
