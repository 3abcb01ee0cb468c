"""Long jobs over many files, which can be stopped at any time and go on when started again.

A job alone writes to its output, and notes in a journal what is done. In a folder it keeps to the
settings that it began with. A pool of processes works on the files.
"""

import contextlib
import csv
import errno
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hpm_video.decoding.reader import DecodeError, as_decode_error
from hpm_video.files.atomic import remove_unfinished, write_json, written_beside
from hpm_video.files.failures import Failure
from hpm_video.files.printing import harmless
from hpm_video.workers.pool import Limits, Lost, Pool

Work = TypeVar("Work")
Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""Work that yields whenever it has made progress, and returns a result."""

SECONDS_BETWEEN_STEPS = 0.5
JOURNAL, SETTINGS = "journal.jsonl", "settings.json"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class DiskFailure(Failure):
    """A failure after which no file can be written any more, such as a full disk."""


def paced(steps: Steps[Result]) -> Iterator[Result | None]:
    """Yield none now and then, and the result at the end."""
    last = time.monotonic()
    try:
        while True:
            next(steps)
            if time.monotonic() - last >= SECONDS_BETWEEN_STEPS:
                last = time.monotonic()
                yield None
    except StopIteration as end:
        yield end.value


def attempt(steps: Steps[Result], place: str) -> Iterator[Result | Failure | None]:
    """Yield as :func:`paced` the result of the steps, or the failure of ``place``."""
    try:
        with as_decode_error(place):
            yield from paced(steps)
    except DecodeError as error:
        cause = error.__cause__
        is_disk = isinstance(cause, OSError) and cause.errno in DISK_ERRORS
        yield (DiskFailure if is_disk else Failure)(place, error.reason)


class Journal:
    """Record of what is done, in lines of JSON. A kill cuts off the last line at most."""

    def __init__(self, path: Path) -> None:
        """Open the journal for this program alone. BlockingIOError: another program has it."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+", encoding="utf-8")
        self.close = self._file.close
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise BlockingIOError(
                f"another program writes to {path}; wait until it ends, or name another output"
            ) from error
        except OSError:  # some network disks have no locks
            pass

    def read(self) -> list[dict[str, Any]]:
        """Return the records of all complete lines."""
        self._file.seek(0)
        text = self._file.read()
        if text and text[-1] != "\n":
            self._file.write("\n")
        records = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # the line was cut off
                records += [json.loads(line)] if line.startswith("{") else []
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def claim(
    folder: Path, settings: Mapping[str, Any], *, holds: str, unrelated: Collection[str]
) -> Journal:
    """Claim a folder, which need not exist, as the output of a job. -> its journal

    ``settings``: all that determines the content; ``unrelated``: names of those that may differ
    from one start to the next; ``holds``: a name for the content, for errors. FileExistsError: it
    holds something else, or content of other settings; BlockingIOError: another program writes.
    """
    path = folder / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differ = [
            f"  {name}: {before.get(name)} -> {settings.get(name)}"
            for name in {**before, **settings}
            if name not in unrelated and before.get(name) != settings.get(name)
        ]
        if differ:
            raise FileExistsError(
                f"{folder} holds {holds} made with other settings:\n" + "\n".join(differ) + "\n"
                "Give a new folder, or the earlier settings to resume this one"
            )
    elif folder.exists() and any(entry.name != JOURNAL for entry in folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty, and holds no {holds} (it has no {SETTINGS}); give another"
        )
    journal = Journal(folder / JOURNAL)
    remove_unfinished(folder)
    write_json(path, settings)
    return journal


def run_jobs(
    work: Callable[[Work], Any], jobs: Mapping[str, Work], workers: int, limits: Limits
) -> Generator[tuple[str, Any], None, None]:
    """Do jobs by a pool of processes. -> each with its result, in any order

    A job that was lost with its process is repeated once, after all others: a disk may have stood
    still, or somebody killed the process. OSError: the disk accepts no more data; PoolError: the
    processes fail.
    """
    if not jobs:
        return
    left, lost = len(jobs), set[str]()
    with Pool(work, min(workers, left), limits, depth=1) as pool:
        for name, job in jobs.items():
            pool.submit(name, job)
        while left:
            name, result, is_last = pool.next()
            if isinstance(result, DiskFailure):
                raise OSError(f"{result.reason}. What is done is kept; make room and start again")
            if isinstance(result, Lost) and name not in lost:
                lost.add(name)
                pool.submit(name, jobs[name])
            elif is_last:
                left -= 1
                yield name, result


def write_table(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file atomically. Names of files in it need not be UTF-8."""
    with (
        written_beside(path) as beside,
        beside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_report(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table that only people read: no text in it is a formula to a spreadsheet."""
    write_table(path, [*map(str, map(harmless, header))], (map(harmless, row) for row in rows))


def remove(place: Path | str) -> None:
    """Delete a file or a folder, if it is there."""
    if Path(place).is_dir():
        shutil.rmtree(place)
    else:
        Path(place).unlink(missing_ok=True)
