"""The loader of trained models: checkpoint folders of runs, and single files made of them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hpm_video.config.choices import OF_CLASSIFIER, OF_PRETRAINING, Pooling, WeightsOf
from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.single_file import as_folder
from hpm_video.files.weights import CheckpointError, load_weights
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.from_config import (
    AnyConfig,
    build_classifier,
    build_encoder,
    build_student,
    check_sizes,
    source_grid_of,
)
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.recognition.labels import read_label_names
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.checkpoint import read_state, read_weights, weights_digest

log = logging.getLogger(__name__)

OF_DECODERS = (
    "mask_token",
    "decoder_embed.",
    "decoder_pos_embed",
    "reconstructor.",
    "difficulty_decoder.",
)
"""Weights of a masked autoencoder that are not its encoder's."""
OF_POOLING = ("fc_norm.", "head_norm.", "attn_pool.")
"""Those of a classifier between its encoder and its head."""


@dataclass(frozen=True)
class ClipChoice:
    """Which clips a model is to see; by default those that it was trained on."""

    num_frames: int | None = None
    frame_stride: int | None = None
    frame_size: tuple[int, int] | None = None

    def of(self, data: DataConfig) -> DataConfig:
        short_side, size = data.validation_short_side, self.frame_size or data.frame_size
        return replace(
            data,
            num_frames=self.num_frames or data.num_frames,
            frame_stride=self.frame_stride or data.frame_stride,
            fps=None if self.frame_stride else data.fps,
            max_frame_stride=None,
            frame_size=size,  # and the short side in proportion
            validation_short_side=short_side
            and round(short_side * max(size) / max(data.frame_size)),
        )


@dataclass(frozen=True)
class TrainedModel(ABC):
    """A model in a checkpoint folder, a single file or memory; its weights are read when needed."""

    path: Path
    weights: WeightsOf
    update: int
    data: DataConfig  # the clips that the encoder is to see
    config: AnyConfig  # of a classifier with the grid of pre-training and the chosen weights
    label_names: tuple[str, ...] = ()
    origin: str = ""  # the text of origin.json, where the weights were imported
    held: dict[str, Tensor] | None = None  # its weights, where they are in memory

    @property
    def file(self) -> str:
        """Name of the file of its weights in a checkpoint folder."""
        return _file_of(self.weights)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._read(self.file) if self.held is None else self.held

    @property
    def teacher(self) -> dict[str, Tensor] | None:
        """The weights of a teacher beside a student's."""
        return self._read("teacher") if (self.path / "teacher.safetensors").is_file() else None

    def _read(self, file: str) -> dict[str, Tensor]:
        return read_weights(self.path, self.config.model.patch_size, file)

    @property
    def is_classifier(self) -> bool:
        """Whether it is a classifier; otherwise it is a masked autoencoder."""
        return isinstance(self.config, FinetuneConfig)

    @property
    def pretraining(self) -> PretrainConfig | None:
        """The config, where it is a masked autoencoder."""
        return self.config if isinstance(self.config, PretrainConfig) else None

    @property
    def pooling(self) -> Pooling | None:
        return self.config.model.pooling if isinstance(self.config, FinetuneConfig) else None

    @property
    def grid(self) -> TokenGrid:
        """The tokens of a clip that it was trained on."""
        return TokenGrid.of_clip(self.config.data.clip_size, self.config.model.patch_size)

    @property
    def kind(self) -> str:
        """Kind of model, weights and update, in words."""
        what = "masked autoencoder" if self.pretraining else "classifier"
        return f"{what} ({self.weights} at update {self.update})"

    def describe(self) -> dict[str, Any]:
        return {
            "update": self.update,
            "weights": self.weights,
            "weights_sha256": weights_digest(self.path, self.file),
            "num_frames": self.data.num_frames,
            "sampling": self.data.sampling,
            **({"fps": self.data.fps} if self.data.fps else {}),
            "frame_stride": self.data.frame_stride,
            "frame_size": list(self.data.frame_size),
        }

    @abstractmethod
    def make(self) -> MaskedAutoencoder | ClipClassifier:
        """Return the complete model, its weights drawn."""

    def build(self) -> MaskedAutoencoder | ClipClassifier:
        """Return the complete model with its weights, for clips that it was trained on.

        Raises:
            CheckpointError: the weights do not fit, or are of an encoder alone.
        """
        model = self.make()
        load_weights(model, self.tensors, self.path)
        return model.eval()

    @abstractmethod
    def encoder(self) -> ClipEncoder:
        """Return the model that computes features of clips, a classifier with its pooling."""


