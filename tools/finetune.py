"""Fine-tune for classification, then test: python tools/finetune.py CONFIG [section.key=value ...].

Starts from a pre-trained encoder, or from another classifier.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import list_files, next_step, parse_training, train

if TYPE_CHECKING:
    from hpm_video.config.schema import FinetuneConfig
    from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Fine-tune, test, and report the results."""
    arguments = parse_training(__doc__, command_line)
    from hpm_video.config.schema import FinetuneConfig
    from hpm_video.runs.finetuning import Finetuning

    return train(arguments, FinetuneConfig, Finetuning, test_and_report)


def test_and_report(run_dir: Path, config: FinetuneConfig, processes: Processes) -> None:
    """Test, and report accuracies, the files of the run, and the next step."""
    from hpm_video.runs.evaluation import describe_evaluation, evaluate_run

    result = evaluate_run(config, run_dir, processes)
    if not processes.is_first:
        return
    checkpoint = run_dir / "checkpoints" / config.test.checkpoint
    files = {"files not decoded": run_dir / "bad_files.csv"}
    if result is not None:
        print(f"\nTested {describe_evaluation(result)}")
        folder = Path(result["folder"])
        files |= {
            "result": folder / "result.json",
            "of each video": folder / "predictions.csv",
            "confusion matrix": folder / "confusion.png",
        }
    print(list_files(run_dir, checkpoint, files))
    print("\nNext, let it name the action in a video:")
    manifest = config.test.manifest or config.data.validation
    print(next_step("predict", checkpoint, config.data, manifest))


if __name__ == "__main__":
    sys.exit(main())
