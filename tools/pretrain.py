"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...].

With hard patches mining, or as a plain masked autoencoder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import parse_training, train

if TYPE_CHECKING:
    from hpm_video.config.schema import PretrainConfig
    from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Run, and say what to try next."""
    arguments = parse_training(__doc__, command_line)
    from hpm_video.config.schema import PretrainConfig
    from hpm_video.runs.pretraining import Pretraining

    return train(arguments, PretrainConfig, Pretraining, next_step)


def next_step(run_dir: Path, _config: PretrainConfig, _processes: Processes) -> tuple[str, Path]:
    """Return the tool to try next, and its checkpoint."""
    best = run_dir / "checkpoints" / "best"
    return "show_masks", best if best.exists() else best.with_name("last")


if __name__ == "__main__":
    sys.exit(main())
