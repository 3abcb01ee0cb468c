"""The geometry of an encoder as weights/ still describes it: to be deleted with that."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import Conventions, Positions, TransformerSize
from hpm_video.config.data import DataConfig
from hpm_video.config.model import EncoderConfig
from hpm_video.models.positions import FixedPositions
from hpm_video.tokens.grid import Size3, TokenGrid


@dataclass(frozen=True)
class EncoderShape:
    """What an encoder is, apart from its weights."""

    grid: TokenGrid
    patch_size: Size3
    size: TransformerSize
    positions: Positions
    source_grid: TokenGrid | None = None
    """Grid of pre-training, in which tokens have their positions; by default ``grid``."""
    channels: int = 3
    class_token: bool = False
    """Whether a learned token that stands for the whole clip goes first."""
    conventions: Conventions = "videomae"
    other_grids: tuple[TokenGrid, ...] = ()
    """Of further kinds of clips that it takes, whose tokens have their positions alike."""

    @property
    def values(self) -> int:
        """Values of a patch (P)."""
        return self.channels * math.prod(self.patch_size)

    @property
    def settings(self) -> dict[str, Any]:
        """What the section of a config calls it."""
        names = ("patch_size", "channels", "positions", "class_token", "conventions")
        return {"encoder": self.size, "drop_path": 0.0} | {n: getattr(self, n) for n in names}

    @property
    def num_prefix(self) -> int:
        """Tokens before those of the clip: the class token, or none."""
        return int(self.class_token)

    def fixed_positions(self, dim: int) -> FixedPositions:
        """Positions of all its clips at a width."""
        grids = dict.fromkeys((self.grid, *self.other_grids))
        return FixedPositions(grids, dim, self.positions, self.source_grid or self.grid)

    def grid_of(self, clips: Tensor) -> TokenGrid:
        """(B, C, T, H, W) -> the grid of their tokens"""
        return TokenGrid.of_clip((clips.shape[2], clips.shape[3], clips.shape[4]), self.patch_size)


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
