"""Fine-tune for action recognition: python tools/finetune.py CONFIG [section.key=value ...]."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.runs.console import (
    example_video,
    interpreter,
    list_files,
    parse_run,
    run_processes,
    shortest,
)
from hpm_video.runs.dry_run import describe_run
from hpm_video.runs.evaluation import describe_evaluation, evaluate_run
from hpm_video.runs.finetuning import Finetuning
from hpm_video.runs.run import run
from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Fine-tune, test, and tell what came of it."""
    arguments = parse_run(
        "Fine-tune a pre-trained encoder for classification, then test it.",
        "a file of configs/finetune or configs/probe",
        command_line,
    )

    def command(processes: Processes) -> None:
        config = load_config(FinetuneConfig, arguments.config, arguments.overrides)
        task = Finetuning(config)
        if arguments.dry_run:
            print(describe_run(task, arguments.processes))
            return
        run_dir = run(task, processes)
        result = evaluate_run(config, run_dir, processes)
        if processes.is_first:
            tell_results(run_dir, config, result)

    return run_processes(command)


def tell_results(run_dir: Path, config: FinetuneConfig, result: dict[str, Any] | None) -> None:
    """The accuracies, where everything is, and what to do next."""
    if result is not None:
        print(f"\nTested {describe_evaluation(result)}")
    checkpoint = run_dir / "checkpoints" / config.test.checkpoint
    files = {"files not decoded": run_dir / "bad_files.csv"}
    if result is not None:
        folder = Path(result["folder"])
        files |= {
            "result": folder / "result.json",
            "of each video": folder / "predictions.csv",
            "confusion matrix": folder / "confusion.png",
        }
    print(list_files(run_dir, checkpoint, files))
    print("\nNext, let it name the action in a video:")
    video = example_video(config.data, config.test.manifest or config.data.validation)
    print(f"  {interpreter()} tools/predict.py {shortest(checkpoint)} {video}")


if __name__ == "__main__":
    sys.exit(main())
