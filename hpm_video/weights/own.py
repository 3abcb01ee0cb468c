"""A model of this package as other projects may take it: its weights, and everything it is."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from hpm_video.config.choices import Interpolation, Pooling, TransformerSize
from hpm_video.config.loading import load_any_config, save_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.weights import CheckpointError, load_weights
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.encoder_shape import EncoderShape, encoder_shape
from hpm_video.models.from_config import (
    build_classifier,
    build_student,
    source_grid_of,
)
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.recognition.labels import read_label_names
from hpm_video.recognition.trained_model import WeightsOf
from hpm_video.tokens.grid import Size3
from hpm_video.training.checkpoint import read_state, read_weights
from hpm_video.weights.families import LICENCES
from hpm_video.weights.files import ORIGIN, Tensors
from hpm_video.weights.layouts import Cut

Target = Literal["raw", "joint", "per_channel", "ema", "dino", "clip"]
AUTOENCODER: tuple[WeightsOf, ...] = ("student", "teacher")
CLASSIFIER: tuple[WeightsOf, ...] = ("model", "average")
"""Whose weights a checkpoint may hold."""
PIXELS = ("raw", "joint", "per_channel")
"""Targets that are pixels, and not features."""


@dataclass(frozen=True)
class OwnModel:
    """A trained model, and what clips it takes."""

    checkpoint: Path
    weights: WeightsOf
    """Whose they are: of pre-training the student or the teacher, a classifier or its average."""
    update: int
    shape: EncoderShape
    clip_size: Size3
    frame_stride: int
    decoder: TransformerSize | None
    """Of a masked autoencoder."""
    target: Target | None
    """What a masked autoencoder was trained to predict."""
    mask_ratio: float
    pooling: Pooling | None
    """Of a classifier."""
    label_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    short_side: int | None
    tensors: Tensors
    texts: dict[str, str]
    """What lies beside the weights in a checkpoint folder, by the names of the files."""
    make: Callable[[], MaskedAutoencoder | ClipClassifier]
    """The model without its weights."""
    epochs: int
    """Of the whole run."""
    licence: str
    """What is known of the licence of its weights."""
    further_sources: tuple[str, ...] = ()
    """Of clips, that it was pre-trained on beside those that are told here."""
    read_teacher: Callable[[], Tensors | None] = lambda: None
    """The teacher's weights, where there are any beside a student's."""

    @property
    def is_classifier(self) -> bool:
        """Otherwise it is a masked autoencoder."""
        return self.pooling is not None

    @property
    def cut(self) -> Cut:
        """How it cuts clips into patches."""
        return Cut(self.shape.patch_size, self.shape.channels)

    @property
    def file(self) -> str:
        """Name of its file of weights in a checkpoint folder."""
        return _file_of(self.weights)

    @property
    def kind(self) -> str:
        """What it is, in words."""
        what = "classifier" if self.is_classifier else "masked autoencoder"
        return f"{what} ({self.weights} at update {self.update})"

    def positions(self, of: Literal["encoder", "decoder"]) -> Tensor:
        """Of the tokens of its clips: -> (N, D)"""
        size = self.shape.size if of == "encoder" else self.decoder
        assert size is not None
        codes = self.shape.fixed_positions(size.dim)
        if codes.given:
            codes.table.copy_(self.tensors[f"{of}_positions.table"])
        found: Tensor = codes(self.shape.grid)
        return found

    def build(self) -> MaskedAutoencoder | ClipClassifier:
        """The model with its weights, for use."""
        model = self.make()
        load_weights(model, self.tensors, self.checkpoint)
        return model.eval()


def load_own(checkpoint: Path, weights: WeightsOf | None = None) -> OwnModel:
    """A model out of a checkpoint folder of a run.

    ``weights``: by default of pre-training the student's, of a classifier those that its config
    tests.

    Raises:
        ConfigError, CheckpointError: the folder is not a whole checkpoint, or has no such weights.
    """
    config = load_any_config(checkpoint / "config.yaml")
    if isinstance(config, PretrainConfig):
        chosen = _choose(checkpoint, weights or "student", AUTOENCODER)
        return _autoencoder(checkpoint, chosen, config)
    chosen = _choose(checkpoint, weights or config.test.weights, CLASSIFIER)
    return _classifier(checkpoint, chosen, config)


def _choose(checkpoint: Path, asked: WeightsOf, possible: tuple[WeightsOf, ...]) -> WeightsOf:
    there = [name for name in possible if (checkpoint / f"{_file_of(name)}.safetensors").is_file()]
    if asked not in there:
        raise CheckpointError(
            f"{checkpoint} has no weights of {asked!r}, but of {' and '.join(there) or 'nothing'}; "
            f"take --weights {' or '.join(there or possible)}"
        )
    return asked


def _file_of(weights: str) -> str:
    """Name of their file in a checkpoint folder."""
    return "model" if weights == "student" else weights


def _autoencoder(checkpoint: Path, weights: WeightsOf, config: PretrainConfig) -> OwnModel:
    data, update = config.data, read_state(checkpoint)["update"]
    return OwnModel(
        checkpoint,
        weights,
        update,
        encoder_shape(config.model, data, source_grid_of(config)),
        data.clip_size,
        data.frame_stride,
        config.model.decoder,
        config.mining.target,
        config.masking.ratio,
        None,
        (),
        data.mean,
        data.std,
        data.interpolation,
        data.held_out_short_side,
        read_weights(checkpoint, _file_of(weights)),
        _texts(checkpoint, config, update, ()),
        lambda: build_student(config),
        config.recipe.epochs,
        _licence(checkpoint),
        tuple(config.mix),
        lambda: _teacher(checkpoint),
    )


def _classifier(checkpoint: Path, weights: WeightsOf, config: FinetuneConfig) -> OwnModel:
    if not (checkpoint / "labels.txt").is_file():
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of a classifier: it has no labels.txt, the name of "
            f"class i in line i; put that file there"
        )
    names = read_label_names(checkpoint / "labels.txt")
    data = config.data
    config = replace(
        config,
        model=replace(config.model, pretrained_grid=source_grid_of(config)),
        test=replace(config.test, weights="average" if weights == "average" else "model"),
    )
    update = read_state(checkpoint)["update"]
    return OwnModel(
        checkpoint,
        weights,
        update,
        encoder_shape(config.model, data, config.model.pretrained_grid),
        data.clip_size,
        data.frame_stride,
        None,
        None,
        0.0,
        config.model.pooling,
        names,
        data.mean,
        data.std,
        data.interpolation,
        data.held_out_short_side,
        read_weights(checkpoint, weights),
        _texts(checkpoint, config, update, names),
        lambda: build_classifier(config, len(names)),
        config.recipe.epochs,
        _licence(checkpoint),
    )


def _licence(checkpoint: Path) -> str:
    """As the import told it that the weights came by, or ours."""
    file = checkpoint / ORIGIN
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return str(told.get("licence", LICENCES["ours"]))


def _teacher(checkpoint: Path) -> Tensors | None:
    there = (checkpoint / "teacher.safetensors").is_file()
    return read_weights(checkpoint, "teacher") if there else None


def _texts(
    checkpoint: Path,
    config: PretrainConfig | FinetuneConfig,
    update: int,
    label_names: tuple[str, ...],
) -> dict[str, str]:
    """What lies beside the weights in a checkpoint folder, as these weights alone need it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        save_config(config, file)
        found = {"config.yaml": file.read_text(encoding="utf-8")}
    found["state.json"] = json.dumps({"update": update}) + "\n"
    if label_names:
        found["labels.txt"] = "".join(f"{name}\n" for name in label_names)
    if (checkpoint / ORIGIN).is_file():
        found[ORIGIN] = (checkpoint / ORIGIN).read_text(encoding="utf-8")
    return found
