"""A classifier of whole clips: an encoder, pooling and a linear head."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hpm_video.config.model import ClassifierConfig
from hpm_video.models.encoder import INITS, ClipEncoder
from hpm_video.models.vit import LAYER_NORM_EPS, init_linear
from hpm_video.randomness import uniform
from hpm_video.tokens.grid import TokenGrid


class ClipClassifier(ClipEncoder):
    """An encoder, pooling and a linear head.

    As MAE and VideoMAE fine-tune: the mean over tokens, a new layer norm behind it, and a head that
    starts near 0.
    """

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
        self.pooling = _make_pooling(settings)
        self.pooling.apply(INITS[settings.init])
        self.head = nn.Linear(settings.encoder.dim, num_classes)
        self.head_dropout = settings.head_dropout
        self.frozen = settings.frozen
        INITS[settings.init](self.head)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(settings.head_init_scale)
        if self.frozen:
            self.patch_embed.requires_grad_(requires_grad=False)
            self.encoder.requires_grad_(requires_grad=False)
            if self.class_token is not None:
                self.class_token.requires_grad = False

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
        logits: Tensor = self.head(pooled)
        return logits

    def pool(self, tokens: Tensor) -> Tensor:
        """What the head sees of each clip: (B, N, D) -> (B, D)"""
        pooled: Tensor = self.pooling(tokens)
        return pooled


class MeanNorm(nn.Module):
    """The mean over the tokens behind the first ``num_prefix``, then a layer norm."""

    def __init__(self, dim: int, num_prefix: int) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, num_prefix + N, D) -> (B, D)"""
        normed: Tensor = self.norm(tokens[:, self.num_prefix :].mean(dim=1))
        return normed


class BatchNorm(nn.Module):
    """The mean over some tokens, standardised over the batch without weights of its own.

    In training by the batch's own statistics, otherwise by their running average.
    """

    def __init__(self, dim: int, chosen: slice) -> None:
        super().__init__()
        self.chosen = chosen
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, ., D) -> (B, D)"""
        normed: Tensor = self.norm(tokens[:, self.chosen].mean(dim=1).float())
        return normed


class FirstToken(nn.Module):
    """The class token as it is."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1 + N, D) -> (B, D)"""
        return tokens[:, 0]


class AttentivePooling(nn.Module):
    """One learned query attends over the tokens of a clip; then a residual MLP.

    Keys and values have no bias: the softmax ignores one on the keys, and the weights of the
    values sum to 1, so that a bias on them would add to that of ``proj``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
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


def _make_pooling(settings: ClassifierConfig) -> nn.Module:
    dim, prefix = settings.encoder.dim, int(settings.class_token)
    if settings.pooling == "mean_norm":
        return MeanNorm(dim, prefix)
    if settings.pooling == "batch_norm":
        return BatchNorm(dim, slice(0, 1) if prefix else slice(None))
    if settings.pooling == "attentive":
        return AttentivePooling(dim, settings.encoder.num_heads)
    return FirstToken()
