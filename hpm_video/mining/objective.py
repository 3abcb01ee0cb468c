"""Hard patches mining: the teacher finds the hard patches, the student reconstructs them.

teacher (moving average) --difficulty--> mask --> student --> content, difficulty
                                                     |
                      reconstruction + ranking loss <-+-> the student's own errors
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpm_video.config.choices import PredictorObjective
from hpm_video.data.batch import ClipBatch
from hpm_video.mining.losses import ranking_loss, regression_loss
from hpm_video.mining.targets import Target
from hpm_video.models.masked_autoencoder import MaskedAutoencoder, Prediction
from hpm_video.randomness import uniform
from hpm_video.tokens.masking import MaskRule, TokenMask
from hpm_video.tokens.patches import normalise
from hpm_video.tokens.views import View, mask_of_view, standardise_by_view
from hpm_video.training.ema import EmaUpdate, MomentumSchedule, WithEma, ema_update_module
from hpm_video.training.objective import Losses, Model
from hpm_video.training.progress import Progress


class StudentOutput(NamedTuple):
    """Predictions and errors of the student on a batch under one random mask."""

    mask: TokenMask
    difficulty: Tensor | None  # (B, M) predicted by the student; none without a predictor
    errors: Tensor  # (B, M) of the reconstruction
    baseline_errors: Tensor  # (B, M) of the baseline of the target


class HardPatchesMining(WithEma[MaskedAutoencoder]):
    """The objective of pre-training. Without a predictor it trains a plain masked autoencoder."""

    ema_name = "teacher"

    def __init__(  # noqa: PLR0913 - the parts of the method, and what an engine does for it
        self,
        masks: Mapping[str, MaskRule],
        target: Target,
        *,
        predictor: PredictorObjective,
        predictor_weight: float,
        ema: MaskedAutoencoder | None,
        momentum: MomentumSchedule,
        teacher_sees: View = "all",
        decoded_share: float = 1.0,
        gathered: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
        ema_update: EmaUpdate = ema_update_module,
    ) -> None:
        """Take the parts of the method; ``masks``: the mask rule of each source, by its name.

        ``ema``: the teacher. ``gathered`` makes it callable where an engine shards its weights.
        """
        super().__init__(ema, momentum, ema_update)
        self.masks = masks
        self.target = target
        self.predictor = predictor
        self.teacher_sees: View = teacher_sees
        self.decoded_share = decoded_share
        self._predictor_weight = predictor_weight
        self._gathered = gathered

    def with_teacher(self, teacher: MaskedAutoencoder | None) -> "HardPatchesMining":
        """Return the same objective with a teacher whose weights are gathered already."""
        found = copy.copy(self)
        found.ema, found._gathered = teacher, nullcontext
        return found

    def settings(self, progress: Progress) -> dict[str, float]:
        """Return the values of the schedules at ``progress``, for the log."""
        settings = {
            named(source, "hard_fraction"): rule.strategy.fraction(progress.epoch, progress.epochs)
            for source, rule in self.masks.items()
        }
        if self.ema is not None:
            settings["momentum"] = self.momentum_at(progress)
        return settings

    def losses(self, student: Model, batch: ClipBatch, progress: Progress) -> Losses:
        """The losses of the student on one batch: L_rec + ``predictor_weight`` L_pred."""
        rule, clips = self.masks[batch.source], self.normalised(batch)
        num_picked = rule.num_picked(progress.epoch, progress.epochs)
        difficulty, tokens = self.run_teacher(clips, difficulty=num_picked > 0)
        priority = uniform(batch.keys, rule.num_units, "mask")
        mask = rule.draw(difficulty, priority, num_picked)
        mask = thin(mask, batch.keys, self.decoded_share, "decoded")
        prediction: Prediction = student(clips, mask, keys=batch.keys)
        features = tokens if self.target.of_teacher else self.target.features(batch.clips)
        errors = self.errors(prediction.content, batch.clips, mask, features)
        total = errors.mean()
        parts = {named(batch.source, "reconstruction"): total}
        if prediction.difficulty is not None:
            loss = {"relative": ranking_loss, "absolute": regression_loss}[self.predictor]
            ranked = loss(prediction.difficulty, errors.detach())
            parts[named(batch.source, "prediction")] = ranked
            total = total + self._predictor_weight * ranked
        return Losses(total, parts)

    def normalised(self, batch: ClipBatch) -> Tensor:
        """The clips of a batch as models see them: -> (B, C, T, H, W) float32"""
        return normalise(batch.clips, self.target.mean, self.target.std)

    def errors(
        self, content: Tensor, clips: Tensor, mask: TokenMask, features: Tensor | None
    ) -> Tensor:
        """Errors of reconstructed hidden tokens: (B, M, P), (B, C, T, H, W) uint8 -> (B, M)"""
        return self.target.errors(content, self.target.of(clips, mask, features))

    @torch.no_grad()
    def run_teacher(
        self, clips: Tensor, *, difficulty: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode normalised clips with the teacher, once, and score all tokens where asked to.

        -> (B, N) float32 scores, (B, N, D) tokens of its encoder; none where they are not needed
        """
        difficulty = difficulty and self.predictor != "none"
        if self.ema is None or not (difficulty or self.target.of_teacher):
            return None, None
        with self._gathered(self.ema) as teacher:
            assert isinstance(teacher, MaskedAutoencoder)
            grid = teacher.grid_of(clips)
            seen = mask_of_view(self.teacher_sees, grid, clips.device)
            encoded = teacher.encode(clips, mask=seen)
            scores = None
            if difficulty:
                scores = standardise_by_view(teacher.score(encoded, grid, seen).float(), seen)
        return scores, teacher.of_clip(encoded) if self.target.of_teacher else None

    @torch.no_grad()
    def evaluate(
        self,
        student: Model,
        batch: ClipBatch,
        purposes: Iterable[str],
        *,
        decoded_share: float = 1.0,
    ) -> list[StudentOutput]:
        """Reconstruct a batch under a random mask for each purpose: -> an output for each"""
        rule, clips = self.masks[batch.source], self.normalised(batch)
        _, tokens = self.run_teacher(clips, difficulty=False)
        features = tokens if self.target.of_teacher else self.target.features(batch.clips)
        found = []
        for purpose in purposes:
            mask = rule.draw(None, uniform(batch.keys, rule.num_units, purpose), num_picked=0)
            mask = thin(mask, batch.keys, decoded_share, f"{purpose}, decoded")
            prediction: Prediction = student(clips, mask)
            target = self.target.of(batch.clips, mask, features)
            errors = self.target.errors(prediction.content, target)
            baseline_errors = self.target.baseline_errors(target)
            found.append(StudentOutput(mask, prediction.difficulty, errors, baseline_errors))
        return found

    def difficulty(self, batch: ClipBatch) -> Tensor | None:
        """The teacher's scores of all tokens: (B, N); none without a predictor."""
        return self.run_teacher(self.normalised(batch), difficulty=True)[0]


