"""What reading training clips costs, phase by phase, and how much of it so many processes do."""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderName
from hpm_video.data.batch import ClipBatch, Sample, collate
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import training_batches
from hpm_video.data.mixture import MixedClips, Place
from hpm_video.data.reading import DrawnClips
from hpm_video.data.transforms import Box, ClipTransform, DrawnTransform
from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder, read_bytes
from hpm_video.decoding.registry import DecodeError
from hpm_video.files.failures import Failure, TooManyBadFiles
from hpm_video.workers.room import memory_left

IN_WORKERS = ("reading", "decoding", "augmenting")
IN_THE_RUN = ("collating", "copying")
PREPARED = 2_000
"""Places of a trial whose files are forgotten or recalled before it, at most."""
SECONDS_TO_PREPARE = 5.0
"""That this may take."""
WEIGHED = 200
"""Files that tell how large all of them are."""
MIB = 2**20


class RefusedFiles(TooManyBadFiles):
    """A decoder refuses more files than the data allow."""

    def __init__(self, message: str, first: Failure) -> None:
        super().__init__(message)
        self.first = first


@dataclass
class Stopwatch:
    """Seconds that something took, all together."""

    seconds: float = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True)
class Phases:
    """Seconds per clip, each phase by itself in one process."""

    reading: float
    """The bytes of the file, from where training has them, see :class:`Storage`; of folders of
    frames none, it is part of decoding."""
    decoding: float
    """From those bytes to the pixels of the frames that are wanted."""
    augmenting: float
    collating: float
    """Into a batch."""
    copying: float
    """To the device."""

    def seconds(self, names: Sequence[str]) -> float:
        """Of some phases together."""
        return float(sum(getattr(self, name) for name in names))

    def bottleneck(self, workers: int) -> str:
        """The phase that holds up the others, with so many processes that decode."""
        if self.seconds(IN_THE_RUN) > self.seconds(IN_WORKERS) / workers:
            return max(IN_THE_RUN, key=lambda name: self.seconds([name]))
        return max(IN_WORKERS, key=lambda name: self.seconds([name]))


@dataclass(frozen=True)
class _Timed(ClipTransform):
    """A transform whose work is timed."""

    transform: ClipTransform
    watch: Stopwatch = field(compare=False)

    def draw(
        self, size: tuple[int, int], frame_size: tuple[int, int], draw: np.random.Generator
    ) -> "_TimedDrawn":
        return _TimedDrawn(self.transform.draw(size, frame_size, draw), self.watch)


@dataclass(frozen=True)
class _TimedDrawn:
    drawn: DrawnTransform
    watch: Stopwatch

    @property
    def box(self) -> Box:
        return self.drawn.box

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        with self.watch:
            return self.drawn(pixels)


@dataclass(frozen=True)
class Storage:
    """Where training finds the bytes of its files, so that measurements find them there as well."""

    num_files: int
    num_bytes: int
    """Of all files, estimated."""
    memory: int | None
    """Bytes that are left; none if unknown."""

    @property
    def is_memory(self) -> bool:
        """Whether the system keeps all files in memory, once they were read."""
        return self.memory is not None and self.num_bytes < self.memory / 2

    def prepare(self, place: str) -> None:
        """Have the bytes of a place where training would find them, as far as the system does it.

        What cannot be opened is passed over.
        """
        for path, start, size in _extents(place):
            # A pipe that stands in for a file must not hold this up.
            with suppress(OSError), open(path, "rb", opener=_without_waiting) as file:  # noqa: PTH123
                if self.is_memory:
                    file.seek(start)
                    file.read(size or -1)
                elif hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)

    def prepare_all(self, clips: MixedClips, places: Sequence[Place]) -> None:
        """Prepare the first of those places, as many as can be done at once."""
        until = time.monotonic() + SECONDS_TO_PREPARE
        for place in islice(places, PREPARED):
            self.prepare(clips.streams[place.source].request(place.position).path)
            if time.monotonic() > until:
                return

    def __str__(self) -> str:
        files = f"{self.num_files:,} file{'s' * (self.num_files != 1)}"
        data = f"{files} of about {max(1, self.num_bytes / MIB):,.0f} MiB"
        if self.is_memory:
            return (
                f"{data} fit into memory: they are read from there, as training reads them after "
                "its first epoch"
            )
        if not hasattr(os, "posix_fadvise"):
            return f"{data} are read from the disk, or from memory where the system has them"
        return (
            f"{data} may not fit into memory: they are read from the disk, as training reads them "
            "(the system is asked to forget them before)"
        )


