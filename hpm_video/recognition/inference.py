"""Features of clips: a trained encoder that is put to use, whatever it was trained for."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import DecoderChoice
from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.clips import HeldOutClips
from hpm_video.data.loader import held_out_batches
from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import Views
from hpm_video.files.weights import load_weights
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.from_config import encoder_shape, source_grid_of
from hpm_video.randomness import key_of
from hpm_video.recognition.testing import collect, score_videos, tell_left_out
from hpm_video.tokens.pixels import normalise
from hpm_video.training.checkpoint import read_weights
from hpm_video.training.device import AUTOCAST, Precision
from hpm_video.training.distributed import Processes
from hpm_video.workers.pool import USUAL, Limits

WeightsOf = Literal["student", "teacher", "model", "average", "untrained"]
"""Of a checkpoint: student or teacher of pre-training, a classifier or the average of its weights;
or those that pre-training began with, to compare with."""
FILE_OF: dict[WeightsOf, str] = {"student": "model"}
OF_DECODERS = (
    "mask_token",
    "to_decoder.",
    "reconstructor.",
    "difficulty_decoder.",
    "decoder_positions.",
)
"""Weights of a masked autoencoder that are not its encoder's."""
BATCH_CLIPS = 64
"""At most so many clips are held by a batch, unless one video has more views."""


@dataclass(frozen=True)
class Reading:
    """How the videos of a manifest are read."""

    decoder: DecoderChoice = "auto"
    workers: int = 0
    exclude_bad_files: bool = False
    """Otherwise a file that does not decode is an error."""
    limits: Limits = USUAL
    """Of a process that decodes."""


@dataclass(frozen=True)
class ClipChoice:
    """Which clips an encoder is to see; where nothing is said, those that it was trained on."""

    num_frames: int | None = None
    frame_stride: int | None = None
    frame_size: tuple[int, int] | None = None

    def of(self, data: DataConfig) -> DataConfig:
        """The data of a config with these clips."""
        return replace(
            data,
            num_frames=data.num_frames if self.num_frames is None else self.num_frames,
            frame_stride=data.frame_stride if self.frame_stride is None else self.frame_stride,
            max_frame_stride=None,
            frame_size=data.frame_size if self.frame_size is None else self.frame_size,
            held_out_short_side=self._short_side(data.held_out_short_side, data.frame_size),
        )

    def _short_side(self, usual: int | None, usual_size: tuple[int, int]) -> int | None:
        """In the same proportion to another frame size."""
        if usual is None or self.frame_size is None:
            return usual
        return round(usual * max(self.frame_size) / max(usual_size))


@dataclass(frozen=True)
class Extractor:
    """An encoder, ready for clips."""

    model: ClipEncoder
    """On ``device``."""
    spec: DataConfig
    """The clips that it takes."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    precision: Precision
    clips_per_pass: int = 32

    def check_stride(self, given: int | None) -> None:
        """Make sure that a stride that was given plays a part.

        Raises:
            ConfigError: the clips are of segments, and have none.
        """
        if given is not None and self.spec.sampling == "segments":
            raise ConfigError(
                f"a frame stride ({given}) plays no part in clips that span the whole video "
                f"(data.sampling=segments); leave it out"
            )

    def tokens(self, clips: Tensor) -> Tensor:
        """Of the last layer: (B, C, T, H, W) uint8 on any device -> (B, N, D) float32

        Without the class token.
        """
        return self._in_passes(lambda part: self.model.of_clip(self.model.encode(part)), clips)

    def pooled(self, clips: Tensor) -> Tensor:
        """One vector for each clip: (B, C, T, H, W) uint8 on any device -> (B, D) float32

        The class token, where there is none the mean, or of a classifier what its head sees.
        """
        return self._in_passes(lambda part: self.model.pool(self.model.encode(part)), clips)

    def of_videos(
        self, manifest: Manifest, views: Views, reading: Reading, processes: Processes
    ) -> NDArray[np.float64]:
        """Mean over the views of each video: -> (videos, D), NaN for one that does not decode

        Raises:
            BadTestFilesError: videos do not decode, and are not to be excluded.
        """
        return self._over_videos(self.pooled, manifest, views, reading, processes)

    def _over_videos(
        self,
        values: Callable[[Tensor], Tensor],
        manifest: Manifest,
        views: Views,
        reading: Reading,
        processes: Processes,
    ) -> NDArray[np.float64]:
        """Values of clips, averaged over the views of each video: -> (videos, values)"""
        data = replace(self.spec, decoder=reading.decoder)
        clips = HeldOutClips(manifest, data, views=views, seed=0, report_failures=True)
        places = processes.share(len(manifest))
        with closing(
            held_out_batches(
                clips,
                batch_size=max(1, min(len(places), BATCH_CLIPS // views.count)),
                workers=reading.workers,
                limits=reading.limits,
                positions=places,
            )
        ) as batches:
            found, failures = score_videos(
                values,
                batches,
                manifest,
                places,
                num_views=views.count,
                exclude_bad_files=reading.exclude_bad_files,
            )
        found, failures = processes.gather(found), processes.gather(failures)
        told = collect(manifest, found, failures, exclude_bad_files=reading.exclude_bad_files)
        if processes.is_first:
            tell_left_out(failures)
        return told

    @torch.no_grad()
    def _in_passes(self, values: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
        """Values of normalised clips, in evaluation mode, a few clips at a time."""
        was_training = self.model.training
        self.model.eval()
        dtype = AUTOCAST[self.precision]
        outputs = []
        for part in torch.split(clips, self.clips_per_pass):
            pixels = part.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                outputs.append(values(normalise(pixels, self.mean, self.std)).float())
        self.model.train(was_training)
        return torch.cat(outputs)


def load_extractor(
    checkpoint: Path,
    device: torch.device,
    precision: Precision,
    *,
    weights: WeightsOf = "student",
    clips: ClipChoice = ClipChoice(),  # noqa: B008 - it is frozen
) -> Extractor:
    """The encoder out of a checkpoint folder of a pre-training run, with its final norm.

    Clips of another size than in pre-training get their positions in its grid.

    Raises:
        ConfigError, CheckpointError: the folder is no whole checkpoint of such a run.
    """
    config = load_any_config(checkpoint / "config.yaml")
    if not isinstance(config, PretrainConfig):
        raise ConfigError(
            f"{checkpoint} is of a classifier, not of pre-training; give a checkpoint of "
            f"./run_pretrain.sh, such as runs/demo/checkpoints/last"
        )
    data = clips.of(config.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(config.seed, "weights"))
        model = ClipEncoder(
            encoder_shape(config.model, data, source_grid_of(config)), init="xavier"
        )
    if weights != "untrained":
        stored = read_weights(checkpoint, FILE_OF.get(weights, weights))
        load_weights(model, stored, checkpoint, may_leave=OF_DECODERS)
    return Extractor(model.to(device).eval(), data, data.mean, data.std, device, precision)
