"""Findings about files, as columns of a manifest."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

from hpm_video.data.manifest import VERDICTS, Listing, Verdict
from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder
from hpm_video.preparation.jobs import Steps

BETWEEN_REASONS = "; "
OF_THE_MANIFEST = "the manifest "
"""Beginning of a reason that concerns a row of a manifest rather than the file alone."""
DIGEST_BYTES = 16


class Stamp(NamedTuple):
    """Size and time of a file, which show whether it has changed."""

    bytes: int | None = None  # none if there is no such file
    modified: str = ""  # time of the last change, UTC


def stamp_of(file: str) -> Stamp:
    """Return the stamp of a file; of a folder of frames, the total size and the latest time."""
    try:
        parts = _parts(file)
    except OSError:
        return Stamp()
    microseconds = max((changed for *_, changed in parts), default=0) // 1000
    time = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=microseconds)
    size = sum(size for _, _, size, _ in parts)
    return Stamp(size, time.isoformat(timespec="microseconds"))


def digest_of(file: str) -> Steps[str]:
    """Hash all bytes of a file, or of the frames in a folder."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for path, start, size, _ in _parts(file):
        digest.update(f"{size} ".encode())
        with path.open("rb") as opened:
            opened.seek(start)
            while piece := opened.read(min(size, 2**20)):
                digest.update(piece)
                size -= len(piece)
                yield
    return digest.hexdigest()


def _parts(file: str) -> list[tuple[Path, int, int, int]]:
    """Where the bytes of a file lie: path, first byte, number of bytes, time of change in ns."""
    member = TarMember.parse(file)
    parts = []
    for path in (
        frames_in(file) if is_frame_folder(file) else [Path(member.tar if member else file)]
    ):
        state = path.stat()
        start, size = (member.offset, member.size) if member else (0, state.st_size)
        parts.append((path, start, size, state.st_mtime_ns))
    return parts


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

    def cells(self) -> dict[str, str]:
        """Return the finding as a row of a table."""
        cells = {}
        for name in COLUMNS:
            value = BETWEEN_REASONS.join(self.reasons) if name == "reason" else getattr(self, name)
            if isinstance(value, float):
                value = f"{value:.{_DIGITS[name]}f}"
            cells[name] = "" if value is None else str(value)
        return cells

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


def read_findings(listing: Listing) -> dict[str, Finding]:
    """Read the valid findings of a checked manifest by file, without reasons of rows alone."""
    if not {*COLUMNS} - {"decoder"} <= {*listing.table.columns}:  # older ones do not have it
        return {}
    found = {}
    for file, *cells in zip(listing.files, *map(listing.column, COLUMNS), strict=True):
        with contextlib.suppress(ValueError, KeyError):
            found[file] = Finding.of(dict(zip(COLUMNS, cells, strict=True)))
    return found
