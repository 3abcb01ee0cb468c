"""How far a long job over many things is: a bar on a terminal, elsewhere a line now and then."""

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 20.0


class ProgressBar:
    """How many things are done, how fast that goes, and how long it may still take."""

    def __init__(self, total: int, things: str, unit: str = "") -> None:
        """``things``: their name in the plural; ``unit``: of the speed, where not of things."""
        self._bar = tqdm(
            total=total,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty() or not total,
            bar_format="{percentage:3.0f}% |{bar:12}| {n}/{total} [{remaining} left{postfix}]",
        )
        self._total = total
        self._things, self._unit = things, unit or f"{things}/s"
        self._amount = 0.0
        self._done = 0
        self._began = self._last_line = time.monotonic()

    def advance(self, amount: float = 1.0, *, is_last: bool = True, note: str = "") -> None:
        """So much is done, in units of the speed, and maybe with it one more of the things.

        ``note``: what else is to be told at this point.
        """
        self._amount += amount
        self._done += is_last
        now = time.monotonic()
        passed = max(now - self._began, 1e-9)
        told = f"{self._amount / passed:.3g} {self._unit}" + (f", {note}" if note else "")
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.update(int(is_last))
        if self._bar.disable and now - self._last_line > SECONDS_BETWEEN_LINES:
            left = (self._total - self._done) * passed / max(self._done, 1)
            until = tqdm.format_interval(left) if self._done else "?"
            log.info("%d/%d %s, %s, %s left", self._done, self._total, self._things, told, until)
            self._last_line = now

    def close(self) -> None:
        """Leave the terminal as it is."""
        self._bar.close()
