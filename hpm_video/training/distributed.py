"""Several processes of one job, as torchrun starts them. The only user of torch.distributed."""

import logging
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import HashStore

from hpm_video.training.device import EngineError
from hpm_video.training.stop import Interrupted

log = logging.getLogger(__name__)
Item = TypeVar("Item")
PATIENCE = timedelta(hours=6)
"""How long a process waits for the others where one works alone, or has more to do."""
SILENCE = timedelta(minutes=30)
"""How long it waits for the others in an update, should a machine vanish. The end of a process is
noticed at once."""


@dataclass(frozen=True)
class Processes:
    """The processes of a job, and which of them this is. By default this one is alone.

    Items go through the hosts' memories (gloo); tensors stay on their device.
    """

    rank: int = 0
    count: int = 1
    _hosts: Any = None
    """The group of all processes for what waits long."""

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

    def ask(self, value: int) -> Callable[[], int]:
        """Ask for the largest value of all processes; calling the result waits for it.

        All processes must ask, and take their answers in the same order.
        """
        if self.count == 1:
            return lambda: value
        given, largest = torch.tensor(value), distributed.ReduceOp.MAX
        work = distributed.all_reduce(given, largest, group=self._hosts, async_op=True)

        def answer() -> int:
            work.wait()
            return int(given)

        return answer

    def gather_shards(self, shard: Tensor) -> Tensor:
        """The shards of all processes one after the other: (n,) each -> (count n,)"""
        if self.count == 1:
            return shard
        joined = shard.new_empty(self.count * shard.numel())
        distributed.all_gather_into_tensor(joined, shard.contiguous())
        return joined

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over all processes into each of ``tensors``."""
        for tensor in tensors if self.count > 1 else ():
            distributed.all_reduce(tensor)
            tensor.div_(self.count)


def is_first_process() -> bool:
    """Whether this is the process of a job that reports and writes, joined or not yet."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether a launcher started this process with others, joined or not yet."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def first_to_say(message: str) -> bool:
    """Whether no other process of the job has called this with the same message."""
    if not distributed.is_initialized():
        return is_first_process()
    try:
        store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001
        return bool(store.add(f"said: {message}", 1) == 1)
    except (RuntimeError, ValueError):  # the process that kept the store is gone
        return True


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error is that another process of the job has gone."""
    text, words = str(error), ("gloo", "Connection closed by peer", "Connection reset by peer")
    if "NCCL" in text:  # it may be anything else, such as memory
        words = ("remote", "onnection", "abort")
    return any(word in text for word in words)


def make_sure_of_group() -> None:
    """Make a group of one process, for a library that needs a group."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not distributed.is_initialized():
        distributed.init_process_group(_backend(), store=HashStore(), rank=0, world_size=1)


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the job that a launcher started, if it did; otherwise this process is alone.

    Where there are GPUs, each process of a machine takes one.

    Raises:
        EngineError: there are more processes on this machine than GPUs, or no others are found.
    """
    gpus, stop = torch.cuda.device_count(), None
    if gpus > 1 and not is_one_of_several() and "GPUS" not in os.environ:
        log.info("of %d GPUs, one is used; GPUS=%d ./run_... uses all", gpus, gpus)
    try:
        yield _join() if is_one_of_several() else Processes()
    except Interrupted as error:  # all of them are
        stop = error
    # Not where something went wrong: to leave together needs all of them.
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if stop is not None:
        raise stop


def _join() -> Processes:
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise EngineError(
                f"this machine has {torch.cuda.device_count()} GPUs, and process {local + 1} of "
                f"it finds none left; start fewer processes, or hide the GPUs "
                f"(CUDA_VISIBLE_DEVICES= )"
            )
        torch.cuda.set_device(local)
    # With gloo each process has a connection to each other one.
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, most), most))
    try:
        distributed.init_process_group(_backend(), timeout=SILENCE)
        hosts = distributed.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise EngineError(
            f"this process could not join the others at {where} (MASTER_ADDR, MASTER_PORT): "
            f"{error}\nThe port must be free there, and reachable from all machines; "
            f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface."
        ) from error
    return Processes(distributed.get_rank(), distributed.get_world_size(), hosts)
