"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.console import EXIT_CODES, add_dry_run, interpreter, run_processes, shortest
from hpm_video.runs.dry_run import plan_pretraining
from hpm_video.runs.pretraining import pretrain
from hpm_video.runs.run import open_manifest
from hpm_video.training.distributed import Processes


def main(command_line: Sequence[str] | None = None) -> int:
    """Run, and tell what came of it."""
    parser = argparse.ArgumentParser(
        description="Pre-train by hard patches mining, or as a plain masked autoencoder.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a file of configs/pretrain")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_dry_run(parser)
    arguments = parser.parse_intermixed_args(command_line)

    def command(processes: Processes) -> None:
        config = load_config(PretrainConfig, arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(plan_pretraining(config, arguments.processes))
            return
        run_dir = pretrain(config, processes)
        if processes.is_first:
            tell_results(run_dir, config)

    return run_processes(command)


def tell_results(run_dir: Path, config: PretrainConfig) -> None:
    """Where everything is, and what to do next."""
    best = run_dir / "checkpoints" / "best"
    checkpoint = best if best.exists() else run_dir / "checkpoints" / "last"
    rows = {
        "checkpoint": checkpoint,
        "config": run_dir / "config.yaml",
        "metrics": run_dir / "metrics.jsonl",
        "TensorBoard": run_dir / "tensorboard",
        "curves": run_dir / "curves.png",
        "pictures": run_dir / "pictures",
        **{path.stem: path for path in sorted(run_dir.glob("bad_files*.csv"))},
    }
    print("\nDone. The run left:")
    for name, path in rows.items():
        if path.exists():
            print(f"  {name:18}{path}")
    print("\nNext, see what it finds hard:")
    print(f"  {interpreter()} tools/show_masks.py {checkpoint} {example_video(config)}")


def example_video(config: PretrainConfig) -> str:
    """A held-out video, or a word for one."""
    if config.data.validation is None:
        return "VIDEO"
    return shortest(open_manifest(config.data, config.data.validation).files[0])


if __name__ == "__main__":
    sys.exit(main())
