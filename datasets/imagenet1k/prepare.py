"""Turn ImageNet-1k (ILSVRC 2012), as it is published, into manifests.

    python datasets/imagenet1k/prepare.py --train imagenet/train --validation imagenet/val

for folders of class folders (n01440764/...JPEG), and for a flat folder of validation images also
with --validation-labels LOC_val_solution.csv. Writes train.csv, validation.csv and labels.txt
beside this script. Class i is the i-th wnid in sorted order. See README.md there.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hpm_video.preparation import recipes
from hpm_video.preparation.recipes import FILE, FOLDER, Classes, Clip, Files, RecipeError

SPLITS = ("train", "validation")
LABELS_HELP = "LOC_val_solution.csv, or lines of an image and its wnid, for a flat folder"
OPTIONS = {
    **{f"--{name}": {"help": f"images of {name}", **FOLDER} for name in SPLITS},
    "--validation-labels": {"help": LABELS_HELP, **FILE},
    "--names": {"help": "LOC_synset_mapping.txt: wnids and names", **FILE},
}
WNID = re.compile(r"n\d{8}")
NAME_LINE = re.compile(r"(?P<wnid>n\d{8})(?:\s+(?P<name>\S.*))?")
LIST_LINE = re.compile(r"(?P<path>\S.*?)[\s,]+(?P<wnid>n\d{8})(?: .*)?|ImageId,PredictionString")


def read_names(path: Path) -> dict[str, str]:
    """Map wnids to names, from lines ``n01440764 tench, Tinca tinca`` in any order."""
    needed = "a wnid and its name as in LOC_synset_mapping.txt ('n01440764 tench, Tinca tinca')"
    return {
        found["wnid"]: found["name"] or ""
        for _, found in recipes.matches_of(path, NAME_LINE, needed)
    }


def read_labels(path: Path) -> list[Clip]:
    """Read images and their wnids. A line of Kaggle's has boxes behind the wnid."""
    needed = "'<image>,<wnid> ...' as in LOC_val_solution.csv, or '<image>.JPEG <wnid>'"
    return [
        Clip(place, Path(row["path"]).name, (Path(row["path"]).stem,), row["wnid"])
        for place, row in recipes.matches_of(path, LIST_LINE, needed)
        if row["wnid"]
    ]


def prepare(options: argparse.Namespace) -> tuple[Sequence[str], list[recipes.Split]]:
    """Read the lists, and find the file of each image."""
    given = {name: vars(options)[name] for name in SPLITS if vars(options)[name]}
    if not given or (options.validation_labels and not options.validation):
        raise RecipeError(
            "name the folder of --train, of --validation, or both; --validation-labels needs "
            "--validation"
        )
    folders = {name: Files(folder, options.suffix, "image") for name, folder in given.items()}
    names = read_names(options.names) if options.names else {}
    if not names and "train" in folders:
        parents = {file.parent.name for file in folders["train"].files}
        names = {name: "" for name in parents if WNID.fullmatch(name)}
    if not names:
        raise RecipeError(
            "the numbers of the classes come from the training split, for a class may be absent "
            "elsewhere: give --train with class folders named by wnids such as n01440764, or "
            "--names with LOC_synset_mapping.txt or the labels.txt of the training split"
        )
    classes = Classes(sorted(names), str(options.names or folders["train"].folder))
    splits = []
    for name, images in folders.items():
        if name == "validation" and options.validation_labels:
            expected = f"Looked in {images.folder} and its folders for those names"
            listed = {name: read_labels(options.validation_labels)}
            splits += recipes.match(listed, images, classes, expected)
        else:
            splits.append(recipes.class_folders(name, images, classes))
    return [f"{wnid} {names[wnid]}".strip() for wnid in classes.names], splits


main = partial(recipes.run_recipe, __doc__, __file__, OPTIONS, prepare, kind="image")

if __name__ == "__main__":
    sys.exit(main())
