"""Turn ImageNet-1k (ILSVRC 2012), as it is published, into manifests.

    python datasets/imagenet1k/prepare.py --train imagenet/train --validation imagenet/val

for folders of class folders (n01440764/...JPEG), and for a flat folder of validation images also
one of --validation-labels val.txt, LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt
(the last with --ids). Writes train.csv, validation.csv and labels.txt beside this script. Class i
is the i-th wnid in sorted order. See README.md there.
"""

import argparse
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hpm_video.preparation import sources
from hpm_video.preparation.recipes import FILE, FOLDER, Prepared, open_splits, run_recipe
from hpm_video.preparation.sources import RecipeError

SPLITS = ("train", "validation")
LABELS_HELP = "their classes, where they do not lie in class folders"
IDS_HELP = "map_clsloc.txt, or another text that maps the IDs of the development kit to wnids"
OPTIONS = {
    **{f"--{name}": {"help": f"images of {name}", **FOLDER} for name in SPLITS},
    **{f"--{name}-labels": {"help": LABELS_HELP, **FILE} for name in SPLITS},
    "--ids": {"help": IDS_HELP, **FILE},
    "--names": {"help": "LOC_synset_mapping.txt: wnids and names", **FILE},
}
RIGHT_FOLDERS = (
    "Name the folder of the class folders, named by wnids such as n01440764, or give "
    "--{name}-labels; README.md lists the files that say the classes"
)
WRONG_LIST = "Leave out --{name}-labels where the folders are right"
NUM_CLASSES = 1000
KAGGLE_COLUMNS = ("ImageId", "PredictionString")
WNID = re.compile(r"n\d{8}")
ID_LINE = re.compile(
    r"(?:(?P<wnid>n\d{8})\s+(?P<id>\d+)|(?P<id_>\d+)\s+(?P<wnid_>n\d{8})|(?P<alone>n\d{8}))(?:\s.*)?"
)
NAME_LINE = re.compile(r"(?P<wnid>n\d{8})(?:\s+(?P<name>\S.*))?")
LIST_LINE = re.compile(r"(?P<path>\S.*?)[\s,]+(?P<label>\d+|n\d{8})")
LABEL_LINE = re.compile(r"\d+|n\d{8}")


def wnid_in(path: str) -> str | None:
    """Return the wnid of the folder (n01440764/a.JPEG) or the name (n01440764_9) of an image."""
    parts = Path(path).parent.name, Path(path).name[:9]
    return next((part for part in parts if WNID.fullmatch(part)), None)


def read_names(path: Path) -> dict[str, str]:
    """Map wnids to names, from lines ``n01440764 tench, Tinca tinca`` in any order."""
    needed = "a wnid and its name as in LOC_synset_mapping.txt ('n01440764 tench, Tinca tinca')"
    names: dict[str, str] = {}
    for place, found in sources.matches_of(path, NAME_LINE, needed):
        if found["wnid"] in names:
            raise RecipeError(f"{place}: {found['wnid']} has a line already. Remove one")
        names[found["wnid"]] = found["name"] or ""
    return names


def read_ids(path: Path) -> dict[int, str]:
    """Map IDs of ILSVRC2012 to wnids, from lines with both, or wnids in the order of the IDs."""
    if path.suffix.lower() == ".mat":
        raise RecipeError(f"{path} cannot be read here, only text. README.md says how to make it")
    needed = (
        "'n02119789 1 kit_fox' as in map_clsloc.txt, '1 n02119789', or wnids alone in the order of "
        "the IDs"
    )
    ids: dict[int, str] = {}
    rows = [*sources.matches_of(path, ID_LINE, needed)]
    for number, (place, found) in enumerate(rows, start=1):
        ilsvrc_id = int(found["id"] or found["id_"] or number)
        wnid = found["wnid"] or found["wnid_"] or found["alone"]
        if ilsvrc_id in ids or wnid in ids.values():
            raise RecipeError(f"{place}: ID {ilsvrc_id} or {wnid} has a line already. Remove one")
        ids[ilsvrc_id] = wnid
    if sorted(ids) != list(range(1, len(ids) + 1)):
        raise RecipeError(f"{path}: need each ID from 1 to {len(ids)} once. Download it again")
    if all(found["alone"] for _, found in rows) and [*ids.values()] == sorted(ids.values()):
        raise RecipeError(
            f"{path} lists the wnids in sorted order without numbers, as LOC_synset_mapping.txt "
            "and synsets.txt do. The IDs of the development kit have another order, and nothing "
            "here tells it. Give its map, such as map_clsloc.txt; README.md says where it is"
        )
    return ids


