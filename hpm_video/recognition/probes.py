"""Probes of frozen features that need no training loop: nearest neighbours, logistic regression."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hpm_video.data.manifest import Manifest
from hpm_video.recognition.logistic import choose_penalty, fit_logistic
from hpm_video.recognition.nearest import NEIGHBOURS, TEMPERATURE, knn_probabilities
from hpm_video.recognition.testing import Scores

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of logistic regression, to choose from by cross-validation on the training videos."""


@dataclass(frozen=True)
class FeatureTable:
    """Features of the videos of a manifest."""

    manifest: Manifest
    features: NDArray[np.float64]
    """(videos, D); NaN for a video that does not decode."""

    @property
    def there(self) -> NDArray[np.bool_]:
        """(videos,) which of them have features."""
        present: NDArray[np.bool_] = ~np.isnan(self.features[:, 0])
        return present

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the videos that have features: -> (videos, D) float64, (videos,) labels"""
        labels = np.asarray(self.manifest.labels)
        return torch.from_numpy(self.features[self.there]), torch.from_numpy(labels[self.there])


def nearest_neighbours(
    train: FeatureTable,
    test: FeatureTable,
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Scores]:
    """Classify by votes of the nearest training videos: -> scores for each number of neighbours

    Raises:
        ValueError: there are fewer training videos than neighbours.
    """
    bank, labels = train.tensors()
    queries, _ = test.tensors()
    found = knn_probabilities(
        queries, bank, labels, k=neighbours, num_classes=num_classes, temperature=temperature
    )
    return {k: _scores(test, probabilities) for k, probabilities in found.items()}


def logistic_regression(
    train: FeatureTable, test: FeatureTable, num_classes: int, seed: int = 0
) -> tuple[float, Scores]:
    """Classify by multinomial logistic regression, solved to the optimum: -> penalty and scores

    The penalty on the weights is chosen by cross-validation on the training videos alone.
    """
    features, labels = train.tensors()
    penalty = choose_penalty(features, labels, PENALTIES, num_classes=num_classes, seed=seed)
    classifier = fit_logistic(features, labels, num_classes=num_classes, penalty=penalty)
    queries, _ = test.tensors()
    return penalty, _scores(test, classifier.probabilities(queries))


def _scores(test: FeatureTable, probabilities: torch.Tensor) -> Scores:
    table = np.full((len(test.manifest), probabilities.shape[1]), np.nan)
    table[test.there] = probabilities.double().numpy()
    return Scores(test.manifest, table)
