"""Models built from a config."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hpm_video.config.checks import ConfigError
from hpm_video.config.data import DataConfig
from hpm_video.config.model import EncoderConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.encoder import ClipEncoder
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
    sizes = [data.clip_size for data in config.sources.values()]
    grids = [TokenGrid.of_clip(size, config.model.patch_size) for size in sizes]
    return (
        max(grid.time for grid in grids),
        max(grid.height for grid in grids),
        max(grid.width for grid in grids),
    )


def grid_of(model: EncoderConfig, data: DataConfig) -> TokenGrid:
    """The grid of tokens of a clip.

    Raises:
        ConfigError: the patches do not fit the clips.
    """
    try:
        return TokenGrid.of_clip(data.clip_size, model.patch_size)
    except ValueError as error:
        raise ConfigError(f"these clips do not fit the model: {error}") from error


def build_classifier(config: FinetuneConfig, num_classes: int) -> ClipClassifier:
    """The model of a config, its weights drawn from the seed."""
    model, source = config.model, config.model.pretrained_grid
    grid, source_grid = grid_of(model, config.data), source and TokenGrid(*source)
    with initial_weights(config.seed):
        return ClipClassifier(model, num_classes, grid, source_grid)


def build_student(config: PretrainConfig) -> MaskedAutoencoder:
    """The model of a config, its weights drawn from the seed."""
    grid, *others = (grid_of(config.model, data) for data in config.sources.values())
    with initial_weights(config.seed):
        return MaskedAutoencoder(
            config.model,
            grid,
            source_grid=TokenGrid(*source_grid_of(config)),
            other_grids=others,
            predictor=config.mining.predictor != "none",
            target_width=_target_width(config),
        )


def build_encoder(config: PretrainConfig, data: DataConfig) -> ClipEncoder:
    """The encoder of pre-training alone, for other clips, its weights drawn from the seed."""
    grid, source = grid_of(config.model, data), TokenGrid(*source_grid_of(config))
    with initial_weights(config.seed):
        return ClipEncoder(config.model, grid, source_grid=source, init="xavier")


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Draw by the seed of a config, and leave torch's own generator as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(seed, "weights"))
        yield


def _target_width(config: PretrainConfig) -> int | None:
    """Values that are predicted of each token; none: those of its patch."""
    mining = config.mining
    if mining.feature_kind is not None:
        try:
            return feature_width(mining.feature_kind, mining.feature_name)
        except ValueError as error:
            raise ConfigError(f"mining.feature_model: {error}") from error
    return config.model.encoder.dim if mining.target == "ema" else None
