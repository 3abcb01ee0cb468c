"""Clips of videos: a position -> a sample of pixels, always the same one.

An image is a video of one frame.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hpm_video.config.choices import DecoderChoice, Interpolation, Sampling
from hpm_video.data.manifest import Manifest
from hpm_video.data.sampling import (
    Indices,
    train_indices,
    train_segments,
    view_indices,
    view_segments,
)
from hpm_video.data.transforms import ClipTransform, around, centre_box, cut, held_out_crops, within
from hpm_video.decoding.reader import Box
from hpm_video.decoding.registry import (
    DecodeError,
    DecoderError,
    VideoReader,
    choose_decoder,
    is_image,
    open_video,
)
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

    @property
    def clip_bytes(self) -> int:
        """Of the pixels of a clip."""
        return 3 * self.num_frames * self.frame_size[0] * self.frame_size[1]

    def crops(self, frames: NDArray[np.uint8], count: int) -> list[Tensor]:
        """Held-out crops of frames: (T, H, W, C) -> count x (C, T, h, w) uint8"""
        return held_out_crops(
            frames,
            self.frame_size,
            count,
            short_side=self.short_side,
            interpolation=self.interpolation,
        )

    def part(self, video: VideoReader, crops: int) -> Box | None:
        """What of the frames so many held-out crops need; none: all of it."""
        if self.short_side is None and crops == 1:
            return centre_box(video.height, video.width, self.frame_size)
        return None

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


@dataclass(frozen=True)
class Request:
    """One file, and what is to be taken from it. Small: it goes to the process that decodes."""

    path: str
    label: int
    num_frames: int
    """That the file is known to have, -1 where nobody says."""
    keys: tuple[tuple[int | str, ...], ...]
    """Of each clip: what its random draws derive from."""


class Reader(Protocol):
    """Decodes what is asked for. Picklable, and small as well."""

    def prepare(self) -> None:
        """Import what takes long to import, before the first file is read."""

    def __call__(self, request: Request) -> Sample:
        """The clips of a file. Raises DecodeError."""


class Clips(Dataset[Sample], ABC):
    """Clips by position: which file each is of, and how it is read, are two things.

    The first is decided here, in the process of the run, which alone has the manifest and knows
    which files do not decode (:attr:`bad`); the second can be done in any process.
    """

    reader: Reader
    bad: dict[str, Failure]
    """Files that are known not to decode: they are not tried again."""
    sample_bytes: int
    """Of the pixels of a sample, at most."""

    @abstractmethod
    def request(self, position: int) -> Request | Sample:
        """What to read for a position; a sample where nothing has to be read for it.

        Raises:
            DecodeError, TooManyBadFiles: nothing can be read for it, files being bad.
        """

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position, decoded in this process. Raises as :meth:`request` does."""
        found: tuple[Failure, ...] = ()
        while not isinstance(asked := self.request(position), Sample):
            read = read_or_fail(self.reader, asked)
            if isinstance(read, Sample):
                return replace(read, failures=found)
            self.bad[read.path] = read
            found += (read,)
        return asked


def read_or_fail(reader: Reader, request: Request) -> Sample | Failure:
    """What is asked for, or why it does not decode."""
    try:
        return reader(request)
    except DecodeError as error:
        return Failure(request.path, error.reason)


class VideoClips(Clips):
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
        self.bad = {}
        self.sample_bytes = repeats.count * spec.clip_bytes
        self.reader = DrawnClips(
            spec, transform, repeats.same_frames, settle_decoder(decoder, manifest), source
        )
        self._repeats = repeats.count
        self._seed = seed
        self._source = source
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.arange(0))

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.manifest)

    def request(self, position: int) -> Request:
        """The file whose turn it is at a position of the stream, or that which replaces it.

        Raises:
            TooManyBadFiles: more files in a row do not decode than may fail in all.
        """
        epoch, slot = divmod(position, len(self))
        order = self._epoch_order(epoch)
        passed: dict[str, Failure] = {}
        for offset in range(len(self)):
            index = int(order[(slot + offset) % len(self)])
            path = self.manifest.files[index]
            if path not in self.bad:
                return self._request(index, epoch, (int(order[slot]),) if offset else ())
            passed[path] = self.bad[path]
            if len(passed) > tolerated(len(self), self.max_bad_share):
                break
        raise too_many([*passed.values()], len(self), self.max_bad_share)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            draw = generator("order", self._seed, *self._own, epoch)
            self._order = (epoch, draw.permutation(len(self)))
        return self._order[1]

    @property
    def _own(self) -> tuple[str, ...]:
        """What tells the draws of one source from those of another."""
        return (self._source,) if self._source else ()

    def _request(self, index: int, epoch: int, instead_of: tuple[int, ...]) -> Request:
        return Request(
            self.manifest.files[index],
            self.manifest.labels[index],
            self.manifest.num_frames[index],
            keys=tuple(
                (self._seed, *self._own, epoch, index, repeat, *instead_of)
                for repeat in range(self._repeats)
            ),
        )


