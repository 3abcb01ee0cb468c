"""Manifests of published data sets: their lists, the files of their clips, and a report.

``datasets/<name>/prepare.py`` reads the lists of its data set; the rest is here.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from hpm_video.data.manifest import UNLABELLED
from hpm_video.data.places import files_below, unwritable
from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from hpm_video.files.atomic import written_beside
from hpm_video.files.errors import ExpectedError, read_text
from hpm_video.files.printing import printable, safe_output
from hpm_video.files.wording import counted
from hpm_video.preparation.jobs import write_table

Kind = Literal["video", "image"]  # kind of the files of a data set, also a word for messages
SUFFIXES: dict[Kind, tuple[str, ...]] = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES}
FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}  # settings of options that name one
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
REQUIRED_FOLDER = {"required": True, **FOLDER}
Rows = list[tuple[object, ...]]
COLUMNS = ("path", "label", "label_name")
NAMED_IN_REPORT = 5


class RecipeError(ExpectedError):
    """Manifests cannot be made. The message has the fault, its place and the remedy."""


@dataclass(frozen=True)
class Clip:
    """An entry of a data set's list."""

    place: str  # file and line
    name: str  # name in reports
    keys: tuple[str, ...]  # of its file, the best first, which no other clip of a list has
    class_name: str = ""  # empty where the list has no classes


@dataclass(frozen=True)
class Split:
    """Files of a split with their labels, and the names of clips without a file."""

    name: str
    found: Sequence[tuple[Path, int]]
    missing: Sequence[str] = ()


class Classes:
    """Names of classes, which are found by any spelling that keeps the letters and digits.

    Downloads change the others. Two names that differ in nothing else are a RecipeError.
    """

    def __init__(self, names: Iterable[str], source: str) -> None:
        self.names = tuple(names)
        self.source = source
        self.labels: dict[str, int] = {}  # by key
        for label, name in enumerate(self.names):
            if (earlier := self.labels.setdefault(class_key(name), label)) != label:
                raise RecipeError(
                    f"{source}: the classes {self.names[earlier]!r} and {name!r} differ in case, "
                    "spaces or punctuation alone. Give a class one name"
                )

    def label(self, name: str, place: str) -> int:
        """Return the number of a class that is named at ``place``, in any spelling."""
        label = self.labels.get(class_key(name))
        if label is None:
            raise RecipeError(
                f"{place}: the class {name!r} is not one of the {len(self.names)} classes of "
                f"{self.source}. Lists and names of classes must be of one release"
            )
        return label


class Files:
    """Videos or images below a folder, which are found by ``key``, by default their stems."""

    def __init__(
        self,
        folder: Path,
        suffix: str | None = None,
        kind: Kind = "video",
        key: Callable[[Path], str] = attrgetter("stem"),
    ) -> None:
        self.folder, self.kind = folder.absolute(), kind
        suffixes = (suffix,) if suffix else SUFFIXES[kind]
        names = files_below(self.folder) if self.folder.is_dir() else []
        self.files = [self.folder / name for name in names if name.lower().endswith(suffixes)]
        if not self.files:
            raise RecipeError(
                f"there are no {kind}s ({' '.join(suffixes)}) in {self.folder}. Name the folder of "
                f"the {kind}s, with archives unpacked"
            )
        self._by_key: dict[str, list[Path]] = defaultdict(list)
        for file in self.files:
            self._by_key[key(file)].append(file)

    def find(self, clip: Clip) -> Path | None:
        """Return the file of a clip, by the first of its keys that any file has."""
        files = next((self._by_key[key] for key in clip.keys if key in self._by_key), [])
        if len(files) > 1:
            raise RecipeError(
                f"{clip.place}: there are {len(files)} files for {clip.name}: {files[0]} and "
                f"{files[1]}. Move the others away, or select one format, such as "
                f"--suffix {files[0].suffix}"
            )
        return files[0] if files else None


def class_key(name: str) -> str:
    """Reduce a class name to its letters and digits in lower case."""
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


read_list_text = partial(read_text, wrong=RecipeError, hint="download it again")


def matches_of(
    path: Path, pattern: re.Pattern[str], needed: str
) -> Iterator[tuple[str, re.Match[str]]]:
    """Match every non-empty line of a list, with its place. ``needed`` is its format in errors."""
    for number, row in enumerate(read_list_text(path).splitlines(), start=1):
        place = f"{path}, line {number}"
        if found := pattern.fullmatch(row.strip()):
            yield place, found
        elif row.strip():
            raise RecipeError(f"{place}: need {needed}, got {row!r}. Download the list again")


def match(
    lists: Mapping[str, Sequence[Clip]], files: Files, classes: Classes, expected: str
) -> list[Split]:
    """Find the file and the label of each clip of some splits, which share no clip.

    ``expected`` says in errors where files should be and how they are named. An unknown class, a
    clip that is listed twice, an empty list, and a file in the folder of another class are errors,
    and so it is if no file is found at all.
    """
    places: dict[str, str] = {}
    splits = []
    for name, clips in lists.items():
        found, missing = list[tuple[Path, int]](), list[str]()
        if not clips:
            raise RecipeError(f"the list of {name} is empty. Download it again")
        for clip in clips:
            if (earlier := places.setdefault(clip.keys[0], clip.place)) != clip.place:
                raise RecipeError(
                    f"{clip.place}: {clip.name} is listed already in {earlier}. "
                    "It must have one line: remove one of them"
                )
            label = classes.label(clip.class_name, clip.place) if clip.class_name else UNLABELLED
            file = files.find(clip)
            if file is None:
                missing.append(clip.name)
                continue
            own = None if file.parent == files.folder else class_key(file.parent.name)
            if clip.class_name and classes.labels.get(own or "", label) != label:
                raise RecipeError(
                    f"{clip.place}: {clip.name} is of class {classes.names[label]!r}, and its file "
                    f"lies in the folder of another class: {file}. List and folders must be of one "
                    "release"
                )
            found.append((file, label))
        splits.append(Split(name, found, missing))
    if not any(split.found for split in splits):
        missing = [name for split in splits for name in split.missing]
        listed = counted(len(missing), files.kind)
        raise RecipeError(f"none of the {listed} was found, such as {missing[0]}. {expected}")
    return splits


