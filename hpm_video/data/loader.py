"""Batches of clips, decoded by processes that may be lost and are replaced."""

import csv
import logging
import multiprocessing
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from hpm_video.data.clips import (
    ClipBatch,
    Clips,
    Failure,
    HeldOutClips,
    Reader,
    Request,
    Sample,
    TooManyBadFiles,
    collate,
    read_or_fail,
    tolerated,
    too_many,
)
from hpm_video.data.manifest import ManifestError
from hpm_video.data.mixture import MixedClips, Place
from hpm_video.decoding.registry import DecodeError
from hpm_video.workers.pool import USUAL, Answer, Limits, Lost, Pool
from hpm_video.workers.room import check_room, cores_of_container

log = logging.getLogger(__name__)

MAX_WORKERS = 16
JOB_BYTES = 2**20
"""Of smaller samples several are read in a job, for each job takes the run some time."""
JOB_FILES = 64
"""But never more than so many."""
JOBS_HELD = 2
"""That a process has, so that it finds the next one when it is done."""
ATTEMPTS = 2
"""At a file that its process did not come back from: the file may have had no part in that."""
READY = 1
"""Whole batches that wait for the run."""


ReadPool = Pool[list[tuple[int, Request]]]
"""Its jobs are files, and the number of the source that each is of."""


def default_workers() -> int:
    """Processes that decode: one per core that may be used but one, at least 1 and at most 16.

    A container may have a share of the cores (docker --cpus). Where torchrun started several
    processes on this machine, they share the cores.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    cores = min(cores, cores_of_container() or cores)
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 1), MAX_WORKERS)


def training_batches(
    dataset: MixedClips,
    places: Sequence[Place],
    *,
    batch_size: int,
    workers: int,
    pin: bool,
    limits: Limits = USUAL,
) -> Generator[ClipBatch, None, None]:
    """Batches of the samples at ``places`` of the endless streams, in that order.

    Those of a whole run make one iterator: its processes live as long as it does, and go on from
    one epoch to the next without a pause. Closing it ends them. ``batch_size`` counts videos.
    Without ``workers`` this process decodes, and a file on which it hangs or crashes ends the run.

    Raises:
        RoomError: the machine has no room for what is read ahead.
    """
    return _batches(dataset.streams, places, batch_size, workers, limits, pin=pin)


def held_out_batches(
    dataset: HeldOutClips,
    *,
    batch_size: int,
    workers: int,
    positions: Sequence[int] | None = None,
    limits: Limits = USUAL,
) -> Generator[ClipBatch, None, None]:
    """Batches of the held-out clips at ``positions``, by default of all, in that order.

    ``batch_size`` and ``workers`` as of :func:`training_batches`.

    Raises:
        RoomError: the machine has no room for what is read ahead.
    """
    chosen = range(len(dataset)) if positions is None else positions
    places = [Place(0, position) for position in chosen]
    return _batches([dataset], places, batch_size, workers, limits, pin=False)


def _batches(
    streams: Sequence[Clips],
    places: Sequence[Place],
    batch_size: int,
    workers: int,
    limits: Limits,
    *,
    pin: bool,
) -> Generator[ClipBatch, None, None]:
    if workers == 0 or not places:
        return _read_here(streams, places, batch_size, pin=pin)
    sample_bytes = max(stream.sample_bytes for stream in streams)
    group = min(max(1, JOB_BYTES // sample_bytes), JOB_FILES)
    workers = min(workers, -(-len(places) // group))
    ahead = 2 + 2 * workers * group // batch_size
    check_room(
        workers,
        shared=JOBS_HELD * workers * group * sample_bytes,
        batches=(ahead + READY + 2) * batch_size * sample_bytes,
    )
    read = _ReadAll(tuple(stream.reader for stream in streams))
    options = {"result_bytes": group * sample_bytes, "depth": JOBS_HELD}
    batches = _Batches(streams, places, batch_size, group=group, ahead=ahead)
    return _in_background(lambda: Pool(read, workers, limits, **options), batches, pin=pin)


def _read_here(
    streams: Sequence[Clips], places: Iterable[Place], batch_size: int, *, pin: bool
) -> Generator[ClipBatch, None, None]:
    left = iter(places)
    while chosen := list(islice(left, batch_size)):
        batch = collate([streams[place.source][place.position] for place in chosen])
        yield batch.pin_memory() if pin else batch


@dataclass(frozen=True)
class _ReadAll:
    """What a process does: read some files, each by the reader of its source."""

    readers: tuple[Reader, ...]

    def prepare(self) -> None:
        for reader in self.readers:
            reader.prepare()

    def __call__(self, jobs: Sequence[tuple[int, Request]]) -> list[Sample | Failure]:
        return [read_or_fail(self.readers[source], request) for source, request in jobs]


@dataclass(eq=False)
class _Row:
    """A sample of a batch that is being read."""

    batch: "_Begun"
    place: Place
    sample: Sample | None = None
    request: Request | None = None
    """What a process was asked to read for it."""
    failures: tuple[Failure, ...] = ()
    """Files that were to be it."""


class _Begun:
    """A batch of which not all may have been read."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.rows = [_Row(self, place) for place in places]
        self.error: DecodeError | TooManyBadFiles | None = None

    @property
    def is_whole(self) -> bool:
        return self.error is not None or all(row.sample is not None for row in self.rows)

    def batch(self) -> ClipBatch:
        if self.error is not None:
            raise self.error
        return collate([row.sample for row in self.rows if row.sample is not None])


