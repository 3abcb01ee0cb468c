"""Turn UCF101 as it is published into manifests: three splits, each for training and testing.

    python datasets/ucf101/prepare.py --videos UCF-101 --lists ucfTrainTestlist

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
    lines_of,
    match,
)

AGAIN = "Extract UCF101TrainTestSplits-RecognitionTask.zip again"
_CLASS_LINE = re.compile(r"(?P<number>\d+)\s+(?P<name>\S.*)")
_LINE = re.compile(r"(?P<folder>[^/]+)/(?P<name>[^/]*\.[A-Za-z0-9]+)(?:\s+(?P<number>\d+))?")


def key_of(path: Path) -> str:
    """Without case: a class is HandstandPushups, its videos begin with v_HandStandPushups."""
    return path.stem.casefold()


def read_classes(path: Path) -> Classes:
    """The classes of classInd.txt, in its order."""
    names: list[str] = []
    for place, row in lines_of(path, "the list of classes"):
        found = _CLASS_LINE.fullmatch(row)
        if not found or int(found["number"]) != len(names) + 1:
            raise RecipeError(
                f"{place}: need '{len(names) + 1} <name of the class>', got {row!r}. {AGAIN}"
            )
        names.append(found["name"])
    return Classes(names, str(path))


def read_list(path: Path, classes: Classes, *, numbered: bool) -> list[Clip]:
    """The clips of a list. Where it is ``numbered``, each line ends in 1 for the first class."""
    clips = []
    for place, row in lines_of(path):
        found = _LINE.fullmatch(row)
        if not found or (numbered and not found["number"]):
            number = " <number of the class>" if numbered else ""
            raise RecipeError(f"{place}: need '<class>/<video>.avi{number}', got {row!r}. {AGAIN}")
        label = classes.label(found["folder"], place)
        if found["number"] and int(found["number"]) != label + 1:
            raise RecipeError(
                f"{place}: says class {found['number']}, but {found['folder']} is {label + 1} in "
                f"{classes.source}. All lists must be of one release"
            )
        name = f"{found['folder']}/{found['name']}"
        clips.append(Clip(place, name, (key_of(Path(found["name"])),), label))
    return clips


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each video."""
    classes = read_classes(options.lists / "classInd.txt")
    videos = Videos(options.videos, key_of, suffix=options.suffix)
    expected = (
        f"Looked in {videos.folder} and its folders for that name, whatever its case, with any "
        "suffix of a video. Extract UCF101.rar and name the folder UCF-101 by --videos"
    )
    splits = []
    for number in (1, 2, 3):
        train = read_list(options.lists / f"trainlist{number:02}.txt", classes, numbered=True)
        test = read_list(options.lists / f"testlist{number:02}.txt", classes, numbered=False)
        check_once([*train, *test])
        splits.append(match(f"train_split{number}", train, videos, expected))
        splits.append(match(f"test_split{number}", test, videos, expected))
    return Prepared(classes.names, splits, [videos])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = RecipeParser(__doc__, __file__)
    parser.add_path("--videos", "folder UCF-101 of the videos", required=True)
    parser.add_path("--lists", "folder ucfTrainTestlist", required=True)
    return run_recipe(parser.parse_args(arguments), prepare)


if __name__ == "__main__":
    sys.exit(main())
