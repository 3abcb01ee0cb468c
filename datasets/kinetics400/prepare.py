"""Turn Kinetics-400, -600 or -700, as it is downloaded, into manifests.

    python datasets/kinetics400/prepare.py --videos k400 --lists k400/annotations

writes train.csv, validation.csv and labels.txt beside this script, and test.csv where the test
videos are there. See README.md there.
"""

import argparse
import csv
import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hpm_video.preparation import recipes
from hpm_video.preparation.recipes import REQUIRED_FOLDER, Classes, Clip, Files, RecipeError

OPTIONS = {
    "--videos": {"help": "folder of the videos of all splits", **REQUIRED_FOLDER},
    "--lists": {"help": "folder of train.csv, val.csv and test.csv", **REQUIRED_FOLDER},
}
LISTS = {"train": "train", "validate": "validation", "val": "validation", "test": "test"}


def read_clips(path: Path, split: str) -> list[Clip]:
    """Read a CSV, which must be labelled except for a test.

    The keys of a clip are the name that download scripts give to its file, and its YouTube id.
    """
    columns = ("label", "youtube_id", "time_start", "time_end")[split == "test" :]
    needed = f"need {','.join(columns)}, the times in seconds, got"
    text = io.StringIO(recipes.read_list_text(path), newline="")
    reader = csv.DictReader(text, skipinitialspace=True)
    header = reader.fieldnames or ()
    if not {*columns} <= {*header}:
        raise RecipeError(f"{path}, line 1: {needed} {','.join(header)!r}. Download the CSV again")
    clips = []
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        cells = {name: (row[name] or "").strip() for name in columns}
        try:
            start, end = (int(float(cells[name])) for name in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            start = end = -1
        if start < 0 or not all(cells.values()):
            raise RecipeError(
                f"{place}: {needed} {','.join(cells.values())!r}. Download the CSV again"
            )
        class_name, youtube_id = cells.get("label", ""), cells["youtube_id"]
        file_name = f"{youtube_id}_{start:06}_{end:06}"
        shown = f"{class_name}/{file_name}" if class_name else file_name
        clips.append(Clip(place, shown, (file_name, youtube_id), class_name))
    return clips


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[recipes.Split]]:
    """Read the lists that are there, and find the file of each video."""
    paths = {options.lists / f"{name}.csv": split for name, split in LISTS.items()}
    clips = {split: read_clips(path, split) for path, split in paths.items() if path.is_file()}
    if "train" not in clips:
        raise RecipeError(
            f"there is no train.csv in {options.lists.absolute()}, from which the numbers of the "
            "classes come. Name the folder of the lists by --lists"
        )
    classes = Classes(sorted({clip.class_name for clip in clips["train"]}), str(options.lists))
    videos = Files(options.videos, options.suffix)
    expected = (
        f"Looked in {videos.folder} and its folders for <youtube_id>_<time_start>_<time_end>, the "
        "times in 6 digits, or <youtube_id>, with any suffix of a video. Name the folder of the "
        "videos by --videos, and the lists of the same release by --lists"
    )
    # An id alone need not identify a clip.
    count = Counter(clip.keys[1] for listed in clips.values() for clip in listed)
    lists = {
        split: [
            clip if count[clip.keys[1]] == 1 else replace(clip, keys=clip.keys[:1])
            for clip in listed
        ]
        for split, listed in clips.items()
    }
    return classes.names, recipes.match(lists, videos, classes, expected)


main = partial(recipes.run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
