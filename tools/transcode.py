"""Make videos small and fast to read: python tools/transcode.py MANIFEST OUT.

OUT gets H.264 files with key frames close together (--to files), folders of JPEG images
(--to frames), or tar files in webdataset layout (--to shards), and a manifest.csv to train on:
data.train=OUT/manifest.csv. All three give the same frames. A second start resumes.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from hpm_video.decoding.video_stream import SIMPLEST
from hpm_video.files.failures import BadFilesError
from hpm_video.files.wording import counted
from hpm_video.preparation.prepared_folder import PreparedFolder
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
    "wrong input, a full disk, or files that cannot be read: these are listed in\n"
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
    add("--to", choices=forms, default="files", dest="form", help="form of OUT (default files)")
    add("--copy", action="store_true", help="with --to shards: pack the files as they are")
    smaller = "of larger frames (default 320); smaller ones keep their size; odd sides lose a pixel"
    add("--short-side", type=positive, default=320, metavar="PIXELS", help=smaller)
    by_time = "frames per second, chosen by time; default: every frame once, at the average rate"
    add("--fps", type=above_zero, metavar="N", help=by_time)
    fewer = (
        "keep the first frame and every N-th after it; the column kept_every tells training, whose "
        "data.frame_stride still counts frames of the source and must be a multiple of N"
    )
    add("--keep-every", type=positive, default=1, metavar="N", help=fewer)
    add("--key-frames", type=positive, default=12, metavar="N", help="at most N apart (default 12)")
    add("--crf", type=whole_number(0, 51), default=20, metavar="0-51", help="of H.264 (default 20)")
    quality = whole_number(1, 100)
    add("--quality", type=quality, default=90, metavar="1-100", help="of JPEG (default 90)")
    add("--shard-size", type=above_zero, default=1.0, metavar="GB", help="default: 1")
    workers = {
        "type": positive,
        "default": default_workers() + 1,
        "help": "processes (default here: %(default)s, for the cores that it may use; at most "
        f"{MAX_WORKERS + 1})",
    }
    add_options(parser, "root", "seconds", "memory", workers=workers)
    arguments = parser.parse_args(command_line)
    if arguments.copy and arguments.form != "shards":
        parser.error("--copy packs files into shards: add --to shards")
    if arguments.keep_every > 1 and (arguments.copy or arguments.fps):
        parser.error("--keep-every chooses frames: leave out --copy and --fps")
    arguments.shard_bytes = round(arguments.shard_size * GB)
    if arguments.fps is not None:
        arguments.fps = Fraction(arguments.fps).limit_denominator(SIMPLEST)
        if not 0 < arguments.fps <= 1000:
            parser.error(f"--fps must be between 1/{SIMPLEST} and 1000")
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """Do what is left, and report.

    Raises:
        BadFilesError: some files cannot be read; the others are done.
        ManifestError, OSError: a wrong input, or a disk that is full.
    """
    recipe = Recipe(**{each.name: getattr(arguments, each.name) for each in fields(Recipe)})
    limits = Limits(arguments.seconds, round(arguments.memory * GIB))
    source, root = arguments.source.absolute(), arguments.root
    with closing(PreparedFolder(arguments.output, recipe, source, root)) as folder:
        folder.claim()
        there, missing = len(folder.outputs), folder.missing()
        if missing:
            done = f" ({there} more are done)" if there else ""
            workers = counted(arguments.workers, "process")
            print(f"{counted(len(missing), 'file')}{done}, {workers}", flush=True)
            folder.make(arguments.workers, limits)
        if recipe.form == "shards":
            folder.pack()
        folder.write_lists()
        report(folder, len(folder.outputs) - there)


def report(folder: PreparedFolder, new: int) -> None:
    """Report what was written, and how to train on it.

    Raises:
        BadFilesError: some files cannot be read.
    """
    outputs = folder.outputs.values()
    print(f"\nDone: {counted(len(outputs), 'file')}, {new} of them new")
    before, now = (sum(getattr(each, of) for each in outputs) for of in ("source_bytes", "bytes"))
    print(f"  {tqdm.format_sizeof(before)}B became {tqdm.format_sizeof(now)}B")
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


if __name__ == "__main__":
    sys.exit(main())
