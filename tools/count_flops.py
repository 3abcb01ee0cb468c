"""What an update costs, from the shapes: python tools/count_flops.py CONFIG ..."""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.runs.pretraining import mask_rule
from hpm_video.tokens.masking import TokenMask


def main() -> int:
    """Count the multiplications of one clip on a device without memory, and print them."""
    parser = argparse.ArgumentParser(description="Count the multiply-adds of one clip's update.")
    parser.add_argument("config", type=Path, nargs="+")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    arguments = parser.parse_args()
    print(f"{'config':24}{'student':>10}{'teacher':>10}   GMAC per clip and update")
    for path in arguments.config:
        try:
            config = load_any_config(path, arguments.set)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        student, teacher = (
            count(config) if isinstance(config, PretrainConfig) else (count_classifier(config), 0.0)
        )
        print(f"{path.stem:24}{shown(student):>10}{shown(teacher):>10}")
    return 0


def shown(cost: float) -> str:
    """With two decimals where it is small."""
    return f"{cost:.1f}" if cost >= 10 or not cost else f"{cost:.2f}"


def count(config: PretrainConfig) -> tuple[float, float]:
    """Multiply-adds in thousands of millions: forward and backward of the student, the teacher.

    Of a clip of each source, averaged by their weights. A model whose features are the target is
    not counted.
    """
    with torch.device("meta"):
        model = build_student(config)
        costs = [count_source(config, model, source) for source in config.sources]
    shares = [weight / sum(config.weights) for weight in config.weights]
    student, teacher = (
        sum(share * cost for share, cost in zip(shares, part, strict=True))
        for part in zip(*costs, strict=True)
    )
    return student, teacher


def count_source(
    config: PretrainConfig, model: MaskedAutoencoder, source: str
) -> tuple[float, float]:
    """The same of a clip of one source."""
    rule = mask_rule(config, source)
    clip = torch.empty(1, config.model.channels, *config.sources[source].clip_size)
    num_masked = rule.num_masked * rule.grid.num_tokens // rule.num_units
    mask = TokenMask.from_masked(torch.ones(1, rule.grid.num_tokens).bool(), num_masked)
    with FlopCounterMode(display=False) as student:
        prediction = model(clip, mask)
        total = prediction.content.sum()
        if prediction.difficulty is not None:
            total = total + prediction.difficulty.sum()
        total.backward()
    with FlopCounterMode(display=False) as teacher, torch.no_grad():
        if rule.strategy.picks:
            model.score_all(clip)
        elif config.mining.target == "ema":
            model.encode(clip)
    return student.get_total_flops() / 2e9, teacher.get_total_flops() / 2e9


def count_classifier(config: FinetuneConfig) -> float:
    """Multiply-adds in thousands of millions: forward and backward of one clip."""
    with torch.device("meta"):
        model = build_classifier(config, config.model.num_classes or 2)
        clips = torch.empty(2, config.model.channels, *config.data.clip_size)  # for a batch norm
        with FlopCounterMode(display=False) as counter:
            model(clips).sum().backward()
    flops: int = counter.get_total_flops()
    return flops / len(clips) / 2e9


if __name__ == "__main__":
    sys.exit(main())
