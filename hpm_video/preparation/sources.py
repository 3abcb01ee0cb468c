"""Lists and folders of published data sets: classes, clips and their files."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Literal

from hpm_video.data.manifest import UNLABELLED
from hpm_video.data.places import files_below
from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from hpm_video.files.errors import ExpectedError, read_text
from hpm_video.files.wording import counted

UNPACK = 'for f in *.tar; do mkdir "${f%.tar}" && tar -xf "$f" -C "${f%.tar}" && rm "$f"; done'
"""A command that turns each archive of a folder into a folder."""

Kind = Literal["video", "image"]  # kind of the files of a data set, also a word for messages
SUFFIXES: dict[Kind, tuple[str, ...]] = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES}


class RecipeError(ExpectedError):
    """Manifests cannot be made. The message has the fault, its place and the remedy."""


@dataclass(frozen=True)
class Clip:
    """An entry of a data set's list."""

    place: str  # file and line
    name: str  # name in reports
    keys: tuple[str, ...]  # of its file, the best first, which no other clip of a list has
    class_name: str = ""  # empty where the list has no classes
    label: int = UNLABELLED  # number of the class; :func:`match` finds it


@dataclass(frozen=True)
class Split:
    """Clips of a split, with and without a file."""

    name: str
    found: Sequence[tuple[Clip, Path]]
    missing: Sequence[Clip] = ()
    videos: "Videos | None" = None  # where files were looked for, unless they have been written
    listed: bool = True  # false for a split that consists of all files in class folders


class Classes:
    """Names of classes, which are found by any spelling that keeps the letters and digits.

    Downloads change spaces, capitals, apostrophes and brackets. Two names that differ in nothing
    else are a RecipeError.
    """

    def __init__(self, names: Iterable[str], source: str) -> None:
        self.names = tuple(names)
        self.source = source
        self._labels: dict[str, int] = {}
        for label, name in enumerate(self.names):
            earlier = self._labels.setdefault(class_key(name), label)
            if earlier != label:
                raise RecipeError(
                    f"{source}: the classes {self.names[earlier]!r} and {name!r} are spelled alike "
                    "but for case, spaces and punctuation, by which folders are not told apart. "
                    "Give a class one name"
                )

    def label(self, name: str, place: str) -> int:
        """Return the number of a class that is named at ``place``, in any spelling."""
        label = self._labels.get(class_key(name))
        if label is None:
            raise RecipeError(
                f"{place}: the class {name!r} is not one of the {len(self.names)} classes of "
                f"{self.source}. Lists and names of classes must be of one release"
            )
        return label

    def folders(self, videos: "Videos") -> dict[Path, int]:
        """Return the folders that hold files and are named like a class, with its number."""
        owners: dict[int, Path] = {}
        for folder in sorted({file.parent for file in videos.files} - {videos.folder}):
            label = self._labels.get(class_key(folder.name))
            if label is not None and (other := owners.setdefault(label, folder)) != folder:
                raise RecipeError(
                    f"the folders {other} and {folder} are both of class {self.names[label]!r}. "
                    f"A class has one folder: put their {videos.kind}s into one"
                )
        return {folder: label for label, folder in owners.items()}


class Videos:
    """Videos or images below a folder by key, and which of them are listed.

    Files of the other kind, such as the thumbnail of a video, are counted and skipped.
    """

    def __init__(
        self,
        folder: Path,
        key: Callable[[Path], str],
        *,
        suffix: str | None = None,
        kind: Kind = "video",
    ) -> None:
        self.folder, self.key, self.kind = folder.absolute(), key, kind
        if not self.folder.is_dir():
            raise RecipeError(f"there is no folder {self.folder}. Name the folder of the {kind}s")
        if suffix is not None and suffix.lower() not in SUFFIXES[kind]:
            raise RecipeError(f"--suffix must be one of {' '.join(SUFFIXES[kind])}, got {suffix!r}")
        every = files_below(self.folder)
        own = [name for name in every if name.lower().endswith(SUFFIXES[kind])]
        if not own and (archives := sorted(self.folder.rglob("*.tar"))):
            raise RecipeError(
                f"there are no {kind}s in {self.folder}, but {counted(len(archives), 'archive')}, "
                f"such as {archives[0]}. Unpack them first, in the folder {archives[0].parent}: "
                f"{UNPACK}"
            )
        if not own:
            but = f", but files of another kind, such as {Path(every[0]).name}" if every else ""
            raise RecipeError(
                f"there are no {kind}s in {self.folder}{but}. Name the folder of the {kind}s "
                f"({' '.join(SUFFIXES[kind])})"
            )
        self.other_kind = len(every) - len(own)
        wanted = suffix.lower() if suffix else ""
        self.files = tuple(self.folder / name for name in own if name.lower().endswith(wanted))
        if not self.files:
            raise RecipeError(f"there are no {kind}s {suffix} in {self.folder}. Leave out --suffix")
        self._by_key: dict[str, list[Path]] = defaultdict(list)
        for file in self.files:
            self._by_key[key(file)].append(file)
        self._asked: set[Path] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def find(self, clip: Clip) -> Path | None:
        """Return the file of a clip, by the first of its keys that any file has."""
        files = next((self._by_key[key] for key in clip.keys if key in self._by_key), [])
        if len(files) > 1:
            raise RecipeError(
                f"{clip.place}: there are {len(files)} files for {clip.name}: {files[0]} and "
                f"{files[1]}. There must be one: move the others away, or take files of one "
                f"kind alone, as with --suffix {files[0].suffix}"
            )
        self._asked.update(files)
        return files[0] if files else None

    def replace(self, others: "Videos") -> None:
        """Let other files take the place of those of the same key."""
        for file in others.files:
            self._asked.update(self._by_key[self.key(file)])
            self._by_key[self.key(file)] = [file]

    def unlisted(self) -> list[Path]:
        """Return the files that no clip asked for."""
        return [file for file in self.files if file not in self._asked]


