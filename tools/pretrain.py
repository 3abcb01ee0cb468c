"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...]."""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from hpm_video.config import ConfigError, PretrainConfig, load_config
from hpm_video.data.dataset import TooManyBadFiles
from hpm_video.data.decode import DecodeError, DecoderError
from hpm_video.data.manifest import ManifestError, read_manifest
from hpm_video.pretrain import pretrain
from hpm_video.training.checkpoint import CheckpointError
from hpm_video.training.device import DeviceError
from hpm_video.training.interruption import Interrupted
from hpm_video.training.metrics import NonFiniteLossError

EXPECTED = (
    ConfigError,
    ManifestError,
    DecodeError,
    DecoderError,
    DeviceError,
    TooManyBadFiles,
    CheckpointError,
    NonFiniteLossError,
    OSError,
)
EXIT_CODES = """exit codes:
  0    the run is complete
  1    a fault of this program
  2    a wrong input: the message says which, and what to do
  75   stopped by SIGTERM, the state is saved: start the same command again
  130  stopped by Ctrl-C, the state is saved: start the same command again
"""


def main() -> int:
    """Run, and tell what came of it."""
    parser = argparse.ArgumentParser(
        description="Pre-train by hard patches mining, or as a plain masked autoencoder.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a file of configs/pretrain")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        config = load_config(PretrainConfig, arguments.config, arguments.overrides)
        with logging_redirect_tqdm():
            run_dir = pretrain(config)
    except Interrupted as stop:
        print(f"\n{stop}; the state is saved. Go on with the same command.")
        return stop.exit_code
    except KeyboardInterrupt:
        print("\nstopped before the first update")
        return 130
    except torch.OutOfMemoryError as error:
        print(f"\nerror: {error}\nTake a smaller engine.micro_batch.", file=sys.stderr)
        return 2
    except EXPECTED as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    tell_results(run_dir, config)
    return 0


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
        "files not decoded": run_dir / "bad_files.csv",
    }
    print("\nDone. The run left:")
    for name, path in rows.items():
        if path.exists():
            print(f"  {name:18}{path}")
    print("\nNext, see what it finds hard in a video:")
    print(f"  {interpreter()} tools/show_masks.py {checkpoint} {example_video(config)}")


def interpreter() -> str:
    """How to start this Python again, as short as it goes."""
    program = Path(sys.executable)
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    path = os.environ.get("PYTHONPATH")
    return f"PYTHONPATH={shlex.quote(path)} {program}" if path else str(program)


def example_video(config: PretrainConfig) -> str:
    """A held-out video, or a word for one."""
    if config.data.validation is None:
        return "VIDEO"
    path = Path(read_manifest(config.data.validation, config.data.root).files[0])
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


if __name__ == "__main__":
    sys.exit(main())
