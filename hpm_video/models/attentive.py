"""A clip's tokens pooled to one vector by attention, for the attentive probe."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hpm_video.models.vit import LAYER_NORM_EPS, init_linear


class AttentivePooling(nn.Module):
    """One learned query attends over the tokens of a clip; then a residual MLP.

    Keys and values have no bias: the softmax ignores one on the keys, and the weights of the
    values sum to 1, so that a bias on them would add to that of ``proj``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if min(dim, num_heads) < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads must divide dim, got dim {dim} and num_heads {num_heads}; take the "
                f"heads of the encoder"
            )
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(dim))
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.apply(init_linear)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)"""
        pooled = self.attend(self.norm1(tokens))
        out: Tensor = pooled + self.mlp(self.norm2(pooled))
        return out

    def attend(self, tokens: Tensor) -> Tensor:
        """The attention alone, over tokens that are normed: (B, N, D) -> (B, D)"""
        query = self.query.expand(tokens.shape[0], 1, -1)
        q, k, v = (
            rearrange(values, "b n (h d) -> b h n d", h=self.num_heads)
            for values in (self.q(query), self.k(tokens), self.v(tokens))
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(rearrange(heads, "b h 1 d -> b (h d)"))
        return out
