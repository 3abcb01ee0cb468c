"""Check every file of a manifest: python tools/check_videos.py MANIFEST.

Each video, image or folder of frames is decoded completely, in processes that are stopped if a file
makes them hang, crash or take too much memory. The findings are extra columns of a new manifest,
CHECKED.csv. Training on it skips bad files and never requests frames that do not exist.

Columns: num_frames (readable ones, whatever the header says), duration (s), fps, width, height
(upright), codec, pixel_format and rotation (degrees clockwise that set it upright) of a video,
key_frame_distance (frames, at most), bytes, modified, content (equal for identical files), decoder
(for which num_frames holds), verdict (fine, suspicious or bad) and reason. All other columns stay
as they are.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from hpm_video.data.manifest import Listing, ManifestError, read_listing, write_manifest
from hpm_video.data.places import unwritable
from hpm_video.decoding.locations import is_frame_folder, is_image
from hpm_video.decoding.registry import choose_decoder
from hpm_video.files.wording import counted
from hpm_video.preparation.check import ANEW, Checker, check_files
from hpm_video.preparation.findings import COLUMNS, find_rows, findings_in, read_findings, unchanged
from hpm_video.preparation.findings import summary as summary_of
from hpm_video.preparation.jobs import Journal
from hpm_video.runs import console
from hpm_video.runs.console import shortest
from hpm_video.workers.pool import GIB, Limits
from hpm_video.workers.room import default_workers

SOME_ARE_BAD = 3
EXIT_CODES = console.exit_codes(
    "success: every file can be used, including suspicious ones",
    "wrong input; the message says which, and what to do",
    "3    the check is complete, and some files are bad",
)


def main(command_line: Sequence[str] | None = None) -> int:
    """Check, and report the findings."""
    parser = console.make_parser(__doc__, EXIT_CODES)
    parser.add_argument("manifest", type=Path, help="manifest, or folder of videos or images")
    processes = {"default": default_workers(), "help": "processes (default here: %(default)s)"}
    checked = {
        "metavar": "CHECKED.csv",
        "help": "default: NAME.checked.csv beside the manifest. If it exists, files "
        "that the same decoder could use and that have not changed since are not decoded again",
    }
    workers = {"type": console.positive, **processes}
    decoder = {"help": "decoder that training will use"}
    shared = ("root", "seconds", "memory")
    console.add_options(parser, *shared, output=checked, workers=workers, decoder=decoder)
    arguments, num_bad = parser.parse_args(command_line), list[int]()
    code = console.run(lambda: num_bad.append(check(arguments)))
    return SOME_ARE_BAD if code == 0 and any(num_bad) else code


def check(arguments: argparse.Namespace) -> int:
    """Check a manifest, and write and report the findings. -> the number of bad files

    Raises:
        ManifestError, DecoderError, OSError: a wrong input.
    """
    root, workers = arguments.root, arguments.workers
    listing = read_listing(arguments.manifest, root)
    source, out = listing.source, output_path(listing, arguments.output)
    decoder = arguments.decoder
    if not all(is_image(file) or is_frame_folder(file) for file in listing.files):
        decoder = choose_decoder(decoder)
    limits = Limits(arguments.seconds, round(arguments.memory * GIB))
    known = read_findings(out, root)
    with closing(Journal(out.with_name(f"{out.name}.partial"))) as journal:
        same = unchanged(listing.files, known | findings_in(journal.read()), decoder)
        before = f", {len(same)} of which have not changed since their check" if same else ""
        files = counted(len({*listing.files}), "file")
        print(f"{files} of {shortest(source)}{before}; {counted(workers, 'process')}")
        found = check_files(listing.files, same, journal, Checker(decoder), workers, limits)
        findings = [*find_rows(listing, found)]
        rows = [finding.cells() for finding in findings]
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        if root is None and not (source.is_file() and out.parent == source.parent):
            columns["path"] = [file.removeprefix(f"{out.parent}/") for file in listing.files]
        write_manifest(listing.table.assign(**columns), out)
        journal.path.unlink()
    print(f"\n{summary_of(listing.files, findings)}\n\nwrote {shortest(out)}")
    print(f"To train on what can be used: data.train={shortest(out)}")
    if any(ANEW in reason for finding in findings for reason in finding.reasons):
        rooted = f" --root {shortest(root)}" if root else ""
        command = f"python tools/transcode.py {shortest(source)} OUT{rooted}"
        print(f"To encode files anew, of damaged ones what is good: {command}")
    return sum(finding.verdict == "bad" for finding in findings)


def output_path(listing: Listing, out: Path | None) -> Path:
    """Return the path of the new manifest.

    Raises:
        ManifestError: it is the manifest that is read, or not a CSV file, or it could not name the
            files.
    """
    source = listing.source
    stem = source.name if source.is_dir() else source.stem
    out = (out or source.with_name(f"{stem}.checked.csv")).absolute()
    if out.suffix != ".csv" or (out.exists() and source.exists() and out.samefile(source)):
        raise ManifestError(
            f"--output {out} must end in .csv, and be another file than the manifest that is read, "
            "which stays as it is; give another name"
        )
    for file in listing.files:
        if why := unwritable(file):
            raise ManifestError(f"the path {file!r} {why}, as a manifest is: rename its folders")
    return out


if __name__ == "__main__":
    sys.exit(main())
