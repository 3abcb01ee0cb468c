"""A fast linear probe: multinomial logistic regression on standardised features.

The objective is convex, so its minimum depends on no learning rate, schedule or start.
Axes here: Q queries, S samples, D feature width, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpm_video.randomness import generator

TOLERANCE = 1e-8
"""Largest entry of the objective's gradient at which a fit is finished."""
ENOUGH = 1e-4
"""A gradient that is accepted after the last step: with nearly collinear features and hardly any
penalty the minimum is so flat that rounding keeps the tolerance out of reach."""
MAX_STEPS = 3000
FOLDS = 3
"""Parts of the samples, each of which is held out once to choose a penalty."""
SCALE = 2.0**30
"""Of the objective while it is minimised: PyTorch's L-BFGS learns no curvature from a step whose
product with the change of the gradient is below 1e-10, as the last ones would be."""


class NotConvergedError(RuntimeError):
    """The minimum was not reached."""


@dataclass(frozen=True)
class LinearClassifier:
    """softmax(weight (features - mean) / std + bias), in float64."""

    mean: Tensor
    """(D,) of the training features."""
    std: Tensor
    """(D,) of the training features; 1 where they are constant."""
    weight: Tensor
    """(K, D); 0 where the training features are constant."""
    bias: Tensor
    """(K,)"""

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """(Q, D) -> (Q, K) float64"""
        standardised = (features.to(self.mean) - self.mean) / self.std
        return F.linear(standardised, self.weight, self.bias).softmax(dim=1)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    penalty: float,
    tolerance: float = TOLERANCE,
    start: LinearClassifier | None = None,
) -> LinearClassifier:
    """The classifier that minimises mean cross-entropy + penalty / 2 * sum of squared weights.

    (S, D), (S,) int -> a classifier into K classes

    Features are standardised over the samples first, so their scales do not matter; biases are not
    penalised. It is computed in float64 where the features are, by L-BFGS, until no entry of the
    gradient (of that by weights: divided by sqrt(1 + penalty)) exceeds ``tolerance``. ``start``
    may save steps; it changes the result by no more than the tolerance allows.

    Raises:
        ValueError: shapes that do not fit, labels that are no class, features that are not finite,
            or a penalty that is not positive.
        NotConvergedError: the minimum was not reached.
    """
    _check_samples(features, labels, num_classes)
    _check_penalty(penalty)
    with torch.inference_mode(False), torch.enable_grad():
        x = features.detach().to(torch.float64, copy=True)
        y = labels.detach().to(torch.int64, copy=True)
        std, mean = torch.std_mean(x, dim=0, correction=0)
        constant = x.amin(dim=0) == x.amax(dim=0)
        std = torch.where(constant, 1.0, std)
        x.sub_(mean).div_(std)
        weight = x.new_zeros(num_classes, x.shape[1]) if start is None else start.weight.to(x)
        bias = x.new_zeros(num_classes) if start is None else start.bias.to(x)
        weight, bias = _minimise(x, y, weight, bias, penalty, tolerance)
    return LinearClassifier(mean, std, weight, bias)


def choose_penalty(
    features: Tensor,
    labels: Tensor,
    penalties: Sequence[float],
    *,
    num_classes: int,
    folds: int = FOLDS,
    seed: int = 0,
) -> float:
    """The penalty with the highest accuracy on left-out training samples, of equals the largest.

    (S, D), (S,) int -> one of ``penalties``

    Each fold of the samples is left out once, and holds an equal share of every class. Rows must
    be independent of each other: one for each video, not several clips of it.
    """
    _check_samples(features, labels, num_classes)
    if not penalties:
        raise ValueError("there must be penalties to choose from, got none; give one or more")
    for penalty in penalties:
        _check_penalty(penalty)
    if not 2 <= folds <= len(labels):
        raise ValueError(
            f"folds must be in 2..{len(labels)}, the number of samples, got {folds}; 3 is usual"
        )
    fold_of = split_in_folds(labels, folds, seed)
    falling = sorted(set(penalties), reverse=True)
    correct = dict.fromkeys(falling, 0)
    for fold in range(folds):
        kept, left_out = fold_of != fold, fold_of == fold
        fitted = None
        for penalty in falling:
            fitted = fit_logistic(
                features[kept],
                labels[kept],
                num_classes=num_classes,
                penalty=penalty,
                start=fitted,
            )
            predicted = fitted.probabilities(features[left_out]).argmax(dim=1)
            correct[penalty] += int((predicted == labels[left_out]).sum())
    return max(falling, key=lambda penalty: correct[penalty])  # the first of equals


def split_in_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """A fold for each sample, with classes and folds as even as can be: (S,) -> (S,) int64"""
    shuffled = torch.from_numpy(generator(seed, "folds").permutation(len(labels)))
    shuffled = shuffled.to(labels.device)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    fold_of = torch.empty_like(by_class)
    fold_of[by_class] = torch.arange(len(labels), device=labels.device) % folds
    return fold_of


def _minimise(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, penalty: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Weights and biases of the minimum: (S, D), (S,), (K, D), (K,) to start at -> (K, D), (K,)

    What is changed is sqrt(1 + penalty) times the weights: its curvature is about 1 for any large
    penalty, so that neither steps nor rounding suffer from it.
    """
    unit = 1 / math.sqrt(1 + penalty)
    parameters = [(weight / unit).requires_grad_(), bias.clone().requires_grad_()]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        tolerance_grad=SCALE * tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        weight, bias = unit * parameters[0], parameters[1]
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + penalty / 2 * weight.square().sum()
        loss = loss * SCALE
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(objective)  # type: ignore[no-untyped-call]
    objective()
    steepest = max(float(p.grad.abs().max()) / SCALE for p in parameters if p.grad is not None)
    if not steepest <= max(tolerance, ENOUGH):
        raise NotConvergedError(
            f"the gradient of a logistic regression must fall to {ENOUGH:g}, got {steepest:.3g} "
            f"after {MAX_STEPS} steps with penalty {penalty:g}; raise the penalty or the tolerance"
        )
    return unit * parameters[0].detach(), parameters[1].detach()


def _check_samples(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(
            f"features and labels must be (S, D) and (S,) with S > 0, got {tuple(features.shape)} "
            f"and {tuple(labels.shape)}; give one label for each row of features"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
            f"; number the classes from 0, or raise num_classes"
        )
    if not features.isfinite().all():
        broken = int((~features.isfinite()).any(dim=1).sum())
        raise ValueError(
            f"features must be finite, got {broken} of {len(features)} rows that are not; look for "
            f"the model or the precision that made them"
        )


def _check_penalty(penalty: float) -> None:
    if not penalty > 0:
        raise ValueError(
            f"penalty must be above 0, got {penalty}: without it, classes that a plane separates "
            f"have no best weights; try 1e-6 to 1"
        )
