"""Progress of a long job: a bar on a terminal, elsewhere a line at intervals."""

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 20.0


class ProgressBar:
    """The number of things that are done, the speed, and the time left."""

    def __init__(
        self, total: int, things: str, unit: str = "", *, first: int = 0, silent: bool = False
    ) -> None:
        """``things``: their name in the plural; ``unit``: of the speed, where not of things.

        ``first``: things that were done before.
        """
        self._bar = tqdm(
            total=total,
            initial=first,
            dynamic_ncols=True,
            disable=silent or not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}% |{bar:12}| {n}/{total} [{remaining} left{postfix}]",
        )
        self._total, self._first, self._done = total, first, first
        self._things, self._unit, self._amount = things, unit or f"{things}/s", 0.0
        self._logs = self._bar.disable and not silent
        self._began = self._last_line = time.monotonic()

    def advance(self, amount: float = 1.0, *, is_last: bool = True, note: str = "") -> None:
        """Add an amount in units of the speed, and with ``is_last`` one of the things."""
        self._amount += amount
        speed = self._amount / max(time.monotonic() - self._began, 1e-9)
        self.count(int(is_last))
        self.show(f"{speed:.3g} {self._unit}" + (f", {note}" if note else ""))

    def count(self, things: int = 1) -> None:
        """Add things that are done."""
        self._done += things
        self._bar.update(things)

    def show(self, text: str, *, at_once: bool = False) -> None:
        """Show ``text`` on the bar, or where there is none in a line: when due, or ``at_once``."""
        self._bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        if self._logs and (at_once or now - self._last_line > SECONDS_BETWEEN_LINES):
            done, left = self._done - self._first, "?"
            if done:
                seconds = (now - self._began) / done
                left = tqdm.format_interval((self._total - self._done) * seconds)
            log.info("%d/%d %s, %s, %s left", self._done, self._total, self._things, text, left)
            self._last_line = now

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()
