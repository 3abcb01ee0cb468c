"""A classifier of whole clips: an encoder, pooling and a linear head."""

import torch
from torch import Tensor, nn

from hpm_video.config.choices import Init, Pooling
from hpm_video.models.attentive import AttentivePooling
from hpm_video.models.encoder import INITS, ClipEncoder, EncoderShape
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.randomness import uniform


class ClipClassifier(ClipEncoder):
    """An encoder, pooling and a linear head.

    As MAE and VideoMAE fine-tune: the mean over tokens, a new layer norm behind it, and a head that
    starts near 0.
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
        self.pooling = _make_pooling(pooling, shape)
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


def _make_pooling(pooling: Pooling, shape: EncoderShape) -> nn.Module:
    dim = shape.size.dim
    if pooling == "mean_norm":
        return MeanNorm(dim, shape.num_prefix)
    if pooling == "batch_norm":
        return BatchNorm(dim, slice(0, 1) if shape.class_token else slice(None))
    if pooling == "attentive":
        return AttentivePooling(dim, shape.size.num_heads)
    if not shape.class_token:
        raise ValueError(
            "pooling 'class_token' needs an encoder with a class token; take mean_norm, "
            "batch_norm or attentive"
        )
    return FirstToken()
