"""Files that do not decode: one value, one list of them on disk, and the errors that name them."""

import csv
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpm_video.files.errors import ExpectedError
from hpm_video.files.wording import counted

log = logging.getLogger(__name__)

MOST_LISTED = 100  # files that an error names
TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files need not be UTF-8


@dataclass(frozen=True)
class Failure:
    """A file that does not decode, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadFilesError(ExpectedError):
    """Some of many videos do not decode. The message names them, and says what to do."""

    def __init__(
        self, failures: Sequence[Failure], num_files: int, remedy: str, noun: str = "video"
    ) -> None:
        self.failures = tuple(failures)
        rows = [f"  {failure}" for failure in failures[:MOST_LISTED]]
        if len(rows) < len(failures):
            rows.append(f"  and {len(failures) - len(rows)} more")
        do = "does" if len(failures) == 1 else "do"
        first = f"{len(failures)} of {counted(num_files, noun)} {do} not decode:"
        super().__init__("\n".join([first, *rows, remedy]))


class TooManyBadFiles(BadFilesError):  # noqa: N818 - it says what is wrong
    """More files do not decode than the data allows."""

    def __init__(self, failures: Sequence[Failure], num_files: int, max_bad_share: float) -> None:
        remedy = (
            f"data.max_bad_share={max_bad_share:g} allows {tolerated(num_files, max_bad_share)}. "
            "If all fail alike, look at the path (data.root) and the disk; otherwise take them out "
            "of the manifest, encode them anew, or raise data.max_bad_share. Files in the run's "
            "bad_files.csv count too: delete it once they are repaired"
        )
        super().__init__(failures, num_files, remedy, "file")


def tolerated(num_files: int, max_bad_share: float) -> int:
    """How many of ``num_files`` may fail to decode: one at least, unless the share is 0."""
    if max_bad_share == 0:
        return 0
    return max(1, int(num_files * max_bad_share + 1e-6))  # 100 * .29 is 28.999...


class BadFiles:
    """The files of a run that did not decode: each once, in a list on disk."""

    def __init__(
        self, path: Path, *, num_files: int, max_bad_share: float, writes: bool = True
    ) -> None:
        """Open the list, CSV with the columns path and reason, if there is one.

        ``writes``: of several processes that note the same failures, one writes them down.
        Raises an OSError if it is no such list.
        """
        self._path, self._writes = path, writes
        self._num_files, self._max_bad_share = num_files, max_bad_share
        self.failures: dict[str, Failure] = {}  # by path
        if path.exists():
            try:
                with path.open(newline="", **TEXT) as file:
                    rows = [row for row in csv.reader(file) if len(row) == 2][1:]
            except csv.Error as error:
                raise OSError(f"{path} is no list of bad files ({error}); delete it") from error
            self.failures = {name: Failure(name, reason) for name, reason in rows}

    def note(self, failures: Iterable[Failure]) -> None:
        """Write down the failures of a batch. Raises as :meth:`check`."""
        new = {failure.path: failure for failure in failures if failure.path not in self.failures}
        if new and self._writes:
            header = [] if self._path.exists() else [("path", "reason")]
            rows = [(failure.path, failure.reason) for failure in new.values()]
            with self._path.open("a", newline="", **TEXT) as file:
                csv.writer(file).writerows([*header, *rows])
            for number, failure in enumerate(new.values(), start=len(self.failures) + 1):
                log.warning("bad file %d (%s has all): %s", number, self._path.name, failure)
        self.failures |= new
        self.check()

    def check(self) -> None:
        """Raise TooManyBadFiles if there are more bad files than the data allows."""
        if len(self.failures) > tolerated(self._num_files, self._max_bad_share):
            raise TooManyBadFiles([*self.failures.values()], self._num_files, self._max_bad_share)
