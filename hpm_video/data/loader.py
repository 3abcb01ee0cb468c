"""Batches of clips, and parts of long videos, read by processes that are replaced when lost."""

import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.data import DataConfig
from hpm_video.data import reading
from hpm_video.data.batch import ClipBatch, Sample, collate
from hpm_video.data.buffers import Buffers, Sender
from hpm_video.data.clips import Clips, Slot, check_pace, decoder_for, request_of
from hpm_video.data.manifest import Manifest
from hpm_video.data.mixture import Place
from hpm_video.data.reading import ClipReader, Request, Views
from hpm_video.decoding.reader import DecodeError
from hpm_video.files.failures import Failure
from hpm_video.workers.pool import NAME, USUAL, Answer, Limits, Pool
from hpm_video.workers.room import check_room

JOB_BYTES = 2**20  # smaller samples are read several in a job, which takes the run some time
JOB_FILES = 64  # of a job at most
JOBS_HELD = 2  # by a process, so that it finds the next one when it is done
ATTEMPTS = 2  # at a file whose process was lost, which need not be the fault of the file
READY = 1  # complete batches that wait for the run
ELSEWHERE = torch.empty(0)  # in the place of clips that lie in a batch's buffer already

Job = tuple[int, Request, int]
"""A file: the number of its source, what is to be read, and where in the shared memory."""
Result = tuple[int, ...] | Failure
"""The keys of its clips, which lie in the shared memory then, or why there are none."""
ReadPool = Pool[list[Job]]