@dataclass(frozen=True)
class DrawnClips:
    """Reads training clips: their frames and crops are drawn by their keys."""

    spec: ClipSpec
    transform: ClipTransform
    same_frames: bool
    decoder: DecoderChoice
    source: str

    def prepare(self) -> None:
        """Import what takes long to import."""
        prepare_decoder(self.decoder)
        self.transform.prepare()

    def __call__(self, request: Request) -> Sample:
        """The clips of a file.

        Raises:
            DecodeError: it does not decode.
        """
        draws = [generator("clip", *key) for key in request.keys]
        with open_video(request.path, self.decoder) as video:
            num_frames = known_frames(request.num_frames, video)
            clips = [self.spec.draw_indices(num_frames, draw) for draw in draws]
            if self.same_frames:
                clips = clips[:1] * len(clips)
            size = video.height, video.width
            drawn = [self.transform.draw(size, self.spec.frame_size, draw) for draw in draws]
            part = around([each.box for each in drawn])
            frames, places = _read(video, clips, part)
        return Sample(
            torch.stack(
                [
                    each(cut(frames, within(each.box, part))[place])
                    for place, each in zip(places, drawn, strict=True)
                ]
            ),
            keys=tuple(key_of(*key) for key in request.keys),
            label=request.label,
            file=request.path,
            source=self.source,
        )


class HeldOutClips(Clips):
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
        self.bad = {}
        self.sample_bytes = views.count * spec.clip_bytes
        self.reader = SpreadClips(spec, views, settle_decoder(decoder, manifest), source)
        self._seed = seed
        self._report_failures = report_failures
        self._source = source

    def __len__(self) -> int:
        return len(self.manifest)

    def request(self, position: int) -> Request | Sample:
        """A file, or where it is known to be bad and failures are reported, what that gives.

        Raises:
            DecodeError: the file does not decode, and failures are not reported.
        """
        path = self.manifest.files[position]  # an IndexError ends a loop over the samples
        label = self.manifest.labels[position]
        if path not in self.bad:
            keys = ((self._seed, "held out", position),) * self.views.count
            return Request(path, label, self.manifest.num_frames[position], keys)
        if not self._report_failures:
            raise DecodeError(self.bad[path].reason, path)
        nothing = torch.empty(0, 3, self.spec.num_frames, *self.spec.frame_size).byte()
        return Sample(nothing, (), label, path, (self.bad[path],), self._source)


@dataclass(frozen=True)
class SpreadClips:
    """Reads held-out clips: views that are spread over the file."""

    spec: ClipSpec
    views: Views
    decoder: DecoderChoice
    source: str

    def prepare(self) -> None:
        """Import what takes long to import."""
        prepare_decoder(self.decoder)

    def __call__(self, request: Request) -> Sample:
        """The views of a file.

        Raises:
            DecodeError: it does not decode.
        """
        with open_video(request.path, self.decoder) as video:
            num_frames = known_frames(request.num_frames, video)
            clips = list(self.spec.spread_indices(num_frames, self.views.clips))
            part = self.spec.part(video, self.views.crops)
            frames, places = _read(video, clips, part)
        # Cropped and resized once per frame and box, however many clips it belongs to.
        crops = self.spec.crops(frames, self.views.crops)
        return Sample(
            torch.stack([crop[:, place] for place in places for crop in crops]),
            keys=tuple(key_of(*key) for key in request.keys),
            label=request.label,
            file=request.path,
            source=self.source,
        )


def settle_decoder(decoder: DecoderChoice, manifest: Manifest) -> DecoderChoice:
    """The decoder of the videos of a manifest; of images alone none is needed.

    Raises:
        DecoderError: there are videos, and the decoder is not there.
    """
    return decoder if all(map(is_image, manifest.files)) else choose_decoder(decoder)


def prepare_decoder(decoder: DecoderChoice) -> None:
    """Import the decoder, so that no file has to wait for it. There may be none, for images."""
    with suppress(DecoderError):
        choose_decoder(decoder)


def known_frames(stated: int, video: VideoReader) -> int:
    """Of frames that a container promises, the manifest may know how many there are."""
    return video.frames_stated(stated) if stated > 0 else video.num_frames


def _read(
    video: VideoReader, clips: list[Indices], part: Box | None
) -> tuple[NDArray[np.uint8], list[Indices]]:
    """A part of the frames of several clips, and where in them each clip finds its own."""
    distinct = np.unique(np.concatenate(clips))
    return video.read(distinct, part), [np.searchsorted(distinct, clip) for clip in clips]
