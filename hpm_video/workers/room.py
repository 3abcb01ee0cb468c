"""Whether the machine has room for what is read ahead, before anything is read."""

import os
from contextlib import suppress
from pathlib import Path

from hpm_video.files.errors import ExpectedError

MAX_WORKERS = 16
SHARED = Path("/dev/shm")  # noqa: S108 - where Linux has its shared memory
GROUPS = Path("/sys/fs/cgroup")
"""Where Linux has its control groups (version 2), which containers and schedulers use."""


class RoomError(ExpectedError, MemoryError):
    """What would be read ahead does not fit. The message has the numbers and the remedy."""


def check_room(workers: int, shared: int, batches: int) -> None:
    """Raise RoomError if reading ahead takes more memory than there is, as far as that is known.

    ``shared``: bytes that ``workers`` processes share with the run; ``batches``: bytes of the
    batches that are being read or wait.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total, free = shared_memory()
    # Other processes of the run may have taken theirs already, or not yet.
    for needed, there in ((shared, free), (shared * processes, total)):
        if there is not None and needed > there:
            each = f" in each of {processes} processes" if needed > shared else ""
            raise RoomError(
                f"data.workers={workers}{each} need {_mib(needed)} of shared memory for what is "
                f"read ahead, and {SHARED} has {_mib(there)}. Give it more (docker run "
                "--shm-size=..., mount -o remount,size=...), or lower engine.micro_batch or "
                "data.workers"
            )
    left = memory_left()
    if left is not None and shared + batches > left:
        raise RoomError(
            f"batches that are read ahead need {_mib(shared + batches)} of memory "
            f"(data.workers={workers}), and {_mib(left)} are left. Lower engine.micro_batch or "
            "data.workers"
        )


def shared_memory() -> tuple[int, int] | tuple[None, None]:
    """Return the bytes of shared memory in all, and of what is free, if the system has a limit."""
    if not SHARED.is_dir():
        return None, None
    found = os.statvfs(SHARED)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Processes that decode: usable cores, shared with those of torchrun, but one; 1 to 16."""
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 1), MAX_WORKERS)


def memory_left() -> int | None:
    """Return the bytes that the system and its control groups can still give, if it says so."""
    try:
        known = [1024 * _number("MemAvailable:", Path("/proc/meminfo"))]
        own = GROUPS / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except (OSError, ValueError):
        return None
    for group in (own, *own.parents):
        with suppress(OSError, ValueError):  # "max": no limit
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            cached = _number("inactive_file", group / "memory.stat")  # it can be given up
            known.append(limit - used + cached)
    return min(known)


def _number(name: str, path: Path) -> int:
    words = path.read_text().split()
    return int(words[words.index(name) + 1])


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
