"""Turn Kinetics-400, -600 or -700, as it is downloaded, into manifests.

    python datasets/kinetics400/prepare.py \
        --train k400/train --train-csv k400/annotations/train.csv \
        --validation k400/val --validation-csv k400/annotations/val.csv

writes train.csv, validation.csv and labels.txt beside this script, and test.csv for --test.
A folder may hold a folder for each class, or all videos directly; without its CSV it must have
the class folders. See README.md there.
"""

import argparse
import csv
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpm_video.data.manifest import UNLABELLED
from hpm_video.preparation.recipes import Prepared, RecipeParser, run_recipe
from hpm_video.preparation.sources import (
    Classes,
    Clip,
    RecipeError,
    Split,
    Videos,
    check_folders,
    check_once,
    clips_of_folders,
    folder_key,
    match,
    read_text,
    stem,
)

SPLITS = ("train", "validation", "test")
COLUMNS = ("youtube_id", "time_start", "time_end")
SPLIT_WORDS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "validation": "validation",
    "test": "test",
}
EXPECTED_COLUMNS = (
    "Expected are the columns label,youtube_id,time_start,time_end,split, where a test CSV may be "
    "without label, split may be absent and others may follow"
)


@dataclass(frozen=True)
class Row:
    """A line of a release's CSV."""

    place: str
    class_name: str | None
    youtube_id: str
    start: int
    end: int

    @property
    def file_name(self) -> str:
        """As download scripts name the clip's file, apart from the suffix."""
        return f"{self.youtube_id}_{self.start:06}_{self.end:06}"


def read_rows(path: Path, split: str) -> list[Row]:
    """The lines of a CSV, which must be of that split and, but for a test, labelled."""
    reader = csv.reader(io.StringIO(read_text(path, "the CSV"), newline=""))
    header = [cell.strip() for cell in next(reader, [])]
    needed = COLUMNS if split == "test" else ("label", *COLUMNS)
    if absent := [name for name in needed if header.count(name) != 1]:
        raise RecipeError(
            f"{path}, line 1: need each of the columns {','.join(needed)} once; missing or "
            f"repeated: {','.join(absent)}; got {','.join(header)!r}. {EXPECTED_COLUMNS}"
        )
    rows = []
    for cells in reader:
        if not cells:
            continue
        place = f"{path}, line {reader.line_num}"
        if len(cells) != len(header):
            raise RecipeError(
                f"{place}: need {len(header)} columns as in the first line, got "
                f"{','.join(cells)!r}. A name with a comma is put into quotes"
            )
        named = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        rows.append(_read_row(place, named, split))
    return rows


def _read_row(place: str, cells: dict[str, str], split: str) -> Row:
    class_name = cells.get("label") or None
    if not cells["youtube_id"] or (class_name is None and split != "test"):
        empty = "label" if cells["youtube_id"] else "youtube_id"
        raise RecipeError(f"{place}: {empty} is empty. {EXPECTED_COLUMNS}")
    split_of_row = SPLIT_WORDS.get(cells.get("split", "").lower(), split)
    if split_of_row != split:
        raise RecipeError(
            f"{place}: this clip is of the {split_of_row} split, in what was given as "
            f"--{split}-csv. Give each split the CSV of its own"
        )
    try:
        start, end = (int(float(cells[name])) for name in ("time_start", "time_end"))
    except (ValueError, OverflowError) as error:
        raise RecipeError(
            f"{place}: time_start and time_end must be numbers of seconds, got "
            f"{cells['time_start']!r} and {cells['time_end']!r}. {EXPECTED_COLUMNS}"
        ) from error
    return Row(place, class_name, cells["youtube_id"], start, end)


