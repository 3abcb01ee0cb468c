"""Clips of whole videos in bounded memory, however long a video is and however many it has."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hpm_video.data.dataset import ClipSpec, Failure, Views, known_frames, settle_decoder
from hpm_video.data.decode import (
    DecodeError,
    DecoderChoice,
    VideoReader,
    open_video,
)
from hpm_video.data.loader import STALL_SECONDS, init_worker
from hpm_video.data.manifest import Manifest
from hpm_video.data.sampling import Indices, window_indices

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


class ClipStream(IterableDataset[Part]):
    """The views of one video after the other, in parts of at most so many clips.

    A view is a clip and a crop of it; those of one clip are next to each other. Frames are read in
    runs, once each, and are kept, cropped and resized, for as long as a clip still needs them.
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
        """``places``: of the videos in the manifest. They are dealt out to the workers."""
        self._manifest = manifest
        self._places = places
        self._spec = spec
        self._chosen = chosen
        self._decoder = settle_decoder(decoder, manifest)
        self._clips_per_part = max(1, clips_per_part // chosen.crops)

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        own = self._places if worker is None else self._places[worker.id :: worker.num_workers]
        for place in own:
            yield from self._parts_or_failure(place)

    def _parts_or_failure(self, place: int) -> Iterator[Part]:
        try:
            yield from self._parts(place)
        except DecodeError as error:
            yield Part(place, failure=Failure(self._manifest.files[place], error.reason))

    def _parts(self, place: int) -> Iterator[Part]:
        crops = self._chosen.crops
        with open_video(self._manifest.files[place], self._decoder) as video:
            num_frames = known_frames(self._manifest, place, video)
            table = clips_of(self._chosen, self._spec, num_frames)
            clips = self._clips(video, table)
            for first in range(0, len(table), self._clips_per_part):
                yield Part(
                    place,
                    torch.cat([*islice(clips, self._clips_per_part)]),
                    np.repeat(table[first : first + self._clips_per_part, 0], crops),
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
            frames = video.read(wanted[at : at + run])
            crops = torch.stack(self._spec.crops(frames, self._chosen.crops))
            indices = wanted[at : at + run].tolist()
            at, run = at + run, max(1, RUN_BYTES // frames[0].nbytes)
            del frames  # while the crops are used
            yield from zip(indices, crops.unbind(dim=2), strict=True)


def stream_parts(clips: ClipStream, *, workers: int) -> Generator[Part, None, None]:
    """The parts of all videos, those of several workers interleaved as they come.

    Closing the generator ends the workers.
    """
    loader: DataLoader[Part] = DataLoader(
        clips,
        batch_size=None,
        num_workers=workers,
        timeout=STALL_SECONDS if workers else 0,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # otherwise making an iterator draws from the global one
        in_order=False,  # a long video does not hold up the others
    )
    yield from loader
