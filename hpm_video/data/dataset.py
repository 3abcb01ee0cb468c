"""Clips of videos: a position -> a sample of pixels, always the same one.

An image is a video of one frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hpm_video.data.decode import (
    DecodeError,
    DecoderChoice,
    VideoReader,
    choose_decoder,
    is_image,
    open_video,
)
from hpm_video.data.manifest import Manifest
from hpm_video.data.sampling import (
    Indices,
    Sampling,
    train_indices,
    train_segments,
    view_indices,
    view_segments,
)
from hpm_video.data.transforms import ClipTransform, Interpolation, held_out_crops
from hpm_video.randomness import generator, key_of


class TooManyBadFiles(Exception):  # noqa: N818 - it says what is wrong
    """More files do not decode than the data allows."""


@dataclass(frozen=True)
class ClipSpec:
    """What a clip is: its frames, and its pixels."""

    num_frames: int
    frame_stride: int
    max_frame_stride: int | None
    """Where given, each training clip draws its stride from frame_stride to this."""
    frame_size: tuple[int, int]
    """Height and width."""
    sampling: Sampling = "dense"
    """With ``segments``, no stride plays a part."""
    interpolation: Interpolation = "bilinear"
    """Of held-out clips, as their crops; training clips have a transform of their own."""
    short_side: int | None = None
    """Where given, held-out frames are resized to it, and crops are cut out as they are."""

    def crops(self, frames: NDArray[np.uint8], count: int) -> list[Tensor]:
        """Held-out crops of frames: (T, H, W, C) -> count x (C, T, h, w) uint8"""
        return held_out_crops(
            frames,
            self.frame_size,
            count,
            short_side=self.short_side,
            interpolation=self.interpolation,
        )

    def draw_indices(self, num_video_frames: int, draw: np.random.Generator) -> Indices:
        """The frames of a training clip: -> (T,)"""
        if self.sampling == "segments":
            return train_segments(num_video_frames, draw.random(self.num_frames).tolist())
        longest = self.max_frame_stride or self.frame_stride
        stride = int(draw.integers(self.frame_stride, longest, endpoint=True))
        return train_indices(num_video_frames, self.num_frames, stride, draw.random())

    def spread_indices(self, num_video_frames: int, num_clips: int) -> Indices:
        """The frames of clips that are spread over a video: -> (num_clips, T)"""
        if self.sampling == "segments":
            return view_segments(num_video_frames, self.num_frames, num_clips)
        return view_indices(num_video_frames, self.num_frames, self.frame_stride, num_clips)


@dataclass(frozen=True)
class Repeats:
    """Training clips that are taken from each decoded video (R)."""

    count: int
    same_frames: bool
    """The copies show the same frames, and differ in crop and augmentation alone (repeated
    augmentation); otherwise each takes frames of its own."""


@dataclass(frozen=True)
class Views:
    """What is looked at of a held-out video: so many clips, and so many crops of each."""

    clips: int
    crops: int

    def __post_init__(self) -> None:
        if min(self.clips, self.crops) < 1:
            raise ValueError(
                f"a video needs at least 1 x 1 view (clips x crops), got {self.clips} x "
                f"{self.crops}"
            )

    @property
    def count(self) -> int:
        """Views of each video (R)."""
        return self.clips * self.crops


MIDDLE = Views(1, 1)
"""One clip: of dense ones that in the middle of the video, of segments the first frame of each;
and the middle of its frames."""


@dataclass(frozen=True)
class Failure:
    """A file that did not decode."""

    path: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """The clips of one video."""

    clips: Tensor
    """(R, C, T, H, W) uint8"""
    keys: tuple[int, ...]
    label: int
    file: str
    failures: tuple[Failure, ...] = ()
    """Files that were to be drawn before this one."""
    source: str = ""
    """Name of the source of data that the video is of, where a run has several."""


@dataclass(frozen=True)
class ClipBatch:
    """Clips of several videos, those of one video next to each other (B = videos x R)."""

    clips: Tensor
    """(B, C, T, H, W) uint8"""
    keys: Tensor
    """(B,) int64, what every further random draw for a clip derives from."""
    labels: Tensor
    """(B,) int64, -1 where a video has none."""
    files: tuple[str, ...]
    """Path of each clip's video (B)."""
    failures: tuple[Failure, ...]
    """Files that did not decode and were passed over."""
    source: str = ""
    """Name of the source of data that all of them are of, where a run has several."""

    def to(self, device: torch.device | str) -> "ClipBatch":
        """The batch with its tensors on a device; the host goes on where memory is pinned."""
        non_blocking = self.clips.is_pinned()
        return replace(
            self,
            clips=self.clips.to(device, non_blocking=non_blocking),
            keys=self.keys.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "ClipBatch":
        """The batch in memory that a GPU can fetch from while the host goes on."""
        return replace(
            self,
            clips=self.clips.pin_memory(),
            keys=self.keys.pin_memory(),
            labels=self.labels.pin_memory(),
        )


def collate(samples: Sequence[Sample]) -> ClipBatch:
    """Samples of several videos of one source -> one batch."""
    (source,) = {sample.source for sample in samples}
    return ClipBatch(
        clips=torch.cat([sample.clips for sample in samples]),
        keys=torch.tensor([key for sample in samples for key in sample.keys]),
        labels=torch.tensor([sample.label for sample in samples for _ in sample.keys]),
        files=tuple(sample.file for sample in samples for _ in sample.keys),
        failures=tuple(failure for sample in samples for failure in sample.failures),
        source=source,
    )


def tolerated(num_files: int, max_bad_share: float) -> int:
    """How many of ``num_files`` may fail to decode: one at least, unless the share is 0."""
    if max_bad_share == 0:
        return 0
    return max(1, int(num_files * max_bad_share + 1e-6))  # 100 * .29 is 28.999...


def too_many(failures: Sequence[Failure], num_files: int, max_bad_share: float) -> TooManyBadFiles:
    """The error for that many failures. It names the first few."""
    allowed = tolerated(num_files, max_bad_share)
    first = "\n".join(f"  {failure.path}: {failure.reason}" for failure in failures[:3])
    return TooManyBadFiles(
        f"{len(failures)} of {num_files} files do not decode, and data.max_bad_share "
        f"{max_bad_share:g} allows {allowed}. The first:\n{first}\n"
        "If all fail alike, look at the path (data.root) and the disk; otherwise take them out of "
        "the manifest, encode them anew, or raise data.max_bad_share. Files noted in the run's "
        "bad_files.csv count: delete it once they are repaired"
    )


class VideoClips(Dataset[Sample]):
    """Training clips: an endless stream of samples, where an epoch shows each file once.

    Position p is entry p mod n of the order of epoch p // n, n being the number of files. What
    is drawn for a clip (stride, start, crop) depends on seed, epoch, file and repeat alone.

    A file that does not decode is recorded, and the next file in the order of its epoch (after
    the last, the first) takes its place. That file has its own turn in the epoch too, so the
    draws for a replacement depend on the file it stands in for as well, and differ.
    """

    def __init__(  # noqa: PLR0913 - which clips, what of them, and how they are read
        self,
        manifest: Manifest,
        spec: ClipSpec,
        transform: ClipTransform,
        *,
        repeats: Repeats,
        decoder: DecoderChoice,
        seed: int,
        max_bad_share: float,
        source: str = "",
    ) -> None:
        self.manifest = manifest
        self.spec = spec
        self.max_bad_share = max_bad_share
        self._transform = transform
        self._repeats = repeats
        self._decoder = settle_decoder(decoder, manifest)
        self._seed = seed
        self._source = source
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.arange(0))

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.manifest)

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position of the stream.

        Raises:
            TooManyBadFiles: more files in a row do not decode than may fail in all.
        """
        epoch, slot = divmod(position, len(self))
        order = self._epoch_order(epoch)
        failures: dict[str, Failure] = {}
        for offset in range(len(self)):
            index = int(order[(slot + offset) % len(self)])
            path = self.manifest.files[index]
            if path in failures:
                continue
            instead_of = (int(order[slot]),) if offset else ()
            try:
                sample = self._sample(index, epoch, instead_of)
            except DecodeError as error:
                failures[path] = Failure(path, error.reason)
                if len(failures) > tolerated(len(self), self.max_bad_share):
                    break
            else:
                return replace(sample, failures=tuple(failures.values()))
        raise too_many(list(failures.values()), len(self), self.max_bad_share)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            draw = generator("order", self._seed, *self._own, epoch)
            self._order = (epoch, draw.permutation(len(self)))
        return self._order[1]

    @property
    def _own(self) -> tuple[str, ...]:
        """What tells the draws of one source from those of another."""
        return (self._source,) if self._source else ()

    def _sample(self, index: int, epoch: int, instead_of: tuple[int, ...]) -> Sample:
        keys = [
            (self._seed, *self._own, epoch, index, repeat, *instead_of)
            for repeat in range(self._repeats.count)
        ]
        draws = [generator("clip", *key) for key in keys]
        with open_video(self.manifest.files[index], self._decoder) as video:
            num_frames = known_frames(self.manifest, index, video)
            clips = [self.spec.draw_indices(num_frames, draw) for draw in draws]
            if self._repeats.same_frames:
                clips = clips[:1] * len(clips)
            frames, places = _read(video, clips)
        return Sample(
            torch.stack(
                [
                    self._transform(frames[place], self.spec.frame_size, draw)
                    for place, draw in zip(places, draws, strict=True)
                ]
            ),
            keys=tuple(key_of(*key) for key in keys),
            label=self.manifest.labels[index],
            file=self.manifest.files[index],
            source=self._source,
        )


class HeldOutClips(Dataset[Sample]):
    """The same views of each file every time: nothing is drawn, and each file is decoded once.

    A view is a clip and a crop of it; those of one clip are next to each other. A file that does
    not decode is never replaced: it is an error, or with ``report_failures`` a sample without
    views that says why.
    """

    def __init__(
        self,
        manifest: Manifest,
        spec: ClipSpec,
        *,
        views: Views = MIDDLE,
        decoder: DecoderChoice,
        seed: int,
        report_failures: bool = False,
        source: str = "",
    ) -> None:
        self.manifest = manifest
        self.spec = spec
        self.views = views
        self._decoder = settle_decoder(decoder, manifest)
        self._seed = seed
        self._report_failures = report_failures
        self._source = source

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Sample:
        """The views of a file.

        Raises:
            DecodeError: the file does not decode, and failures are not reported.
        """
        path = self.manifest.files[index]  # an IndexError ends a loop over the samples
        failures: tuple[Failure, ...] = ()
        try:
            clips = self._views(index)
        except DecodeError as error:
            if not self._report_failures:
                raise
            clips = torch.empty(0, 3, self.spec.num_frames, *self.spec.frame_size).byte()
            failures = (Failure(path, error.reason),)
        return Sample(
            clips,
            keys=(key_of(self._seed, "held out", index),) * len(clips),
            label=self.manifest.labels[index],
            file=path,
            failures=failures,
            source=self._source,
        )

    def _views(self, index: int) -> Tensor:
        """-> (R, C, T, h, w) uint8"""
        spec = self.spec
        with open_video(self.manifest.files[index], self._decoder) as video:
            num_frames = known_frames(self.manifest, index, video)
            clips = spec.spread_indices(num_frames, self.views.clips)
            frames, places = _read(video, list(clips))
        # Cropped and resized once per frame and box, however many clips it belongs to.
        crops = spec.crops(frames, self.views.crops)
        return torch.stack([crop[:, place] for place in places for crop in crops])


def settle_decoder(decoder: DecoderChoice, manifest: Manifest) -> DecoderChoice:
    """The decoder of the videos of a manifest; of images alone none is needed.

    Raises:
        DecoderError: there are videos, and the decoder is not there.
    """
    return decoder if all(map(is_image, manifest.files)) else choose_decoder(decoder)


def known_frames(manifest: Manifest, index: int, video: VideoReader) -> int:
    """Of frames that a container promises, the manifest may know how many there are."""
    stated = manifest.num_frames[index]
    return min(stated, video.num_frames) if stated > 0 else video.num_frames


def _read(video: VideoReader, clips: list[Indices]) -> tuple[NDArray[np.uint8], list[Indices]]:
    """The frames of several clips, and where in them each clip finds its own."""
    distinct = np.unique(np.concatenate(clips))
    return video.read(distinct), [np.searchsorted(distinct, clip) for clip in clips]