class _Batches:
    """Batches in order, of samples that a pool reads in any order."""

    def __init__(
        self,
        streams: Sequence[Clips],
        places: Iterable[Place],
        batch_size: int,
        *,
        group: int,
        ahead: int,
    ) -> None:
        """``group``: samples of a job. ``ahead``: batches that are being read at a time."""
        self._streams = streams
        self._places = iter(places)
        self._batch_size = batch_size
        self._group = group
        self._ahead = ahead
        self._begun: deque[_Begun] = deque()

    def run(self, pool: ReadPool) -> Iterator[ClipBatch]:
        """Raises what the streams raise, when it is the turn of that batch."""
        while True:
            self._begin(pool)
            if not self._begun:
                return
            while not self._begun[0].is_whole:
                self._take(pool, pool.next())
            yield self._begun.popleft().batch()

    def _begin(self, pool: ReadPool) -> None:
        while len(self._begun) < self._ahead:
            chosen = list(islice(self._places, self._batch_size))
            if not chosen:
                return
            begun = _Begun(chosen)
            self._begun.append(begun)
            asked = [row for row in begun.rows if self._asks(row)]
            for start in range(0, len(asked), self._group):
                self._submit(pool, asked[start : start + self._group])

    def _asks(self, row: _Row) -> bool:
        """Whether something has to be read for a row; it knows what, then."""
        try:
            asked = self._streams[row.place.source].request(row.place.position)
        except (DecodeError, TooManyBadFiles) as error:
            row.batch.error = error
            return False
        if isinstance(asked, Sample):
            row.sample = asked
            return False
        row.request = asked
        return True

    def _submit(self, pool: ReadPool, rows: list[_Row], *, first: bool = False) -> None:
        jobs = [(row.place.source, row.request) for row in rows if row.request is not None]
        pool.submit(rows, jobs, first=first, attempts=ATTEMPTS if len(rows) == 1 else 1)

    def _take(self, pool: ReadPool, answer: Answer) -> None:
        rows: list[_Row] = answer.tag
        if not isinstance(answer.result, Lost):
            for row, result in zip(rows, answer.result, strict=True):
                self._put(pool, row, result)
        elif len(rows) == 1:
            assert rows[0].request is not None
            failure = Failure(rows[0].request.path, answer.result.reason)
            self._put(pool, rows[0], failure)
        else:  # one of them did it: each by itself
            for row in reversed(rows):
                self._submit(pool, [row], first=True)

    def _put(self, pool: ReadPool, row: _Row, result: Sample | Failure) -> None:
        if isinstance(result, Sample):
            row.sample = replace(result, failures=row.failures)
            return
        self._streams[row.place.source].bad[result.path] = result
        row.failures += (result,)
        if self._asks(row):
            self._submit(pool, [row], first=True)