def clip_batches(
    streams: Sequence[Clips],
    places: Sequence[Place],
    *,
    batch_size: int,
    workers: int,
    gpu: torch.device | None = None,
    limits: Limits = USUAL,
) -> Generator[ClipBatch, None, None]:
    """Read the samples at ``places`` of the streams in batches, in that order.

    Its processes live as long as the iterator, over all epochs; closing it ends them.
    ``batch_size`` counts videos. Without ``workers`` this process decodes, and a file on which it
    hangs or crashes ends the run.

    A batch is a view of shared memory. On a CPU its place is written to again once no tensor refers
    to it: who keeps batches holds up those that are read ahead. With ``gpu`` the batches lie there,
    copied while the run is at earlier ones.
    """
    if workers == 0 or not places:
        return _read_here(streams, places, batch_size)
    sample_bytes = max(stream.sample_bytes for stream in streams)
    group = min(max(1, JOB_BYTES // sample_bytes), JOB_FILES)
    workers = min(workers, -(-len(places) // group))
    ahead = 2 + 2 * workers * group // batch_size
    count = min(ahead + READY + 2, -(-len(places) // batch_size))  # the run has one or two
    batch_bytes = batch_size * sample_bytes
    check_room(workers, shared=count * batch_bytes, batches=batch_bytes)
    buffers = Buffers(count, batch_bytes)
    read = _ReadAll(tuple(stream.reader for stream in streams), buffers.shared)
    return _in_background(
        lambda: Pool(read, workers, limits, depth=JOBS_HELD),
        lambda pool: _Batches(pool, streams, buffers, group).read(places, batch_size, ahead),
        lambda: closing(Sender(gpu, buffers.shared)) if gpu else nullcontext(),
    )


def _read_here(
    streams: Sequence[Clips], places: Iterable[Place], batch_size: int
) -> Generator[ClipBatch, None, None]:
    left = iter(places)
    while chosen := list(islice(left, batch_size)):
        yield collate([streams[place.source][place.position] for place in chosen])


@dataclass(frozen=True)
class _ReadAll:
    """The work of a process: reads some files, each by the reader of its source."""

    readers: tuple[ClipReader, ...]
    shared: Any

    def prepare(self) -> None:
        for reader in self.readers:
            reader.prepare()

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        return [self._read(*job) for job in jobs]

    def _read(self, source: int, request: Request, start: int) -> Result:
        read = reading.read_or_fail(self.readers[source], request)
        if isinstance(read, Failure):
            return read
        size = read.clips.numel()
        place = torch.frombuffer(self.shared, dtype=torch.uint8, count=size, offset=start)
        place.view(read.clips.shape).copy_(read.clips)
        return read.keys


class _Batches:
    """Batches in order, of samples that a pool reads in any order."""

    def __init__(
        self, pool: ReadPool, streams: Sequence[Clips], buffers: Buffers, group: int
    ) -> None:
        """``group``: samples of a job."""
        self._pool, self._streams, self._buffers, self._group = pool, streams, buffers, group
        self._begun = deque[tuple[list[Slot], NDArray[np.uint8]]]()

    def read(self, places: Iterable[Place], batch_size: int, ahead: int) -> Iterator[ClipBatch]:
        """Read so many batches ahead. Raises what the streams raise, at that batch's turn."""
        left = iter(places)
        while True:
            while (
                len(self._begun) < ahead
                and self._buffers.free
                and (chosen := list(islice(left, batch_size)))
            ):
                self._begin(chosen)
            if not self._begun:
                assert self._buffers.free, "places are left, and no buffer"
                return
            for slot in self._begun[0][0]:
                while slot.request is not None:
                    self._take(self._pool.next())
            yield self._finish(*self._begun.popleft())  # and refer to it no more

    def _begin(self, chosen: Sequence[Place]) -> None:
        clips = self._streams[chosen[0].source]  # a batch is of one source
        start, array = self._buffers.take()
        batch = [
            Slot(clips, place.position, start + number * clips.sample_bytes)
            for number, place in enumerate(chosen)
        ]
        self._begun.append((batch, array))
        asked = [slot for slot in batch if slot.request is not None]
        for first in range(0, len(asked), self._group):
            self._submit(asked[first : first + self._group])

    def _finish(self, slots: Sequence[Slot], array: NDArray[np.uint8]) -> ClipBatch:
        """Make a batch of a full buffer, or of a copy where nothing else could be read into."""
        samples, clips = [slot.result() for slot in slots], slots[0].clips
        pixels = torch.from_numpy(array)[: len(slots) * clips.sample_bytes]
        pixels = pixels.view(-1, *clips.clip_shape)
        if all(sample.keys for sample in samples):
            can_go_on = self._begun or self._buffers.free
            return collate(samples, pixels if can_go_on else pixels.clone())
        parts = zip(samples, pixels.chunk(len(slots)), strict=True)  # of a failure there is nothing
        return collate([replace(one, clips=part[: len(one.keys)]) for one, part in parts])

    def _submit(self, slots: Sequence[Slot], *, first: bool = False) -> None:
        jobs = [
            (self._streams.index(slot.clips), slot.request, slot.start)
            for slot in slots
            if slot.request is not None
        ]
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
            if isinstance(result, tuple):
                asked, source = slot.request, slot.clips.source
                result = Sample(ELSEWHERE, result, asked.label, asked.path, source=source)
            slot.put(result)
            if slot.request is not None:
                self._submit([slot], first=True)


def _in_background(
    begin: Callable[[], ReadPool],
    read: Callable[[ReadPool], Iterator[ClipBatch]],
    open_sender: Callable[[], AbstractContextManager[Sender | None]],
) -> Generator[ClipBatch, None, None]:
    """Yield batches that a thread puts together while the run is at the one before."""
    with (
        begin() as pool,
        open_sender() as sender,
        ThreadPoolExecutor(1, "batches", sender.begin if sender else None) as thread,
    ):
        batches = read(pool)

        def produce() -> tuple[ClipBatch, Any] | None:
            if sender:
                sender.wait()
            batch = next(batches, None)
            if batch is None:
                return None
            return sender.send(batch) if sender else (batch, None)

        ready = deque(thread.submit(produce) for _ in range(READY + 1))
        try:
            while (produced := ready.popleft().result()) is not None:
                ready.append(thread.submit(produce))
                yield sender.receive(*produced) if sender else produced[0]
                del produced
        finally:
            pool.stop()


@dataclass(frozen=True)
class Part:
    """Some views of one video, which follow those of its part before."""

    clips: Tensor  # (R, C, T, H, W) uint8, the crops of a clip next to each other
    frames: NDArray[np.int64]  # (R, T) the frames of each, by their numbers in the file
    num_views: int  # views of the whole video, or of the section that is meant of it
    num_frames: int  # frames of the file


def stream_parts(
    manifest: Manifest,
    places: Sequence[int],
    data: DataConfig,
    views: Views,
    *,
    clips_per_part: int,
    workers: int = 0,
    limits: Limits = USUAL,
) -> Generator[tuple[int, Part | Failure], None, None]:
    """Read the views of the videos at ``places`` of a manifest, in parts of at most so many clips.

    Each part comes with the place of its video; those of several processes are interleaved. After a
    failure no part of its video follows, and those before are void. Closing the generator ends the
    processes. Without ``workers`` a file on which decoding hangs or crashes ends this process.
    """
    decoder = decoder_for(data.decoder, manifest)
    reader = PartReader(data, decoder, views, max(1, clips_per_part // views.crops))
    check_pace(data, manifest)
    jobs = [(place, request_of(manifest, place)) for place in places]
    if workers == 0:
        for place, job in jobs:
            yield from ((place, part) for part in reader(job))
        return
    size = reader.part_bytes
    check_room(workers, shared=JOBS_HELD * workers * size, batches=size)
    with Pool(reader, workers, limits, result_bytes=size, depth=JOBS_HELD) as pool:
        for place, job in jobs:
            pool.submit(place, job, path=job.path, attempts=ATTEMPTS)
        left = len(jobs)
        while left:
            place, part, is_last = pool.next()
            left -= is_last
            yield place, part


@dataclass(frozen=True)
class PartReader(reading.Reader):
    """Reads the parts of a video; a failure ends them."""

    views: Views
    clips_per_part: int

    @property
    def part_bytes(self) -> int:
        of_view = math.prod((self.data.channels, *self.data.clip_size)) + 8 * self.data.num_frames
        return self.clips_per_part * self.views.crops * of_view

    def __call__(self, request: Request) -> Iterator[Part | Failure]:
        crops, count = self.views.crops, self.clips_per_part
        try:
            with self.open(request) as (video, footage):
                num_frames = video.frames_stated(request.num_frames)
                table = footage.views(self.data, self.views)
                clips = reading.read_views(self.data, video, table, crops)
                for first in range(0, len(table), count):
                    frames = np.repeat(table[first : first + count], crops, axis=0)
                    part = torch.cat([*islice(clips, count)])
                    yield Part(part, frames, len(table) * crops, num_frames)
        except DecodeError as error:
            yield Failure(request.path, error.reason)


def end_workers() -> None:
    """Kill the processes of pools that are still there: one may hang in native code for ever."""
    for child in multiprocessing.active_children():
        if child.name == NAME:
            child.kill()
            child.join(timeout=2)
