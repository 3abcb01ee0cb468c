"""The teacher: a moving average of the student, in float32."""

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

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


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's weights towards the student's by ``1 - momentum``.

    Both are float32: in bfloat16 a step of 1e-4 would be rounded away. Where the weights of both
    are spread over processes alike, each process moves its shards.
    """
    average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    average(_held_here(teacher), _held_here(student), 0)


def _held_here(module: nn.Module) -> list[Tensor]:
    """What this process holds of each parameter: all of it, or its shard under ZeRO stage 3."""
    return [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
