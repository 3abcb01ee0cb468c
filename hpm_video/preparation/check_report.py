"""What the files of a checked manifest are like: in words, and as histograms."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from hpm_video.data.manifest import VERDICTS
from hpm_video.preparation.findings import Finding

REASONS_TOLD = 8
BINS = 40
WIDE = 30.0
"""The largest value as a multiple of the smallest from which on an axis is logarithmic."""
COLOURS = ("tab:green", "tab:orange", "tab:red")
"""Of the verdicts."""


def summary(files: Sequence[str], findings: Sequence[Finding]) -> str:
    """What was found, in some lines. ``files``: of the findings, one for each row."""
    counts = Counter(finding.verdict for finding in findings)
    lines = [", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)]
    reasons = common_reasons(files, findings)
    for times, verdict, reason, file in reasons[:REASONS_TOLD]:
        lines += [f"  {times:6} {verdict}: {reason}", f"         {file}"]
    if len(reasons) > REASONS_TOLD:
        rest = sum(times for times, *_ in reasons[REASONS_TOLD:])
        lines.append(f"  {rest:6} others: see the column reason")
    usable = [finding for finding in findings if finding.verdict != "bad"]
    if usable:
        lines += [f"  {name:12}{value}" for name, value in _totals(usable).items()]
    return "\n".join(lines)


def common_reasons(
    files: Sequence[str], findings: Sequence[Finding]
) -> list[tuple[int, str, str, str]]:
    """Each kind of reason, the commonest first: how often, the verdict, an example, its file."""
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


def _totals(usable: Sequence[Finding]) -> dict[str, str]:
    hours = sum(finding.duration or 0 for finding in usable) / 3600
    size = sum(finding.bytes or 0 for finding in usable)
    sizes = Counter((finding.width, finding.height) for finding in usable)
    (width, height), most = sizes.most_common(1)[0]
    codecs = Counter(finding.codec for finding in usable).most_common(4)
    measured = _measured(usable)
    frames = measured["Length in frames"]
    totals = {
        "usable": f"{len(usable)} files, {hours:.2f} hours, {int(frames.sum())} frames, "
        f"{tqdm.format_sizeof(size)}B",
        "frames": f"{int(np.median(frames))} (median), {frames.min():.4g} to {frames.max():.4g}",
        "sizes": f"{len(sizes)}; {width} x {height} in {most} files",
        "codecs": ", ".join(f"{codec} {count}" for codec, count in codecs),
    }
    for name, title in {
        "short side": "Short side in pixels",
        "frames/s": "Frames per second",
        "key frames": "Key-frame distance",
    }.items():
        if title in measured:
            values = measured[title]
            totals[name] = (
                f"{np.median(values):.4g} (median), {values.min():.4g} to {values.max():.4g}"
            )
    return totals


def _measured(usable: Sequence[Finding]) -> dict[str, NDArray[np.float64]]:
    """The numbers that are known of files, by what they are: each (K,)"""
    videos = [finding for finding in usable if finding.fps]  # an image has key frames by name alone
    columns: dict[str, Sequence[float | None]] = {
        "Length in frames": [finding.num_frames for finding in usable],
        "Length in seconds": [finding.duration for finding in usable],
        "Short side in pixels": [
            min(found.width, found.height) for found in usable if found.width and found.height
        ],
        "Frames per second": [finding.fps for finding in videos],
        "Key-frame distance": [finding.key_frame_distance for finding in videos],
    }
    known = {
        name: np.array([value for value in values if value is not None], dtype=np.float64)
        for name, values in columns.items()
    }
    return {name: values for name, values in known.items() if len(values)}


def plot(findings: Sequence[Finding], title: str) -> Figure:
    """Histograms of lengths, sizes and rates of the files that can be used, and the verdicts."""
    shown = _measured([finding for finding in findings if finding.verdict != "bad"])
    columns = min(3, 1 + len(shown))
    rows = -(-(1 + len(shown)) // columns)
    figure = Figure(figsize=(4.6 * columns, 0.4 + 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.add_subplot(rows, columns, 1, title="Files by verdict")
    counts = Counter(finding.verdict for finding in findings)
    bars = axes.barh(VERDICTS, [counts[verdict] for verdict in VERDICTS], color=COLOURS)
    axes.bar_label(bars, [f"{counts[v]} ({counts[v] / len(findings):.1%})" for v in VERDICTS])
    axes.margins(x=0.3)
    for place, (name, values) in enumerate(shown.items(), start=2):
        median, low, high = float(np.median(values)), values.min(), values.max()
        axes = figure.add_subplot(rows, columns, place, title=f"{name}, median {median:.4g}")
        axes.set_ylabel("files")
        is_wide = low > 0 and high > WIDE * low
        if is_wide:
            axes.set_xscale("log")
        bins = np.geomspace(low, high, BINS + 1).tolist() if is_wide else BINS
        axes.hist(values, bins=bins)
        axes.axvline(median, color="tab:orange")
    return figure
