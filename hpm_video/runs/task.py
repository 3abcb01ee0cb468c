"""What a run trains: the seam between pre-training, fine-tuning and what every run has."""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.schema import RunConfig
from hpm_video.data.clips import VideoClips
from hpm_video.data.transforms import ClipTransform
from hpm_video.files.weights import load_weights
from hpm_video.runs.data import RunData, open_data
from hpm_video.runs.directory import RunDirectory
from hpm_video.training.checkpoint import read_weights
from hpm_video.training.deepspeed_engine import DeepSpeedEngine
from hpm_video.training.device import Precision
from hpm_video.training.distributed import Processes
from hpm_video.training.ema import make_ema
from hpm_video.training.engine import Engine, TorchEngine
from hpm_video.training.fast import choose_compiling, make_fast
from hpm_video.training.objective import Objective
from hpm_video.training.optim import Tensors
from hpm_video.training.run import Evaluation

Model = TypeVar("Model", bound=nn.Module)
Goal = TypeVar("Goal", bound=Objective)


class Task(ABC, Generic[Model, Goal]):
    """What a run trains. A new kind of training is a new task: :func:`run` is the same for all."""

    config: RunConfig
    same_frames = False
    """Whether the clips of a video in one batch show the same frames."""

    def __init__(self, config: RunConfig, ema: str | None) -> None:
        """``ema``: what checkpoints call the moving average of the weights, if there is one."""
        self.config, self.ema = config, ema

    @cached_property
    def data(self) -> RunData:
        """The videos that the config names."""
        return open_data(self.config)

    def training_clips(self) -> list[VideoClips]:
        """Return the training clips of each source."""
        transforms, max_bad_share = self.transforms(), self.config.data.max_bad_share
        return [
            VideoClips(
                self.data.sources[name].train,
                replace(source, max_bad_share=max_bad_share),
                transforms[name],
                seed=self.config.seed,
                same_frames=self.same_frames,
                source=name,
            )
            for name, source in self.config.sources.items()
        ]

    def resolve(self, directory: RunDirectory | None = None) -> None:  # noqa: B027 - nothing is open
        """Fill in what the config left open, as a run in ``directory`` did."""

    @abstractmethod
    def notes(self, directory: RunDirectory) -> dict[str, str]:
        """Return what the directory keeps of the start, text by name. Raises where it differs."""

    @abstractmethod
    def model(self) -> Model:
        """Build the model with its random weights, on the default device."""

    @abstractmethod
    def initialise(self, model: Model) -> Tensors | None:
        """Put ``init_weights`` into ``model``. -> those of the EMA, if they differ"""

    @abstractmethod
    def optimizer(self, model: Model) -> torch.optim.Optimizer:
        """Make the optimizer of its parameters."""

    @abstractmethod
    def transforms(self) -> dict[str, ClipTransform]:
        """Return how training clips are cropped and changed, by the name of their source."""

    @abstractmethod
    def objective(
        self, ema: Model | None, device: torch.device, engine: Engine | None = None
    ) -> Goal:
        """Make what is minimised. ``engine`` holds ``ema``, if any engine does."""

    @abstractmethod
    def evaluation(self, folder: Path, objective: Goal, engine: Engine) -> Evaluation:
        """Return what is measured during training, and drawn to the run's ``folder``."""


def make_models(
    task: Task[Model, Goal], device: torch.device, newest: Path | None
) -> tuple[Model, Model | None]:
    """Make model and EMA of a run that stands at a checkpoint, or else at its start."""
    model, patch_size = task.model(), task.config.model.patch_size
    if newest is None:
        source, averages = Path(task.config.init_weights or ""), task.initialise(model)
    else:
        source = newest
        load_weights(model, read_weights(newest, patch_size), newest)
        averages = None if task.ema is None else read_weights(newest, patch_size, task.ema)
    ema = None
    if task.ema is not None:
        ema = make_ema(model)
        if averages is not None:
            load_weights(ema, averages, source)
        ema.to(device)
    return model.to(device), ema


def make_engine(
    task: Task,
    model: nn.Module,
    ema: nn.Module | None,
    plan: BatchPlan,
    precision: Precision,
    device: torch.device,
    processes: Processes,
) -> Engine:
    """Make the engine that updates ``model``, fast, and shards ``ema`` as the model."""
    how, optimizer = task.config.engine, task.optimizer(model)
    compiled = choose_compiling(how, device)
    make_fast(compiled, model, ema, residual=how.residual)
    common: dict[str, Any] = {
        "device": device,
        "clip_grad": task.config.recipe.clip_grad,
        "precision": precision,
        "processes": processes,
    }
    engine: Engine
    if how.name == "deepspeed":
        engine = DeepSpeedEngine(model, optimizer, how, plan, **common)
    else:
        engine = TorchEngine(model, optimizer, accumulate=plan.accumulate, **common)
    if compiled != "off":
        engine.compiled, engine.name = compiled, f"{engine.name}, compiled ({compiled})"
    if ema is not None:
        engine.shard(ema)
    return engine
