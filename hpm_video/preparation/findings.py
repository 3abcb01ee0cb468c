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
    """What was found out about a file. None: it is not known.

    But for ``limits`` each is a column of a manifest, which ``tools/check_videos.py`` explains.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    """Why it is not fine."""
    num_frames: int | None = None
    duration: float | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    codec: str = ""
    pixel_format: str = ""
    key_frame_distance: int | None = None
    rotation: int | None = None
    bytes: int | None = None
    modified: str = ""
    content: str = ""
    decoder: str = ""
    limits: tuple[float, ...] | None = None
    """Where it was given up: the seconds without a frame, the GiB and the seconds in all that it
    had."""

    @property
    def stamp(self) -> Stamp:
        """Of the file, when it was looked at."""
        return Stamp(self.bytes, self.modified)

    def cells(self) -> dict[str, str]:
        """The finding as a row of a table."""
        values = {name: getattr(self, name) for name in COLUMNS[:-1]}
        cells = {
            name: f"{value:.{_DIGITS[name]}f}" if isinstance(value, float) else str(value)
            for name, value in values.items()
            if value is not None
        }
        return dict.fromkeys(COLUMNS, "") | cells | {"reason": BETWEEN_REASONS.join(self.reasons)}

    @classmethod
    def of(cls, cells: Mapping[str, str]) -> "Finding":
        """A finding from its row, without what is about the row and not about the file.

        Raises:
            ValueError, KeyError: a cell is not as :meth:`cells` writes it.
        """
        verdict = VERDICTS[VERDICTS.index(cells["verdict"])]
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
        return cls(
            "fine" if verdict == "suspicious" and not reasons else verdict, reasons, **values
        )


_TEXT = ("codec", "pixel_format", "modified", "content", "decoder")
_DIGITS = {"duration": 3, "fps": 4}
"""Behind the point, of columns that hold real numbers."""
_OF_A_FILE = tuple(
    each.name for each in fields(Finding) if each.name not in ("verdict", "reasons", "limits")
)
COLUMNS = (*_OF_A_FILE, "verdict", "reason")
"""In a manifest, behind those that it had."""


def columns_of(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Findings, one for each row, as columns of cells."""
    rows = [finding.cells() for finding in findings]
    return {name: [row[name] for row in rows] for name in COLUMNS}


def read_findings(listing: Listing) -> dict[str, Finding]:
    """What a checked manifest says of its files, without what is about its rows; by file.

    Rows that say nothing, or something else, are left out.
    """
    if not {*COLUMNS} - {"decoder"} <= {*listing.table.columns}:  # older ones do not have it
        return {}
    found = {}
    for file, *cells in zip(listing.files, *map(listing.column, COLUMNS), strict=True):
        with contextlib.suppress(ValueError, KeyError):
            found[file] = Finding.of(dict(zip(COLUMNS, cells, strict=True)))
    return found
