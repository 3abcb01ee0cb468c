"""What is minimised: the seam between a method and the training loop."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from hpm_video.data.batch import ClipBatch
from hpm_video.training.progress import Progress

Model = Callable[..., Any]
"""A module, or an engine that runs one."""


class Losses(NamedTuple):
    """The loss of one batch."""

    total: Tensor
    """() the value that training minimises."""
    parts: dict[str, Tensor]
    """Its parts by name, () each, for the log."""


class Objective(Protocol):
    """A method of training. A new one is a new objective, never a copy of the loop."""

    @property
    def auxiliary_modules(self) -> dict[str, nn.Module]:
        """Modules that are saved and restored with the model, by name."""

    def settings(self, progress: Progress) -> dict[str, float]:
        """Return the values of schedules at ``progress``, for the log."""

    def losses(self, student: Model, batch: ClipBatch, progress: Progress) -> Losses:
        """The losses of one batch."""

    def after_update(self, student: nn.Module, progress: Progress) -> None:
        """Called once after the weights have changed."""
