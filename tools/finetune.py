"""Fine-tune for classification, then test: python tools/finetune.py CONFIG [section.key=value ...].

Starts from a pre-trained encoder, or from another classifier.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import parse_training, train

if TYPE_CHECKING:
    from hpm_video.config.schema import FinetuneConfig
    from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Fine-tune, test, and report the results."""
    arguments = parse_training(__doc__, command_line)
    from hpm_video.config.schema import FinetuneConfig
    from hpm_video.runs.finetuning import Finetuning

    return train(arguments, FinetuneConfig, Finetuning, test_and_report)


def test_and_report(
    run_dir: Path, config: FinetuneConfig, processes: Processes
) -> tuple[str, Path]:
    """Test, and report the results. -> the tool to try next, and its checkpoint"""
    from hpm_video.runs.evaluation import describe_evaluation, evaluate_run

    result = evaluate_run(config, run_dir, processes)
    if result is not None and processes.is_first:
        print(f"\nTested {describe_evaluation(result)}")
        print(f"result.json, predictions.csv and confusion.png are in {result['folder']}")
    return "predict", run_dir / "checkpoints" / config.test.checkpoint


if __name__ == "__main__":
    sys.exit(main())
