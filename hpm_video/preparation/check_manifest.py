"""Check of all files of a manifest in parallel, resumable, with a verdict for each row."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.manifest import Listing, ManifestError, read_listing
from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.files.failures import Failure
from hpm_video.preparation.check import examine
from hpm_video.preparation.findings import (
    OF_THE_MANIFEST,
    Finding,
    read_findings,
    same_content,
    stamp_of,
)
from hpm_video.preparation.jobs import Journal, paced, run_jobs
from hpm_video.workers.pool import Limits
from hpm_video.workers.progress_bar import ProgressBar

IMAGE_DECODER = "pillow"
_REMEDIES = {  # by a part of the reason
    "s in all": "where it is only long, check it with more --seconds-in-all",
    "no further frame": "where only the disk is slow, check it with more --seconds",
    "needs more memory": "where it is only large, check it with more --memory",
    "": "leave it out, or get it anew",
}


class FindingJournal(Journal):
    """Journal of a check: the finding of each file, unless it exceeded the limits of this start."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.findings: dict[str, Finding] = {}
        for record in self.read():
            with contextlib.suppress(KeyError, ValueError, TypeError):  # of another version
                if not record.get("limits"):  # as earlier versions noted them
                    self.findings[record["file"]] = Finding.of(record)

    def note(self, file: str, finding: Finding) -> None:
        self.append({"file": file, **finding.cells()})


@dataclass(frozen=True)
class Checker:
    """Work of a process that checks files, and the limits that a file has."""

    workers: int
    limits: Limits = Limits()
    decoder: DecoderChoice = "auto"
    seconds_in_all: float = 3600.0  # per file; ``limits`` has the seconds without a further frame

    def __call__(self, file: str) -> Iterator[Finding | Failure | None]:
        end = time.monotonic() + self.seconds_in_all
        for result in paced(examine(file, self.decoder)):
            if result is None and time.monotonic() > end:
                yield Failure(file, f"it took longer than {self.seconds_in_all:g} s in all")
                return
            yield result

    def unchanged(self, files: Iterable[str], known: Mapping[str, Finding]) -> dict[str, Finding]:
        """Return the known findings that still hold, which need not be decoded again."""
        there = {file: known[file] for file in files if file in known}
        decoders = (self.decoder, IMAGE_DECODER)
        return {
            file: finding
            for file, finding in there.items()
            if finding.decoder in decoders and finding.stamp == stamp_of(file)
        }

    def finding(self, file: str, result: Finding | Failure) -> Finding:
        """Return the finding of a file, which may have exceeded its limits."""
        if isinstance(result, Failure):
            reason = result.reason
            if "took longer" in reason and "in all" not in reason:
                reason = f"no further frame came in {self.limits.seconds:g} s"
            remedy = next(what for part, what in _REMEDIES.items() if part in reason)
            result = Finding("bad", (f"{reason}: {remedy}",), **vars(stamp_of(file)))
        is_still = is_image(file) or is_frame_folder(file)
        return replace(result, decoder=IMAGE_DECODER if is_still else self.decoder)


def check_files(
    files: Iterable[str], unchanged: Mapping[str, Finding], journal: FindingJournal, check: Checker
) -> dict[str, Finding]:
    """Check files but those that are ``unchanged``, and note it in the journal. -> all findings"""
    found = {**unchanged}
    left = {file: file for file in files if file not in unchanged}
    num_bad = sum(finding.verdict == "bad" for finding in unchanged.values())
    with (
        closing(ProgressBar(len(found) + len(left), "files", first=len(found))) as bar,
        closing(run_jobs(check, left, check.workers, check.limits)) as results,
    ):
        for file, result in results:
            found[file] = check.finding(file, result)
            if not isinstance(result, Failure):
                journal.note(file, found[file])
            num_bad += found[file].verdict == "bad"
            bar.advance(note=f"{num_bad} bad")
    return found


def known_of(out: Path, root: Path | None) -> dict[str, Finding]:
    """Return the findings of an earlier, finished check, except bad files, which are checked again.

    A file that no check has written is a ManifestError.
    """
    if not out.exists():
        return {}
    found = read_findings(read_listing(out, root))
    if not found:
        raise ManifestError(
            f"{out} is there, and is no manifest that this program wrote; give another --out"
        )
    return {file: finding for file, finding in found.items() if finding.verdict != "bad"}


def find_rows(listing: Listing, found: Mapping[str, Finding]) -> Iterator[Finding]:
    """Yield the finding of each row, with doubts about the row in addition to those of the file."""
    # Rows by the digest of their files, and the section of it that they are.
    different: defaultdict[tuple[str, tuple[str, str]], list[int]] = defaultdict(list)
    paths, labels, counts = map(listing.column, ("path", "label", "num_frames"))
    sections = [*zip(listing.column("start"), listing.column("end"), strict=True)]
    for row, file in enumerate(listing.files):
        finding, doubts, stated = found[file], list[str](), 0
        if finding.verdict == "bad":
            yield finding
            continue
        with contextlib.suppress(ValueError, OverflowError):
            stated = int(float(counts[row]))  # pandas writes 3.0 beside empty cells
        if finding.num_frames and stated > 0 and stated != finding.num_frames:
            doubts.append(f"said {stated} frames, there are {finding.num_frames}: corrected")
        alike = different[finding.content, sections[row]] if finding.content else []
        same = next((each for each in alike if same_content(file, listing.files[each])), None)
        if same is None:
            alike.append(row)
        else:
            differ = f" with label {labels[same]} instead of {labels[row]}"
            doubts.append(
                f"has the same content as {paths[same]}"
                f"{differ if labels[same] != labels[row] else ''}: leave one of them out"
            )
        if doubts:
            reasons = (*finding.reasons, *(OF_THE_MANIFEST + doubt for doubt in doubts))
            finding = replace(finding, verdict="suspicious", reasons=reasons)
        yield finding
