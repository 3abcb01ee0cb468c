"""The experiment schema: every default, every check, once. The only user of OmegaConf.

A field marked with :func:`unrelated` does not change what a run computes (paths, workers,
logging); the others do, and a run that has begun refuses to go on with another value.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpm_video.data.decode import DecoderChoice
from hpm_video.losses import PredictorObjective
from hpm_video.masking import (
    STRATEGIES,
    CountRule,
    MaskStrategy,
    MaskUnit,
    Pick,
    StrategyName,
    count_masked,
)
from hpm_video.models.pos_embed import Positions
from hpm_video.models.vit import TransformerSize
from hpm_video.targets import TargetKind
from hpm_video.token_grid import Size3, TokenGrid
from hpm_video.training.teacher import MomentumKind

Config = TypeVar("Config")
Precision = Literal["auto", "fp32", "bf16"]


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the value, the rule and the remedy."""


def unrelated(default: Any) -> Any:
    """A field that does not change what a run computes."""
    return field(default=default, metadata={"changes_result": False})


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The masked autoencoder: an encoder and decoders of one size."""

    encoder: TransformerSize = field(default_factory=lambda: TransformerSize(768, 12, 12))
    decoder: TransformerSize = field(default_factory=lambda: TransformerSize(384, 4, 6))
    """Of the reconstructor and, where there is one, of the loss predictor."""
    patch_size: Size3 = (2, 16, 16)
    """Frames, height and width of a patch."""
    channels: int = 3
    positions: Positions = "sequence"
    """Fixed position codes: VideoMAE's over the ``sequence``, or MAE's in ``space_time``."""
    drop_path: float = 0.0
    """Chance of dropping a residual branch of the encoder's last block; it rises from 0."""
    checkpoint_activations: bool = unrelated(default=False)
    """Compute the blocks again in the backward pass instead of keeping what they computed."""

    def __post_init__(self) -> None:
        _at_least(1, channels=self.channels)
        if self.positions == "space_time" and (self.encoder.dim % 4 or self.decoder.dim % 4):
            raise ConfigError(
                f"model.positions=space_time needs widths that 4 divides, got encoder "
                f"{self.encoder.dim} and decoder {self.decoder.dim}"
            )
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"model.drop_path must lie in [0, 1), got {self.drop_path}")


@dataclass(frozen=True)
class DataConfig:
    """Which videos, and which frames and pixels of them."""

    train: str = ""
    """Manifest (CSV or list) or folder of the videos to train on."""
    validation: str | None = None
    """Manifest or folder of held-out videos; none: nothing is measured on held-out clips."""
    root: str | None = unrelated(default=None)
    """Folder that relative paths of the manifests start from; by default the manifest's own."""
    num_frames: int = 16
    frame_stride: int = 4
    """Frames of the video from one frame of the clip to the next."""
    max_frame_stride: int | None = None
    """Where given, each training clip draws its stride from frame_stride to this."""
    frame_size: tuple[int, int] = (224, 224)
    """Height and width of a clip in pixels."""
    repeats: int = 1
    """Clips taken from each decoded video. A batch counts videos."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel, pixels being in [0, 1]. The default is ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    decoder: DecoderChoice = unrelated(default="auto")
    workers: int | None = unrelated(default=None)
    """Processes that decode; by default one per core but one, at most 16."""
    max_bad_share: float = unrelated(default=0.01)
    """Share of the manifest's files that may fail to decode before the run stops."""

    def __post_init__(self) -> None:
        _at_least(
            1, num_frames=self.num_frames, frame_stride=self.frame_stride, repeats=self.repeats
        )
        if self.max_frame_stride is not None and self.max_frame_stride < self.frame_stride:
            raise ConfigError(
                f"data.max_frame_stride must be at least data.frame_stride "
                f"({self.frame_stride}), got {self.max_frame_stride}"
            )
        if self.workers is not None:
            _at_least(0, workers=self.workers)
        if min(self.std, default=1) <= 0:
            raise ConfigError(f"data.std must be positive, got {self.std}")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share must lie in [0, 1], got {self.max_bad_share}")

    @property
    def clip_size(self) -> Size3:
        """Frames, height and width of a clip."""
        return (self.num_frames, *self.frame_size)


