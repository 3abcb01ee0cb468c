"""Measure speed: python tools/bench.py COMMAND ... (COMMAND --help says more).

update    time of whole updates: configs, precisions, compiled or eager, and their parts
gpu       the updates in docs/speed.md, on a GPU, in about five minutes
loader    speed of data loading, phase by phase, and whether a run would wait for data
decoding  time of clips and views by file and decoder
losses    time and memory of the ranking loss
flops     multiply-adds of an update, counted from the shapes
fidelity  what cheaper updates save, and how close they come to exact ones
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import cleandoc
from typing import Any

from hpm_video.files.atomic import write_json
from hpm_video.runs.console import add_options, make_parser, run

MODULES = {"loader": "bench_data", "decoding": "bench_data", "fidelity": "bench_fidelity"}
MODULES |= dict.fromkeys(("update", "gpu", "losses", "flops"), "bench_update")
"""Where each command is: beside this file."""


def main(command_line: Sequence[str] | None = None) -> int:
    """Measure, print tables, and write them to --output if it is given. -> the exit code"""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("command", choices=MODULES, metavar="COMMAND", help="one of the commands above")
    add("options", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    given = parser.parse_args(command_line)
    module = import_module(MODULES[given.command])  # which imports torch
    bench = getattr(module, f"bench_{given.command}")
    of_command = make_parser(cleandoc(bench.__doc__))
    of_command.prog = f"{parser.prog} {given.command}"
    getattr(module, f"{given.command}_options")(of_command)
    add_options(of_command, output={"metavar": "FILE.json", "help": "file to write the tables to"})
    arguments = of_command.parse_intermixed_args(given.options)
    return run(lambda: measure(bench, arguments))


def measure(bench: Callable[[argparse.Namespace], Any], arguments: argparse.Namespace) -> None:
    """Print the tables of a command, each when it is measured, and write them."""
    import pandas as pd

    tables = {}
    for title, rows in bench(arguments):
        print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format='%.2f')}")
        tables[title] = rows
    if arguments.output is not None:
        write_json(arguments.output, tables)


if __name__ == "__main__":
    sys.exit(main())