def storage_of(clips: MixedClips) -> Storage:
    """Where the files of those clips are read from. A part of them is looked at."""
    num_bytes = 0.0
    for stream in clips.streams:
        files = stream.manifest.files
        sizes = [_size(place) for place in files[:: -(-len(files) // WEIGHED)]]
        num_bytes += len(files) * sum(sizes) / len(sizes)
    count = sum(len(stream) for stream in clips.streams)
    return Storage(count, int(num_bytes), memory_left())


def time_phases(
    clips: MixedClips,
    places: Sequence[Place],
    *,
    batch_size: int,
    device: torch.device,
    storage: Storage | None = None,
    decoder: DecoderName | None = None,
) -> Phases:
    """Take the clips at ``places`` apart into phases, in this process. Bad files are left out.

    ``storage``: by default that of the clips. ``decoder``: another one than the clips have.

    Raises:
        DecodeError: none of the files decodes.
    """
    storage = storage or storage_of(clips)
    streams = [_fresh(stream, decoder) for stream in clips.streams]
    reading, whole, augmenting = Stopwatch(), Stopwatch(), Stopwatch()
    collating, copying = Stopwatch(), Stopwatch()
    samples: list[Sample] = []
    failure: DecodeError | OSError | None = None
    for place in places:
        request = streams[place.source].request(place.position)
        reader = reader_of(streams[place.source])
        timed = replace(reader, transform=_Timed(reader.transform, augmenting))
        try:
            storage.prepare(request.path)
            _read(request.path, reading)
            with whole:
                sample = timed(request)
        except (DecodeError, OSError) as error:
            failure = error
            continue
        samples.append(sample)
    if not samples:
        raise DecodeError(f"none of the first {len(places)} files decodes. The last: {failure}")
    for batch in _in_batches(samples, batch_size):
        with collating:
            put_together = collate(batch)
        with copying:
            put_together.to(device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    count = sum(len(sample.clips) for sample in samples)
    return Phases(
        reading.seconds / count,
        (whole.seconds - augmenting.seconds) / count,
        augmenting.seconds / count,
        collating.seconds / count,
        copying.seconds / count if device.type == "cuda" else 0.0,
    )


@dataclass
class Trial:
    """What came of reading for some seconds."""

    rate: float = 0.0
    """Clips per second, once the processes were at it."""
    reached: int = 0
    """Places that were looked at."""
    read: set[str] = field(default_factory=set)
    """Files."""
    refused: dict[str, Failure] = field(default_factory=dict)
    """By path."""

    def note(self, batch: ClipBatch) -> None:
        """Take the files of a batch."""
        self.read.update(batch.files)
        self.refused |= {failure.path: failure for failure in batch.failures}


def try_reading(
    clips: MixedClips,
    places: Sequence[Place],
    *,
    batch_size: int,
    workers: int,
    seconds: float,
    decoder: DecoderName | None = None,
) -> Trial:
    """Have so many processes read for some seconds.

    ``decoder``: another one than the clips have.

    Raises:
        RefusedFiles: more files do not decode than the data allow.
        RoomError: the machine has no room for so many processes.
    """
    streams = [_fresh(stream, decoder) for stream in clips.streams]
    looked_at = _LookedAt(places)
    trial = Trial()
    batches = training_batches(
        MixedClips(streams), looked_at, batch_size=batch_size, workers=workers, pin=False
    )
    try:
        with closing(batches):
            trial.note(next(batches))
            began = time.perf_counter()
            count = 0
            for batch in batches:
                count += len(batch.clips)
                trial.note(batch)
                if time.perf_counter() - began > seconds:
                    break
            trial.rate = count / (time.perf_counter() - began)
    except TooManyBadFiles as error:
        first = next(failure for stream in streams for failure in stream.bad.values())
        raise RefusedFiles(str(error), first) from error
    trial.reached = looked_at.reached
    return trial


class _LookedAt(Sequence[Place]):
    """Places, and how far they were looked at."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self.reached = 0

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Place:  # type: ignore[override]
        place = self._places[index]
        self.reached = max(self.reached, index + 1)
        return place


def reader_of(stream: VideoClips) -> DrawnClips:
    """What reads its clips."""
    assert isinstance(stream.reader, DrawnClips)
    return stream.reader


def _fresh(stream: VideoClips, decoder: DecoderName | None) -> VideoClips:
    """The stream with another decoder, and without what it knows of files so far."""
    fresh = copy.copy(stream)
    fresh.bad = {}
    if decoder is not None:
        fresh.reader = replace(reader_of(stream), decoder=decoder)
    return fresh


def _read(place: str, watch: Stopwatch) -> None:
    if not is_frame_folder(place):
        with watch:
            read_bytes(place)


def _extents(place: str) -> Iterator[tuple[str, int, int]]:
    """Files of a place, and which bytes of each: from where on, and how many (0: all)."""
    if is_frame_folder(place):
        with suppress(OSError):
            yield from ((str(path), 0, 0) for path in frames_in(place))
    elif member := TarMember.parse(place):
        yield member.tar, member.offset, member.size
    else:
        yield place, 0, 0


def _size(place: str) -> int:
    """Bytes of a place; none of what is not there."""
    total = 0
    for path, _, size in _extents(place):
        with suppress(OSError):
            total += size or Path(path).stat().st_size
    return total


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _in_batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Batches of one source each."""
    for _, its_own in groupby(samples, key=lambda sample: sample.source):
        while batch := list(islice(its_own, batch_size)):
            yield batch
