"""Turn Something-Something V2 as it is published into manifests.

    python datasets/ssv2/prepare.py --videos 20bn-something-something-v2 --lists labels

writes train.csv, validation.csv, test.csv (unlabelled) and labels.txt beside this script.
See README.md there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hpm_video.preparation import recipes
from hpm_video.preparation.recipes import REQUIRED_FOLDER, Classes, Clip, Files, RecipeError

SPLITS = ("train", "validation", "test")
OPTIONS = {
    "--videos": {"help": "folder 20bn-something-something-v2 of the videos", **REQUIRED_FOLDER},
    "--lists": {"help": "folder of labels.json and SPLIT.json for each split", **REQUIRED_FOLDER},
}
OLD_NAME = "something-something-v2-"  # that the files' names began with before 2022


def find_list(lists: Path, name: str) -> Path | None:
    """Find a list by its name in either release."""
    paths = (lists / f"{start}{name}.json" for start in ("", OLD_NAME))
    return next((path for path in paths if path.is_file()), None)


def read_json(path: Path, kind: type, needed: str) -> Any:
    """Read a file whose content must be of a type and not empty."""
    try:
        content = json.loads(recipes.read_list_text(path))
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Download it again"
        ) from error
    if not isinstance(content, kind) or not content:
        raise RecipeError(f"{path}: need {needed}. Download it again")
    return content


def read_classes(path: Path) -> Classes:
    """Read the names of the classes in the order of their numbers."""
    content = read_json(path, dict, '{"name of a class": "number", ...}')
    numbers = {str(number): name for name, number in content.items()}
    order = [str(number) for number in range(len(content))]
    if wrong := sorted(set(numbers) ^ set(order)):
        raise RecipeError(
            f"{path}: need each of the numbers 0 to {len(content) - 1} once for {len(content)} "
            f"classes; in excess or missing: {', '.join(wrong)}. Download it again"
        )
    return Classes([numbers[number] for number in order], str(path))


def read_list(path: Path, needed: dict[str, str]) -> list[Clip]:
    """Read the clips of a list, whose entries have the fields that are ``needed``.

    A template is the name of a class with brackets around what stands for an object:
    "Holding [something] next to [something]".
    """
    clips = []
    for number, entry in enumerate(read_json(path, list, f"a list, [{needed}, ...]"), start=1):
        place = f"{path}, entry {number}"
        if not isinstance(entry, dict) or not needed.keys() <= entry.keys():
            raise RecipeError(f"{place}: need {needed}, got {entry!r}. Download it again")
        name, template = str(entry["id"]), str(entry["template"]) if "template" in needed else ""
        class_name = template.replace("[", "").replace("]", "")
        clips.append(Clip(f"{place} (id {name})", name, (name,), class_name))
    return clips


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[recipes.Split]]:
    """Read the lists of the splits that have one, and find the file of each video."""
    lists = options.lists
    source = find_list(lists, "labels")
    paths = {name: path for name in SPLITS if (path := find_list(lists, name))}
    if not source or not paths:
        raise RecipeError(
            f"need labels.json and {', '.join(f'{name}.json' for name in SPLITS)} in "
            f"{lists.absolute()} (or the older names, {OLD_NAME}labels.json ...). Name the folder "
            "of the labels' download by --lists"
        )
    classes = read_classes(source)
    videos = Files(options.videos, options.suffix)
    expected = (
        f"Looked in {videos.folder} and its folders for <id>.webm, or another suffix of a video. "
        "Extract the download and name the folder 20bn-something-something-v2 by --videos"
    )
    labelled = {"id": "...", "template": "..."}
    fields = {name: {"id": "..."} if name == "test" else labelled for name in SPLITS}
    clips = {name: read_list(path, fields[name]) for name, path in paths.items()}
    return classes.names, recipes.match(clips, videos, classes, expected)


main = partial(recipes.run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
