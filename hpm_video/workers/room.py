"""Whether the machine has room for what is read ahead, before anything is read."""

import os
from contextlib import suppress
from pathlib import Path

from hpm_video.files.errors import ExpectedError

MIB = 2**20
MAX_WORKERS = 16
SHARED = Path("/dev/shm")  # noqa: S108 - where Linux has its shared memory
GROUPS = Path("/sys/fs/cgroup")
"""Where Linux has its control groups (version 2), which containers and schedulers use."""


class RoomError(ExpectedError, MemoryError):
    """What would be read ahead does not fit. The message has the numbers and the remedy."""


def check_room(workers: int, shared: int, batches: int) -> None:
    """Compare the memory that reading ahead takes with what there is.

    Args:
        workers: processes that decode.
        shared: bytes of memory that they share with the run.
        batches: bytes of the batches that are being read or wait.

    Raises:
        RoomError: the file system of shared memory or the memory left is smaller. What the
            system does not tell is not compared.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Of several processes some may have taken theirs already: so what is left is compared with
    # what this one takes, and what all take with all that there is.
    total, free = shared_memory()
    for needed, there in ((shared, free), (shared * processes, total)):
        if there is not None and needed > there:
            each = f" in each of {processes} processes" if needed > shared else ""
            raise RoomError(
                f"data.workers={workers}{each} need {_mib(needed)} of shared memory for what is "
                f"read ahead, and {SHARED} has {_mib(there)}. Give it more (docker run "
                "--shm-size=..., mount -o remount,size=...), or take a smaller micro-batch "
                "(engine.micro_batch), fewer data.workers, or smaller clips"
            )
    left = memory_left()
    if left is not None and shared + batches > left:
        raise RoomError(
            f"batches that are read ahead need {_mib(shared + batches)} of memory "
            f"(data.workers={workers}), and {_mib(left)} are left. Take a smaller micro-batch "
            "(engine.micro_batch), smaller clips or fewer processes with data.workers"
        )


def shared_memory() -> tuple[int, int] | tuple[None, None]:
    """Bytes of all there is, and of what is free; none where there is no such file system."""
    if not SHARED.is_dir():
        return None, None
    found = os.statvfs(SHARED)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_of_container() -> int | None:
    """Cores whose time the container this runs in may take; none where it has no limit."""
    limits = []
    for group in _groups():
        with suppress(OSError, ValueError):  # of "max", no limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
            limits.append(max(1, quota // period))
    return min(limits, default=None)


def default_workers() -> int:
    """Processes that decode: one per core that may be used but one, at least 1 and at most 16.

    A container may have a share of the cores (docker --cpus), which processes of torchrun share.
    """
    cores = usable_cores()
    cores = min(cores, cores_of_container() or cores)
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 1), MAX_WORKERS)


def memory_left() -> int | None:
    """Bytes that the system, and the container this runs in, can still give; none if unknown."""
    known: list[int] = []
    with suppress(OSError, IndexError):
        available = _row("MemAvailable:", Path("/proc/meminfo"))
        known.append(int(available.split()[0]) * 1024)
    for group in _groups():
        with suppress(OSError, ValueError):
            limit, used = (
                int((group / f"memory.{what}").read_text()) for what in ("max", "current")
            )
            # What only caches files can be given up.
            known.append(limit - used + int(_row("inactive_file ", group / "memory.stat") or 0))
    return min(known, default=None)


def _row(start: str, path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(start) for line in lines if line.startswith(start)), "")


def _groups() -> list[Path]:
    """Folders of the control groups that this process is in: its own, and those around it."""
    try:
        inner = GROUPS / _row("0::/", Path("/proc/self/cgroup"))
    except OSError:
        return []
    return [inner, *(group for group in inner.parents if group.is_relative_to(GROUPS))]


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