def read_labels(path: Path, ids: Mapping[int, str] | None, split: str) -> list[sources.Clip]:
    """Read the images of a list, named by their paths; a class is a wnid or a number.

    A list without names has a line for each validation image, ILSVRC2012_val_00000001 and so on.
    """
    lines = sources.lines_of(path)
    if not lines:
        raise RecipeError(f"{path} is empty. Download it again")
    if set(KAGGLE_COLUMNS) <= set(lines[0][1].split(",")):
        table = sources.cells_of(path, KAGGLE_COLUMNS)
        return [  # the first word of PredictionString is the wnid
            clip_of(place, f"{cells['ImageId']}.JPEG", cells["PredictionString"].partition(" ")[0])
            for place, cells in table
        ]
    if not all(LABEL_LINE.fullmatch(row) for _, row in lines):
        needed = "'<image>.JPEG <number or wnid of the class>', as in train.txt and val.txt"
        found = sources.matches_of(path, LIST_LINE, needed)
        return [clip_of(place, row["path"], row["label"]) for place, row in found]
    if split == "train":
        raise RecipeError(f"{path} names no images. Give a list of 'path label' for training")
    if ids is None and any(row.isdigit() for _, row in lines):
        raise RecipeError(
            f"{path} holds the IDs of the development kit, whose order is not that of the sorted "
            "wnids. Name by --ids the text that maps them, such as map_clsloc.txt; README.md "
            "says where it is"
        )
    clips = []
    for number, (place, row) in enumerate(lines, start=1):
        wnid = (ids or {}).get(int(row), "") if row.isdigit() else row
        if not wnid:
            raise RecipeError(f"{place}: --ids has no ID {row}. Both must be of one kit")
        clips.append(clip_of(place, f"ILSVRC2012_val_{number:08}", wnid))
    return clips


def clip_of(place: str, path: str, class_name: str) -> sources.Clip:
    """Make a clip of an image, which is found by its name alone."""
    return sources.Clip(place, path, (Path(path).stem,), class_name)


def find_classes(
    names: Collection[str] | None,
    ids: Mapping[int, str] | None,
    train: sources.Videos | None,
    listed: Sequence[sources.Clip],
) -> sources.Classes:
    """Find all classes: from a list of classes, or from list or folders of the training split."""
    if names is not None:
        wnids, source = {*names}, "--names"
    elif ids is not None:
        wnids, source = {*ids.values()}, "--ids"
    elif listed:
        given = (
            one.class_name if WNID.fullmatch(one.class_name) else wnid_in(one.name)
            for one in listed
        )
        wnids, source = {wnid for wnid in given if wnid}, "--train-labels"
    else:
        parents = {file.parent.name for file in train.files} if train else set()
        wnids, source = {n for n in parents if WNID.fullmatch(n)}, str(train and train.folder)
    if not wnids:
        raise RecipeError(
            "the numbers of the classes come from the training split, for a class may be absent "
            "elsewhere: give --train with class folders or wnids in its list, or --names with "
            "LOC_synset_mapping.txt or the labels.txt that was written with the training split"
        )
    return sources.Classes(sorted(wnids), source)


def with_wnids(clips: Sequence[sources.Clip], classes: sources.Classes) -> list[sources.Clip]:
    """Name the classes of the images of a list. Numbers count the sorted wnids from 0."""
    named = []
    num_classes = len(classes.names)
    for clip in clips:
        given, wnid = clip.class_name, wnid_in(clip.name)
        label = int(given) if given.isdigit() else classes.label(given, clip.place)
        if label >= num_classes:
            raise RecipeError(
                f"{clip.place}: the label {label} is none of 0 to {num_classes - 1}, the numbers "
                f"of the {num_classes} sorted wnids of {classes.source}. Lists that count from 1, "
                "or in the order of the development kit, cannot be told apart: give wnids instead"
            )
        if wnid and (other := classes.label(wnid, clip.place)) != label:
            raise RecipeError(
                f"{clip.place}: says class {given}, but the path is of {wnid}, which is {other} "
                "of the sorted wnids. A list of another order cannot be used: leave it out where "
                "there are class folders"
            )
        named.append(replace(clip, name=Path(clip.name).name, class_name=classes.names[label]))
    return named


def standing_labels(
    output: Path, classes: sources.Classes, written: Collection[str]
) -> list[str] | None:
    """Return the lines of a matching ``labels.txt`` that another manifest needs."""
    stays = [name for name in SPLITS if name not in written and (output / f"{name}.csv").is_file()]
    if not stays or not (output / "labels.txt").is_file():
        return None
    lines = sources.read_list_text(output / "labels.txt").splitlines()
    return lines if [line.partition(" ")[0] for line in lines] == [*classes.names] else None


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each image."""
    folders, lists = open_splits(options, SPLITS, "labels", sources.folder_and_name, "image")
    names = read_names(options.names) if options.names else None
    ids = read_ids(options.ids) if options.ids else None
    listed = {name: read_labels(path, ids, name) for name, path in lists.items()}
    classes = find_classes(names, ids, folders.get("train"), listed.get("train", []))
    splits = []
    for name, images in folders.items():
        clips = with_wnids(listed[name], classes) if name in listed else None
        expected = f"Looked in {images.folder} and its folders for those names, with any suffix"
        remedy = (RIGHT_FOLDERS if clips is None else WRONG_LIST).format(name=name)
        splits.append(sources.split_of(name, images, classes, clips, expected, remedy))
    notes = []
    if len(classes.names) != NUM_CLASSES:
        notes.append(
            f"{len(classes.names)} classes, not the {NUM_CLASSES} of ImageNet-1k: their numbers "
            "are others"
        )
    labels = [f"{wnid} {(names or {}).get(wnid, '')}".strip() for wnid in classes.names]
    standing = standing_labels(options.output, classes, folders)
    if standing not in (None, labels):
        labels = standing or labels
        notes.append(
            "labels.txt has the same wnids already and stays as it is, with the names in it, for "
            "another manifest there is of it. To change the names prepare all splits at once"
        )
    return Prepared(labels, splits, notes)


main = partial(run_recipe, __doc__, __file__, OPTIONS, prepare, kind="image")

if __name__ == "__main__":
    sys.exit(main())
