"""The curves of a run, drawn from its metrics: small multiples, one question each."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpm_video.files.atomic import written_beside
from hpm_video.training.metrics import read_lines

LONG = 60
"""Points of a curve from which on noise is smoothed, over a twentieth of them."""


@dataclass(frozen=True)
class Panel:
    """What is drawn in one panel. Keys may hold ``*``; those that never occur are left out."""

    title: str
    keys: tuple[str, ...]
    """The panel's subject: where none of them occurs, there is no panel."""
    context: tuple[str, ...] = ()
    """Thin dashed lines to compare with. Below ``level`` they are left out: the opposite of each,
    as far above it, is there as well."""
    level: tuple[float, str] | None = None
    """A value to hold curves against, and its name."""
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
        "Error relative to predicting the patch mean",
        ("relative_error", "*/relative_error"),
        level=(1.0, "patch mean"),
    ),
    Panel(
        "Ranking accuracy on validation clips",
        ("student_ranking", "teacher_ranking", "*/student_ranking", "*/teacher_ranking"),
        context=("ranking_by_*",),
        level=(0.5, "chance"),
    ),
    Panel("Accuracy on validation clips", ("top1", "top5", "knn_top1"), from_zero=True),
    Panel("Learning rate", ("lr",), from_zero=True),
    Panel("Share of hidden patches picked as hard", ("hard_fraction",), from_zero=True),
    Panel("Speed in clips per second", ("clips_per_second",), from_zero=True, noisy=True),
)


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draw what :data:`PANELS` show of a run's metrics (JSON lines) as PNG, over epochs if known.

    Raises:
        MetricsError: a line is not of metrics.
    """
    if not metrics.is_file():  # logging.trackers is without jsonl
        return
    table = read_metrics(metrics)
    shown = [panel for panel in PANELS if _matching(panel.keys, table)]
    if not shown:  # nothing is measured yet
        return
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.2 * columns, 0.4 + 3.3 * rows), layout="constrained")
    run = metrics.parent.resolve()
    figure.suptitle(f"{run.parent.name}/{run.name}", parse_math=False)
    axis, last = "update", f"update {table['update'].iloc[-1]:.0f}"
    if "epoch" in table and table["epoch"].notna().all():
        axis, last = "epoch", f"epoch {table['epoch'].iloc[-1]:.4g} is {last}"
    for index, panel in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_xlabel(f"{axis} ({last})")
        axes.set_xlim(0, table[axis].iloc[-1] or 1)
        _draw_panel(axes, panel, table.set_index(axis))
    with written_beside(picture) as file:
        figure.savefig(file, format="png", dpi=110)


def read_metrics(path: Path) -> pd.DataFrame:
    """Return finite numbers, a row for each record and a column for each key, in order of updates.

    Of repeated records the last counts: a run may have gone back.
    """
    records = {(record.get("kind"), record["update"]): record for record in read_lines(path)}
    rows = sorted(records.values(), key=lambda record: int(record["update"]))
    table = pd.DataFrame(rows).apply(pd.to_numeric, errors="coerce")
    finite: pd.DataFrame = table.replace([np.inf, -np.inf], np.nan)
    return finite.dropna(axis="columns", how="all")


def _matching(patterns: Sequence[str], table: pd.DataFrame) -> list[str]:
    """Return the keys that occur, in the order of the patterns."""
    return [key for pattern in patterns for key in map(str, table) if fnmatchcase(key, pattern)]


def _choose_curves(panel: Panel, table: pd.DataFrame) -> "dict[str, pd.Series[float]]":
    """Return what a panel shows, by key, without what others tell already."""
    curves: dict[str, pd.Series[float]] = {}
    for key in _matching((*panel.keys, *panel.context), table):
        values = table[key].dropna()
        is_opposite = (
            key in _matching(panel.context, table)
            and panel.level is not None
            and values.iloc[-1] < panel.level[0]
        )
        if not is_opposite and not any(values.equals(other) for other in curves.values()):
            curves[key] = values
    return curves


def _draw_panel(axes: Axes, panel: Panel, table: pd.DataFrame) -> None:
    """Draw the curves of a panel; the legend has their last values."""
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    for number, (key, values) in enumerate(_choose_curves(panel, table).items()):
        colour = f"C{number}"
        style: dict[str, Any] = {"clip_on": False}
        if panel.noisy and len(values) > LONG:
            axes.plot(values, colour, linewidth=0.7, alpha=0.35)
            values = values.rolling(len(values) // 20, center=True, min_periods=1).mean()
        elif len(values) < max(LONG / 2, len(table) / 2):  # each measurement can be seen
            style |= {"marker": "o", "markersize": 3}
        if key in _matching(panel.context, table):
            style |= {"linestyle": "--", "linewidth": 0.9}
        name = key.removeprefix("ranking_by_").removesuffix("_ranking").replace("_", " ")
        axes.plot(values, colour, label=f"{name} {values.iloc[-1]:.3g}", **style)
    if panel.level is not None:
        axes.axhline(panel.level[0], color="black", linestyle=":", label=panel.level[1])
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=8.5, frameon=False)
