"""The package from Python: trained models on clips and video files, and runs from your program.

Clips are numpy arrays or torch tensors with the axes T H W C or C T H W, with B in front for a
batch. They hold uint8 from 0 to 255 or floats from 0 to 1. Frames of another size than the model's
are resized and cropped as in validation; their number must be the model's.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import DecoderChoice
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.manifest import NOT_STATED, UNLABELLED, Manifest
from hpm_video.data.reading import Views
from hpm_video.data.transforms import view_crops
from hpm_video.files.weights import CheckpointError
from hpm_video.files.wording import counted
from hpm_video.hub import download, push_to_hub, save_pretrained
from hpm_video.mining.objective import HardPatchesMining
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.randomness import key_of, uniform
from hpm_video.recognition.inference import Inference, Reading, Values, over_videos
from hpm_video.recognition.trained_model import (
    TrainedAutoencoder,
    TrainedClassifier,
    TrainedModel,
    WeightsOf,
    open_trained,
)
from hpm_video.runs.finetuning import finetune
from hpm_video.runs.pretraining import build_objective as objective_of
from hpm_video.runs.pretraining import pretrain
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.device import AUTOCAST, Precision, choose_device, inference_precision
from hpm_video.training.distributed import Processes
from hpm_video.training.ema import make_ema

Config = PretrainConfig | FinetuneConfig
Clips = NDArray[Any] | Tensor
Files = str | Path | Iterable[str | Path]


class Model:
    """A trained model on a device, made by :func:`load`."""

    def __init__(self, trained: TrainedModel, device: torch.device, precision: Precision) -> None:
        self.trained = trained
        self.config = trained.config
        self.device, self.precision = device, precision
        self._inference = Inference.load(trained, device, precision)

    def __repr__(self) -> str:
        return f"<{self.trained.kind} of {self.trained.path} on {self.device}>"

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "Model":
        """Load a trained model as :func:`load` does."""
        return load(source, **options)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights, config and model card for :func:`load`. -> the folder

        Raises:
            CheckpointError: the folder has files already.
        """
        return save_pretrained(self.trained, Path(folder).expanduser())

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face Hub. -> the address

        Paths in the config, and that of imported weights, are uploaded too. A missing repository is
        created; in an existing one, only the earlier model is replaced.

        Raises:
            CheckpointError: the Hub cannot be reached or refuses it.
        """
        return push_to_hub(self.trained, repo_id, private=private)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of their probabilities; empty for pre-training."""
        return self.trained.label_names

    @property
    def grid(self) -> TokenGrid:
        """The tokens of a clip along time, height and width: (T', H', W')"""
        return self._inference.model.grid

    @overload
    def features(self, clips: Clips) -> Tensor: ...
    @overload
    def features(self, clips: Clips, *, layers: Sequence[int]) -> tuple[Tensor, ...]: ...
    def features(
        self, clips: Clips, *, layers: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute features of clips, float32 on the device of the model.

        Returns:
            One vector for each clip, (B, D): the class token, else the mean of the tokens; of a
            classifier, the input of its head. With ``layers``, the output of each of these blocks
            (-1 is the last), (B, N, D) each, without class token and before the final norm.

        Raises:
            ValueError, TypeError: the model does not take such clips, or has no such block.
        """
        pixels = self._pixels(clips)
        if layers is None:
            return self._inference.pooled(pixels)
        return self._inference.layers(pixels, layers)

    def probabilities(self, clips: Clips) -> Tensor:
        """Compute the softmax of a classifier over :attr:`classes`: -> (B, classes) float32

        Raises:
            CheckpointError: the model is not a classifier.
        """
        self._need(TrainedClassifier, "probabilities")
        return self._inference.probabilities(self._pixels(clips))

    def difficulty(self, clips: Clips) -> Tensor:
        """Let the teacher predict how hard each token is to reconstruct: -> (B, T', H', W') float32

        Only the order within a clip is meaningful.

        Raises:
            CheckpointError: the model has no teacher with a loss predictor.
        """
        teacher_sees = self._need(TrainedAutoencoder, "difficulty").config.mining.teacher_sees
        scores = self._teacher.difficulty(self._pixels(clips), teacher_sees)
        return scores.unflatten(1, self.grid.shape)

    def mask(self, clips: Clips, *, hard_fraction: float | None = None, seed: int = 0) -> Tensor:
        """Draw a mask for each clip by the rule of its pre-training: -> (B, T', H', W') bool

        Args:
            clips: as for :meth:`features`. In the result, True marks a hidden token.
            hard_fraction: share of the hidden units that is picked by difficulty, from 0 (a random
                mask) to 1; by default as in the last epoch.
            seed: determines the mask of a clip, together with its place in the batch.
        """
        rule = self._need(TrainedAutoencoder, "a mask").config.mask_rule("")
        fraction = rule.strategy.last_fraction if hard_fraction is None else hard_fraction
        if not 0 <= fraction <= 1:
            raise ValueError(f"hard_fraction must lie in [0, 1], got {hard_fraction}")
        pixels, num_picked = self._pixels(clips), int(rule.num_masked * fraction)
        difficulty = self.difficulty(pixels).flatten(1) if num_picked else None
        keys = torch.tensor([key_of("mask", seed, place) for place in range(len(pixels))])
        priority = uniform(keys.to(self.device), rule.num_units, "mask")
        return rule.draw(difficulty, priority, num_picked).masked.unflatten(1, self.grid.shape)

    def features_of(
        self,
        files: Files,
        *,
        clips: int = 1,
        crops: int = 1,
        decoder: DecoderChoice = "auto",
        workers: int = 0,
    ) -> NDArray[np.float64]:
        """Compute features of one or several video files, averaged over views: -> (files, D)

        Of each file, ``clips`` in time times ``crops`` in space are read as in validation.

        Raises:
            BadFilesError: files do not decode; the message names all of them.
            ValueError: there are no files.
        """
        views, reading = Views(clips, crops), Reading(decoder, workers)
        return self._over_files(self._inference.pooled, files, views, reading)

    def probabilities_of(
        self,
        files: Files,
        *,
        clips: int | None = None,
        crops: int | None = None,
        decoder: DecoderChoice = "auto",
        workers: int = 0,
    ) -> NDArray[np.float64]:
        """Compute class probabilities of video files, averaged over views: -> (files, classes)

        By default, the views are those with which the config tests.

        Raises:
            BadFilesError, ValueError: as of :meth:`features_of`.
            CheckpointError: the model is not a classifier.
        """
        test = self._need(TrainedClassifier, "probabilities").config.test
        views, reading = Views(clips or test.clips, crops or test.crops), Reading(decoder, workers)
        return self._over_files(self._inference.probabilities, files, views, reading)

    def _over_files(
        self, values: Values, files: Files, views: Views, reading: Reading
    ) -> NDArray[np.float64]:
        paths = (str(files),) if isinstance(files, str | Path) else tuple(map(str, files))
        if not (count := len(paths)):
            raise ValueError("no files are given; a pattern may have found none")
        manifest = Manifest(paths, (UNLABELLED,) * count, (NOT_STATED,) * count)
        clips = reading.clips(manifest, self.trained.data, views)
        return over_videos(values, clips, reading, Processes()).values

    def _need(self, kind: type[Any], what: str) -> Any:
        if not isinstance(self.trained, kind):
            raise CheckpointError(
                f"{self.trained.path} holds a {self.trained.kind}; {what} can only be given "
                f"by a {'classifier' if kind is TrainedClassifier else 'masked autoencoder'}"
            )
        return self.trained

    @cached_property
    def _teacher(self) -> Inference:
        config = self._need(TrainedAutoencoder, "difficulty").config
        if config.mining.predictor == "none":
            raise CheckpointError(f"{self.trained.path} was trained without a loss predictor")
        teacher = open_trained(self.trained.path, TrainedAutoencoder, "teacher").build()
        return Inference(teacher.to(self.device), self.trained.data, self.device, self.precision)

    def _pixels(self, clips: Clips) -> Tensor:
        """Return clips of the model's size: -> (B, C, T, H, W) uint8"""
        data = self.trained.data
        pixels = to_pixels(clips, data.channels, data.num_frames)
        if tuple(pixels.shape[3:]) == tuple(data.frame_size):
            return pixels
        frames = pixels.permute(0, 2, 3, 4, 1).cpu().numpy()
        return torch.stack([view_crops(clip, data, 1)[0] for clip in frames])


def to_pixels(given: Clips, channels: int, num_frames: int) -> Tensor:
    """Convert one clip or a batch, in either order of the axes: -> (B, C, T, H, W) uint8"""
    # Copied, for torch takes neither reversed axes (BGR to RGB) nor what cannot be written to.
    pixels = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    pixels = pixels[None] if pixels.ndim == 4 else pixels
    first, second, *_, last = pixels.shape[1:] if pixels.ndim == 5 else (0, 0, 0)
    channels_first = (first, second) == (channels, num_frames)
    channels_last = (first, last) == (num_frames, channels)
    if channels_first == channels_last:
        raise ValueError(
            f"clips have the axes T H W C or C T H W, or B before them, with "
            f"{counted(num_frames, 'frame')} and {counted(channels, 'channel')}, got "
            f"{tuple(pixels.shape)}; an image is a clip of one frame: image[None]"
        )
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(
                f"pixels as floats lie in [0, 1], got {pixels.min():g} to {pixels.max():g}; give "
                f"uint8 for 0 to 255, and do not normalise them before"
            )
        pixels = (255 * pixels).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels are uint8 or floats, got {pixels.dtype}")
    return pixels if channels_first else pixels.permute(0, 4, 1, 2, 3).contiguous()


def load(
    source: str | Path,
    weights: WeightsOf | None = None,
    *,
    device: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
) -> Model:
    """Load a trained model: ``hpm_video.load("runs/demo")``.

    Args:
        source: a run, for its last checkpoint; a checkpoint folder; imported weights; a single file
            that ``tools/weights.py export`` made; or ``user/name`` on the Hugging Face Hub.
        weights: ``student`` or ``teacher`` for pre-training; ``model`` or ``average`` for a
            classifier. The default is the student, or the weights that the classifier tested.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` ...
        precision: ``auto`` is bf16 on a GPU that supports it, otherwise fp32.

    Raises:
        CheckpointError, ConfigError: there is no such model, or it has no such weights.
        EngineError: there is no such device.
    """
    path = Path(source).expanduser()
    if not path.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "~")):
        path = download(str(source))
    if precision not in ("auto", *AUTOCAST):
        raise ConfigError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    place = choose_device(device)
    chosen = inference_precision(place) if precision == "auto" else precision
    return Model(open_trained(path, TrainedModel, weights), place, chosen)


def load_config(name: str | Path, *overrides: str) -> Config:
    """Load a config: ``load_config("k400_hpm_b", "data.train=my.csv", "recipe.epochs=100")``.

    ``name``: of a shipped config, or the path of a file; then ``section.key=value`` overrides.

    Raises:
        ConfigError: there is no such config, or a value breaks a rule.
    """
    return load_any_config(Path(name), overrides)


def build_model(
    config: Config, num_classes: int | None = None
) -> MaskedAutoencoder | ClipClassifier:
    """Build the model of a config with random weights.

    Raises:
        ConfigError: ``num_classes`` is missing for a classifier.
    """
    if isinstance(config, PretrainConfig):
        return build_student(config)
    if num_classes is None:
        raise ConfigError("a classifier needs num_classes")
    return build_classifier(config, num_classes)


def build_objective(config: PretrainConfig, student: MaskedAutoencoder) -> HardPatchesMining:
    """Build the objective of pre-training. Its teacher starts as a copy of ``student``."""
    teacher = make_ema(student) if config.mining.has_teacher else None
    return objective_of(config, teacher, student.mask_token.device)


def train(config: Config) -> Path:
    """Pre-train or fine-tune, or resume the run in ``config.output_dir``. -> its directory"""
    return pretrain(config) if isinstance(config, PretrainConfig) else finetune(config)