@dataclass(frozen=True)
class MaskingConfig:
    """How many tokens are hidden, in what units, and which of them for being hard."""

    unit: MaskUnit = "token"
    ratio: float = 0.9
    """Share of the mask units that are hidden."""
    count_rule: CountRule = "hpm"
    """Integer rule: ``hpm`` shows int(units (1 - ratio)), ``videomae`` hides int(ratio units)."""
    strategy: StrategyName = "easy_to_hard"
    """Preset of the three fields below: random, easy_to_hard, hard_to_easy, hardest, easiest."""
    pick: Pick | None = None
    """Where given, replaces the preset's: hide the ``hardest`` or the ``easiest`` units."""
    first_fraction: float | None = None
    """Where given, replaces the preset's alpha_0: share of hidden units that are picked, at 0."""
    last_fraction: float | None = None
    """Where given, replaces the preset's alpha_T, the share in the last epoch."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(f"masking.ratio must lie between 0 and 1, got {self.ratio}")
        for name in ("first_fraction", "last_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"masking.{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class MiningConfig:
    """What is predicted, and how the teacher follows."""

    target: TargetKind = "per_channel"
    """Pixels: ``raw``, standardised ``joint``-ly (MAE) or ``per_channel`` (VideoMAE)."""
    predictor: PredictorObjective = "relative"
    """Ranking of errors, regression on errors, or no loss predictor: a masked autoencoder."""
    predictor_weight: float = 1.0
    momentum: MomentumKind = "paper"
    """Teacher's momentum: ``paper`` ramps linearly over 100 epochs, ``warmup`` is
    min(last_momentum, (1 + n) / (10 + n)) at update n, for runs too short for the paper's."""
    first_momentum: float = 0.999
    """Where the paper's ramp begins."""
    last_momentum: float = 0.9999

    def __post_init__(self) -> None:
        for name in ("first_momentum", "last_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"mining.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.predictor_weight < 0:
            raise ConfigError(f"mining.predictor_weight must be >= 0, got {self.predictor_weight}")


@dataclass(frozen=True)
class RecipeConfig:
    """The optimiser and its schedule."""

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
        _at_least(1, epochs=self.epochs, batch_size=self.batch_size)
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
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ConfigError(
                f"recipe.clip_grad must be positive, or null for no clipping, got {self.clip_grad}"
            )


@dataclass(frozen=True)
class EngineConfig:
    """How updates are computed. ``torch`` is one process of plain torch."""

    name: Literal["torch"] = "torch"
    device: str = "auto"
    """``cpu``, ``cuda``, ``mps``; ``auto`` takes an accelerator where there is one."""
    precision: Precision = "auto"
    """``auto``: bf16 autocast where the device is made for it. Weights are always fp32."""
    micro_batch: int | None = None
    """Videos per forward pass; by default the whole batch. It must divide the batch."""
    threads: int | None = None
    """Threads of the CPU's matrix products; by default torch's choice."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None:
            _at_least(1, micro_batch=self.micro_batch)
        if self.threads is not None:
            _at_least(1, threads=self.threads)


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes, and how often."""

    every_updates: int = 20
    """Updates between two lines of metrics."""
    validate_every_epochs: float = 20
    """Epochs between two measurements on held-out clips (one more at the end)."""
    validation_clips: int = 512
    """At most so many held-out clips are measured, evenly over the manifest."""
    picture_every_epochs: float = 100
    """Epochs between two picture sheets (one more at the end)."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _at_least(1, every_updates=self.every_updates, validation_clips=self.validation_clips)
        for name in ("validate_every_epochs", "picture_every_epochs"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"logging.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved, and which of the saved states are kept."""

    every_updates: int = 1000
    keep_last: int = 2
    keep_every_epochs: float | None = None
    """Checkpoints nearest after each multiple of this are kept for ever."""

    def __post_init__(self) -> None:
        _at_least(1, every_updates=self.every_updates, keep_last=self.keep_last)
        if self.keep_every_epochs is not None and self.keep_every_epochs <= 0:
            raise ConfigError(
                f"checkpoint.keep_every_epochs must be positive, or null for none, got "
                f"{self.keep_every_epochs}"
            )


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it trains."""

    output_dir: str = unrelated(default="")
    """Run directory. A run that was interrupted goes on from there."""
    seed: int = 0
    init_weights: str | None = None
    """Checkpoint folder or .safetensors file to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    engine: EngineConfig = unrelated(default=EngineConfig())
    logging: LoggingConfig = unrelated(default=LoggingConfig())
    checkpoint: CheckpointConfig = unrelated(default=CheckpointConfig())

    def __post_init__(self) -> None:
        micro, batch = self.micro_batch, self.recipe.batch_size
        if batch % micro:
            fitting = [n for n in range(1, batch + 1) if batch % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - micro))
            raise ConfigError(
                f"engine.micro_batch must divide recipe.batch_size ({batch}), got {micro}; the "
                f"nearest that does is {nearest}"
            )

    @property
    def micro_batch(self) -> int:
        """Videos per forward pass."""
        return self.engine.micro_batch or self.recipe.batch_size


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that a pre-training run depends on.

    It may start from the weights of a masked autoencoder (the loss predictor starts fresh, the
    teacher as a copy of the student) or of an earlier run of this kind.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            grid = TokenGrid.of_clip(self.data.clip_size, self.model.patch_size)
        except ValueError as error:
            raise ConfigError(
                f"data.num_frames, data.frame_size and model.patch_size do not fit: {error}"
            ) from error
        units = grid.num_tokens if self.masking.unit == "token" else grid.tokens_per_frame
        try:
            count_masked(units, self.masking.ratio, self.masking.count_rule)
        except ValueError as error:
            raise ConfigError(f"masking.ratio: {error}") from error
        if self.model.channels != 3:
            raise ConfigError(
                f"model.channels must be 3, since videos are decoded to RGB, got "
                f"{self.model.channels}; with other clips use MaskedAutoencoder from Python"
            )
        if self.model.channels != len(self.data.mean) or len(self.data.mean) != len(self.data.std):
            raise ConfigError(
                f"data.mean and data.std need a value for each of the {self.model.channels} "
                f"channels (model.channels), got {len(self.data.mean)} and {len(self.data.std)}"
            )
        if self.strategy.picks and self.mining.predictor == "none":
            raise ConfigError(
                f"masking.strategy={self.masking.strategy} picks patches by their predicted "
                f"difficulty, but mining.predictor is none; take masking.strategy=random, or a "
                f"predictor (relative, absolute)"
            )

    @property
    def strategy(self) -> MaskStrategy:
        """The preset of ``masking.strategy`` with what replaces parts of it."""
        preset, masking = STRATEGIES[self.masking.strategy], self.masking
        first, last = masking.first_fraction, masking.last_fraction
        return MaskStrategy(
            pick=masking.pick or preset.pick,
            first_fraction=preset.first_fraction if first is None else first,
            last_fraction=preset.last_fraction if last is None else last,
        )


