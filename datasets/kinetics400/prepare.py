"""Turn Kinetics-400, -600 or -700, as it is downloaded, into manifests.

    python datasets/kinetics400/prepare.py \
        --train k400/train --train-csv k400/annotations/train.csv \
        --validation k400/val --validation-csv k400/annotations/val.csv

writes train.csv, validation.csv and labels.txt beside this script, and test.csv for --test.
A folder may hold a folder for each class, or all videos directly; without its CSV it must have
the class folders. See README.md there.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hpm_video.data.manifest import UNLABELLED
from hpm_video.preparation.recipes import FILE, FOLDER, Prepared, run_recipe
from hpm_video.preparation.sources import (
    Classes,
    Clip,
    RecipeError,
    Split,
    Videos,
    cells_of,
    check_folders,
    folder_key,
    match,
    read_list_text,
    split_of_folders,
    stem,
)

SPLITS = ("train", "validation", "test")
SPELLED = {"val": "validation", "valid": "validation", "validate": "validation"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"--{name}": {"help": f"videos of {name}", **FOLDER} for name in SPLITS},
    **{f"--{name}-csv": {"help": f"CSV of {name}", **FILE} for name in SPLITS},
    "--labels": {
        "help": "names of the classes, one a line in the order of their numbers; by default those "
        "of the training CSV, or of the training class folders, sorted",
        **FILE,
    },
    "--replacements": {
        "help": "videos that take the place of those of the same name; may be given several times",
        "action": "append",
        "default": [],
        **FOLDER,
    },
}
RIGHT_CSV = (
    "Give the CSV of the release that the folders were made from, or no CSV where they are right"
)
RIGHT_FOLDERS = (
    "Without a CSV the class of a video is the folder that it lies in: name the folder of the "
    "class folders, or give the CSV of this split"
)


class Row(NamedTuple):
    """Line of a release's CSV."""

    place: str
    class_name: str
    """Empty in a test split."""
    youtube_id: str
    file_name: str
    """Name that download scripts give to the file, without the suffix."""


def read_rows(path: Path, split: str) -> list[Row]:
    """Read a CSV, which must be of that split and, except for a test, labelled."""
    columns = ("label", "youtube_id", "time_start", "time_end")[split == "test" :]
    rows = []
    for place, cells in cells_of(path, columns):
        if empty := [name for name in columns if not cells[name]]:
            raise RecipeError(f"{place}: {empty[0]} is empty. Download the CSV again")
        given = cells.get("split", "").lower()
        if (own := SPELLED.get(given, given)) in SPLITS and own != split:
            raise RecipeError(
                f"{place}: this clip is of the {own} split, in what was given as --{split}-csv. "
                "Give each split the CSV of its own"
            )
        try:
            start, end = (int(float(cells[name])) for name in ("time_start", "time_end"))
        except (ValueError, OverflowError) as error:
            raise RecipeError(
                f"{place}: time_start and time_end must be numbers of seconds, got "
                f"{cells['time_start']!r} and {cells['time_end']!r}. Download the CSV again"
            ) from error
        file_name = f"{cells['youtube_id']}_{start:06}_{end:06}"
        rows.append(Row(place, cells.get("label", ""), cells["youtube_id"], file_name))
    return rows


def find_classes(options: argparse.Namespace, rows: Iterable[Row], train: Videos | None) -> Classes:
    """Find the classes of all splits: from a list, the training CSV or the training folders.

    ``rows`` are those of the training CSV.
    """
    if options.labels:
        names = [name.strip() for name in read_list_text(options.labels).rstrip().splitlines()]
        if not all(names) or not names:
            raise RecipeError(f"{options.labels}: need the name of a class in every line")
        return Classes(names, str(options.labels))
    if options.train_csv:
        return Classes(sorted({row.class_name for row in rows}), str(options.train_csv))
    if train is None:
        raise RecipeError(
            "the numbers of the classes come from the training split: give --train-csv (without "
            "--train the CSV serves for that alone), or --labels with the labels.txt written then"
        )
    parents = {file.parent for file in train.files} - {train.folder}
    return Classes(sorted({folder.name for folder in parents}), str(train.folder))


