"""What a classifier says of videos, one after the other."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.clips import HeldOutClips
from hpm_video.data.loader import end_workers, held_out_batches
from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import Views
from hpm_video.files.failures import Failure
from hpm_video.recognition.trained_classifier import Recogniser


class Guess(NamedTuple):
    """A class that a video may be of."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one video."""

    path: str
    probabilities: NDArray[np.float64]
    """(classes,) mean of the softmax over the views."""
    label_names: tuple[str, ...]

    def best(self, count: int) -> list[Guess]:
        """The most probable classes; of equally probable ones, those of lower number first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count].tolist()
        return [Guess(i, self.label_names[i], float(self.probabilities[i])) for i in order]


def predict(
    recogniser: Recogniser,
    manifest: Manifest,
    views: Views,
    *,
    decoder: DecoderChoice = "auto",
    workers: int = 0,
) -> Iterator[Prediction | Failure]:
    """What ``recogniser`` says of each video, in order; a failure of one that does not decode."""
    data = replace(recogniser.spec, decoder=decoder)
    clips = HeldOutClips(manifest, data, views=views, seed=0, report_failures=True)
    try:
        with closing(held_out_batches(clips, batch_size=1, workers=workers)) as batches:
            for path, batch in zip(manifest.files, batches, strict=True):
                if batch.failures:
                    yield batch.failures[0]
                    continue
                of_views = recogniser.probabilities(batch.clips).double().cpu().numpy()
                yield Prediction(path, of_views.mean(axis=0), recogniser.label_names)
    finally:
        end_workers()
