"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...].

With hard patches mining, or as a plain masked autoencoder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.console import example_video, interpreter, list_files, train
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Run, and report the results."""
    return train(__doc__, PretrainConfig, Pretraining, report_results, command_line)


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
    video = example_video(config.data, config.data.validation)
    print(f"  {interpreter()} tools/show_masks.py {checkpoint} {video}")


if __name__ == "__main__":
    sys.exit(main())
