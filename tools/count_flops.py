"""Compute the cost of an update from the shapes: python tools/count_flops.py CONFIG ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import exit_codes, make_parser, run

if TYPE_CHECKING:
    from hpm_video.config.schema import PretrainConfig


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
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from hpm_video.config.loading import load_any_config
    from hpm_video.config.schema import PretrainConfig
    from hpm_video.models.from_config import build_classifier

    print(f"{'config':24}{'student':>10}{'teacher':>10}   GMAC per clip and update")
    for path in paths:
        config = load_any_config(path, overrides)
        if isinstance(config, PretrainConfig):
            costs = count(config)
        else:
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                model = build_classifier(config, config.model.num_classes or 2)
                # A batch norm needs two clips.
                model(
                    torch.empty(2, config.model.channels, *config.data.clip_size)
                ).sum().backward()
            costs = counter.get_total_flops() / 4e9, 0.0
        shown = [f"{cost:.1f}" if cost >= 10 or not cost else f"{cost:.2f}" for cost in costs]
        print(f"{path.stem:24}{shown[0]:>10}{shown[1]:>10}")


def count(config: PretrainConfig) -> tuple[float, float]:
    """Count GMAC of a clip: forward and backward of the student, and the teacher.

    Averaged over the sources by their weights. A model whose features are the target is not
    counted.
    """
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from hpm_video.mining.objective import thin
    from hpm_video.models.from_config import build_student
    from hpm_video.tokens.masking import TokenMask
    from hpm_video.tokens.views import mask_of_view

    costs = []
    with torch.device("meta"):
        model = build_student(config)
        for name, source in config.sources.items():
            rule, clip = config.mask_rule(name), torch.empty(1, source.channels, *source.clip_size)
            tokens = rule.grid.num_tokens
            num_masked = rule.num_masked * tokens // rule.num_units
            mask = TokenMask.from_masked(torch.ones(1, tokens).bool(), num_masked)
            mask = thin(mask, torch.zeros(1).long(), config.mining.decoded_share, "")
            seen = mask_of_view(config.mining.teacher_sees, rule.grid, "meta")
            with FlopCounterMode(display=False) as student:
                prediction = model(clip, mask)
                outputs = [prediction.content, prediction.difficulty]
                torch.stack([each.sum() for each in outputs if each is not None]).sum().backward()
            with FlopCounterMode(display=False) as teacher, torch.no_grad():
                if rule.strategy.picks:
                    model.score(model.encode(clip, mask=seen), rule.grid, seen)
                elif config.mining.target == "ema":
                    model.encode(clip)
            costs.append([each.get_total_flops() / 2e9 for each in (student, teacher)])
    of_student, of_teacher = np.average(costs, axis=0, weights=config.weights)
    return of_student, of_teacher


if __name__ == "__main__":
    sys.exit(main())
