"""Files that are either complete or absent, and the removal of what killed processes left."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TextIO


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path``, renamed to it at the end: ``path`` is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside_path = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield beside_path
        beside_path.replace(path)
    finally:
        beside_path.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write plain values, completely or not at all."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left of :func:`written_beside` in a folder and below it."""
    for part in folder.rglob(".*.part*"):
        pid = part.name.rpartition(".part")[0].rpartition(".")[2]
        with suppress(ValueError, OverflowError, PermissionError):  # another user's process
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                part.unlink(missing_ok=True)


@cache
def temporary_folder() -> Path:
    """Return the folder for temporary files of this process, which is deleted when it ends.

    Folders that killed processes left are deleted first: nobody holds their locks any more.
    """
    for left in Path(tempfile.gettempdir()).glob("hpmv-*"):
        with suppress(OSError):
            if left.lstat().st_uid == os.getuid():
                with (left / "lock").open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix="hpmv-"))
    lock = (folder / "to be locked").open("w")  # noqa: SIM115 - open until the process ends
    with suppress(OSError):  # some disks have no locks
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "to be locked").rename(folder / "lock")
    # After multiprocessing has ended, which keeps its sockets in this folder.
    Finalize(None, _delete, (folder, lock), exitpriority=-200)
    return folder


def _delete(folder: Path, lock: TextIO) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
