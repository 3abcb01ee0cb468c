"""Measure how training clips are read, phase by phase and by several processes."""

import copy
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderName
from hpm_video.data.batch import Sample
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import clip_batches
from hpm_video.data.mixture import Places, deal_out
from hpm_video.data.reading import TrainReader
from hpm_video.data.transforms import Box, Change, ClipTransform
from hpm_video.decoding.locations import Section, frames_in, is_frame_folder, read_bytes
from hpm_video.decoding.reader import DecodeError
from hpm_video.files.failures import Failure, TooManyBadFiles
from hpm_video.preparation.findings import stamp_of
from hpm_video.workers.pool import NAME
from hpm_video.workers.room import RoomError, memory_left

IN_WORKERS = ("reading", "decoding", "augmenting")
COPIES = 10  # number of batches whose transfer to a GPU is timed
NUM_PLACES = 4 * 10**6  # number of videos in the order that trials read
READ_AHEAD = 1_000  # upper bound on the videos that a trial reads ahead without counting them
WARMED_UP, SECONDS_OF_WARMUP = 2_000, 5.0  # limits of what is read into memory before a trial
SAMPLED_SIZES = 200  # number of files from whose sizes the total is estimated
MIB = 2**20

Phases = Mapping[str, float]
"""Seconds per clip of each phase: in a process that decodes alone; assembling, the work of the run
itself; copying, from pinned memory to a GPU."""


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that is spent inside to that of the phase."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] += time.perf_counter() - began


@dataclass(frozen=True)
class _TimedTransform(ClipTransform):
    transform: ClipTransform
    seconds: dict[str, float]

    def draw(
        self, size: tuple[int, int], frame_size: tuple[int, int], draw: np.random.Generator
    ) -> tuple[Box, Change]:
        box, change = self.transform.draw(size, frame_size, draw)

        def timed_change(pixels: NDArray[np.uint8]) -> Tensor:
            with timed(self.seconds, "augmenting"):
                return change(pixels)

        return box, timed_change


