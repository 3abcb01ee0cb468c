"""Measure how training clips are read, phase by phase and by several processes."""

import copy
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderName
from hpm_video.data.batch import Sample, collate
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import clip_batches
from hpm_video.data.mixture import Place, Places, deal_out
from hpm_video.data.reading import TrainReader
from hpm_video.data.transforms import ClipTransform, DrawnCrop
from hpm_video.decoding.locations import frames_in, is_frame_folder, read_bytes
from hpm_video.decoding.reader import DecodeError
from hpm_video.files.failures import Failure, TooManyBadFiles
from hpm_video.preparation.check import stamp_of
from hpm_video.workers.room import RoomError, memory_left

IN_WORKERS = ("reading", "decoding", "augmenting")
IN_THE_RUN = ("collating", "copying")
NUM_PLACES = 4 * 10**6
"""Number of videos in the order that trials read."""
READ_AHEAD = 1_000
"""Upper bound on the videos that a trial reads ahead without counting them."""
WARMED_UP, SECONDS_OF_WARMUP = 2_000, 5.0
"""Limits on the videos that are read into memory before a trial, and on the time for it."""
SAMPLED_SIZES = 200
"""Number of files from whose sizes the total is estimated."""
MIB = 2**20


@dataclass(frozen=True)
class Phases:
    """Seconds per clip of each phase, in one process."""

    reading: float
    decoding: float
    augmenting: float
    collating: float
    copying: float
    """Includes the transfer to the device."""

    def seconds(self, names: Iterable[str]) -> float:
        """Sum some phases."""
        return float(sum(getattr(self, name) for name in names))

    def bottleneck(self, workers: int) -> str:
        """Return the phase that holds up the others when so many processes decode."""
        in_the_run = self.seconds(IN_THE_RUN) > self.seconds(IN_WORKERS) / workers
        return max(IN_THE_RUN if in_the_run else IN_WORKERS, key=lambda name: self.seconds([name]))


