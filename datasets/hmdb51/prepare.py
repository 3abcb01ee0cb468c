"""Turn HMDB51 as it is published into manifests: three splits, each for training and testing.

    python datasets/hmdb51/prepare.py --videos hmdb51_org --lists testTrainMulti_7030_splits

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
from hpm_video.preparation.recipes import REQUIRED_FOLDER, Clip, Files, RecipeError, class_key

OPTIONS = {
    "--videos": {"help": "folder of the class folders", **REQUIRED_FOLDER},
    "--lists": {"help": "folder testTrainMulti_7030_splits", **REQUIRED_FOLDER},
}
FIRST_LIST = "_test_split1.txt"
LINE = re.compile(r"(?P<name>\S.*?)\s+(?P<use>[012])")  # names hold all sorts of characters
NEEDED = "the name of a video and then 0 (unused), 1 (training) or 2 (testing)"


def key_of(file: Path) -> str:
    """Return the class and the name: names repeat from class to class."""
    return f"{class_key(file.parent.name)}/{file.stem}"


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[recipes.Split]]:
    """Read the lists, and find the file of each video. The classes that have lists are sorted."""
    names = sorted(
        path.name.removesuffix(FIRST_LIST) for path in options.lists.glob(f"*{FIRST_LIST}")
    )
    if not names:
        raise RecipeError(
            f"there are no lists such as brush_hair{FIRST_LIST} in {options.lists.absolute()}. "
            "Name the folder testTrainMulti_7030_splits, which test_train_splits.rar holds, by "
            "--lists"
        )
    classes = recipes.Classes(names, str(options.lists))
    videos = Files(options.videos, options.suffix, key=key_of)
    expected = (
        f"Looked in {videos.folder} for <class>/<name of the video>, with any suffix of a video. "
        "Extract hmdb51_org.rar, then the archive of each class, and name that folder by --videos"
    )
    splits = []
    for number in (1, 2, 3):
        clips: dict[str, list[Clip]] = {"0": [], "1": [], "2": []}
        for name in classes.names:
            path = options.lists / f"{name}_test_split{number}.txt"
            for place, found in recipes.matches_of(path, LINE, NEEDED):
                shown = f"{name}/{found['name']}"
                clips[found["use"]].append(Clip(place, shown, (key_of(Path(shown)),), name))
        lists = {f"train_split{number}": clips["1"], f"test_split{number}": clips["2"]}
        splits += recipes.match(lists, videos, classes, expected)
    return classes.names, splits


main = partial(recipes.run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
