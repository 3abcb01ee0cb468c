"""Files that are complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, renamed at the end, so that ``path`` is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside_path = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield beside_path
        beside_path.replace(path)
    finally:
        beside_path.unlink(missing_ok=True)
