"""Findings about files, as columns of a manifest, and what they say about its rows."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

from hpm_video.data.manifest import VERDICTS, Listing, ManifestError, Verdict, read_listing
from hpm_video.decoding.locations import TarMember, frames_in, is_frame_folder, is_image
from hpm_video.files.wording import counted
from hpm_video.preparation.jobs import Steps

BETWEEN_REASONS = "; "
OF_THE_MANIFEST = "the manifest "
"""Beginning of a reason that concerns a row of a manifest rather than the file alone."""
DIGEST_BYTES = 16
REASONS_SHOWN = 8


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


def decoder_for(file: str, decoder: str) -> str:
    """Return the decoder that reads a file where videos are read by ``decoder``."""
    return "pillow" if is_image(file) or is_frame_folder(file) else decoder


def read_findings(checked: Path, root: Path | None = None) -> dict[str, Finding]:
    """Read what an earlier check found about files, except bad ones, which are checked again.

    A file that no check has written is a ManifestError.
    """
    if not checked.exists():
        return {}
    listing = read_listing(checked, root)
    if not {*COLUMNS} <= {*listing.table.columns}:
        raise ManifestError(
            f"{checked} exists and is no manifest that this program wrote; give another --output"
        )
    found = findings_in(listing.table.assign(file=listing.files).to_dict("records"))
    return {file: finding for file, finding in found.items() if finding.verdict != "bad"}


def findings_in(records: Iterable[Mapping[Any, Any]]) -> dict[str, Finding]:
    """Read findings by ``file`` from rows or from a journal, without those of another version."""
    found = {}
    for record in records:
        with suppress(KeyError, ValueError, TypeError):
            found[record["file"]] = Finding.of(record)
    return found


def unchanged(
    files: Iterable[str], known: Mapping[str, Finding], decoder: str
) -> dict[str, Finding]:
    """Return the known findings that still hold, so that the files need not be decoded again."""
    return {
        file: known[file]
        for file in files
        if file in known
        and known[file].decoder == decoder_for(file, decoder)
        and Stamp(known[file].bytes, known[file].modified) == stamp_of(file)
    }


def find_rows(listing: Listing, found: Mapping[str, Finding]) -> Iterator[Finding]:
    """Yield the finding of each row, with doubts about the row in addition to those of the file."""
    first: dict[tuple[str, str, str], int] = {}  # the first row of each content and section
    paths, labels, counts = map(listing.column, ("path", "label", "num_frames"))
    starts, ends = map(listing.column, ("start", "end"))
    for row, file in enumerate(listing.files):
        finding, doubts, stated = found[file], list[str](), 0
        if finding.verdict == "bad":
            yield finding
            continue
        with suppress(ValueError, OverflowError):
            stated = int(float(counts[row]))  # pandas writes 3.0 beside empty cells
        if finding.num_frames and stated > 0 and stated != finding.num_frames:
            doubts.append(f"said {stated} frames, there are {finding.num_frames}: corrected")
        same = first.setdefault((finding.content, starts[row], ends[row]), row)
        if finding.content and same != row:
            differ = f" with label {labels[same]} instead of {labels[row]}"
            doubts.append(
                f"has the same content as {paths[same]}"
                f"{differ if labels[same] != labels[row] else ''}: leave one of them out"
            )
        if doubts:
            reasons = (*finding.reasons, *(OF_THE_MANIFEST + doubt for doubt in doubts))
            finding = replace(finding, verdict="suspicious", reasons=reasons)
        yield finding


def summary(files: Sequence[str], findings: Sequence[Finding]) -> str:
    """Summarise the findings: verdicts, the most common reasons, and what can be used.

    ``files``: the file of each finding.
    """
    verdicts = Counter(finding.verdict for finding in findings)
    lines = [", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS)]
    kinds: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for file, finding in zip(files, findings, strict=True):
        for reason in finding.reasons:
            # Without its numbers, names and remedy.
            kind = re.sub(r"\d[\d.]*", "#", re.split(r": | \(| as ", reason)[0])
            kinds[finding.verdict, kind].append((reason, file))
    common = sorted(kinds.items(), key=lambda kind: len(kind[1]), reverse=True)
    for (verdict, _), found in common[:REASONS_SHOWN]:
        reason, file = found[0]
        more = f" and {len(found) - 1} more (column reason)" if len(found) > 1 else ""
        lines += [f"  {len(found):6} {verdict}: {reason}", f"         {file}{more}"]
    if len(common) > REASONS_SHOWN:
        lines.append("  others: see the column reason")
    usable = [finding for finding in findings if finding.verdict != "bad"]
    hours = sum(finding.duration or 0 for finding in usable) / 3600
    frames = sum(finding.num_frames or 0 for finding in usable)
    lines.append(f"  usable: {counted(len(usable), 'file')}, {hours:.2f} hours, {frames} frames")
    return "\n".join(lines)
