"""What reading training clips costs, phase by phase, and how much of it so many processes do."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.data.dataset import DrawnClips, Sample, VideoClips, collate
from hpm_video.data.decode import DecodeError
from hpm_video.data.loader import training_batches
from hpm_video.data.mixture import MixedClips, Place
from hpm_video.data.sources import TarMember, is_frame_folder, read_bytes
from hpm_video.data.transforms import Box, ClipTransform, DrawnTransform

IN_WORKERS = ("reading", "decoding", "augmenting")
IN_THE_RUN = ("collating", "copying")


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
    """The bytes of the file, from the disk and not from the memory of the system, if that can be
    had; of folders of frames none, it is part of decoding."""
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


def time_phases(
    clips: MixedClips, places: Sequence[Place], *, batch_size: int, device: torch.device
) -> Phases:
    """Take the clips at ``places`` apart into phases, in this process. Bad files are left out.

    Raises:
        DecodeError: none of the files decodes.
    """
    reading, whole, augmenting = Stopwatch(), Stopwatch(), Stopwatch()
    collating, copying = Stopwatch(), Stopwatch()
    samples = []
    for place in places:
        request = clips.streams[place.source].request(place.position)
        reader = _reader_of(clips.streams[place.source])
        timed = replace(reader, transform=_Timed(reader.transform, augmenting))
        with suppress(DecodeError):
            _read_from_disk(request.path, reading)
            with whole:
                sample = timed(request)
            samples.append(sample)
    if not samples:
        raise DecodeError(f"none of the first {len(places)} files decodes")
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


def clips_per_second(
    clips: MixedClips,
    places: Sequence[Place],
    *,
    batch_size: int,
    workers: int,
    seconds: float,
    decoder: str | None = None,
) -> float:
    """How many clips come out of so many processes, once they are at it.

    ``decoder``: another one than the clips have.
    """
    streams = [_with_decoder(stream, decoder) for stream in clips.streams]
    batches = training_batches(
        MixedClips(streams), places, batch_size=batch_size, workers=workers, pin=False
    )
    with closing(batches):
        next(batches)
        began = time.perf_counter()
        count = 0
        for batch in batches:
            count += len(batch.clips)
            if time.perf_counter() - began > seconds:
                break
        return count / (time.perf_counter() - began)


def _reader_of(stream: VideoClips) -> DrawnClips:
    assert isinstance(stream.reader, DrawnClips)
    return stream.reader


def _with_decoder(stream: VideoClips, decoder: str | None) -> VideoClips:
    if decoder is not None:
        stream.reader = replace(_reader_of(stream), decoder=decoder)  # type: ignore[arg-type]
    return stream


def _read_from_disk(place: str, watch: Stopwatch) -> None:
    """Read the bytes of a file, after asking the system to forget what it holds of it."""
    if is_frame_folder(place):
        return
    member = TarMember.parse(place)
    if hasattr(os, "posix_fadvise"):
        number = os.open(member.tar if member else place, os.O_RDONLY)
        try:
            start, size = (member.offset, member.size) if member else (0, 0)
            os.posix_fadvise(number, start, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)
    with watch:
        read_bytes(place)


def _in_batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    left = iter(samples)
    while batch := list(islice(left, batch_size)):
        yield batch
