"""Clips of whole videos in bounded memory, however long a video is and however many it has."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.clips import (
    ClipSpec,
    Failure,
    Views,
    known_frames,
    prepare_decoder,
    settle_decoder,
)
from hpm_video.data.loader import ATTEMPTS, JOBS_HELD
from hpm_video.data.manifest import Manifest
from hpm_video.data.sampling import Indices, window_indices
from hpm_video.decoding.registry import DecodeError, VideoReader, open_video
from hpm_video.workers.pool import USUAL, Limits, Lost, Pool
from hpm_video.workers.room import check_room

FIRST_RUN = 32
"""Frames that are read at first, before it is known how large they are."""
RUN_BYTES = 2**27
"""Of the frames that are read at once later on: about 20 of 1080p, 500 of 240p."""
MOST_LISTED = 100
"""Videos that an error names."""


class BadVideosError(DecodeError):
    """Some of many videos do not decode; the others were dealt with. The message names them."""

    def __init__(self, failures: Sequence[Failure], num_files: int, rest: str) -> None:
        super().__init__(f"{len(failures)} of {num_files} videos cannot be decoded")
        self.failures = tuple(failures)
        self._rest = rest

    def __str__(self) -> str:
        rows = [f"  {bad.path}: {bad.reason}" for bad in self.failures[:MOST_LISTED]]
        if len(self.failures) > MOST_LISTED:
            rows.append(f"  and {len(self.failures) - MOST_LISTED} more")
        return "\n".join([f"{self.reason}:", *rows, self._rest])


@dataclass(frozen=True)
class Windows:
    """Clips of a window that slides over the whole video."""

    every: int
    """Frames from the start of one to that of the next."""

    @property
    def crops(self) -> int:
        """Of each clip."""
        return 1


def clips_of(chosen: Views | Windows, spec: ClipSpec, num_video_frames: int) -> Indices:
    """The frames of each clip of a video, the clips by their first frame: -> (clips, T)"""
    if isinstance(chosen, Views):
        return spec.spread_indices(num_video_frames, chosen.clips)
    return window_indices(num_video_frames, spec.num_frames, spec.frame_stride, chosen.every)


@dataclass(frozen=True)
class Part:
    """Some views of one video: those that follow on its part before."""

    place: int
    """Of the video, in the manifest."""
    clips: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """(R, C, T, H, W) uint8"""
    starts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """(R,) first frame of each."""
    num_views: int = 0
    """Of the whole video."""
    num_frames: int = 0
    """Of the whole video."""
    failure: Failure | None = None
    """The video does not decode after all: nothing follows, and what came before is void."""


class ClipStream:
    """The views of one video after the other, in parts of at most so many clips.

    A view is a clip and a crop of it; those of one clip are next to each other.
    """

    def __init__(  # noqa: PLR0913 - what, of which videos, and how it is read
        self,
        manifest: Manifest,
        places: Sequence[int],
        spec: ClipSpec,
        chosen: Views | Windows,
        *,
        decoder: DecoderChoice,
        clips_per_part: int,
    ) -> None:
        """``places``: of the videos in the manifest."""
        self.manifest = manifest
        self.places = places
        self.reader = PartReader(
            spec,
            chosen,
            settle_decoder(decoder, manifest),
            clips_per_part=max(1, clips_per_part // chosen.crops),
        )

    def requests(self) -> list[tuple[int, str, int]]:
        """Place, path and known number of frames of each video."""
        files, num_frames = self.manifest.files, self.manifest.num_frames
        return [(place, files[place], num_frames[place]) for place in self.places]


@dataclass(frozen=True)
class PartReader:
    """Reads the parts of a video, in any process.

    Frames are read in runs, once each, and are kept, cropped and resized, for as long as a clip
    still needs them.
    """

    spec: ClipSpec
    chosen: Views | Windows
    decoder: DecoderChoice
    clips_per_part: int

    def prepare(self) -> None:
        """Import what takes long to import."""
        prepare_decoder(self.decoder)

    @property
    def part_bytes(self) -> int:
        """Of the arrays in a part, at most."""
        return self.clips_per_part * self.chosen.crops * (self.spec.clip_bytes + 8)

    def __call__(self, request: tuple[int, str, int]) -> Iterator[Part]:
        """The parts of a video; a failure ends them."""
        place, path, stated = request
        try:
            yield from self._parts(place, path, stated)
        except DecodeError as error:
            yield Part(place, failure=Failure(path, error.reason))

    def _parts(self, place: int, path: str, stated: int) -> Iterator[Part]:
        crops = self.chosen.crops
        with open_video(path, self.decoder) as video:
            num_frames = known_frames(stated, video)
            table = clips_of(self.chosen, self.spec, num_frames)
            clips = self._clips(video, table)
            for first in range(0, len(table), self.clips_per_part):
                yield Part(
                    place,
                    torch.cat([*islice(clips, self.clips_per_part)]),
                    np.repeat(table[first : first + self.clips_per_part, 0], crops),
                    num_views=len(table) * crops,
                    num_frames=num_frames,
                )

    def _clips(self, video: VideoReader, table: Indices) -> Iterator[Tensor]:
        """The crops of each clip in ``table``: (crops, C, T, h, w) uint8"""
        frames = self._frames(video, np.unique(table))
        held: dict[int, Tensor] = {}
        for clip in table.tolist():
            held = {index: frame for index, frame in held.items() if index >= clip[0]}
            while clip[-1] not in held:
                index, frame = next(frames)
                held[index] = frame
            yield torch.stack([held[index] for index in clip], dim=2)

    def _frames(self, video: VideoReader, wanted: Indices) -> Iterator[tuple[int, Tensor]]:
        """Each wanted frame and its crops: (crops, C, h, w) uint8"""
        run, at, part = FIRST_RUN, 0, self.spec.part(video, self.chosen.crops)
        while at < len(wanted):
            frames = video.read(wanted[at : at + run], part)
            crops = torch.stack(self.spec.crops(frames, self.chosen.crops))
            indices = wanted[at : at + run].tolist()
            at, run = at + run, max(1, RUN_BYTES // frames[0].nbytes)
            del frames  # while the crops are used
            yield from zip(indices, crops.unbind(dim=2), strict=True)


def stream_parts(
    clips: ClipStream, *, workers: int, limits: Limits = USUAL
) -> Generator[Part, None, None]:
    """The parts of all videos, those of several processes interleaved as they come.

    Closing the generator ends the processes. Without ``workers`` this one decodes, and a file on
    which it hangs or crashes ends it.

    Raises:
        RoomError: the machine has no room for the parts.
    """
    if workers == 0:
        for request in clips.requests():
            yield from clips.reader(request)
        return
    size = clips.reader.part_bytes
    check_room(workers, shared=JOBS_HELD * workers * size, batches=size)
    with Pool(clips.reader, workers, limits, result_bytes=size, depth=JOBS_HELD) as pool:
        for request in clips.requests():
            pool.submit(request, request, attempts=ATTEMPTS)
        left = len(clips.places)
        while left:
            (place, path, _), part, is_last = pool.next()
            left -= is_last
            if isinstance(part, Lost):
                yield Part(place, failure=Failure(path, part.reason))
            else:
                yield part
