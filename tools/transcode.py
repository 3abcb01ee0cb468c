"""Make videos small and quick to read: python tools/transcode.py MANIFEST OUT.

OUT gets H.264 files with a short way from key frame to key frame (--to files), folders of JPEG
images (--to frames), or tar files in the layout of webdataset (--to shards), and a manifest.csv
to train on: data.train=OUT/manifest.csv. All three give the same frames. A second start goes on.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

import hpm_video
from hpm_video.data.loader import MAX_WORKERS, default_workers
from hpm_video.data.manifest import read_listing, read_manifest
from hpm_video.files.failures import BadFilesError
from hpm_video.preparation.prepare import Estimate, make, pack, try_out
from hpm_video.preparation.prepared_folder import PreparedFolder, Rows
from hpm_video.preparation.shards import Packer
from hpm_video.preparation.transcode import Recipe, Transcoder
from hpm_video.runs.console import (
    above_zero,
    add_options,
    exit_codes,
    make_parser,
    positive,
    run,
    shortest,
    whole_number,
)
from hpm_video.workers.pool import GIB, Limits, Pool
from hpm_video.workers.progress_bar import ProgressBar

GB = 1e9
EXIT_CODES = exit_codes(
    "every file is done",
    "a wrong input or a full disk, or some files cannot be read: they are listed in\n"
    "       OUT/failed.csv, and the others are done",
)


def main(command_line: Sequence[str] | None = None) -> int:
    """Prepare the data, and report what was written."""
    arguments = parse_arguments(command_line)
    return run(lambda: prepare(arguments))


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, EXIT_CODES)
    add = parser.add_argument
    add("source", type=Path, metavar="MANIFEST", help="manifest or folder of videos or images")
    add("output", type=Path, metavar="OUT", help="folder to write to; a second start goes on")
    add("--to", choices=("files", "frames", "shards"), default="files", dest="form")
    add("--copy", action="store_true", help="with --to shards: pack the files as they are")
    add(
        "--short-side",
        type=even,
        default=320,
        metavar="PIXELS",
        help="of larger frames (default 320); smaller ones keep their size, and odd sides lose "
        "a pixel",
    )
    add(
        "--fps",
        type=rate,
        metavar="N",
        help="frames a second, chosen by time; default: every frame once, at the average rate",
    )
    add("--key-frames", type=positive, default=12, metavar="N", help="at most N apart (default 12)")
    add("--crf", type=whole_number(0, 51), default=20, metavar="0-51", help="of H.264 (default 20)")
    add(
        "--quality",
        type=whole_number(1, 100),
        default=90,
        metavar="1-100",
        help="JPEG (default 90)",
    )
    add(
        "--shard-size",
        type=lambda text: round(above_zero(text) * GB),
        default=round(GB),
        dest="shard_bytes",
        metavar="GB",
        help="(default 1)",
    )
    workers = {
        "type": positive,
        "default": default_workers() + 1,
        "help": "processes (default here: %(default)s, for the cores that it may use; at most "
        f"{MAX_WORKERS + 1})",
    }
    add_options(parser, "root", "seconds", "memory", workers=workers)
    add(
        "--estimate",
        "--dry-run",
        action="store_true",
        help="try a few files, report the expected time and size, and stop",
    )
    add("--force", action="store_true", help="go on though the disk seems too small")
    arguments = parser.parse_args(command_line)
    if arguments.copy and arguments.form != "shards":
        parser.error("--copy packs files into shards: add --to shards")
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """Estimate, do what is left, and report.

    Raises:
        BadFilesError: some files cannot be read; the others are done.
        ManifestError, OSError: a wrong input, or a disk that is full.
    """
    recipe = Recipe(**{each.name: getattr(arguments, each.name) for each in fields(Recipe)})
    source = arguments.source.absolute()
    base = (arguments.root or (source if source.is_dir() else source.parent)).absolute()
    rows = Rows.of(read_manifest(source, arguments.root), read_listing(source, arguments.root))
    settings = {
        "hpm_video": hpm_video.__version__,
        "source": str(source),
        "root": str(base),
        **asdict(recipe),
        "fps": recipe.fps and str(recipe.fps),
    }
    with PreparedFolder(arguments.output, recipe, rows, base) as folder:
        if not arguments.estimate or (folder.path / "settings.json").is_file():
            folder.claim(settings)
        if folder.changed:
            print(f"{folder.changed} files or their labels have changed: these are done again")
        began, there = time.monotonic(), len(folder)
        try:
            work_through(folder, arguments)
        except KeyboardInterrupt:
            print(
                f"\n{len(folder)} of {folder.num_places} files are done; the same command goes on",
                flush=True,
            )
            raise
        if not arguments.estimate:
            folder.write_lists()
            report(folder, len(folder) - there, time.monotonic() - began)


def work_through(folder: PreparedFolder, arguments: argparse.Namespace) -> None:
    """Do what is left, or only estimate it."""
    limits = Limits(arguments.seconds, round(arguments.memory * GIB))
    places = folder.missing()
    if places:
        workers = min(arguments.workers, len(places))
        with Pool(Transcoder(folder.recipe), workers, limits, depth=1) as pool:
            estimate = try_out(folder, pool, places)
            announce(folder, estimate, workers)
            check_disk(folder, estimate, force=arguments.force or arguments.estimate)
            if arguments.estimate:
                return
            with closing(ProgressBar(len(places), "files", "frames/s")) as bar:
                make(folder, pool, places, lambda n, last: bar.advance(n, is_last=last))
    else:
        print(f"all {folder.num_places - len(folder.failures)} files are there already")
    if folder.recipe.form != "shards" or arguments.estimate:
        return
    if shards := folder.unpacked_shards():
        # Nothing is decoded, and a large file is copied in one step: it may take longer.
        limits = replace(limits, seconds=10 * limits.seconds)
        with (
            Pool(Packer(), min(arguments.workers, len(shards)), limits, depth=1) as packers,
            closing(ProgressBar(len(shards), "shards", "MB/s")) as bar,
        ):
            for size in pack(folder, packers, shards):
                bar.advance(size / 1e6)


def announce(folder: PreparedFolder, estimate: Estimate, workers: int) -> None:
    """Report the work ahead, and what to expect."""
    done = f" ({len(folder)} more are done)" if len(folder) else ""
    print(
        f"{estimate.files} files{done}, {size_of(estimate.before)}, on "
        f"{workers} {'process' if workers == 1 else 'processes'}"
    )
    if folder.recipe.copy:
        print(f"  packed as they are: {size_of(estimate.after)}")
    elif estimate.tried:
        print(
            f"  estimate from {estimate.tried} of {estimate.files} files: "
            f"{tqdm.format_interval(estimate.seconds / workers)}, then {size_of(estimate.after)}"
        )
    else:
        print("  no estimate: none of the files that were tried can be read")
    print(f"  free on that disk: {size_of(free_bytes(folder.path))}", flush=True)


def check_disk(folder: PreparedFolder, estimate: Estimate, *, force: bool) -> None:
    """Make sure that the outputs fit on the disk.

    Raises:
        OSError: they do not.
    """
    needed = estimate.after
    if folder.recipe.form == "shards" and not folder.recipe.copy:
        needed += min(folder.recipe.shard_bytes, estimate.after)
    if needed > free_bytes(folder.path) and not force:
        raise OSError(
            f"{folder.path} needs about {size_of(needed)}, and {size_of(free_bytes(folder.path))} "
            "are free there. Take another disk, a smaller --short-side or a higher --crf, or "
            "--force to begin nevertheless"
        )


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of a folder that may not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def report(folder: PreparedFolder, new: int, seconds: float) -> None:
    """Report what was written, and how to train on it.

    Raises:
        BadFilesError: some files cannot be read.
    """
    manifest = folder.path / "manifest.csv"
    print(f"\nDone: {len(folder)} files, {new} of them new, in {tqdm.format_interval(seconds)}")
    before = sum(output.source_bytes for output in folder.outputs.values())
    now = sum(output.bytes for output in folder.outputs.values())
    print(f"  {size_of(before)} became {size_of(now)}")
    odd = {place: output.note for place, output in folder.outputs.items() if output.note}
    for place, note in list(odd.items())[:3]:
        print(f"  {shortest(place)}: {note}")
    if len(odd) > 3:
        print(f"  and {len(odd) - 3} more of this kind")
    print(f"  to train on it: data.train={shortest(manifest)}", flush=True)
    if folder.failures:
        raise BadFilesError(
            [*folder.failures.values()],
            folder.num_places,
            f"They are listed in {folder.path / 'failed.csv'}, and the same command tries them "
            "again",
        )


def size_of(count: int) -> str:
    """Format a number of bytes."""
    return f"{tqdm.format_sizeof(count)}B"


def even(text: str) -> int:
    """Parse an even number of at least 2."""
    value = positive(text)
    if value % 2:
        raise argparse.ArgumentTypeError(
            f"must be even (colour is stored at half resolution), got {text!r}"
        )
    return value


def rate(text: str) -> Fraction:
    """Parse a frame rate such as 25, 12.5 or 30000/1001."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"must be such as 25, 12.5 or 30000/1001, got {text!r}")
    return value.limit_denominator(1001)


if __name__ == "__main__":
    sys.exit(main())
