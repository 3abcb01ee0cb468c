"""Models built from a config."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import TransformerSize
from hpm_video.config.data import DataConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig, grid_of
from hpm_video.files.plugins import REGISTERED
from hpm_video.files.weights import CheckpointError
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.feature_model import feature_width
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.randomness import key_of
from hpm_video.tokens.grid import Size3, TokenGrid

AnyConfig = PretrainConfig | FinetuneConfig
ANY_SIZE = 2**30  # bytes that any part of a model or its clips may take, whatever its weights


def check_sizes(config: AnyConfig, classes: int, held: int, path: Path) -> None:
    """Raise a CheckpointError where a config takes more memory than its weights, and much.

    ``classes``: of the head; ``held``: bytes of the weights, which are those of ``path``.
    """
    model, views, dim = config.model, 1, config.model.encoder.dim
    patch, widths = model.channels * prod(model.patch_size), [dim]
    takes = {
        "model.encoder": _bytes_of_blocks(model.encoder),
        "model.patch_size, model.channels": 4 * dim * patch,
        "labels.txt": 4 * dim * classes,
    }
    if isinstance(config, PretrainConfig):
        takes["model.decoder"] = _bytes_of_blocks(config.model.decoder)
        widths.append(config.model.decoder.dim)
    else:
        views = config.test.clips * config.test.crops
        takes["model.pretrained_grid"] = 4 * dim * prod(config.model.pretrained_grid or ())
    for data in config.sources.values():
        values = model.channels * prod(data.clip_size)
        takes["data.num_frames, data.frame_size"] = 4 * sum(widths) * values // patch
        takes["test.clips, test.crops, data.num_frames, data.frame_size"] = views * values
    for keys, size in takes.items():
        if size > max(held, ANY_SIZE):
            raise CheckpointError(
                f"{path} has weights of {held:,} bytes, but {keys} would take {size:,}; the "
                f"limit is {max(held, ANY_SIZE):,}. If you trust the file, correct its config"
            )


def _bytes_of_blocks(size: TransformerSize) -> int:
    of_block = 4 * size.dim**2 + 2 * size.dim * (size.mlp_dim or 4 * size.dim)
    return size.depth * (4 * of_block + 2**17)  # each is some objects, too


def source_grid_of(config: AnyConfig) -> Size3:
    """The grid that tokens have their positions in: of the pre-training a run is or began with.

    Of several kinds of clips it has the most tokens along each axis, so that no two tokens of a
    clip are closer than they are in a grid of their own.
    """
    if isinstance(config, FinetuneConfig) and config.model.pretrained_grid is not None:
        return config.model.pretrained_grid
    sizes = [data.clip_size for data in config.sources.values()]
    grids = [TokenGrid.of_clip(size, config.model.patch_size) for size in sizes]
    time, height, width = map(max, zip(*(grid.shape for grid in grids), strict=True))
    return time, height, width


def build_classifier(config: FinetuneConfig, num_classes: int) -> ClipClassifier:
    """The model of a config, its weights drawn from the seed."""
    model, source = config.model, config.model.pretrained_grid
    grid, source_grid = grid_of(config.data, model), source and TokenGrid(*source)
    with _initial_weights(config.seed):
        return ClipClassifier(model, num_classes, grid, source_grid)


def build_student(config: PretrainConfig) -> MaskedAutoencoder:
    """The model of a config, its weights drawn from the seed."""
    grid, *others = (grid_of(data, config.model) for data in config.sources.values())
    with _initial_weights(config.seed):
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
    grid, source = grid_of(data, config.model), TokenGrid(*source_grid_of(config))
    with _initial_weights(config.seed):
        return ClipEncoder(config.model, grid, source_grid=source, init="xavier")


@contextmanager
def _initial_weights(seed: int) -> Iterator[None]:
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
    if mining.target == "ema":
        return config.model.encoder.dim
    return getattr(REGISTERED.get(("target", mining.target)), "width", None)
