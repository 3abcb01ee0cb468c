"""Fine-tune for classification, then test: python tools/finetune.py CONFIG [section.key=value ...].

Starts from a pre-trained encoder, or from another classifier.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import describe_end, parse_training, train

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
    """Test, and report accuracies, where the results are, and the next step."""
    from hpm_video.runs.finetuning import describe_evaluation, evaluate_run

    result = evaluate_run(config, run_dir, processes)
    if not processes.is_first:
        return
    if result is not None:
        print(f"\nTested {describe_evaluation(result)}")
        print(f"result.json, predictions.csv and confusion.png are in {result['folder']}")
    print(describe_end(run_dir, run_dir / "checkpoints" / config.test.checkpoint, "predict"))


if __name__ == "__main__":
    sys.exit(main())
