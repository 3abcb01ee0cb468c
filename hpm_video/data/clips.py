"""Clips of videos by position: the same position is always the same sample."""

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hpm_video.config.choices import DecoderChoice
from hpm_video.config.data import DataConfig
from hpm_video.data import reading
from hpm_video.data.batch import Sample
from hpm_video.data.manifest import Manifest, ManifestError
from hpm_video.data.reading import MIDDLE, Request, Views
from hpm_video.data.transforms import ClipTransform
from hpm_video.decoding.locations import Section, is_frame_folder, is_image
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import check_name, choose_decoder
from hpm_video.files.failures import Failure, TooManyBadFiles, tolerated
from hpm_video.randomness import generator


class Clips(ABC):
    """Clips by position: the process of the run decides which file each is of.

    It alone has the manifest and knows which files do not decode; any process can read them.
    """

    def __init__(
        self, manifest: Manifest, reader: reading.ClipReader, clips_per_sample: int
    ) -> None:
        check_pace(reader.data, manifest)
        self.manifest = manifest
        self.reader = reader
        self.bad: dict[str, Failure] = {}  # files that are not tried again
        self.source = reader.source
        self.clip_shape = (reader.data.channels, *reader.data.clip_size)
        self.sample_bytes = clips_per_sample * math.prod(self.clip_shape)  # at most

    def __len__(self) -> int:
        return len(self.manifest)

    @abstractmethod
    def request(self, position: int) -> Request | Sample:
        """Return what to read for a position; a sample where nothing has to be read for it.

        Raises DecodeError or TooManyBadFiles if nothing can be read.
        """

    def __getitem__(self, position: int) -> Sample:
        """Decode the sample at a position in this process. Raises as :meth:`request` does."""
        slot = Slot(self, position)
        while slot.request is not None:
            slot.put(reading.read_or_fail(self.reader, slot.request))
        return slot.result()


class Slot:
    """A sample while it is read: where a file does not decode, the next request replaces it."""

    def __init__(self, clips: Clips, position: int, start: int = 0) -> None:
        """``start``: where its clips go in shared memory."""
        self.clips, self.start = clips, start
        self._position = position
        self._failures: tuple[Failure, ...] = ()
        self._state = self._ask()

    @property
    def request(self) -> Request | None:
        """What is to be read next, if anything."""
        return self._state if isinstance(self._state, Request) else None

    def put(self, read: Sample | Failure) -> None:
        if isinstance(read, Sample):
            self._state = replace(read, failures=self._failures)
        else:
            self.clips.bad[read.path] = read
            self._failures += (read,)
            self._state = self._ask()

    def result(self) -> Sample:
        """Return the sample once there is no request. Raises what the clips raised."""
        if isinstance(self._state, Exception):
            raise self._state
        assert isinstance(self._state, Sample)
        return self._state

    def _ask(self) -> Request | Sample | DecodeError | TooManyBadFiles:
        try:
            return self.clips.request(self._position)
        except (DecodeError, TooManyBadFiles) as error:
            return error


