"""Classification of clips: the objective of fine-tuning and of probes that are trained."""

import torch.nn.functional as F
from torch import nn

from hpm_video.data.batch import ClipBatch
from hpm_video.decoding.locations import base_name
from hpm_video.randomness import key_of
from hpm_video.recognition.mixing import Mixing
from hpm_video.tokens.pixels import normalise
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
        mixing: Mixing | None = None,
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
        """What the schedules say at ``progress``, for the log: nothing changes."""
        return {}

    def losses(self, student: Model, batch: ClipBatch, progress: Progress) -> Losses:
        """The loss of the model on one batch."""
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
