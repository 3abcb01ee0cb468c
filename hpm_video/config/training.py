"""The sections on updates and on measuring: recipe, engine, logging, checkpoints, test, knn."""

from dataclasses import dataclass
from typing import Literal

from hpm_video.config.checks import (
    Chance,
    ConfigError,
    Count,
    NotNegative,
    Positive,
    PositiveShare,
    check,
    check_fields,
    check_names,
)
from hpm_video.config.choices import Precision

CompileMode = Literal["off", "blocks", "model"]


@dataclass(frozen=True)
class RecipeConfig:
    """The optimizer and its schedule."""

    epochs: Count = 800
    batch_size: Count = 2048
    """Videos per update, over all processes and micro-batches."""
    base_lr: Positive = 1.5e-4
    """Peak learning rate for 256 videos per update; it is scaled with batch_size."""
    min_lr: NotNegative = 1e-5
    """Learning rate at the end, scaled likewise."""
    warmup_epochs: float = 40
    weight_decay: NotNegative = 0.05
    betas: tuple[Chance, Chance] = (0.9, 0.95)
    optimizer: str = "adamw"
    """``adamw``, ``sgd`` (its momentum is the first of ``betas``), or one that was registered."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient; without it the gradient is not clipped."""

    def __post_init__(self) -> None:
        check_fields("recipe", self)
        check_names("recipe", self, "optimizer", "optimizer", ("adamw", "sgd"))
        in_run, warmup = f"lie in [0, recipe.epochs={self.epochs}]", self.warmup_epochs
        check("recipe.warmup_epochs", warmup, in_run, lambda epochs: 0 <= epochs <= self.epochs)
        below = f"be at most recipe.base_lr={self.base_lr}"
        check("recipe.min_lr", self.min_lr, below, lambda lr: lr <= self.base_lr)


@dataclass(frozen=True)
class FinetuneRecipe(RecipeConfig):
    """The optimizer of a classifier. The defaults are VideoMAE's."""

    epochs: Count = 100
    batch_size: Count = 512
    base_lr: Positive = 1e-3
    min_lr: NotNegative = 1e-6
    warmup_epochs: float = 5
    betas: tuple[Chance, Chance] = (0.9, 0.999)
    layer_decay: PositiveShare = 1.0
    """Each layer's learning rate, as a share of that of the layer above it."""
    average_momentum: Chance | None = None
    """Momentum of an exponential moving average (EMA) of the weights; without it none is kept."""


@dataclass(frozen=True)
class EngineConfig:
    """How updates are computed."""

    name: Literal["torch", "deepspeed"] = "torch"
    """``torch``: DDP with several processes. ``deepspeed`` computes the same in less memory."""
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
    compile: CompileMode | Literal["auto"] = "auto"
    """What ``torch.compile`` compiles: nothing, each transformer block, or all of an encoder or
    decoder at once, which takes longer to start. ``auto``: blocks on a CUDA GPU unless weights are
    sharded, otherwise nothing."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Precision between the blocks of a transformer; ``bf16`` changes nothing where precision=auto
    takes fp32. Norms and losses are always computed in fp32."""
    micro_batch: Count | None = None
    """Videos per forward pass of a process; by default on a GPU as many as fit, elsewhere all."""
    threads: Count | None = None
    """Threads of the CPU's matrix products; by default torch's choice."""

    def __post_init__(self) -> None:
        check_fields("engine", self)
        for name in ("zero_stage", "deepspeed", "offload"):
            value = getattr(self, name)
            if self.name != "deepspeed" and value not in (None, "none"):
                raise ConfigError(f"engine.{name}={value} needs engine.name=deepspeed")
        if self.compile in ("blocks", "model") and self.name == "deepspeed" and self.stage == 3:
            raise ConfigError(
                f"engine.compile={self.compile} does not work with engine.zero_stage=3; take "
                f"engine.compile=auto, or a lower stage"
            )
        if self.residual == "bf16" and self.precision == "fp32":
            raise ConfigError("engine.residual=bf16 needs engine.precision=bf16 or auto, got fp32")
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

    every_updates: Count = 20
    """Updates between two lines of metrics."""
    validate_every_epochs: Positive = 20
    """Epochs between two validations (one more at the end)."""
    validation_clips: Count = 512
    """Largest number of validation clips, spread evenly over the manifest."""
    picture_every_epochs: Positive = 100
    """Epochs between two picture sheets (one more at the end)."""
    trackers: tuple[str, ...] = ("jsonl", "tensorboard")
    """Where metrics and pictures go: jsonl (metrics.jsonl, of which curves and reports are made),
    tensorboard, wandb, mlflow, and registered ones."""

    def __post_init__(self) -> None:
        check_fields("logging", self)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved, and which of the saved states are kept."""

    every_updates: Count = 1000
    keep_last: Count = 2
    keep_every_epochs: Positive | None = None
    """The first checkpoint after each multiple of this is kept forever."""

    def __post_init__(self) -> None:
        check_fields("checkpoint", self)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a fine-tuned classifier is tested."""

    manifest: str | None = None
    """Manifest of the videos to test on; by default ``data.validation``."""
    clips: Count = 5
    """Clips of each video, spread over it."""
    crops: Count = 3
    """Crops of each clip, along its longer side."""
    checkpoint: Literal["last", "best"] = "last"
    """``best`` is best on ``data.validation``: optimistic if the test uses the same videos."""
    weights: Literal["model", "average"] = "model"
    """``average``: the EMA, see ``recipe.average_momentum``. Validation uses the same."""
    clips_per_pass: Count = 32
    """Clips of one forward pass."""
    exclude_bad_files: bool = False
    """Count videos that do not decode as wrong, instead of stopping with a list of them."""

    def __post_init__(self) -> None:
        check_fields("test", self)


@dataclass(frozen=True)
class KnnConfig:
    """Nearest neighbours of frozen features during pre-training: do they separate classes yet?"""

    train: str | None = None
    """Labelled manifest or folder of the neighbours; without it nothing is measured."""
    validation: str | None = None
    """Labelled manifest or folder of the videos to classify."""
    every_epochs: Positive = 20
    """Epochs between two measurements (one more at the end)."""
    videos: Count = 2000
    """Largest number of videos of each manifest, spread evenly over it."""
    k: Count = 20
    """Neighbours that vote."""
    temperature: Positive = 0.07

    def __post_init__(self) -> None:
        check_fields("knn", self)
        if (self.train is None) != (self.validation is None):
            raise ConfigError(
                f"give both knn.train={self.train} and knn.validation={self.validation}, or neither"
            )
