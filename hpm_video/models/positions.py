"""Fixed position codes. They are never learned, and those that are computed in no checkpoint.

A model may see clips of another size than the one that it was pre-trained on. Its tokens then take
their codes at fractional coordinates of the grid of pre-training: the centre of a token stays at
the same share of the clip along every axis, and the codes' own functions are evaluated there. Codes
that came with the weights of another project have no such function, and are interpolated there.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from hpm_video.config.choices import Positions
from hpm_video.tokens.grid import TokenGrid


def position_table(
    grid: TokenGrid, dim: int, kind: Positions, source: TokenGrid | None = None
) -> Tensor:
    """The fixed code of every token of a grid, placed in the grid of pre-training: -> (N, D)

    By default that is the same grid. A table that will be given starts as ``space_time``.
    """
    return (sequence if kind == "sequence" else space_time)(grid, dim, source or grid)


def resize_positions(table: Tensor, source: TokenGrid, grid: TokenGrid) -> Tensor:
    """Interpolate the codes of a grid from those of another: (N of source, D) -> (N, D)

    Bicubic and antialiased within a time step, as timm does, and linear over time.
    """
    space = grid.height, grid.width
    if space != (source.height, source.width):
        steps = rearrange(table, "(t h w) d -> t d h w", t=source.time, h=source.height)
        steps = F.interpolate(steps, size=space, mode="bicubic", antialias=True)
        table = rearrange(steps, "t d h w -> (t h w) d")
    if grid.time != source.time:
        lines = rearrange(table, "(t n) d -> n d t", t=source.time)
        lines = F.interpolate(lines, size=grid.time, mode="linear")
        table = rearrange(lines, "n d t -> (t n) d")
    return table


def sequence(grid: TokenGrid, dim: int, source: TokenGrid) -> Tensor:
    """One-dimensional code over the flattened token index, as in VideoMAE: -> (N, D)

    Column j holds the angle index / 10000^(2 floor(j / 2) / D): its sine where j is even, its
    cosine where j is odd. The index of a token is (t H + h) W + w, with the height H and the width
    W of ``source`` and coordinates t, h, w in it, which may be fractions.
    """
    time, height, width = _coordinates(grid, source)
    rows = time.view(-1, 1, 1) * source.height + height.view(-1, 1)
    index = (rows * source.width + width).reshape(-1, 1)
    angle = index / 10000 ** (2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    angle[:, 0::2] = angle[:, 0::2].sin()
    angle[:, 1::2] = angle[:, 1::2].cos()
    return angle.float()


def space_time(grid: TokenGrid, dim: int, source: TokenGrid) -> Tensor:
    """Two-dimensional code of MAE plus a code of time that is 0 in the first time step: -> (N, D)

    The first half of the columns encodes the width coordinate, the second half the height; each
    half is the sines, then the cosines, of coordinate / 10000^(2 i / half). Time is encoded alike
    over all columns and its code at 0 subtracted, so that an image has exactly MAE's positions.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"positions of kind space_time need a width divisible by 4, got {dim}")
    time, height, width = _coordinates(grid, source)
    across = _sines_and_cosines(width, dim // 2).expand(grid.height, -1, -1)
    down = _sines_and_cosines(height, dim // 2).unsqueeze(1).expand(-1, grid.width, -1)
    space = torch.cat([across, down], dim=-1).flatten(0, 1)
    since_start = _sines_and_cosines(time, dim) - _sines_and_cosines(torch.zeros(1), dim)
    return (since_start.unsqueeze(1) + space).flatten(0, 1).float()


def _coordinates(grid: TokenGrid, source: TokenGrid) -> tuple[Tensor, ...]:
    """Coordinates of the tokens of ``grid`` along each axis of ``source``: -> 3 x (length,)"""
    axes = (grid.time, source.time), (grid.height, source.height), (grid.width, source.width)
    return tuple(
        (torch.arange(length, dtype=torch.float64) + 0.5) * of_source / length - 0.5
        for length, of_source in axes
    )


def _sines_and_cosines(coordinate: Tensor, dim: int) -> Tensor:
    """(length,) -> (length, dim) float64"""
    rate = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = coordinate.double().unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)
