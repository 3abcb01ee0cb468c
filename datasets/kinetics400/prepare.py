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
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from hpm_video.preparation import sources
from hpm_video.preparation.recipes import FILE, FOLDER, Prepared, open_splits, run_recipe
from hpm_video.preparation.sources import RecipeError

SPLITS = ("train", "validation", "test")
SPELLED = {"val": "validation", "valid": "validation", "validate": "validation"}
NAMES_HELP = (
    "names of the classes, one a line in the order of their numbers; by default those of the "
    "training CSV, or of the training class folders, sorted"
)
TAKEN_HELP = "videos that take the place of those of the same name; may be given several times"
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"--{name}": {"help": f"videos of {name}", **FOLDER} for name in SPLITS},
    **{f"--{name}-csv": {"help": f"CSV of {name}", **FILE} for name in SPLITS},
    "--labels": {"help": NAMES_HELP, **FILE},
    "--replacements": {"help": TAKEN_HELP, "action": "append", "default": [], **FOLDER},
}
RIGHT_CSV = (
    "Give the CSV of the release that the folders were made from, or no CSV where they are right"
)
RIGHT_FOLDERS = (
    "Without a CSV the class of a video is the folder that it lies in: name the folder of the "
    "class folders, or give the CSV of this split"
)
EXPECTED = (
    "Looked in {folder} and its folders for <youtube_id>_<time_start>_<time_end>, the times in 6 "
    "digits, or <youtube_id>, with any suffix of a video. Name the folder of this split by "
    "--{name}, and give the CSV of the same release"
)


def read_clips(path: Path, split: str) -> list[sources.Clip]:
    """Read a CSV, which must be of that split and, except for a test, labelled.

    The keys of a clip are the name that download scripts give to its file, and its YouTube id.
    """
    columns = ("label", "youtube_id", "time_start", "time_end")[split == "test" :]
    clips = []
    for place, cells in sources.cells_of(path, columns):
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
        class_name, youtube_id = cells.get("label", ""), cells["youtube_id"]
        file_name = f"{youtube_id}_{start:06}_{end:06}"
        shown = f"{class_name}/{file_name}" if class_name else file_name
        clips.append(sources.Clip(place, shown, (file_name, youtube_id), class_name))
    return clips


def find_classes(
    options: argparse.Namespace, clips: list[sources.Clip] | None, train: sources.Videos | None
) -> sources.Classes:
    """Find the classes of all splits: from a list, the training CSV or the training folders.

    ``clips`` are those of the training CSV.
    """
    if options.labels:
        names = [
            name.strip() for name in sources.read_list_text(options.labels).rstrip().splitlines()
        ]
        if not all(names) or not names:
            raise RecipeError(f"{options.labels}: need the name of a class in every line")
        return sources.Classes(names, str(options.labels))
    if clips is not None:
        return sources.Classes(sorted({clip.class_name for clip in clips}), str(options.train_csv))
    if train is None:
        raise RecipeError(
            "the numbers of the classes come from the training split: give --train-csv (without "
            "--train the CSV serves for that alone), or --labels with the labels.txt written then"
        )
    parents = {file.parent for file in train.files} - {train.folder}
    return sources.Classes(sorted({folder.name for folder in parents}), str(train.folder))


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each video."""
    folders, lists = open_splits(options, SPLITS, "csv", sources.folder_key)
    check_options(options, folders, lists)
    clips = {name: read_clips(path, name) for name, path in lists.items()}
    classes = find_classes(options, clips.get("train"), folders.get("train"))
    replacements = [
        sources.Videos(one, sources.stem, suffix=options.suffix) for one in options.replacements
    ]
    for videos, others in product(dict.fromkeys(folders.values()), reversed(replacements)):
        videos.replace(others)
    replacing = {file for others in replacements for file in others.files}
    splits: list[sources.Split] = []
    notes: list[str] = []
    for name, videos in folders.items():
        if name not in clips:
            splits.append(sources.split_of(name, videos, classes, None, "", RIGHT_FOLDERS))
            continue
        beside = [clip for other in clips if folders.get(other) is videos for clip in clips[other]]
        count = Counter(clip.keys[1] for clip in beside)  # an id alone need not identify a clip
        listed = [
            clip if count[clip.keys[1]] == 1 else replace(clip, keys=clip.keys[:1])
            for clip in clips[name]
        ]
        expected = EXPECTED.format(folder=videos.folder, name=name)
        split = sources.split_of(name, videos, classes, listed, expected, RIGHT_CSV)
        splits.append(split)
        if used := sum(file in replacing for _, file in split.found):
            notes.append(f"{name}: replacements taken: {used}")
        ids = dict.fromkeys(clip.keys[1] for clip in clips[name])
        if vague := [one for one in ids if count[one] > 1 and one in videos]:
            notes.append(
                f"{name}: videos named by a YouTube id alone, of which the lists have several "
                f"clips, left out: {len(vague)}, such as {vague[0]}"
            )
    return Prepared(classes.names, splits, notes)


def check_options(
    options: argparse.Namespace, folders: Mapping[str, sources.Videos], lists: Mapping[str, Path]
) -> None:
    """Make sure that the options do not contradict each other."""
    if options.replacements and (absent := [name for name in folders if name not in lists]):
        raise RecipeError(f"--replacements needs --{absent[0]}-csv: it says which clips there are")
    written = {(options.output / f"{name}.csv").resolve() for name in SPLITS}
    for path in lists.values():
        if path.resolve() in written:
            raise RecipeError(
                f"{path} is where a manifest goes, which would overwrite the CSV of the release. "
                "Move the CSV to another folder, or name another one by --output"
            )


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
