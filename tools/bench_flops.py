"""Count the multiply-adds of one clip's update from the shapes: bench.py flops CONFIG ...

Forward and backward pass of the student, and the teacher, in an epoch in which it scores.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpm_video.config.loading import load_any_config
from hpm_video.runs.cost import count_gmac


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("config", type=Path, nargs="+", metavar="CONFIG", help="such as configs/pretrain/demo.yaml")
    changes = "changes of all the configs, such as data.num_frames=8"
    add("--set", nargs="+", default=[], metavar="section.key=value", help=changes)


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, Sequence[dict[str, Any]]]]:
    """Make one table, with a row for each config."""
    rows = []
    for path in arguments.config:
        student, teacher = count_gmac(load_any_config(path, arguments.set))
        rows.append({"config": path.stem, "student": student, "teacher": teacher})
    yield "GMAC per clip and update", rows
