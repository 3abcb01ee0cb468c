"""The sections that describe a model."""

from dataclasses import dataclass, field
from typing import Annotated

from hpm_video.config.checks import Chance, ConfigError, Count, Rule, check_fields, unrelated
from hpm_video.config.choices import Conventions, Init, Pooling, Positions, TransformerSize
from hpm_video.tokens.grid import Size3


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder, which pre-training and fine-tuning share."""

    encoder: TransformerSize = field(default_factory=lambda: TransformerSize(768, 12, 12))
    patch_size: Size3 = (2, 16, 16)
    """Frames, height and width of a patch."""
    channels: Count = 3
    positions: Positions = "sequence"
    """Fixed codes: ``sequence``, over the token index as in VideoMAE; ``space_time``, of column and
    row as in MAE, plus one of time; or ``given``, kept with imported weights that have others."""
    class_token: bool = False
    """A learned token for the whole clip that goes through encoder and decoders."""
    conventions: Conventions = "videomae"
    """``mae``: the layer from encoder to decoders has a bias, patch embedding and tokens start as
    in that paper (xavier-uniform; normal, standard deviation 0.02), and the tokens are decayed."""
    drop_path: Chance = 0.0
    """Chance of dropping a residual branch of the encoder's last block, from 0 in the first."""
    checkpoint_activations: bool = unrelated(default=False)
    """Recompute the blocks in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        check_fields("model", self)
        sizes = [value for value in vars(self).values() if isinstance(value, TransformerSize)]
        for size in sizes if self.positions != "sequence" else ():
            if size.dim % 4:
                raise ConfigError(
                    f"model.positions={self.positions} needs widths divisible by 4, got {size.dim}"
                )


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The masked autoencoder: an encoder and decoders of one size."""

    decoder: TransformerSize = field(default_factory=lambda: TransformerSize(384, 4, 6))
    """Size of the reconstructor and, where there is one, of the loss predictor."""


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """The classifier: an encoder and a head."""

    drop_path: Chance = 0.1
    num_classes: Annotated[int, Rule("be at least 2", lambda count: count >= 2)] | None = None
    """Classes; by default as many as the training manifest has."""
    pretrained_grid: tuple[Count, Count, Count] | None = None
    """Tokens along time, height and width in pre-training; by default those of ``init_weights``,
    and without these the clip's own."""
    pooling: Pooling = "mean_norm"
    """How tokens become one vector. ``mean_norm``: their mean, then a layer norm, none before it
    (fine-tuning). ``class_token``: that token, normed. ``batch_norm``: the normed class token, else
    the mean of normed tokens, each value standardised over the batch (linear probe). ``attentive``:
    a query learns which normed tokens to look at. Only means leave the class token out."""
    frozen: bool = False
    """Only pooling and head learn."""
    init: Init = "truncated_normal"
    """How fresh linear layers start: ``truncated_normal`` with standard deviation 0.02, as in
    VideoMAE, or ``xavier``-uniform, for narrow models."""
    head_dropout: Chance = 0.0
    head_init_scale: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frozen and self.pooling == "mean_norm":
            raise ConfigError(
                "model.frozen=true needs the encoder's norm, which model.pooling=mean_norm leaves "
                "out; take model.pooling=batch_norm (linear probe) or attentive"
            )
        if self.pooling == "class_token" and not self.class_token:
            raise ConfigError("model.pooling=class_token needs model.class_token=true")
