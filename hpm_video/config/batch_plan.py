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
    def share(self) -> int:
        """Videos of an update that one process computes."""
        return self.batch_size // self.processes

    @property
    def accumulate(self) -> int:
        """Forward passes of a process that make an update."""
        return self.share // self.micro_batch


def plan_batches(
    batch_size: int, processes: int, micro_batch: int | None, *, multiple: int = 1
) -> BatchPlan:
    """Plan an update. Without ``micro_batch`` a process computes its share in one pass.

    ``multiple``: what a forward pass takes a multiple of, such as 2 where mixup pairs videos.

    Raises:
        ConfigError: it does not come out even. The message names the nearest values that do.
    """
    possible = micro_batches(batch_size, processes, multiple)
    share = possible[-1]
    if micro_batch is None:
        return BatchPlan(batch_size, processes, share)
    if micro_batch not in possible:
        near = " or ".join(str(size) for size in _around(micro_batch, possible))
        raise ConfigError(
            f"engine.micro_batch must divide the {share} videos of each process "
            f"(recipe.batch_size={batch_size} over processes={processes})"
            f"{_and_be_a(multiple)}, got {micro_batch}; take engine.micro_batch={near}"
        )
    return BatchPlan(batch_size, processes, micro_batch)


def micro_batches(batch_size: int, processes: int, multiple: int = 1) -> list[int]:
    """Return all sizes of a micro-batch that make up a process's share, ascending.

    Raises:
        ConfigError: the batch does not spread over the processes.
    """
    given = {"recipe.batch_size": batch_size, "processes (GPUS x NNODES)": processes}
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}; take a positive number")
    unit = processes * multiple
    if batch_size % unit:
        below = batch_size - batch_size % unit
        batches = [size for size in (below, below + unit) if size]
        counts = _around(
            processes, [n for n in _divisors(batch_size) if batch_size // n % multiple == 0]
        )
        other = f", or processes={' or '.join(map(str, counts))}" if counts else ""
        raise ConfigError(
            f"recipe.batch_size must spread evenly over processes={processes} (GPUS x NNODES)"
            f"{_and_be_a(multiple, 'each share ')}, got {batch_size}; take "
            f"recipe.batch_size={' or '.join(map(str, batches))}{other}"
        )
    share = batch_size // processes
    return [size for size in _divisors(share) if size % multiple == 0]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _around(value: int, possible: Sequence[int]) -> list[int]:
    """The nearest of ascending ``possible`` below and above a value."""
    below = [size for size in possible if size <= value][-1:]
    return below + [size for size in possible if size > value][:1]


def _and_be_a(multiple: int, what: str = "") -> str:
    return "" if multiple == 1 else f", {what}being a multiple of {multiple} (videos are paired)"
