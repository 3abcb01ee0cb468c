"""Programs that were renamed. Their old names say so until the next version."""

import shlex
import sys
from pathlib import Path

NAMES = {
    "bench_decoding": "bench.py decoding",
    "bench_loader": "bench.py loader",
    "bench_ranking_loss": "bench.py losses",
    "bench_update": "bench.py update",
    "launch_hosts": "launch.py --hostfile",
}
GONE = {
    "scaling": "docs/scaling.md has its tables, and --dry-run prints the memory of a run",
    "bench_worker_memory": "docs/speed.md has what it measured",
    "compare_decoders": "docs/decoders.md has what it found, and tests/decoding tests readers",
}


def tell() -> None:
    """Print the new command line, or where the findings of a program are. Ends with code 2."""
    old = Path(sys.argv[0])
    if old.stem in GONE:
        told = f"is gone: {GONE[old.stem]}"
    else:
        command = f"python {old.parent}/{NAMES[old.stem]} {shlex.join(sys.argv[1:])}"
        told = f"has a new name: {command.strip()}"
    sys.stderr.write(f"error: {old.name} {told}\n")
    sys.exit(2)
