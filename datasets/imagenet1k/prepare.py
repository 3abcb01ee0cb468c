"""Turn ImageNet-1k (ILSVRC 2012), as it is published, into manifests.

    python datasets/imagenet1k/prepare.py --train imagenet/train --validation imagenet/val

for folders of class folders (n01440764/...JPEG), and for a flat folder of validation images also
one of --validation-labels val.txt, LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt
(the last with --ids). Writes train.csv, validation.csv and labels.txt beside this script. Class i
is the i-th wnid in sorted order. See README.md there.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpm_video.preparation.recipes import Prepared, RecipeParser, run_recipe
from hpm_video.preparation.sources import (
    Classes,
    Clip,
    RecipeError,
    Split,
    Videos,
    check_folders,
    check_once,
    clips_of_folders,
    folder_and_name,
    lines_of,
    match,
    read_text,
    stem,
)

SPLITS = ("train", "validation")
NUM_CLASSES = 1000
KAGGLE_COLUMNS = ("ImageId", "PredictionString")
_WNID = re.compile(r"n\d{8}")
_ID_LINE = re.compile(
    r"(?:(?P<wnid>n\d{8})\s+(?P<id>\d+)|(?P<id_>\d+)\s+(?P<wnid_>n\d{8}))(?:\s.*)?"
)
_NAME_LINE = re.compile(r"(?P<wnid>n\d{8})(?:\s+(?P<name>\S.*))?")
_LIST_LINE = re.compile(r"(?P<path>\S.*?)[\s,]+(?P<label>\d+|n\d{8})")


@dataclass(frozen=True)
class Row:
    """An image of a list."""

    place: str
    path: str
    label: str
    """As the list has it: a wnid, or a number."""

    @property
    def wnid(self) -> str | None:
        """The class that the path names, by its folder (n01440764/a.JPEG) or name (n01440764_9)."""
        path = Path(self.path)
        return next((n for n in (path.parent.name, path.name[:9]) if _WNID.fullmatch(n)), None)


def classes_of(wnids: Iterable[str], source: str) -> Classes:
    """The classes in the order of their numbers, which is that of their sorted wnids."""
    remedy = (
        "A class is named by its wnid, such as n01440764, and all lists and folders must have the "
        "same ones"
    )
    return Classes(sorted(wnids), source, remedy)


def rows_of(path: Path) -> list[tuple[str, str]]:
    """The lines that are not empty, each with its place."""
    rows = lines_of(path)
    if not rows:
        raise RecipeError(f"{path} is empty. Download it again")
    return rows


def read_names(path: Path) -> dict[str, str]:
    """Wnid -> what people call it; of lines ``n01440764 tench, Tinca tinca`` in any order."""
    names: dict[str, str] = {}
    for place, row in rows_of(path):
        found = _NAME_LINE.fullmatch(row)
        if not found or found["wnid"] in names:
            raise RecipeError(
                f"{place}: need each wnid once, with the name of the class behind it, as in "
                f"LOC_synset_mapping.txt ('n01440764 tench, Tinca tinca'), got {row!r}"
            )
        names[found["wnid"]] = found["name"] or ""
    return names


def read_ids(path: Path) -> dict[int, str]:
    """ILSVRC2012 ID -> wnid, from lines that say both, or from wnids in the order of the IDs."""
    ids: dict[int, str] = {}
    if path.suffix.lower() == ".mat":
        raise RecipeError(f"{path} cannot be read here, only text. README.md says how to make it")
    rows = rows_of(path)
    for number, (place, row) in enumerate(rows, start=1):
        found, alone = _ID_LINE.fullmatch(row), _NAME_LINE.fullmatch(row)
        if found:
            ilsvrc_id, wnid = int(found["id"] or found["id_"]), found["wnid"] or found["wnid_"]
        elif alone:
            ilsvrc_id, wnid = number, alone["wnid"]
        else:
            raise RecipeError(
                f"{place}: need 'n02119789 1 kit_fox' as in map_clsloc.txt, '1 n02119789', or "
                f"wnids alone in the order of the IDs, got {row!r}"
            )
        if ilsvrc_id in ids or wnid in ids.values():
            raise RecipeError(f"{place}: ID {ilsvrc_id} or {wnid} has a line already. Remove one")
        ids[ilsvrc_id] = wnid
    if sorted(ids) != list(range(1, len(ids) + 1)):
        raise RecipeError(f"{path}: need each ID from 1 to {len(ids)} once. Download it again")
    if all(_NAME_LINE.fullmatch(row) and not _ID_LINE.fullmatch(row) for _, row in rows) and (
        [ids[i] for i in sorted(ids)] == sorted(ids.values())
    ):
        raise RecipeError(
            f"{path} lists the wnids in sorted order without numbers, as LOC_synset_mapping.txt "
            "and synsets.txt do. The IDs of the development kit have another order, and nothing "
            "here tells it. Give its map, such as map_clsloc.txt; README.md says where it is"
        )
    return ids


def read_labels(path: Path, ids: dict[int, str] | None, images: str | None) -> list[Row]:
    """The images of a list and what it says of their class.

    A list without names has a line for each image, ILSVRC2012_val_00000001 and so on: ``images``
    is the beginning of those names, None for training images, which have no such list.
    """
    rows = rows_of(path)
    columns = next(csv.reader([rows[0][1]]))
    if set(KAGGLE_COLUMNS) <= set(columns):
        return _kaggle_rows(path)
    if not all(re.fullmatch(r"\d+|n\d{8}", row) for _, row in rows):
        return [_list_row(place, row) for place, row in rows]
    if images is None:
        raise RecipeError(f"{path} names no images. Give a list of 'path label' for training")
    labels = [Row(place, f"{images}{n:08}", row) for n, (place, row) in enumerate(rows, start=1)]
    if ids is None and any(row.label.isdigit() for row in labels):
        raise RecipeError(
            f"{path} holds the IDs of the development kit, whose order is not that of the sorted "
            "wnids. Name by --ids the text that maps them, such as map_clsloc.txt; README.md "
            "says where it is"
        )
    return [Row(row.place, row.path, _by_id(row, ids or {})) for row in labels]


def _by_id(row: Row, ids: dict[int, str]) -> str:
    if not row.label.isdigit():
        return row.label
    if int(row.label) not in ids:
        raise RecipeError(
            f"{row.place}: ID {row.label} is not one of 1 to {len(ids)} of --ids. Both must be of "
            "one development kit"
        )
    return ids[int(row.label)]


def _kaggle_rows(path: Path) -> list[Row]:
    """The rows of LOC_val_solution.csv: the first word of PredictionString is the wnid."""
    reader = csv.DictReader(io.StringIO(read_text(path, "the list"), newline=""))
    rows = []
    for cells in reader:
        place = f"{path}, line {reader.line_num}"
        words = (cells["PredictionString"] or "").split()
        if not words or not cells["ImageId"] or not _WNID.fullmatch(words[0]):
            raise RecipeError(
                f"{place}: need the name of an image and a PredictionString that begins with a "
                f"wnid, got {','.join(str(cell) for cell in cells.values())!r}. Download it again"
            )
        rows.append(Row(place, f"{cells['ImageId']}.JPEG", words[0]))
    return rows


def _list_row(place: str, row: str) -> Row:
    found = _LIST_LINE.fullmatch(row)
    if not found:
        raise RecipeError(
            f"{place}: need '<image>.JPEG <number or wnid of the class>', as in train.txt and "
            f"val.txt, got {row!r}"
        )
    return Row(place, found["path"], found["label"])


def find_classes(
    names: dict[str, str] | None,
    ids: dict[int, str] | None,
    train: Videos | None,
    rows: Sequence[Row],
) -> Classes:
    """All classes, from a list of them, or from the training split: its folders or its list."""
    if names is not None:
        return classes_of(names, "--names")
    if ids is not None:
        return classes_of(ids.values(), "--ids")
    said = {row.label if _WNID.fullmatch(row.label) else row.wnid for row in rows}
    if wnids := {wnid for wnid in said if wnid}:
        return classes_of(wnids, "--train-labels")
    if train is None or rows:
        raise RecipeError(
            "the numbers of the classes come from the training split, for a class may be absent "
            "elsewhere: give --train with class folders or wnids in its list, or --names with "
            "LOC_synset_mapping.txt or the labels.txt that was written with the training split"
        )
    return classes_of({file.parent.name for file in train.files}, str(train.folder))


def clips_of_rows(rows: Sequence[Row], classes: Classes) -> list[Clip]:
    """The images of a list. A number is that of the sorted wnids, from 0."""
    clips = []
    num_classes = len(classes.names)
    for row in rows:
        is_wnid = _WNID.fullmatch(row.label)
        label = classes.label(row.label, row.place) if is_wnid else int(row.label)
        if label >= num_classes:
            raise RecipeError(
                f"{row.place}: the label {label} is none of 0 to {num_classes - 1}, the numbers of "
                f"the {num_classes} sorted wnids of {classes.source}. Lists that count from 1, or "
                "in the order of the development kit, cannot be told apart: give wnids instead"
            )
        if row.wnid and (named := classes.label(row.wnid, row.place)) != label:
            raise RecipeError(
                f"{row.place}: says class {row.label}, but the path is of {row.wnid}, which is "
                f"{named} of the sorted wnids. A list of another order cannot be used: leave it "
                "out where there are class folders"
            )
        clips.append(Clip(row.place, Path(row.path).name, (Path(row.path).stem,), label))
    check_once(clips)
    return clips


def standing_labels(output: Path, classes: Classes, written: Iterable[str]) -> list[str] | None:
    """The lines of a ``labels.txt`` that must stay, if it has the same wnids.

    It must where a manifest of a split stays that is not ``written`` now.
    """
    stays = [name for name in SPLITS if name not in written and (output / f"{name}.csv").is_file()]
    standing = output / "labels.txt"
    if stays and standing.is_file():
        lines = read_text(standing, "the list of classes").splitlines()
        if [line.partition(" ")[0] for line in lines] == list(classes.names):
            return lines
    return None


def prepare(options: argparse.Namespace) -> Prepared:
    """Read the lists, and find the file of each image."""
    folders: dict[str, Path | None] = {name: getattr(options, name) for name in SPLITS}
    lists: dict[str, Path | None] = {name: getattr(options, f"{name}_labels") for name in SPLITS}
    if not any(folders.values()):
        raise RecipeError("name the folder of at least one split: --train or --validation")
    if absent := [name for name in SPLITS if lists[name] and not folders[name]]:
        raise RecipeError(f"--{absent[0]}-labels needs --{absent[0]}, the folder of its images")
    names = read_names(options.names) if options.names else None
    ids = read_ids(options.ids) if options.ids else None
    rows = {
        name: read_labels(path, ids, None if name == "train" else "ILSVRC2012_val_")
        for name, path in lists.items()
        if path
    }
    images = {
        name: Videos(
            folder, stem if name in rows else folder_and_name, suffix=options.suffix, kind="image"
        )
        for name, folder in folders.items()
        if folder
    }
    classes = find_classes(names, ids, images.get("train"), rows.get("train", []))
    splits, notes = [], []
    for name, shelf in images.items():
        splits.append(split_of(name, shelf, classes, rows.get(name)))
        if name not in rows:
            notes.append(f"{name}: without a list, so what is missing is not known")
    if len(classes.names) != NUM_CLASSES:
        notes.append(
            f"{len(classes.names)} classes, not the {NUM_CLASSES} of ImageNet-1k: their numbers "
            "are others"
        )
    labels = [f"{wnid} {(names or {}).get(wnid, '')}".strip() for wnid in classes.names]
    standing = standing_labels(options.output, classes, images)
    if standing not in (None, labels):
        labels = standing or labels
        notes.append(
            "labels.txt has the same wnids already and stays as it is, with the names in it, for "
            "another manifest there is of it. To change the names prepare all splits at once"
        )
    return Prepared(labels, splits, images.values(), notes)


def split_of(name: str, images: Videos, classes: Classes, rows: Sequence[Row] | None) -> Split:
    """The images of a split, by its list or by its class folders."""

    def label_of(folder: Path) -> int | None:
        wnid = folder.name
        return classes.label(wnid, str(folder)) if _WNID.fullmatch(wnid) else None

    if rows is not None:
        clips = clips_of_rows(rows, classes)
    else:
        why = (
            f"named by a wnid such as n01440764, and there is no list of {name}. Name the folder "
            f"of the class folders, or give --{name}-labels; README.md lists the files that say "
            "the classes"
        )
        clips = clips_of_folders(images, label_of, folder_and_name, why)
    expected = f"Looked in {images.folder} and its folders for those names, with any suffix"
    split = match(name, clips, images, expected)
    remedy = f"Leave out --{name}-labels where the folders are right"
    check_folders(split, label_of, classes.names, remedy)
    return split


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = RecipeParser(__doc__, __file__, "image")
    for name in SPLITS:
        parser.add_path(f"--{name}", f"images of {name}")
        labels = "their classes, where they do not lie in class folders"
        parser.add_path(f"--{name}-labels", labels, "FILE")
    ids = "map_clsloc.txt, or another text that maps the IDs of the development kit to wnids"
    parser.add_path("--ids", ids, "FILE")
    parser.add_path("--names", "LOC_synset_mapping.txt: wnids and names", "FILE")
    return run_recipe(parser.parse_args(arguments), prepare)


if __name__ == "__main__":
    sys.exit(main())