class VideoClips(Clips):
    """Training clips: an endless stream of samples, where an epoch shows each file once.

    Position p is entry p mod n of the order of epoch p // n, n being the number of files. What
    is drawn for a clip (stride, start, crop) depends on seed, epoch, file and repeat alone.

    The next file in the order of the epoch (after the last, the first) replaces one that does not
    decode. It has its own turn too, so a replacement's draws depend on both files, and differ.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        transform: ClipTransform,
        *,
        seed: int,
        same_frames: bool = False,
        source: str = "",
    ) -> None:
        """``same_frames``: repeats differ in crop and augmentation alone, not in their frames."""
        decoder = decoder_for(data.decoder, manifest)
        reader = reading.TrainReader(data, decoder, source, transform, same_frames)
        super().__init__(manifest, reader, data.repeats)
        self.max_bad_share, self._repeats = data.max_bad_share, data.repeats
        self._num_files = manifest.num_files
        # The name of a source tells its draws from those of another; the main one has none.
        self._key = (seed, source) if source else (seed,)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.arange(0))

    def request(self, position: int) -> Request:
        """Return the file whose turn it is, or the one that replaces it.

        Raises TooManyBadFiles if more files in a row do not decode than may fail in all.
        """
        epoch, slot = divmod(position, len(self))
        if self._order[0] != epoch:
            draw = generator("order", *self._key, epoch)
            self._order = (epoch, draw.permutation(len(self)))
        order = self._order[1]
        passed: dict[str, Failure] = {}
        for offset in range(len(self)):
            index = int(order[(slot + offset) % len(self)])
            path = self.manifest.files[index]
            if path not in self.bad:
                instead_of = (int(order[slot]),) if offset else ()
                keys = tuple(
                    (*self._key, epoch, index, repeat, *instead_of)
                    for repeat in range(self._repeats)
                )
                return request_of(self.manifest, index, keys)
            passed[path] = self.bad[path]
            if len(passed) > tolerated(self._num_files, self.max_bad_share):
                break
        raise TooManyBadFiles([*passed.values()], self._num_files, self.max_bad_share)


class ValidationClips(Clips):
    """The same views of each file every time: nothing is drawn, and each file is decoded once.

    The crops of one clip are next to each other. A file that does not decode is never replaced: it
    is an error, or with ``report_failures`` a sample without views that has the reason.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        *,
        views: Views = MIDDLE,
        seed: int,
        report_failures: bool = False,
        source: str = "",
    ) -> None:
        decoder = decoder_for(data.decoder, manifest)
        super().__init__(manifest, reading.EvalReader(data, decoder, source, views), views.count)
        self.views, self._seed, self._report_failures = views, seed, report_failures

    def request(self, position: int) -> Request | Sample:
        """Return a file; of a bad one an empty sample, or raise if failures are not reported."""
        keys = ((self._seed, "held out", position),) * self.views.count
        request = request_of(self.manifest, position, keys)  # its IndexError ends a loop
        path = request.path
        if path not in self.bad:
            return request
        if not self._report_failures:
            raise DecodeError(self.bad[path].reason, path)
        nothing = torch.empty(0, *self.clip_shape, dtype=torch.uint8)
        return Sample(nothing, (), request.label, path, (self.bad[path],), self.source)


def request_of(
    manifest: Manifest, row: int, keys: tuple[tuple[int | str, ...], ...] = ()
) -> Request:
    """Return the request for clips of a row of a manifest, so many as there are keys."""
    path = manifest.files[row]
    fps, kept_every = manifest.fps.get(path, 0.0), manifest.kept_every.get(path, 1)
    return Request(path, manifest.labels[row], manifest.num_frames[row], keys, fps, kept_every)


def check_pace(data: DataConfig, manifest: Manifest) -> None:
    """Raise ManifestError if a file lacks frames or times that clips at the config's pace need.

    So does a file of every N-th frame where a stride is no multiple of N, and for times an image,
    or a folder of frames whose rate is not stated.
    """
    for file, number in manifest.kept_every.items() if data.sampling == "dense" else ():
        for name in ("frame_stride", "max_frame_stride"):
            if data.fps is None and (stride := getattr(data, name) or number) % number:
                raise ManifestError(
                    f"{file} holds one of every {number} frames of its video, as kept_every in the "
                    f"manifest says, and data.{name} is {stride}. Make it a multiple of {number}, "
                    "or prepare the video with another --keep-every: tools/transcode.py"
                )
    for file in manifest.files:
        if data.fps is None and "#t=" not in file:
            continue
        place = Section.parse(file).file
        if is_image(place) or (is_frame_folder(place) and file not in manifest.fps):
            raise ManifestError(
                f"{file} has no frame rate, which data.fps and the columns start and end of a "
                "manifest need. Of a folder of frames state it in a column fps; take images out, "
                "or leave out data.fps, start and end for them"
            )


def decoder_for(decoder: DecoderChoice, manifest: Manifest) -> DecoderChoice:
    """Choose the decoder of the videos of a manifest; images alone need none."""
    check_name(decoder)
    return decoder if all(map(is_image, manifest.files)) else choose_decoder(decoder)
