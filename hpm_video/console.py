"""How a program of ``tools/`` ends: one message for a wrong input, and an exit code."""

import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from hpm_video.config import ConfigError
from hpm_video.data.dataset import TooManyBadFiles
from hpm_video.data.decode import DecodeError, DecoderError
from hpm_video.data.manifest import ManifestError
from hpm_video.evaluation import BadTestFilesError
from hpm_video.training.checkpoint import CheckpointError
from hpm_video.training.device import DeviceError
from hpm_video.training.interruption import Interrupted
from hpm_video.training.metrics import NonFiniteLossError

WRONG_INPUT = 2
EXPECTED = (
    BadTestFilesError,
    CheckpointError,
    ConfigError,
    DecodeError,
    DecoderError,
    DeviceError,
    ManifestError,
    NonFiniteLossError,
    OSError,
    TooManyBadFiles,
)
EXIT_CODES = """exit codes:
  0    it is done
  1    a fault of this program
  2    a wrong input: the message says which, and what to do
  75   stopped by SIGTERM, the state is saved: start the same command again
  130  stopped by Ctrl-C, the state is saved: start the same command again
"""


def run(command: Callable[[], None]) -> int:
    """Run ``command``, and tell what came of it. -> the exit code, see ``EXIT_CODES``"""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        with logging_redirect_tqdm():
            command()
    except Interrupted as stop:
        sys.stdout.write(f"\n{stop}; the state is saved. Go on with the same command.\n")
        return stop.exit_code
    except KeyboardInterrupt:
        sys.stdout.write("\nstopped\n")
        return 130
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"\nerror: {error}\nTake fewer clips per pass (engine.micro_batch).\n")
        return WRONG_INPUT
    except EXPECTED as error:
        sys.stderr.write(f"\nerror: {error}\n")
        return WRONG_INPUT
    return 0


def interpreter() -> str:
    """How to start this Python again, as short as it goes."""
    program = Path(sys.executable)
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    path = os.environ.get("PYTHONPATH")
    return f"PYTHONPATH={shlex.quote(path)} {program}" if path else str(program)


def shortest(path: Path | str) -> str:
    """A path for a command line: relative to the working directory if it lies in there."""
    path = Path(path)
    return shlex.quote(
        str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    )
