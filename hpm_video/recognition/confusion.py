"""What a classifier takes for what, as a picture. K is the number of classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hpm_video.files.atomic import written_beside
from hpm_video.mining.typesetting import font_of, shorten

Counts = NDArray[np.integer]

INK = "#1c1c20"
FAINT_INK = "#6e6e78"
NO_VIDEO = "#dcdce0"
SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#0d3f7f"])
"""White to blue: sRGB values are about even to the eye, so a straight line between two is too."""

MOST_NAMED = 60
"""Classes up to which their names stand at the axes."""
MOST_COUNTED = 30
"""Classes up to which counts stand in the cells; above, the most confused pairs are listed."""
MOST_LISTED = 40
PER_POINT = 2
"""Pixels of a typographic point. All other lengths below are in pixels."""
MARGIN = 32
LINE = 26
LONGEST_NAME = 230
LONGEST_LISTED_NAME = 410
SMALLEST_CELL, LARGEST_CELL = 44, 84
NAMED_CELL = 18
HEAT_MAP = 900
BAR = 110
"""The colour bar with its labels."""
LIST_HEADING = "Most confused: true → predicted, share (videos)"


class Confusion(NamedTuple):
    """Videos of one class that were taken for another."""

    true: str
    predicted: str
    share: float
    """Of the videos of the true class."""
    videos: int

    def __str__(self) -> str:
        return f"{self.true} → {self.predicted}: {_percent(self.share)} ({self.videos})"


class _Page:
    """A figure in pixels, counted from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = int(width), int(height)
        dpi = 72 * PER_POINT
        self.figure = Figure((self.width / dpi, self.height / dpi), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        places = np.array([left, bottom, width, height], dtype=float)
        places /= [self.width, self.height, self.width, self.height]
        return self.figure.add_axes((places[0], places[1], places[2], places[3]))

    def text(self, left: float, top: float, text: str, size: float = 8, **style: object) -> None:
        x, y = left / self.width, 1 - top / self.height
        settings = {"color": INK, "va": "center", "family": "DejaVu Sans", "parse_math": False}
        self.figure.text(x, y, text, fontsize=size, **(settings | style))  # type: ignore[arg-type]


class _Layout(NamedTuple):
    """Where things are on the page."""

    cell: int
    side: int
    names: list[str]
    """None of them where there are too many classes."""
    turn: int
    """Degrees by which names at the x axis are turned."""
    left: float
    top: float
    below: float
    """Room for the names at the x axis."""
    accuracies: float
    """Room for the column of accuracies."""


def draw_confusion(counts: Counts, label_names: Sequence[str], path: Path, *, title: str) -> None:
    """Draw how often each true class (row) was predicted as each class (column), as PNG.

    (K, K), K names

    Colours show shares of a row. Few classes have their names, counts and accuracies beside them,
    many have a list of the most confused pairs. Rows without any video are grey.

    Raises:
        ValueError: counts that are no square matrix of numbers of videos, or other than K names.
    """
    _check(counts, label_names)
    layout = _lay_out([" ".join(name.split()) for name in label_names])
    summary = _summary(counts)
    listed = _listed(counts, label_names, layout)
    right = layout.left + layout.side + layout.accuracies + BAR
    if listed:
        widths = [_width(line, 8) for line in listed]
        right += max(_width(LIST_HEADING, 8, bold=True), *widths) + LINE
    heading = max(_width(title, 12, bold=True), _width(summary, 8.5)) + MARGIN
    page = _Page(
        max(right, heading) + MARGIN,
        layout.top + layout.side + layout.below + 1.5 * LINE + MARGIN,
    )
    page.text(MARGIN, MARGIN + 6, title, 12, fontweight="bold")
    page.text(MARGIN, MARGIN + 44, summary, 8.5, color=FAINT_INK)
    axes = page.axes(layout.left, layout.top, layout.side, layout.side)
    _draw_matrix(axes, counts, layout)
    _write_axes(page, axes, layout)
    if layout.accuracies:
        _write_accuracies(page, counts, layout)
    _draw_bar(page, _scale(len(counts)), layout)
    _write_list(page, listed, layout)
    with written_beside(path) as file:
        page.figure.savefig(file, format="png")


def most_confused(counts: Counts, label_names: Sequence[str], top: int) -> list[Confusion]:
    """The pairs of classes with the largest share of the first taken for the second.

    (K, K), K names -> at most ``top`` pairs; of equal shares, those of more videos come first
    """
    _check(counts, label_names)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    shares = wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = wrong.nonzero()
    order = np.lexsort((-wrong[rows, columns], -shares[rows, columns]))[:top]
    return [
        Confusion(label_names[row], label_names[column], float(share), int(count))
        for row, column, share, count in zip(
            rows[order],
            columns[order],
            shares[rows[order], columns[order]],
            wrong[rows[order], columns[order]],
            strict=True,
        )
    ]


def shares_of(counts: Counts) -> NDArray[np.float64]:
    """Each row divided by its sum, NaN where that is 0: (K, K) -> (K, K)"""
    videos = counts.sum(axis=1, keepdims=True).astype(np.float64)
    shares = np.full(counts.shape, np.nan)
    np.divide(counts, videos, out=shares, where=videos > 0)
    return shares


def _check(counts: Counts, label_names: Sequence[str]) -> None:
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(
            f"counts must be (K, K) with K > 0, got {counts.shape}; count each pair of a true and "
            f"a predicted class"
        )
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(
            f"counts must be numbers of videos, got {counts.dtype} from {counts.min()}; "
            f"give integers of at least 0, not shares"
        )
    if len(label_names) != len(counts):
        raise ValueError(
            f"there must be one name for each of the {len(counts)} classes, got "
            f"{len(label_names)}; give the names of the data set that was counted"
        )


def _lay_out(names: list[str]) -> _Layout:
    classes = len(names)
    top = MARGIN + 110
    if classes > MOST_NAMED:
        cell = max(2, HEAT_MAP // classes)
        return _Layout(cell, cell * classes, [], 0, MARGIN + 90, top, LINE, 0)
    cell = NAMED_CELL
    if classes <= MOST_COUNTED:
        cell = int(np.clip(1200 // classes, SMALLEST_CELL, LARGEST_CELL))
    size = _name_size(cell)
    font = font_of("DejaVuSans.ttf", round(size * PER_POINT))
    names = [shorten(name, LONGEST_NAME, font) for name in names]
    longest = max(_width(name, size) for name in names)
    turn = 0 if longest < cell - 6 else 45 if cell >= SMALLEST_CELL else 90
    below = size * PER_POINT + longest * np.sin(np.radians(turn)) + 10
    left = MARGIN + LINE + longest + 12
    return _Layout(cell, cell * classes, names, turn, left, top, float(below), 90)


def _name_size(cell: int) -> float:
    return min(9, (cell - 4) / PER_POINT)


def _width(text: str, size: float, *, bold: bool = False) -> float:
    file = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return font_of(file, round(size * PER_POINT)).getlength(text)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.0%}"


def _summary(counts: Counts) -> str:
    """The accuracy in a line."""
    videos = counts.sum(axis=1)
    if not videos.any():
        return "no videos"
    of_classes = np.diagonal(shares_of(counts))[videos > 0]
    parts = [
        f"{counts.trace()} of {videos.sum()} videos right ({counts.trace() / videos.sum():.1%})",
        f"mean accuracy of a class {of_classes.mean():.1%}",
    ]
    if not videos.all():
        parts.append(f"grey: no videos of {(videos == 0).sum()} of {len(videos)} classes")
    return ", ".join(parts)


def _listed(counts: Counts, label_names: Sequence[str], layout: _Layout) -> list[str]:
    if len(counts) <= MOST_COUNTED:
        return []
    font = font_of("DejaVuSans.ttf", 8 * PER_POINT)
    names = [shorten(" ".join(name.split()), LONGEST_LISTED_NAME, font) for name in label_names]
    fitting = min(MOST_LISTED, layout.side // LINE)
    return [str(pair) for pair in most_confused(counts, names, fitting)]


def _draw_matrix(axes: Axes, counts: Counts, layout: _Layout) -> None:
    shares = shares_of(counts)
    axes.imshow(
        np.ma.masked_invalid(shares),
        cmap=SHARES.with_extremes(bad=NO_VIDEO),
        norm=_scale(len(counts)),
        interpolation="nearest",
        aspect="auto",
    )
    axes.spines[:].set_color(FAINT_INK)
    if not layout.names:
        return
    axes.set_xticks([])
    axes.set_yticks([])
    classes = len(counts)
    axes.autoscale(enable=False)
    between, first, last = np.arange(1, classes) - 0.5, -0.5, classes - 0.5
    axes.hlines(between, first, last, colors="#ececf0", linewidth=0.6)
    axes.vlines(between, first, last, colors="#ececf0", linewidth=0.6)
    for row in np.flatnonzero(counts.sum(axis=1) == 0):
        place = (-0.5, row - 0.5)
        axes.add_patch(
            Rectangle(place, classes, 1, fill=False, hatch="////", edgecolor="#b4b4bc", linewidth=0)
        )
    if classes <= MOST_COUNTED:
        _write_counts(axes, counts, layout.cell)


def _write_counts(axes: Axes, counts: Counts, cell: int) -> None:
    """Numbers in the cells, unless they would be too small to read."""
    size = min(9.0, 9.0 * 0.84 * cell / _width(str(counts.max()), 9))
    if size < 4.5:
        return
    shares = shares_of(counts)
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[row, column] > 0.5 else INK
        axes.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            color=colour,
            fontsize=size,
            family="DejaVu Sans",
        )


def _write_axes(page: _Page, axes: Axes, layout: _Layout) -> None:
    left, top, side = layout.left, layout.top, layout.side
    style = {"ha": "center", "color": FAINT_INK}
    page.text(left + side / 2, top + side + layout.below + LINE, "predicted class", 8.5, **style)
    page.text(MARGIN + LINE / 2, top + side / 2, "true class", 8.5, rotation=90, **style)
    if not layout.names:
        axes.tick_params(colors=FAINT_INK, labelsize=8)
        for axis in axes.xaxis, axes.yaxis:
            axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        return
    size = _name_size(layout.cell)
    below = {"ha": "right", "rotation": layout.turn, "rotation_mode": "anchor"}
    if not layout.turn:
        below = {"ha": "center", "va": "top"}
    for index, name in enumerate(layout.names):
        centre = (index + 0.5) * layout.cell
        page.text(left - 10, top + centre, name, size, ha="right")
        page.text(left + centre, top + side + 10, name, size, **below)


def _write_accuracies(page: _Page, counts: Counts, layout: _Layout) -> None:
    right = layout.left + layout.side + layout.accuracies - 16
    page.text(right, layout.top - LINE, "accuracy", ha="right", color=FAINT_INK)
    for index, accuracy in enumerate(np.diagonal(shares_of(counts))):
        height = layout.top + (index + 0.5) * layout.cell
        page.text(right, height, _percent(accuracy), _name_size(layout.cell), ha="right")


def _scale(classes: int) -> Normalize:
    """From shares to colours: where counts are not written, small shares are to be seen too."""
    return Normalize(0, 1) if classes <= MOST_COUNTED else PowerNorm(0.5, 0, 1)


def _draw_bar(page: _Page, scale: Normalize, layout: _Layout) -> None:
    left = layout.left + layout.side + layout.accuracies + 16
    axes = page.axes(left, layout.top, 20, layout.side)
    bar = page.figure.colorbar(ScalarMappable(scale, SHARES), cax=axes)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    if isinstance(scale, PowerNorm):
        ticks += [0.01, 0.05, 0.1]
    bar.set_ticks(ticks, labels=[_percent(tick) for tick in ticks])
    axes.tick_params(colors=FAINT_INK, labelsize=8)
    bar.outline.set_edgecolor(FAINT_INK)
    page.text(left, layout.top - LINE, "share of row", color=FAINT_INK)


def _write_list(page: _Page, listed: list[str], layout: _Layout) -> None:
    if not listed:
        return
    left = layout.left + layout.side + layout.accuracies + BAR + LINE
    page.text(left, layout.top - LINE, LIST_HEADING, fontweight="bold")
    for index, line in enumerate(listed):
        page.text(left, layout.top + (index + 0.5) * LINE, line)
