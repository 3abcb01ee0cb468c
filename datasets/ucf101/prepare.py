"""Turn UCF101 as it is published into manifests: three splits, each for training and testing.

    python datasets/ucf101/prepare.py --videos UCF-101 --lists ucfTrainTestlist

writes train_split1.csv, test_split1.csv ... test_split3.csv and labels.txt beside this script.
See README.md there.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hpm_video.preparation import recipes
from hpm_video.preparation.recipes import REQUIRED_FOLDER, Classes, Clip, Files, RecipeError

OPTIONS = {
    "--videos": {"help": "folder UCF-101 of the videos", **REQUIRED_FOLDER},
    "--lists": {"help": "folder ucfTrainTestlist", **REQUIRED_FOLDER},
}
CLASS = re.compile(r"(?P<number>\d+)\s+(?P<name>\S.*)")
VIDEO = re.compile(r"(?P<folder>[^/]+)/(?P<name>[^/]*\.[A-Za-z0-9]+)(?:\s+\d+)?")
"""Of a line for training, the number of the class follows, which its name says too."""


def key_of(path: Path) -> str:
    """Ignore case: videos of the class HandstandPushups begin with v_HandStandPushups."""
    return path.stem.casefold()


def read_classes(path: Path) -> Classes:
    """Read the classes of classInd.txt in its order."""
    names: list[str] = []
    for place, found in recipes.matches_of(path, CLASS, "'1 <name of the class>'"):
        names.append(found["name"])
        if int(found["number"]) != len(names):
            raise RecipeError(f"{place}: need '{len(names)} <name of the class>'")
    return Classes(names, str(path))


def read_list(path: Path) -> list[Clip]:
    """Read the clips of a list."""
    clips = []
    for place, found in recipes.matches_of(path, VIDEO, "'<class>/<video>.avi'"):
        name = f"{found['folder']}/{found['name']}"
        clips.append(Clip(place, name, (key_of(Path(name)),), found["folder"]))
    return clips


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[recipes.Split]]:
    """Read the lists, and find the file of each video."""
    classes = read_classes(options.lists / "classInd.txt")
    videos = Files(options.videos, options.suffix, key=key_of)
    expected = (
        f"Looked in {videos.folder} and its folders for that name, whatever its case, with any "
        "suffix of a video. Extract UCF101.rar and name the folder UCF-101 by --videos"
    )
    splits = []
    for number in (1, 2, 3):
        lists = {
            f"{use}_split{number}": read_list(options.lists / f"{use}list{number:02}.txt")
            for use in ("train", "test")
        }
        splits += recipes.match(lists, videos, classes, expected)
    return classes.names, splits


main = partial(recipes.run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
