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
    return read_lines(run / "metrics.jsonl")


def measures_of(lines: Sequence[dict[str, Any]], num_classes: int = 0) -> Rows:
    """Tabulate validation measures: name, before the first update, now, baseline.

    The baseline is the best ranking that needs no model, the mean of each patch, or chance.
    """
    found: dict[str, list[float]] = {}
    for line in lines:
        if line["kind"] in ("validation", "probe"):
            for name, value in line.items():
                if name not in ("kind", "update", "epoch"):
                    found.setdefault(name, []).append(float(value))
    last = {name: values[-1] for name, values in found.items()}
    return [
        (
            name,
            f"{values[0]:.3g}" if len(values) > 1 else "",
            f"{values[-1]:.3g}",
            _baseline(name, last, num_classes),
        )
        for name, values in found.items()
        if "ranking_by_" not in name
    ]


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
    """Tabulate updates, training clips, and the hours that the updates took."""
    done, hours = 0, 0.0
    for line in lines:
        if "clips_per_second" in line:
            clips = (line["update"] - done) * clips_per_update
            hours += clips / max(line["clips_per_second"], 1e-9) / 3600
            done = line["update"]
    if not done:
        return []
    return [
        ("updates", f"{done:,}"),
        ("training clips", f"{done * clips_per_update:,}"),
        ("hours of the updates", f"{hours:.3g}"),
    ]
