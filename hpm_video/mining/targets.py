"""Targets of reconstruction: the pixels of hidden tokens, or features that a model computes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from hpm_video.mining.losses import direction_errors, reconstruction_errors
from hpm_video.tokens.grid import Size3
from hpm_video.tokens.masking import TokenMask
from hpm_video.tokens.patches import (
    PatchStatistics,
    TargetKind,
    normalise,
    patch_mean_errors,
    patch_statistics,
    patchify,
    standardise,
    to_unit_range,
)


@dataclass(frozen=True)
class Target(ABC):
    """What is reconstructed of hidden tokens, and the error of a reconstruction."""

    patch_size: Size3
    mean: tuple[float, ...]  # of each channel, for the normalisation of pixels in [0, 1]
    std: tuple[float, ...]

    baseline = ""  # the simplest good prediction, whose error is to be beaten
    of_teacher = False  # whether it consists of the tokens of the teacher's encoder

    def features(self, clips: Tensor) -> Tensor | None:  # noqa: ARG002
        """Features by another model, where there is one: (B, C, T, H, W) uint8 -> (B, N, P)"""
        return None

    @abstractmethod
    def of(self, clips: Tensor, mask: TokenMask, features: Tensor | None = None) -> Tensor:
        """Targets of the hidden tokens: (B, C, T, H, W) uint8, (B, N, P) -> (B, M, P)

        ``features`` of all tokens, where it takes any: the teacher's, or those of :meth:`features`.
        """

    @abstractmethod
    def errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Error of each token: (B, M, P), (B, M, P) -> (B, M) float32"""

    @abstractmethod
    def baseline_errors(self, target: Tensor) -> Tensor:
        """Error of the baseline: (B, M, P) -> (B, M)"""


@dataclass(frozen=True)
class PixelTarget(Target):
    """The pixels of patches, as they are or standardised."""

    kind: TargetKind

    baseline = "the patch mean"

    def patches(self, clips: Tensor, mask: TokenMask | None = None) -> Tensor:
        """Patches, of hidden tokens if masked: (B, C, T, H, W) uint8 -> (B, N or M, P) float32"""
        patches = patchify(clips, self.patch_size)
        if mask is not None:
            patches = mask.take_masked(patches)
        pixels = rearrange(patches, "b n (p c) -> b n p c", c=len(self.mean))
        if self.kind == "per_channel":
            pixels = to_unit_range(pixels)
        else:
            pixels = normalise(pixels, self.mean, self.std, channel_axis=-1)
        return rearrange(pixels, "b n p c -> b n (p c)")

    def to_pixels(self, patches: Tensor) -> Tensor:
        """Undo :meth:`patches`: (B, M, P) -> (B, M, P) uint8"""
        pixels = rearrange(patches, "b m (p c) -> b m p c", c=len(self.mean))
        if self.kind != "per_channel":
            pixels = pixels * pixels.new_tensor(self.std) + pixels.new_tensor(self.mean)
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        return rearrange(pixels, "b m p c -> b m (p c)")

    def statistics(self, patches: Tensor) -> PatchStatistics:
        """Mean and scale that make targets of patches: (B, N, P) -> 2 x (B, N, .)"""
        return patch_statistics(patches, self.kind, len(self.mean))

    @override
    def of(self, clips: Tensor, mask: TokenMask, features: Tensor | None = None) -> Tensor:
        return standardise(self.patches(clips, mask), self.kind, len(self.mean))

    @override
    def errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        return reconstruction_errors(predicted, target)

    @override
    def baseline_errors(self, target: Tensor) -> Tensor:
        return patch_mean_errors(target, len(self.mean))


@dataclass(frozen=True)
class FeatureTarget(Target):
    """The direction of a model's feature of each token: an ablation of the paper."""

    # (B, C, T, H, W) uint8 -> (B, N, P); none: the teacher's own encoder (the paper's EMA)
    model: Callable[[Tensor], Tensor] | None

    baseline = "the mean direction"

    @property
    def of_teacher(self) -> bool:  # type: ignore[override]
        return self.model is None

    @override
    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor | None:
        return None if self.model is None else self.model(clips)

    @override
    def of(self, clips: Tensor, mask: TokenMask, features: Tensor | None = None) -> Tensor:
        if features is None:
            raise ValueError("targets are features, and none were computed for these clips")
        return mask.take_masked(features.float())

    @override
    def errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        return direction_errors(predicted, target)

    @override
    def baseline_errors(self, target: Tensor) -> Tensor:
        mean = F.normalize(target.float(), dim=-1).mean(dim=1, keepdim=True)
        return direction_errors(mean.expand_as(target), target)


TARGETS: dict[str, Callable[[Size3, tuple[float, ...], tuple[float, ...]], Target]] = {
    **{kind: partial(PixelTarget, kind=kind) for kind in get_args(TargetKind)},
    "ema": partial(FeatureTarget, model=None),
}
"""Targets by ``mining.target``, except those that need the weights of another model."""
