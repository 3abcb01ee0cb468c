"""Being asked to stop: by a scheduler (SIGTERM) or at the keyboard (Ctrl-C)."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
"""75 is EX_TEMPFAIL of sysexits.h: the state is saved, start the same command again."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run obeyed
    """The run was asked to stop and has saved its state."""

    def __init__(self, number: signal.Signals, update: int) -> None:
        super().__init__(f"stopped by {number.name} before update {update}")
        self.exit_code = EXIT_CODES[number]


class StopRequest:
    """The first signal that asked for a stop."""

    received: signal.Signals | None = None


@contextmanager
def listen_for_stop(*, patient: bool = False) -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that the loop reads between two updates.

    ``patient``: to be asked twice is no reason to give up, as by a scheduler and by a launcher.
    """
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        if request.received is not None and not patient:
            signal.signal(number, signal.SIG_DFL)  # asked twice: do not wait for the next update
            signal.raise_signal(number)
        request.received = request.received or signal.Signals(number)

    before = {number: signal.signal(number, note) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # Who passes it on late must not kill a process that is leaving with its state saved.
            late = patient and request.received is not None
            signal.signal(number, signal.SIG_IGN if late else handler)
