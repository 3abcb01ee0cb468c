"""Findings about files, as columns of a manifest."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hpm_video.data.manifest import VERDICTS, Listing, Verdict
from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder

BETWEEN_REASONS = "; "
OF_THE_MANIFEST = "the manifest "
"""Beginning of a reason that concerns a row of a manifest rather than the file alone."""
_ENDS = 2**16  # bytes at the beginning and at the end of a file that enter its digest
_PIECE = 2**20  # bytes of two files that are compared at once


@dataclass(frozen=True)
class Stamp:
    """Size and time of a file, which show whether it has changed."""

    bytes: int | None = None  # none if there is no such file
    modified: str = ""  # time of the last change, UTC


def stamp_of(file: str) -> Stamp:
    """Return the stamp of a file; of a folder of frames, the total size and the latest time."""
    member = TarMember.parse(file)
    try:
        frames = frames_in(file) if is_frame_folder(file) else []
        states = [each.stat() for each in frames or [Path(member.tar if member else file)]]
    except OSError:
        return Stamp()
    size = member.size if member else sum(state.st_size for state in states)
    microseconds = max(state.st_mtime_ns for state in states) // 1000
    time = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=microseconds)
    return Stamp(size, time.isoformat(timespec="microseconds"))


def content_of(file: str) -> str:
    """Hash size, beginning and end of a file; of a folder of frames, names and sizes too."""
    digest = hashlib.blake2b(repr(stamp_of(file).bytes).encode(), digest_size=8)
    parts = _parts(file)
    if is_frame_folder(file):
        digest.update(repr([(path.name, size) for path, _, size in parts]).encode())
        parts = [parts[0], parts[-1]]
    for path, start, size in parts:
        with path.open("rb") as opened:
            for at in (start, start + max(size - _ENDS, 0)):
                opened.seek(at)
                digest.update(opened.read(min(size, _ENDS)))
    return digest.hexdigest()


def same_content(file: str, other: str) -> bool:
    """Compare all bytes of two files of the same :func:`content_of`."""
    try:
        return file == other or all(a == b for a, b in zip_longest(_pieces(file), _pieces(other)))
    except OSError:  # one has vanished since
        return False


def _parts(file: str) -> list[tuple[Path, int, int]]:
    """Where the bytes of a file lie: path, first byte and number of bytes."""
    if member := TarMember.parse(file):
        return [(Path(member.tar), member.offset, member.size)]
    paths = frames_in(file) if is_frame_folder(file) else [Path(file)]
    return [(path, 0, path.stat().st_size) for path in paths]


def _pieces(file: str) -> Iterator[bytes]:
    for path, start, left in _parts(file):
        with path.open("rb") as opened:
            opened.seek(start)
            while piece := opened.read(min(left, _PIECE)):
                left -= len(piece)
                yield piece


@dataclass(frozen=True)
class Finding:
    """Properties and verdict of a file; none where unknown.

    Each is a column of a manifest, see ``tools/check_videos.py``.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
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

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.bytes, self.modified)

    def cells(self) -> dict[str, str]:
        """Return the finding as a row of a table."""
        values = {name: getattr(self, name) for name in COLUMNS[:-1]}
        cells = {
            name: f"{value:.{_DIGITS[name]}f}" if isinstance(value, float) else str(value)
            for name, value in values.items()
            if value is not None
        }
        return dict.fromkeys(COLUMNS, "") | cells | {"reason": BETWEEN_REASONS.join(self.reasons)}

    @classmethod
    def of(cls, cells: Mapping[str, str]) -> "Finding":
        """Read a finding from its row, without the reasons that concern the row alone.

        ValueError, KeyError: a cell is not in the format of :meth:`cells`.
        """
        verdict = VERDICTS[VERDICTS.index(cells["verdict"])]
        given = cells["reason"].split(BETWEEN_REASONS)
        reasons = tuple(each for each in given if each and not each.startswith(OF_THE_MANIFEST))
        values: dict[str, Any] = {
            name: cell if name in _TEXT else float(cell) if name in _DIGITS else int(cell)
            for name, cell in cells.items()
            if cell and name in _OF_A_FILE
        }
        of_the_row_alone = verdict == "suspicious" and not reasons
        return cls("fine" if of_the_row_alone else verdict, reasons, **values)


_TEXT = ("codec", "pixel_format", "modified", "content", "decoder")
_DIGITS = {"duration": 3, "fps": 4}  # decimal places of the columns of real numbers
_OF_A_FILE = tuple(each.name for each in fields(Finding)[2:])
COLUMNS = (*_OF_A_FILE, "verdict", "reason")  # columns that a check appends to a manifest


def columns_of(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Return findings, one for each row, as columns of cells."""
    rows = [finding.cells() for finding in findings]
    return {name: [row[name] for row in rows] for name in COLUMNS}


def read_findings(listing: Listing) -> dict[str, Finding]:
    """Read the valid findings of a checked manifest by file, without reasons of rows alone."""
    if not {*COLUMNS} - {"decoder"} <= {*listing.table.columns}:  # older ones do not have it
        return {}
    found = {}
    for file, *cells in zip(listing.files, *map(listing.column, COLUMNS), strict=True):
        with contextlib.suppress(ValueError, KeyError):
            found[file] = Finding.of(dict(zip(COLUMNS, cells, strict=True)))
    return found
