"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...].

With hard patches mining, or as a plain masked autoencoder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpm_video.runs.console import list_files, next_step, parse_training, train

if TYPE_CHECKING:
    from hpm_video.config.schema import PretrainConfig
    from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Run, and report the results."""
    arguments = parse_training(__doc__, command_line)
    from hpm_video.config.schema import PretrainConfig
    from hpm_video.runs.pretraining import Pretraining

    return train(arguments, PretrainConfig, Pretraining, report_results)


def report_results(run_dir: Path, config: PretrainConfig, processes: Processes) -> None:
    """Report the files of the run, and the next step."""
    if not processes.is_first:
        return
    best = run_dir / "checkpoints" / "best"
    checkpoint = best if best.exists() else run_dir / "checkpoints" / "last"
    bad_files = {path.stem: path for path in sorted(run_dir.glob("bad_files*.csv"))}
    pictures = {"TensorBoard": run_dir / "tensorboard", "pictures": run_dir / "pictures"}
    print(list_files(run_dir, checkpoint, pictures | bad_files))
    print("\nNext, see what it finds hard:")
    print(next_step("show_masks", checkpoint, config.data, config.data.validation))


if __name__ == "__main__":
    sys.exit(main())
