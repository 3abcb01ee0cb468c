"""Batches of clips, decoded by processes that may be lost and are replaced."""

import multiprocessing
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch

from hpm_video.data.batch import ClipBatch, Sample, collate
from hpm_video.data.clips import Clips, Slot
from hpm_video.data.mixture import Place
from hpm_video.data.reading import ClipReader, Request, read_or_fail
from hpm_video.files.failures import Failure
from hpm_video.workers.pool import USUAL, Answer, Limits, Pool
from hpm_video.workers.room import check_room, cores_of_container, usable_cores

MAX_WORKERS = 16
JOB_BYTES = 2**20
"""Samples smaller than this are read several in a job, for each job takes the run some time."""
JOB_FILES = 64
"""Files of a job at most."""
JOBS_HELD = 2
"""Jobs that a process has, so that it finds the next one when it is done."""
ATTEMPTS = 2
"""At a file that its process did not come back from: the file may have had no part in that."""
READY = 1
"""Whole batches that wait for the run."""


ReadPool = Pool[list[tuple[int, Request]]]
"""Its jobs are files, and the number of the source that each is of."""
_Ready = queue.Queue[ClipBatch | BaseException | None]


def default_workers() -> int:
    """Processes that decode: one per core that may be used but one, at least 1 and at most 16.

    A container may have a share of the cores (docker --cpus). Where torchrun started several
    processes on this machine, they share the cores.
    """
    cores = usable_cores()
    cores = min(cores, cores_of_container() or cores)
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 1), MAX_WORKERS)


def clip_batches(
    streams: Sequence[Clips],
    places: Sequence[Place],
    *,
    batch_size: int,
    workers: int,
    pin: bool = False,
    limits: Limits = USUAL,
) -> Generator[ClipBatch, None, None]:
    """Batches of the samples at ``places`` of the streams, in that order.

    Those of a whole training run make one iterator: its processes live as long as it does, and go
    on from one epoch to the next without a pause. Closing it ends them. ``batch_size`` counts
    videos. Without ``workers`` this process decodes, and a file on which it hangs or crashes ends
    the run. ``pin``: batches lie in memory that a GPU can fetch from.
    """
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
    return _in_background(
        lambda: Pool(read, workers, limits, **options),
        lambda pool: _Batches(pool, streams, group).read(places, batch_size, ahead),
        pin=pin,
    )


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

    readers: tuple[ClipReader, ...]

    def prepare(self) -> None:
        for reader in self.readers:
            reader.prepare()

    def __call__(self, jobs: Sequence[tuple[int, Request]]) -> list[Sample | Failure]:
        return [read_or_fail(self.readers[source], request) for source, request in jobs]


class _Batches:
    """Batches in order, of samples that a pool reads in any order."""

    def __init__(self, pool: ReadPool, streams: Sequence[Clips], group: int) -> None:
        """``group``: samples of a job."""
        self._pool = pool
        self._streams = streams
        self._group = group

    def read(self, places: Iterable[Place], batch_size: int, ahead: int) -> Iterator[ClipBatch]:
        """Read so many batches at a time. Raises what the streams raise, at that batch's turn."""
        left, begun = iter(places), deque[list[Slot]]()
        while True:
            while len(begun) < ahead and (chosen := list(islice(left, batch_size))):
                begun.append(self._begin(chosen))
            if not begun:
                return
            batch = begun.popleft()
            while not any(slot.error for slot in batch) and any(slot.request for slot in batch):
                self._take(self._pool.next())
            for error in filter(None, [slot.error for slot in batch]):
                raise error
            yield collate([slot.result() for slot in batch])

    def _begin(self, places: Sequence[Place]) -> list[Slot]:
        batch = [Slot(self._streams[place.source], place.position) for place in places]
        asked = [slot for slot in batch if slot.request is not None]
        for start in range(0, len(asked), self._group):
            self._submit(asked[start : start + self._group])
        return batch

    def _submit(self, slots: Sequence[Slot], *, first: bool = False) -> None:
        jobs = [(self._streams.index(s.clips), s.request) for s in slots if s.request is not None]
        attempts = ATTEMPTS if len(jobs) == 1 else 1
        self._pool.submit(slots, jobs, path=jobs[0][1].path, first=first, attempts=attempts)

    def _take(self, answer: Answer) -> None:
        slots, results = answer.tag, answer.result
        if isinstance(results, Failure):
            if len(slots) > 1:  # one of them did it: each by itself
                for slot in reversed(slots):
                    self._submit([slot], first=True)
                return
            results = [results]
        for slot, result in zip(slots, results, strict=True):
            slot.put(result)
            if slot.request is not None:
                self._submit([slot], first=True)


def _in_background(
    begin: Callable[[], ReadPool], read: Callable[[ReadPool], Iterator[ClipBatch]], *, pin: bool
) -> Generator[ClipBatch, None, None]:
    """Batches that a thread puts together, while the run is at the one before."""
    ready: _Ready = queue.Queue(READY)
    stopped = threading.Event()
    # A thread begins on GPU 0: to pin memory there would take some of a GPU of another process.
    device = torch.cuda.current_device() if pin else None
    with begin() as pool:
        options = (lambda: read(pool), ready, stopped, device)
        thread = threading.Thread(target=_produce, args=options, daemon=True, name="batches")
        thread.start()
        try:
            while (batch := ready.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stopped.set()
            pool.stop()
            thread.join(timeout=5)


def _produce(
    read: Callable[[], Iterator[ClipBatch]],
    ready: _Ready,
    stopped: threading.Event,
    device: int | None,
) -> None:
    """Hand over batches, at last none, or an error; with a device, in pinned memory."""

    def give(thing: ClipBatch | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(thing, timeout=0.1)
                return

    try:
        if device is not None:
            torch.cuda.set_device(device)
        for batch in read():
            give(batch if device is None else batch.pin_memory())
        give(None)
    except BaseException as error:  # noqa: BLE001 - the run raises it
        give(error)


def end_workers() -> None:
    """Kill the processes that are still there: one may hang in native code for ever."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join(timeout=2)
