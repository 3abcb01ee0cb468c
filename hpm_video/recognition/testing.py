"""Tests of a classifier on videos: each once, over all of its views, and none replaced.

K is the number of classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpm_video.data.manifest import Manifest
from hpm_video.data.reading import Views
from hpm_video.files.atomic import write_json, written_beside
from hpm_video.preparation.jobs import write_report
from hpm_video.recognition.inference import Inference, Reading, VideoValues, over_videos
from hpm_video.recognition.labels import check_classes, numbered_as
from hpm_video.recognition.trained_model import TrainedClassifier
from hpm_video.training.distributed import Processes

TOP = 5  # the label is among so many; of no more classes that tells nothing, and is not reported
MOST_NAMED = 30  # classes up to which the terminal and the picture show each by its name
LONGEST_NAME = 30


def ranks_of(scores: VideoValues) -> NDArray[np.int64]:
    """Count the classes that are more probable than the true one: -> (videos,), K for one excluded

    Of equally probable classes, those of lower number come first.
    """
    order = np.argsort(-scores.values, axis=1, kind="stable")
    places = (order == scores.labels[:, None]).argmax(axis=1)
    return np.where(scores.excluded, scores.values.shape[1], places)


def score_videos(
    classifier: Inference,
    label_names: Sequence[str],
    manifest: Manifest,
    views: Views,
    reading: Reading,
    processes: Processes,
) -> VideoValues:
    """Compute the probabilities of every video of a manifest, each by one of the processes.

    Raises:
        BadFilesError: videos do not decode, and are not to be excluded.
        ManifestError: a video has no label, or one that the classifier does not know.
    """
    manifest = numbered_as(label_names, manifest)
    check_classes(manifest, label_names, "the videos of the test")
    clips, per_pass = reading.clips(manifest, classifier.data, views), classifier.clips_per_pass
    return over_videos(classifier.probabilities, clips, reading, processes, per_pass)


def describe_test(
    trained: TrainedClassifier, classifier: Inference, manifest: Manifest, views: Views
) -> dict[str, Any]:
    """Return everything that determines the result of a test."""
    return trained.describe() | {
        "videos_sha256": manifest.digest,
        "clips": views.clips,
        "crops": views.crops,
        "short_side": trained.data.validation_short_side,
        "interpolation": trained.data.interpolation,
        "precision": classifier.precision,
    }


def summarise(scores: VideoValues, label_names: Sequence[str]) -> dict[str, Any]:
    """Return the accuracies over all videos of the manifest; an excluded one counts as wrong."""
    labels, ranks, num_classes = scores.labels, ranks_of(scores), len(label_names)
    counts = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels[ranks == 0], minlength=num_classes)
    per_class = [
        {
            "label": label,
            "name": name,
            "videos": videos,
            "correct": right,
            "top1": right / videos if videos else None,
        }
        for label, (name, videos, right) in enumerate(
            zip(label_names, counts.tolist(), correct.tolist(), strict=True)
        )
    ]
    there = counts > 0
    return {
        "top1": float((ranks == 0).mean()),
        "top5": float((ranks < min(TOP, num_classes)).mean()),
        "chance": float(1 / there.sum()),
        "mean_class_top1": float((correct[there] / counts[there]).mean()),
        "videos": len(labels),
        "excluded": int(scores.excluded.sum()),
        "classes": per_class,
    }


def write_results(
    folder: Path, scores: VideoValues, result: dict[str, Any], label_names: Sequence[str]
) -> None:
    """Write ``predictions.csv``, ``confusion.png`` and, last, ``result.json``."""
    header = ["path", "label", "label_name", "prediction", "prediction_name", "correct"]
    header += [f"probability of {name}" for name in label_names]
    rows: list[list[object]] = []
    files, labels = scores.manifest.files, scores.manifest.labels
    for file, label, row in zip(files, labels, scores.values, strict=True):
        best = int(row.argmax())
        predicted = [best, label_names[best], int(best == label), *np.round(row, 6)]
        if np.isnan(row[0]):  # it is excluded
            predicted = ["", "", 0, *[""] * len(row)]
        rows.append([file, label, label_names[label], *predicted])
    write_report(folder / "predictions.csv", header, rows)
    # The folder names run, checkpoint, weights, views and list, unless the user named it.
    title = f"{folder}\ntop-1 {result['top1']:.1%} of {result['videos']} videos"
    draw_confusion(confusion_counts(scores), label_names, folder / "confusion.png", title=title)
    write_json(folder / "result.json", result)


def confusion_counts(scores: VideoValues) -> NDArray[np.int64]:
    """Videos by true (rows) and predicted class, without those excluded: -> (K, K)"""
    from sklearn.metrics import confusion_matrix

    there, classes = ~scores.excluded, np.arange(scores.values.shape[1])
    predicted = scores.values[there].argmax(axis=1)
    return np.asarray(confusion_matrix(scores.labels[there], predicted, labels=classes))


def draw_confusion(
    counts: NDArray[np.int64], label_names: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw how often each true class (row) was predicted as each class (column), as PNG.

    (K, K), K names. Colours show shares of a row. Few classes have their names and counts.
    """
    side = 4 + min(len(counts), MOST_NAMED) / 4
    figure = Figure((side, side), dpi=144, layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.7)
    axes.set_title(title, fontsize=8, wrap=True, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(counts) <= MOST_NAMED:
        names = [" ".join(name.split())[:LONGEST_NAME] for name in label_names]
        axes.set_xticks(range(len(counts)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(counts)), names, parse_math=False)
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            number = str(counts[row, column])
            axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=7)
    with written_beside(path) as file:
        figure.savefig(file, format="png")


def describe(result: dict[str, Any]) -> str:
    """Return the result of a test in some lines, for the terminal."""
    top5 = f", top-5 {result['top5']:.3f}" if len(result["classes"]) > TOP else ""
    rows = [
        f"top-1 {result['top1']:.3f}{top5}, mean over classes {result['mean_class_top1']:.3f} "
        f"(chance {result['chance']:.3f}) on {result['videos']} videos"
    ]
    if result["excluded"]:
        rows.append(f"  {result['excluded']} of them do not decode: excluded, and counted as wrong")
    tested = [one for one in result["classes"] if one["videos"]]
    for one in tested if len(tested) <= MOST_NAMED else ():
        right = f"({one['correct']} of {one['videos']})"
        rows.append(f"  {one['name']:24} {one['top1']:6.1%}  {right}")
    return "\n".join(rows)