def class_folders(name: str, files: Files, classes: Classes) -> Split:
    """Make a split of all files, by the folders of their classes."""
    if any(file.parent == files.folder for file in files.files):
        raise RecipeError(
            f"{files.folder} holds {files.kind}s outside of class folders. Name the folder of the "
            f"class folders, or give the list of {name}"
        )
    label_of = {
        folder: classes.label(folder.name, f"the folder {folder}, which holds {files.kind}s")
        for folder in sorted({file.parent for file in files.files})
    }
    return Split(name, [(file, label_of[file.parent]) for file in files.files])


@safe_output()
def run_recipe(
    about: str | None,
    script: str,
    options: Mapping[str, dict[str, Any]],
    prepare: Callable[[argparse.Namespace], tuple[Sequence[str], Sequence[Split]]],
    arguments: Sequence[str] | None = None,
    *,
    kind: Kind = "video",
) -> int:
    """Run ``prepare``, which gives classes and splits, and write and report them. -> the exit code

    ``about``: the docstring of the recipe; ``script``: its file, beside which the output goes by
    default; ``options``: its own options, as ``add_argument`` takes them; ``kind``: of its files.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    add = parser.add_argument
    for name, settings in options.items():
        add(name, **settings)
    where = "folder for manifests and labels.txt; default: that of this script"
    add("--output", default=Path(script).resolve().parent, help=where, **FOLDER)
    suffix = {"type": str.lower, "choices": SUFFIXES[kind], "metavar": ".EXT"}
    add("--suffix", help=f"take only {kind}s with this suffix", **suffix)
    add("--strict", action="store_true", help=f"exit with 2 if any {kind} is missing")
    given = parser.parse_args(arguments)
    given.output = given.output.absolute()
    try:
        names, splits = prepare(given)
        write(given.output, names, splits)
    except (ExpectedError, OSError) as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        return 2
    sys.stdout.write(f"{report(given.output, names, splits, kind)}\n")
    return 2 if given.strict and any(split.missing for split in splits) else 0


def write(output: Path, names: Sequence[str], splits: Sequence[Split]) -> None:
    """Write ``labels.txt``, and for each split a manifest and a list of missing files.

    Paths are relative below ``output``, otherwise absolute. Nothing is written where another file
    would be overwritten, another manifest numbers the classes differently, or a name is not text.
    """
    lists = {"labels.txt": names} | {f"missing_{each.name}.txt": each.missing for each in splits}
    tables = {f"{each.name}.csv": _rows(output, names, each) for each in splits if each.found}
    texts = {name: "".join(f"{line}\n" for line in lines) for name, lines in lists.items()}
    _check_what_is_there(output, texts["labels.txt"], tables)
    for name, text in texts.items():
        if not text:
            (output / name).unlink(missing_ok=True)  # no file is missing any more
            continue
        with written_beside(output / name) as beside:
            beside.write_text(text, encoding="utf-8", newline="")
    for name, rows in tables.items():
        write_table(output / name, COLUMNS, rows)


def _rows(output: Path, names: Sequence[str], split: Split) -> Rows:
    rows: Rows = []
    for file, label in split.found:
        if why := unwritable(str(file)):
            raise RecipeError(f"the name of the file {str(file)!r} {why}. Rename it")
        path = file.relative_to(output) if file.is_relative_to(output) else file
        known = ("", "") if label == UNLABELLED else (label, names[label])
        rows.append((path, *known))
    return rows


def _check_what_is_there(output: Path, classes: str, tables: Mapping[str, Rows]) -> None:
    labels = output / "labels.txt"
    same = not labels.exists() or labels.read_bytes() == classes.encode()
    for path in sorted(output.glob("*.csv")):
        with path.open("rb") as there:
            is_manifest = there.readline() == f"{','.join(COLUMNS)}\n".encode()
        if path.name in tables and not is_manifest:
            raise RecipeError(
                f"{path} is no manifest of a data set and would be overwritten. Move it away, or "
                "name another folder by --output"
            )
        if path.name not in tables and is_manifest and not same:
            raise RecipeError(
                f"{path} has the numbers of {labels}, which names other classes than this run. "
                "Prepare all splits at once, name another folder by --output, or delete that "
                "manifest"
            )


def report(output: Path, names: Sequence[str], splits: Sequence[Split], kind: Kind) -> str:
    """Report found and missing files."""
    lines = [f"{counted(len(names), 'class')}: {output / 'labels.txt'}"]
    for split in splits:
        found, missing = len(split.found), len(split.missing)
        listed = f"{split.name}: {counted(found + missing, kind)} listed, {found} found"
        where = f": {output / split.name}.csv" if found else ""
        lines.append(f"{listed}, {missing} missing{where}")
        if missing:
            some = ", ".join(split.missing[:NAMED_IN_REPORT])
            lines.append(f"  such as {some}; all in {output}/missing_{split.name}.txt")
    return "\n".join(lines)
