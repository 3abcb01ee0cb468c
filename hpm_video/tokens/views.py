"""Regular parts of a clip, for a teacher whose encoder does not see all of it."""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.masking import TokenMask

View = Literal["all", "checkerboard", "quarter", "every_second_step", "every_fourth_step"]

VIEWS: dict[View, tuple[Size3, int]] = {
    "all": ((0, 0, 0), 1),
    "checkerboard": ((1, 1, 1), 2),
    "quarter": ((1, 1, 2), 4),
    "every_second_step": ((1, 0, 0), 2),
    "every_fourth_step": ((1, 0, 0), 4),
}
"""Factors of time step, row and column, and a modulus: a token is seen where their sum leaves a
certain remainder. A new view is an entry here and in its Literal."""


def mask_of_view(view: View, grid: TokenGrid, device: torch.device | str) -> TokenMask | None:
    """Return the mask of what a view leaves out, one for all clips (B = 1); none of ``all``."""
    if view == "all":
        return None
    hidden = _is_hidden(view, grid, torch.arange(grid.num_tokens, device=device))
    return TokenMask.from_masked(hidden.unsqueeze(0), _count_hidden(view, grid))


@lru_cache
def _count_hidden(view: View, grid: TokenGrid) -> int:
    """Count on the host: the device would have to be waited for."""
    return int(_is_hidden(view, grid, np.arange(grid.num_tokens)).sum())


def _is_hidden(view: View, grid: TokenGrid, tokens: Any) -> Any:
    """Positions in the grid, in numpy or torch: (N,) -> (N,) bool"""
    (of_step, of_row, of_column), modulus = VIEWS[view]
    step = tokens // grid.tokens_per_step
    row = tokens // grid.width % grid.height
    column = tokens % grid.width
    seen = (modulus - 1) // 2 % grid.time  # so that some token is, however short the clip
    return (of_step * step + of_row * row + of_column * column) % modulus != seen
