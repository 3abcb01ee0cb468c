import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpm_video.recognition.probes import (
    choose_penalty,
    knn_probabilities,
    logistic_probabilities,
    split_in_folds,
)

# --- Nearest neighbours -------------------------------------------------------------------------


def samples(count, dim, classes, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, dim)), draw.integers(classes, size=count)


def naive(queries, bank, labels, k, classes, temperature):
    """The definition in plain Python, one query at a time."""
    rows = []
    for query in queries:
        similarities = [
            float(query @ other / np.sqrt((query @ query) * (other @ other))) for other in bank
        ]
        votes = [0.0] * classes
        for index in sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]:
            votes[int(labels[index])] += math.exp(similarities[index] / temperature)
        rows.append([vote / sum(votes) for vote in votes])
    return np.array(rows)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_are_those_of_the_definition(temperature):
    bank, labels = samples(40, 6, 5)
    queries, _ = samples(9, 6, 5, seed=1)
    found = knn_probabilities(queries, bank, labels, (10, 1, 40), 5, temperature)
    assert list(found) == [10, 1, 40]
    for k, shares in found.items():
        np.testing.assert_allclose(
            shares, naive(queries, bank, labels, k, 5, temperature), atol=1e-9
        )


def test_known_votes():
    bank = np.array([[2.0, 0], [0, 3], [-1, 0]])
    shares = knn_probabilities(np.array([[5.0, 0]]), bank, np.array([1, 0, 0]), [2], 3)[2]
    other = math.exp(-1 / 0.07)
    np.testing.assert_allclose(shares, np.array([[other, 1, 0]]) / (1 + other), atol=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([1e-6, 0.07, 10.0]))
def test_shares_sum_to_one_and_the_order_of_the_bank_does_not_matter(seed, temperature):
    bank, labels = samples(30, 4, 3, seed)
    queries, _ = samples(7, 4, 3, seed + 1)
    order = np.random.default_rng(seed).permutation(30)
    found = knn_probabilities(queries, bank, labels, (1, 5, 30), 3, temperature)
    permuted = knn_probabilities(queries, bank[order], labels[order], (1, 5, 30), 3, temperature)
    for k, shares in found.items():
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        if temperature > 1e-3:  # below that, rounding of the similarities matters
            np.testing.assert_allclose(permuted[k], shares, atol=1e-9)


def test_lengths_of_features_do_not_matter_and_zeros_are_equally_far_from_all():
    bank, labels = samples(20, 5, 4)
    queries, _ = samples(6, 5, 4, seed=1)
    lengths = np.linspace(0.1, 90, 20)[:, None]
    found = knn_probabilities(queries, bank, labels, (3,), 4)[3]
    scaled = knn_probabilities(7 * queries, lengths * bank, labels, (3,), 4)[3]
    np.testing.assert_allclose(scaled, found, atol=1e-9)
    of_zeros = knn_probabilities(np.zeros((1, 5)), bank[:4], np.array([0, 0, 0, 1]), (4,), 2)[4]
    np.testing.assert_allclose(of_zeros, [[0.75, 0.25]])


# --- Logistic regression ------------------------------------------------------------------------


def clusters(per_class, dim, classes, *, noise, seed=0):
    labels = np.tile(np.arange(classes), per_class)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    around = np.random.default_rng(seed).normal(size=(len(labels), dim))
    return centres[labels] + noise * around, labels


def objective(weight, bias, features, labels, penalty):
    """Mean cross-entropy + penalty / 2 * squared weights, by hand."""
    x = (features - features.mean(axis=0)) / features.std(axis=0)
    logits = x @ weight.T + bias
    of_label = logits[np.arange(len(x)), labels]
    entropy = np.log(np.exp(logits).sum(axis=1)) - of_label
    return entropy.mean() + penalty / 2 * (weight**2).sum()


def linear_map(features, labels, penalty, classes):
    """The fitted classifier, from its outputs: centred (K, D) weights, (K,) biases"""
    mean, std = features.mean(axis=0), features.std(axis=0)
    unit = np.concatenate([np.zeros((1, len(mean))), np.eye(len(mean))]) * std + mean
    found = logistic_probabilities(features, labels, unit, penalty, classes)
    logits = np.log(found) - np.log(found).mean(axis=1, keepdims=True)
    return (logits[1:] - logits[0]).T, logits[0]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("penalty", [1e-3, 1e-2, 1.0])
