"""Batches of clips, decoded by worker processes."""

import csv
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from hpm_video.data.dataset import (
    ClipBatch,
    Failure,
    HeldOutClips,
    Sample,
    TooManyBadFiles,
    collate,
    tolerated,
    too_many,
)
from hpm_video.data.decode import DecodeError
from hpm_video.data.mixture import MixedClips, Place

MAX_WORKERS = 16
STALL_SECONDS = 900
"""A batch that takes longer ends the run: a native decoder that hangs would wait for ever."""


def default_workers() -> int:
    """Processes that decode: one per core that may be used but one, at most 16.

    Where torchrun started several processes on this machine, they share the cores.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 0), MAX_WORKERS)


def training_batches(
    dataset: MixedClips, places: Sequence[Place], *, batch_size: int, workers: int, pin: bool
) -> Generator[ClipBatch, None, None]:
    """Batches of the samples at ``places`` of the endless streams, in that order.

    Those of a whole run make one iterator: workers live as long as it does, and go on from
    one epoch to the next without a pause. ``batch_size`` counts videos. Closing the generator ends
    the workers.
    """
    return _batches(dataset, places, batch_size, workers, pin)


def held_out_batches(
    dataset: HeldOutClips,
    *,
    batch_size: int,
    workers: int,
    positions: Sequence[int] | None = None,
) -> Generator[ClipBatch, None, None]:
    """Batches of the held-out clips at ``positions``, by default of all, in that order.

    ``batch_size`` counts videos.
    """
    chosen = range(len(dataset)) if positions is None else positions
    return _batches(dataset, chosen, batch_size, workers, pin=False)


def _batches(
    dataset: MixedClips | HeldOutClips,
    positions: Sequence[Place] | Sequence[int],
    batch_size: int,
    workers: int,
    pin: bool,
) -> Generator[ClipBatch, None, None]:
    loader: DataLoader[ClipBatch | Exception] = DataLoader(
        _Reporting(dataset),  # type: ignore[arg-type]
        batch_size,
        sampler=positions,
        num_workers=workers,
        collate_fn=_collate_or_report,
        pin_memory=pin,
        timeout=STALL_SECONDS if workers else 0,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # otherwise making an iterator draws from the global one
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Reporting(Dataset[Sample | Exception]):
    """Hands over errors as they are: torch would wrap them in the text of a traceback."""

    def __init__(self, dataset: MixedClips | HeldOutClips) -> None:
        self._dataset: Dataset[Sample] = dataset
        self._length = len(dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample | Exception:
        try:
            return self._dataset[index]
        except (DecodeError, TooManyBadFiles) as error:
            return error


def _collate_or_report(samples: Sequence[Sample | Exception]) -> ClipBatch | Exception:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    return collate([sample for sample in samples if isinstance(sample, Sample)])


def init_worker(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the parent: it saves, and then ends its workers.

    Terminals and schedulers signal all processes of a job. (torch sets workers to one thread.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers that are still there: one may hang in native code for ever."""
    children = multiprocessing.active_children()
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for a fault
    for child in children:
        child.kill()
        child.join()


class BadFiles:
    """The files of a run that did not decode: each once, in a CSV file of the run directory."""

    def __init__(
        self, path: Path, *, num_files: int, max_bad_share: float, writes: bool = True
    ) -> None:
        """``writes``: of several processes that note the same failures, one writes them down."""
        self._path = path
        self._writes = writes
        self._num_files = num_files
        self._max_bad_share = max_bad_share
        self._failures: dict[str, Failure] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == 2][1:]
            self._failures = {name: Failure(name, reason) for name, reason in rows}

    def __len__(self) -> int:
        return len(self._failures)

    def note(self, failures: Iterable[Failure]) -> None:
        """Write down the failures of a batch.

        Raises:
            TooManyBadFiles: there are now more bad files than the data allows.
        """
        new = {failure.path: failure for failure in failures if failure.path not in self._failures}
        if not new:
            return
        if self._writes:
            self._append(list(new.values()))
        self._failures |= new
        if len(self) > tolerated(self._num_files, self._max_bad_share):
            raise too_many([*self._failures.values()], self._num_files, self._max_bad_share)

    def _append(self, failures: list[Failure]) -> None:
        header = [] if self._path.exists() else [("path", "reason")]
        with self._path.open("a", newline="", encoding="utf-8") as file:
            rows = [(failure.path, failure.reason) for failure in failures]
            csv.writer(file).writerows([*header, *rows])
