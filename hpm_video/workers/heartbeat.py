"""When long work in a process says that it is still at it."""

import time

SECONDS_BETWEEN_STEPS = 0.5


class Beat:
    """Says when it is time to say something."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is a while since it last was."""
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_STEPS:
            return False
        self._last = now
        return True
