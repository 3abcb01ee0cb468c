"""Write the report of a run, one HTML file: python tools/report.py RUN ..."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hpm_video.runs.console import make_parser, run


def main(command_line: Sequence[str] | None = None) -> int:
    """Write the reports, and print their paths. -> the exit code"""
    parser = make_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    arguments = parser.parse_args(command_line)

    def write() -> None:
        from hpm_video.runs.report import write_report

        for folder in arguments.runs:
            print(f"wrote {write_report(folder)}")

    return run(write)


if __name__ == "__main__":
    sys.exit(main())