def test_no_other_weights_are_better(penalty, classes):
    """This includes two classes, for which scikit-learn learns only one row of weights."""
    features, labels = clusters(30, 6, classes, noise=1.5)
    weight, bias = linear_map(features, labels, penalty, classes)
    best = objective(weight, bias, features, labels, penalty)
    step = 1e-4
    for index in np.ndindex(weight.shape):
        for sign in (-1, 1):
            other = weight.copy()
            other[index] += sign * step
            assert objective(other, bias, features, labels, penalty) > best


def test_separable_classes_are_separated():
    features, labels = clusters(20, 16, 5, noise=0.1)
    others, truth = clusters(20, 16, 5, noise=0.1, seed=1)
    found = logistic_probabilities(features, labels, others, 1e-4, 5)
    assert (found.argmax(axis=1) == truth).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_a_large_penalty_leaves_the_shares_of_the_classes():
    features, _ = clusters(25, 6, 4, noise=1.0)
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20)
    found = logistic_probabilities(features, labels, features, 1e6, 3)
    np.testing.assert_allclose(found, np.tile([0.5, 0.3, 0.2], (100, 1)), atol=1e-4)


def test_the_scale_and_place_of_a_feature_do_not_matter_and_constants_say_nothing():
    features, labels = clusters(20, 4, 3, noise=1.5)
    moved = features * [1.0, 1e-4, 300, -2] + [0, 1.0, -50, 7]
    moved = np.concatenate([moved, np.full((60, 2), 0.1)], axis=1)
    found = logistic_probabilities(features, labels, features, 1e-2, 3)
    again = logistic_probabilities(moved, labels, moved, 1e-2, 3)
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_classes_without_samples_are_impossible():
    features, labels = clusters(20, 4, 3, noise=1.5)
    found = logistic_probabilities(features, labels * 2, features, 1e-3, 6)
    assert (found[:, 1::2] == 0).all()
    alone = logistic_probabilities(features, labels * 0 + 1, features, 1e-3, 3)
    assert (alone == [0, 1, 0]).all()


def test_folds_hold_even_shares_of_every_class():
    labels = np.array([0] * 9 + [1] * 31 + [2] * 2 + [3])
    labels = np.random.default_rng(0).permutation(labels)
    folds = split_in_folds(labels, 3, seed=0)
    for of_class in *(folds[labels == label] for label in range(4)), folds:
        sizes = np.bincount(of_class, minlength=3)
        assert sizes.max() - sizes.min() <= 1
    assert (split_in_folds(labels, 3, seed=0) == folds).all()
    assert (split_in_folds(labels, 3, seed=1) != folds).any()


def test_the_penalty_that_generalises_is_chosen():
    """Many features are noise: a weak penalty fits it, a strong one predicts the larger class."""
    labels = np.tile([0, 1, 0], 20)
    features = np.random.default_rng(0).normal(size=(60, 40))
    features[:, 0] += 2 * labels
    penalties = [1e-5, 0.3, 1e5]
    chosen = choose_penalty(features, labels, penalties)
    assert chosen == choose_penalty(features, labels, penalties[::-1])
    folds = split_in_folds(labels, 3, seed=0)
    correct = dict.fromkeys(penalties, 0)
    for penalty in penalties:
        for fold in range(3):
            kept = folds != fold
            found = logistic_probabilities(
                features[kept], labels[kept], features[~kept], penalty, 2
            )
            correct[penalty] += int((found.argmax(axis=1) == labels[~kept]).sum())
    assert len(set(correct.values())) > 1, "the choice matters"
    assert chosen == max(penalties, key=lambda penalty: (correct[penalty], penalty))


def test_of_equally_good_penalties_the_largest_is_chosen():
    features, labels = clusters(12, 8, 3, noise=0.01)
    assert choose_penalty(features, labels, [1e-4, 1e-2, 1e-3]) == 1e-2
