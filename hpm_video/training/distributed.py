"""Several processes of one job, as torchrun starts them. The only user of torch.distributed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")
PATIENCE = timedelta(hours=6)
"""How long a process waits for the others, whose share of a test may take longer."""


@dataclass(frozen=True)
class Processes:
    """The processes of a job, and which of them this is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's share of ``range(count)``; those of all processes make it up."""
        return range(self.rank, count, self.count)

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in each of them. All must call it."""
        if self.count == 1:
            return items
        lists: list[list[Item]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(lists, items)
        return [item for part in lists for item in part]


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the job that torchrun started, if it did; otherwise this process is alone.

    Results travel between the hosts' memories (gloo), also where the processes compute on GPUs.
    Where there are GPUs, each process of a machine takes one.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
