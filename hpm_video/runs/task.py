"""What a run trains: the seam between pre-training, fine-tuning and what every run has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from hpm_video.config.schema import RunConfig
from hpm_video.data.transforms import ClipTransform
from hpm_video.files.weights import load_weights
from hpm_video.runs.data import RunData
from hpm_video.runs.directory import RunDirectory
from hpm_video.training.checkpoint import read_weights
from hpm_video.training.distributed import Processes
from hpm_video.training.ema import make_ema
from hpm_video.training.engine import Engine
from hpm_video.training.objective import Objective
from hpm_video.training.optim import Tensors
from hpm_video.training.run import Evaluation


@dataclass(frozen=True)
class Session:
    """A run in one of its processes."""

    processes: Processes
    device: torch.device
    directory: RunDirectory


class Task(Protocol):
    """What a run trains. A new kind of training is a new task: :func:`run` is the same for all."""

    @property
    def config(self) -> RunConfig:
        """Of the run."""

    @property
    def data(self) -> RunData:
        """The videos that its config names."""

    ema: str | None
    """File of a checkpoint with the moving average of the weights; none: there is none."""

    @property
    def multiple(self) -> int:
        """What the videos of a forward pass must be a multiple of."""

    @property
    def same_frames(self) -> bool:
        """Whether the clips of a video in one batch show the same frames."""

    def resolve(self, directory: RunDirectory | None = None) -> None:
        """Fill in what the config left open, as a run in ``directory`` did."""

    def notes(self, directory: RunDirectory) -> dict[str, str]:
        """Return what the run directory says of the run's start: text by the name of a file.

        Raises:
            ConfigError: the run there began otherwise.
        """

    def model(self) -> nn.Module:
        """Build the model with its random weights, on the default device."""

    def initialise(self, model: nn.Module) -> Tensors | None:
        """Put the weights that the run starts from into ``model``.

        Returns those of the moving average, if they differ from the model's.
        """

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of its parameters."""

    def transforms(self) -> dict[str, ClipTransform]:
        """Return how training clips are cropped and changed, by the name of their source."""

    def objective(
        self, ema: nn.Module | None, device: torch.device, engine: Engine | None = None
    ) -> Objective:
        """Make what is minimised. ``engine``: it holds ``ema``, if any does."""

    def evaluation(self, session: Session, objective: Objective, engine: Engine) -> Evaluation:
        """Return what is measured and drawn during training.

        Raises:
            ConfigError, ManifestError: the videos to measure on cannot be used.
            DecodeError: one of them does not decode.
        """


def make_models(
    task: Task, device: torch.device, newest: Path | None
) -> tuple[nn.Module, nn.Module | None]:
    """Model and moving average of a task where its run stands: at a checkpoint, or at the start."""
    model = task.model()
    if newest is None:
        source = Path(task.config.init_weights or "")
        averages = task.initialise(model)
    else:
        source, patch_size = newest, task.config.model.patch_size
        load_weights(model, read_weights(newest, patch_size), newest)
        averages = None if task.ema is None else read_weights(newest, patch_size, task.ema)
    ema = None
    if task.ema is not None:
        ema = make_ema(model)
        if averages is not None:
            load_weights(ema, averages, source)
        ema.to(device)
    return model.to(device), ema
