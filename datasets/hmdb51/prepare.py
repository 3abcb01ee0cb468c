"""Turn HMDB51 as it is published into manifests: three splits, each for training and testing.

    python datasets/hmdb51/prepare.py --videos hmdb51_org --lists testTrainMulti_7030_splits

writes train_split1.csv, test_split1.csv ... test_split3.csv and labels.txt beside this script.
See README.md there.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hpm_video.preparation.recipes import Prepared, RecipeParser, run_recipe
from hpm_video.preparation.sources import (
    Classes,
    Clip,
    RecipeError,
    Videos,
    check_once,
    class_key,
    folder_key,
    lines_of,
    match,
)

NUMBERS = (1, 2, 3)
UNUSED, TRAIN, TEST = "0", "1", "2"
_LIST = re.compile(r"(?P<name>.+)_test_split(?P<number>[123])\.txt")
_LINE = re.compile(r"(?P<name>\S.*?)\s+(?P<use>[012])")  # names hold all sorts of characters


def read_classes(lists: Path) -> Classes:
    """The classes that have lists, sorted by name, once it is sure that no list is missing."""
    matches = [_LIST.fullmatch(path.name) for path in lists.glob("*.txt")]
    names = sorted({found["name"] for found in matches if found})
    if not names:
        raise RecipeError(
            f"there are no lists such as brush_hair_test_split1.txt in {lists.absolute()}. Name "
            "the folder testTrainMulti_7030_splits, which test_train_splits.rar holds, by --lists"
        )
    for name in names:
        for number in NUMBERS:
            if not list_of(lists, name, number).is_file():
                raise RecipeError(
                    f"there is no list {list_of(lists, name, number)}, though the class {name!r} "
                    "has others. Extract test_train_splits.rar again"
                )
    return Classes(names, str(lists))


def list_of(lists: Path, name: str, number: int) -> Path:
    """The list of a class in a split."""
    return lists / f"{name}_test_split{number}.txt"


def read_split(lists: Path, classes: Classes, number: int) -> dict[str, list[Clip]]:
    """The clips of a split by their use."""
    clips: dict[str, list[Clip]] = {UNUSED: [], TRAIN: [], TEST: []}
    for label, name in enumerate(classes.names):
        for place, row in lines_of(list_of(lists, name, number)):
            found = _LINE.fullmatch(row)
            if not found:
                raise RecipeError(
                    f"{place}: need the name of a video and then 0 (unused), 1 (training) or "
                    f"2 (testing), got {row!r}. Extract test_train_splits.rar again"
                )
            key = f"{class_key(name)}/{Path(found['name']).stem}"
            clips[found["use"]].append(Clip(place, f"{name}/{found['name']}", (key,), label))
    check_once([clip for several in clips.values() for clip in several])
    return clips


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each video."""
    classes = read_classes(options.lists)
    videos = Videos(options.videos, folder_key, suffix=options.suffix)
    classes.folders(videos)  # each class has one
    expected = (
        f"Looked in {videos.folder} for <class>/<name of the video>, with any suffix of a video. "
        "Extract hmdb51_org.rar, then the archive of each class, and name that folder by --videos"
    )
    splits = []
    for number in NUMBERS:
        clips = read_split(options.lists, classes, number)
        for clip in clips[UNUSED]:
            videos.find(clip)  # it is listed, though not used
        for use, name in ((TRAIN, "train"), (TEST, "test")):
            splits.append(match(f"{name}_split{number}", clips[use], videos, expected))
    return Prepared(classes.names, splits, [videos])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = RecipeParser(__doc__, __file__)
    parser.add_path("--videos", "folder of the class folders", required=True)
    parser.add_path("--lists", "folder testTrainMulti_7030_splits", required=True)
    return run_recipe(parser.parse_args(arguments), prepare)


if __name__ == "__main__":
    sys.exit(main())
