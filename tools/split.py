"""Split a list of files into training and validation: python tools/split.py MANIFEST.

Writes train.csv and validation.csv, with all columns of the list, and paths that are right wherever
the two lie. About the same share of every class is chosen, by a seed. Files of one group, such as
clips cut from one video, are never on both sides, nor are sections of one file (columns start and
end), nor files of equal content if tools/check_videos.py has noted it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpm_video.data.manifest import ManifestError, read_listing, write_manifest
from hpm_video.data.split import choose_validation, groups_by_column, groups_by_name, joined_groups
from hpm_video.files.wording import counted
from hpm_video.runs.console import add_options, exit_codes, make_parser, run


def main(command_line: Sequence[str] | None = None) -> int:
    """Split, and say how."""
    parser = make_parser(__doc__, exit_codes())
    add = parser.add_argument
    add("manifest", type=Path, help="manifest, or folder of videos or images")
    share = "share of the files that validation gets (default 0.1)"
    add("--share", type=float, default=0.1, metavar="SHARE", help=share)
    add("--seed", type=int, default=0, metavar="N", help="seed of the draw (default 0)")
    column = (
        "column whose equal cells keep files on one side; none: every file by itself; default: "
        "files whose names differ only in their last numbers, if there are any"
    )
    add("--group", metavar="COLUMN", help=column)
    output = {"default": Path(), "help": "folder to write to (default: the current)"}
    add_options(parser, output=output)
    arguments = parser.parse_args(command_line)
    return run(lambda: split(arguments))


def split(arguments: argparse.Namespace) -> None:
    """Write both lists.

    Raises:
        ManifestError: the list cannot be read or split, or a list is there already.
    """
    share, output = arguments.share, arguments.output
    if not 0 < share <= 0.5:
        raise ManifestError(f"--share must lie in (0, 0.5], got {share:g}")
    targets = [output / f"{name}.csv" for name in ("train", "validation")]
    if there := [str(path) for path in targets if path.exists()]:
        raise ManifestError(f"{there[0]} is there already; move it, or name another --output")
    listing = read_listing(arguments.manifest)
    labels = listing.column("label")
    groups, origin = list(listing.files), "every file by itself"
    if arguments.group is None:
        origin += ", as the names show no groups"
        if by_name := groups_by_name(listing.files, labels):
            groups, origin = by_name, "names that differ by their last numbers are one group"
    elif arguments.group != "none":
        groups = groups_by_column(listing, arguments.group)
        origin = f"grouped by the column {arguments.group}"
    contents = zip(listing.column("content"), listing.files, strict=True)
    joined = joined_groups(groups, [content or file for content, file in contents])
    chosen = choose_validation(labels, joined, share, arguments.seed)
    table = listing.table.assign(path=listing.files)
    for path, rows in zip(targets, (~chosen, chosen), strict=True):
        write_manifest(table[rows], path)
        files, classes = int(rows.sum()), len({labels[i] for i in np.flatnonzero(rows)} - {""})
        of_classes = f" of {counted(classes, 'class')}" if classes else ""
        print(f"wrote {path}: {counted(files, 'file')}{of_classes}")
    print(f"{counted(len(set(joined)), 'group')} of {counted(len(listing), 'file')}: {origin}")
    if absent := sorted(set(labels) - {labels[i] for i in np.flatnonzero(chosen)}):
        lacking = counted(len(absent), "class")
        print(f"too few groups for a validation file: {lacking}, first {absent[0]}")


if __name__ == "__main__":
    sys.exit(main())
