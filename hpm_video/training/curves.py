"""The curves of a run, drawn from its metrics: small multiples, one question each."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from hpm_video.files.atomic import written_beside
from hpm_video.training.metrics import read_lines

Values = NDArray[np.float64]

INK = "#1c1c20"
FAINT_INK = "#6e6e78"
COLOURS = ("#1f5fa8", "#d1602f", "#3c8d5a", "#8a5aa8")
LABEL_HEIGHT = 0.075
"""Of a line of text, as a share of a panel's height."""
LONG = 60
"""Points of a curve from which on noise is smoothed, over a twentieth of them."""


@dataclass(frozen=True)
class Mark:
    """A level to hold curves against."""

    value: float
    name: str


@dataclass(frozen=True)
class Panel:
    """What is drawn in one panel. Keys may hold ``*``; those that never occur are left out."""

    title: str
    keys: tuple[str, ...]
    """The panel's subject: where none of them occurs, there is no panel."""
    context: tuple[str, ...] = ()
    """Thin dashed lines to compare with."""
    marks: tuple[Mark, ...] = ()
    from_zero: bool = False
    noisy: bool = False
    """Long curves are drawn pale, and over them their running mean."""


PANELS = (
    Panel(
        "Loss in training",
        ("loss", "reconstruction", "prediction", "classification", "*/reconstruction"),
        noisy=True,
    ),
    Panel(
        "Held-out error, 1 = simplest good answer",
        ("relative_error", "*/relative_error"),
        marks=(Mark(1.0, "simplest"),),
    ),
    Panel(
        "Ranking accuracy on held-out clips",
        ("student_ranking", "teacher_ranking", "*/student_ranking", "*/teacher_ranking"),
        context=("ranking_by_*",),
        marks=(Mark(0.5, "chance"),),
    ),
    Panel("Accuracy on held-out clips", ("top1", "top5", "knn_top1"), from_zero=True),
    Panel("Learning rate", ("lr",), from_zero=True),
    Panel("Share of the hidden patches picked as hard", ("hard_fraction",), from_zero=True),
    Panel("Speed in clips per second", ("clips_per_second",), from_zero=True, noisy=True),
)


class Series(NamedTuple):
    """One key over a run."""

    updates: Values
    values: Values


class _Label(NamedTuple):
    text: str
    value: float
    colour: str


