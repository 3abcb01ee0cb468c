"""Measure how training clips are read: phase by phase, and by several processes."""

import copy
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
from hpm_video.data.batch import Sample, collate
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import training_batches
from hpm_video.data.mixture import MixedClips, Place, Places, deal_out
from hpm_video.data.reading import DrawnClips
from hpm_video.data.transforms import Box, ClipTransform, DrawnTransform
from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder, read_bytes
from hpm_video.decoding.registry import DecodeError
from hpm_video.files.failures import Failure, TooManyBadFiles
from hpm_video.workers.room import RoomError, memory_left

IN_WORKERS = ("reading", "decoding", "augmenting")
IN_THE_RUN = ("collating", "copying")
NUM_PLACES = 4 * 10**6
"""Videos that trials may read one after the other."""
PREPARED = 2_000
"""Files that are read into memory before a trial, at most."""
SECONDS_TO_PREPARE = 5.0
WEIGHED = 200
"""Files whose sizes stand for all."""
MIB = 2**20


@dataclass
class Stopwatch:
    """Seconds spent inside of ``with``, in total."""

    seconds: float = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True)
class Phases:
    """Seconds per clip of each phase, in one process."""

    reading: float
    """The bytes of the file."""
    decoding: float
    augmenting: float
    collating: float
    copying: float
    """To the device."""

    def seconds(self, names: Sequence[str]) -> float:
        """Sum some phases."""
        return float(sum(getattr(self, name) for name in names))

    def bottleneck(self, workers: int) -> str:
        """Return the phase that holds up the others when so many processes decode."""
        in_the_run = self.seconds(IN_THE_RUN) > self.seconds(IN_WORKERS) / workers
        return max(IN_THE_RUN if in_the_run else IN_WORKERS, key=lambda name: self.seconds([name]))


