"""Which tokens of a clip are hidden from the encoder.

A *mask unit* is a block of tokens that are hidden or shown together. With unit ``"token"`` each
token is its own unit; with ``"tube"`` a unit is one spatial position through all of time. Masks
are chosen over units and then spread to tokens, so images (one time step, where a tube is a
token) and videos share every line below.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import reduce, repeat
from torch import Tensor

from hpm_video.tokens.grid import Size3, TokenGrid

MaskUnit = Literal["token", "tube"]
CountRule = Literal["hpm", "videomae"]
Pick = Literal["hardest", "easiest"]

UNITS: dict[MaskUnit, Callable[[TokenGrid], Size3]] = {
    "token": lambda _: (1, 1, 1),
    "tube": lambda grid: (grid.time, 1, 1),
}
"""Tokens of a unit along time, height and width. A new unit is an entry here and in its Literal."""


def grid_of_units(grid: TokenGrid, unit: MaskUnit) -> TokenGrid:
    """The lattice of the mask units of a clip.

    Raises:
        ValueError: the size of a unit does not divide the grid.
    """
    return TokenGrid.of_clip(grid.shape, UNITS[unit](grid))


@dataclass(frozen=True)
class MaskStrategy:
    """Which of the hidden units are chosen by difficulty, and how many of them over training."""

    pick: Pick
    first_fraction: float
    """Share of the hidden units that is picked, before the first epoch (the paper's alpha_0)."""
    last_fraction: float
    """The same share in the last epoch (the paper's alpha_T)."""

    @property
    def picks(self) -> bool:
        """Whether the difficulty of a unit ever matters."""
        return max(self.first_fraction, self.last_fraction) > 0

    def fraction(self, epoch: int, epochs: int) -> float:
        """Share of the hidden units that is picked in ``epoch``, counted from 0.

        alpha_0 + (t / T)(alpha_T - alpha_0) with t = epoch + 1, as the official code counts.
        """
        span = self.last_fraction - self.first_fraction
        return self.first_fraction + span * (epoch + 1) / epochs

    def choose(
        self, difficulty: Tensor | None, priority: Tensor, num_masked: int, num_picked: int
    ) -> Tensor:
        """Choose the hidden units, as :func:`choose_masked` does: -> (B, U) bool"""
        if difficulty is not None and self.pick == "easiest":
            difficulty = -difficulty
        return choose_masked(difficulty, priority, num_masked, num_picked)


STRATEGIES: dict[str, MaskStrategy] = {
    "random": MaskStrategy("hardest", 0.0, 0.0),
    "easy_to_hard": MaskStrategy("hardest", 0.0, 0.5),
    "hard_to_easy": MaskStrategy("hardest", 0.5, 0.0),
    "hardest": MaskStrategy("hardest", 1.0, 1.0),
    "easiest": MaskStrategy("easiest", 1.0, 1.0),
}
"""Section 3.3 of the paper and its ablation of mask strategies."""


@dataclass(frozen=True)
class MaskRule:
    """Everything about a mask but the difficulties and the draws."""

    grid: TokenGrid
    unit: MaskUnit
    num_masked: int
    """Units that are hidden."""
    strategy: MaskStrategy

    @property
    def num_units(self) -> int:
        """Units of a clip (U)."""
        return grid_of_units(self.grid, self.unit).num_tokens

    def num_picked(self, epoch: int, epochs: int) -> int:
        """How many units are hidden for their difficulty in ``epoch``, counted from 0."""
        return int(self.num_masked * self.strategy.fraction(epoch, epochs))

    def draw(self, difficulty: Tensor | None, priority: Tensor, num_picked: int) -> "TokenMask":
        """Draw masks: (B, N) difficulty or none, (B, U) uniform draws -> a mask of these clips

        Raises:
            ValueError: ``num_picked`` is not 0 and there is no difficulty to pick by.
        """
        scores = None if difficulty is None else tokens_to_units(difficulty, self.grid, self.unit)
        units = self.strategy.choose(scores, priority, self.num_masked, num_picked)
        tokens_per_unit = self.grid.num_tokens // self.num_units
        masked = units_to_tokens(units, self.grid, self.unit)
        return TokenMask.from_masked(masked, self.num_masked * tokens_per_unit)


@dataclass(frozen=True)
class TokenMask:
    """A mask over a batch of clips. Every clip hides the same number of tokens."""

    masked: Tensor
    """(B, N) bool, True where the token is hidden."""
    visible_ids: Tensor
    """(B, V) positions of the visible tokens, ascending."""
    masked_ids: Tensor
    """(B, M) positions of the hidden tokens (of some, if it is thinned), ascending."""

    @classmethod
    def from_masked(cls, masked: Tensor, num_masked: int) -> "TokenMask":
        """Take (B, N) bool, ``num_masked`` True per row. Nothing is copied to the host."""
        order = masked.byte().argsort(dim=1, stable=True)
        num_visible = masked.shape[1] - num_masked
        return cls(masked, visible_ids=order[:, :num_visible], masked_ids=order[:, num_visible:])

    def thinned(self, priority: Tensor, count: int) -> "TokenMask":
        """Predict only ``count`` of the hidden tokens, those of the highest ``priority``.

        ``priority``: (B, N) uniform draws, so that each token and each pair has the same chance.
        """
        order = priority.gather(1, self.masked_ids).argsort(dim=1, descending=True, stable=True)
        kept = order[:, :count].sort(dim=1).values
        return replace(self, masked_ids=self.masked_ids.gather(1, kept))

    def take_visible(self, tokens: Tensor) -> Tensor:
        """Take the visible tokens: (B, N, D) -> (B, V, D)"""
        return _take(tokens, self.visible_ids)

    def take_masked(self, tokens: Tensor) -> Tensor:
        """Take the hidden tokens: (B, N, D) -> (B, M, D)"""
        return _take(tokens, self.masked_ids)

    def merge(self, visible: Tensor, hidden: Tensor) -> Tensor:
        """Put tokens back in grid order: (B, V, D), (B, M, D) -> (B, V + M, D)"""
        tokens = torch.cat([visible, hidden], dim=1)
        places = self._places().unsqueeze(-1).expand_as(tokens)
        return torch.empty_like(tokens).scatter_(1, places, tokens)

    def take_merged(self, tokens: Tensor) -> Tensor:
        """Take the hidden tokens out of merged ones: (B, V + M, D) -> (B, M, D)"""
        return _take(tokens, self._places()[:, self.visible_ids.shape[1] :])

    def _places(self) -> Tensor:
        """(B, V + M) of visible and hidden tokens in grid order, where those left out have none."""
        ids = torch.cat([self.visible_ids, self.masked_ids], dim=1)
        return ids if ids.shape[1] == self.masked.shape[1] else ids.argsort(dim=1).argsort(dim=1)


def count_masked(num_units: int, ratio: float, rule: CountRule) -> int:
    """How many of ``num_units`` are hidden, in the arithmetic of the project named.

    ``hpm`` (as MAE) shows int(units (1 - ratio)); ``videomae`` hides int(ratio units). The ratio
    is a binary fraction, so the two are not each other's complement: 196 @ 0.9 hides 177 or 176.

    Raises:
        ValueError: nothing would be hidden, or nothing shown.
    """
    if rule == "hpm":
        num_masked = num_units - int(num_units * (1 - ratio))
    else:
        num_masked = int(ratio * num_units)
    if not 0 < num_masked < num_units:
        raise ValueError(
            f"a mask must hide and show at least one unit, but ratio {ratio} under the rule "
            f"{rule!r} hides {num_masked} of {num_units}; take another ratio or a larger clip"
        )
    return num_masked


def choose_masked(
    difficulty: Tensor | None, priority: Tensor, num_masked: int, num_hardest: int
) -> Tensor:
    """Hide the hardest units, then fill up with those of the highest ``priority``.

    (B, U) difficulty, (B, U) uniform draws below 1 -> (B, U) bool with ``num_masked`` True per
    row. ``num_hardest = 0`` is plain random masking and needs no difficulty. Nothing is copied to
    the host. A stable sort decides ties of the draws alike on every device.

    Raises:
        ValueError: the counts do not fit, or ``num_hardest`` is not 0 and there is no
            difficulty.
    """
    num_units = priority.shape[1]
    if not 0 <= num_hardest <= num_masked <= num_units:
        raise ValueError(
            f"need 0 <= num_hardest <= num_masked <= units, got "
            f"{num_hardest}, {num_masked}, {num_units}"
        )
    if num_hardest:
        if difficulty is None:
            raise ValueError(f"picking the {num_hardest} hardest units needs their difficulty")
        hardest = difficulty.topk(num_hardest, dim=1).indices
        priority = priority.scatter(1, hardest, 2.0)  # above every other priority
    order = priority.argsort(dim=1, descending=True, stable=True)
    masked = torch.zeros_like(priority, dtype=torch.bool)
    return masked.scatter_(1, order[:, :num_masked], value=True)


def tokens_to_units(scores: Tensor, grid: TokenGrid, unit: MaskUnit) -> Tensor:
    """Mean score of the tokens in each unit: (B, N) -> (B, U)"""
    return reduce(scores, f"b {_BLOCKS} -> b (t h w)", "mean", **_sizes(grid, unit))


def units_to_tokens(masked: Tensor, grid: TokenGrid, unit: MaskUnit) -> Tensor:
    """Spread each unit's mask to its tokens: (B, U) -> (B, N)"""
    return repeat(masked, f"b (t h w) -> b {_BLOCKS}", **_sizes(grid, unit))


_BLOCKS = "(t t_of_unit h h_of_unit w w_of_unit)"


def _sizes(grid: TokenGrid, unit: MaskUnit) -> dict[str, int]:
    units = grid_of_units(grid, unit)
    of_unit = zip(("t_of_unit", "h_of_unit", "w_of_unit"), UNITS[unit](grid), strict=True)
    return {"t": units.time, "h": units.height, "w": units.width, **dict(of_unit)}


def _take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows of each clip: (B, N, D), (B, K) -> (B, K, D). Whole rows are copied, not values."""
    batch, num_tokens, dim = tokens.shape
    first = torch.arange(batch, device=ids.device).unsqueeze(1) * num_tokens
    rows = tokens.reshape(-1, dim).index_select(0, (ids + first).flatten())
    return rows.view(batch, -1, dim)