OBJECTIVES: dict[str, type[HardPatchesMining]] = {"hpm": HardPatchesMining}
"""Objectives by ``mining.objective``."""


def thin(mask: TokenMask, keys: Tensor, share: float, purpose: str) -> TokenMask:
    """Leave a share of the hidden tokens to be predicted, at least two: one has no order."""
    hidden = mask.masked_ids.shape[1]
    count = min(max(math.ceil(share * hidden), 2), hidden)
    if count == hidden:
        return mask
    return mask.thinned(uniform(keys, mask.masked.shape[1], purpose), count)


def named(source: str, quantity: str) -> str:
    """Return the name in the log of a quantity of a source; ``""`` is the main source."""
    return f"{source}/{quantity}" if source else quantity


def average_errors(outputs: Sequence[StudentOutput]) -> Tensor:
    """Error of each token, averaged over the masks that hide it: -> (B, N), NaN where none does.

    The true error of the paper's Figure 2: how hard a token is whatever else is hidden, which is
    all that a teacher can predict, since it does not know the mask.
    """
    total = torch.zeros_like(outputs[0].mask.masked, dtype=torch.float32)
    count = torch.zeros_like(total)
    for output in outputs:
        total.scatter_add_(1, output.mask.masked_ids, output.errors)
        count.scatter_add_(1, output.mask.masked_ids, torch.ones_like(output.errors))
    return total / count
