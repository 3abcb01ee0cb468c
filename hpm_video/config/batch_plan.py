"""How the batch of an update is split: an equal share for each process, in micro-batches."""

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
    Raises a ConfigError where it does not come out even.
    """
    possible = micro_batches(batch_size, processes, multiple)
    if micro_batch is not None and micro_batch not in possible:
        raise ConfigError(
            f"engine.micro_batch must be one of {', '.join(map(str, possible))} with "
            f"recipe.batch_size={batch_size} and processes={processes}"
            f"{_why(multiple)}, got {micro_batch}"
        )
    return BatchPlan(batch_size, processes, possible[-1] if micro_batch is None else micro_batch)


def micro_batches(batch_size: int, processes: int, multiple: int = 1) -> list[int]:
    """Return the sizes of a micro-batch that make up a process's share, ascending.

    Raises a ConfigError where the batch does not spread over the processes.
    """
    unit = processes * multiple
    if batch_size % unit:
        raise ConfigError(
            f"recipe.batch_size must be a multiple of {unit} for processes={processes} (GPUS x "
            f"NNODES){_why(multiple)}, got {batch_size}; take recipe.batch_size="
            f"{batch_size + -batch_size % unit}, or another number of processes"
        )
    share = batch_size // processes
    return [size for size in range(multiple, share + 1, multiple) if share % size == 0]


def _why(multiple: int) -> str:
    return "" if multiple == 1 else " and an even micro-batch (for mixup, CutMix or a batch norm)"
