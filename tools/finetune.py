"""Fine-tune for action recognition: python tools/finetune.py CONFIG [section.key=value ...]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.runs.console import EXIT_CODES, add_dry_run, interpreter, run_processes, shortest
from hpm_video.runs.dry_run import plan_finetuning
from hpm_video.runs.finetuning import describe_evaluation, evaluate_run, finetune
from hpm_video.runs.run import open_manifest
from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Fine-tune, test, and tell what came of it."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a pre-trained encoder for classification, then test it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a file of configs/finetune or configs/probe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_dry_run(parser)
    arguments = parser.parse_intermixed_args(command_line)

    def command(processes: Processes) -> None:
        config = load_config(FinetuneConfig, arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(plan_finetuning(config, arguments.processes))
            return
        run_dir = finetune(config, processes)
        result = evaluate_run(config, run_dir, processes)
        if processes.is_first:
            tell_results(run_dir, config, result)

    return run_processes(command)


def tell_results(run_dir: Path, config: FinetuneConfig, result: dict[str, Any] | None) -> None:
    """The accuracies, where everything is, and what to do next."""
    if result is not None:
        print(f"\nTested {describe_evaluation(result)}")
    checkpoint = run_dir / "checkpoints" / config.test.checkpoint
    rows = {
        "checkpoint": checkpoint,
        "config": run_dir / "config.yaml",
        "metrics": run_dir / "metrics.jsonl",
        "curves": run_dir / "curves.png",
        "files not decoded": run_dir / "bad_files.csv",
    }
    if result is not None:
        folder = Path(result["folder"])
        rows |= {
            "result": folder / "result.json",
            "of each video": folder / "predictions.csv",
            "confusion matrix": folder / "confusion.png",
        }
    print("\nDone. The run left:")
    for name, path in rows.items():
        if path.exists():
            print(f"  {name:18}{path}")
    print("\nNext, let it name the action in a video:")
    print(f"  {interpreter()} tools/predict.py {shortest(checkpoint)} {example_video(config)}")


def example_video(config: FinetuneConfig) -> str:
    """A held-out video, or a word for one."""
    source = config.test.manifest or config.data.validation
    return shortest(open_manifest(config.data, source).files[0]) if source else "VIDEO"


if __name__ == "__main__":
    sys.exit(main())
