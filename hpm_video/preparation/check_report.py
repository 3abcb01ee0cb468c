"""Summary of a checked manifest, as text and as histograms."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from hpm_video.data.manifest import VERDICTS
from hpm_video.preparation.findings import Finding

REASONS_SHOWN = 8
BINS = 40
WIDE = 30.0  # ratio of largest to smallest value above which an axis is logarithmic
ALIKE = 1e-4
"""Share by which values may differ, as rates do that were measured, and are drawn as one."""
COLOURS = ("tab:green", "tab:orange", "tab:red")  # colours of the verdicts
MEASURES = {
    "num_frames": "Length in frames",
    "duration": "Length in seconds",
    "short_side": "Short side in pixels",
    "fps": "Frames per second",
    "key_frame_distance": "Key-frame distance in frames",
}
"""Columns of :func:`usable` and their titles in the plot."""


def summary(files: Sequence[str], findings: Sequence[Finding]) -> str:
    """Summarise the findings. ``files``: the file of each finding."""
    counts = Counter(finding.verdict for finding in findings)
    lines = [", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)]
    reasons = common_reasons(files, findings)
    for times, verdict, reason, file in reasons[:REASONS_SHOWN]:
        lines += [f"  {times:6} {verdict}: {reason}", f"         {file}"]
    if rest := sum(times for times, *_ in reasons[REASONS_SHOWN:]):
        lines.append(f"  {rest:6} others: see the column reason")
    table = usable(findings)
    if len(table):
        lines += [f"  {name:12}{value}" for name, value in _totals(table).items()]
    return "\n".join(lines)


def common_reasons(
    files: Sequence[str], findings: Sequence[Finding]
) -> list[tuple[int, str, str, str]]:
    """Group reasons by kind, the most common first. -> count, verdict, an example, its file"""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for file, finding in zip(files, findings, strict=True):
        for reason in finding.reasons:
            # Without its numbers, names and remedy.
            kind = finding.verdict, re.sub(r"\d[\d.]*", "#", re.split(r": | \(| as ", reason)[0])
            counts[kind] += 1
            examples.setdefault(kind, (reason, file))
    return [
        (count, verdict, *examples[verdict, kind])
        for (verdict, kind), count in counts.most_common()
    ]


def usable(findings: Sequence[Finding]) -> pd.DataFrame:
    """Make a table of the files that can be used, one in each row."""
    table = pd.DataFrame([vars(found) for found in findings if found.verdict != "bad"])
    if table.empty:
        return table
    table["short_side"] = table[["width", "height"]].min(axis=1)
    table = table.astype(dict.fromkeys((*MEASURES, "width", "height", "bytes"), float))
    table.loc[table["fps"].isna(), "key_frame_distance"] = np.nan  # an image has them by name alone
    return table


def _totals(table: pd.DataFrame) -> dict[str, str]:
    sizes = Counter(zip(table["width"], table["height"], strict=True))
    (width, height), most = sizes.most_common(1)[0]
    codecs = Counter(table["codec"]).most_common(4)
    totals = {
        "usable": f"{len(table)} files, {table['duration'].sum() / 3600:.2f} hours, "
        f"{table['num_frames'].sum():.0f} frames, {tqdm.format_sizeof(table['bytes'].sum())}B",
        "sizes": f"{len(sizes)}; {width:g} x {height:g} in {most} files",
        "codecs": ", ".join(f"{codec} {count}" for codec, count in codecs),
    }
    named = {"num_frames": "frames", "short_side": "short side", "fps": "frames/s"}
    for name, title in (named | {"key_frame_distance": "key frames"}).items():
        if (values := table[name]).count():
            spread = f"{values.min():g} to {values.max():g}"
            totals[title] = f"{values.median():g} (median), {spread}"
    return totals


def plot(findings: Sequence[Finding], title: str) -> Figure:
    """Plot verdicts, and histograms of the files that can be used."""
    table = usable(findings)
    known = [name for name in MEASURES if name in table and table[name].count()]
    shown = [n for n in known if table[n].max() > (1 + ALIKE) * table[n].min()]
    alike = [f"{MEASURES[n].lower()} {table[n].max():.4g}" for n in known if n not in shown]
    columns = min(3, 1 + len(shown))
    rows = -(-(1 + len(shown)) // columns)
    figure = Figure(figsize=(max(9.2, 4.6 * columns), 0.6 + 3.0 * rows), layout="constrained")
    heading = "\n".join([title, "all alike: " + ", ".join(alike)] if alike else [title])
    figure.suptitle(heading, fontsize=9)
    axes = figure.add_subplot(rows, columns, 1, title="Files by verdict")
    counts = Counter(finding.verdict for finding in findings)
    bars = axes.barh(VERDICTS, [counts[verdict] for verdict in VERDICTS], color=COLOURS)
    axes.bar_label(bars, [f"{counts[v]} ({counts[v] / len(findings):.1%})" for v in VERDICTS])
    axes.margins(x=0.3)
    for place, name in enumerate(shown, start=2):
        values = table[name].dropna()
        median, low, high = values.median(), values.min(), values.max()
        title = f"{MEASURES[name]}, median {median:.4g}"
        axes = figure.add_subplot(rows, columns, place, title=title, ylabel="files")
        is_wide = low > 0 and high > WIDE * low
        if is_wide:
            axes.set_xscale("log")
        axes.hist(values, bins=np.geomspace(low, high, BINS + 1).tolist() if is_wide else BINS)
        axes.axvline(median, color="tab:orange")
    return figure
