"""Testing a classifier on videos: each once, over all of its views, and none replaced."""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.data.batch import ClipBatch
from hpm_video.data.manifest import Manifest
from hpm_video.files.atomic import written_beside
from hpm_video.files.failures import BadFilesError, Failure
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.confusion import draw_confusion

log = logging.getLogger(__name__)

MANY_CLASSES = 30
"""From so many on, the terminal shows only the best and the worst."""


class BadTestFilesError(BadFilesError):
    """Videos of which features or a test are wanted do not decode. The message lists them all."""

    def __init__(self, failures: Sequence[Failure], num_files: int) -> None:
        super().__init__(
            failures,
            num_files,
            "Repair them, or take them out of the manifest. A test can leave them out knowingly "
            "(test.exclude_bad_files=true, tools/evaluate.py --exclude-bad-files): they then count "
            "as wrong, and the result says how many they are",
            most=None,
        )


class VideoValues(NamedTuple):
    """What a model says of one video."""

    place: int
    """In the manifest."""
    mean: NDArray[np.float64]
    """(values,) over the views."""


@dataclass(frozen=True)
class Scores:
    """What a classifier says of the videos of a manifest, in its order."""

    manifest: Manifest
    probabilities: NDArray[np.float64]
    """(videos, classes), mean of the softmax over the views; NaN for those that do not decode."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(videos,)"""
        return np.asarray(self.manifest.labels, dtype=np.int64)

    @property
    def ranks(self) -> NDArray[np.int64]:
        """How many classes are more probable than the true one: (videos,), all for one excluded."""
        of_label = np.take_along_axis(self.probabilities, self.labels[:, None], axis=1)
        ahead = (self.probabilities > of_label).sum(axis=1)
        # Of equally probable classes, those of lower number come first.
        earlier = np.arange(self.probabilities.shape[1]) < self.labels[:, None]
        ahead += ((self.probabilities == of_label) & earlier).sum(axis=1)
        ranks: NDArray[np.int64] = np.where(self.excluded, self.probabilities.shape[1], ahead)
        return ranks

    @property
    def excluded(self) -> NDArray[np.bool_]:
        """(videos,) which of them did not decode."""
        gone: NDArray[np.bool_] = np.isnan(self.probabilities[:, 0])
        return gone


@torch.no_grad()
def score_videos(
    values: Callable[[Tensor], Tensor],
    batches: Iterable[ClipBatch],
    manifest: Manifest,
    places: Iterable[int],
    *,
    num_views: int,
    exclude_bad_files: bool,
) -> tuple[list[VideoValues], list[Failure]]:
    """Values of the videos at ``places`` of a manifest, averaged over their views.

    ``values``: (B, C, T, H, W) uint8 on the host -> (B, values). ``batches`` hold those videos in
    order, ``num_views`` clips of each that decodes, and name those that do not. After the first of
    these, unless they are excluded, nothing is computed any more: the test fails, and only wants
    to know of all of them.
    """
    found: list[VideoValues] = []
    failures: list[Failure] = []
    bad: set[str] = set()
    left = iter(places)
    for batch in batches:
        failures += batch.failures
        bad |= {failure.path for failure in batch.failures}
        if not len(batch.clips) or (failures and not exclude_bad_files):
            continue
        of_views = values(batch.clips).double().cpu().numpy()
        for mean in of_views.reshape(-1, num_views, of_views.shape[1]).mean(axis=1):
            place = next(i for i in left if manifest.files[i] not in bad)
            found.append(VideoValues(place, mean))
    return found, failures


def tell_left_out(failures: Sequence[Failure]) -> None:
    """Name the videos that a test left out."""
    for failure in sorted(failures, key=lambda bad: bad.path):
        log.warning("left out: %s", failure)


def collect(
    manifest: Manifest,
    found: Sequence[VideoValues],
    failures: Sequence[Failure],
    *,
    exclude_bad_files: bool,
) -> NDArray[np.float64]:
    """The values of all processes put together: -> (videos, values), NaN for excluded videos

    Raises:
        BadTestFilesError: videos do not decode, and are not to be excluded.
        CheckpointError: a value is not finite.
        RuntimeError: a video was looked at twice or never, which would be a fault of this program.
    """
    if failures and not (exclude_bad_files and found):
        raise BadTestFilesError(sorted(failures, key=lambda bad: bad.path), len(manifest))
    table = np.full((len(manifest), len(found[0].mean)), np.nan)
    seen = np.zeros(len(manifest), dtype=np.int64)
    for place, mean in found:
        if not np.isfinite(mean).all():
            raise CheckpointError(
                f"what the model says of {manifest.files[place]} is not finite: its weights have "
                f"diverged, or bf16 does not hold them. Take an earlier checkpoint, or fp32"
            )
        table[place] = mean
        seen[place] += 1
    bad = {failure.path for failure in failures}
    expected = np.array([path not in bad for path in manifest.files], dtype=np.int64)
    if not np.array_equal(seen, expected):
        wrong = int(np.flatnonzero(seen != expected)[0])
        raise RuntimeError(f"{manifest.files[wrong]} was looked at {seen[wrong]} times")
    return table