def read_names(path: Path) -> list[str]:
    """Names of classes, one a line."""
    names = [name.strip() for name in read_text(path, "the list of classes").splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        line = names.index("") + 1 if names else 1
        raise RecipeError(f"{path}, line {line}: need the name of a class, got an empty line")
    return names


def find_classes(
    labels: Path | None, train_csv: Path | None, rows: Sequence[Row], train: Videos | None
) -> Classes:
    """The numbering, the same for all splits: from a list, the training CSV, or its folders.

    ``rows`` are those of the training CSV.
    """
    if labels:
        return Classes(read_names(labels), str(labels))
    if train_csv:
        names = {row.class_name for row in rows if row.class_name}
        return Classes(sorted(names), str(train_csv))
    if train is None:
        raise RecipeError(
            "the numbers of the classes come from the training split: give --train-csv (without "
            "--train the CSV serves for that alone), or --labels with the labels.txt written then"
        )
    parents = {file.parent for file in train.files} - {train.folder}
    return Classes(sorted({folder.name for folder in parents}), str(train.folder))


def clips_of_rows(rows: Sequence[Row], classes: Classes, count: Mapping[str, int]) -> list[Clip]:
    """The clips of a CSV. A file may be named by the id alone where that says which clip it is.

    ``count`` says how many clips there are of an id.
    """
    clips = []
    for row in rows:
        name = row.class_name
        label = UNLABELLED if name is None else classes.label(name, row.place)
        alone = (row.youtube_id,) if count[row.youtube_id] == 1 else ()
        shown = row.file_name if name is None else f"{name}/{row.file_name}"
        clips.append(Clip(row.place, shown, (row.file_name, *alone), label))
    check_once(clips)
    return clips


def match_csv(
    name: str,
    rows: Sequence[Row],
    videos: Videos,
    clips: Sequence[Clip],
    replacements: Sequence[Videos],
) -> tuple[Split, list[str]]:
    """A split with a CSV, and what else is to be reported.

    ``replacements``: videos that take the place of corrupt ones, all of them that are there.
    """
    expected = (
        f"Looked in {videos.folder} and its folders for <youtube_id>_<time_start>_<time_end>, the "
        "times in 6 digits, or <youtube_id>, with any suffix of a video. Name the folder of this "
        f"split by --{name}, and give the CSV of the same release"
    )

    def find(clip: Clip) -> Path | None:
        usual = videos.find(clip)
        return next((file for shelf in replacements if (file := shelf.find(clip))), usual)

    split = match(name, clips, videos, expected, find)
    others = {file for shelf in replacements for file in shelf.files}
    used = sum(file in others for _, file in split.found)
    notes = [f"{name}: replacements taken: {used}"] if used else []
    by_id = {row.youtube_id for row, clip in zip(rows, clips, strict=True) if len(clip.keys) > 1}
    ids = dict.fromkeys(row.youtube_id for row in rows)
    if vague := [one for one in ids if one not in by_id and one in videos]:
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
    shelves: dict[tuple[Path, bool], Videos] = {}  # splits may share a folder
    videos: dict[str, Videos] = {}
    for name, folder in folders.items():
        if folder:
            place = (folder.resolve(), name in rows)
            if place not in shelves:
                key = stem if name in rows else folder_key
                shelves[place] = Videos(folder, key, suffix=options.suffix)
            videos[name] = shelves[place]
    classes = find_classes(
        options.labels, lists["train"], rows.get("train", []), videos.get("train")
    )
    replacements = [Videos(one, stem, suffix=options.suffix) for one in options.replacements]
    splits: list[Split] = []
    notes: list[str] = []
    for name, shelf in videos.items():
        labels = classes.folders(shelf).get
        if name in rows:
            beside = [other for other in rows if videos.get(other) is shelf]
            count = Counter(row.youtube_id for other in beside for row in rows[other])
            clips = clips_of_rows(rows[name], classes, count)
            split, more = match_csv(name, rows[name], shelf, clips, replacements)
            remedy = (
                "Give the CSV of the release that the folders were made from, or no CSV where they "
                "are right"
            )
            check_folders(split, labels, classes.names, remedy)
            notes += more
        else:
            why = (
                f"named like one of the {len(classes.names)} classes of {classes.source}. Without "
                "a CSV the class of a video is the folder that it lies in: name the folder of the "
                "class folders, or give the CSV of this split"
            )
            split = match(name, clips_of_folders(shelf, labels, folder_key, why), shelf)
            notes.append(f"{name}: without a CSV, so what is missing is not known")
        splits.append(split)
    return Prepared(classes.names, splits, shelves.values(), notes)


def check_options(
    folders: dict[str, Path | None],
    lists: dict[str, Path | None],
    options: argparse.Namespace,
) -> None:
    """Options that contradict one another."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = RecipeParser(__doc__, __file__)
    for name in SPLITS:
        parser.add_path(f"--{name}", f"videos of {name}")
        parser.add_path(f"--{name}-csv", f"CSV of {name}", "FILE")
    parser.add_path(
        "--labels",
        "names of the classes, one a line in the order of their numbers; by default those of the "
        "training CSV, or of the training class folders, sorted",
        "FILE",
    )
    replacements = (
        "videos that take the place of those of the same name; may be given several times"
    )
    parser.add_path("--replacements", replacements, action="append", default=[])
    return run_recipe(parser.parse_args(arguments), prepare)


if __name__ == "__main__":
    sys.exit(main())