def fits_into_memory(clips: Sequence[VideoClips]) -> tuple[bool, str]:
    """Say whether the system keeps all files in memory once they have been read. -> that, words"""
    num_files, num_bytes, memory = 0, 0.0, memory_left()
    for stream in clips:
        files = [*dict.fromkeys(Section.parse(file).file for file in stream.manifest.files)]
        num_files += len(files)
        some = files[:: -(-len(files) // SAMPLED_SIZES)]
        num_bytes += len(files) * sum(stamp_of(path).bytes or 0 for path in some) / len(some)
    data = f"files: {num_files:,}, of about {max(1, num_bytes / MIB):,.0f} MiB, which"
    if memory is not None and num_bytes < memory / 2:
        return True, f"{data} fit into memory: read from there, as after the first epoch"
    return False, f"{data} may not fit into memory: read from the disk, each once, as in training"


def read_all(path: str) -> int:
    """Read a file, a member of a tar or a folder of frames. -> the number of bytes"""
    path = Section.parse(path).file
    with suppress(DecodeError, OSError):
        files = map(str, frames_in(path)) if is_frame_folder(path) else [path]
        return sum(len(read_bytes(file)) for file in files)
    return 0


@dataclass
class Trial:
    """Result of reading with one decoder, by the number of processes."""

    decoder: DecoderName | None  # none for images
    rates: dict[int, float] = field(default_factory=dict)  # clips per second
    assembling: dict[int, float] = field(default_factory=dict)  # seconds of the run per clip
    worker_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds of the processes' cores per clip; 0 where the system does not tell."""
    files: set[str] = field(default_factory=set)
    refused: dict[str, Failure] = field(default_factory=dict)
    error: TooManyBadFiles | RoomError | None = None  # the last reason why a rate is missing


class Trials:
    """Read the clips of a training run for some seconds, again and again."""

    def __init__(
        self,
        clips: Sequence[VideoClips],
        weights: Sequence[float],
        device: torch.device,
        *,
        in_memory: bool,
        batch_size: int,
        seconds: float,
    ) -> None:
        """``weights``: of the sources. ``in_memory``: what is read has been read before."""
        self.clips, self.device, self.in_memory = clips, device, in_memory
        self.batch_size, self.seconds = batch_size, seconds
        self._sources = deal_out(weights, NUM_PLACES // batch_size)
        self._next_batch = 0

    def places(self) -> Places:
        """Return the videos to read next, in order."""
        return Places(self._sources, self.batch_size, self._next_batch)

    def advance(self, count: int) -> None:
        """Skip ``count`` videos: those that are read from the disk must not be read twice."""
        if not self.in_memory:
            self._next_batch += -(-count // self.batch_size)
            if self._next_batch > 0.9 * len(self._sources):
                self._next_batch = 0

    def phases(self, count: int, decoder: DecoderName | None = None) -> dict[str, float]:
        """Time each phase of the next ``count`` videos but assembling, in this process alone.

        DecodeError: none of the files decodes.
        """
        places = list(islice(self.places(), count))
        self.advance(count)
        streams = [_fresh(stream, decoder) for stream in self.clips]
        seconds = dict.fromkeys(IN_WORKERS, 0.0)
        samples: list[Sample] = []
        failure: DecodeError | OSError | None = None
        for place in places:
            request = streams[place.source].request(place.position)
            reader = reader_of(streams[place.source])
            reader = replace(reader, transform=_TimedTransform(reader.transform, seconds))
            try:
                if self.in_memory:
                    read_all(request.path)
                with timed(seconds, "reading"):
                    read_all(request.path)
                with timed(seconds, "decoding"):
                    samples.append(reader(request))
            except (DecodeError, OSError) as error:
                failure = error
        if not samples:
            raise DecodeError(f"none of the first {len(places)} files decodes. The last: {failure}")
        seconds["decoding"] -= seconds["augmenting"]
        num_clips = sum(len(sample.clips) for sample in samples)
        found = {phase: total / num_clips for phase, total in seconds.items()}
        copied = samples[0].clips.repeat(self.batch_size, 1, 1, 1, 1)
        return found | {"copying": copy_seconds(copied, self.device)}

    def read(self, trial: Trial, workers: int) -> None:
        """Read with that many processes, and add the result to ``trial``."""
        places, began = self.places(), time.monotonic()
        warmed_up = islice(places, WARMED_UP if self.in_memory else 0)
        requests = (self.clips[each.source].request(each.position) for each in warmed_up)
        for path in dict.fromkeys(request.path for request in requests):
            read_all(path)
            if time.monotonic() > began + SECONDS_OF_WARMUP:
                break
        streams = [_fresh(stream, trial.decoder) for stream in self.clips]
        count, videos = 0, READ_AHEAD
        try:
            gpu = self.device if self.device.type == "cuda" else None
            options = {"batch_size": self.batch_size, "workers": workers, "gpu": gpu}
            with closing(clip_batches(streams, places, **options)) as batches:
                trial.files.update(next(batches).files)
                began, own, others = time.perf_counter(), time.process_time(), worker_seconds()
                for batch in batches:
                    trial.files.update(batch.files)
                    count += len(batch.clips)
                    videos += len(batch.files)
                    if time.perf_counter() > began + self.seconds:
                        break
                trial.rates[workers] = count / (time.perf_counter() - began)
                trial.assembling[workers] = (time.process_time() - own) / count
                trial.worker_seconds[workers] = (worker_seconds() - others) / count
        except (RoomError, TooManyBadFiles) as error:
            trial.error = error
            if isinstance(error, TooManyBadFiles):
                trial.rates.clear()
        for stream in streams:
            trial.refused |= stream.bad
        self.advance(videos)


def copy_seconds(clips: Tensor, device: torch.device) -> float:
    """Return the seconds in which a GPU fetches a clip from pinned memory, by its own clock."""
    if device.type != "cuda":
        return 0.0
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    pinned = clips.pin_memory()
    pinned.to(device, non_blocking=True)  # the first one takes memory
    began.record()
    for _ in range(COPIES):
        pinned.to(device, non_blocking=True)
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / COPIES / len(clips)


def worker_seconds() -> float:
    """Return the seconds of cores that the processes of pools have taken so far, by /proc."""
    ticks = 0
    for child in multiprocessing.active_children():
        with suppress(OSError):
            if child.name == NAME:
                words = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


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
