"""Safe printing of text from other people's files, on a terminal and in tables for people."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = re.compile(r"\s*[=+@-]")


def printable(text: str) -> str:
    """Escape characters that control a terminal, except line breaks and tabs, and surrogates."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def harmless(cell: object) -> object:
    """Put an apostrophe before the text of a cell if a spreadsheet would compute it."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


class SafeOutput:
    """Standard output without control characters; the program continues if nobody reads it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or nothing if nobody reads it any more."""
        self._try(lambda: self._stream.write(printable(text)))
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BrokenPipeError:
            closed, nowhere = os.fstat(self._stream.fileno()), os.open(os.devnull, os.O_WRONLY)
            for number in (1, 2):  # standard errors often go the same way
                if os.path.samestat(closed, os.fstat(number)):
                    os.dup2(nowhere, number)


@contextmanager
def safe_output() -> Iterator[None]:
    """Print through :class:`SafeOutput`; where a stream was closed before the start, nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - until the end
    stream: Any = SafeOutput(sys.stdout)
    with redirect_stdout(stream):
        yield