def summarise(scores: Scores, label_names: Sequence[str]) -> dict[str, Any]:
    """Accuracies of a test, over all videos of the manifest: an excluded one counts as wrong."""
    labels, ranks = scores.labels, scores.ranks
    num_classes = len(label_names)
    counts = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels[ranks == 0], minlength=num_classes)
    per_class = [
        {
            "label": label,
            "name": name,
            "videos": int(counts[label]),
            "correct": int(correct[label]),
            "top1": float(correct[label] / counts[label]) if counts[label] else None,
        }
        for label, name in enumerate(label_names)
    ]
    there = counts > 0
    return {
        "top1": float((ranks == 0).mean()),
        "top5": float((ranks < min(5, num_classes)).mean()),
        "chance": 1 / num_classes,
        "largest_class": float(counts.max() / counts.sum()),
        "mean_class_top1": float((correct[there] / counts[there]).mean()),
        "videos": len(labels),
        "excluded": int(scores.excluded.sum()),
        "excluded_files": [scores.manifest.files[i] for i in np.flatnonzero(scores.excluded)],
        "classes": per_class,
    }


def write_results(
    folder: Path, scores: Scores, result: dict[str, Any], label_names: Sequence[str]
) -> None:
    """Write ``predictions.csv``, ``confusion.png`` and, last, ``result.json``."""
    with (
        written_beside(folder / "predictions.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(
            ["path", "label", "label_name", "prediction", "prediction_name", "correct"]
            + [f"probability of {name}" for name in label_names]
        )
        for file_path, label, row in zip(
            scores.manifest.files, scores.labels, scores.probabilities, strict=True
        ):
            writer.writerow(_prediction(file_path, int(label), row, label_names))
    draw_confusion(
        confusion_counts(scores),
        label_names,
        folder / "confusion.png",
        title=f"{result['videos'] - result['excluded']} videos, top-1 {result['top1']:.1%}",
    )
    with written_beside(folder / "result.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _prediction(
    path: str, label: int, probabilities: NDArray[np.float64], label_names: Sequence[str]
) -> list[object]:
    """A row of ``predictions.csv``; of an excluded video, without a prediction."""
    known = [path, label, label_names[label]]
    if np.isnan(probabilities[0]):
        return [*known, "", "", 0, *[""] * len(label_names)]
    best = int(probabilities.argmax())
    return [*known, best, label_names[best], int(best == label), *np.round(probabilities, 6)]


def confusion_counts(scores: Scores) -> NDArray[np.int64]:
    """Videos by true (rows) and predicted class, without those excluded: -> (classes, classes)"""
    num_classes = scores.probabilities.shape[1]
    there = ~scores.excluded
    cells = scores.labels[there] * num_classes + scores.probabilities[there].argmax(axis=1)
    counts: NDArray[np.int64] = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def describe(result: dict[str, Any]) -> str:
    """The result of a test in some lines, for the terminal."""
    rows = [
        f"top-1 {result['top1']:.3f}, top-5 {result['top5']:.3f}, mean over classes "
        f"{result['mean_class_top1']:.3f} (chance {result['chance']:.3f}) on {result['videos']} "
        f"videos"
    ]
    if result["excluded"]:
        rows.append(f"  {result['excluded']} of them do not decode: excluded, and counted as wrong")
    tested = [row for row in result["classes"] if row["videos"]]
    if len(tested) <= MANY_CLASSES:
        rows += [_class_line(row) for row in tested]
        return "\n".join(rows)
    ordered = sorted(tested, key=lambda row: row["top1"])
    rows += ["  the hardest classes:", *map(_class_line, ordered[:5])]
    rows += ["  the easiest:", *map(_class_line, ordered[:-6:-1])]
    return "\n".join(rows)


def _class_line(row: dict[str, Any]) -> str:
    return f"  {row['name']:24} {row['top1']:6.1%}  ({row['correct']} of {row['videos']})"
