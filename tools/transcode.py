"""Make videos small and fast to read: python tools/transcode.py MANIFEST OUT.

OUT gets H.264 files with key frames close together (--to files), folders of JPEG images
(--to frames), or tar files in webdataset layout (--to shards), and a manifest.csv to train on:
data.train=OUT/manifest.csv. All three give the same frames. A second start resumes.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path
from typing import get_args

from tqdm import tqdm

import hpm_video
from hpm_video.data.manifest import read_listing, read_manifest
from hpm_video.files.failures import BadFilesError
from hpm_video.files.wording import counted
from hpm_video.preparation.encode import Tune
from hpm_video.preparation.prepared_folder import Estimate, PreparedFolder
from hpm_video.preparation.transcode import Recipe
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
from hpm_video.workers.pool import GIB, Limits
from hpm_video.workers.room import MAX_WORKERS, default_workers

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
    add("output", type=Path, metavar="OUT", help="folder to write to; a second start resumes")
    forms = ("files", "frames", "shards")
    add("--to", choices=forms, default="files", dest="form", help="see above (default files)")
    add("--copy", action="store_true", help="with --to shards: pack the files as they are")
    smaller = "of larger frames (default 320); smaller ones keep their size, odd sides lose a pixel"
    add("--short-side", type=even, default=320, metavar="PIXELS", help=smaller)
    by_time = "frames per second, chosen by time; default: every frame once, at the average rate"
    add("--fps", type=rate, metavar="N", help=by_time)
    fewer = (
        "keep the first frame and every N-th after it; the column kept_every tells training, whose "
        "data.frame_stride still counts frames of the source and must be a multiple of N"
    )
    add("--keep-every", type=positive, default=1, metavar="N", help=fewer)
    add("--key-frames", type=positive, default=12, metavar="N", help="at most N apart (default 12)")
    add("--crf", type=whole_number(0, 51), default=20, metavar="0-51", help="of H.264 (default 20)")
    tune = "H.264 that is cheap to decode (fastdecode, the default), or as before that (none)"
    add("--tune", choices=get_args(Tune), default="fastdecode", help=tune)
    quality = whole_number(1, 100)
    add("--quality", type=quality, default=90, metavar="1-100", help="JPEG (default 90)")
    add("--shard-size", type=above_zero, default=1.0, metavar="GB", help="(default 1)")
    workers = {
        "type": positive,
        "default": default_workers() + 1,
        "help": "processes (default here: %(default)s, for the cores that it may use; at most "
        f"{MAX_WORKERS + 1})",
    }
    add_options(parser, "root", "seconds", "memory", workers=workers)
    estimate = "try a few files, report the expected time and size, and stop"
    add("--estimate", "--dry-run", action="store_true", help=estimate)
    add("--force", action="store_true", help="continue even if the disk seems too small")
    arguments = parser.parse_args(command_line)
    if arguments.copy and arguments.form != "shards":
        parser.error("--copy packs files into shards: add --to shards")
    if arguments.keep_every > 1 and (arguments.copy or arguments.fps):
        parser.error("--keep-every chooses frames: leave out --copy and --fps")
    if arguments.copy or arguments.form == "frames":
        arguments.tune = "none"  # nothing is encoded as H.264
    arguments.shard_bytes = round(arguments.shard_size * GB)
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """Estimate, do what is left, and report.

    Raises:
        BadFilesError: some files cannot be read; the others are done.
        ManifestError, OSError: a wrong input, or a disk that is full.
    """
    recipe = Recipe(**{each.name: getattr(arguments, each.name) for each in fields(Recipe)})
    source, root = arguments.source.absolute(), arguments.root
    base = (root or (source if source.is_dir() else source.parent)).absolute()
    manifest, listing = read_manifest(source, root), read_listing(source, root)
    settings = {
        "hpm_video": hpm_video.__version__,
        "source": str(source),
        "root": str(base),
        **asdict(recipe),
        "fps": recipe.fps and str(recipe.fps),
    }
    with closing(PreparedFolder(arguments.output, recipe, manifest, listing, base)) as folder:
        if not arguments.estimate or (folder.path / "settings.json").is_file():
            folder.claim(settings)
        if folder.changed:
            print(f"{counted(folder.changed, 'file')} changed, or got other labels: done again")
        began, there = time.monotonic(), len(folder.outputs)
        try:
            work_through(folder, arguments)
        except KeyboardInterrupt:
            done = f"{len(folder.outputs)} of {counted(len(folder.names), 'file')} are done"
            print(f"\n{done}; the same command goes on", flush=True)
            raise
        if not arguments.estimate:
            folder.write_lists()
            report(folder, len(folder.outputs) - there, time.monotonic() - began)


def work_through(folder: PreparedFolder, arguments: argparse.Namespace) -> None:
    """Do what is left, or only estimate it."""
    limits = Limits(arguments.seconds, round(arguments.memory * GIB))
    if places := folder.missing():
        workers = min(arguments.workers, len(places))
        cost = folder.estimate(places, workers, limits)
        announce(folder, cost, workers, force=arguments.force or arguments.estimate)
        if not arguments.estimate:
            folder.make(places, workers, limits)
    else:
        print(f"there already: {counted(len(folder.names) - len(folder.failures), 'file')}")
    if folder.recipe.form == "shards" and not arguments.estimate:
        folder.pack(arguments.workers, limits)


def announce(folder: PreparedFolder, cost: Estimate, workers: int, *, force: bool) -> None:
    """Report the work ahead, and what to expect.

    Raises:
        OSError: the outputs do not fit on the disk, and no ``force`` is given.
    """
    done = f" ({len(folder.outputs)} more are done)" if folder.outputs else ""
    size, processes = size_of(cost.before), counted(workers, "process")
    print(f"{counted(cost.files, 'file')}{done}, {size}, on {processes}")
    needed, free = cost.after, free_bytes(folder.path)
    if folder.recipe.copy:
        print(f"  packed as they are: {size_of(needed)}")
    elif cost.tried:
        print(
            f"  estimate from {cost.tried} of {counted(cost.files, 'file')}: "
            f"{tqdm.format_interval(cost.seconds / workers)}, then {size_of(needed)}"
        )
    else:
        print("  no estimate: none of the files that were tried can be read")
    print(f"  free on that disk: {size_of(free)}", flush=True)
    if folder.recipe.form == "shards" and not folder.recipe.copy:
        needed += min(folder.recipe.shard_bytes, needed)
    if needed > free and not force:
        raise OSError(
            f"{folder.path} needs about {size_of(needed)}, and {size_of(free)} are free there. "
            "Take another disk, a smaller --short-side or a higher --crf, or --force to begin "
            "nevertheless"
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
    outputs = folder.outputs.values()
    took = tqdm.format_interval(seconds)
    print(f"\nDone: {counted(len(outputs), 'file')}, {new} of them new, in {took}")
    before, now = (sum(getattr(each, of) for each in outputs) for of in ("source_bytes", "bytes"))
    print(f"  {size_of(before)} became {size_of(now)}")
    odd = [f"{shortest(place)}: {it.note}" for place, it in folder.outputs.items() if it.note]
    for line in odd[:3]:
        print(f"  {line}")
    if len(odd) > 3:
        print(f"  and {len(odd) - 3} more of this kind")
    print(f"  to train on it: data.train={shortest(folder.path / 'manifest.csv')}", flush=True)
    if folder.failures:
        listed = f"They are listed in {folder.path / 'failed.csv'}"
        remedy = f"{listed}, and the same command tries them again"
        raise BadFilesError([*folder.failures.values()], len(folder.names), remedy)


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
