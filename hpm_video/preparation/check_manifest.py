"""Checking all files of a manifest: in parallel, going on after a stop, and a verdict for each."""

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.manifest import Listing, ManifestError, read_listing
from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.preparation.check import bad, examine, stamp_of
from hpm_video.preparation.findings import OF_THE_MANIFEST, Finding, Stamp, read_findings
from hpm_video.preparation.jobs import Journal, Step, answers, paced
from hpm_video.workers.pool import GIB, Limits, Lost, Pool
from hpm_video.workers.progress_bar import ProgressBar

PICTURES = "pillow"
"""What decodes images, whatever the decoder of videos."""
_REMEDIES = {
    "s in all": "where it is only long, check it with more --seconds-in-all",
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
        if again and records[:1] != [_AGAIN]:
            self.clear()
            self.append(_AGAIN)
            records = []
        self.findings: dict[str, Finding] = {}
        for record in records:
            with contextlib.suppress(KeyError, ValueError, TypeError):  # of another version
                limits = tuple(record["limits"]) if record["limits"] else None
                self.findings[record["file"]] = replace(Finding.of(record), limits=limits)

    def note(self, file: str, finding: Finding) -> None:
        """Append what was found out about a file."""
        self.append({"file": file, "limits": finding.limits, **finding.cells()})


@dataclass(frozen=True)
class Checker:
    """Looks at files, each in a process of its own, which it is the work of."""

    workers: int
    limits: Limits = Limits()
    decoder: DecoderChoice = "auto"
    seconds_in_all: float = 3600.0
    """For a file, of which the limits count the seconds without a further frame."""

    def __call__(self, file: str) -> Iterator[Step | Finding]:
        """Say now and then that it gets on, and at last what was found out."""
        end = time.monotonic() + self.seconds_in_all
        for result in paced(examine(file, self.decoder)):
            if isinstance(result, Step) and time.monotonic() > end:
                yield self.given_up(file, f"it took longer than {self.seconds_in_all:g} s in all")
                return
            yield result

    @property
    def allowed(self) -> tuple[float, float, float]:
        """What a file may take: seconds without a further frame, GiB, and seconds in all."""
        return self.limits.seconds, self.limits.memory / GIB, self.seconds_in_all

    def takes_over(self, finding: Finding) -> bool:
        """Whether it would find the same, as long as the file has not changed."""
        same_limits = finding.limits in (None, self.allowed)
        return finding.decoder in (self.decoder, PICTURES) and same_limits

    def check(
        self, files: Sequence[str], known: Mapping[str, Finding]
    ) -> Generator[tuple[str, Finding, bool], None, None]:
        """Look at files, in whatever order they come: each, what was found, and whether it is new.

        Those that are ``known`` and have not changed are not decoded again.
        """
        left = []
        for file in files:
            before = known.get(file)
            if before and self.takes_over(before) and before.stamp == _stamp_of(file):
                yield file, before, False
            else:
                left.append(file)
        if not left:
            return
        with Pool(self, min(self.workers, len(left)), self.limits) as pool:
            for file, result, is_last in answers(pool, {file: file for file in left}, retry=True):
                if not is_last:
                    continue
                if isinstance(result, Lost):
                    why = result.reason
                    none_came = f"no further frame came in {self.limits.seconds:g} s"
                    result = self.given_up(file, none_came if "took longer" in why else why)
                is_picture = is_image(file) or is_frame_folder(file)
                decoder = PICTURES if is_picture else self.decoder
                yield file, replace(result, decoder=decoder), True

    def given_up(self, file: str, reason: str) -> Finding:
        """The finding that a file took too much."""
        remedy = next((what for why, what in _REMEDIES.items() if why in reason), _ANYHOW)
        stamp, found = _stamp_of(file), bad(f"{reason}: {remedy}")
        return replace(found, bytes=stamp.bytes, modified=stamp.modified, limits=self.allowed)


def _stamp_of(file: str) -> Stamp:
    try:
        return stamp_of(file)
    except OSError:
        return Stamp()


def check_listing(
    listing: Listing, journal: FindingJournal, known: Mapping[str, Finding], checker: Checker
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
        closing(checker.check(files, {**known, **journal.findings})) as findings,
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
        if doubts:
            reasons = (*finding.reasons, *doubts)
            finding = replace(finding, verdict="suspicious", reasons=reasons)
        yield finding


def _whole(cell: str) -> int:
    """A number of frames, 0 where none is stated; pandas writes 3.0 beside empty cells."""
    try:
        return max(int(float(cell)), 0)
    except (ValueError, OverflowError):
        return 0
