"""The sections on updates: recipe, engine, logging, checkpoints."""

from dataclasses import dataclass
from typing import Literal

from hpm_video.config.checks import ConfigError, a_chance, at_least, positive
from hpm_video.config.choices import Precision


@dataclass(frozen=True)
class RecipeConfig:
    """The optimizer and its schedule."""

    epochs: int = 800
    batch_size: int = 2048
    """Videos per update, over all processes and micro-batches."""
    base_lr: float = 1.5e-4
    """Peak learning rate for 256 videos per update; it is scaled with batch_size."""
    min_lr: float = 1e-5
    """Learning rate at the end, scaled likewise."""
    warmup_epochs: float = 40
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    """Largest norm of the gradient; none: not clipped."""

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(
                f"recipe.warmup_epochs must lie in [0, recipe.epochs = {self.epochs}], got "
                f"{self.warmup_epochs}"
            )
        if self.base_lr <= 0 or not 0 <= self.min_lr <= self.base_lr:
            raise ConfigError(
                f"need 0 <= recipe.min_lr <= recipe.base_lr, got {self.min_lr} and {self.base_lr}"
            )
        if self.weight_decay < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"need recipe.weight_decay >= 0 and recipe.betas in [0, 1), got "
                f"{self.weight_decay} and {self.betas}"
            )
        positive("recipe", "be positive, or null for no clipping", clip_grad=self.clip_grad)


@dataclass(frozen=True)
class FinetuneRecipe(RecipeConfig):
    """The optimizer of a classifier. The defaults are VideoMAE's."""

    epochs: int = 100
    batch_size: int = 512
    base_lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    betas: tuple[float, float] = (0.9, 0.999)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """``sgd``: its momentum is the first of ``betas``."""
    layer_decay: float = 1.0
    """Each layer's learning rate, as a share of that of the layer above it."""
    average_momentum: float | None = None
    """Momentum of an exponential moving average (EMA) of the weights; none: none is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"recipe.layer_decay must lie in (0, 1], got {self.layer_decay}")
        a_chance("recipe", average_momentum=self.average_momentum)


@dataclass(frozen=True)
class EngineConfig:
    """How updates are computed.

    ``torch`` is plain torch, of several processes DDP. ``deepspeed`` computes the same with less
    memory in each process.
    """

    name: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What DeepSpeed shards over the processes: 0 nothing, 1 the optimizer's moments (the default),
    2 the gradients as well, 3 the weights, and the teacher's, as well."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the host's memory: the optimizer, or (stage 3) the weights too."""
    deepspeed: str | None = None
    """JSON file with further settings of DeepSpeed. It must not contradict the run's own."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``mps``; ``auto`` takes an accelerator where there is one."""
    precision: Precision = "auto"
    """``auto``: bf16 autocast where the device is made for it. Weights are always fp32."""
    micro_batch: int | None = None
    """Videos per forward pass of a process; by default on a GPU as many as fit, elsewhere all of
    its share. The batch must be a multiple of it times the number of processes."""
    threads: int | None = None
    """Threads of the CPU's matrix products; by default torch's choice."""

    def __post_init__(self) -> None:
        at_least(1, micro_batch=self.micro_batch, threads=self.threads)
        for name in ("zero_stage", "deepspeed", "offload"):
            value = getattr(self, name)
            if self.name != "deepspeed" and value not in (None, "none"):
                raise ConfigError(
                    f"engine.{name}={value} is for DeepSpeed, and engine.name is {self.name}; "
                    f"take engine.name=deepspeed, or leave it out"
                )
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.stage < needed:
            raise ConfigError(
                f"engine.offload={self.offload} needs engine.zero_stage={needed} or higher, got "
                f"{self.stage}"
            )

    @property
    def stage(self) -> Literal[0, 1, 2, 3]:
        """Stage of ZeRO."""
        return 1 if self.zero_stage is None else self.zero_stage


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes, and how often."""

    every_updates: int = 20
    """Updates between two lines of metrics."""
    validate_every_epochs: float = 20
    """Epochs between two validations (one more at the end)."""
    validation_clips: int = 512
    """Validation clips that are measured at most, evenly over the manifest."""
    picture_every_epochs: float = 100
    """Epochs between two picture sheets (one more at the end)."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        at_least(1, every_updates=self.every_updates, validation_clips=self.validation_clips)
        often = ("validate_every_epochs", "picture_every_epochs")
        positive("logging", **{name: getattr(self, name) for name in often})


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved, and which of the saved states are kept."""

    every_updates: int = 1000
    keep_last: int = 2
    keep_every_epochs: float | None = None
    """The first checkpoint after each multiple of this is kept for ever."""

    def __post_init__(self) -> None:
        at_least(1, every_updates=self.every_updates, keep_last=self.keep_last)
        rule = "be positive, or null for none"
        positive("checkpoint", rule, keep_every_epochs=self.keep_every_epochs)