stem = attrgetter("stem")  # the key for files that are known by their name without the suffix


def folder_and_name(file: Path) -> str:
    """Return the key for files whose name may repeat from class folder to class folder."""
    return f"{file.parent.name}/{file.name}"


def folder_key(file: Path) -> str:
    """Return the same key without the suffix, for any spelling of the class."""
    return f"{class_key(file.parent.name)}/{file.stem}"


def class_key(name: str) -> str:
    """Reduce a class name to its letters and digits in lower case."""
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


read_list_text = partial(read_text, wrong=RecipeError, hint="download it again")


def lines_of(path: Path) -> list[tuple[str, str]]:
    """Return the non-empty lines of a list, each with its place."""
    lines = enumerate(read_list_text(path).splitlines(), start=1)
    return [(f"{path}, line {number}", row.strip()) for number, row in lines if row.strip()]


def matches_of(
    path: Path, pattern: re.Pattern[str], needed: str
) -> Iterator[tuple[str, re.Match[str]]]:
    """Match every line of a list. ``needed`` describes the format in errors."""
    for place, row in lines_of(path):
        if not (found := pattern.fullmatch(row)):
            raise RecipeError(f"{place}: need {needed}, got {row!r}. Download the list again")
        yield place, found


def cells_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a CSV file that has ``columns``, each with its place."""
    reader = csv.DictReader(io.StringIO(read_list_text(path), newline=""), skipinitialspace=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    if absent := [name for name in columns if header.count(name) != 1]:
        raise RecipeError(
            f"{path}, line 1: need each of the columns {','.join(columns)} once; missing or "
            f"repeated: {','.join(absent)}; got {','.join(header)!r}. Download the list again"
        )
    reader.fieldnames = header
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise RecipeError(
                f"{place}: need {len(header)} columns as in the first line. A name with a comma is "
                "put into quotes"
            )
        yield place, {name: cell.strip() for name, cell in row.items()}


def match(
    lists: Mapping[str, Sequence[Clip]], videos: Videos, classes: Classes, expected: str
) -> list[Split]:
    """Find the file and the label of each clip of some splits, which share no clip.

    ``expected`` says in errors where files should be and how they are named. An unknown class, a
    clip that is listed twice, and a split without any file are errors.
    """
    places: dict[str, str] = {}
    for clip in chain.from_iterable(lists.values()):
        if (earlier := places.setdefault(clip.keys[0], clip.place)) != clip.place:
            raise RecipeError(
                f"{clip.place}: {clip.name} is listed already in {earlier}. "
                "It must have one line: remove one of them"
            )
    splits = []
    for name, clips in lists.items():
        found, missing = [], []
        for clip in clips:
            label = classes.label(clip.class_name, clip.place) if clip.class_name else UNLABELLED
            if file := videos.find(clip):
                found.append((replace(clip, label=label), file))
            else:
                missing.append(clip)
        if not clips:
            raise RecipeError(f"the list of {name} holds no {videos.kind}s. Download it again")
        if not found:
            raise RecipeError(
                f"none of the {counted(len(clips), videos.kind)} of {name} was found, such as "
                f"{clips[0].name} ({clips[0].place}). {expected}"
            )
        splits.append(Split(name, found, missing, videos))
    return splits


def split_of(
    name: str,
    videos: Videos,
    classes: Classes,
    clips: Sequence[Clip] | None,
    expected: str,
    remedy: str,
) -> Split:
    """Make a split by its list, with which class folders must agree, or by these alone.

    ``remedy``: where the class folders are not right.
    """
    labels, listed = classes.folders(videos), clips is not None
    if clips is None:
        if odd := [file for file in videos.files if file.parent not in labels]:
            raise RecipeError(
                f"{odd[0]} lies in no folder named like one of the {len(classes.names)} classes "
                f"of {classes.source}. {remedy}"
            )
        named = {folder: classes.names[label] for folder, label in labels.items()}
        clips = [
            Clip(str(file.parent), folder_and_name(file), (videos.key(file),), named[file.parent])
            for file in videos.files
        ]
    (split,) = match({name: clips}, videos, classes, expected)
    known = [(clip, file) for clip, file in split.found if clip.class_name]
    wrong = [pair for pair in known if labels.get(pair[1].parent, pair[0].label) != pair[0].label]
    if wrong:
        clip, file = wrong[0]
        raise RecipeError(
            f"{len(wrong)} {videos.kind}s of {name} lie in the folder of another class than "
            f"their list says: {file} is of class {clip.label}, {classes.names[clip.label]!r}, in "
            f"{clip.place}. {remedy}"
        )
    return replace(split, listed=listed)