class Stopwatch:
    """Total of the seconds spent inside ``with``."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True)
class _TimedTransform(ClipTransform):
    transform: ClipTransform
    stopwatch: Stopwatch

    def draw(
        self, size: tuple[int, int], frame_size: tuple[int, int], draw: np.random.Generator
    ) -> "_TimedCrop":
        drawn = self.transform.draw(size, frame_size, draw)
        return _TimedCrop(drawn.box, frame_size, "bilinear", False, drawn, self.stopwatch)


@dataclass(frozen=True)
class _TimedCrop(DrawnCrop):
    drawn: DrawnCrop
    stopwatch: Stopwatch

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        with self.stopwatch:
            return self.drawn(pixels)


@dataclass(frozen=True)
class Storage:
    """Where training reads its files from: memory or the disk. Measurements do the same."""

    num_files: int
    num_bytes: int
    """An estimate for all files together."""
    memory: int | None
    """Free bytes; none if unknown."""

    @classmethod
    def of(cls, clips: Sequence[VideoClips]) -> "Storage":
        """Estimate the total from the sizes of some files."""
        num_bytes = 0.0
        for stream in clips:
            files = stream.manifest.files
            sizes = [size_of(path) for path in files[:: -(-len(files) // SAMPLED_SIZES)]]
            num_bytes += len(files) * sum(sizes) / len(sizes)
        return cls(sum(map(len, clips)), int(num_bytes), memory_left())

    @property
    def is_memory(self) -> bool:
        """Whether the system keeps all files in memory once they have been read."""
        return self.memory is not None and self.num_bytes < self.memory / 2

    def __str__(self) -> str:
        plural = "s" * (self.num_files != 1)
        data = f"{self.num_files:,} file{plural} of about {max(1, self.num_bytes / MIB):,.0f} MiB"
        if self.is_memory:
            return f"{data} fit into memory: read from there, as after the first epoch of training"
        return f"{data} may not fit into memory: read from the disk, each once, as in training"


def size_of(path: str) -> int:
    """Return the number of bytes that :func:`read_all` would read."""
    with suppress(OSError):  # it is not there
        return stamp_of(path).bytes or 0
    return 0


def read_all(path: str) -> int:
    """Read a file, a member of a tar or a folder of frames. -> the number of bytes"""
    with suppress(DecodeError, OSError):
        files = map(str, frames_in(path)) if is_frame_folder(path) else [path]
        return sum(len(read_bytes(file)) for file in files)
    return 0


@dataclass
class Trial:
    """Result of reading with one decoder."""

    decoder: DecoderName | None
    """None for images."""
    rates: dict[int, float] = field(default_factory=dict)
    """Clips per second by the number of processes that decode."""
    files: set[str] = field(default_factory=set)
    refused: dict[str, Failure] = field(default_factory=dict)
    error: TooManyBadFiles | RoomError | None = None
    """The last reason why a rate is missing."""


@dataclass
class Trials:
    """Read the clips of a training run for some seconds, again and again."""

    clips: Sequence[VideoClips]
    weights: Sequence[float]
    """Weights of the sources."""
    storage: Storage
    batch_size: int
    seconds: float
    _next_batch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._sources = deal_out(self.weights, NUM_PLACES // self.batch_size)

    def places(self) -> Places:
        """Return the videos to read next, in order."""
        return Places(self._sources, self.batch_size, self._next_batch)

    def advance(self, count: int) -> None:
        """Skip ``count`` videos: those that are read from the disk must not be read twice."""
        if not self.storage.is_memory:
            self._next_batch += -(-count // self.batch_size)
            if self._next_batch > 0.9 * len(self._sources):
                self._next_batch = 0

    def phases(
        self, count: int, device: torch.device, decoders: Sequence[DecoderName | None]
    ) -> tuple[Phases, DecoderName | None]:
        """Measure the phases with the first decoder that decodes any file. -> phases, decoder

        Raises:
            DecodeError: no decoder does.
        """
        places = list(islice(self.places(), count))
        self.advance(count)
        *others, last = decoders
        for decoder in others:
            with suppress(DecodeError):
                return self.measure_phases(places, device, decoder), decoder
        return self.measure_phases(places, device, last), last

    def measure_phases(
        self, places: Sequence[Place], device: torch.device, decoder: DecoderName | None = None
    ) -> Phases:
        """Time each phase of the clips at ``places`` in this process. Bad files are skipped.

        Raises:
            DecodeError: none of the files decodes.
        """
        streams = [_fresh(stream, decoder) for stream in self.clips]
        reading, in_worker, augmenting, collating, copying = (Stopwatch() for _ in range(5))
        samples: list[Sample] = []
        failure: DecodeError | OSError | None = None
        for place in places:
            request = streams[place.source].request(place.position)
            reader = reader_of(streams[place.source])
            timed = replace(reader, transform=_TimedTransform(reader.transform, augmenting))
            try:
                if self.storage.is_memory:
                    read_all(request.path)
                with reading:
                    read_all(request.path)
                with in_worker:
                    samples.append(timed(request))
            except (DecodeError, OSError) as error:
                failure = error
        if not samples:
            raise DecodeError(f"none of the first {len(places)} files decodes. The last: {failure}")
        for _, of_source in groupby(samples, key=lambda sample: sample.source):
            while batch := list(islice(of_source, self.batch_size)):
                with collating:
                    collated = collate(batch)
                with copying:
                    collated.to(device)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
        count = sum(len(sample.clips) for sample in samples)
        return Phases(
            reading.seconds / count,
            (in_worker.seconds - augmenting.seconds) / count,
            augmenting.seconds / count,
            collating.seconds / count,
            copying.seconds / count if device.type == "cuda" else 0.0,
        )

    def read(self, trial: Trial, workers: int) -> None:
        """Read with that many processes, and add the result to ``trial``."""
        places, began = self.places(), time.monotonic()
        warmed_up = islice(places, WARMED_UP if self.storage.is_memory else 0)
        requests = (self.clips[each.source].request(each.position) for each in warmed_up)
        for path in dict.fromkeys(request.path for request in requests):
            read_all(path)
            if time.monotonic() > began + SECONDS_OF_WARMUP:
                break
        streams = [_fresh(stream, trial.decoder) for stream in self.clips]
        count, videos = 0, READ_AHEAD
        try:
            batches = clip_batches(streams, places, batch_size=self.batch_size, workers=workers)
            with closing(batches):
                trial.files.update(next(batches).files)
                began = time.perf_counter()
                for batch in batches:
                    trial.files.update(batch.files)
                    count += len(batch.clips)
                    videos += len(batch.files)
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
        self.advance(videos)


def reader_of(stream: VideoClips) -> TrainReader:
    """Return the reader of a stream's training clips."""
    assert isinstance(stream.reader, TrainReader)
    return stream.reader


def _fresh(stream: VideoClips, decoder: DecoderName | None) -> VideoClips:
    """Copy a stream with another decoder, and without the failures that it has noted."""
    fresh = copy.copy(stream)
    fresh.bad = {}
    if decoder is not None:
        fresh.reader = replace(reader_of(stream), decoder=decoder)
    return fresh
