"""Fixed position codes. They are computed, never learned and never in a checkpoint."""

from typing import Literal

import torch
from torch import Tensor

from hpm_video.token_grid import TokenGrid

Positions = Literal["sequence", "space_time"]
"""``sequence``: one sinusoid over the flattened token index, as in VideoMAE. ``space_time``: codes
of column and row, as in MAE, plus one of time; nearby tokens then look alike along every axis."""


def position_table(grid: TokenGrid, dim: int, kind: Positions) -> Tensor:
    """The fixed code of every token of a grid: -> (N, D)"""
    return sinusoid(grid.num_tokens, dim) if kind == "sequence" else space_time(grid, dim)


def sinusoid(num_positions: int, dim: int) -> Tensor:
    """One-dimensional code over the flattened token index, as in VideoMAE: -> (N, D)

    Column j holds the angle position / 10000^(2 floor(j / 2) / D): its sine where j is even, its
    cosine where j is odd.
    """
    position = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1)
    angle = position / 10000 ** (2 * (torch.arange(dim) // 2) / dim)
    angle[:, 0::2] = angle[:, 0::2].sin()
    angle[:, 1::2] = angle[:, 1::2].cos()
    return angle.float()


def space_time(grid: TokenGrid, dim: int) -> Tensor:
    """Two-dimensional code of MAE plus a code of time that is 0 in the first time step: -> (N, D)

    The first half of the columns encodes the width coordinate, the second half the height; each
    half is the sines, then the cosines, of coordinate / 10000^(2 i / half). Time is encoded alike
    over all columns and its code at 0 subtracted, so that an image has exactly MAE's positions.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"positions of kind space_time need a width that 4 divides, got {dim}")
    time = _sines_and_cosines(grid.time, dim)
    height, width = (_sines_and_cosines(n, dim // 2) for n in (grid.height, grid.width))
    across = width.expand(grid.height, -1, -1)
    down = height.unsqueeze(1).expand(-1, grid.width, -1)
    space = torch.cat([across, down], dim=-1).flatten(0, 1)
    return ((time - time[:1]).unsqueeze(1) + space).flatten(0, 1).float()


def _sines_and_cosines(length: int, dim: int) -> Tensor:
    """-> (length, dim) float64"""
    rate = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)
