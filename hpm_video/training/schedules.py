"""The learning rate over a run."""

import math
from dataclasses import dataclass
from typing import Protocol

from hpm_video.config.training import RecipeConfig
from hpm_video.training.progress import Progress


class Schedule(Protocol):
    """The learning rate of every update."""

    @property
    def peak(self) -> float:
        """The largest, for the log."""

    def at(self, progress: Progress) -> float:
        """The learning rate of the update that follows ``progress``."""


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from 0, then half a cosine; set per update, at the fractional epoch."""

    peak: float
    final: float
    warmup_epochs: float

    def at(self, progress: Progress) -> float:
        epoch, epochs = progress.exact_epoch, progress.epochs
        if epoch < self.warmup_epochs:
            return self.peak * epoch / self.warmup_epochs
        done = min((epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9), 1.0)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * done))


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """The linear scaling rule: ``base_lr`` is for 256 videos per update (Goyal et al., 2017)."""
    return base_lr * batch_size / 256


def schedule_of(recipe: RecipeConfig) -> Schedule:
    """The schedule of a recipe. A further one is a class here, chosen by a field of the recipe."""
    return WarmupCosine(
        peak=scaled_lr(recipe.base_lr, recipe.batch_size),
        final=scaled_lr(recipe.min_lr, recipe.batch_size),
        warmup_epochs=recipe.warmup_epochs,
    )
