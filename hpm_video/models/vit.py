"""The plain vision transformer that encoder and decoders are; its parameters have timm's names."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpm_video.config.choices import Init, TransformerSize
from hpm_video.randomness import uniform

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention.

    The softmax ignores the keys' part of the bias, which shifts all scores of a query alike.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.qkv.bias = nn.Parameter(torch.zeros(3 * dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        q, k, v = rearrange(
            self.qkv(tokens), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(heads, "b h n d -> b n (h d)"))


def make_mlp(dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers with a GELU in between."""
    fc1, fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    return nn.Sequential(OrderedDict[str, nn.Module](fc1=fc1, act=nn.GELU(), fc2=fc2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        dim = size.dim
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, size.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = make_mlp(dim, size.mlp_dim or 4 * dim)

    def forward(self, tokens: Tensor, scales: Tensor | None = None) -> Tensor:
        """(B, N, D), (B, 2) scales of both residual branches or none for 1 -> (B, N, D)"""
        attended = self.attn(self.norm1(tokens))
        if scales is not None:
            attended = attended * scales[:, 0, None, None]
        tokens = tokens + attended.type_as(tokens)
        passed = self.mlp(self.norm2(tokens))
        if scales is not None:
            passed = passed * scales[:, 1, None, None]
        return tokens + passed.type_as(tokens)


class Transformer(nn.Module):
    """Blocks and the norm behind them (``final_norm=False``: none).

    Stochastic depth (Huang et al., 2016) drops residual branches of single samples, with a chance
    that rises linearly over the blocks to ``drop_path``. Draws are given, by the sample alone.
    """

    def __init__(
        self,
        size: TransformerSize,
        *,
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.rates = [drop_path * i / max(size.depth - 1, 1) for i in range(size.depth)]
        self.blocks = nn.ModuleList(Block(size) for _ in self.rates)  # alike: compiled only once
        self.norm = nn.LayerNorm(size.dim, eps=LAYER_NORM_EPS) if final_norm else nn.Identity()
        self.drop_path = drop_path
        self.bf16_residual = False
        self.checkpoint_activations = checkpoint_activations

    def draws(self, keys: Tensor | None) -> Tensor | None:
        """The draws of samples with these keys, if they are needed: (B,) -> (B, 2 depth)"""
        if keys is None or self.drop_path == 0:
            return None
        return uniform(keys, 2 * len(self.blocks), "drop path")

    def run_blocks(self, tokens: Tensor, draws: Tensor | None = None) -> Tensor:
        """All but the norm: (B, N, D), (B, 2 depth) draws or none to drop nothing -> (B, N, D)"""
        if self.bf16_residual and torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.bfloat16()
        for i, (block, rate) in enumerate(zip(self.blocks, self.rates, strict=True)):
            scales = None
            if draws is not None:
                scales = (draws[:, 2 * i : 2 * i + 2] >= rate) / (1 - rate)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Nothing random happens inside a block, so there is no generator to restore.
                tokens = checkpoint(  # type: ignore[bad-assignment]
                    block, tokens, scales, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, scales)
        return tokens


def init_linear(module: nn.Module, init: Init = "xavier") -> None:
    """Draw the weights of all linear layers in a module, and set their biases to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if init == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
