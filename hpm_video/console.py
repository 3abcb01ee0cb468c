"""What the programs of ``tools/`` share: kinds of arguments, and how they end."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from hpm_video.config import ConfigError
from hpm_video.data.dataset import TooManyBadFiles, Views
from hpm_video.data.decode import DecodeError, DecoderError
from hpm_video.data.manifest import ManifestError
from hpm_video.evaluation import BadTestFilesError
from hpm_video.logistic import NotConvergedError
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
    NotConvergedError,
    OSError,
    TooManyBadFiles,
)
EXIT_CODES = """exit codes:
  0    it is done
  1    a fault of this program
  2    a wrong input: the message says which, and what to do
  75   stopped by SIGTERM, the state is saved: start the same command again
  130  stopped by Ctrl-C, the state is saved: start the same command again
torchrun turns any but 0 into 1.
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
        remedy = "engine.micro_batch, test.clips_per_pass or --clips-per-pass"
        sys.stderr.write(f"\nerror: {error}\nTake fewer clips per pass: {remedy}.\n")
        return WRONG_INPUT
    except EXPECTED as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes one tells
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


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """An argument that is a whole number from 0 on."""
    return 0 if text == "0" else positive(text)


def parse_views(text: str) -> Views:
    """An argument such as ``5x3``: 5 clips of each video, and 3 crops of each clip."""
    clips, _, crops = text.partition("x")
    try:
        return Views(positive(clips), positive(crops))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"views are clips x crops, at least 1x1, such as 5x3; got {text!r}"
        ) from None
