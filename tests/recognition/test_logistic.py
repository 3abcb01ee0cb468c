import math

import pytest
import torch
from torch import Tensor

from hpm_video.recognition import logistic
from hpm_video.recognition.logistic import (
    LinearClassifier,
    choose_penalty,
    fit_logistic,
    split_in_folds,
)


def clusters(
    per_class: int, dim: int, classes: int, *, noise: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    noise_of = noise * torch.randn(len(labels), dim, generator=generator)
    return centres[labels] + noise_of, labels


def gradient_by_hand(
    fitted: LinearClassifier, features: Tensor, labels: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """Of the objective at the solution, from the formula of softmax regression."""
    x = features.double()
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    logits = x @ fitted.weight.T + fitted.bias
    classes = torch.arange(len(fitted.bias))
    wrong_by = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    wrong_by -= (labels.unsqueeze(1) == classes).double()
    return wrong_by.T @ x / len(x) + penalty * fitted.weight, wrong_by.mean(dim=0)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_the_gradient_vanishes_at_the_solution(penalty):
    features, labels = clusters(30, 6, 4, noise=1.5)
    fitted = fit_logistic(features, labels, num_classes=4, penalty=penalty)
    for gradient in gradient_by_hand(fitted, features, labels, penalty):
        assert gradient.abs().max() <= 1.5e-8
    assert fitted.weight.shape == (4, 6)
    assert fitted.weight.dtype == torch.float64


def test_agrees_with_newtons_method_for_two_classes():
    """Two classes with weights w and -w are a binary regression on 2w, solved independently."""
    features, labels = clusters(40, 3, 2, noise=1.0)
    penalty = 0.05
    fitted = fit_logistic(features, labels, num_classes=2, penalty=penalty)
    x = features.double()
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    ridge = torch.diag(torch.tensor([penalty / 2] * 3 + [0.0], dtype=torch.float64))
    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(30):
        p = (x @ w).sigmoid()
        gradient = x.T @ (p - labels) / len(x) + ridge @ w
        hessian = x.T @ ((p * (1 - p)).unsqueeze(1) * x) / len(x) + ridge
        w -= torch.linalg.solve(hessian, gradient)
    torch.testing.assert_close(fitted.weight[1] - fitted.weight[0], w[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(fitted.bias[1] - fitted.bias[0], w[3], atol=1e-6, rtol=0)
    torch.testing.assert_close(fitted.probabilities(features)[:, 1], (x @ w).sigmoid())


def test_another_start_ends_at_the_same_minimum():
    features, labels = clusters(20, 5, 3, noise=1.5)
    settings = {"num_classes": 3, "penalty": 1e-2}
    fitted = fit_logistic(features, labels, **settings)
    generator = torch.Generator().manual_seed(5)
    far = LinearClassifier(
        fitted.mean,
        fitted.std,
        5 * torch.randn(3, 5, generator=generator),
        5 * torch.randn(3, generator=generator),
    )
    again = fit_logistic(features, labels, start=far, **settings)
    torch.testing.assert_close(again.weight, fitted.weight, atol=1e-5, rtol=0)
    difference = again.bias - fitted.bias  # the softmax ignores what is common to all biases
    torch.testing.assert_close(difference, difference.mean().expand(3), atol=1e-5, rtol=0)


def test_separable_classes_are_separated():
    features, labels = clusters(20, 16, 5, noise=0.1)
    fitted = fit_logistic(features, labels, num_classes=5, penalty=1e-4)
    others, truth = clusters(20, 16, 5, noise=0.1, seed=1)
    probabilities = fitted.probabilities(others)
    assert probabilities.argmax(dim=1).equal(truth)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(100, dtype=torch.float64))


def test_a_large_penalty_leaves_the_shares_of_the_classes():
    features, _ = clusters(25, 6, 4, noise=1.0)
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    fitted = fit_logistic(features, labels, num_classes=3, penalty=1e6)
    priors = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(
        fitted.probabilities(features), priors.expand(100, -1), atol=1e-4, rtol=0
    )


def test_the_scale_and_place_of_a_feature_do_not_matter():
    features, labels = clusters(20, 4, 3, noise=1.5)
    moved = features.double() * torch.tensor([1.0, 1e-4, 300, -2]) + torch.tensor([0, 1.0, -50, 7])
    settings = {"num_classes": 3, "penalty": 1e-2}
    fitted = fit_logistic(features, labels, **settings).probabilities(features)
    again = fit_logistic(moved, labels, **settings).probabilities(moved)
    torch.testing.assert_close(again, fitted, atol=1e-6, rtol=0)


def test_constant_features_say_nothing():
    features, labels = clusters(20, 4, 3, noise=1.5)
    constants = torch.full((60, 2), 0.1, dtype=torch.float64)
    with_constants = torch.cat([features.double(), constants], dim=1)
    settings = {"num_classes": 3, "penalty": 1e-2}
    fitted = fit_logistic(with_constants, labels, **settings)
    assert fitted.std[4:].tolist() == [1, 1]
    assert not fitted.weight[:, 4:].any()
    with_constants[:, 4:] = 1e9  # not even where they turn out to vary
    plain = fit_logistic(features, labels, **settings).probabilities(features)
    torch.testing.assert_close(fitted.probabilities(with_constants), plain, atol=1e-4, rtol=0)


def test_a_class_without_samples_is_never_likely():
    features, labels = clusters(20, 4, 3, noise=1.5)
    fitted = fit_logistic(features, labels, num_classes=5, penalty=1e-3)
    assert fitted.probabilities(features)[:, 3:].max() < 1e-3


def test_features_are_left_as_they_are_and_may_come_from_inference_mode():
    features, labels = clusters(10, 4, 3, noise=1.0)
    for dtype in torch.float32, torch.float64, torch.bfloat16:
        kept = features.to(dtype)
        fit_logistic(kept, labels, num_classes=3, penalty=0.1)
        assert kept.equal(features.to(dtype))
    with torch.inference_mode():
        inferred = fit_logistic(features * 1, labels * 1, num_classes=3, penalty=0.1)
        inferred.probabilities(features * 1)
    fitted = fit_logistic(features, labels, num_classes=3, penalty=0.1)
    assert inferred.weight.equal(fitted.weight)
    assert not fitted.weight.requires_grad


def test_a_fit_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(logistic, "MAX_STEPS", 2)
    features, labels = clusters(10, 4, 3, noise=1.0)
    with pytest.raises(RuntimeError, match="after 2 steps with penalty 0.001; raise the penalty"):
        fit_logistic(features, labels, num_classes=3, penalty=1e-3)


def test_folds_hold_even_shares_of_every_class():
    labels = torch.tensor([0] * 9 + [1] * 31 + [2] * 2 + [3])
    labels = labels[torch.randperm(43, generator=torch.Generator().manual_seed(0))]
    folds = split_in_folds(labels, 3, seed=0)
    for of_class in *(folds[labels == label] for label in range(4)), folds:
        sizes = of_class.bincount(minlength=3)
        assert sizes.max() - sizes.min() <= 1
    assert split_in_folds(labels, 3, seed=0).equal(folds)
    assert not split_in_folds(labels, 3, seed=1).equal(folds)


def test_the_penalty_that_generalises_is_chosen():
    """Many features are noise: a weak penalty fits it, a strong one predicts the larger class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 0]).repeat(20)
    features = torch.randn(60, 40, generator=generator)
    features[:, 0] += 2 * labels
    penalties = [1e-5, 0.3, 1e5]
    chosen = choose_penalty(features, labels, penalties, num_classes=2)
    assert chosen == choose_penalty(features, labels, penalties[::-1], num_classes=2)

    folds = split_in_folds(labels, 3, seed=0)
    correct = dict.fromkeys(penalties, 0)
    for penalty in penalties:
        for fold in range(3):
            kept = folds != fold
            fitted = fit_logistic(features[kept], labels[kept], num_classes=2, penalty=penalty)
            predicted = fitted.probabilities(features[~kept]).argmax(dim=1)
            correct[penalty] += int((predicted == labels[~kept]).sum())
    assert max(correct.values()) == correct[chosen]
    assert chosen == 0.3


def test_of_equally_good_penalties_the_largest_is_chosen():
    features, labels = clusters(12, 8, 3, noise=0.01)
    penalties = [1e-4, 1e-2, 1e-3]
    assert choose_penalty(features, labels, penalties, num_classes=3) == 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalty": 0.0}, "above 0, got 0.0: .*try 1e-6 to 1"),
        ({"penalty": math.nan}, "above 0, got nan"),
        ({"num_classes": 2}, r"0\.\.1, got 0\.\.2; .*raise num_classes"),
        ({"labels": torch.zeros(5)}, r"got \(30, 4\) and \(5,\); give one label"),
        ({"features": torch.zeros(0, 4), "labels": torch.zeros(0)}, r"S > 0, got \(0, 4\)"),
        ({"features": torch.full((30, 4), math.nan)}, "finite, got 30 of 30 rows"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    features, labels = clusters(10, 4, 3, noise=1.0)
    given = {"features": features, "labels": labels, "num_classes": 3, "penalty": 1.0}
    with pytest.raises(ValueError, match=message):
        fit_logistic(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalties": []}, "got none; give one or more"),
        ({"penalties": [1.0, -1.0]}, "above 0, got -1.0"),
        ({"folds": 1}, r"2\.\.30, the number of samples, got 1"),
        ({"folds": 31}, "got 31; 3 is usual"),
    ],
)
def test_a_choice_that_makes_no_sense_is_named(change, message):
    features, labels = clusters(10, 4, 3, noise=1.0)
    given = {"penalties": [1.0], "num_classes": 3}
    with pytest.raises(ValueError, match=message):
        choose_penalty(features, labels, **(given | change))
