"""Samples of videos, and batches of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpm_video.files.failures import Failure


@dataclass(frozen=True)
class Sample:
    """The clips of one video."""

    clips: Tensor
    """(R, C, T, H, W) uint8"""
    keys: tuple[int, ...]
    label: int
    file: str
    failures: tuple[Failure, ...] = ()
    """Files that were to be drawn before this one."""
    source: str = ""
    """Name of the source of data, where a run has several."""


@dataclass(frozen=True)
class ClipBatch:
    """Clips of several videos of one source, those of a video side by side (B = videos x R)."""

    clips: Tensor
    """(B, C, T, H, W) uint8"""
    keys: Tensor
    """(B,) int64, what every further random draw for a clip derives from."""
    labels: Tensor
    """(B,) int64, -1 where a video has none."""
    files: tuple[str, ...]
    failures: tuple[Failure, ...]
    """Files that did not decode and were passed over."""
    source: str = ""

    def to(self, device: torch.device | str) -> "ClipBatch":
        """Move the tensors to a device; the host does not wait where memory is pinned."""
        non_blocking = self.clips.is_pinned()
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ClipBatch":
        """Move the tensors to memory that a GPU can fetch from while the host goes on."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "ClipBatch":
        return replace(
            self, clips=change(self.clips), keys=change(self.keys), labels=change(self.labels)
        )


def collate(samples: Sequence[Sample]) -> ClipBatch:
    """Make one batch of samples of one source."""
    (source,) = {sample.source for sample in samples}
    return ClipBatch(
        clips=torch.cat([sample.clips for sample in samples]),
        keys=torch.tensor([key for sample in samples for key in sample.keys]),
        labels=torch.tensor([sample.label for sample in samples for _ in sample.keys]),
        files=tuple(sample.file for sample in samples for _ in sample.keys),
        failures=tuple(failure for sample in samples for failure in sample.failures),
        source=source,
    )
