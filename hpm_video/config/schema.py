"""The experiment schema: every default, every check, once.

A field marked with :func:`unrelated` does not change what a run computes (paths, workers,
logging); the others do, and a run that has begun refuses to go on with another value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hpm_video.config import training
from hpm_video.config.batch_plan import BatchPlan, micro_batches, plan_batches
from hpm_video.config.checks import ConfigError, Finite, check_fields, unrelated
from hpm_video.config.data import AugmentationConfig, DataConfig, PretrainDataConfig
from hpm_video.config.mining import MaskingConfig, MiningConfig
from hpm_video.config.model import ClassifierConfig, EncoderConfig, ModelConfig
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import MaskRule, count_masked, grid_of_units


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it trains."""

    output_dir: str = unrelated(default="")
    """Directory of the run. An interrupted run resumes from it."""
    seed: int = 0
    init_weights: str | None = None
    """Checkpoint folder or .safetensors file to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    recipe: training.RecipeConfig = field(default_factory=training.RecipeConfig)
    engine: training.EngineConfig = unrelated(default=training.EngineConfig())
    logging: training.LoggingConfig = unrelated(default=training.LoggingConfig())
    checkpoint: training.CheckpointConfig = unrelated(default=training.CheckpointConfig())
    model: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        self.plan(1)

    @property
    def multiple(self) -> int:
        """What the videos of a forward pass must be a multiple of."""
        return 1

    def plan(self, processes: int, micro_batch: int | None = None) -> BatchPlan:
        """Plan an update with the engine's micro-batch or another."""
        chosen = micro_batch or self.engine.micro_batch
        return plan_batches(self.recipe.batch_size, processes, chosen, multiple=self.multiple)

    def micro_batches(self, processes: int) -> list[int]:
        """Return the sizes of a micro-batch that the config allows, ascending."""
        if self.engine.micro_batch is not None:
            return [self.engine.micro_batch]
        return micro_batches(self.recipe.batch_size, processes, self.multiple)

    @property
    def sources(self) -> Mapping[str, DataConfig]:
        """Sources of training clips by name; the main one, ``data``, is ``""``."""
        return {"": self.data}

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the sources: how often an update takes its batch from each."""
        return (1.0,)


def key_of_source(name: str) -> str:
    """What the keys of a source begin with in a config."""
    return f"mix.{name}." if name else ""


@dataclass(frozen=True)
class SourceConfig:
    """A further source of training clips in a run that mixes several, such as images."""

    weight: Finite = 1.0
    """How often an update takes its batch from here; the main source, ``data``, has 1."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    def __post_init__(self) -> None:
        check_fields("", self)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that a pre-training run depends on."""

    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    mix: dict[str, SourceConfig] = field(default_factory=dict)
    """Further sources of clips by name. An update takes its batch from one source; an epoch is as
    long as it takes to see ``data`` once."""
    knn: training.KnnConfig = unrelated(default=training.KnnConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mining.feature_kind and self.model.channels != 3:
            raise ConfigError(
                f"mining.target={self.mining.target} needs model.channels=3, got "
                f"{self.model.channels}"
            )
        self._check_source("", self.data)
        for name, source in self.mix.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"a name in mix must be a letter, then letters, digits, _ and -, got {name!r}"
                )
            self._check_source(name, source.data)

    def _check_source(self, name: str, data: DataConfig) -> None:
        at = key_of_source(name)
        if self.mask_rule(name).strategy.picks and self.mining.predictor == "none":
            raise ConfigError(
                f"{at}masking.strategy={self.maskings[name].strategy} needs a predictor, and "
                f"mining.predictor is none; take {at}masking.strategy=random"
            )
        for key in ("workers", "max_bad_share", "label_names") if at else ():
            if getattr(data, key) != getattr(DataConfig(), key):
                raise ConfigError(f"{at}data.{key} has no effect; set data.{key} for all sources")
        for key in ("mean", "std", *(["frame_size"] if self.mining.feature_kind else [])):
            own, main = getattr(data, key), getattr(self.data, key)
            if own != main:
                raise ConfigError(f"{at}data.{key} must be data.{key}={main}, got {own}")

    def mask_rule(self, source: str) -> MaskRule:
        """Return the rule by which the clips of a source are masked, or raise a ConfigError."""
        masking = self.maskings[source]
        at = key_of_source(source)
        grid = grid_of(self.sources[source], self.model, at)
        try:
            units = grid_of_units(grid, masking.unit).num_tokens
            num_masked = count_masked(units, masking.ratio, masking.count_rule)
        except ValueError as error:
            raise ConfigError(f"{at}masking.ratio: {error}") from error
        return MaskRule(grid, masking.unit, num_masked, masking.mask_strategy)

    @property
    def sources(self) -> dict[str, PretrainDataConfig]:
        return {"": self.data, **{name: source.data for name, source in self.mix.items()}}

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0, *(source.weight for source in self.mix.values()))

    @property
    def maskings(self) -> dict[str, MaskingConfig]:
        """How the clips of each source are masked."""
        return {"": self.masking, **{name: source.masking for name, source in self.mix.items()}}


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Everything that a fine-tuning run depends on, or a probe that is trained."""

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    recipe: training.FinetuneRecipe = field(default_factory=training.FinetuneRecipe)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    init_from: Literal["student", "teacher", "average"] = "student"
    """Whose weights of ``init_weights`` are taken; those of a classifier itself count as
    ``student``, their EMA is its ``average``."""
    test: training.EvaluationConfig = unrelated(default=training.EvaluationConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        grid_of(self.data, self.model)
        if self.augmentation.rand_augment is not None and self.model.channels != 3:
            raise ConfigError(
                f"augmentation.rand_augment needs model.channels=3, got {self.model.channels}; "
                f"take augmentation.rand_augment=null"
            )
        if self.test.weights == "average" and self.recipe.average_momentum is None:
            raise ConfigError("test.weights=average needs recipe.average_momentum, such as 0.9999")
        if self.recipe.average_momentum is not None and self.model.pooling == "batch_norm":
            raise ConfigError(
                "recipe.average_momentum does not average the statistics of "
                "model.pooling=batch_norm; leave one of them out"
            )
        if self.test.checkpoint == "best" and self.data.validation is None:
            raise ConfigError("test.checkpoint=best needs data.validation")

    @property
    def multiple(self) -> int:
        needs_two_clips = self.model.pooling == "batch_norm" and self.data.repeats == 1
        return 2 if self.augmentation.mixes or needs_two_clips else 1


def grid_of(data: DataConfig, model: EncoderConfig, at: str = "") -> TokenGrid:
    """Return the grid of tokens of a clip, or raise a ConfigError where grid or channels misfit."""
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
