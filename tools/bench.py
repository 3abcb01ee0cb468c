"""Measure speed: python tools/bench.py COMMAND [OPTIONS].

Alternatives take turns, and medians are shown: ratios hold on other machines, times do not.

commands (COMMAND --help says more):
  update    whole updates of pre-training: configs, precisions, compiled or not, and their parts
  gpu       all that docs/speed.md states of a GPU, in a few minutes
  loader    what the loader gives, phase by phase, and whether a run would wait for it
  decoding  ways to make clips out of a video
  losses    time and memory of the ranking loss
  fidelity  what cheaper updates save, and how near they come to the exact one
"""

import sys
from collections.abc import Sequence

from hpm_video.runs.console import make_parser

COMMANDS = ("update", "gpu", "loader", "decoding", "losses", "fidelity")


def main(command_line: Sequence[str] | None = None) -> int:
    """Measure. -> the exit code"""
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
