"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...].

With hard patches mining, or as a plain masked autoencoder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import describe_end, parse_training, train

if TYPE_CHECKING:
    from hpm_video.config.schema import PretrainConfig
    from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Run, and report the results."""
    arguments = parse_training(__doc__, command_line)
    from hpm_video.config.schema import PretrainConfig
    from hpm_video.runs.pretraining import Pretraining

    return train(arguments, PretrainConfig, Pretraining, report_results)


def report_results(run_dir: Path, _config: PretrainConfig, processes: Processes) -> None:
    """Report where the results are, and the next step."""
    if processes.is_first:
        best = run_dir / "checkpoints" / "best"
        checkpoint = best if best.exists() else run_dir / "checkpoints" / "last"
        print(describe_end(run_dir, checkpoint, "show_masks"))


if __name__ == "__main__":
    sys.exit(main())
