"""Measure how training clips are read: in phases, and by several processes."""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderName
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import clip_batches
from hpm_video.data.mixture import Places, deal_out
from hpm_video.data.reading import TrainReader
from hpm_video.data.transforms import Box, Change, ClipTransform
from hpm_video.decoding.locations import Section, frames_in, is_frame_folder, read_bytes
from hpm_video.decoding.reader import DecodeError
from hpm_video.files.failures import Failure, TooManyBadFiles, tolerated
from hpm_video.files.wording import counted
from hpm_video.workers.room import RoomError

PHASES = ("reading", "decoding", "augmenting")
NUM_PLACES = 4 * 10**6  # number of videos in the order that trials read
READ_AHEAD = 1_000  # upper bound on the videos that a trial reads ahead without counting them
COPIES = 10  # batches whose transfer to a GPU is timed
UNEXPLAINED = 0.25  # share by which a measured rate may differ from the expected one
ENOUGH = 0.95  # share of the best rate at which fewer processes are preferred


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that is spent inside to that of the phase, unless it fails."""
    began = time.perf_counter()
    yield
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


@dataclass
class Trial:
    """Result of reading with one decoder, by the number of processes."""

    decoder: DecoderName | None  # none for images
    rates: dict[int, float] = field(default_factory=dict)  # clips per second
    assembling: dict[int, float] = field(default_factory=dict)  # seconds of the run per clip
    files: set[str] = field(default_factory=set)
    refused: dict[str, Failure] = field(default_factory=dict)
    error: TooManyBadFiles | RoomError | None = None  # the last reason why a rate is missing


class Trials:
    """Read the clips of a training run, each time other videos, as in its first epoch."""

    def __init__(
        self,
        clips: Sequence[VideoClips],
        weights: Sequence[float],
        device: torch.device,
        *,
        batch_size: int,
        seconds: float,
    ) -> None:
        """``weights``: of the sources. ``seconds``: how long a trial takes."""
        self.clips, self.gpu = clips, device if device.type == "cuda" else None
        self.batch_size, self.seconds = batch_size, seconds
        self._sources = deal_out(weights, NUM_PLACES // batch_size)
        self._next_batch = 0

    def places(self) -> Places:
        """Return the videos to read next, in order."""
        return Places(self._sources, self.batch_size, self._next_batch)

    def phases(self, count: int, decoder: DecoderName | None = None) -> dict[str, float]:
        """Return the seconds per clip of each phase, of ``count`` videos in this process alone.

        With a GPU, also of copying from pinned memory, by its own clock.

        Raises:
            DecodeError: none of the files decodes.
        """
        seconds = dict.fromkeys(PHASES, 0.0)
        num_clips, failure = 0, "there are none"
        for place in islice(self.places(), count):
            stream = self.clips[place.source]
            reader, request = reader_of(stream, decoder), stream.request(place.position)
            reader = replace(reader, transform=_TimedTransform(reader.transform, seconds))
            try:
                with timed(seconds, "reading"):
                    read_all(request.path)
                with timed(seconds, "decoding"):
                    sample = reader(request)
                num_clips += len(sample.clips)
            except (DecodeError, OSError) as error:
                failure = str(error)
        self._advance(count)
        if not num_clips:
            raise DecodeError(f"none of the first {count} files decodes. The last: {failure}")
        seconds["decoding"] -= seconds["augmenting"]
        found = {phase: total / num_clips for phase, total in seconds.items()}
        if self.gpu is not None:
            found["copying"] = copy_seconds(sample.clips[:1], self.batch_size, self.gpu)
        return found

    def read(self, trial: Trial, workers: int) -> None:
        """Read with that many processes, and add the result to ``trial``."""
        streams = [copy.copy(stream) for stream in self.clips]
        for stream in streams:
            stream.bad, stream.reader = {}, reader_of(stream, trial.decoder)
        options = {"batch_size": self.batch_size, "workers": workers, "gpu": self.gpu}
        count, videos = 0, READ_AHEAD
        try:
            with closing(clip_batches(streams, self.places(), **options)) as batches:
                trial.files.update(next(batches).files)
                began, own = time.perf_counter(), time.process_time()
                for batch in batches:
                    trial.files.update(batch.files)
                    count += len(batch.clips)
                    videos += len(batch.files)
                    if time.perf_counter() > began + self.seconds:
                        break
                trial.rates[workers] = count / (time.perf_counter() - began)
                trial.assembling[workers] = (time.process_time() - own) / count
        except (RoomError, TooManyBadFiles) as error:
            trial.error = error
            if isinstance(error, TooManyBadFiles):
                trial.rates.clear()
        for stream in streams:
            trial.refused |= stream.bad
        self._advance(videos)

    def _advance(self, videos: int) -> None:
        """Skip videos: what was read before comes from memory, faster than in a first epoch."""
        self._next_batch += math.ceil(videos / self.batch_size)


def choose_setting(trials: Sequence[Trial], max_bad_share: float) -> tuple[Trial, int]:
    """Return the decoder and the fewest processes that are nearly as fast as the best.

    Decoders that refuse more files than training tolerates are left out, unless all do. Raises the
    error of a trial where none has a rate.
    """
    measured = [trial for trial in trials if trial.rates]
    if not measured:
        raise next(trial.error for trial in trials if trial.error)
    usable = [
        trial
        for trial in measured
        if len(trial.refused) <= tolerated(len(trial.files | trial.refused.keys()), max_bad_share)
    ]
    settings = [(trial, workers) for trial in usable or measured for workers in trial.rates]
    best = max(trial.rates[workers] for trial, workers in settings)
    enough = [(t, workers) for t, workers in settings if t.rates[workers] >= ENOUGH * best]
    return min(enough, key=lambda setting: (setting[1], -setting[0].rates[setting[1]]))


def copy_seconds(clip: Tensor, batch_size: int, gpu: torch.device) -> float:
    """Return the seconds in which a GPU fetches a clip of a batch: (1, C, T, H, W)"""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    pinned = clip.repeat(batch_size, 1, 1, 1, 1).pin_memory()
    pinned.to(gpu, non_blocking=True)  # the first one takes memory
    began.record()
    for _ in range(COPIES):
        pinned.to(gpu, non_blocking=True)
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / COPIES / batch_size


def explain(rate: float, seconds: Mapping[str, float], workers: int, cores: int) -> str:
    """Compare a measured rate with the one that the phases allow, and name the bottleneck.

    ``seconds``: per clip, of each phase of a process that decodes, of assembling, and of copying.
    """
    in_workers = {phase: seconds[phase] for phase in PHASES}
    busy = {phase: value for phase, value in seconds.items() if phase not in in_workers}
    busy[max(in_workers, key=in_workers.__getitem__)] = sum(in_workers.values()) / workers
    bottleneck = max(busy, key=busy.__getitem__)
    expected = 1 / busy[bottleneck]
    line = f"by the phases {expected:.1f} clips/s, limited by {bottleneck}; measured: {rate:.1f}"
    if rate < (1 - UNEXPLAINED) * expected and workers >= cores:
        return f"{line}, since {workers} processes and the run share {counted(cores, 'core')}"
    if rate < (1 - UNEXPLAINED) * expected:
        return f"{line}: side by side, processes wait for the disk or for memory"
    if rate > (1 + UNEXPLAINED) * expected:
        return f"{line}: the files that were timed alone take longer than most (see --clips)"
    return line


def read_all(path: str) -> None:
    """Read a file, a member of a tar or a folder of frames."""
    path = Section.parse(path).file
    with suppress(DecodeError, OSError):
        for file in map(str, frames_in(path)) if is_frame_folder(path) else [path]:
            read_bytes(file)


def reader_of(stream: VideoClips, decoder: DecoderName | None) -> TrainReader:
    """Return the reader of a stream's training clips, with another decoder if one is named."""
    assert isinstance(stream.reader, TrainReader)
    return stream.reader if decoder is None else replace(stream.reader, decoder=decoder)
