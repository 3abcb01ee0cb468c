"""The losses of pre-training, and the ranking accuracy of a loss predictor."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128
"""Rows of the matrix of pairs that are held at a time."""
LARGEST = 1e20
"""Largest loss of a pair, so that a sum over pairs stays finite for any finite scores."""


def reconstruction_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each token: (B, M, P), (B, M, P) -> (B, M) float32"""
    return (predicted.float() - target.float()).square().mean(dim=-1)


def direction_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos: (B, M, P), (B, M, P) -> (B, M) float32

    The loss of feature targets: both sides are L2-normalised.
    """
    difference = F.normalize(predicted.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return difference.square().sum(dim=-1)


def ranking_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """How badly ``scores`` order the tokens of each clip by ``errors``: (B, M), (B, M) -> ()

    Relative loss prediction, section 3.2 of the paper: -log sigmoid(s_i - s_j) of every pair of
    tokens with e_i > e_j, averaged over all such pairs of the batch; 0 where there is none. Only
    the order of ``errors`` counts, so it gets no gradient. Computed in float32.
    """
    errors, order = errors.detach().float().sort(dim=1, descending=True)
    sorted_scores = scores.float().gather(1, order)
    loss: Tensor = _SortedRankingLoss.apply(sorted_scores, errors)  # type: ignore[no-untyped-call]
    return loss


def regression_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """How far ``scores`` are from the standardised ``errors``: (B, M), (B, M) -> ()

    Absolute loss prediction, an ablation of the paper: errors are standardised over the tokens of
    each clip with sqrt(unbiased variance + 1e-6), the scores are not. ``errors`` gets no gradient.
    """
    variance, mean = torch.var_mean(errors.detach().float(), dim=1, keepdim=True)
    target = (errors.detach().float() - mean) / (variance + 1e-6).sqrt()
    return F.mse_loss(scores.float(), target)


def count_ordered_pairs(scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of tokens of a clip that are scored in the order of their errors, and all pairs.

    (B, M), (B, M) -> () float, () int. Equal scores count half, equal errors are no pair, and a
    token whose error or score is NaN is in none. The ranking accuracy is the ratio; guessing gives
    0.5.
    """
    errors = errors.float().masked_fill(scores.isnan(), float("nan"))
    errors, order = errors.sort(dim=1, descending=True)
    scores = scores.float().gather(1, order)
    correct, total = scores.new_zeros(()), torch.zeros((), dtype=torch.int64, device=scores.device)
    for harder, easier in _blocks(scores.shape[1]):
        counted = errors[:, harder, None] > errors[:, None, easier]
        right = scores[:, harder, None] > scores[:, None, easier]
        tied = scores[:, harder, None] == scores[:, None, easier]
        correct += (counted & right).sum() + 0.5 * (counted & tied).sum()
        total += counted.sum()
    return correct, total


class _SortedRankingLoss(torch.autograd.Function):
    """The ranking loss of scores sorted by falling error.

    In that order the first token of a pair is the harder one, so the pairs are the upper triangle.
    It is computed in blocks of ``ROWS`` together with the gradient: what is kept for backward is
    (B, M), never (B, M, M).
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, errors: Tensor) -> Tensor:  # type: ignore[override]
        total = scores.new_zeros(())
        pairs = torch.zeros((), dtype=torch.int64, device=scores.device)
        gradient = torch.zeros_like(scores)
        for harder, easier in _blocks(scores.shape[1]):
            counted = errors[:, harder, None] > errors[:, None, easier]
            wrong_by = scores[:, None, easier] - scores[:, harder, None]
            total += F.softplus(wrong_by).clamp_(max=LARGEST).mul_(counted).sum()
            pairs += counted.sum()
            pull = wrong_by.sigmoid_().mul_(counted)
            gradient[:, harder] -= pull.sum(dim=2)
            gradient[:, easier] += pull.sum(dim=1)
        num_pairs = pairs.clamp(min=1).to(scores.dtype)
        ctx.save_for_backward(gradient / num_pairs)
        return total / num_pairs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None


def _blocks(num_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the upper triangle of pairs, some at a time, with the columns they need."""
    for start in range(0, num_tokens, ROWS):
        yield slice(start, min(start + ROWS, num_tokens)), slice(start, num_tokens)
