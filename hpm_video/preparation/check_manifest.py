"""Checking all files of a manifest: in parallel, going on after a stop, and a verdict for each."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.manifest import Listing, ManifestError, Verdict, read_listing
from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.preparation.check import Task, Working, bad, check_file, stamp_of
from hpm_video.preparation.findings import (
    OF_THE_MANIFEST,
    Finding,
    Journal,
    Stamp,
    columns_of,
    read_findings,
)
from hpm_video.workers.pool import GIB, Limits, Lost, Pool
from hpm_video.workers.progress_bar import ProgressBar

Work = Callable[[Task], Finding | None | Iterator[Working | Finding | None]]
"""Looks at a file in a process of its own; it says nothing of one that has not changed. Before its
last result it may say that it gets on."""

PICTURES = "pillow"
"""What decodes images, whatever the decoder of videos."""
_REMEDIES = {
    "no further frame": "where only the disk is slow, check it with more --seconds",
    "needs more memory": "where it is only large, check it with more --memory",
}
_ANYHOW = "leave it out, or get it anew"


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
        return finding.decoder in (self.decoder, PICTURES) and finding.limits in (
            None,
            self.allowed,
        )


@dataclass(frozen=True)
class Checked:
    """What came of a check."""

    listing: Listing
    findings: tuple[Finding, ...]
    """One for each row."""
    taken_over: int
    """Files that had been looked at before and have not changed."""


def check_files(
    files: Sequence[str], how: How, known: Mapping[str, Finding]
) -> Generator[tuple[str, Finding, bool], None, None]:
    """Look at files, in whatever order they come: each, what was found, and whether it is new.

    Those that are ``known`` and have not changed are not decoded again. One that takes its process
    down gets another try at the end, in a fresh process, for it may be that a disk stood still, or
    that somebody killed the process.
    """
    known = {file: finding for file, finding in known.items() if how.takes_over(finding)}
    lost = []
    for file, result in _looked_at(files, how, known):
        if isinstance(result, Lost):
            lost.append(file)
        else:
            yield _told(file, result, how, known)
    for file, result in _looked_at(lost, how, known):
        yield _told(file, result, how, known)


def _looked_at(
    files: Sequence[str], how: How, known: Mapping[str, Finding]
) -> Generator[tuple[str, Finding | Lost | None], None, None]:
    if not files:
        return
    left = len(files)
    with Pool(how.work, min(how.workers, left), how.limits) as pool:
        for file in files:
            stamp = known[file].stamp if file in known else None
            pool.submit(file, Task(file, stamp, how.decoder, how.seconds_in_all))
        while left:
            answer = pool.next()
            if answer.is_last:
                left -= 1
                yield answer.tag, answer.result


def _told(
    file: str, result: Finding | Lost | None, how: How, known: Mapping[str, Finding]
) -> tuple[str, Finding, bool]:
    """A file, what was found, and whether it is new."""
    if result is None:
        return file, known[file], False
    finding = _lost(file, result, how) if isinstance(result, Lost) else result
    if finding.limits is not None:
        finding = replace(finding, limits=how.allowed)
    is_picture = is_image(file) or is_frame_folder(file)
    return file, replace(finding, decoder=PICTURES if is_picture else how.decoder), True


def _lost(file: str, lost: Lost, how: How) -> Finding:
    reason = lost.reason
    if "took longer" in reason:
        reason = f"no further frame came in {how.limits.seconds:g} s"
    remedy = next((what for why, what in _REMEDIES.items() if why in reason), _ANYHOW)
    try:
        stamp = stamp_of(file)
    except OSError:
        stamp = Stamp()
    return replace(
        bad(f"{reason}: {remedy}"),
        bytes=stamp.bytes,
        modified=stamp.modified,
        limits=how.allowed,
    )


def journal_of(out: Path) -> Path:
    """Where it is noted what is known so far, until ``out`` is whole."""
    return out.with_name(f"{out.name}.partial")


def check_listing(
    listing: Listing, journal: Journal, known: Mapping[str, Finding], how: How
) -> Checked:
    """Look at every file of a manifest, note each, and judge each row.

    ``known``: what is known from elsewhere. What stands in the journal is newer.
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
    return Checked(listing, tuple(judged(listing, found)), taken_over)


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


def write_checked(checked: Checked, out: Path, *, keep_paths: bool) -> None:
    """Write the manifest with its new columns.

    Without ``keep_paths`` files are named from the folder of ``out`` on where they lie in it, and
    by their absolute paths elsewhere.
    """
    columns = columns_of(checked.findings)
    if not keep_paths:
        start = f"{out.parent}/"
        columns["path"] = [file.removeprefix(start) for file in checked.listing.files]
    checked.listing.write(columns, out)