@dataclass(frozen=True)
class _Timed(ClipTransform):
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
    """Where training finds the bytes of its files, so that measurements find them there too."""

    num_files: int
    num_bytes: int
    """All files together, estimated."""
    memory: int | None
    """Bytes that are left; none if unknown."""

    @classmethod
    def of(cls, clips: MixedClips) -> "Storage":
        """Weigh a part of the files."""
        num_bytes = 0.0
        for stream in clips.streams:
            files = stream.manifest.files
            sizes = [size_of(path) for path in files[:: -(-len(files) // WEIGHED)]]
            num_bytes += len(files) * sum(sizes) / len(sizes)
        return cls(sum(map(len, clips.streams)), int(num_bytes), memory_left())

    @property
    def is_memory(self) -> bool:
        """Whether the system keeps all files in memory once they were read."""
        return self.memory is not None and self.num_bytes < self.memory / 2

    def __str__(self) -> str:
        plural = "s" * (self.num_files != 1)
        data = f"{self.num_files:,} file{plural} of about {max(1, self.num_bytes / MIB):,.0f} MiB"
        if self.is_memory:
            return f"{data} fit into memory: read from there, as after the first epoch of training"
        return f"{data} may not fit into memory: read from the disk, each once, as in training"


def size_of(path: str) -> int:
    """Return the bytes of a place that :func:`read_all` would read."""
    if member := TarMember.parse(path):
        return member.size
    with suppress(OSError):  # it is not there
        files = frames_in(path) if is_frame_folder(path) else [Path(path)]
        return sum(file.stat().st_size for file in files)
    return 0


def read_all(path: str) -> int:
    """Read the bytes of a file, a member of a tar or a folder of frames. -> how many, 0 if none"""
    try:
        if is_frame_folder(path):
            return sum(len(read_bytes(str(frame))) for frame in frames_in(path))
        return len(read_bytes(path))
    except (DecodeError, OSError):
        return 0


@dataclass
class Trials:
    """Read the clips of a training run for some seconds, again and again."""

    clips: MixedClips
    weights: Sequence[float]
    """Those of the sources."""
    storage: Storage
    batch_size: int
    seconds: float
    _start: int = field(default=0, init=False)
    """The batch that comes next."""

    def __post_init__(self) -> None:
        self._sources = deal_out(self.weights, NUM_PLACES // self.batch_size)

    def places(self) -> "CountedPlaces":
        """Return what is read next."""
        return CountedPlaces(self._sources, self.batch_size, self._start)

    def go_on(self, count: int) -> None:
        """Pass over so many places: what comes from the disk must not be read twice."""
        if not self.storage.is_memory:
            self._start += -(-count // self.batch_size)
            if self._start > 0.9 * len(self._sources):
                self._start = 0

    def phases(
        self, count: int, device: torch.device, decoders: Sequence[DecoderName | None]
    ) -> tuple[Phases, DecoderName | None]:
        """Take clips apart with the first decoder that decodes any. -> phases, and which it is

        Raises:
            DecodeError: none does.
        """
        places = list(islice(self.places(), count))
        for decoder in decoders:
            try:
                phases = time_phases(
                    self.clips,
                    places,
                    batch_size=self.batch_size,
                    device=device,
                    storage=self.storage,
                    decoder=decoder,
                )
            except DecodeError:
                if decoder == decoders[-1]:
                    raise
                continue
            self.go_on(count)
            return phases, decoder
        raise DecodeError("there is no decoder")

    def read(self, trial: "Trial", workers: int) -> None:
        """Have so many processes read, and add what comes of it to ``trial``."""
        places, began = self.places(), time.monotonic()
        for place in islice(places, PREPARED if self.storage.is_memory else 0):
            read_all(self.clips.streams[place.source].request(place.position).path)
            if time.monotonic() > began + SECONDS_TO_PREPARE:
                break
        places.reached = 0
        streams = [_fresh(stream, trial.decoder) for stream in self.clips.streams]
        count = 0
        try:
            batches = training_batches(
                MixedClips(streams), places, batch_size=self.batch_size, workers=workers, pin=False
            )
            with closing(batches):
                trial.files.update(next(batches).files)
                began = time.perf_counter()
                for batch in batches:
                    trial.files.update(batch.files)
                    count += len(batch.clips)
                    if time.perf_counter() > began + self.seconds:
                        break
            trial.rates[workers] = count / (time.perf_counter() - began)
        except RoomError as error:
            trial.error = error
        except TooManyBadFiles as error:
            trial.error = error
            trial.rates.clear()
        for stream in streams:
            trial.refused |= stream.bad
        self.go_on(places.reached)


class CountedPlaces(Places):
    """Places that know how far they were looked at."""

    reached = 0

    def __getitem__(self, index: int) -> Place:  # type: ignore[override]
        place = super().__getitem__(index)
        self.reached = max(self.reached, index + 1)
        return place


@dataclass
class Trial:
    """What came of reading with one decoder."""

    decoder: DecoderName | None
    """None for images."""
    rates: dict[int, float] = field(default_factory=dict)
    """Clips per second by the number of processes that decode."""
    files: set[str] = field(default_factory=set)
    """Those that were read."""
    refused: dict[str, Failure] = field(default_factory=dict)
    error: TooManyBadFiles | RoomError | None = None
    """The last reason why there is no rate."""

    @property
    def refuses_all(self) -> bool:
        """Whether more files failed than training tolerates."""
        return isinstance(self.error, TooManyBadFiles)


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

    ``storage`` and ``decoder``: by default those of the clips.

    Raises:
        DecodeError: none of the files decodes.
    """
    storage = storage or Storage.of(clips)
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
            if storage.is_memory:
                read_all(request.path)
            with reading:
                read_all(request.path)
            with whole:
                samples.append(timed(request))
        except (DecodeError, OSError) as error:
            failure = error
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


def reader_of(stream: VideoClips) -> DrawnClips:
    """Return what reads the clips of a stream."""
    assert isinstance(stream.reader, DrawnClips)
    return stream.reader


def _fresh(stream: VideoClips, decoder: DecoderName | None) -> VideoClips:
    """Copy a stream, with another decoder and without what it knows of files so far."""
    fresh = copy.copy(stream)
    fresh.bad = {}
    if decoder is not None:
        fresh.reader = replace(reader_of(stream), decoder=decoder)
    return fresh


def _in_batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Yield batches of one source each."""
    for _, its_own in groupby(samples, key=lambda sample: sample.source):
        while batch := list(islice(its_own, batch_size)):
            yield batch
