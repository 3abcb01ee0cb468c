"""Checking all files of a manifest: in parallel, going on after a stop, and a verdict for each."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.manifest import Listing, ManifestError, Verdict, read_listing
from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.preparation.check import Task, bad, check_file, stamp_of
from hpm_video.preparation.findings import OF_THE_MANIFEST, Finding, Stamp, read_findings
from hpm_video.preparation.jobs import Journal, Step, answers
from hpm_video.workers.pool import GIB, Limits, Lost, Pool
from hpm_video.workers.progress_bar import ProgressBar

Work = Callable[[Task], Finding | None | Iterator[Step | Finding | None]]
"""Looks at a file in a process of its own; it says nothing of one that has not changed. Before its
last result it may say that it gets on."""

PICTURES = "pillow"
"""What decodes images, whatever the decoder of videos."""
_REMEDIES = {
    "no further frame": "where only the disk is slow, check it with more --seconds",
    "needs more memory": "where it is only large, check it with more --memory",
}
_ANYHOW = "leave it out, or get it anew"
_AGAIN = {"all files": "again"}
"""The first record of the journal of a check that was to look at all files again."""


class FindingJournal(Journal):
    """The journal of a check: what was found out about each file, beside the manifest to come."""

    def __init__(self, path: Path, *, again: bool = False) -> None:
        """Open the journal, and read what is there.

        ``again``: only what was found by a check that was to look at all files again, and was
        stopped, counts; the rest is left out.
        """
        super().__init__(path)
        records = self.read()
        self.discarded = 0
        """Records of another check that was stopped, and is not gone on with."""
        if again and records[:1] != [_AGAIN]:
            self.discarded = len(records)
            self.clear()
            self.append(_AGAIN)
            records = []
        self.findings: dict[str, Finding] = {}
        known = {field.name for field in fields(Finding)}
        for record in records:
            with contextlib.suppress(TypeError, KeyError):
                values = {name: value for name, value in record.items() if name in known}
                values["reasons"] = tuple(values["reasons"])
                values["limits"] = tuple(values["limits"]) if values["limits"] else None
                self.findings[record["file"]] = Finding(**values)

    def note(self, file: str, finding: Finding) -> None:
        """Append what was found out about a file."""
        self.append({"file": file} | asdict(finding))

    def remove(self) -> None:
        """Delete the journal: it is no longer needed."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class How:
    """How files are looked at."""

    workers: int
    limits: Limits = Limits()
    decoder: DecoderChoice = "auto"
    work: Work = check_file
    """A function of a module."""
    seconds_in_all: float = 3600.0
    """For a file, of which the limits count the seconds without a further frame."""

    @property
    def allowed(self) -> tuple[float, float, float]:
        """What a file may take: seconds without a further frame, GiB, and seconds in all."""
        return self.limits.seconds, self.limits.memory / GIB, self.seconds_in_all

    def takes_over(self, finding: Finding) -> bool:
        """Whether it would find the same, as long as the file has not changed."""
        same_limits = finding.limits in (None, self.allowed)
        return finding.decoder in (self.decoder, PICTURES) and same_limits


def check_files(
    files: Sequence[str], how: How, known: Mapping[str, Finding]
) -> Generator[tuple[str, Finding, bool], None, None]:
    """Look at files, in whatever order they come: each, what was found, and whether it is new.

    Those that are ``known`` and have not changed are not decoded again.
    """
    known = {file: finding for file, finding in known.items() if how.takes_over(finding)}
    tasks = {
        file: Task(
            file, known[file].stamp if file in known else None, how.decoder, how.seconds_in_all
        )
        for file in files
    }
    with Pool(how.work, min(how.workers, len(tasks)), how.limits) as pool:
        for file, result, is_last in answers(pool, tasks, retry=True):
            if not is_last:
                continue
            if result is None:
                yield file, known[file], False
                continue
            finding = _lost(file, result, how) if isinstance(result, Lost) else result
            if finding.limits is not None:
                finding = replace(finding, limits=how.allowed)
            is_picture = is_image(file) or is_frame_folder(file)
            yield file, replace(finding, decoder=PICTURES if is_picture else how.decoder), True


def _lost(file: str, lost: Lost, how: How) -> Finding:
    reason = lost.reason
    if "took longer" in reason:
        reason = f"no further frame came in {how.limits.seconds:g} s"
    remedy = next((what for why, what in _REMEDIES.items() if why in reason), _ANYHOW)
    stamp = Stamp()
    with contextlib.suppress(OSError):
        stamp = stamp_of(file)
    finding = bad(f"{reason}: {remedy}")
    return replace(finding, bytes=stamp.bytes, modified=stamp.modified, limits=how.allowed)


def check_listing(
    listing: Listing, journal: FindingJournal, known: Mapping[str, Finding], how: How
) -> tuple[list[Finding], int]:
    """Look at every file of a manifest, note each, and judge each row.

    ``known``: what is known from elsewhere. What stands in the journal is newer.

    Returns the finding of each row, and how many files were looked at before and have not changed.
    """
    files = list(dict.fromkeys(listing.files))
    found: dict[str, Finding] = {}
    num_bad = taken_over = 0
    with (
        closing(ProgressBar(len(files), "files")) as bar,
        closing(check_files(files, how, {**known, **journal.findings})) as findings,
    ):
        for file, finding, is_new in findings:
            found[file] = finding
            if is_new:
                journal.note(file, finding)
            taken_over += not is_new
            num_bad += finding.verdict == "bad"
            bar.advance(note=f"{num_bad} bad")
    return list(judged(listing, found)), taken_over


def known_of(out: Path, root: Path | None) -> dict[str, Finding]:
    """What an earlier, finished check says of files; those that were bad are looked at again.

    Raises:
        ManifestError: there is something at ``out`` that no check has written.
    """
    if not out.exists():
        return {}
    found = read_findings(read_listing(out, root))
    if not found:
        raise ManifestError(
            f"{out} is there, and is no manifest that this program wrote; give another --out"
        )
    return {file: finding for file, finding in found.items() if finding.verdict != "bad"}


def judged(listing: Listing, found: Mapping[str, Finding]) -> Iterator[Finding]:
    """The finding of each row, with what is odd about the row and not about the file."""
    first: dict[str, int] = {}
    paths, labels, counts = map(listing.column, ("path", "label", "num_frames"))
    for row, file in enumerate(listing.files):
        finding = found[file]
        if finding.verdict == "bad":
            yield finding
            continue
        doubts = []
        stated = _whole(counts[row])
        if finding.num_frames and stated and stated != finding.num_frames:
            doubts.append(
                f"{OF_THE_MANIFEST}said {stated} frames, there are {finding.num_frames}: corrected"
            )
        same = first.setdefault(finding.content, row) if finding.content else row
        if same != row:
            differ = f" with label {labels[same]} instead of {labels[row]}"
            doubts.append(
                f"{OF_THE_MANIFEST}has the same content as {paths[same]}"
                f"{differ if labels[same] != labels[row] else ''}: leave one of them out"
            )
        verdict: Verdict = "suspicious" if doubts else finding.verdict
        yield replace(finding, verdict=verdict, reasons=(*finding.reasons, *doubts))


def _whole(cell: str) -> int:
    """A number of frames, 0 where none is stated; pandas writes 3.0 beside empty cells."""
    try:
        return max(int(float(cell)), 0)
    except (ValueError, OverflowError):
        return 0
