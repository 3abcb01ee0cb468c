"""What a run did and reached, read from its directory: for its report and its model card."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpm_video.training.metrics import read_lines

Rows = list[tuple[str, ...]]


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run; none without ``metrics.jsonl``. Raises MetricsError."""
    path = run / "metrics.jsonl"
    return read_lines(path) if path.is_file() else []


def measures_of(lines: Sequence[dict[str, Any]], num_classes: int = 0) -> Rows:
    """Tabulate validation measures: name, before the first update, now, baseline.

    The baseline is the best ranking that needs no model, the mean of each patch, or chance.
    """
    measured = [line for line in lines if line["kind"] in ("validation", "probe")]
    found: dict[str, list[float]] = {}
    for line in measured:
        for name in line.keys() - {"kind", "update", "epoch"}:
            found.setdefault(name, []).append(float(line[name]))
    last = {name: values[-1] for name, values in found.items()}
    rows: Rows = []
    for name in {name: None for line in measured for name in line}:
        if name in found and "ranking_by_" not in name:
            before = f"{found[name][0]:.3g}" if len(found[name]) > 1 else ""
            rows.append((name, before, f"{last[name]:.3g}", _baseline(name, last, num_classes)))
    return rows


def _baseline(name: str, last: dict[str, float], num_classes: int) -> str:
    source, slash, measure = name.rpartition("/")
    if measure in ("student_ranking", "teacher_ranking"):
        prefix = f"{source}{slash}{measure.removeprefix('teacher_')}_by_"
        others = [value for other, value in last.items() if other.startswith(prefix)]
        return f"{max(others, default=0.5):.3g}"
    if measure in ("top1", "knn_top1") and num_classes:
        return f"{1 / num_classes:.3g}"
    return "1" if measure == "relative_error" else ""


def tests_of(run: Path) -> Rows:
    """Tabulate the tests of a classifier: name and accuracies."""
    rows: Rows = []
    for path in sorted(run.glob("test/*/result.json")):
        with suppress(ValueError):  # it was cut off
            result = json.loads(path.read_text(encoding="utf-8"))
            tops = [f"{name} {result[name]:.3g}" for name in ("top1", "top5") if name in result]
            rows.append((path.parent.name, ", ".join(tops)))
    return rows


def starts_of(run: Path) -> list[dict[str, Any]]:
    """Return the starts of a run with what it ran with, without those that were cut off."""
    path, found = run / "starts.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def cost_of(lines: Sequence[dict[str, Any]], clips_per_update: int) -> Rows:
    """Tabulate updates, epochs, clips, and the hours that their updates took."""
    done, hours, epoch = 0, 0.0, 0.0
    for line in lines:
        if line.keys() >= {"clips_per_second", "epoch"}:
            clips = (line["update"] - done) * clips_per_update
            hours += clips / max(line["clips_per_second"], 1e-9) / 3600
            done, epoch = line["update"], line["epoch"]
    if not done:
        return []
    spent = f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"
    return [
        ("updates", f"{done:,} ({epoch:.4g} {'epoch' if epoch == 1 else 'epochs'})"),
        ("training clips", f"{done * clips_per_update:,}"),
        ("time of the updates", spent),
    ]
