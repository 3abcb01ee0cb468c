"""Inference with a trained model, and the one pass over the views of videos."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray
from torch import Tensor, nn

from hpm_video.config.choices import DecoderChoice
from hpm_video.config.data import DataConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.data.clips import ValidationClips
from hpm_video.data.loader import clip_batches
from hpm_video.data.manifest import Manifest
from hpm_video.data.mixture import Place
from hpm_video.data.reading import MIDDLE, Views
from hpm_video.files.failures import BadFilesError, Failure
from hpm_video.files.weights import CheckpointError
from hpm_video.files.wording import counted, plural
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.recognition.trained_model import TrainedClassifier, TrainedModel
from hpm_video.tokens.patches import normalise
from hpm_video.tokens.views import View, mask_of_view, standardise_by_view
from hpm_video.training.device import AUTOCAST, Precision
from hpm_video.training.distributed import Processes
from hpm_video.workers.pool import GIB, USUAL, Limits
from hpm_video.workers.progress_bar import ProgressBar
from hpm_video.workers.room import default_workers

log = logging.getLogger(__name__)

CLIPS_PER_PASS = 32
REPAIR = (
    "Repair them, or take them out of the manifest; with test.exclude_bad_files=true or "
    "--exclude-bad-files they count as wrong instead"
)

Values = Callable[[Tensor], Tensor]  # (B, C, T, H, W) uint8 on any device -> (B, values)


@dataclass(frozen=True)
class Reading:
    """How the videos of a manifest are read in validation and tests."""

    decoder: DecoderChoice = "auto"
    workers: int = 0
    exclude_bad_files: bool = False  # otherwise a file that does not decode is an error
    limits: Limits = USUAL  # of a process that decodes

    @classmethod
    def of(cls, data: DataConfig, *, exclude_bad_files: bool = False) -> "Reading":
        workers = default_workers() if data.workers is None else data.workers
        limits = Limits(data.seconds_per_file, int(data.memory_per_worker * GIB))
        return cls(data.decoder, workers, exclude_bad_files, limits)

    def clips(self, manifest: Manifest, data: DataConfig, views: Views = MIDDLE) -> ValidationClips:
        """Return the views of the videos; one that does not decode is reported."""
        data = replace(data, decoder=self.decoder)
        return ValidationClips(manifest, data, views=views, seed=0, report_failures=True)

    def batches(
        self, clips: ValidationClips, positions: Sequence[int], max_clips: int = CLIPS_PER_PASS
    ) -> Generator[ClipBatch, None, None]:
        """Read some of ``clips`` in batches of whole videos, of at most ``max_clips`` or one."""
        places = [Place(0, position) for position in positions]
        videos = max(1, min(len(positions), max_clips // clips.views.count))
        return clip_batches(
            [clips], places, batch_size=videos, workers=self.workers, limits=self.limits
        )


def each_video(
    values: Values,
    clips: ValidationClips,
    positions: Sequence[int],
    reading: Reading,
    max_clips: int = CLIPS_PER_PASS,
) -> Iterator[tuple[int, NDArray[np.float64] | Failure]]:
    """Yield the position of each video, and the mean of its views' values or why it failed.

    Unless bad files are excluded, only failures follow after the first one.
    """
    left, failed, views = iter(positions), False, clips.views.count
    with closing(reading.batches(clips, positions, max_clips)) as batches:
        for batch in batches:
            failures = {failure.path: failure for failure in batch.failures}
            failed = failed or bool(failures)
            means = None
            if len(batch.clips) and (reading.exclude_bad_files or not failed):
                with torch.no_grad():
                    of_views = values(batch.clips).double()
                means = iter(reduce(of_views, "(b r) k -> b k", "mean", r=views).cpu().numpy())
            for position in islice(left, len(batch.clips) // views + len(batch.failures)):
                file = clips.manifest.files[position]
                if file in failures:
                    yield position, failures[file]
                elif means is not None:
                    yield position, next(means)


@dataclass(frozen=True)
class VideoValues:
    """What a model computes of the videos of a manifest, in its order."""

    manifest: Manifest
    values: NDArray[np.float64]
    """(videos, values), the mean over the views of each; NaN for those that do not decode."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(videos,)"""
        return np.asarray(self.manifest.labels, dtype=np.int64)

    @property
    def excluded(self) -> Any:
        """(videos,) bool, which of them did not decode."""
        return np.isnan(self.values[:, 0])