def load_config(schema: type[Config], path: Path, overrides: list[str]) -> Config:
    """Schema defaults, then the YAML file, then ``section.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value is of the wrong
            type or breaks a rule of the schema.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no config file {path}; see configs/README.md for those shipped"
        )
    odd = [override for override in overrides if "=" not in override]
    if odd:
        raise ConfigError(f"an override must look like section.key=value, got {odd[0]!r}")
    try:
        layers = OmegaConf.merge(
            OmegaConf.structured(schema), OmegaConf.load(path), OmegaConf.from_dotlist(overrides)
        )
        config = OmegaConf.to_object(layers)
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        reason = str(error).strip().replace("\n", "; ")
        raise ConfigError(f"cannot use {path} {' '.join(overrides)}: {reason}") from error
    assert isinstance(config, schema)
    return config


def save_config(config: object, path: Path) -> None:
    """Write every value that a run used, so that the file alone repeats it."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def result_differences(old: object, new: object, prefix: str = "") -> list[str]:
    """The fields in which two configs differ and that change what a run computes.

    Each as ``section.key: old value -> new value``.
    """
    found = []
    for item in dataclasses.fields(old):  # type: ignore[arg-type]
        before, after = getattr(old, item.name), getattr(new, item.name)
        if not item.metadata.get("changes_result", True) or before == after:
            continue
        if dataclasses.is_dataclass(before) and dataclasses.is_dataclass(after):
            found += result_differences(before, after, f"{prefix}{item.name}.")
        else:
            found.append(f"{prefix}{item.name}: {before} -> {after}")
    return found
