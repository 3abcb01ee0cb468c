"""Compute the cost of an update from the shapes: python tools/count_flops.py CONFIG ..."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.runs.console import make_parser, run
from hpm_video.tokens.masking import TokenMask


def main() -> int:
    """Print the multiply-adds of one clip's update by each config. -> the exit code"""
    parser = make_parser(__doc__, None)
    parser.add_argument("config", type=Path, nargs="+", help="such as configs/pretrain/demo.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    arguments = parser.parse_args()
    return run(lambda: print_costs(arguments.config, arguments.set))


def print_costs(paths: Sequence[Path], overrides: Sequence[str]) -> None:
    """Print a line for each config."""
    print(f"{'config':24}{'student':>10}{'teacher':>10}   GMAC per clip and update")
    for path in paths:
        config = load_any_config(path, overrides)
        costs = count(config) if isinstance(config, PretrainConfig) else count_classifier(config)
        shown = [f"{cost:.1f}" if cost >= 10 or not cost else f"{cost:.2f}" for cost in costs]
        print(f"{path.stem:24}{shown[0]:>10}{shown[1]:>10}")


def count(config: PretrainConfig) -> tuple[float, float]:
    """Count GMAC of a clip: forward and backward of the student, and the teacher.

    Averaged over the sources by their weights. A model whose features are the target is not
    counted.
    """
    with torch.device("meta"):
        model = build_student(config)
        costs = [count_source(config, model, source) for source in config.sources]
    student, teacher = np.average(costs, axis=0, weights=config.weights)
    return student, teacher


def count_source(
    config: PretrainConfig, model: MaskedAutoencoder, source: str
) -> tuple[float, float]:
    """Count the same for a clip of one source."""
    rule = config.mask_rule(source)
    clip = torch.empty(1, config.model.channels, *config.sources[source].clip_size)
    num_masked = rule.num_masked * rule.grid.num_tokens // rule.num_units
    mask = TokenMask.from_masked(torch.ones(1, rule.grid.num_tokens).bool(), num_masked)
    from hpm_video.mining.objective import thin
    from hpm_video.tokens.views import mask_of_view

    mask = thin(mask, torch.zeros(1).long(), config.mining.decoded_share, "")
    seen = mask_of_view(config.mining.teacher_sees, rule.grid, "meta")
    with FlopCounterMode(display=False) as student:
        prediction = model(clip, mask)
        total = prediction.content.sum()
        if prediction.difficulty is not None:
            total = total + prediction.difficulty.sum()
        total.backward()
    with FlopCounterMode(display=False) as teacher, torch.no_grad():
        if rule.strategy.picks:
            model.score(model.encode(clip, mask=seen), rule.grid, seen)
        elif config.mining.target == "ema":
            model.encode(clip)
    return student.get_total_flops() / 2e9, teacher.get_total_flops() / 2e9


def count_classifier(config: FinetuneConfig) -> tuple[float, float]:
    """Count GMAC of a clip: forward and backward. There is no teacher."""
    with torch.device("meta"):
        model = build_classifier(config, config.model.num_classes or 2)
        clips = torch.empty(2, config.model.channels, *config.data.clip_size)  # for a batch norm
        with FlopCounterMode(display=False) as counter:
            model(clips).sum().backward()
    return counter.get_total_flops() / len(clips) / 2e9, 0.0


if __name__ == "__main__":
    sys.exit(main())
