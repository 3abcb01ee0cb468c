"""Measure speed: python tools/bench.py COMMAND [OPTIONS].

Alternatives take turns, and medians are shown. Ratios carry over to other machines; times do not.

commands (COMMAND --help says more):
  update    whole updates: configs, precisions, compiled or eager, and the parts of an update
  gpu       the updates in docs/speed.md, on a GPU, in about five minutes
  loader    speed of data loading, phase by phase, and whether a run would wait for data
  decoding  ways to make clips from a video
  losses    time and memory of the ranking loss
  fidelity  what cheaper updates save, and how close they come to exact ones
"""

import sys
from collections.abc import Sequence

from hpm_video.runs.console import make_parser

COMMANDS = ("update", "gpu", "loader", "decoding", "losses", "fidelity")


def main(command_line: Sequence[str] | None = None) -> int:
    """Run a measurement. -> the exit code"""
    words = sys.argv[1:] if command_line is None else command_line
    if words and words[0] in COMMANDS:
        from bench_commands import run_command  # type: ignore[import-not-found] # beside this file

        code: int = run_command(words)
        return code
    parser = make_parser(__doc__, None)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    parser.parse_args(words)
    return 2


if __name__ == "__main__":
    sys.exit(main())
