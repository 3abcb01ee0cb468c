"""Encoders of whole clips, with a head for classification or without one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hpm_video.models.attentive import AttentivePooling
from hpm_video.models.pos_embed import Positions, position_table
from hpm_video.models.vit import LAYER_NORM_EPS, Transformer, TransformerSize, init_linear
from hpm_video.randomness import uniform
from hpm_video.targets import patchify
from hpm_video.token_grid import Size3, TokenGrid

Pooling = Literal["mean_norm", "batch_norm", "attentive"]
"""How the tokens of a clip become one vector. ``mean_norm``: their mean, then a layer norm, for
fine-tuning; there is none before it. ``batch_norm``: the mean of normed tokens, each value
standardised over the batch, for a linear probe. ``attentive``: a query that learns which of the
normed tokens to look at."""


Init = Literal["truncated_normal", "xavier"]
"""How linear layers start: ``truncated_normal`` with deviation 0.02, as VideoMAE's fine-tuning has,
or ``xavier``-uniform, as pre-training has. Narrow models trained from scratch need the latter."""


@dataclass(frozen=True)
class EncoderShape:
    """What an encoder is, apart from its weights."""

    grid: TokenGrid
    patch_size: Size3
    size: TransformerSize
    positions: Positions
    source_grid: TokenGrid | None = None
    """Grid of pre-training, in which tokens have their positions; by default ``grid``."""
    channels: int = 3


class ClipEncoder(nn.Module):
    """All tokens of a clip through a transformer. Its weights are named as the autoencoder's."""

    def __init__(
        self,
        shape: EncoderShape,
        *,
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
        final_norm: bool = True,
        init: Init = "truncated_normal",
    ) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.size.dim
        self.patch_embed = nn.Linear(shape.channels * math.prod(shape.patch_size), dim)
        self.encoder = Transformer(
            shape.size,
            drop_path=drop_path,
            checkpoint_activations=checkpoint_activations,
            final_norm=final_norm,
        )
        self.encoder_pos: Tensor
        table = position_table(shape.grid, dim, shape.positions, shape.source_grid)
        self.register_buffer("encoder_pos", table, persistent=False)
        self.encoder.apply(INITS[init])

    def encode(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:
        """Tokens of normalised clips: (B, C, T, H, W), (B,) keys -> (B, N, D)

        The keys decide which residual branches stochastic depth drops; without them, none.
        """
        tokens = self.patch_embed(patchify(clips, self.shape.patch_size)) + self.encoder_pos
        out: Tensor = self.encoder(tokens, self.encoder.draws(keys))
        return out

    def pool(self, tokens: Tensor) -> Tensor:
        """One vector for each clip: (B, N, D) -> (B, D)"""
        return tokens.mean(dim=1)

    @property
    def num_layers(self) -> int:
        """Of :meth:`layer_of`, and one: the patch embedding, the blocks and what follows them."""
        return len(self.encoder.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Depth of a parameter: 0 the patch embedding, k + 1 block k, and above all, the rest."""
        if name.startswith("patch_embed."):
            return 0
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return self.num_layers - 1


class VideoClassifier(ClipEncoder):
    """An encoder, pooling and a linear head.

    As VideoMAE fine-tunes: no class token, the mean over tokens and a new layer norm behind it, a
    head that starts near 0.
    """

    def __init__(  # noqa: PLR0913 - each is a switch of the architecture
        self,
        shape: EncoderShape,
        num_classes: int,
        *,
        pooling: Pooling = "mean_norm",
        frozen: bool = False,
        head_dropout: float = 0.0,
        head_init_scale: float = 0.001,
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
        init: Init = "truncated_normal",
    ) -> None:
        """``frozen``: the encoder stays as it is, only what follows it learns."""
        super().__init__(
            shape,
            drop_path=drop_path,
            checkpoint_activations=checkpoint_activations,
            final_norm=pooling != "mean_norm",
            init=init,
        )
        dim = shape.size.dim
        self.pooling = _make_pooling(pooling, shape.size)
        self.pooling.apply(INITS[init])
        self.head = nn.Linear(dim, num_classes)
        self.head_dropout = head_dropout
        self.frozen = frozen
        INITS[init](self.head)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(head_init_scale)
        if frozen:
            self.patch_embed.requires_grad_(requires_grad=False)
            self.encoder.requires_grad_(requires_grad=False)

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
    """The mean over tokens, then a layer norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)"""
        normed: Tensor = self.norm(tokens.mean(dim=1))
        return normed


class MeanBatchNorm(nn.Module):
    """The mean over tokens, standardised over the batch without weights of its own.

    In training by the batch's own statistics, otherwise by their running average.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)"""
        normed: Tensor = self.norm(tokens.mean(dim=1).float())
        return normed


def _make_pooling(pooling: Pooling, size: TransformerSize) -> nn.Module:
    if pooling == "attentive":
        return AttentivePooling(size.dim, size.num_heads)
    return MeanNorm(size.dim) if pooling == "mean_norm" else MeanBatchNorm(size.dim)


def _init_truncated_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


INITS: dict[Init, Callable[[nn.Module], None]] = {
    "truncated_normal": _init_truncated_normal,
    "xavier": init_linear,
}