def over_videos(
    values: Values,
    clips: ValidationClips,
    reading: Reading,
    processes: Processes,
    max_clips: int = CLIPS_PER_PASS,
) -> VideoValues:
    """Return the values of each video, averaged over its views. All processes share the work.

    Raises:
        BadFilesError: videos do not decode, and are not to be excluded or are all that there are.
        CheckpointError: a value is not finite.
    """
    share, known = processes.share(len(clips)), set(clips.bad)
    own = []
    with closing(ProgressBar(len(share), "videos", silent=not processes.is_first)) as bar:
        for video in each_video(values, clips, share, reading, max_clips):
            own.append(video)
            bar.advance()
    found = processes.gather(own)
    failures = sorted((it for _, it in found if isinstance(it, Failure)), key=attrgetter("path"))
    means = {place: value for place, value in found if not isinstance(value, Failure)}
    if failures and not (reading.exclude_bad_files and means):
        raise BadFilesError(failures, len(clips), REPAIR)
    for failure in failures if processes.is_first else ():
        if failure.path not in known:
            log.warning("left out: %s", failure)
    clips.bad |= {failure.path: failure for failure in failures}  # no process tries them again
    table = np.full((len(clips), len(next(iter(means.values())))), np.nan)
    for place, mean in means.items():
        table[place] = mean
        if not np.isfinite(mean).all():
            raise CheckpointError(
                f"the output of the model for {clips.manifest.files[place]} is not finite: its "
                f"weights have diverged, or bf16 does not hold them. Take an earlier checkpoint, "
                f"or fp32"
            )
    assert len(means) + len(failures) == len(clips)
    return VideoValues(clips.manifest, table)


def find_failures(clips: ValidationClips, reading: Reading, processes: Processes) -> None:
    """Decode validation clips once, so that a bad file stops a run, as a BadFilesError, early."""
    over_videos(lambda batch: torch.zeros(len(batch), 1), clips, reading, processes)


@dataclass(frozen=True)
class Inference:
    """A model on a device, with the clips that it takes: (B, C, T, H, W) uint8 on any device."""

    model: ClipEncoder  # on ``device``
    data: DataConfig  # how its clips are made
    device: torch.device
    precision: Precision
    clips_per_pass: int = CLIPS_PER_PASS

    @classmethod
    def load(cls, trained: TrainedModel, device: torch.device, precision: Precision) -> "Inference":
        is_tested = isinstance(trained, TrainedClassifier)
        clips = trained.config.test.clips_per_pass if is_tested else CLIPS_PER_PASS
        return cls(trained.encoder().to(device), trained.data, device, precision, clips)

    def tokens(self, clips: Tensor) -> Tensor:
        """Tokens of the last layer, without the class token: -> (B, N, D) float32"""
        return self._in_passes(lambda part: self.model.of_clip(self.model.encode(part)), clips)

    def pooled(self, clips: Tensor) -> Tensor:
        """One vector for each clip, of a classifier the input of its head: -> (B, D) float32"""
        return self._in_passes(lambda part: self.model.pool(self.model.encode(part)), clips)

    def layers(self, clips: Tensor, blocks: Sequence[int]) -> tuple[Tensor, ...]:
        """Tokens behind each of these blocks, without the class token: -> (B, N, D) float32 each"""
        depth = len(self.model.blocks)
        if odd := [block for block in blocks if not -depth <= block < depth]:
            raise ValueError(f"the encoder has the blocks 0 to {depth - 1}, got {odd[0]}")
        outputs: dict[nn.Module, Tensor] = {}

        def stacked(part: Tensor) -> Tensor:
            self.model.encode(part)
            wanted = [outputs[self.model.blocks[block]] for block in blocks]
            return torch.stack([self.model.of_clip(tokens) for tokens in wanted], dim=1)

        with ExitStack() as hooks:
            for block in blocks:
                hook = self.model.blocks[block].register_forward_hook(
                    lambda module, _, tokens: outputs.update({module: tokens})
                )
                hooks.callback(hook.remove)
            return self._in_passes(stacked, clips).unbind(1)

    def difficulty(self, clips: Tensor, view: View = "all") -> Tensor:
        """The scores of a teacher with a loss predictor that sees a view: -> (B, N) float32"""
        teacher = self.model
        assert isinstance(teacher, MaskedAutoencoder)

        def scores(part: Tensor) -> Tensor:
            grid = teacher.grid_of(part)
            seen = mask_of_view(view, grid, part.device)
            found = teacher.score(teacher.encode(part, mask=seen), grid, seen)
            return standardise_by_view(found.float(), seen)

        return self._in_passes(scores, clips)

    def probabilities(self, clips: Tensor) -> Tensor:
        """Softmax of a classifier: -> (B, classes) float32"""
        return self._in_passes(self.model, clips).softmax(dim=-1)

    @torch.no_grad()
    def _in_passes(self, values: Values, clips: Tensor) -> Tensor:
        """Values of normalised clips, in evaluation mode, a few clips at a time."""
        was_training, dtype, outputs = self.model.training, AUTOCAST[self.precision], []
        self.model.eval()
        for part in torch.split(clips, self.clips_per_pass):
            pixels = part.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                outputs.append(values(normalise(pixels, self.data.mean, self.data.std)).float())
        self.model.train(was_training)
        return torch.cat(outputs)


def describe_pass(count: int, views: Views, trained: TrainedModel, inference: Inference) -> str:
    """Describe the views, videos and model of a pass."""
    data, (height, width) = inference.data, inference.data.frame_size
    which, apart = f"a clip every {views.every} frames", f"at {data.pace}"
    if views.every is None:
        which = f"{views.clips} x {views.crops} {plural(views.count, 'view')}"
        apart = "spread over it" if data.sampling == "segments" else apart
    return (
        f"{counted(count, 'video')}, {which} of each: {counted(data.num_frames, 'frame')} of "
        f"{height} x {width} {apart}; {trained.weights} of update {trained.update}; "
        f"{inference.device.type}, {inference.precision}"
    )
