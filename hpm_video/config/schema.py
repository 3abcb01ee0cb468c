"""The experiment schema: every default, every check, once. The only user of OmegaConf.

A field marked with :func:`unrelated` does not change what a run computes (paths, workers,
logging); the others do, and a run that has begun refuses to go on with another value.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpm_video.config.batch_plan import PlanError, plan_batches
from hpm_video.config.choices import (
    DEFAULT_MODELS,
    Conventions,
    Crop,
    DecoderChoice,
    FeatureKind,
    Init,
    Interpolation,
    MomentumKind,
    Pooling,
    Positions,
    Precision,
    PredictorObjective,
    Sampling,
    Target,
    TransformerSize,
    check_rand_augment,
)
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.masking import (
    STRATEGIES,
    CountRule,
    MaskStrategy,
    MaskUnit,
    Pick,
    StrategyName,
    count_masked,
)
from hpm_video.tokens.patches import TargetKind

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the value, the rule and the remedy."""


def unrelated(default: Any) -> Any:
    """A field that does not change what a run computes."""
    return field(default=default, metadata={"changes_result": False})


def _a_chance(section: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{section}.{name} must lie in [0, 1), got {value}")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder, which pre-training and fine-tuning share."""

    encoder: TransformerSize = field(default_factory=lambda: TransformerSize(768, 12, 12))
    patch_size: Size3 = (2, 16, 16)
    """Frames, height and width of a patch."""
    channels: int = 3
    positions: Positions = "sequence"
    """Fixed position codes: VideoMAE's over the ``sequence``, MAE's in ``space_time``, or ``given``
    with imported weights that have others."""
    class_token: bool = False
    """Whether a learned token for the whole clip goes through encoder and decoders."""
    conventions: Conventions = "videomae"
    """Whose biases and initial weights: ``videomae``, or ``mae`` as the official image models."""
    drop_path: float = 0.0
    """Chance of dropping a residual branch of the encoder's last block; it rises from 0."""
    checkpoint_activations: bool = unrelated(default=False)
    """Compute the blocks again in the backward pass instead of keeping what they computed."""

    def __post_init__(self) -> None:
        _at_least(1, channels=self.channels)
        self._check_positions(self.encoder)
        _a_chance("model", drop_path=self.drop_path)

    def _check_positions(self, size: TransformerSize) -> None:
        if self.positions != "sequence" and size.dim % 4:
            raise ConfigError(
                f"model.positions={self.positions} needs widths that 4 divides, got {size.dim}"
            )


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The masked autoencoder: an encoder and decoders of one size."""

    decoder: TransformerSize = field(default_factory=lambda: TransformerSize(384, 4, 6))
    """Of the reconstructor and, where there is one, of the loss predictor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positions(self.decoder)


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """The classifier: an encoder and a head."""

    drop_path: float = 0.1
    num_classes: int | None = None
    """By default as many as the training manifest has."""
    pretrained_grid: Size3 | None = None
    """Tokens along time, height and width in pre-training, in which positions are given. By
    default those of ``init_weights``, and without these the clip's own."""
    pooling: Pooling = "mean_norm"
    """``mean_norm`` or ``class_token`` for fine-tuning, ``batch_norm`` for a linear probe,
    ``attentive``."""
    frozen: bool = False
    """Whether the encoder stays as it is, so that only pooling and head learn."""
    init: Init = "truncated_normal"
    """How what does not come from ``init_weights`` starts; ``xavier`` for narrow models."""
    head_dropout: float = 0.0
    head_init_scale: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        _a_chance("model", head_dropout=self.head_dropout)
        if self.num_classes is not None:
            _at_least(2, num_classes=self.num_classes)
        if self.pretrained_grid is not None and min(self.pretrained_grid) < 1:
            raise ConfigError(
                f"model.pretrained_grid must be three positive numbers, got {self.pretrained_grid}"
            )
        if self.frozen and self.pooling == "mean_norm":
            raise ConfigError(
                "model.frozen=true keeps the encoder's own norm, which model.pooling=mean_norm "
                "leaves out; take model.pooling=batch_norm (linear probe) or attentive"
            )
        if self.pooling == "class_token" and not self.class_token:
            raise ConfigError(
                "model.pooling=class_token needs model.class_token=true, which pre-training must "
                "have had; or take mean_norm, batch_norm or attentive"
            )


@dataclass(frozen=True)
class DataConfig:
    """Which videos or images, and which frames and pixels of them. An image is one frame."""

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
    interpolation: Interpolation = "bilinear"
    """How frames are resized."""
    held_out_short_side: int | None = None
    """Where given, held-out frames are resized so that their shorter side has so many pixels, and
    crops are cut out of them (ImageNet: 256, then 224). By default a crop is as large as fits."""
    sampling: Sampling = "dense"
    """``dense``: frames at the stride. ``segments``: one frame of each of num_frames equal parts
    of the video; the stride then plays no part."""
    repeats: int = 1
    """Clips taken from each decoded video: in pre-training of frames of their own, in fine-tuning
    augmented copies of the same frames. A batch counts videos."""
    flip: bool = False
    """Whether a mirrored video keeps its meaning: then half of the training clips are mirrored.
    Never where labels depend on direction, as those of Something-Something do."""
    label_names: str | None = unrelated(default=None)
    """Text file with the name of class i in line i; by default names are taken from the manifest's
    column ``label_name``."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel, pixels being in [0, 1]. The default is ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    decoder: DecoderChoice = unrelated(default="auto")
    workers: int | None = unrelated(default=None)
    """Processes that decode; by default one per core but one, at least 1 and at most 16. With 0 the
    run itself decodes, and a file on which a decoder hangs or crashes ends it."""
    seconds_per_file: float = unrelated(default=60.0)
    """A file that takes longer to decode is bad, and the process that decodes it is replaced."""
    memory_per_worker: float = unrelated(default=4.0)
    """GiB that a process that decodes may take; a file that needs more is bad. On Linux only."""
    max_bad_share: float = unrelated(default=0.01)
    """Share of the manifest's files that may fail to decode before the run stops."""

    def __post_init__(self) -> None:
        _at_least(
            1, num_frames=self.num_frames, frame_stride=self.frame_stride, repeats=self.repeats
        )
        _at_least(1, height=self.frame_size[0], width=self.frame_size[1])
        short = self.held_out_short_side
        if short is not None and short < max(self.frame_size):
            raise ConfigError(
                f"data.held_out_short_side must be at least data.frame_size ({self.frame_size}), "
                f"got {short}"
            )
        if self.max_frame_stride is not None and self.max_frame_stride < self.frame_stride:
            raise ConfigError(
                f"data.max_frame_stride must be at least data.frame_stride "
                f"({self.frame_stride}), got {self.max_frame_stride}"
            )
        if self.sampling == "segments" and self.max_frame_stride is not None:
            raise ConfigError(
                f"data.sampling=segments takes no stride, but data.max_frame_stride is "
                f"{self.max_frame_stride}; leave it out"
            )
        if self.workers is not None:
            _at_least(0, workers=self.workers)
        if min(self.seconds_per_file, self.memory_per_worker) <= 0:
            raise ConfigError(
                "data.seconds_per_file and data.memory_per_worker must be positive, got "
                f"{self.seconds_per_file:g} and {self.memory_per_worker:g}"
            )
        if min(self.std, default=1) <= 0:
            raise ConfigError(f"data.std must be positive, got {self.std}")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"data.max_bad_share must lie in [0, 1], got {self.max_bad_share}")

    @property
    def clip_size(self) -> Size3:
        """Frames, height and width of a clip."""
        return (self.num_frames, *self.frame_size)

    def plain(self) -> "DataConfig":
        """The same without what is pre-training's alone."""
        names = [item.name for item in dataclasses.fields(DataConfig)]
        return DataConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class PretrainDataConfig(DataConfig):
    """The data of pre-training, and how its clips are cropped at random."""

    crop: Crop = "multi_scale"
    """``multi_scale``: one of a few boxes (VideoMAE). ``random_resized``: of any area (MAE)."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Of a ``random_resized`` crop, as a share of the frame; its shape is 3:4 to 4:3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"data.crop_area must be two rising numbers in (0, 1], got {self.crop_area}"
            )


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

    @property
    def mask_strategy(self) -> MaskStrategy:
        """The preset of ``strategy`` with what replaces parts of it."""
        preset, first, last = STRATEGIES[self.strategy], self.first_fraction, self.last_fraction
        return MaskStrategy(
            pick=self.pick or preset.pick,
            first_fraction=preset.first_fraction if first is None else first,
            last_fraction=preset.last_fraction if last is None else last,
        )


@dataclass(frozen=True)
class MiningConfig:
    """What is predicted, and how the teacher follows."""

    target: Target = "per_channel"
    """Pixels: ``raw``, standardised ``joint``-ly (MAE) or ``per_channel`` (VideoMAE). Features: of
    the teacher's encoder (``ema``), or of a ``dino`` or ``clip`` model for images."""
    feature_model: str | None = None
    """timm's name of the ``dino`` or ``clip`` model; by default ViT-B/16."""
    feature_weights: str | None = unrelated(default=None)
    """File of its weights, which is never downloaded. A run that goes on needs the same weights."""
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
        if self.feature_kind and self.feature_weights is None:
            raise ConfigError(
                f"mining.target={self.target} needs the weights of {self.feature_name}: give "
                f"mining.feature_weights=FILE"
            )
        if not self.feature_kind and (self.feature_model or self.feature_weights):
            raise ConfigError(
                f"mining.feature_model and feature_weights go with mining.target=dino or clip, and "
                f"it is {self.target}; leave them out"
            )

    @property
    def feature_kind(self) -> FeatureKind | None:
        """The kind of model whose features are the target, where it is another model's."""
        return self.target if self.target == "dino" or self.target == "clip" else None

    @property
    def feature_name(self) -> str:
        """Name that timm has for that model."""
        kind = self.feature_kind
        return self.feature_model or ("" if kind is None else DEFAULT_MODELS[kind])

    @property
    def pixel_kind(self) -> TargetKind | None:
        """How pixels are standardised, where they are the target."""
        return None if self.target in ("ema", "dino", "clip") else self.target  # type: ignore[return-value]

    @property
    def has_teacher(self) -> bool:
        """Whether anything is asked of a teacher."""
        return self.predictor != "none" or self.target == "ema"


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
class FinetuneRecipe(RecipeConfig):
    """The optimiser of a classifier. The defaults are VideoMAE's."""

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
    """Where given, a moving average of the weights is kept, with this share of the old value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"recipe.layer_decay must lie in (0, 1], got {self.layer_decay}")
        if self.average_momentum is not None:
            _a_chance("recipe", average_momentum=self.average_momentum)


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of training clips for a classifier; each is drawn once for all frames."""

    area: tuple[float, float] = (0.08, 1.0)
    """Of a random crop, as a share of the frame."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Width of a crop divided by its height."""
    rand_augment: str | None = "rand-m7-n4-mstd0.5-inc1"
    """RandAugment in timm's notation, or none."""
    erasing: float = 0.25
    """Chance that a random box is erased."""
    mixup: float = 0.8
    """Parameter of the beta distribution of the shares that clips are mixed in; 0: no mixup."""
    cutmix: float = 1.0
    """The same for the area of boxes put into other clips; 0: no CutMix."""
    mix_probability: float = 1.0
    """Chance that a batch is mixed at all."""
    cutmix_probability: float = 0.5
    """Chance of CutMix where both are on; otherwise mixup."""
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("area", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "area" and high > 1):
                raise ConfigError(
                    f"augmentation.{name} must be two rising positive numbers"
                    f"{', at most 1' if name == 'area' else ''}, got {(low, high)}"
                )
        for name in ("erasing", "mix_probability", "cutmix_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"augmentation.{name} must lie in [0, 1], got {getattr(self, name)}"
                )
        if min(self.mixup, self.cutmix) < 0:
            raise ConfigError(
                f"augmentation.mixup and cutmix must be at least 0, got {self.mixup} and "
                f"{self.cutmix}"
            )
        _a_chance("augmentation", label_smoothing=self.label_smoothing)
        if self.rand_augment is not None:
            try:
                check_rand_augment(self.rand_augment)
            except ValueError as error:
                raise ConfigError(f"augmentation.rand_augment: {error}") from error

    @property
    def mixes(self) -> bool:
        """Whether clips of a batch are mixed."""
        return max(self.mixup, self.cutmix) > 0 and self.mix_probability > 0


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
    """``average``: their moving average, see ``recipe.average_momentum``. Held-out measures during
    training are taken of the same."""
    clips_per_pass: int = 32
    """Clips of one forward pass."""
    exclude_bad_files: bool = False
    """Count videos that do not decode as wrong, instead of stopping with a list of them."""

    def __post_init__(self) -> None:
        _at_least(1, clips=self.clips, crops=self.crops, clips_per_pass=self.clips_per_pass)


