"""Does pre-training pay? python tools/compare_pretraining.py CONFIG [section.key=value ...].

Trains a classifier from the weights of the config and from scratch, on the same videos with the
same schedule, at several learning rates, seeds and numbers of labels, and tests each. Each start is
judged at the learning rate with its best mean over seeds; as that is chosen on the test videos,
both are a little optimistic. An interrupted comparison resumes where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from hpm_video.config.checks import ConfigError
from hpm_video.data.manifest import Manifest, write_manifest
from hpm_video.files.atomic import write_json
from hpm_video.runs import console

if TYPE_CHECKING:
    from hpm_video.config.schema import FinetuneConfig

STARTS = ("pretrained", "scratch")


@dataclass(frozen=True)
class Trial:
    """One run of the comparison, and what it reached."""

    start: str
    labels: int  # videos of each class; 0: all that there are
    base_lr: float
    seed: int
    top1: float = float("nan")

    @property
    def name(self) -> str:
        return f"{self.start}-{self.labels or 'all'}-lr{self.base_lr:g}-seed{self.seed}"


def main(command_line: Sequence[str] | None = None) -> int:
    """Run what was not run yet, and print the comparison."""
    parser = console.make_parser(__doc__, console.EXIT_CODES)
    console.add_config(parser, "a file of configs/finetune or configs/probe")
    add, count = parser.add_argument, console.not_negative
    labels = "videos per class; 0 (default): all"
    add("--labels", type=count, nargs="+", default=[0], metavar="N", help=labels)
    rates = "default: 1/2, 1 and 2 times the config's"
    add("--base-lrs", type=console.above_zero, nargs="+", metavar="LR", help=rates)
    seeds = "of the runs (default 0 1 2)"
    add("--seeds", type=count, nargs="+", default=[0, 1, 2], metavar="N", help=seeds)
    updates = "per run; default: the config's epochs"
    add("--updates", type=console.positive, metavar="N", help=updates)
    add("--starts", nargs="+", choices=STARTS, default=STARTS, help="default: both")
    console.add_options(parser, output={"required": True, "help": "folder of the runs"})
    arguments = parser.parse_intermixed_args(command_line)
    return console.run(lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> None:
    """Run all trials, then print and write the comparison.

    Raises:
        ConfigError: the config has no weights to start from, or no videos to test on.
        And what ``finetune`` and ``evaluate_run`` raise.
    """
    from hpm_video.config.loading import load_config
    from hpm_video.config.schema import FinetuneConfig
    from hpm_video.runs.data import open_manifest

    config = load_config(FinetuneConfig, arguments.config, arguments.overrides)
    if config.init_weights is None or (config.test.manifest or config.data.validation) is None:
        raise ConfigError(
            "a comparison needs init_weights, and videos to test on: data.validation or "
            "test.manifest"
        )
    labels = open_manifest(config.data, config.data.train, "data.train").labels
    if max(arguments.labels) > (least := min(Counter(labels).values())):
        raise ConfigError(
            f"--labels must be at most the videos of the smallest class, {least}, got "
            f"{max(arguments.labels)}"
        )
    base_lrs = arguments.base_lrs or [config.recipe.base_lr * share for share in (0.5, 1, 2)]
    trials = [
        run_trial(config, Trial(start, labels, base_lr, seed), arguments.output, arguments.updates)
        for seed in arguments.seeds
        for labels in arguments.labels
        for base_lr in base_lrs
        for start in arguments.starts
    ]
    print(f"\n{table(trials)}")
    write_json(arguments.output / "comparison.json", [asdict(trial) for trial in trials])
    print(f"\nwrote {arguments.output / 'comparison.json'}")


def run_trial(config: FinetuneConfig, trial: Trial, output: Path, updates: int | None) -> Trial:
    """Train and test, or look up what was found before. -> the trial with its accuracy"""
    from hpm_video.runs.data import open_manifest
    from hpm_video.runs.evaluation import evaluate_run
    from hpm_video.runs.finetuning import finetune

    train, recipe = config.data.train, replace(config.recipe, base_lr=trial.base_lr)
    manifest = open_manifest(config.data, train, "data.train")
    count = len(manifest)
    if trial.labels:
        train = str(output / f"train-{trial.labels}-seed{trial.seed}.csv")
        count = write_few(manifest, trial.labels, trial.seed, Path(train))
    if updates is not None:
        epochs = -(-updates * recipe.batch_size // count)
        warmup = recipe.warmup_epochs / recipe.epochs * epochs
        recipe = replace(recipe, epochs=epochs, warmup_epochs=warmup)
    own = replace(
        config,
        output_dir=str(output / trial.name),
        seed=trial.seed,
        init_weights=config.init_weights if trial.start == "pretrained" else None,
        data=replace(config.data, train=train),
        recipe=recipe,
    )
    print(f"\n== {trial.name}", flush=True)
    result = evaluate_run(own, finetune(own))
    assert result is not None
    print(f"top-1 {result['top1']:.3f}", flush=True)
    return replace(trial, top1=result["top1"])


def write_few(manifest: Manifest, count: int, seed: int, path: Path) -> int:
    """Write a manifest of ``count`` videos of each class, the same for the same seed. -> videos"""
    from hpm_video.randomness import generator

    chosen: list[int] = []
    for label in sorted(set(manifest.labels)):
        places = [i for i, other in enumerate(manifest.labels) if other == label]
        order = generator("few labels", seed, label).permutation(len(places))
        chosen += sorted(places[i] for i in order[:count])
    names = manifest.label_names or [str(label) for label in range(max(manifest.labels) + 1)]
    rows = [(manifest.files[i], manifest.labels[i], names[manifest.labels[i]]) for i in chosen]
    write_manifest(pd.DataFrame(rows, columns=["path", "label", "label_name"]), path)
    return len(chosen)


def table(trials: Sequence[Trial]) -> str:
    """Mean over seeds at each learning rate, and each start at the best of its own."""
    frame = pd.DataFrame([asdict(trial) for trial in trials])
    frame["labels"] = frame["labels"].replace(0, "all")
    by_rate = frame.groupby(["labels", "start", "base_lr"], sort=False)["top1"]
    rows = by_rate.agg(["mean", list]).reset_index()
    best = rows.groupby(["labels", "start"])["mean"].idxmax()
    rows[""] = ["<- best" if row in [*best] else "" for row in rows.index]
    rows["list"] = [" ".join(f"{top1:.3f}" for top1 in found) for found in rows["list"]]
    return rows.rename(columns={"list": "top-1 of each seed"}).to_string(
        index=False, formatters={"base_lr": "{:.2g}".format, "mean": "{:.3f}".format}
    )


if __name__ == "__main__":
    sys.exit(main())
