"""Hard patches mining: the teacher says where it is hard, the student is asked there.

teacher (moving average) --difficulty--> mask --> student --> content, difficulty
                                                     |
                      reconstruction + ranking loss <-+-> the student's own errors
"""

import copy
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
from hpm_video.tokens.pixels import normalise
from hpm_video.training.ema import EmaUpdate, MomentumSchedule, WithEma, ema_update_module
from hpm_video.training.objective import Losses, Model
from hpm_video.training.progress import Progress


class Examination(NamedTuple):
    """What the student makes of a batch under one random mask."""

    mask: TokenMask
    difficulty: Tensor | None
    """(B, M) what the student predicts of them; none without a predictor."""
    errors: Tensor
    """(B, M) reconstruction errors."""
    yardstick_errors: Tensor
    """(B, M) errors of the simplest good answer, see :class:`Target`."""


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
        whole: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
        ema_update: EmaUpdate = ema_update_module,
    ) -> None:
        """Take the rules of the method; ``masks``: by the name of the source of a batch.

        ``ema``: the teacher. ``whole`` makes it callable where an engine has spread its weights.

        Raises:
            ValueError: masks are to be picked by difficulty, but nothing predicts it.
        """
        if any(rule.strategy.picks for rule in masks.values()) and predictor == "none":
            raise ValueError(
                "a mask strategy that picks by difficulty needs a loss predictor: take "
                "masking.strategy=random, or mining.predictor=relative or absolute"
            )
        if (ema is not None) != needs_teacher(predictor, target):
            raise ValueError(f"predictor {predictor!r} with teacher {type(ema).__name__}")
        super().__init__(ema, momentum, ema_update)
        self.masks = masks
        self.target = target
        self.predictor = predictor
        self._predictor_weight = predictor_weight
        self._whole = whole

    def seen_with(self, teacher: MaskedAutoencoder | None) -> "HardPatchesMining":
        """The same objective for looking, with a teacher whose weights are all here."""
        seen = copy.copy(self)
        seen.ema, seen._whole = teacher, nullcontext
        return seen

    def settings(self, progress: Progress) -> dict[str, float]:
        """What the schedules say at ``progress``, for the log."""
        settings = {
            named(source, "hard_fraction"): rule.strategy.fraction(progress.epoch, progress.epochs)
            for source, rule in self.masks.items()
        }
        if self.ema is not None:
            settings["momentum"] = self.momentum_at(progress)
        return settings

    def losses(self, student: Model, batch: ClipBatch, progress: Progress) -> Losses:
        """The losses of the student on one batch: L_rec + L_pred."""
        rule = self.masks[batch.source]
        clips = self.normalised(batch)
        num_picked = rule.num_picked(progress.epoch, progress.epochs)
        sight = self.ask_teacher(clips, difficulty=num_picked > 0)
        priority = uniform(batch.keys, rule.num_units, "mask")
        mask = rule.draw(sight.difficulty, priority, num_picked)
        prediction: Prediction = student(clips, mask, keys=batch.keys)
        target = self.target.of(batch.clips, mask, self._features(batch, sight))
        errors = self.target.errors(prediction.content, target)
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

    @torch.no_grad()
    def ask_teacher(self, clips: Tensor, *, difficulty: bool) -> "Sight":
        """What is needed of the teacher, which sees the whole of normalised clips, encoded once."""
        difficulty = difficulty and self.predictor != "none"
        if self.ema is None or not (difficulty or self.target.of_teacher):
            return Sight(None, None)
        with self._whole(self.ema) as teacher:
            assert isinstance(teacher, MaskedAutoencoder)
            encoded = teacher.encode(clips)
            scores = None
            if difficulty:
                scores = teacher.score(encoded, teacher.grid_of(clips)).float()
        return Sight(scores, teacher.of_clip(encoded) if self.target.of_teacher else None)

    def _features(self, batch: ClipBatch, sight: "Sight") -> Tensor | None:
        """Of all tokens, where the target is made of features: -> (B, N, P)"""
        return sight.encoded if self.target.of_teacher else self.target.features(batch.clips)

    @torch.no_grad()
    def examine(
        self, student: Model, batch: ClipBatch, purposes: Iterable[str]
    ) -> list[Examination]:
        """Reconstruct a batch under random masks, each of which depends on its keys and a purpose.

        -> an examination for each of ``purposes``
        """
        rule = self.masks[batch.source]
        clips = self.normalised(batch)
        features = self._features(batch, self.ask_teacher(clips, difficulty=False))
        found = []
        for purpose in purposes:
            priority = uniform(batch.keys, rule.num_units, purpose)
            mask = rule.draw(None, priority, num_picked=0)
            prediction: Prediction = student(clips, mask)
            target = self.target.of(batch.clips, mask, features)
            found.append(
                Examination(
                    mask,
                    prediction.difficulty,
                    errors=self.target.errors(prediction.content, target),
                    yardstick_errors=self.target.yardstick_errors(target),
                )
            )
        return found

    def difficulty(self, batch: ClipBatch) -> Tensor | None:
        """The teacher's scores, seeing the whole clip: (B, N); none without a predictor."""
        return self.ask_teacher(self.normalised(batch), difficulty=True).difficulty


class Sight(NamedTuple):
    """What the teacher makes of whole clips, as far as it was asked."""

    difficulty: Tensor | None
    """(B, N) float32"""
    encoded: Tensor | None
    """(B, N, D) tokens of its encoder."""


def needs_teacher(predictor: PredictorObjective, target: Target) -> bool:
    """Whether anything is asked of a teacher."""
    return predictor != "none" or target.of_teacher


def named(source: str, quantity: str) -> str:
    """What the log calls a quantity of one of the sources of batches; ``""`` is the main one."""
    return f"{source}/{quantity}" if source else quantity


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
