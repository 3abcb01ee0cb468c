"""The teacher: a moving average of the student, in float32."""

import copy
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from hpm_video.config.choices import MomentumKind
from hpm_video.training.progress import Progress

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class MomentumSchedule:
    """How slowly the teacher follows the student."""

    kind: MomentumKind
    first: float
    last: float

    def at(self, progress: Progress) -> float:
        """The momentum after the update of ``progress``.

        ``paper``: ``first`` + (``last`` - ``first``) epoch / 100 for 100 epochs, then ``last``.
        ``warmup``: min(``last``, (1 + n) / (10 + n)) at update n, for runs of a few thousand
        updates, in which a momentum of 0.999 would hardly move.
        """
        if self.kind == "warmup":
            return min(self.last, (1 + progress.update) / (10 + progress.update))
        return self.first + (self.last - self.first) * min(progress.epoch / 100, 1.0)


def make_teacher(student: Module) -> Module:
    """A frozen copy of the student, which will follow it."""
    return copy.deepcopy(student).requires_grad_(requires_grad=False).eval()
