"""Probes of frozen features that need no training loop: nearest neighbours, logistic regression.

Axes here: Q queries, S labelled samples, D feature width, K classes. scikit-learn is imported where
it is needed: it takes a second, and training needs none of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpm_video.randomness import generator
from hpm_video.recognition.inference import VideoValues

Array = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

TEMPERATURE = 0.07
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of logistic regression, to choose from
FOLDS = 3
TOLERANCE = 1e-8  # largest entry of the objective's gradient at which a fit is finished
MAX_STEPS = 3000


def samples_of(features: VideoValues) -> tuple[Array, Labels]:
    """Features and labels of the V videos that decode: (V, D), (V,)"""
    there = ~features.excluded
    return features.values[there], features.labels[there]


def as_scores(features: VideoValues, probabilities: Array) -> VideoValues:
    """Put the probabilities of the videos that decode in the order of the manifest."""
    table = np.full((len(features.values), probabilities.shape[1]), np.nan)
    table[~features.excluded] = probabilities
    return VideoValues(features.manifest, table)


def nearest_neighbours(
    train: VideoValues,
    test: VideoValues,
    num_classes: int,
    neighbours: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, VideoValues]:
    """Classify by votes of the nearest training videos: -> scores for each number of neighbours"""
    (bank, labels), (queries, _) = samples_of(train), samples_of(test)
    found = knn_probabilities(queries, bank, labels, neighbours, num_classes, temperature)
    return {k: as_scores(test, probabilities) for k, probabilities in found.items()}


def knn_probabilities(
    queries: Array,
    bank: Array,
    labels: Labels,
    neighbours: Sequence[int],
    num_classes: int,
    temperature: float = TEMPERATURE,
) -> dict[int, Array]:
    """Class shares for each number of neighbours: (Q, D), (S, D), (S,) -> (Q, K) each

    The k samples of the bank that are nearest by cosine similarity vote for their class, each with
    exp(similarity / temperature); a row of shares sums to 1.
    """
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=max(neighbours), metric="cosine").fit(bank)
    distances, nearest = search.kneighbors(queries)
    # Against the nearest, so that no weight overflows and not all of them vanish.
    weights = np.exp((distances[:, :1] - distances) / temperature)
    rows = np.arange(len(queries))[:, None]
    found = {}
    for k in neighbours:
        shares = np.zeros((len(queries), num_classes))
        np.add.at(shares, (rows, labels[nearest[:, :k]]), weights[:, :k])
        found[k] = shares / shares.sum(axis=1, keepdims=True)
    return found


def logistic_regression(
    train: VideoValues, test: VideoValues, num_classes: int
) -> tuple[float, VideoValues]:
    """Classify by multinomial logistic regression, solved to the optimum: -> penalty and scores"""
    (samples, labels), (queries, _) = samples_of(train), samples_of(test)
    penalty = choose_penalty(samples, labels, PENALTIES)
    found = logistic_probabilities(samples, labels, queries, penalty, num_classes)
    return penalty, as_scores(test, found)


def logistic_probabilities(
    features: Array, labels: Labels, queries: Array, penalty: float, num_classes: int
) -> Array:
    """Probabilities by the best linear classifier: (S, D), (S,), (Q, D) -> (Q, K)

    It minimises mean cross-entropy + penalty / 2 * sum of squared weights, which is convex: its
    minimum depends on no learning rate, schedule or start. Features are standardised over the
    samples; biases are not penalised. A class without samples has probability 0.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    present = np.unique(labels)
    probabilities = np.zeros((len(queries), num_classes))
    if len(present) == 1:
        probabilities[:, present] = 1
        return probabilities
    # C weighs the sum of cross-entropies against half the squares. Of two classes scikit-learn
    # learns one row of weights, the difference of ours: half the penalty is the same minimum.
    weight = (2 if len(present) == 2 else 1) / (penalty * len(labels))
    model = LogisticRegression(C=weight, tol=TOLERANCE, max_iter=MAX_STEPS)
    pipeline = make_pipeline(StandardScaler(), model).fit(features, labels)
    probabilities[:, present] = pipeline.predict_proba(queries)
    return probabilities


def choose_penalty(features: Array, labels: Labels, penalties: Sequence[float]) -> float:
    """Choose the penalty that is best on left-out training samples, of equals the largest.

    Each fold of the (S, D) samples is left out once, and holds an equal share of every class.
    """
    fold_of, count = split_in_folds(labels, FOLDS, seed=0), int(labels.max()) + 1

    def correct(penalty: float) -> int:
        found = 0
        for fold in range(FOLDS):
            kept, out = fold_of != fold, fold_of == fold
            fit = logistic_probabilities(
                features[kept], labels[kept], features[out], penalty, count
            )
            found += int((fit.argmax(axis=1) == labels[out]).sum())
        return found

    return max(sorted(penalties, reverse=True), key=correct)  # the first of equals


def split_in_folds(labels: ArrayLike, folds: int, seed: int) -> Labels:
    """A fold for each sample, with classes and folds as even as can be: (S,) -> (S,)"""
    labels = np.asarray(labels)
    shuffled = generator(seed, "folds").permutation(len(labels))
    by_class = shuffled[labels[shuffled].argsort(kind="stable")]
    fold_of = np.empty(len(labels), dtype=np.int64)
    fold_of[by_class] = np.arange(len(labels)) % folds
    return fold_of
