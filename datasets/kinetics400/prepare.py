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
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hpm_video.preparation import recipes
from hpm_video.preparation.recipes import FILE, FOLDER, Classes, Clip, RecipeError

SPLITS = ("train", "validation", "test")
SPELLED = {"val": "validation", "valid": "validation", "validate": "validation"}
NAMES_HELP = (
    "names of the classes, one a line in the order of their numbers; by default those of the "
    "training CSV, or of the training class folders, sorted"
)
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"--{name}": {"help": f"videos of {name}", **FOLDER} for name in SPLITS},
    **{f"--{name}-csv": {"help": f"CSV of {name}", **FILE} for name in SPLITS},
    "--labels": {"help": NAMES_HELP, **FILE},
}


def read_clips(path: Path, split: str) -> list[Clip]:
    """Read a CSV, which must be of that split and, except for a test, labelled.

    The keys of a clip are the name that download scripts give to its file, and its YouTube id.
    """
    columns = ("label", "youtube_id", "time_start", "time_end")[split == "test" :]
    clips = []
    for place, cells in recipes.cells_of(path, columns):
        given = cells.get("split", "").lower()
        if (own := SPELLED.get(given, given)) in SPLITS and own != split:
            raise RecipeError(
                f"{place}: this clip is of the {own} split, in what was given as --{split}-csv. "
                "Give each split the CSV of its own"
            )
        try:
            start, end = (int(float(cells[name])) for name in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            start = end = -1
        if start < 0 or not all(cells[name] for name in columns):
            raise RecipeError(
                f"{place}: need {','.join(columns)}, the times in seconds, got "
                f"{','.join(cells[name] for name in columns)!r}. Download the CSV again"
            )
        class_name, youtube_id = cells.get("label", ""), cells["youtube_id"]
        file_name = f"{youtube_id}_{start:06}_{end:06}"
        shown = f"{class_name}/{file_name}" if class_name else file_name
        clips.append(Clip(place, shown, (file_name, youtube_id), class_name))
    return clips


def find_classes(
    options: argparse.Namespace, clips: list[Clip] | None, train: recipes.Files | None
) -> Classes:
    """Find the classes of all splits: from a list, the training CSV or the training folders.

    ``clips`` are those of the training CSV.
    """
    if options.labels:
        names = recipes.read_list_text(options.labels).rstrip().splitlines()
        return Classes(map(str.strip, names), str(options.labels))
    if clips is not None:
        return Classes(sorted({clip.class_name for clip in clips}), str(options.train_csv))
    if train is None:
        raise RecipeError(
            "the numbers of the classes come from the training split: give --train-csv (without "
            "--train the CSV serves for that alone), or --labels with the labels.txt written then"
        )
    folders = {file.parent for file in train.files} - {train.folder}
    return Classes(sorted({folder.name for folder in folders}), str(train.folder))


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[recipes.Split]]:
    """Read the lists, and find the file of each video."""
    folders, lists = recipes.open_splits(options, SPLITS, "csv")
    clips = {name: read_clips(path, name) for name, path in lists.items()}
    classes = find_classes(options, clips.get("train"), folders.get("train"))
    # An id alone need not identify a clip.
    count = Counter(clip.keys[1] for listed in clips.values() for clip in listed)
    splits = []
    for name, videos in folders.items():
        if name not in clips:
            splits.append(recipes.class_folders(name, videos, classes))
            continue
        listed = [
            clip if count[clip.keys[1]] == 1 else replace(clip, keys=clip.keys[:1])
            for clip in clips[name]
        ]
        expected = (
            f"Looked in {videos.folder} and its folders for <youtube_id>_<time_start>_<time_end>, "
            "the times in 6 digits, or <youtube_id>, with any suffix of a video. Name the folder "
            f"of this split by --{name}, and give the CSV of the same release"
        )
        splits += recipes.match({name: listed}, videos, classes, expected)
    return classes.names, splits


main = partial(recipes.run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
