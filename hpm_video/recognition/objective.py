"""Classification of clips: the objective of fine-tuning and of probes that are trained.

Mixup and CutMix are timm's: a clip and its label become part of another clip. timm draws from
numpy's global generator, so it runs with its own here. It is imported late: it takes seconds.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from hpm_video.config.data import AugmentationConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.decoding.locations import base_name
from hpm_video.randomness import global_generators, key_of
from hpm_video.tokens.patches import normalise
from hpm_video.training.ema import EmaUpdate, MomentumSchedule, WithEma, ema_update_module
from hpm_video.training.objective import Losses, Model
from hpm_video.training.progress import Progress


class Classification(WithEma[nn.Module]):
    """Cross-entropy of a classifier, on clips that may be mixed (mixup, CutMix)."""

    ema_name = "average"

    def __init__(  # noqa: PLR0913 - the parts of the method, and what an engine does for it
        self,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        label_smoothing: float,
        mixing: "Mixing | None" = None,
        ema: nn.Module | None = None,
        momentum: MomentumSchedule | None = None,
        seed: int = 0,
        ema_update: EmaUpdate = ema_update_module,
    ) -> None:
        """``mixing`` makes its own smoothed targets."""
        super().__init__(ema, momentum, ema_update)
        self.mean = mean
        self.std = std
        self._label_smoothing = label_smoothing
        self._mixing = mixing
        self._seed = seed

    def settings(self, progress: Progress) -> dict[str, float]:  # noqa: ARG002
        """Nothing: there are no schedules."""
        return {}

    def losses(self, student: Model, batch: ClipBatch, progress: Progress) -> Losses:
        clips, targets = normalise(batch.clips, self.mean, self.std), batch.labels
        smoothing = self._label_smoothing
        if self._mixing is not None:
            # The files' names tell one micro-batch of an update from another, wherever they lie.
            names = tuple(base_name(file) for file in batch.files)
            key = key_of(self._seed, "mixing", progress.update, names)
            clips, targets = self._mixing(clips, targets, key)
            smoothing = 0.0
        logits = student(clips, keys=batch.keys)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        return Losses(loss, {"classification": loss})


class Mixing:
    """Mixes each clip of a batch with its mirror image in the order of the batch.

    All clips of a batch are mixed alike, and all frames of a clip: one share, or one box.
    """

    def __init__(self, num_classes: int, how: AugmentationConfig) -> None:
        """Labels are smoothed whether or not a batch is mixed."""
        from timm.data.mixup import Mixup

        self._mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=how.mixup,
            cutmix_alpha=how.cutmix,
            prob=how.mix_probability,
            switch_prob=how.cutmix_probability,
            mode="batch",
            label_smoothing=how.label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, clips: Tensor, labels: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """Mix a batch: (B, C, T, H, W) float, (B,) int64 -> (B, C, T, H, W), (B, K) float32

        The targets of a clip sum to 1; B is even. What is drawn depends on ``key`` alone.
        """
        planes = clips.flatten(1, 2).clone()  # timm writes into what it is given
        with global_generators(key):
            mixed, targets = self._mixup(planes, labels)
        return mixed.view(clips.shape), targets
