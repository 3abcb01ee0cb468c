"""What was found out about a file, as columns of a manifest."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hpm_video.data.manifest import VERDICTS, Listing, Verdict

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
_DIGITS = {"duration": 3, "fps": 4}
"""Behind the point, of columns that hold real numbers."""
_OF_A_FILE = tuple(
    each.name for each in fields(Finding) if each.name not in ("verdict", "reasons", "limits")
)
COLUMNS = (*_OF_A_FILE, "verdict", "reason")
"""In a manifest, behind those that it had."""


def columns_of(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Findings, one for each row, as cells."""
    columns: dict[str, list[str]] = {
        name: [_cell(name, getattr(finding, name)) for finding in findings]
        for name in (*_OF_A_FILE, "verdict")
    }
    return columns | {"reason": [BETWEEN_REASONS.join(found.reasons) for found in findings]}


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{_DIGITS[name]}f}" if isinstance(value, float) else str(value)


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


def _from_cells(cells: Mapping[str, str]) -> Finding:
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
        name: cell if name in _TEXT else float(cell) if name in _DIGITS else int(cell)
        for name, cell in cells.items()
        if cell and name in _OF_A_FILE
    }
    if verdict == "suspicious" and not reasons:
        verdict = "fine"
    return Finding(verdict, reasons, **values)
