"""Compute the cost of an update from the shapes: python tools/count_flops.py CONFIG ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import exit_codes, make_parser, run

if TYPE_CHECKING:
    from hpm_video.config.schema import RunConfig


def main(command_line: Sequence[str] | None = None) -> int:
    """Print the multiply-adds of one clip's update by each config. -> the exit code"""
    parser = make_parser(__doc__, exit_codes())
    add = parser.add_argument
    add("config", type=Path, nargs="+", metavar="CONFIG", help="such as configs/pretrain/demo.yaml")
    changes = "changes of all the configs, such as data.num_frames=8"
    add("--set", nargs="+", default=[], metavar="section.key=value", help=changes)
    arguments = parser.parse_args(command_line)
    return run(lambda: print_costs(arguments.config, arguments.set))


def print_costs(paths: Sequence[Path], overrides: Sequence[str]) -> None:
    """Print a line for each config."""
    from hpm_video.config.loading import load_any_config

    print(f"{'config':24}{'student':>10}{'teacher':>10}   GMAC per clip and update")
    for path in paths:
        costs = count(load_any_config(path, overrides))
        shown = [f"{cost:.1f}" if cost >= 10 or not cost else f"{cost:.2f}" for cost in costs]
        print(f"{path.stem:24}{shown[0]:>10}{shown[1]:>10}")


def count(config: RunConfig) -> tuple[float, float]:
    """Count GMAC of student and teacher, averaged over the sources by their weights."""
    import numpy as np

    from hpm_video.runs.cost import count_flop

    costs = [count_flop(config, source) for source in config.sources]
    of_student, of_teacher = np.average(costs, axis=0, weights=config.weights) / 2e9
    return of_student, of_teacher


if __name__ == "__main__":
    sys.exit(main())
