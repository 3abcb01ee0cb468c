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

from hpm_video.preparation.recipes import (
    Classes,
    Clip,
    RecipeError,
    Split,
    Videos,
    check_once,
    match,
    read_text,
    report,
    run_recipe,
    write,
)

NUMBERS = (1, 2, 3)
_CLASS_LINE = re.compile(r"(?P<number>\d+)\s+(?P<name>\S.*)")
_LINE = re.compile(r"(?P<folder>[^/]+)/(?P<name>[^/]*\.[A-Za-z0-9]+)(?:\s+(?P<number>\d+))?")


def key_of(path: Path) -> str:
    """Without case: a class is HandstandPushups, its videos begin with v_HandStandPushups."""
    return path.stem.casefold()


def read_classes(path: Path) -> Classes:
    """The classes of classInd.txt, in its order."""
    names: list[str] = []
    for line, row in enumerate(read_text(path, "the list of classes").splitlines(), start=1):
        if not row.strip():
            continue
        found = _CLASS_LINE.fullmatch(row.strip())
        if not found or int(found["number"]) != len(names) + 1:
            raise RecipeError(
                f"{path}, line {line}: need '{len(names) + 1} <name of the class>', got {row!r}. "
                "Extract UCF101TrainTestSplits-RecognitionTask.zip again"
            )
        names.append(found["name"])
    return Classes(names, str(path))


def read_list(path: Path, classes: Classes, *, numbered: bool) -> list[Clip]:
    """The clips of a list. Where it is ``numbered``, each line ends in 1 for the first class."""
    clips = []
    for line, row in enumerate(read_text(path, "the list").splitlines(), start=1):
        if not row.strip():
            continue
        place = f"{path}, line {line}"
        found = _LINE.fullmatch(row.strip())
        if not found or (numbered and not found["number"]):
            form = (
                "<class>/<video>.avi <number of the class>" if numbered else "<class>/<video>.avi"
            )
            raise RecipeError(
                f"{place}: need '{form}', got {row!r}. "
                "Extract UCF101TrainTestSplits-RecognitionTask.zip again"
            )
        label = classes.label(found["folder"], place)
        if found["number"] and int(found["number"]) != label + 1:
            raise RecipeError(
                f"{place}: says class {found['number']}, but {found['folder']} is {label + 1} in "
                f"{classes.source}. All lists must be of one release"
            )
        name = f"{found['folder']}/{found['name']}"
        clips.append(Clip(place, name, (key_of(Path(found["name"])),), label))
    return clips


def prepare(
    videos_folder: Path, lists: Path, output: Path, suffix: str | None
) -> tuple[str, list[Split]]:
    """Write everything. Returns the report and the splits."""
    classes = read_classes(lists / "classInd.txt")
    videos = Videos(videos_folder, key_of, suffix=suffix)
    expected = (
        f"Looked in {videos.folder} and its folders for that name, whatever its case, with any "
        "suffix of a video. Extract UCF101.rar and name the folder UCF-101 by --videos"
    )
    splits = []
    for number in NUMBERS:
        train = read_list(lists / f"trainlist{number:02}.txt", classes, numbered=True)
        test = read_list(lists / f"testlist{number:02}.txt", classes, numbered=False)
        check_once([*train, *test])
        splits.append(match(f"train_split{number}", train, videos.find, expected))
        splits.append(match(f"test_split{number}", test, videos.find, expected))
    write(output, classes.names, splits)
    return report(output, classes.names, splits, [videos]), splits


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--videos", type=Path, required=True, metavar="DIR", help="folder UCF-101 of the videos"
    )
    parser.add_argument(
        "--lists", type=Path, required=True, metavar="DIR", help="folder ucfTrainTestlist"
    )
    return run_recipe(
        parser,
        arguments,
        lambda chosen: prepare(chosen.videos, chosen.lists, chosen.output, chosen.suffix),
        beside=__file__,
    )


if __name__ == "__main__":
    sys.exit(main())
