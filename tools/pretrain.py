"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...]."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.console import (
    example_video,
    interpreter,
    list_files,
    parse_run,
    run_processes,
)
from hpm_video.runs.dry_run import describe_run
from hpm_video.runs.pretraining import Pretraining
from hpm_video.runs.run import run
from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Run, and tell what came of it."""
    arguments = parse_run(
        "Pre-train by hard patches mining, or as a plain masked autoencoder.",
        "a file of configs/pretrain",
        command_line,
    )

    def command(processes: Processes) -> None:
        config = load_config(PretrainConfig, arguments.config, arguments.overrides)
        task = Pretraining(config)
        if arguments.dry_run:
            print(describe_run(task, arguments.processes))
            return
        run_dir = run(task, processes)
        if processes.is_first:
            tell_results(run_dir, config)

    return run_processes(command)


def tell_results(run_dir: Path, config: PretrainConfig) -> None:
    """Where everything is, and what to do next."""
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
