"""Fine-tune for classification, then test: python tools/finetune.py CONFIG [section.key=value ...].

Starts from a pre-trained encoder, or from another classifier.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hpm_video.config.schema import FinetuneConfig
from hpm_video.runs.console import example_video, interpreter, list_files, shortest, train
from hpm_video.runs.evaluation import describe_evaluation, evaluate_run
from hpm_video.runs.finetuning import Finetuning
from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Fine-tune, test, and report the results."""
    return train(__doc__, FinetuneConfig, Finetuning, test_and_report, command_line)


def test_and_report(run_dir: Path, config: FinetuneConfig, processes: Processes) -> None:
    """Test, and report accuracies, the files of the run, and the next step."""
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
    video = example_video(config.data, config.test.manifest or config.data.validation)
    print(f"  {interpreter()} tools/predict.py {shortest(checkpoint)} {video}")


if __name__ == "__main__":
    sys.exit(main())