def match_rows(
    name: str,
    rows: Sequence[Row],
    videos: Videos,
    classes: Classes,
    count: Mapping[str, int],
    replacements: Sequence[Videos],
) -> tuple[Split, list[str]]:
    """Make a split by its CSV. -> the split, and further lines of the report

    A file may be named by the id alone where that identifies the clip: ``count`` is the number of
    clips per id. ``replacements``: videos that replace corrupt ones.
    """
    clips = []
    for row in rows:
        label = classes.label(row.class_name, row.place) if row.class_name else UNLABELLED
        alone = (row.youtube_id,) if count[row.youtube_id] == 1 else ()
        shown = f"{row.class_name}/{row.file_name}" if row.class_name else row.file_name
        clips.append(Clip(row.place, shown, (row.file_name, *alone), label))

    def find(clip: Clip) -> Path | None:
        usual = videos.find(clip)
        return next((file for folder in replacements if (file := folder.find(clip))), usual)

    expected = (
        f"Looked in {videos.folder} and its folders for <youtube_id>_<time_start>_<time_end>, the "
        "times in 6 digits, or <youtube_id>, with any suffix of a video. Name the folder of this "
        f"split by --{name}, and give the CSV of the same release"
    )
    (split,) = match({name: clips}, videos, expected, find)
    check_folders(split, videos, classes, RIGHT_CSV)
    others = {file for folder in replacements for file in folder.files}
    used = sum(file in others for _, file in split.found)
    notes = [f"{name}: replacements taken: {used}"] if used else []
    ids = dict.fromkeys(row.youtube_id for row in rows)
    if vague := [one for one in ids if count[one] > 1 and one in videos]:
        notes.append(
            f"{name}: videos named by a YouTube id alone, of which the lists have several clips, "
            f"left out: {len(vague)}, such as {vague[0]}"
        )
    return split, notes


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each video."""
    folders: dict[str, Path | None] = {name: getattr(options, name) for name in SPLITS}
    lists: dict[str, Path | None] = {name: getattr(options, f"{name}_csv") for name in SPLITS}
    check_options(folders, lists, options)
    rows = {name: read_rows(path, name) for name, path in lists.items() if path}
    opened: dict[tuple[Path, bool], Videos] = {}  # splits may share a folder
    videos: dict[str, Videos] = {}
    for name, folder in folders.items():
        if folder:
            place = (folder.resolve(), name in rows)
            if place not in opened:
                key = stem if name in rows else folder_key
                opened[place] = Videos(folder, key, suffix=options.suffix)
            videos[name] = opened[place]
    classes = find_classes(options, rows.get("train", []), videos.get("train"))
    replacements = [Videos(one, stem, suffix=options.suffix) for one in options.replacements]
    splits: list[Split] = []
    notes: list[str] = []
    for name, files in videos.items():
        if name not in rows:
            splits.append(split_of_folders(name, files, classes, RIGHT_FOLDERS))
            continue
        beside = [other for other in rows if videos.get(other) is files]
        count = Counter(row.youtube_id for other in beside for row in rows[other])
        split, more = match_rows(name, rows[name], files, classes, count, replacements)
        splits.append(split)
        notes += more
    return Prepared(classes.names, splits, opened.values(), notes)


def check_options(
    folders: Mapping[str, Path | None],
    lists: Mapping[str, Path | None],
    options: argparse.Namespace,
) -> None:
    """Make sure that the options do not contradict each other."""
    if not any(folders.values()):
        raise RecipeError("name the folder of at least one split: --train, --validation or --test")
    for name, path in lists.items():
        if path and not folders[name] and name != "train":
            raise RecipeError(f"--{name}-csv needs --{name}, the folder of its videos")
        if options.replacements and folders[name] and not path:
            raise RecipeError(f"--replacements needs --{name}-csv: it says which clips there are")
        if path and path.resolve() in {(options.output / f"{one}.csv").resolve() for one in SPLITS}:
            raise RecipeError(
                f"{path} is where a manifest goes, which would overwrite the CSV of the release. "
                "Move the CSV to another folder, or name another one by --output"
            )


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
