"""Clips that cover long videos, in bounded memory."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderChoice
from hpm_video.config.data import DataConfig
from hpm_video.data.clips import decoder_for
from hpm_video.data.loader import ATTEMPTS, JOBS_HELD
from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import (
    Views,
    clip_bytes,
    known_frames,
    prepare_decoder,
    read_frames,
    view_frames,
)
from hpm_video.data.sampling import Indices
from hpm_video.data.transforms import view_crops
from hpm_video.decoding.registry import DecodeError, VideoReader, open_video
from hpm_video.files.failures import Failure
from hpm_video.workers.pool import USUAL, Limits, Pool
from hpm_video.workers.room import check_room

FIRST_RUN = 32
"""Frames that are read at first, before it is known how large they are."""
RUN_BYTES = 2**27
"""Bytes of the frames that are read at once later on: about 20 of 1080p, 500 of 240p."""


@dataclass(frozen=True)
class Part:
    """Some views of one video: those that follow on its part before."""

    clips: Tensor
    """(R, C, T, H, W) uint8. A view is a clip and a crop of it; those of one clip are next to each
    other."""
    starts: NDArray[np.int64]
    """(R,) first frame of each."""
    num_views: int
    """Views of the video."""
    num_frames: int
    """Frames of the video."""


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

    Each part comes with the place of its video. After a failure no part of that video follows, and
    those that came before are void. The parts of several processes come interleaved; closing the
    generator ends the processes. Without ``workers`` this one decodes, and a file on which it hangs
    or crashes ends it.
    """
    decoder = decoder_for(data.decoder, manifest)
    reader = PartReader(data, views, decoder, max(1, clips_per_part // views.crops))
    jobs = [(place, (manifest.files[place], manifest.num_frames[place])) for place in places]
    if workers == 0:
        for place, job in jobs:
            yield from ((place, part) for part in reader(job))
        return
    size = reader.part_bytes
    check_room(workers, shared=JOBS_HELD * workers * size, batches=size)
    with Pool(reader, workers, limits, result_bytes=size, depth=JOBS_HELD) as pool:
        for place, job in jobs:
            pool.submit(place, job, path=job[0], attempts=ATTEMPTS)
        left = len(jobs)
        while left:
            place, part, is_last = pool.next()
            left -= is_last
            yield place, part


@dataclass(frozen=True)
class PartReader:
    """Reads the parts of a video, in any process.

    Frames are read in runs, once each, and are kept, cropped and resized, for as long as a clip
    still needs them.
    """

    data: DataConfig
    views: Views
    decoder: DecoderChoice
    clips_per_part: int

    def prepare(self) -> None:
        """Import what takes long to import."""
        prepare_decoder(self.decoder)

    @property
    def part_bytes(self) -> int:
        """Bytes of the arrays in a part, at most."""
        return self.clips_per_part * self.views.crops * (clip_bytes(self.data) + 8)

    def __call__(self, job: tuple[str, int]) -> Iterator[Part | Failure]:
        """The parts of a video, its path and known number of frames given; a failure ends them."""
        path, stated = job
        try:
            with open_video(path, self.decoder) as video:
                yield from self._parts(video, known_frames(stated, video))
        except DecodeError as error:
            yield Failure(path, error.reason)

    def _parts(self, video: VideoReader, num_frames: int) -> Iterator[Part]:
        crops, table = self.views.crops, view_frames(self.data, num_frames, self.views)
        clips = self._clips(video, table)
        for first in range(0, len(table), self.clips_per_part):
            yield Part(
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
        run, at = FIRST_RUN, 0
        while at < len(wanted):
            frames = read_frames(self.data, video, wanted[at : at + run])
            crops = torch.stack(view_crops(frames, self.data, self.views.crops))
            indices = wanted[at : at + run].tolist()
            at, run = at + run, max(1, RUN_BYTES // frames[0].nbytes)
            del frames  # while the crops are used
            yield from zip(indices, crops.unbind(dim=2), strict=True)
