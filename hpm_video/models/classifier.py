"""A classifier of whole clips: an encoder, pooling and a linear head."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hpm_video.config.model import ClassifierConfig
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.vit import LAYER_NORM_EPS, init_linear, make_mlp
from hpm_video.randomness import uniform
from hpm_video.tokens.grid import TokenGrid


class ClipClassifier(ClipEncoder):
    """An encoder, pooling and a linear head, which starts near 0 as in MAE and VideoMAE."""

    def __init__(
        self,
        settings: ClassifierConfig,
        num_classes: int,
        grid: TokenGrid,
        source_grid: TokenGrid | None = None,
    ) -> None:
        super().__init__(
            settings,
            grid,
            source_grid=source_grid,
            final_norm=settings.pooling != "mean_norm",
            init=settings.init,
        )
        self.requires_grad_(not settings.frozen)
        self.frozen, self.pooling = settings.frozen, settings.pooling
        dim = settings.encoder.dim
        if self.pooling == "mean_norm":
            self.fc_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        elif self.pooling == "batch_norm":
            self.head_norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        elif self.pooling == "attentive":
            self.attn_pool = AttentivePooling(dim, settings.encoder.num_heads)
            init_linear(self.attn_pool, settings.init)
        self.head_dropout = settings.head_dropout
        self.head = nn.Linear(dim, num_classes)
        init_linear(self.head, settings.init)
        with torch.no_grad():
            self.head.weight.mul_(settings.head_init_scale)

    def forward(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:
        """Class scores (logits) of normalised clips: (B, C, T, H, W), (B,) keys -> (B, classes)

        The keys decide what stochastic depth and head dropout drop; without them, nothing.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.encode(clips, None if self.frozen else keys)
        pooled = self.pool(tokens)
        if keys is not None and self.head_dropout > 0:
            kept = uniform(keys, pooled.shape[1], "head dropout") >= self.head_dropout
            pooled = pooled * kept / (1 - self.head_dropout)
        return self.head(pooled)

    def pool(self, tokens: Tensor) -> Tensor:
        """What the head sees of each clip: (B, ., D) -> (B, D)"""
        if self.pooling == "attentive":
            return self.attn_pool(tokens)
        if self.pooling == "mean_norm":
            return self.fc_norm(self.of_clip(tokens).mean(dim=1))
        pooled = super().pool(tokens)
        return self.head_norm(pooled.float()) if self.pooling == "batch_norm" else pooled


class AttentivePooling(nn.Module):
    """One learned query attends over the tokens of a clip; then a residual MLP.

    Keys and values have no bias: the softmax ignores one on the keys, and the weights of the
    values sum to 1, so that a bias on them would add to that of ``proj``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = make_mlp(dim, 4 * dim)
        init_linear(self)
        nn.init.trunc_normal_(self.latent, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens: (B, N, D) -> (B, D)"""
        pooled = self.attend(self.norm1(tokens))
        return pooled + self.mlp(self.norm2(pooled))

    def attend(self, tokens: Tensor) -> Tensor:
        """The attention alone, over tokens that are normed: (B, N, D) -> (B, D)"""
        query = self.latent.expand(tokens.shape[0], -1, -1)
        q, k, v = (
            rearrange(values, "b n (h d) -> b h n d", h=self.num_heads)
            for values in (self.q(query), self.k(tokens), self.v(tokens))
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(heads, "b h 1 d -> b (h d)"))
