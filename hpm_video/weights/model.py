"""A model of this package with its config and weights, read from a run or made by an import."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from hpm_video.config.choices import Pooling, Target, TransformerSize
from hpm_video.config.loading import load_any_config, save_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.weights import CheckpointError, load_weights
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.from_config import build_classifier, build_student, source_grid_of
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.positions import position_table, resized
from hpm_video.recognition.labels import read_label_names
from hpm_video.recognition.trained_model import WeightsOf
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.checkpoint import read_state, read_weights
from hpm_video.weights.families import LICENCES
from hpm_video.weights.files import ORIGIN, Tensors


@dataclass(frozen=True)
class TrainedModel:
    """A model, its config and its weights."""

    path: Path
    """What it was read from, as a user calls it."""
    config: PretrainConfig | FinetuneConfig
    """Of a classifier with ``pretrained_grid``, and ``test.weights`` those that these are."""
    tensors: Tensors
    label_names: tuple[str, ...] = ()
    weights: WeightsOf = "student"
    """Whose they are: of pre-training the student or the teacher, a classifier or its average."""
    update: int = 0
    origin: str = ""
    """The text of origin.json, where the weights were imported."""
    folder: Path | None = None
    """The checkpoint folder, where it lies in one."""

    @property
    def is_classifier(self) -> bool:
        """Otherwise it is a masked autoencoder."""
        return isinstance(self.config, FinetuneConfig)

    @property
    def pretraining(self) -> PretrainConfig | None:
        """The config, where it is a masked autoencoder."""
        return self.config if isinstance(self.config, PretrainConfig) else None

    @property
    def encoder(self) -> TransformerSize:
        """Size of the encoder."""
        return self.config.model.encoder

    @property
    def decoder(self) -> TransformerSize | None:
        """Size of the decoders of a masked autoencoder."""
        return self.pretraining.model.decoder if self.pretraining else None

    @property
    def target(self) -> Target | None:
        """What a masked autoencoder learned to predict."""
        return self.pretraining.mining.target if self.pretraining else None

    @property
    def pooling(self) -> Pooling | None:
        """How a classifier pools its tokens."""
        return self.config.model.pooling if isinstance(self.config, FinetuneConfig) else None

    @property
    def grid(self) -> TokenGrid:
        """Tokens of a clip."""
        return TokenGrid.of_clip(self.config.data.clip_size, self.config.model.patch_size)

    @property
    def has_predictor(self) -> bool:
        """Whether there is a loss predictor."""
        return any(name.startswith("difficulty_decoder.") for name in self.tensors)

    @property
    def licence(self) -> str:
        """What is known of the licence of the weights."""
        told = json.loads(self.origin) if self.origin else {}
        return str(told.get("licence", LICENCES["ours"]))

    @property
    def kind(self) -> str:
        """What it is, in words."""
        what = "classifier" if self.is_classifier else "masked autoencoder"
        return f"{what} ({self.weights} at update {self.update})"

    @property
    def teacher(self) -> Tensors | None:
        """The weights of a teacher beside a student's."""
        there = self.folder is not None and (self.folder / "teacher.safetensors").is_file()
        return read_weights(self.folder, "teacher") if self.folder and there else None

    def positions(self, of: Literal["encoder", "decoder"]) -> Tensor:
        """Of the tokens of its clips: -> (N, D)"""
        kind, source = self.config.model.positions, TokenGrid(*source_grid_of(self.config))
        if kind == "given":
            return resized(self.tensors[f"{of}_positions.table"], source, self.grid)
        size = self.decoder if of == "decoder" else self.encoder
        assert size is not None
        return position_table(self.grid, size.dim, kind, source)

    def make(self) -> MaskedAutoencoder | ClipClassifier:
        """Return the model without its weights."""
        if isinstance(self.config, FinetuneConfig):
            return build_classifier(self.config, len(self.label_names))
        return build_student(self.config)

    def build(self, may_lack: tuple[str, ...] = ()) -> MaskedAutoencoder | ClipClassifier:
        """Return the model with its weights, for use."""
        model = self.make()
        load_weights(model, self.tensors, self.path, may_lack=may_lack)
        return model.eval()

    def texts(self) -> dict[str, str]:
        """Return what a checkpoint folder has beside these weights, by the names of the files."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.yaml"
            save_config(self.config, file)
            found = {"config.yaml": file.read_text(encoding="utf-8")}
        found["state.json"] = json.dumps({"update": self.update}) + "\n"
        if self.label_names:
            found["labels.txt"] = "".join(f"{name}\n" for name in self.label_names)
        return found | ({ORIGIN: self.origin} if self.origin else {})


def file_of(weights: str) -> str:
    """Return the name of the file of weights in a checkpoint folder, without its ending."""
    return "model" if weights == "student" else weights


def load_model(
    folder: Path, weights: WeightsOf | None = None, called: Path | None = None
) -> TrainedModel:
    """Read a model out of a checkpoint folder. ``called``: what a user calls it.

    ``weights``: by default of pre-training the student's, of a classifier those that its config
    tests.

    Raises:
        ConfigError, CheckpointError: the folder is not a whole checkpoint, or has no such weights.
    """
    config = load_any_config(folder / "config.yaml")
    names: tuple[str, ...] = ()
    possible: tuple[WeightsOf, ...] = ("student", "teacher")
    chosen = weights or "student"
    if isinstance(config, FinetuneConfig):
        possible, chosen = ("model", "average"), weights or config.test.weights
    there = [name for name in possible if (folder / f"{file_of(name)}.safetensors").is_file()]
    if chosen not in there:
        raise CheckpointError(
            f"{folder} has no weights of {chosen!r}, but of {' and '.join(there) or 'nothing'}; "
            f"take --weights {' or '.join(there or possible)}"
        )
    if isinstance(config, FinetuneConfig):
        if not (folder / "labels.txt").is_file():
            raise CheckpointError(
                f"{folder} is no checkpoint of a classifier: it has no labels.txt, the name of "
                f"class i in line i; put that file there"
            )
        names = read_label_names(folder / "labels.txt")
        config = replace(
            config,
            model=replace(config.model, pretrained_grid=source_grid_of(config)),
            test=replace(config.test, weights="average" if chosen == "average" else "model"),
        )
    origin = folder / ORIGIN
    return TrainedModel(
        called or folder,
        config,
        read_weights(folder, file_of(chosen)),
        names,
        chosen,
        read_state(folder)["update"],
        origin.read_text(encoding="utf-8") if origin.is_file() else "",
        folder,
    )
