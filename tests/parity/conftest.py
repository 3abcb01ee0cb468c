"""Weights of VideoMAE in transformers, copied into our transformer."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from hpm_video.models.vit import Transformer


@torch.no_grad()
def _copy_blocks(ours: Transformer, layers: Iterable[nn.Module]) -> None:
    for block, layer in zip(ours.blocks, layers, strict=True):
        qkv = layer.attention.attention
        block.attn.qkv.weight.copy_(torch.cat([qkv.query.weight, qkv.key.weight, qkv.value.weight]))
        assert qkv.key.bias is None
        no_bias = torch.zeros_like(qkv.query.bias)
        block.attn.qkv.bias.copy_(torch.cat([qkv.query.bias, no_bias, qkv.value.bias]))
        block.attn.proj.load_state_dict(layer.attention.output.dense.state_dict())
        block.mlp.fc1.load_state_dict(layer.intermediate.dense.state_dict())
        block.mlp.fc2.load_state_dict(layer.output.dense.state_dict())
        block.norm1.load_state_dict(layer.layernorm_before.state_dict())
        block.norm2.load_state_dict(layer.layernorm_after.state_dict())


@pytest.fixture(scope="session")
def copy_blocks() -> Callable[[Transformer, Iterable[nn.Module]], None]:
    return _copy_blocks
