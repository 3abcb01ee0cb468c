"""The sections on what is hidden and what is predicted."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, cast, get_args

from hpm_video.config import choices
from hpm_video.config.checks import (
    Chance,
    ConfigError,
    NotNegative,
    PositiveShare,
    Rule,
    Share,
    check_fields,
    check_names,
    unrelated,
)
from hpm_video.tokens import masking
from hpm_video.tokens.patches import TargetKind
from hpm_video.tokens.views import View


@dataclass(frozen=True)
class MaskingConfig:
    """How many tokens are hidden, in what units, and which of them for being hard."""

    unit: masking.MaskUnit = "token"
    ratio: Annotated[float, Rule("lie between 0 and 1", lambda ratio: 0 < ratio < 1)] = 0.9
    """Share of the mask units that are hidden."""
    count_rule: masking.CountRule = "hpm"
    """Integer rule: ``hpm`` shows int(units (1 - ratio)), ``videomae`` hides int(ratio units)."""
    strategy: str = "easy_to_hard"
    """Preset of the three fields below: random, easy_to_hard, hard_to_easy, hardest, easiest, or
    a registered one."""
    pick: masking.Pick | None = None
    """Whether the ``hardest`` or the ``easiest`` units are hidden; by default as in the preset."""
    first_fraction: Share | None = None
    """alpha_0, the share of hidden units that are picked at first; by default the preset's."""
    last_fraction: Share | None = None
    """alpha_T, that share in the last epoch; by default the preset's."""

    def __post_init__(self) -> None:
        check_fields("masking", self)
        check_names("masking", self, "strategy", "mask_strategy", masking.STRATEGIES)

    @property
    def mask_strategy(self) -> masking.MaskStrategy:
        """The preset of ``strategy`` with what replaces parts of it."""
        names = ("pick", "first_fraction", "last_fraction")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        changed = {name: value for name, value in given.items() if value is not None}
        return replace(masking.STRATEGIES[self.strategy], **changed)


@dataclass(frozen=True)
class MiningConfig:
    """What is predicted, and how the teacher follows."""

    target: str = "per_channel"
    """Pixels: ``raw``, standardised ``joint``-ly (MAE) or ``per_channel`` (VideoMAE). Features: of
    the teacher's encoder (``ema``), or of a ``dino`` or ``clip`` model for images. Or a
    registered target."""
    feature_model: str | None = None
    """timm's name of the ``dino`` or ``clip`` model; by default ViT-B/16."""
    feature_weights: str | None = unrelated(default=None)
    """File of its weights, which is never downloaded. To resume, a run needs the same weights."""
    objective: str = "hpm"
    """``hpm``: hard patches mining, or a subclass of it that was registered."""
    predictor: choices.PredictorObjective = "relative"
    """Ranking of errors, regression on errors, or no loss predictor: a masked autoencoder."""
    predictor_weight: NotNegative = 1.0
    momentum: choices.MomentumKind = "paper"
    """Teacher's momentum: ``paper`` ramps linearly over 100 epochs; ``warmup``, for shorter runs,
    is min(last_momentum, (1 + n) / (10 + n)) at update n."""
    first_momentum: Chance = 0.999
    """Momentum at the beginning of the paper's ramp."""
    last_momentum: Chance = 0.9999
    teacher_sees: View = "all"
    """Tokens that the teacher's encoder sees; all get a score. ``checkerboard``: half of them;
    ``quarter``: every second token of every second row, other rows in the next time step;
    ``every_second_step``, ``every_fourth_step``: all tokens of these time steps."""
    decoded_share: PositiveShare = 1.0
    """Share of the hidden tokens that the student predicts, two at least, drawn anew for each clip:
    the losses are then unbiased estimates of those over all of them."""

    def __post_init__(self) -> None:
        check_fields("mining", self)
        check_names("mining", self, "target", "target", get_args(choices.Target))
        check_names("mining", self, "objective", "objective", ["hpm"])
        if self.teacher_sees != "all" and (self.target == "ema" or self.predictor == "none"):
            raise ConfigError(
                f"mining.teacher_sees={self.teacher_sees} is for a teacher that only scores, got "
                f"mining.target={self.target} with mining.predictor={self.predictor}; take "
                f"mining.teacher_sees=all"
            )
        if self.feature_kind and self.feature_weights is None:
            raise ConfigError(
                f"mining.target={self.target} needs the weights of {self.feature_name}: give "
                f"mining.feature_weights=FILE"
            )
        if not self.feature_kind and (self.feature_model or self.feature_weights):
            raise ConfigError(
                f"mining.feature_model and mining.feature_weights are for mining.target=dino or "
                f"clip, got {self.target}; leave them out"
            )

    @property
    def feature_kind(self) -> choices.FeatureKind | None:
        """The kind of model whose features are the target, where it is another model's."""
        is_model = self.target in choices.DEFAULT_MODELS
        return cast("choices.FeatureKind", self.target) if is_model else None

    @property
    def feature_name(self) -> str:
        """Name that timm has for that model."""
        kind = self.feature_kind
        return self.feature_model or ("" if kind is None else choices.DEFAULT_MODELS[kind])

    @property
    def pixel_kind(self) -> TargetKind | None:
        """How pixels are standardised, where they are the target."""
        return cast("TargetKind", self.target) if self.target in get_args(TargetKind) else None

    @property
    def has_teacher(self) -> bool:
        """Whether anything is asked of a teacher."""
        return self.predictor != "none" or self.target == "ema"