class _Handover:
    """What one thread makes and another takes, until that one wants no more."""

    def __init__(self) -> None:
        self._things: queue.Queue[ClipBatch | BaseException | None] = queue.Queue(READY)
        self._wanted = True

    def give(self, thing: ClipBatch | BaseException | None) -> None:
        """Wait for room, where there is still somebody who takes it."""
        while self._wanted:
            try:
                self._things.put(thing, timeout=0.1)
            except queue.Full:
                continue
            return

    def take(self) -> ClipBatch | None:
        """The next batch; none after the last. Raises what the other thread gave as an error."""
        thing = self._things.get()
        if isinstance(thing, BaseException):
            raise thing
        return thing

    def close(self) -> None:
        self._wanted = False


def _in_background(
    begin: Callable[[], ReadPool], batches: _Batches, *, pin: bool
) -> Generator[ClipBatch, None, None]:
    """Batches that a thread puts together, while the run is at the one before."""
    handover = _Handover()
    # A thread begins on GPU 0: to pin memory there would take some of a GPU of another process.
    device = torch.cuda.current_device() if pin else None

    def produce(pool: ReadPool) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            for batch in batches.run(pool):
                handover.give(batch.pin_memory() if pin else batch)
            handover.give(None)
        except BaseException as error:  # noqa: BLE001 - the run raises it
            handover.give(error)

    with begin() as pool:
        thread = threading.Thread(target=produce, args=(pool,), daemon=True, name="batches")
        thread.start()
        try:
            while (batch := handover.take()) is not None:
                yield batch
        finally:
            handover.close()
            pool.stop()
            thread.join(timeout=5)


def end_workers() -> None:
    """Kill the processes that are still there: one may hang in native code for ever."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(timeout=2)


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
        self.failures: dict[str, Failure] = {}
        """By path."""
        if path.exists():
            try:
                with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                    rows = [row for row in csv.reader(file) if len(row) == 2][1:]
            except csv.Error as error:
                raise ManifestError(
                    f"{path} is no list of bad files ({error}); delete it: the run finds them again"
                ) from error
            self.failures = {name: Failure(name, reason) for name, reason in rows}

    def __len__(self) -> int:
        return len(self.failures)

    def note(self, failures: Iterable[Failure]) -> None:
        """Write down the failures of a batch.

        Raises:
            TooManyBadFiles: there are now more bad files than the data allows.
        """
        new = {failure.path: failure for failure in failures if failure.path not in self.failures}
        if not new:
            return
        if self._writes:
            self._append(list(new.values()))
            for number, failure in enumerate(new.values(), start=len(self) + 1):
                log.warning(
                    "bad file %d (%s has all): %s: %s",
                    number,
                    self._path.name,
                    failure.path,
                    failure.reason,
                )
        self.failures |= new
        self.check()

    def check(self) -> None:
        """Make sure that there are not too many.

        Raises:
            TooManyBadFiles: there are more bad files than the data allows.
        """
        if len(self) > tolerated(self._num_files, self._max_bad_share):
            raise too_many([*self.failures.values()], self._num_files, self._max_bad_share)

    def _append(self, failures: list[Failure]) -> None:
        header = [] if self._path.exists() else [("path", "reason")]
        with self._path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = [(failure.path, failure.reason) for failure in failures]
            csv.writer(file).writerows([*header, *rows])
