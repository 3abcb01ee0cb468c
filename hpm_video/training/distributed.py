"""Several processes of one job, as torchrun starts them. The only user of torch.distributed."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore

Item = TypeVar("Item")
PATIENCE = timedelta(hours=6)
"""How long a process waits for the others where one works alone, or has more to do."""
SILENCE = timedelta(minutes=30)
"""How long it waits for the others in the middle of an update. A process that ends closes its
connections and is noticed at once; this is for a machine that vanishes."""


@dataclass(frozen=True)
class Processes:
    """The processes of a job, and which of them this is. By default this one is alone.

    What is exchanged goes through the hosts' memories (gloo), but for the tensors of
    :meth:`gather_shards`, :meth:`average_` and :meth:`replicate`, which stay on their device.
    """

    rank: int = 0
    count: int = 1
    _hosts: Any = None
    """The group of all processes for what waits long."""
    _asked: list[tuple[Any, Tensor]] = field(default_factory=list)

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
        distributed.all_gather_object(lists, items, group=self._hosts)
        return [item for part in lists for item in part]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather([None])

    def of_first(self, compute: Callable[[], Item]) -> Item:
        """What the first process computes, in each of them; the others wait for it."""
        return self.gather([compute()] if self.is_first else [])[0]

    def any_before(self, value: int) -> int:
        """The largest value that any process gave in its call before; alone, ``value`` itself.

        One call late, so that nobody waits: all get the same answer in the same call.
        """
        if self.count == 1:
            return value
        given = torch.tensor(value)
        work = distributed.all_reduce(
            given, distributed.ReduceOp.MAX, group=self._hosts, async_op=True
        )
        self._asked.append((work, given))
        if len(self._asked) == 1:
            return 0
        before, answer = self._asked.pop(0)
        before.wait()
        return int(answer)

    def gather_shards(self, shard: Tensor) -> Tensor:
        """The shards of all processes one after the other: (n,) each -> (count n,)"""
        if self.count == 1:
            return shard
        whole = shard.new_empty(self.count * shard.numel())
        distributed.all_gather(list(whole.chunk(self.count)), shard.contiguous())
        return whole

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over all processes into each of ``tensors``."""
        for tensor in tensors if self.count > 1 else ():
            distributed.all_reduce(tensor)
            tensor.div_(self.count)

    def replicate(self, model: nn.Module) -> nn.Module:
        """A module that runs ``model`` and averages its gradients over all processes."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )


class ProcessesError(RuntimeError):
    """Processes that cannot work together. The message says why and what to do."""


def is_first_process() -> bool:
    """Whether this is the process of a job that reports and writes, joined or not yet."""
    return os.environ.get("RANK", "0") == "0"


def first_to_say(message: str) -> bool:
    """Whether no other process of the job has asked this of the same message."""
    if not distributed.is_initialized():
        return is_first_process()
    try:
        store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001
        return bool(store.add(f"said: {message}", 1) == 1)
    except (RuntimeError, ValueError):  # the process that kept the store is gone
        return True


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error is that another process of the job has gone."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in words)


def make_sure_of_group() -> None:
    """Let a process that is alone be a group of one, for a library that asks for a group."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not distributed.is_initialized():
        store = HashStore()
        distributed.init_process_group(_backend(), store=store, rank=0, world_size=1)


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the job that a launcher started, if it did; otherwise this process is alone.

    Where there are GPUs, each process of a machine takes one.

    Raises:
        ProcessesError: there are more processes on this machine than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ProcessesError(
                f"this machine has {torch.cuda.device_count()} GPU(s), and process {local + 1} of "
                f"it finds none left; start as many processes as there are GPUs"
            )
        torch.cuda.set_device(local)
    distributed.init_process_group(_backend(), timeout=SILENCE)
    hosts = distributed.new_group(backend="gloo", timeout=PATIENCE)
    yield Processes(distributed.get_rank(), distributed.get_world_size(), hosts)
    # Not where something went wrong: to leave together needs all of them.
    distributed.destroy_process_group()
