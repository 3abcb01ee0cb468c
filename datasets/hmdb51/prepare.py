"""Turn HMDB51 as it is published into manifests: three splits, each for training and testing.

    python datasets/hmdb51/prepare.py --videos hmdb51_org --lists testTrainMulti_7030_splits

writes train_split1.csv, test_split1.csv ... test_split3.csv and labels.txt beside this script.
See README.md there.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from hpm_video.preparation import sources
from hpm_video.preparation.recipes import REQUIRED_FOLDER, Prepared, run_recipe
from hpm_video.preparation.sources import RecipeError

OPTIONS = {
    "--videos": {"help": "folder of the class folders", **REQUIRED_FOLDER},
    "--lists": {"help": "folder testTrainMulti_7030_splits", **REQUIRED_FOLDER},
}
LIST = "{name}_test_split{number}.txt"
LINE = re.compile(r"(?P<name>\S.*?)\s+(?P<use>[012])")  # names hold all sorts of characters
NEEDED = "the name of a video and then 0 (unused), 1 (training) or 2 (testing)"


def read_classes(lists: Path) -> sources.Classes:
    """Find the classes that have lists, sorted by name."""
    end = re.compile(r"_test_split[123]\.txt")
    names = sorted(
        {end.sub("", path.name) for path in lists.glob("*.txt") if end.search(path.name)}
    )
    if not names:
        raise RecipeError(
            f"there are no lists such as brush_hair_test_split1.txt in {lists.absolute()}. Name "
            "the folder testTrainMulti_7030_splits, which test_train_splits.rar holds, by --lists"
        )
    return sources.Classes(names, str(lists))


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each video."""
    classes = read_classes(options.lists)
    videos = sources.Videos(options.videos, sources.folder_key, suffix=options.suffix)
    classes.folders(videos)  # each class has one
    expected = (
        f"Looked in {videos.folder} for <class>/<name of the video>, with any suffix of a video. "
        "Extract hmdb51_org.rar, then the archive of each class, and name that folder by --videos"
    )
    splits = []
    for number in (1, 2, 3):
        clips: dict[str, list[sources.Clip]] = {"0": [], "1": [], "2": []}
        for name in classes.names:
            path = options.lists / LIST.format(name=name, number=number)
            for place, found in sources.matches_of(path, LINE, NEEDED):
                key = f"{sources.class_key(name)}/{Path(found['name']).stem}"
                clips[found["use"]].append(
                    sources.Clip(place, f"{name}/{found['name']}", (key,), name)
                )
        for clip in clips["0"]:
            videos.find(clip)  # it is listed, though not used
        lists = {f"train_split{number}": clips["1"], f"test_split{number}": clips["2"]}
        splits += sources.match(lists, videos, classes, expected)
    return Prepared(classes.names, splits)


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
