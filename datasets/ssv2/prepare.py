"""Turn Something-Something V2 as it is published into manifests.

    python datasets/ssv2/prepare.py --videos 20bn-something-something-v2 --lists labels

writes train.csv, validation.csv, test.csv (unlabelled) and labels.txt beside this script.
See README.md there.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hpm_video.preparation import sources
from hpm_video.preparation.recipes import REQUIRED_FOLDER, Prepared, run_recipe
from hpm_video.preparation.sources import RecipeError

SPLITS = ("train", "validation", "test")
OPTIONS = {
    "--videos": {"help": "folder 20bn-something-something-v2 of the videos", **REQUIRED_FOLDER},
    "--lists": {"help": "folder of labels.json and SPLIT.json for each split", **REQUIRED_FOLDER},
    "--splits": {"nargs": "+", "choices": SPLITS, "help": "by default those that have a list"},
}
OLD_NAME = "something-something-v2-"  # that the files' names began with before 2022


def find_list(lists: Path, name: str) -> Path | None:
    """Find a list by its name in either release."""
    there = [path for start in ("", OLD_NAME) if (path := lists / f"{start}{name}.json").is_file()]
    if len(there) > 1:
        raise RecipeError(
            f"{there[0]} and {there[1]} are of two releases. Keep one: all lists of one release"
        )
    return there[0] if there else None


def read_json(path: Path, kind: type, needed: str) -> Any:
    """Read a file whose content must be of a type and not empty."""
    try:
        content = json.loads(sources.read_list_text(path))
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Download it again"
        ) from error
    if not isinstance(content, kind) or not content:
        raise RecipeError(f"{path}: need {needed}. Download it again")
    return content


def read_classes(path: Path) -> sources.Classes:
    """Read the names of the classes in the order of their numbers."""
    content = read_json(path, dict, '{"name of a class": "number", ...}')
    numbers = {str(number): name for name, number in content.items()}
    order = [str(number) for number in range(len(content))]
    if wrong := sorted(set(numbers) ^ set(order)):
        raise RecipeError(
            f"{path}: need each of the numbers 0 to {len(content) - 1} once for {len(content)} "
            f"classes; in excess or missing: {', '.join(wrong)}. Download it again"
        )
    return sources.Classes([numbers[number] for number in order], str(path))


def read_list(path: Path, *, labelled: bool) -> list[sources.Clip]:
    """Read the clips of a list.

    A template is the name of a class with brackets around what stands for an object:
    "Holding [something] next to [something]".
    """
    needed = '{"id": ..., "template": ...}' if labelled else '{"id": ...}'
    clips = []
    for number, entry in enumerate(read_json(path, list, f"a list, [{needed}, ...]"), start=1):
        place = f"{path}, entry {number}"
        if (
            not isinstance(entry, dict)
            or "id" not in entry
            or (labelled and "template" not in entry)
        ):
            raise RecipeError(f"{place}: need {needed}, got {entry!r}. Download it again")
        template = str(entry["template"]) if labelled else ""
        name, class_name = str(entry["id"]), template.replace("[", "").replace("]", "")
        clips.append(sources.Clip(f"{place} (id {name})", name, (name,), class_name))
    return clips


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each video."""
    lists, wanted = options.lists, options.splits
    source = find_list(lists, "labels")
    paths = {name: find_list(lists, name) for name in wanted or SPLITS}
    there = {name: path for name, path in paths.items() if path}
    if not source or not there or (wanted and len(there) < len(paths)):
        raise RecipeError(
            f"need labels.json and {', '.join(f'{name}.json' for name in paths)} in "
            f"{lists.absolute()} (or the older names, {OLD_NAME}labels.json ...), "
            f"got {sorted(path.name for path in lists.glob('*.json'))}. Name the folder of the "
            "labels' download by --lists"
        )
    classes = read_classes(source)
    videos = sources.Videos(options.videos, sources.stem, suffix=options.suffix)
    expected = (
        f"Looked in {videos.folder} and its folders for <id>.webm, or another suffix of a video. "
        "Extract the download and name the folder 20bn-something-something-v2 by --videos"
    )
    clips = {name: read_list(path, labelled=name != "test") for name, path in there.items()}
    notes = [f"{name}: there is no list of it" for name in paths if name not in there]
    return Prepared(classes.names, sources.match(clips, videos, classes, expected), notes)


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare)

if __name__ == "__main__":
    sys.exit(main())