@dataclass(frozen=True)
class TrainedAutoencoder(TrainedModel):
    """A masked autoencoder of pre-training."""

    config: PretrainConfig
    instead = (
        "is from pre-training, but a classifier is needed; train one: "
        "./run_finetune.sh CONFIG init_weights={}"
    )

    def make(self) -> MaskedAutoencoder:
        return build_student(self.config)

    def build(self) -> MaskedAutoencoder:
        if not any(name.startswith("reconstructor.") for name in self.tensors):
            raise CheckpointError(
                f"{self.path} holds an encoder without its reconstructor, so it cannot "
                f"reconstruct; give a checkpoint of pre-training"
            )
        model = super().build()
        assert isinstance(model, MaskedAutoencoder)
        return model

    def encoder(self) -> ClipEncoder:
        """Return the encoder with its final norm. Other clips have their positions in its grid."""
        model = build_encoder(self.config, self.data)
        if self.weights != "untrained":
            load_weights(model, self.tensors, self.path, may_leave=OF_DECODERS)
        return model.eval()


@dataclass(frozen=True)
class TrainedClassifier(TrainedModel):
    """A classifier of fine-tuning."""

    config: FinetuneConfig
    instead = (
        "is a classifier, but a pre-trained model is needed; give a checkpoint of ./run_pretrain.sh"
    )

    def make(self) -> ClipClassifier:
        return build_classifier(self.config, len(self.label_names))

    def encoder(self) -> ClipEncoder:
        return self.build()


Trained = TypeVar("Trained", bound=TrainedModel)


def open_trained(
    path: Path,
    wanted: type[Trained],
    weights: WeightsOf | None = None,
    *,
    clips: ClipChoice = ClipChoice(),  # noqa: B008 - it is frozen
    overrides: Sequence[str] = (),
) -> Trained:
    """Open a checkpoint folder, a single file made of one, or a run, for its last checkpoint.

    ``wanted``: what it must be; ``TrainedModel`` for either kind. ``weights``: by default the
    student's, of a classifier those that its config tests. ``overrides`` of its config.

    Raises:
        ConfigError, CheckpointError: it is not a complete checkpoint of that kind, or has no such
            weights.
    """
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last"
        log.info("taking the last checkpoint of the run: %s", path)
    with as_folder(path) as folder:
        config = load_any_config(folder / "config.yaml", overrides)
        kind: Any = TrainedAutoencoder if isinstance(config, PretrainConfig) else TrainedClassifier
        if not issubclass(kind, wanted):
            raise CheckpointError(f"{path} {kind.instead.format(path)}")
        weights = _choose(path, folder, config, weights)
        is_classifier = isinstance(config, FinetuneConfig)
        names = read_label_names(folder / "labels.txt") if is_classifier else ()
        held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        check_sizes(config, len(names), held, path)
        update, data = read_state(folder)["update"], clips.of(config.data)
        if isinstance(config, FinetuneConfig):
            test = replace(config.test, weights="average" if weights == "average" else "model")
            model = replace(config.model, pretrained_grid=source_grid_of(config))
            config = replace(config, test=test, data=data, model=model)
        origin = folder / "origin.json"
        text = origin.read_text(encoding="utf-8") if origin.is_file() else ""
        found = kind(path, weights, update, data, config, names, text)
    assert isinstance(found, wanted)
    return found


def _choose(path: Path, folder: Path, config: AnyConfig, asked: WeightsOf | None) -> WeightsOf:
    known, chosen = (*OF_PRETRAINING, "untrained"), asked or OF_PRETRAINING[0]
    if isinstance(config, FinetuneConfig):
        known, chosen = OF_CLASSIFIER, asked or config.test.weights
    there = [name for name in known if (folder / f"{_file_of(name)}.safetensors").is_file()]
    if chosen not in known or (there and chosen not in (*there, "untrained")):
        raise CheckpointError(
            f"{path} has no weights of {chosen!r}; take --weights {' or '.join(there or known)}"
        )
    return chosen


def _file_of(weights: WeightsOf) -> str:
    return "model" if weights == "student" else weights
