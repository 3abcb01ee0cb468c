"""Views: regular parts of a clip, for a teacher whose encoder does not see all tokens."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

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
"""Factors of time step, row and column, and a modulus. A token is seen if the sum of the products
has a certain remainder. A new view is an entry here and in ``View``."""


def mask_of_view(view: View, grid: TokenGrid, device: torch.device | str) -> TokenMask | None:
    """Return the mask of what a view leaves out, one for all clips (B = 1), or None for ``all``."""
    if view == "all":
        return None
    hidden = _is_hidden(view, grid, torch.arange(grid.num_tokens, device=device))
    count = int(_is_hidden(view, grid, np.arange(grid.num_tokens)).sum())  # without waiting for it
    return TokenMask.from_masked(hidden.unsqueeze(0), count)


def standardise_by_view(scores: Tensor, mask: TokenMask | None) -> Tensor:
    """Standardise the scores of a clip separately for seen and unseen tokens: (B, N) -> (B, N)

    A loss predictor learns to order hidden tokens; its scores for seen ones have another offset and
    spread.
    """
    if mask is None:
        return scores
    kinds = torch.stack([~mask.masked, mask.masked]).to(scores.dtype)
    count = kinds.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = (kinds * scores).sum(dim=-1, keepdim=True) / count
    deviations = kinds * (scores - mean)
    spread = (deviations.square().sum(dim=-1, keepdim=True) / count).sqrt()
    return (deviations / spread.clamp(min=1e-12)).sum(dim=0)


def _is_hidden(view: View, grid: TokenGrid, tokens: Any) -> Any:
    """Whether a view hides the tokens at these indices, in numpy or torch: (N,) -> (N,) bool"""
    (of_step, of_row, of_column), modulus = VIEWS[view]
    step = tokens // grid.tokens_per_step
    row = tokens // grid.width % grid.height
    column = tokens % grid.width
    seen = (modulus - 1) // 2 % grid.time  # some token is seen in any clip, however short
    return (of_step * step + of_row * row + of_column * column) % modulus != seen
