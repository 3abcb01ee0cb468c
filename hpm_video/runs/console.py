"""Command lines and exit codes of the programs in ``tools/``.

Modules that take long to import are imported after the command line is read: torch takes seconds,
for which neither a help text nor the error for a misspelt option should have to wait.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.contrib.logging import logging_redirect_tqdm

from hpm_video.decoding.registry import decoder_choices
from hpm_video.files.errors import ExpectedError
from hpm_video.files.plugins import PluginError, load_plugins
from hpm_video.files.printing import printable, safe_output
from hpm_video.training.stop import Interrupted

if TYPE_CHECKING:
    from hpm_video.training.distributed import Processes

FAULT = 1
WRONG_INPUT = 2


def exit_codes(
    done: str = "success",
    wrong_input: str = "wrong input, or files that do not decode; the message says which",
    *others: str,
) -> str:
    """List the exit codes of a program. ``others``: further lines."""
    lines = [f"0    {done}", "1    an internal error", f"2    {wrong_input}", *others]
    lines.append("75   a run was stopped by SIGTERM: repeat the command to resume it")
    lines.append("130  stopped by Ctrl-C: repeat the command\n")
    return "\n  ".join(["exit codes:", *lines])


EXIT_CODES = exit_codes()


@safe_output()
def run(command: Callable[[], None]) -> int:
    """Run ``command``, and report errors. -> the exit code, see ``EXIT_CODES``"""
    from torch import OutOfMemoryError

    from hpm_video.training.distributed import is_first_process, lost_contact

    level = logging.INFO if is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    try:
        with logging_redirect_tqdm():
            command()
    except Interrupted as stop:
        if is_first_process():
            sys.stdout.write(f"\n{stop}; the state is saved. Repeat the command to resume.\n")
        return stop.exit_code
    except KeyboardInterrupt:
        sys.stdout.write("\nstopped\n")
        return 130
    except (ExpectedError, OSError, OutOfMemoryError) as error:
        fewer = "Take fewer clips: engine.micro_batch, test.clips_per_pass or --clips-per-pass.\n"
        _tell(f"\nerror: {error}\n{fewer if isinstance(error, OutOfMemoryError) else ''}")
        return WRONG_INPUT
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        reason = str(error).strip().splitlines()[0]
        _tell(f"\nlost the connection to another process of this job ({reason})\n")
        return FAULT
    return 0


def run_processes(command: Callable[[Processes], None]) -> int:
    """Run ``command`` in each of the processes that a launcher started. -> the exit code"""
    from hpm_video.training import distributed

    def joined() -> None:
        with distributed.joined_processes() as processes:
            command(processes)

    try:
        code = run(joined)
    except Exception:
        if not distributed.is_one_of_several():
            raise
        traceback.print_exc()
        code = FAULT
    if code in (FAULT, WRONG_INPUT) and distributed.is_one_of_several():
        # To end as usual may wait for the others, who wait for this one.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        if distributed.is_first_process():  # it can still be asked whether a message was printed
            time.sleep(2)
        os._exit(code)
    return code


def _tell(message: str) -> None:
    from hpm_video.training.distributed import first_to_say

    if first_to_say(message):
        sys.stderr.write(printable(message))


def make_parser(about: str | None, exit_codes: str = EXIT_CODES) -> argparse.ArgumentParser:
    """Load plugins, whose names options may have, and make a parser with ``about`` as its help."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=exit_codes, formatter_class=form)
    try:
        load_plugins()
    except PluginError as error:
        parser.error(str(error))
    return parser


def add_config(parser: argparse.ArgumentParser, which: str) -> None:
    """Add a config, described by ``which``, and overrides. Read with ``parse_intermixed_args``."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help=which)
    changes = "overrides of the config, such as recipe.epochs=100"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=changes)


def parse_training(
    about: str | None, command_line: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the command line of a program that trains from a config."""
    parser = make_parser(about)
    add_config(parser, "name (k400_hpm_b) or path of a config")
    plan = "print the plan of the batch and the memory that it needs on GPUs, and exit"
    parser.add_argument("--dry-run", action="store_true", help=plan)
    of_dry_run = parser.add_argument_group("with --dry-run")
    add = of_dry_run.add_argument
    add("--processes", type=positive, default=1, metavar="N", help="GPUS x NNODES (default 1)")
    files = "number of training files (of the main source), if you have no list of them yet"
    add("--files", type=positive, metavar="N", help=files)
    speed = "clips per second of all processes (tools/bench.py update measures them for one)"
    add("--clips-per-second", type=above_zero, metavar="N", help=f"{speed}: adds hours")
    return parser.parse_intermixed_args(command_line)


