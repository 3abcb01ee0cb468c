"""Models as a config describes them."""

from collections.abc import Iterable

import torch

from hpm_video.config.checks import ConfigError
from hpm_video.config.data import DataConfig
from hpm_video.config.model import EncoderConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.encoder import EncoderShape
from hpm_video.models.feature_model import feature_width
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.randomness import key_of
from hpm_video.tokens.grid import Size3, TokenGrid


def source_grid_of(config: PretrainConfig | FinetuneConfig) -> Size3:
    """The grid that tokens have their positions in: of the pre-training a run is or began with.

    Tokens along time, height and width; of several kinds of clips the most along each axis, so that
    no two tokens of a clip are closer than they are in a grid of their own.
    """
    if isinstance(config, FinetuneConfig) and config.model.pretrained_grid is not None:
        return config.model.pretrained_grid
    grids = [
        TokenGrid.of_clip(data.clip_size, config.model.patch_size)
        for data in config.sources.values()
    ]
    time, height, width = (
        max(axis) for axis in zip(*((g.time, g.height, g.width) for g in grids), strict=True)
    )
    return (time, height, width)


def encoder_shape(
    model: EncoderConfig,
    data: DataConfig,
    source: Size3 | None,
    others: Iterable[DataConfig] = (),
) -> EncoderShape:
    """What the encoder of a config is; ``others``: further clips that it takes.

    Raises:
        ConfigError: the patches do not fit the clips.
    """
    try:
        grid, *other_grids = (
            TokenGrid.of_clip(each.clip_size, model.patch_size) for each in (data, *others)
        )
    except ValueError as error:
        raise ConfigError(f"these clips do not fit the model: {error}") from error
    return EncoderShape(
        grid,
        model.patch_size,
        model.encoder,
        model.positions,
        None if source is None else TokenGrid(*source),
        model.channels,
        model.class_token,
        model.conventions,
        tuple(other_grids),
    )


def build_classifier(config: FinetuneConfig, num_classes: int) -> ClipClassifier:
    """The model of a config, its weights drawn from the seed."""
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(config.seed, "weights"))
        return ClipClassifier(
            encoder_shape(model, config.data, model.pretrained_grid),
            num_classes,
            pooling=model.pooling,
            frozen=model.frozen,
            head_dropout=model.head_dropout,
            head_init_scale=model.head_init_scale,
            drop_path=model.drop_path,
            checkpoint_activations=model.checkpoint_activations,
            init=model.init,
        )


def build_student(config: PretrainConfig) -> MaskedAutoencoder:
    """The model of a config, its weights drawn from the seed."""
    others = [source.data for source in config.mix.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(config.seed, "weights"))
        return MaskedAutoencoder(
            encoder_shape(config.model, config.data, source_grid_of(config), others),
            config.model.decoder,
            predictor=config.mining.predictor != "none",
            target_width=_target_width(config),
            drop_path=config.model.drop_path,
            checkpoint_activations=config.model.checkpoint_activations,
        )


def _target_width(config: PretrainConfig) -> int | None:
    """Values that are predicted of each token; none: those of its patch."""
    mining = config.mining
    if mining.feature_kind is not None:
        try:
            return feature_width(mining.feature_kind, mining.feature_name)
        except ValueError as error:
            raise ConfigError(f"mining.feature_model: {error}") from error
    return config.model.encoder.dim if mining.target == "ema" else None