@dataclass(frozen=True)
class KnnConfig:
    """Nearest neighbours of frozen features during pre-training: does it help recognition yet?"""

    train: str | None = None
    """Labelled manifest or folder that neighbours are looked up in; none: nothing is measured.
    Clips are taken as those of ``data``, the main source."""
    validation: str | None = None
    """Labelled manifest or folder of the videos to classify."""
    every_epochs: float = 20
    """Epochs between two measurements (one more at the end)."""
    videos: int = 2000
    """At most so many videos of each manifest, evenly over it."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07

    def __post_init__(self) -> None:
        _at_least(1, videos=self.videos, k=self.k)
        if (self.train is None) != (self.validation is None):
            raise ConfigError(
                "knn.train and knn.validation belong together: give both, or neither, got "
                f"{self.train} and {self.validation}"
            )
        if min(self.every_epochs, self.temperature) <= 0:
            raise ConfigError(
                f"knn.every_epochs and knn.temperature must be positive, got {self.every_epochs} "
                f"and {self.temperature}"
            )


@dataclass(frozen=True)
class EngineConfig:
    """How updates are computed, and by how many processes a part of them.

    ``torch`` is plain torch, of several processes DDP. ``deepspeed`` computes the same with less
    memory in each process.
    """

    name: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What DeepSpeed spreads over the processes: 0 nothing, 1 the optimizer's moments (the
    default), 2 the gradients as well, 3 the weights, and the teacher's, as well."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the host's memory: the optimizer, or (stage 3) the weights too."""
    deepspeed: str | None = None
    """JSON file with further settings of DeepSpeed. What the run decides it may not contradict."""
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
        if self.micro_batch is not None:
            _at_least(1, micro_batch=self.micro_batch)
        if self.threads is not None:
            _at_least(1, threads=self.threads)
        self._check_deepspeed()

    def _check_deepspeed(self) -> None:
        given: dict[str, int | str | None] = {
            "zero_stage": self.zero_stage,
            "deepspeed": self.deepspeed,
        }
        if self.offload != "none":
            given["offload"] = self.offload
        for name, value in given.items():
            if self.name != "deepspeed" and value is not None:
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
        """Of ZeRO."""
        return 1 if self.zero_stage is None else self.zero_stage


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
        try:
            plan_batches(self.recipe.batch_size, 1, self.engine.micro_batch)
        except PlanError as error:
            raise ConfigError(str(error)) from error

    @property
    def sources(self) -> dict[str, DataConfig]:
        """Where training clips come from, by name; the main source, ``data``, is ``""``."""
        return {"": self.data}

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the sources: how often an update takes its batch from each."""
        return (1.0,)


@dataclass(frozen=True)
class SourceConfig:
    """A further source of training clips in a run that mixes several, such as images."""

    weight: float = 1.0
    """How often an update takes its batch from here; the main source, ``data``, has 1."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"weight must be positive and finite, got {self.weight}; mix.NAME=null leaves a "
                f"source out"
            )


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that a pre-training run depends on.

    It may start from the weights of a masked autoencoder (the loss predictor starts fresh, the
    teacher as a copy of the student) or of an earlier run of this kind.
    """

    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    mix: dict[str, SourceConfig] = field(default_factory=dict)
    """Further sources of clips, by name. Each update takes its batch from one of them. An epoch is
    then as long as it takes to see ``data`` once."""
    knn: KnnConfig = unrelated(default=KnnConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source("", self.data, self.masking)
        for name, source in self.mix.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"a source in mix needs a name of letters, digits, _ and -, got {name!r}"
                )
            self._check_source(f"mix.{name}.", source.data, source.masking)

    def _check_source(self, at: str, data: DataConfig, masking: MaskingConfig) -> None:
        grid = _grid_of(data, self.model, at)
        units = grid.num_tokens if masking.unit == "token" else grid.tokens_per_step
        try:
            count_masked(units, masking.ratio, masking.count_rule)
        except ValueError as error:
            raise ConfigError(f"{at}masking.ratio: {error}") from error
        if masking.mask_strategy.picks and self.mining.predictor == "none":
            raise ConfigError(
                f"{at}masking.strategy={masking.strategy} picks patches by their predicted "
                f"difficulty, but mining.predictor is none; take {at}masking.strategy=random, "
                f"or a predictor (relative, absolute)"
            )
        usual = DataConfig()
        for name in ("workers", "max_bad_share", "label_names") if at else ():
            if getattr(data, name) != getattr(usual, name):
                raise ConfigError(
                    f"{at}data.{name} plays no part, one value holds for all sources: give "
                    f"data.{name}"
                )
        if self.mining.feature_kind and data.frame_size != self.data.frame_size:
            raise ConfigError(
                f"mining.target={self.mining.target} sees frames of one size, so "
                f"{at}data.frame_size must be data.frame_size, {self.data.frame_size}, got "
                f"{data.frame_size}"
            )
        for name in ("mean", "std"):
            if getattr(data, name) != getattr(self.data, name):
                raise ConfigError(
                    f"{at}data.{name} must be data.{name}, {getattr(self.data, name)}, got "
                    f"{getattr(data, name)}"
                )

    @property
    def sources(self) -> dict[str, DataConfig]:
        """Where training clips come from, by name; the main source, ``data``, is ``""``."""
        return {"": self.data, **{name: source.data for name, source in self.mix.items()}}

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the sources: how often an update takes its batch from each."""
        return (1.0, *(source.weight for source in self.mix.values()))

    @property
    def maskings(self) -> dict[str, MaskingConfig]:
        """How the clips of each source are masked."""
        return {"": self.masking, **{name: source.masking for name, source in self.mix.items()}}


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Everything that a fine-tuning run depends on, or a probe that is trained.

    It may start from the encoder of a pre-training run, or from a classifier.
    """

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    init_from: Literal["student", "teacher", "average"] = "student"
    """Whose weights of ``init_weights`` are taken: of pre-training the student's or the teacher's;
    of a classifier its own (also called ``student``) or their ``average``."""
    test: EvaluationConfig = unrelated(default=EvaluationConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        _grid_of(self.data, self.model)
        micro_batch = self.engine.micro_batch or self.recipe.batch_size
        if self.augmentation.mixes and micro_batch % 2:
            raise ConfigError(
                f"mixing pairs the videos of a forward pass, so their number must be even, got "
                f"{micro_batch}; take an even engine.micro_batch (or recipe.batch_size), or "
                f"augmentation.mixup=0 augmentation.cutmix=0"
            )
        if self.model.pooling == "batch_norm" and micro_batch * self.data.repeats < 2:
            raise ConfigError(
                "model.pooling=batch_norm standardises over the clips of a forward pass, and needs "
                "two at least; take a larger engine.micro_batch"
            )
        if self.test.weights == "average" and self.recipe.average_momentum is None:
            raise ConfigError(
                "test.weights=average needs an average: set recipe.average_momentum, for example "
                "0.9999"
            )
        if self.recipe.average_momentum is not None and self.model.pooling == "batch_norm":
            raise ConfigError(
                "recipe.average_momentum averages weights, not the statistics of "
                "model.pooling=batch_norm; leave one of them out"
            )
        if self.test.checkpoint == "best" and self.data.validation is None:
            raise ConfigError("test.checkpoint=best needs data.validation to tell which is best")


def _grid_of(data: DataConfig, model: EncoderConfig, at: str = "") -> TokenGrid:
    """The grid of tokens of a clip.

    Raises:
        ConfigError: there is none, or the channels do not fit.
    """
    if model.channels != 3:
        raise ConfigError(
            f"model.channels must be 3, since videos are decoded to RGB, got {model.channels}; "
            f"with other clips use the models from Python"
        )
    if model.channels != len(data.mean) or len(data.mean) != len(data.std):
        raise ConfigError(
            f"{at}data.mean and {at}data.std need a value for each of the {model.channels} "
            f"channels (model.channels), got {len(data.mean)} and {len(data.std)}"
        )
    try:
        return TokenGrid.of_clip(data.clip_size, model.patch_size)
    except ValueError as error:
        raise ConfigError(
            f"{at}data.num_frames, {at}data.frame_size and model.patch_size do not fit: {error}"
        ) from error


def load_config(schema: type[Config], path: Path, overrides: Sequence[str]) -> Config:
    """Schema defaults, then the YAML file, then ``section.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value is of the wrong
            type or breaks a rule of the schema.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no config file {path}; see configs/README.md for those shipped"
        )
    _read_text(path)
    odd = [override for override in overrides if "=" not in override]
    if odd:
        raise ConfigError(f"an override must look like section.key=value, got {odd[0]!r}")
    left_out = [override for override in overrides if _LEFT_OUT.fullmatch(override)]
    overrides = [override for override in overrides if override not in left_out]
    try:
        file = OmegaConf.load(path)
        _refuse_references(file, str(path))
        for override in overrides:
            _refuse_references(OmegaConf.from_dotlist([override]), "the command line")
        for override in left_out:
            _leave_out(file, override.split("=")[0].split("."))
        given = OmegaConf.merge(file, OmegaConf.from_dotlist(overrides))
        open_keys = sorted(OmegaConf.missing_keys(given))
        if open_keys:
            raise ConfigError(
                f"{path} leaves {open_keys[0]} to you: give {open_keys[0]}=VALUE, or "
                f"{open_keys[0]}=null for none"
            )
        _check_sources_alone(given)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        reason = str(error).strip().replace("\n", "; ")
        raise ConfigError(f"cannot use {path} {' '.join(overrides)}: {reason}") from error
    assert isinstance(config, schema)
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}; "
            f"save it as UTF-8"
        ) from error


