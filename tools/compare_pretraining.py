"""Does pre-training pay? python tools/compare_pretraining.py CONFIG [section.key=value ...].

Trains a classifier from the weights of the config and from scratch, on the same videos with the
same schedule, at several learning rates and seeds, and tests each. Each start is judged at the
learning rate with its best mean over seeds; as that is chosen on the test videos, both are a little
optimistic. An interrupted comparison resumes where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pandas as pd

from hpm_video.config.checks import ConfigError
from hpm_video.files.atomic import write_json
from hpm_video.runs import console


def main(command_line: Sequence[str] | None = None) -> int:
    """Run what was not run yet, and print the comparison."""
    parser = console.make_parser(__doc__)
    console.add_config(parser, "a file of configs/finetune or configs/probe")
    add = parser.add_argument
    rates = "base learning rates; default: 1/2, 1 and 2 times the config's"
    add("--base-lrs", type=console.above_zero, nargs="+", metavar="LR", help=rates)
    seeds = "seeds of the runs (default 0 1 2)"
    add("--seeds", type=console.not_negative, nargs="+", default=[0, 1, 2], metavar="N", help=seeds)
    console.add_options(parser, output={"required": True, "help": "folder of the runs"})
    arguments = parser.parse_intermixed_args(command_line)
    return console.run(lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> None:
    """Fine-tune and test from both starts, then print and write the comparison."""
    from hpm_video.config.loading import load_config
    from hpm_video.config.schema import FinetuneConfig
    from hpm_video.runs.finetuning import evaluate_run, finetune

    config = load_config(FinetuneConfig, arguments.config, arguments.overrides)
    if config.init_weights is None or (config.test.manifest or config.data.validation) is None:
        raise ConfigError(
            "a comparison needs init_weights, and videos to test on: data.validation or "
            "test.manifest"
        )
    base_lrs = arguments.base_lrs or [config.recipe.base_lr * share for share in (0.5, 1, 2)]
    starts, trials = {"pretrained": config.init_weights, "scratch": None}, []
    for seed, base_lr, start in product(arguments.seeds, base_lrs, starts):
        name = f"{start}-lr{base_lr:g}-seed{seed}"
        own = replace(
            config,
            output_dir=str(arguments.output / name),
            seed=seed,
            init_weights=starts[start],
            recipe=replace(config.recipe, base_lr=base_lr),
        )
        print(f"\n== {name}", flush=True)
        result = evaluate_run(own, finetune(own))
        assert result is not None
        print(f"top-1 {result['top1']:.3f}", flush=True)
        trials.append({"start": start, "base_lr": base_lr, "seed": seed, "top1": result["top1"]})
    table = pd.DataFrame(trials).pivot_table("top1", ["start", "base_lr"], "seed")
    table["mean"] = table.mean(axis=1)
    best = {*table.groupby("start")["mean"].idxmax()}
    table[""] = ["<- best" if row in best else "" for row in table.index]
    print(f"\ntop-1 of each seed\n{table.to_string(float_format='%.3f')}")
    path = arguments.output / "comparison.json"
    write_json(path, trials)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    sys.exit(main())
