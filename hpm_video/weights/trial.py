"""Random clips, what models say of them, and how far apart that is."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.encoder_shape import EncoderShape
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.tokens.grid import Size3
from hpm_video.tokens.masking import STRATEGIES, MaskRule, TokenMask, count_masked

Said = dict[str, Tensor]
SMALLEST = 1e-6
"""A largest value that is smaller than this counts as this."""


@dataclass(frozen=True)
class Trial:
    """Clips, and which of their tokens are hidden from a masked autoencoder."""

    clips: Tensor
    """(B, C, T, H, W)"""
    noise: Tensor
    """(B, N) the lowest stay visible"""
    mask: TokenMask


@dataclass(frozen=True)
class Difference:
    """Of what two models say about the same clip."""

    of: str
    largest: float
    largest_value: float
    """Of the other implementation."""

    @property
    def share(self) -> float:
        """The difference as a share of the largest value; scores may all be small."""
        return self.largest / max(SMALLEST, self.largest_value)


def make_trial(
    shape: EncoderShape, clip_size: Size3, mask_ratio: float, clips: int = 1, seed: int = 0
) -> Trial:
    """Clips of noise, and a mask of this share of their tokens."""
    grid = shape.grid
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.rand(clips, grid.num_tokens, generator=generator)
    num_masked = count_masked(grid.num_tokens, mask_ratio, "hpm")
    rule = MaskRule(grid, "token", num_masked, STRATEGIES["random"])
    return Trial(
        random_clips(shape.channels, clip_size, clips, seed),
        noise,
        rule.draw(None, noise, num_picked=0),
    )


def random_clips(channels: int, clip_size: Size3, count: int, seed: int = 0) -> Tensor:
    """Normalised clips of noise: -> (B, C, T, H, W)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, *clip_size, generator=generator)


@torch.no_grad()
def said_by(model: nn.Module, trial: Trial) -> Said:
    """What a model of ours says of them."""
    if isinstance(model, ClipClassifier):
        return {"logits": model(trial.clips)}
    assert isinstance(model, MaskedAutoencoder)
    predicted = model(trial.clips, trial.mask)
    tokens = model.encode(trial.clips)
    said = {"tokens": tokens, "hidden patches": predicted.content, "features": model.pool(tokens)}
    return said if predicted.difficulty is None else said | {"difficulty": predicted.difficulty}


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[Difference, ...]:
    """Of everything that the other model says."""
    return tuple(
        Difference(
            name,
            (ours[name] - value).abs().max().item(),
            value.abs().max().item(),
        )
        for name, value in theirs.items()
    )
