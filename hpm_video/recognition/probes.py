"""Probes of frozen features that need no training loop: nearest neighbours, logistic regression.

Axes here: Q queries, S labelled samples, D feature width, K classes. scikit-learn is imported where
it is needed: it takes a second, and training needs none of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpm_video.data.clips import ValidationClips
from hpm_video.data.manifest import Manifest
from hpm_video.randomness import generator
from hpm_video.recognition.inference import Inference, Reading, over_videos
from hpm_video.recognition.testing import Scores
from hpm_video.training.distributed import Processes

Array = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

NEIGHBOURS = (10, 20, 100, 200)  # numbers of neighbours that are customary
TEMPERATURE = 0.07
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties of logistic regression, chosen from by cross-validation on the training videos."""
FOLDS = 3
TOLERANCE = 1e-8  # largest entry of the objective's gradient at which a fit is finished
MAX_STEPS = 3000


@dataclass(frozen=True)
class FeatureTable:
    """Features of the videos of a manifest."""

    manifest: Manifest
    features: NDArray[np.float64]
    """(videos, D), the mean over the views of each; NaN for a video that does not decode."""

    @classmethod
    def of(
        cls,
        encoder: Inference,
        clips: ValidationClips,
        reading: Reading,
        processes: Processes = Processes(),  # noqa: B008 - it is frozen
    ) -> "FeatureTable":
        """Compute them, each by one of the processes. Raises as :func:`over_videos`."""
        per_pass = encoder.clips_per_pass
        return cls(clips.manifest, over_videos(encoder.pooled, clips, reading, processes, per_pass))

    @property
    def samples(self) -> tuple[Array, Labels]:
        """Features and labels of the V videos that have features: (V, D), (V,)"""
        there = ~np.isnan(self.features[:, 0])
        return self.features[there], np.asarray(self.manifest.labels)[there]

    def scores(self, probabilities: Array) -> Scores:
        """Put the probabilities of the videos that have features in the manifest's order."""
        table = np.full((len(self.manifest), probabilities.shape[1]), np.nan)
        table[~np.isnan(self.features[:, 0])] = probabilities
        return Scores(self.manifest, table)


def nearest_neighbours(
    train: FeatureTable,
    test: FeatureTable,
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Scores]:
    """Classify by votes of the nearest training videos: -> scores for each number of neighbours

    Raises ValueError where there are fewer training videos than neighbours.
    """
    (bank, labels), (queries, _) = train.samples, test.samples
    found = knn_probabilities(queries, bank, labels, neighbours, num_classes, temperature)
    return {k: test.scores(probabilities) for k, probabilities in found.items()}


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
    exp(similarity / temperature); a row of shares sums to 1. The similarities are computed once, in
    chunks of bounded size. Of samples that are equally near, any may be the last one that votes.
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
    train: FeatureTable, test: FeatureTable, num_classes: int
) -> tuple[float, Scores]:
    """Classify by multinomial logistic regression, solved to the optimum: -> penalty and scores

    The penalty on the weights is chosen by cross-validation on the training videos alone.
    """
    (samples, labels), (queries, _) = train.samples, test.samples
    penalty = choose_penalty(samples, labels, PENALTIES)
    (probabilities,) = logistic_probabilities(samples, labels, queries, [penalty], num_classes)
    return penalty, test.scores(probabilities)


def logistic_probabilities(
    features: Array, labels: Labels, queries: Array, penalties: Sequence[float], num_classes: int
) -> list[Array]:
    """Probabilities by the best classifier for each penalty: (S, D), (S,), (Q, D) -> (Q, K) each

    It minimises mean cross-entropy + penalty / 2 * sum of squared weights, which is convex: its
    minimum depends on no learning rate, schedule or start. Features are standardised over the
    samples, so their scales do not matter; biases are not penalised. A class without samples has
    probability 0. A fit begins where that for the penalty before ended, which saves steps.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    samples, asked = scaler.transform(features), scaler.transform(queries)
    model = LogisticRegression(tol=TOLERANCE, max_iter=MAX_STEPS, warm_start=True)
    present = np.unique(labels)
    # C weighs the sum of cross-entropies against half the squares. Of two classes scikit-learn
    # learns one row of weights, the difference of ours: half the penalty is the same minimum.
    unit = (2 if len(present) == 2 else 1) / len(samples)
    found: list[Array] = []
    for penalty in penalties:
        probabilities = np.zeros((len(asked), num_classes))
        if len(present) == 1:
            probabilities[:, present] = 1
        else:
            model.set_params(C=unit / penalty).fit(samples, labels)
            probabilities[:, present] = model.predict_proba(asked)
        found.append(probabilities)
    return found


def choose_penalty(
    features: Array, labels: Labels, penalties: Sequence[float], *, seed: int = 0
) -> float:
    """The penalty with the highest accuracy on left-out training samples, of equals the largest.

    (S, D), (S,) int -> one of ``penalties``

    Each fold of the samples is left out once, and holds an equal share of every class. Rows must
    be independent of each other: one for each video, not several clips of it.
    """
    fold_of, count = split_in_folds(labels, FOLDS, seed), int(labels.max()) + 1
    falling = sorted(set(penalties), reverse=True)
    correct = np.zeros(len(falling), dtype=np.int64)
    for fold in range(FOLDS):
        kept, out = fold_of != fold, fold_of == fold
        fits = logistic_probabilities(features[kept], labels[kept], features[out], falling, count)
        correct += [(fit.argmax(axis=1) == labels[out]).sum() for fit in fits]
    return falling[correct.argmax()]  # the first of equals


def split_in_folds(labels: ArrayLike, folds: int, seed: int) -> Labels:
    """A fold for each sample, with classes and folds as even as can be: (S,) -> (S,)"""
    labels = np.asarray(labels)
    shuffled = generator(seed, "folds").permutation(len(labels))
    by_class = shuffled[labels[shuffled].argsort(kind="stable")]
    fold_of = np.empty(len(labels), dtype=np.int64)
    fold_of[by_class] = np.arange(len(labels)) % folds
    return fold_of
