"""What the files of a checked manifest are like: in words, and as a picture of histograms."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hpm_video.data.manifest import VERDICTS
from hpm_video.preparation.findings import Finding

INK = "#1c1c20"
FAINT_INK = "#6e6e78"
BLUE, ORANGE, GREEN = "#1f5fa8", "#d1602f", "#3c8d5a"
REASONS_TOLD = 8
BINS = 40
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
WIDE = 30.0
"""The largest value as a multiple of the smallest from which on an axis is logarithmic."""
OF_VERDICT = dict(zip(VERDICTS, (GREEN, "#d9a21b", "#b3312c"), strict=True))


class Reason(NamedTuple):
    """A kind of reason, and one file that it was found with."""

    times: int
    verdict: str
    example: str
    file: str


def summary(files: Sequence[str], findings: Sequence[Finding]) -> str:
    """What was found, in some lines. ``files``: of the findings, one for each row."""
    counts = Counter(finding.verdict for finding in findings)
    lines = [", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)]
    reasons = common_reasons(files, findings)
    for reason in reasons[:REASONS_TOLD]:
        lines += [
            f"  {reason.times:6} {reason.verdict}: {reason.example}",
            f"         {reason.file}",
        ]
    if len(reasons) > REASONS_TOLD:
        rest = sum(reason.times for reason in reasons[REASONS_TOLD:])
        lines.append(f"  {rest:6} others: see the column reason")
    usable = [finding for finding in findings if finding.verdict != "bad"]
    if usable:
        lines += _totals(usable)
    return "\n".join(lines)


def common_reasons(files: Sequence[str], findings: Sequence[Finding]) -> list[Reason]:
    """Each kind of reason with how often it occurs, the commonest first."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for file, finding in zip(files, findings, strict=True):
        for reason in finding.reasons:
            kind = finding.verdict, _kind(reason)
            counts[kind] += 1
            examples.setdefault(kind, (reason, file))
    return [Reason(count, kind[0], *examples[kind]) for kind, count in counts.most_common()]


def _kind(reason: str) -> str:
    """A reason without its numbers, names and remedy."""
    return re.sub(r"\d[\d.]*", "#", re.split(r": | \(| as ", reason)[0])


def _totals(usable: Sequence[Finding]) -> list[str]:
    frames = _measured(usable)["Length in frames"]
    hours = _known([finding.duration for finding in usable]).sum() / 3600
    size = _known([finding.bytes for finding in usable]).sum()
    sizes = Counter((finding.width, finding.height) for finding in usable)
    (width, height), most = sizes.most_common(1)[0]
    kinds = Counter(finding.codec for finding in usable)
    totals = {
        "usable": f"{len(usable)} files, {hours:.2f} hours, {int(frames.sum())} frames, "
        f"{_bytes(size)}",
        "frames": f"{int(np.median(frames))} (median), {_range(frames)}",
        "sizes": f"{len(sizes)}; {width} x {height} in {most} files",
        "codecs": ", ".join(f"{codec} {count}" for codec, count in kinds.most_common(4)),
    }
    measured = _measured(usable)
    for name, title in {
        "short side": "Short side in pixels",
        "frames/s": "Frames per second",
        "key frames": "Key-frame distance",
    }.items():
        if title in measured:
            values = measured[title]
            totals[name] = f"{np.median(values):.4g} (median), {_range(values)}"
    return [f"  {name:12}{value}" for name, value in totals.items()]


def _known(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _bytes(count: float) -> str:
    unit, name = next((pair for pair in _UNITS if count >= pair[0]), _UNITS[-1])
    return f"{count / unit:.3g} {name}"


def _range(values: NDArray[np.float64]) -> str:
    return f"{values.min():.4g} to {values.max():.4g}"


def _measured(usable: Sequence[Finding]) -> dict[str, NDArray[np.float64]]:
    """The numbers that are known of files, by what they are: each (K,)"""
    videos = [finding for finding in usable if finding.fps]  # an image has key frames by name alone
    known = {
        "Length in frames": _known([finding.num_frames for finding in usable]),
        "Length in seconds": _known([finding.duration for finding in usable]),
        "Short side in pixels": _known(
            [min(found.width, found.height) for found in usable if found.width and found.height]
        ),
        "Frames per second": _known([finding.fps for finding in videos]),
        "Key-frame distance": _known([finding.key_frame_distance for finding in videos]),
    }
    return {name: values for name, values in known.items() if len(values)}


def plot(findings: Sequence[Finding], title: str) -> Figure:
    """Histograms of lengths, sizes and rates of the files that can be used, and the verdicts."""
    shown = _measured([finding for finding in findings if finding.verdict != "bad"])
    columns = min(3, 1 + len(shown))
    rows = -(-(1 + len(shown)) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14)
    figure = Figure(figsize=(4.6 * columns, 0.4 + 3.0 * rows), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=FAINT_INK)
    _draw_verdicts(figure.add_subplot(rows, columns, 1), findings)
    for place, (name, values) in enumerate(shown.items(), start=2):
        _draw_histogram(figure.add_subplot(rows, columns, place), name, values)
    return figure


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", dpi=110)


def _set_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT_INK)
    axes.tick_params(colors=FAINT_INK, labelsize=9.5)
    axes.set_axisbelow(True)


def _draw_verdicts(axes: Axes, findings: Sequence[Finding]) -> None:
    _set_axes(axes, "Files by verdict")
    counts = Counter(finding.verdict for finding in findings)
    numbers = [counts[verdict] for verdict in VERDICTS]
    bars = axes.barh(VERDICTS, numbers, color=[OF_VERDICT[verdict] for verdict in VERDICTS])
    told = [f"{number} ({number / len(findings):.1%})" for number in numbers]
    axes.bar_label(bars, told, padding=4, fontsize=9.5, color=INK)
    axes.set_xlim(0, 1.35 * max(numbers))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=10.5)


def _draw_histogram(axes: Axes, name: str, values: NDArray[np.float64]) -> None:
    _set_axes(axes, name)
    axes.grid(axis="y", color="#e6e6ea", linewidth=0.8)
    low, high = values.min(), values.max()
    is_wide = low > 0 and high > WIDE * low
    if is_wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        edges = np.geomspace(low, high, BINS + 1)
    else:
        spare = max((high - low) / 20, abs(low) / 20, 1e-3)
        edges = np.linspace(low - spare, high + spare, BINS + 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.hist(values, bins=edges.tolist(), color=BLUE)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylabel("files", color=FAINT_INK)
    median = float(np.median(values))
    axes.axvline(median, color=ORANGE, linewidth=1.4)
    axes.annotate(
        f"median {median:.4g}",
        (0.98, 1.02),
        xycoords="axes fraction",
        ha="right",
        fontsize=9.5,
        color=ORANGE,
    )
