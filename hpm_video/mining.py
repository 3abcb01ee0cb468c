"""Hard patches mining: the teacher says where it is hard, the student is asked there.

teacher (moving average) --difficulty--> mask --> student --> pixels, difficulty
                                                     |
                      reconstruction + ranking loss <-+-> the student's own errors
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from hpm_video.data.dataset import ClipBatch
from hpm_video.losses import (
    PredictorObjective,
    ranking_loss,
    reconstruction_errors,
    regression_loss,
)
from hpm_video.masking import MaskRule, TokenMask
from hpm_video.models.masked_autoencoder import MaskedAutoencoder, Prediction
from hpm_video.pixels import normalise, to_unit_range
from hpm_video.progress import Progress
from hpm_video.randomness import uniform
from hpm_video.targets import (
    PatchStatistics,
    TargetKind,
    patch_mean_errors,
    patch_statistics,
    patchify,
    standardise,
)
from hpm_video.token_grid import Size3
from hpm_video.training.objective import Losses, Model
from hpm_video.training.teacher import MomentumSchedule, follow


@dataclass(frozen=True)
class TargetRule:
    """How pixels become the target of the reconstruction."""

    kind: TargetKind
    patch_size: Size3
    mean: tuple[float, ...]
    """Of each channel, pixels being in [0, 1]."""
    std: tuple[float, ...]

    def patches(self, clips: Tensor, mask: TokenMask | None = None) -> Tensor:
        """Patches that targets are made of: (B, C, T, H, W) uint8 -> (B, N or M, P) float32

        Of the hidden tokens where a mask is given, of all of them otherwise.
        """
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

    def of(self, clips: Tensor, mask: TokenMask) -> Tensor:
        """Targets of the hidden tokens: (B, C, T, H, W) uint8 -> (B, M, P)"""
        return standardise(self.patches(clips, mask), self.kind, len(self.mean))


class Examination(NamedTuple):
    """What the student makes of a batch under one random mask."""

    mask: TokenMask
    difficulty: Tensor | None
    """(B, M) what the student predicts of them; none without a predictor."""
    errors: Tensor
    """(B, M) reconstruction errors."""
    mean_errors: Tensor
    """(B, M) errors of predicting the mean of each patch and channel."""


class HardPatchesMining:
    """The objective of pre-training. Without a teacher it trains a plain masked autoencoder."""

    def __init__(
        self,
        masks: MaskRule,
        targets: TargetRule,
        *,
        predictor: PredictorObjective,
        predictor_weight: float,
        teacher: MaskedAutoencoder | None,
        momentum: MomentumSchedule,
    ) -> None:
        """Take the rules of the method.

        Raises:
            ValueError: masks are to be picked by difficulty, but nothing predicts it.
        """
        if masks.strategy.picks and predictor == "none":
            raise ValueError(
                "a mask strategy that picks by difficulty needs a loss predictor: take "
                "masking.strategy=random, or mining.predictor=relative or absolute"
            )
        if (teacher is None) != (predictor == "none"):
            raise ValueError(f"predictor {predictor!r} with teacher {type(teacher).__name__}")
        self.masks = masks
        self.targets = targets
        self.teacher = teacher
        self._predictor = predictor
        self._predictor_weight = predictor_weight
        self._momentum = momentum

    @property
    def companions(self) -> dict[str, nn.Module]:
        """Modules that are saved and restored with the student, by name."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    def settings(self, progress: Progress) -> dict[str, float]:
        """What the schedules say at ``progress``, for the log."""
        settings = {"hard_fraction": self.masks.strategy.fraction(progress.epoch, progress.epochs)}
        if self.teacher is not None:
            settings["momentum"] = self._momentum.at(progress)
        return settings

    def losses(self, student: Model, batch: ClipBatch, progress: Progress) -> Losses:
        """The losses of the student on one batch: L_rec + L_pred."""
        clips = normalise(batch.clips, self.targets.mean, self.targets.std)
        num_picked = self.masks.num_picked(progress.epoch, progress.epochs)
        mask = self._propose(clips, batch.keys, num_picked)
        prediction: Prediction = student(clips, mask, keys=batch.keys)
        errors = reconstruction_errors(prediction.pixels, self.targets.of(batch.clips, mask))
        reconstruction = errors.mean()
        parts = {"reconstruction": reconstruction}
        total = reconstruction
        if prediction.difficulty is not None:
            loss = {"relative": ranking_loss, "absolute": regression_loss}[self._predictor]
            parts["prediction"] = loss(prediction.difficulty, errors.detach())
            total = total + self._predictor_weight * parts["prediction"]
        return Losses(total, parts)

    def _propose(self, clips: Tensor, keys: Tensor, num_picked: int) -> TokenMask:
        """The mask of a batch. The teacher is asked only where something is picked."""
        difficulty = None
        if num_picked and self.teacher is not None:
            with torch.no_grad():
                difficulty = self.teacher.score_all(clips)
        priority = uniform(keys, self.masks.num_units, "mask")
        return self.masks.draw(difficulty, priority, num_picked)

    def after_update(self, student: nn.Module, progress: Progress) -> None:
        """Let the teacher follow the student: once per update, in float32."""
        if self.teacher is None:
            return
        follow(self.teacher, student, self._momentum.at(progress))

    @torch.no_grad()
    def examine(self, student: Model, batch: ClipBatch, purpose: str) -> Examination:
        """Reconstruct a batch under a random mask, which depends on its keys and ``purpose``."""
        clips = normalise(batch.clips, self.targets.mean, self.targets.std)
        priority = uniform(batch.keys, self.masks.num_units, purpose)
        mask = self.masks.draw(None, priority, num_picked=0)
        prediction: Prediction = student(clips, mask)
        target = self.targets.of(batch.clips, mask)
        return Examination(
            mask,
            prediction.difficulty,
            errors=reconstruction_errors(prediction.pixels, target),
            mean_errors=patch_mean_errors(target, len(self.targets.mean)),
        )

    @torch.no_grad()
    def difficulty(self, batch: ClipBatch) -> Tensor | None:
        """The teacher's scores, seeing the whole clip: (B, N); none without a predictor."""
        if self.teacher is None:
            return None
        clips = normalise(batch.clips, self.targets.mean, self.targets.std)
        return self.teacher.score_all(clips).float()


def average_errors(examinations: Sequence[Examination]) -> Tensor:
    """Error of each token, averaged over the masks that hide it: -> (B, N), NaN where none does.

    What is hard in a clip whatever else is hidden: the true error of the paper's Figure 2, and
    what a teacher that sees the whole clip can predict.
    """
    total = torch.zeros_like(examinations[0].mask.masked, dtype=torch.float32)
    count = torch.zeros_like(total)
    for seen in examinations:
        total.scatter_add_(1, seen.mask.masked_ids, seen.errors)
        count += seen.mask.masked
    return total / count
