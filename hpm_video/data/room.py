"""Whether the machine has room for what is read ahead, before anything is read."""

import os
from pathlib import Path

MIB = 2**20


class RoomError(MemoryError):
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
    there = shared_memory_left()
    if there is not None and shared * processes > there:
        raise RoomError(
            f"{_of(workers, processes)} need {_mib(shared * processes)} of shared memory (two jobs "
            f"each), and {SHARED} has {_mib(there)} left. Give it more (docker run --shm-size=..., "
            "mount -o remount,size=...), or take fewer with data.workers, fewer or smaller clips"
        )
    left = memory_left()
    if left is not None and (shared + batches) * processes > left:
        raise RoomError(
            f"batches that are read ahead need {_mib((shared + batches) * processes)} of memory "
            f"({_of(workers, processes)}), and {_mib(left)} are left. Take a smaller micro-batch "
            "(engine.micro_batch), smaller clips or fewer processes with data.workers"
        )


SHARED = Path("/dev/shm")  # noqa: S108 - where Linux has its shared memory


def shared_memory_left() -> int | None:
    """Bytes; none where there is no such file system."""
    if not SHARED.is_dir():
        return None
    found = os.statvfs(SHARED)
    return found.f_bavail * found.f_frsize


def memory_left() -> int | None:
    """Bytes that the system, and the container this runs in, can still give; none if unknown."""
    known = [_of_the_system(), _of_the_container()]
    return min((each for each in known if each is not None), default=None)


def _of_the_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line), None)


def _of_the_container() -> int | None:
    """By version 2 of control groups. What only caches files does not count."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return None if limit == "max" else int(limit) - used + cached


def _of(workers: int, processes: int) -> str:
    each = f" in each of {processes} processes" if processes > 1 else ""
    return f"data.workers={workers}{each}"


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