def train(about: str | None, command_line: Sequence[str] | None, *, finetunes: bool) -> int:
    """Run the program that pre-trains, or that fine-tunes and tests. -> the exit code"""
    arguments = parse_training(about, command_line)
    from hpm_video.config.loading import load_config
    from hpm_video.config.schema import FinetuneConfig, PretrainConfig
    from hpm_video.runs.autotune import describe_run
    from hpm_video.runs.finetuning import Finetuning, describe_evaluation, evaluate_run
    from hpm_video.runs.pretraining import Pretraining
    from hpm_video.runs.run import run as run_task

    def command(processes: Processes) -> None:
        schema = FinetuneConfig if finetunes else PretrainConfig
        config = load_config(schema, arguments.config, arguments.overrides)
        task = Finetuning(config) if isinstance(config, FinetuneConfig) else Pretraining(config)
        if arguments.dry_run:
            sizes = (arguments.processes, arguments.files, arguments.clips_per_second)
            sys.stdout.write(f"{describe_run(task, *sizes)}\n")
            return
        run_dir = run_task(task, processes)
        best = run_dir / "checkpoints" / "best"
        checkpoint, tool = best if best.exists() else best.with_name("last"), "show_masks"
        if isinstance(config, FinetuneConfig):
            checkpoint, tool = best.with_name(config.test.checkpoint), "predict"
            result = evaluate_run(config, run_dir, processes)
            if result is not None and processes.is_first:
                files = f"result.json, predictions.csv and confusion.png are in {result['folder']}"
                sys.stdout.write(f"\nTested {describe_evaluation(result)}\n{files}\n")
        if processes.is_first:
            sys.stdout.write(f"\nDone. The run on one page: {run_dir / 'report.html'}\n")
            sys.stdout.write(f"Next: python tools/{tool}.py {shortest(checkpoint)} VIDEO\n")

    return run_processes(command)


def shortest(path: Path | str) -> str:
    """Return a path for a command line, relative if it lies in the working directory."""
    path = Path(path)
    is_below = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if is_below else path))


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Make a parser of whole numbers in a range."""
    allowed = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, got {text!r}")
        return int(text)

    return parse


positive, not_negative = whole_number(1), whole_number(0)


def above_zero(text: str) -> float:
    """Parse a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def parse_views(text: str) -> tuple[int, int]:
    """Parse views such as ``5x3``: 5 clips of each video, and 3 crops of each clip."""
    found = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text)
    if found is None:
        rule = "views are clips x crops, at least 1x1, such as 5x3"
        raise argparse.ArgumentTypeError(f"{rule}; got {text!r}")
    return int(found[1]), int(found[2])


SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"default": "auto", "help": "auto (default), cpu, cuda, cuda:1, mps"},
    "precision": {
        "choices": ("auto", "fp32", "bf16"),
        "default": "auto",
        "help": "auto (default): bf16 on a GPU that is made for it, otherwise fp32",
    },
    "decoder": {"default": "auto", "help": "auto (default): the preferred one of those installed"},
    "workers": {"type": not_negative, "metavar": "N", "help": "decoding processes"},
    "views": {"type": parse_views, "metavar": "CLIPSxCROPS", "help": "per video, such as 5x3"},
    "output": {"type": Path},
    "root": {"type": Path, "help": "start of relative paths; default: the manifest's folder"},
    "seconds": {
        "type": above_zero,
        "default": 60.0,
        "metavar": "LIMIT",
        "help": "give up a file after so many seconds without progress (default 60)",
    },
    "memory": {
        "type": above_zero,
        "default": 4.0,
        "metavar": "GIB",
        "help": "memory limit of a decoding process, in GiB (default 4)",
    },
}


def add_options(parser: argparse.ArgumentParser, *names: str, **changed: dict[str, Any]) -> None:
    """Add shared options. ``changed``: settings that differ from the shared ones."""
    for name in (*names, *changed):
        choices: dict[str, Any] = {"choices": decoder_choices()} if name == "decoder" else {}
        parser.add_argument(f"--{name}", **SHARED_OPTIONS[name] | choices | changed.get(name, {}))
