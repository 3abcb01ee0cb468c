"""The moving average of a model's weights (EMA), in float32: a teacher, or what is tested."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hpm_video.config.choices import MomentumKind
from hpm_video.training.progress import Progress

Module = TypeVar("Module", bound=nn.Module)
EmaUpdate = Callable[[nn.Module, nn.Module, float], None]


@dataclass(frozen=True)
class MomentumSchedule:
    """How slowly the average follows the model."""

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


def make_ema(model: Module) -> Module:
    """A frozen copy of a model, which will follow it."""
    return copy.deepcopy(model).requires_grad_(requires_grad=False).eval()


@torch.no_grad()
def ema_update(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """Move each tensor of ``average`` towards its counterpart by ``1 - momentum``.

    Both are float32: in bfloat16 a step of 1e-4 would be rounded away.
    """
    update = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    update([*average], [*current], 0)


def ema_update_module(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """Move the weights of one module towards those of another."""
    ema_update(average.parameters(), model.parameters(), momentum)


class WithEma(Generic[Module]):
    """An objective that keeps a moving average of its model, if it has one."""

    ema_name: str
    """What checkpoints call it."""

    def __init__(
        self,
        ema: Module | None,
        momentum: MomentumSchedule | None,
        ema_update: EmaUpdate = ema_update_module,
    ) -> None:
        """``ema_update``: of an engine that shards weights."""
        self.ema, self._momentum, self._ema_update = ema, momentum, ema_update

    @property
    def auxiliary_modules(self) -> dict[str, nn.Module]:
        """Modules that are saved and restored with the model, by name."""
        return {} if self.ema is None else {self.ema_name: self.ema}

    def momentum_at(self, progress: Progress) -> float:
        """Return the momentum of the update that follows ``progress``."""
        assert self._momentum is not None
        return self._momentum.at(progress)

    def after_update(self, student: nn.Module, progress: Progress) -> None:
        """Let the average follow: once per update, in float32."""
        if self.ema is not None:
            self._ema_update(self.ema, student, self.momentum_at(progress))
