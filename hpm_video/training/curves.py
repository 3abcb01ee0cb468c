"""The curves of a run, drawn from its metrics: small multiples, one question each."""

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpm_video.files.atomic import written_beside
from hpm_video.training.metrics import read_lines

PANELS = {
    "Loss in training": "loss reconstruction prediction classification */reconstruction",
    "Error relative to predicting the patch mean": "relative_error */relative_error",
    "Ranking accuracy on validation clips": "*student_ranking *teacher_ranking ranking_by_*",
    "Accuracy on validation clips": "top1 top5 knn_top1",
    "Learning rate": "lr",
    "Share of hidden patches picked as hard": "hard_fraction",
    "Speed in clips per second": "clips_per_second",
}
"""Titles, and the keys that each panel shows. Those that never occur are left out."""


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draw what :data:`PANELS` show of a run's metrics (JSON lines) as PNG, over epochs if known.

    Raises:
        MetricsError: a line is not of metrics.
    """
    table = read_metrics(metrics)
    keys = {title: _matching(patterns, table) for title, patterns in PANELS.items()}
    shown = {title: found for title, found in keys.items() if found}
    if not shown:  # nothing is measured yet
        return
    axis = "epoch" if "epoch" in table and table["epoch"].notna().all() else "update"
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 0.4 + 3.8 * rows), layout="constrained")
    run = metrics.parent.resolve()
    figure.suptitle(f"{run.parent.name}/{run.name}", parse_math=False)
    for index, (title, found) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(title)
        axes.set_xlabel(axis)
        _draw(axes, table.set_index(axis)[found])
    with written_beside(picture) as file:
        figure.savefig(file, format="png", dpi=110)


def read_metrics(path: Path) -> pd.DataFrame:
    """Return finite numbers, a row for each line and a column for each key."""
    table = pd.DataFrame(read_lines(path)).apply(pd.to_numeric, errors="coerce")
    finite: pd.DataFrame = table.replace([np.inf, -np.inf], np.nan)
    return finite.dropna(axis="columns", how="all")


def _matching(patterns: str, table: pd.DataFrame) -> list[str]:
    """Return the keys that occur, in the order of the patterns."""
    return [key for each in patterns.split() for key in map(str, table) if fnmatchcase(key, each)]


def _draw(axes: Axes, table: pd.DataFrame) -> None:
    """Draw a curve of each column; the legend has its last value."""
    for key in table:
        values = table[key].dropna()
        marker = "o" if len(values) < 30 else None  # a few measurements can each be seen
        axes.plot(values, marker=marker, markersize=3, label=f"{key} {values.iloc[-1]:.3g}")
    axes.grid(axis="y", color="0.9")
    # Below the axes, where it covers no curve.
    place = (0.5, -0.15)
    axes.legend(fontsize=8.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=place)
