"""Pictures of confusion matrices. K is the number of classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpm_video.files.atomic import written_beside

Counts = NDArray[np.integer]

INK = "#1c1c20"
FAINT_INK = "#6e6e78"
NO_VIDEO = "#dcdce0"
SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#0d3f7f"]).with_extremes(
    bad=NO_VIDEO
)
"""White to blue: sRGB values are about even to the eye, so a straight line between two is too."""

MOST_NAMED = 60  # classes up to which their names stand at the axes
MOST_COUNTED = 30
"""Classes up to which counts stand in the cells; above, the most confused pairs are listed."""
MOST_LISTED = 40
LONGEST_NAME, LONGEST_LISTED = 24, 34  # characters of a name at the axes, and in the list
DPI = 144
LETTER = 0.6  # width of a letter, in sizes of its font


def draw_confusion(counts: Counts, label_names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw how often each true class (row) was predicted as each class (column), as PNG.

    (K, K), K names

    Colours show shares of a row. Few classes have their names, counts and accuracies beside them,
    many have a list of the most confused pairs. Rows without any video are grey.
    """
    classes = len(counts)
    few = classes <= MOST_COUNTED
    side = float(np.clip(0.5 * classes, 2.5, 8)) if few else 7.0
    cell = 72 * side / classes  # in points
    figure = Figure((side, side), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))  # all else stands around it, and the picture grows
    image = axes.imshow(
        np.ma.masked_invalid(shares_of(counts)),
        cmap=SHARES,
        norm=Normalize(0, 1) if few else PowerNorm(0.5, 0, 1),
        interpolation="nearest",
    )
    heading = f"{title}\n{_summary(counts)}"
    axes.set_title(heading, loc="left", fontsize=9, color=INK, parse_math=False)
    axes.set_xlabel("predicted class", color=FAINT_INK)
    axes.set_ylabel("true class", color=FAINT_INK)
    axes.tick_params(length=0, labelsize=8)
    if classes <= MOST_NAMED:
        names = [_shorten(name, LONGEST_NAME) for name in label_names]
        _name_classes(axes, counts, names, min(9.0, 0.8 * cell))
    ticks = [0, 0.25, 0.5, 0.75, 1] if few else [0, 0.01, 0.1, 0.25, 0.5, 1]
    beside = axes.inset_axes((1 + 0.8 / side, 0, 0.2 / side, 1))
    bar = figure.colorbar(image, cax=beside, label="share of row")
    bar.set_ticks(ticks, labels=[_percent(tick) for tick in ticks])
    if few:
        _write_counts(axes, counts, cell)
    else:
        listed = [_shorten(name, LONGEST_LISTED) for name in label_names]
        pairs = most_confused(counts, listed, MOST_LISTED)
        lines = "\n".join(["Most confused: true → predicted, share (videos)", *pairs])
        right = axes.text(1 + 2 / side, 1, lines, va="top", transform=axes.transAxes)
        right.set(fontsize=7.5, linespacing=1.5, color=INK, parse_math=False)
    with written_beside(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.22)


def most_confused(counts: Counts, label_names: Sequence[str], top: int) -> list[str]:
    """Name the pairs of classes with the largest share of the first taken for the second.

    (K, K), K names -> at most ``top`` pairs; of equal shares, those of more videos come first
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    shares = wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = wrong.nonzero()
    order = np.lexsort((-wrong[rows, columns], -shares[rows, columns]))[:top]
    return [
        f"{label_names[row]} → {label_names[column]}: {shares[row, column]:.0%} "
        f"({wrong[row, column]})"
        for row, column in zip(rows[order], columns[order], strict=True)
    ]


def shares_of(counts: Counts) -> NDArray[np.float64]:
    """Each row divided by its sum, NaN where that is 0: (K, K) -> (K, K)"""
    videos = counts.sum(axis=1, keepdims=True).astype(np.float64)
    shares = np.full(counts.shape, np.nan)
    np.divide(counts, videos, out=shares, where=videos > 0)
    return shares


def _shorten(name: str, longest: int) -> str:
    name = " ".join(name.split())
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.0%}"


def _summary(counts: Counts) -> str:
    videos = counts.sum(axis=1)
    if not videos.any():
        return "no videos"
    of_classes = np.diagonal(shares_of(counts))[videos > 0]
    summary = (
        f"{counts.trace()} of {videos.sum()} videos right ({counts.trace() / videos.sum():.1%})\n"
        f"mean accuracy of a class {of_classes.mean():.1%}"
    )
    if not videos.all():
        summary += f"\ngrey: no videos of {(videos == 0).sum()} of {len(videos)} classes"
    return summary


def _name_classes(axes: Axes, counts: Counts, names: Sequence[str], size: float) -> None:
    """Draw names at both axes, the accuracy of each class at the right, and lines between them."""
    places = np.arange(len(names))
    axes.set_xticks(places, names, rotation=90)
    axes.set_yticks(places, names)
    right = axes.secondary_yaxis("right")
    right.set_ticks(places, [_percent(share) for share in np.diagonal(shares_of(counts))])
    right.set_ylabel("accuracy", color=FAINT_INK)
    for each in axes, right:
        each.tick_params(length=0, labelsize=size, labelcolor=INK)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    for line in places[1:] - 0.5:
        axes.axhline(line, color="#ececf0", linewidth=0.6)
        axes.axvline(line, color="#ececf0", linewidth=0.6)


def _write_counts(axes: Axes, counts: Counts, cell: float) -> None:
    """Write numbers into cells ``cell`` points wide, unless they would be too small to read."""
    size = min(9.0, 0.8 * cell / (LETTER * len(str(counts.max()))))
    if size < 4.5:
        return
    shares = shares_of(counts)
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[row, column] > 0.5 else INK
        number = str(counts[row, column])
        axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=size)
