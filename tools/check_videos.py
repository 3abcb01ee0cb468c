"""Check every file of a manifest: python tools/check_videos.py MANIFEST.

Each video, image or folder of frames is decoded completely, in processes that are stopped if a file
makes them hang, crash or take too much memory. The findings are extra columns of a new manifest,
CHECKED.csv. Training on it skips bad files and never requests frames that do not exist. CHECKED.png
shows lengths, sizes and verdicts.

Columns: num_frames (readable ones, whatever the header says), duration (s), fps, width, height
(upright), codec, pixel_format, key_frame_distance (frames, at most), rotation (degrees clockwise
that set it upright), bytes, modified, content (equal for identical files), decoder (for which
num_frames holds), verdict (fine, suspicious or bad) and reason. All other columns stay as they are.
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
from hpm_video.files.atomic import written_beside
from hpm_video.files.wording import counted
from hpm_video.preparation.check import ANEW
from hpm_video.preparation.check_manifest import (
    Checker,
    FindingJournal,
    check_files,
    find_rows,
    known_of,
)
from hpm_video.preparation.check_report import plot, summary
from hpm_video.preparation.findings import Finding, columns_of
from hpm_video.runs.console import (
    above_zero,
    add_options,
    exit_codes,
    make_parser,
    positive,
    run,
    shortest,
)
from hpm_video.workers.pool import GIB, Limits
from hpm_video.workers.room import default_workers

SOME_ARE_BAD = 3
EXIT_CODES = exit_codes(
    "it is done, and every file can be used (suspicious ones too)",
    "a wrong input: the message says which, and what to do",
    "3    it is done, and some files are bad",
)


def main(command_line: Sequence[str] | None = None) -> int:
    """Check, and report the findings."""
    arguments = parse_arguments(command_line)
    num_bad: list[int] = []
    code = run(lambda: num_bad.append(check(arguments)))
    return SOME_ARE_BAD if code == 0 and any(num_bad) else code


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, EXIT_CODES)
    add = parser.add_argument
    add("manifest", type=Path, help="manifest, or folder of videos or images")
    add("--again", action="store_true", help="decode all files again; resumes if interrupted")
    processes = {"default": default_workers(), "help": "processes (default here: %(default)s)"}
    checked = {
        "metavar": "CHECKED.csv",
        "help": "or --out; default: NAME.checked.csv beside the manifest. If it exists, files "
        "that the same decoder could use and that have not changed since are not decoded again",
    }
    workers = {"type": positive, **processes}
    decoder = {"help": "the one that training will use"}
    shared = ("root", "seconds", "memory")
    add_options(parser, *shared, output=checked, workers=workers, decoder=decoder)
    in_all = "for a whole file, even if it makes progress (default 3600)"
    add("--seconds-in-all", type=above_zero, default=3600.0, metavar="LIMIT", help=in_all)
    return parser.parse_args(command_line)


def check(arguments: argparse.Namespace) -> int:
    """Check a manifest, and write and report the findings. -> the number of bad files

    Raises:
        ManifestError, DecoderError, OSError: a wrong input.
    """
    listing = read_listing(arguments.manifest, arguments.root)
    out = output_path(listing, arguments.output)
    if not all(is_image(file) or is_frame_folder(file) for file in listing.files):
        arguments.decoder = choose_decoder(arguments.decoder)
    limits = Limits(arguments.seconds, round(arguments.memory * GIB))
    checker = Checker(arguments.workers, limits, arguments.decoder, arguments.seconds_in_all)
    known = {} if arguments.again else known_of(out, arguments.root)
    partial = [out.with_name(f"{out.name}{end}.partial") for end in ("", ".again")]
    with closing(FindingJournal(partial[arguments.again])) as journal:
        same = checker.unchanged(listing.files, known | journal.findings)
        print(
            f"{counted(len({*listing.files}), 'file')} of {shortest(listing.source)}"
            f"{f', {len(same)} of which have not changed since their check' if same else ''}; "
            f"{counted(arguments.workers, 'process')}; a file "
            f"may take {arguments.memory:g} GiB, and {limits.seconds:g} s without a further frame"
        )
        try:
            found = check_files(listing.files, same, journal, checker)
        except KeyboardInterrupt:
            print(f"\nThe findings so far are kept in {journal.path}: the same command goes on.")
            raise
        findings = [*find_rows(listing, found)]
        write(listing, findings, out, rooted=arguments.root is not None)
        for path in partial:
            path.unlink(missing_ok=True)
    print(f"\n{summary(listing.files, findings)}")
    print(f"\nwrote {shortest(out)}\n      {shortest(out.with_suffix('.png'))}")
    print(f"To train on what can be used: data.train={shortest(out)}")
    if any(ANEW in reason for finding in findings for reason in finding.reasons):
        root = f" --root {shortest(arguments.root)}" if arguments.root else ""
        command = f"python tools/transcode.py {shortest(listing.source)} OUT{root}"
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
    if out.suffix != ".csv":
        raise ManifestError(f"--output {out} must end in .csv: it is a table with named columns")
    if out == source or (out.exists() and source.exists() and out.samefile(source)):
        raise ManifestError(
            f"--output {out} is the manifest that is read, which stays as it is; give another name"
        )
    for file in listing.files:
        if why := unwritable(file):
            raise ManifestError(f"the path {file!r} {why}, as a manifest is: rename its folders")
    return out


def write(listing: Listing, findings: Sequence[Finding], out: Path, *, rooted: bool) -> None:
    """Write the new manifest and its picture. ``rooted``: paths start from a given root."""
    columns = columns_of(findings)
    is_beside = listing.source.is_file() and out.parent == listing.source.parent
    if not is_beside and not rooted:
        columns["path"] = [file.removeprefix(f"{out.parent}/") for file in listing.files]
    write_manifest(listing.table.assign(**columns), out)
    with written_beside(out.with_suffix(".png")) as picture:
        title = f"{listing.source.name}, {counted(len(listing), 'file')}"
        plot(findings, title).savefig(picture, format="png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