def plot_curves(metrics: Path, picture: Path, panels: Sequence[Panel] = PANELS) -> None:
    """Draw the metrics of a run (JSON lines) as PNG.

    Raises:
        ValueError: the file holds none of the keys that ``panels`` show.
    """
    records = read_metrics(metrics)
    series = collect(records)
    shown = [panel for panel in panels if _matching(panel.keys, series)]
    if not shown:
        raise ValueError(f"{metrics} holds nothing to draw: it has {sorted(series) or 'no values'}")
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = -(-len(shown) // columns)
    width, height = 5.2 * columns, 3.3 * rows
    figure = Figure(figsize=(width, height), facecolor="white")
    # Margins in inches. A layout that measures all texts takes as long as the drawing.
    figure.subplots_adjust(
        left=0.8 / width,
        bottom=0.6 / height,
        right=1 - 1.4 / width,
        top=1 - 0.45 / height,
        wspace=2.2 / (5.2 - 2.2),
        hspace=1.05 / (3.3 - 1.05),
    )
    FigureCanvasAgg(figure)
    last = max(record["update"] for record in records)
    rate = _epochs_per_update(records)
    for index, panel in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        _set_axes(axes, panel, last, rate)
        _draw_panel(axes, panel, series)
    with written_beside(picture) as file:
        figure.savefig(file, format="png", dpi=110)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records in the order of updates; of repeated ones, the last: a run may have gone back.

    Raises:
        MetricsError: a line is not of metrics.
    """
    records = {(record.get("kind", ""), record["update"]): record for record in read_lines(path)}
    return sorted(records.values(), key=lambda record: int(record["update"]))


def collect(records: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """The finite numbers of each key."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)) and np.isfinite(value):
                points.setdefault(key, []).append((record["update"], value))
    return {key: Series(*np.array(found, dtype=float).T) for key, found in points.items()}


def smooth(values: Values, width: int) -> Values:
    """Mean over ``width`` neighbours, over fewer at the ends: (K,) -> (K,)"""
    kernel = np.ones(min(width, len(values)))
    weight = np.convolve(np.ones(len(values)), kernel, mode="same")
    smoothed: Values = np.convolve(values, kernel, mode="same") / weight
    return smoothed


def _matching(patterns: Sequence[str], series: dict[str, Series]) -> list[str]:
    """Keys that occur, in the order of the patterns."""
    return [key for pattern in patterns for key in series if fnmatchcase(key, pattern)]


def _epochs_per_update(records: Sequence[dict[str, Any]]) -> float:
    """0 where records do not say."""
    for record in reversed(records):
        if record.get("epoch") and record["update"]:
            return float(record["epoch"]) / float(record["update"])
    return 0.0


def _set_axes(axes: Axes, panel: Panel, last: float, epochs_per_update: float) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=10)
    axes.set_xlim(0, max(last, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT_INK)
    axes.tick_params(colors=FAINT_INK, labelsize=9.5)
    axes.grid(axis="y", color="#e6e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    epochs = f" (to epoch {last * epochs_per_update:.4g})" if epochs_per_update else ""
    axes.set_xlabel(f"update{epochs}", color=FAINT_INK)


def _draw_panel(axes: Axes, panel: Panel, series: dict[str, Series]) -> None:
    labels = []
    for key, colour in zip(_matching(panel.keys, series), COLOURS, strict=False):
        updates, values = series[key]
        if panel.noisy and len(values) > LONG:
            axes.plot(updates, values, color=colour, linewidth=0.7, alpha=0.35)
            values = smooth(values, len(values) // 20)
        axes.plot(
            updates,
            values,
            color=colour,
            linewidth=1.8,
            marker="o" if len(values) < 30 else "",
            markersize=3,
            clip_on=False,
        )
        name = _name(key) if len(panel.keys) > 1 else ""  # the title says it
        labels.append(_Label(f"{name} {values[-1]:.3g}", values[-1], colour))
    for key in _matching(panel.context, series):
        updates, values = series[key]
        axes.plot(updates, values, color=FAINT_INK, linewidth=0.9, linestyle=(0, (4, 2)))
        labels.append(_Label(f"{_name(key)} {values[-1]:.3g}", values[-1], FAINT_INK))
    for mark in panel.marks:
        axes.axhline(mark.value, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        labels.append(_Label(mark.name, mark.value, INK))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    _write_labels(axes, labels)


def _write_labels(axes: Axes, labels: list[_Label]) -> None:
    """Name the curves at their right ends, moved apart where they would touch."""
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label.value)
    heights = spread([(label.value - low) / (high - low) for label in ordered], LABEL_HEIGHT)
    for label, height in zip(ordered, heights, strict=True):
        axes.annotate(
            label.text.strip(),
            (1.0, height),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=label.colour,
            annotation_clip=False,
        )


def spread(places: list[float], distance: float) -> list[float]:
    """Move rising places apart until neighbours keep their distance, each group about its mean."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _edge(groups[-2], distance, 1) > _edge(groups[-1], distance, -1):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [
        sum(group) / len(group) + (index - (len(group) - 1) / 2) * distance
        for group in groups
        for index in range(len(group))
    ]


def _edge(group: list[float], distance: float, side: int) -> float:
    return sum(group) / len(group) + side * len(group) * distance / 2


def _name(key: str) -> str:
    """A key in words."""
    return key.removeprefix("ranking_by_").removesuffix("_ranking").replace("_", " ")
