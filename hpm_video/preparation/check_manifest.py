"""Check of all files of a manifest in parallel, resumable, with a verdict for each row."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from hpm_video.config.choices import DecoderChoice
from hpm_video.data.manifest import VERDICTS, Listing, ManifestError, read_listing
from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.files.failures import Failure
from hpm_video.files.wording import counted
from hpm_video.preparation.check import examine
from hpm_video.preparation.findings import (
    DIGEST_BYTES,
    OF_THE_MANIFEST,
    Finding,
    Stamp,
    read_findings,
    stamp_of,
)
from hpm_video.preparation.jobs import Journal, paced, run_jobs
from hpm_video.workers.pool import Limits
from hpm_video.workers.progress_bar import ProgressBar

MORE = "where it is only large or slow, give more --memory or --seconds"
REASONS_SHOWN = 8


@dataclass(frozen=True)
class Checker:
    """Work of a process that checks files."""

    decoder: DecoderChoice = "auto"

    def __call__(self, file: str) -> Iterator[Finding | None]:
        return paced(examine(file, self.decoder))


def decoder_for(file: str, decoder: str) -> str:
    """Return the decoder that reads a file where videos are read by ``decoder``."""
    return "pillow" if is_image(file) or is_frame_folder(file) else decoder


def known_of(out: Path, root: Path | None) -> dict[str, Finding]:
    """Return the findings of an earlier, finished check, except bad files, which are checked again.

    A file that no check has written is a ManifestError.
    """
    if not out.exists():
        return {}
    found = read_findings(read_listing(out, root))
    if not found:
        raise ManifestError(
            f"{out} is there, and is no manifest that this program wrote; give another --output"
        )
    return {file: finding for file, finding in found.items() if finding.verdict != "bad"}


def noted_in(journal: Journal) -> dict[str, Finding]:
    """Return the findings of an interrupted check."""
    noted = {}
    for record in journal.read():
        with contextlib.suppress(KeyError, ValueError, TypeError):  # of another version
            noted[record["file"]] = Finding.of(record)
    return noted


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
        # Earlier versions hashed a part of each file.
        and len(known[file].content) in (0, 2 * DIGEST_BYTES)
    }


def check_files(
    files: Iterable[str],
    same: Mapping[str, Finding],
    journal: Journal,
    check: Checker,
    workers: int,
    limits: Limits,
) -> dict[str, Finding]:
    """Check all files except those that are the ``same`` as before. -> the findings of all

    Each is noted in the journal, unless it exceeded the limits of this start.
    """
    found = {**same}
    left = {file: file for file in files if file not in same}
    num_bad = sum(finding.verdict == "bad" for finding in same.values())
    with (
        closing(ProgressBar(len(found) + len(left), "files", first=len(found))) as bar,
        closing(run_jobs(check, left, workers, limits)) as results,
    ):
        for file, result in results:
            decoder = decoder_for(file, check.decoder)
            if isinstance(result, Failure):
                reason = f"{result.reason}: {MORE}"
                stamp = stamp_of(file)._asdict()
                found[file] = Finding("bad", (reason,), decoder=decoder, **stamp)
            else:
                found[file] = replace(result, decoder=decoder)
                journal.append({"file": file, **found[file].cells()})
            num_bad += found[file].verdict == "bad"
            bar.advance(note=f"{num_bad} bad")
    return found


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
        with contextlib.suppress(ValueError, OverflowError):
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
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[str, str]] = {}
    for file, finding in zip(files, findings, strict=True):
        for reason in finding.reasons:
            # Without its numbers, names and remedy.
            kind = finding.verdict, re.sub(r"\d[\d.]*", "#", re.split(r": | \(| as ", reason)[0])
            counts[kind] += 1
            examples.setdefault(kind, (reason, file))
    for kind, count in counts.most_common(REASONS_SHOWN):
        reason, file = examples[kind]
        lines += [f"  {count:6} {kind[0]}: {reason}", f"         {file}"]
    if len(counts) > REASONS_SHOWN:
        lines.append("  others: see the column reason")
    usable = [finding for finding in findings if finding.verdict != "bad"]
    hours = sum(finding.duration or 0 for finding in usable) / 3600
    frames = sum(finding.num_frames or 0 for finding in usable)
    lines.append(f"  usable: {counted(len(usable), 'file')}, {hours:.2f} hours, {frames} frames")
    return "\n".join(lines)
