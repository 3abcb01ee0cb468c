"""The sections that describe a model."""

from dataclasses import dataclass, field

from hpm_video.config.checks import CHANCE, ConfigError, at_least, check, unrelated
from hpm_video.config.choices import Conventions, Init, Pooling, Positions, TransformerSize
from hpm_video.tokens.grid import Size3


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
    """Biases and initial weights: ``videomae``, or ``mae`` as the official image models."""
    drop_path: float = 0.0
    """Chance of dropping a residual branch of the encoder's last block; it rises from 0."""
    checkpoint_activations: bool = unrelated(default=False)
    """Compute the blocks again in the backward pass instead of keeping what they computed."""

    def __post_init__(self) -> None:
        check("model", self, at_least(1), "channels")
        self._check_positions(self.encoder)
        check("model", self, CHANCE, "drop_path")

    def _check_positions(self, size: TransformerSize) -> None:
        if self.positions != "sequence" and size.dim % 4:
            raise ConfigError(
                f"model.positions={self.positions} needs widths that 4 divides, got {size.dim}"
            )


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The masked autoencoder: an encoder and decoders of one size."""

    decoder: TransformerSize = field(default_factory=lambda: TransformerSize(384, 4, 6))
    """Size of the reconstructor and, where there is one, of the loss predictor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positions(self.decoder)


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """The classifier: an encoder and a head."""

    drop_path: float = 0.1
    num_classes: int | None = None
    """Classes; by default as many as the training manifest has."""
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
        check("model", self, CHANCE, "head_dropout")
        check("model", self, at_least(2), "num_classes")
        check("model", self, at_least(1), "pretrained_grid")
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