def _refuse_references(config: Any, where: str) -> None:
    """Make sure that nothing is to be filled in, before anything could be.

    OmegaConf would put in what stands elsewhere, such as in the environment of whoever reads a
    config of somebody else.

    Raises:
        ConfigError: a value has a ``${...}``.
    """

    def look(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                look(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                look(inner, f"{key}[{number}]")
        elif isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{where} has {key}={value}, but ${{...}} is not filled in, neither from the "
                f"environment nor from other keys; write the value itself (a shell fills in "
                f'{key}="$NAME")'
            )

    look(OmegaConf.to_container(config, resolve=False), "")


def _check_sources_alone(given: Any) -> None:
    """Make sure of each further source by itself, so that an error says which it is of.

    Raises:
        ConfigError: a value of one breaks a rule of the schema.
    """
    mix: Any = given.get("mix") if OmegaConf.is_dict(given) else None
    for name, values in mix.items() if OmegaConf.is_dict(mix) else ():
        with contextlib.suppress(OmegaConfBaseException):  # which names the key by itself, later
            source = OmegaConf.merge(OmegaConf.structured(SourceConfig), values)
            _check_source_alone(str(name), source)


def _check_source_alone(name: str, source: Any) -> None:
    try:
        OmegaConf.to_object(source)
    except ConfigError as error:
        raise ConfigError(f"mix.{name}: {error}") from error


_LEFT_OUT = re.compile(r"mix(\.[A-Za-z0-9_-]+)?=(null|\{\})")


def _leave_out(config: Any, keys: Sequence[str]) -> None:
    """Take a further source out of a config, or all of them."""
    *above, last = keys
    for key in above:
        config = config.get(key, {})
    config.pop(last, None)


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> PretrainConfig | FinetuneConfig:
    """The config of a run, of whichever kind it is: that of pre-training has a section masking.

    Raises:
        ConfigError: there is no such file, or it is not such a config.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}; give a config, or a checkpoint folder of a run, such as "
            f"RUN/checkpoints/last"
        )
    if re.search(r"^masking:", _read_text(path), re.MULTILINE):
        return load_config(PretrainConfig, path, overrides)
    return load_config(FinetuneConfig, path, overrides)


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
        elif isinstance(before, dict) and isinstance(after, dict):
            if [*before] != [*after]:
                names = (", ".join(each) or "nothing" for each in (before, after))
                found.append(f"{prefix}{item.name}: {' -> '.join(names)}")
                continue
            for name, value in before.items():
                found += result_differences(value, after[name], f"{prefix}{item.name}.{name}.")
        else:
            found.append(f"{prefix}{item.name}: {before} -> {after}")
    return found
