"""How the batch of an update is split over processes and micro-batches.

The batch is the recipe's, and the same for any number of processes: each takes an equal share of
it, in passes of ``micro_batch`` videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hpm_video.config.checks import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The parts of an update and the processes that compute them."""

    batch_size: int
    """Videos of an update, over all processes."""
    processes: int
    micro_batch: int
    """Videos of one forward pass of one process."""

    @property
    def accumulate(self) -> int:
        """Forward passes of a process that make an update."""
        return self.batch_size // self.processes // self.micro_batch


def plan_batches(
    batch_size: int, processes: int, micro_batch: int | None, *, multiple: int = 1
) -> BatchPlan:
    """Plan an update. Without ``micro_batch`` a process computes its share in one pass.

    ``multiple``: what a forward pass takes a multiple of, such as 2 where mixup pairs videos.

    Raises:
        ConfigError: it does not come out even. The message names the nearest values that do.
    """
    possible = micro_batches(batch_size, processes, multiple)
    if micro_batch is not None and micro_batch not in possible:
        raise ConfigError(
            f"engine.micro_batch must divide the {possible[-1]} videos of each process "
            f"(recipe.batch_size={batch_size} over processes={processes})"
            f"{_and_be_a(multiple)}, got {micro_batch}; take "
            f"engine.micro_batch={_nearest(micro_batch, possible)}"
        )
    return BatchPlan(batch_size, processes, possible[-1] if micro_batch is None else micro_batch)


def micro_batches(batch_size: int, processes: int, multiple: int = 1) -> list[int]:
    """Return the sizes of a micro-batch that make up a process's share, ascending.

    Raises a ConfigError where the batch does not spread over the processes.
    """
    unit = processes * multiple
    if batch_size % unit:
        batches = range(unit, batch_size + unit + 1, unit)
        counts = [n for n in _divisors(batch_size) if batch_size // n % multiple == 0]
        other = f", or processes={_nearest(processes, counts)}" if counts else ""
        raise ConfigError(
            f"recipe.batch_size must spread evenly over processes={processes} (GPUS x NNODES)"
            f"{_and_be_a(multiple, 'each share ')}, got {batch_size}; take "
            f"recipe.batch_size={_nearest(batch_size, batches)}{other}"
        )
    return [size for size in _divisors(batch_size // processes) if size % multiple == 0]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(value: int, possible: Sequence[int]) -> str:
    """Name the nearest of ascending ``possible`` below and above a value."""
    below = [size for size in possible if size <= value][-1:]
    above = [size for size in possible if size > value][:1]
    return " or ".join(map(str, [*below, *above]))


def _and_be_a(multiple: int, what: str = "") -> str:
    why = "mixup and CutMix pair videos, and a batch norm needs two"
    return "" if multiple == 1 else f", {what}being a multiple of {multiple} ({why})"
