"""The sections on updates and on measuring: recipe, engine, logging, checkpoints, test, knn."""

from dataclasses import dataclass
from typing import Literal

from hpm_video.config.checks import ConfigError, a_chance, at_least, positive
from hpm_video.config.choices import Precision

CompileMode = Literal["off", "blocks", "model"]


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
        at_least(1, "recipe", self, "epochs", "batch_size")
        at_least(0, "recipe", self, "weight_decay")
        a_chance("recipe", self, "betas")
        positive("recipe", self, "clip_grad", rule="be positive, or null for no clipping")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(
                f"recipe.warmup_epochs must lie in [0, recipe.epochs = {self.epochs}], got "
                f"{self.warmup_epochs}"
            )
        if self.base_lr <= 0 or not 0 <= self.min_lr <= self.base_lr:
            raise ConfigError(
                f"need 0 <= recipe.min_lr <= recipe.base_lr, got {self.min_lr} and {self.base_lr}"
            )


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
        a_chance("recipe", self, "average_momentum")


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
    compile: CompileMode | Literal["auto"] = "auto"
    """What ``torch.compile`` makes faster: nothing, each transformer block, or all blocks of an
    encoder or decoder at once, which takes longer to start. ``auto``: blocks on a CUDA GPU, unless
    weights are sharded."""
    micro_batch: int | None = None
    """Videos per forward pass of a process; by default on a GPU as many as fit, elsewhere all of
    its share. The batch must be a multiple of it times the number of processes."""
    threads: int | None = None
    """Threads of the CPU's matrix products; by default torch's choice."""

    def __post_init__(self) -> None:
        at_least(1, "engine", self, "micro_batch", "threads")
        for name in ("zero_stage", "deepspeed", "offload"):
            value = getattr(self, name)
            if self.name != "deepspeed" and value not in (None, "none"):
                raise ConfigError(
                    f"engine.{name}={value} is for DeepSpeed, and engine.name is {self.name}; "
                    f"take engine.name=deepspeed, or leave it out"
                )
        if self.compile in ("blocks", "model") and self.name == "deepspeed" and self.stage == 3:
            raise ConfigError(
                f"engine.compile={self.compile} cannot be had with engine.zero_stage=3, in which "
                f"blocks gather their weights while they run; take engine.compile=auto, or a lower "
                f"stage"
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
        at_least(1, "logging", self, "every_updates", "validation_clips")
        positive("logging", self, "validate_every_epochs", "picture_every_epochs")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved, and which of the saved states are kept."""

    every_updates: int = 1000
    keep_last: int = 2
    keep_every_epochs: float | None = None
    """The first checkpoint after each multiple of this is kept for ever."""

    def __post_init__(self) -> None:
        at_least(1, "checkpoint", self, "every_updates", "keep_last")
        positive("checkpoint", self, "keep_every_epochs", rule="be positive, or null for none")


@dataclass(frozen=True)
class EvaluationConfig:
    """How a fine-tuned classifier is tested."""

    manifest: str | None = None
    """Manifest of the videos to test on; by default ``data.validation``."""
    clips: int = 5
    """Clips of each video, spread over it."""
    crops: int = 3
    """Crops of each clip, along its longer side."""
    checkpoint: Literal["last", "best"] = "last"
    """``best`` is best on ``data.validation``: no fair choice where that is tested on as well."""
    weights: Literal["model", "average"] = "model"
    """``average``: their moving average, see ``recipe.average_momentum``. Validation during
    training uses the same."""
    clips_per_pass: int = 32
    """Clips of one forward pass."""
    exclude_bad_files: bool = False
    """Count videos that do not decode as wrong, instead of stopping with a list of them."""

    def __post_init__(self) -> None:
        at_least(1, "test", self, "clips", "crops", "clips_per_pass")


@dataclass(frozen=True)
class KnnConfig:
    """Nearest neighbours of frozen features during pre-training: do they separate classes yet?"""

    train: str | None = None
    """Labelled manifest or folder that neighbours are looked up in; none: nothing is measured.
    Clips are taken as those of ``data``, the main source."""
    validation: str | None = None
    """Labelled manifest or folder of the videos to classify."""
    every_epochs: float = 20
    """Epochs between two measurements (one more at the end)."""
    videos: int = 2000
    """Videos of each manifest that are used at most, evenly over it."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07

    def __post_init__(self) -> None:
        at_least(1, "knn", self, "videos", "k")
        positive("knn", self, "every_epochs", "temperature")
        if (self.train is None) != (self.validation is None):
            raise ConfigError(
                "knn.train and knn.validation belong together: give both, or neither, got "
                f"{self.train} and {self.validation}"
            )
