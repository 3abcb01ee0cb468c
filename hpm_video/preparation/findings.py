"""What was found out about a file, as columns of a manifest and as lines of a journal."""

import contextlib
import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from typing_extensions import Self

from hpm_video.data.manifest import VERDICTS, Listing, ManifestError, Verdict

BETWEEN_REASONS = "; "
OF_THE_MANIFEST = "the manifest "
"""How a reason begins that is about a row of a manifest and not about the file alone."""


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file has changed."""

    bytes: int | None = None
    """Its size; none where there is no such file."""
    modified: str = ""
    """When it was last written to, UTC."""


@dataclass(frozen=True)
class Finding:
    """What was found out about a file, each a column of a manifest. None: it is not known."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    """Why it is not fine."""
    num_frames: int | None = None
    """Frames that can be read, one after the other from the first on."""
    duration: float | None = None
    """Of these frames, in seconds."""
    fps: float | None = None
    """Frames per second, on average."""
    width: int | None = None
    """Of upright frames."""
    height: int | None = None
    codec: str = ""
    pixel_format: str = ""
    key_frame_distance: int | None = None
    """Frames from one key frame to the next, at most: so many are decoded to get at one."""
    rotation: int | None = None
    """Degrees, clockwise, by which the stored frames are turned to be upright."""
    bytes: int | None = None
    modified: str = ""
    content: str = ""
    """A digest of its size, its beginning and its end: equal where the same file lies twice."""
    decoder: str = ""
    """That tells how many frames training can read; of images ``pillow``."""
    limits: tuple[float, ...] | None = None
    """Where it was given up: the seconds without a frame, the GiB and the seconds in all that it
    had. Not a column."""

    @property
    def stamp(self) -> Stamp:
        """Of the file, when it was looked at."""
        return Stamp(self.bytes, self.modified)


_TEXT = ("codec", "pixel_format", "modified", "content", "decoder")
_REAL = {"duration": 3, "fps": 4}
"""Digits behind the point."""
COLUMNS = (
    "num_frames",
    "duration",
    "fps",
    "width",
    "height",
    "codec",
    "pixel_format",
    "key_frame_distance",
    "rotation",
    "bytes",
    "modified",
    "content",
    "decoder",
    "verdict",
    "reason",
)
"""In a manifest, behind those that it had."""


def columns_of(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Findings, one for each row, as cells."""
    columns: dict[str, list[str]] = {
        name: [_cell(name, getattr(finding, name)) for finding in findings]
        for name in COLUMNS
        if name != "reason"
    }
    return columns | {
        "reason": [BETWEEN_REASONS.join(finding.reasons) for finding in findings],
    }


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{_REAL[name]}f}" if isinstance(value, float) else str(value)


def read_findings(listing: Listing) -> dict[str, Finding]:
    """What a checked manifest says of its files, without what is about its rows; by file.

    Rows that say nothing, or something else, are left out.
    """
    if not {*COLUMNS} - {"decoder"} <= {*listing.table.columns}:  # older ones do not have it
        return {}
    found = {}
    for file, *cells in zip(listing.files, *map(listing.column, COLUMNS), strict=True):
        with contextlib.suppress(ValueError):
            found[file] = _from_cells(dict(zip(COLUMNS, cells, strict=True)))
    return found


def _from_cells(cells: dict[str, str]) -> Finding:
    """Raises ValueError where a cell is not as :func:`columns_of` writes it."""
    verdict = next((known for known in VERDICTS if known == cells["verdict"]), None)
    if verdict is None:
        raise ValueError("no verdict")
    reasons = tuple(
        reason
        for reason in cells["reason"].split(BETWEEN_REASONS)
        if reason and not reason.startswith(OF_THE_MANIFEST)
    )
    values: dict[str, Any] = {
        name: cell if name in _TEXT else float(cell) if name in _REAL else int(cell)
        for name, cell in cells.items()
        if cell and name not in ("verdict", "reason")
    }
    if verdict == "suspicious" and not reasons:
        verdict = "fine"
    return Finding(verdict, reasons, **values)


OF_ALL_FILES = json.dumps({"all files": "again"}) + "\n"
"""The first line of the journal of a check that was to look at all files again."""


class Journal:
    """A file beside a manifest in the making: what is known so far, a line of JSON for each file.

    It survives a kill, which may cut off its last line at most.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        """Open the journal, and read what is there.

        ``again``: only what was found by a check that was to look at all files again, and was
        stopped, counts; the rest is left out. The first line says whose journal it is.

        Raises:
            ManifestError: another process writes it.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("a+", encoding="utf-8")
        try:
            self._claim()
            self.discarded = self._discard() if again else 0
            """Lines of another check that was stopped, and is not gone on with."""
            self.findings = self._read()
        except BaseException:
            self._file.close()
            raise

    def _claim(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ManifestError(
                f"another check writes {self.path}; wait for its end, or give another --out"
            ) from error
        except OSError:  # some network disks have no locks
            return

    def _discard(self) -> int:
        self._file.seek(0)
        first, *others = [*self._file] or [""]
        if first == OF_ALL_FILES:
            return 0
        self._file.truncate(0)
        self._file.write(OF_ALL_FILES)
        self._file.flush()
        return bool(first) + len(others)

    def _read(self) -> dict[str, Finding]:
        self._file.seek(0)
        text = self._file.read()
        if text and text[-1] != "\n":
            self._file.write("\n")
        known = {field.name for field in fields(Finding)}
        found = {}
        for line in text.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                record: Mapping[str, Any] = json.loads(line)
                values = {name: value for name, value in record.items() if name in known}
                values["reasons"] = tuple(values["reasons"])
                values["limits"] = tuple(values["limits"]) if values["limits"] else None
                found[str(record["file"])] = Finding(**values)
        return found

    def note(self, file: str, finding: Finding) -> None:
        """Append what was found out about a file."""
        self._file.write(json.dumps({"file": file} | asdict(finding)) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """It is no longer needed."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
