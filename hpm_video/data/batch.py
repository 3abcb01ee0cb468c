"""Samples of videos, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpm_video.files.failures import Failure


@dataclass(frozen=True)
class Sample:
    """The clips of one video."""

    clips: Tensor  # (R, C, T, H, W) uint8
    keys: tuple[int, ...]
    label: int
    file: str
    failures: tuple[Failure, ...] = ()  # files that were to be drawn before this one
    source: str = ""  # name of the source of data, where a run has several


@dataclass(frozen=True)
class ClipBatch:
    """Clips of several videos of one source, those of a video side by side (B = videos x R)."""

    clips: Tensor  # (B, C, T, H, W) uint8
    keys: Tensor  # (B,) int64, what every further random draw for a clip derives from
    labels: Tensor  # (B,) int64, -1 where a video has none
    files: tuple[str, ...]
    failures: tuple[Failure, ...]  # files that did not decode and were passed over
    source: str = ""

    def to(self, device: torch.device | str) -> "ClipBatch":
        """Move the tensors to a device; the host does not wait where memory is pinned."""
        clips, keys, labels = (
            tensor.to(device, non_blocking=self.clips.is_pinned())
            for tensor in (self.clips, self.keys, self.labels)
        )
        return replace(self, clips=clips, keys=keys, labels=labels)


def collate(samples: Sequence[Sample], clips: Tensor | None = None) -> ClipBatch:
    """Make one batch of samples of one source. ``clips``: where theirs are side by side already."""
    (source,) = {sample.source for sample in samples}
    return ClipBatch(
        clips=torch.cat([sample.clips for sample in samples]) if clips is None else clips,
        keys=torch.tensor([key for sample in samples for key in sample.keys]),
        labels=torch.tensor([sample.label for sample in samples for _ in sample.keys]),
        files=tuple(sample.file for sample in samples for _ in sample.keys),
        failures=tuple(failure for sample in samples for failure in sample.failures),
        source=source,
    )
