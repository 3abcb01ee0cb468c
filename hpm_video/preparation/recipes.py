"""From a published data set, its lists and its folder of files, to manifests and a report.

What a data set's own lists look like is the business of ``datasets/<name>/prepare.py``.
"""

import argparse
import csv
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpm_video.data.manifest import UNLABELLED, ManifestError
from hpm_video.data.places import files_below
from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from hpm_video.files.atomic import written_beside

COLUMNS = ("path", "label", "label_name")
NAMED_IN_REPORT = 5
UNPACK = 'for f in *.tar; do mkdir "${f%.tar}" && tar -xf "$f" -C "${f%.tar}" && rm "$f"; done'
"""A command that turns each archive of a folder into a folder."""

Kind = Literal["video", "image"]
"""What the files of a data set are, as errors and reports call one of them."""


class RecipeError(ValueError):
    """Manifests cannot be made. The message says what is wrong, where, and the remedy."""


@dataclass(frozen=True)
class Clip:
    """An entry of a data set's list."""

    place: str
    """File and line."""
    name: str
    """What a report calls it."""
    keys: tuple[str, ...]
    """What its file may be called, the best first. No two clips of a list share the first."""
    label: int = UNLABELLED


@dataclass(frozen=True)
class Split:
    """The clips of a list, each with its file or without one."""

    name: str
    found: tuple[tuple[Clip, Path], ...]
    missing: tuple[Clip, ...]
    kind: Kind = "video"


class Classes:
    """Names of classes, found again by any spelling that keeps the letters and digits.

    So ``riding_or_walking_with_horse`` is "riding or walking with horse", whatever a download
    has made of spaces, capitals, apostrophes and brackets.

    Raises:
        RecipeError: two names would be one.
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

    def find(self, name: str) -> int | None:
        """Number of a class, by any spelling."""
        return self._labels.get(class_key(name))

    def label(self, name: str, place: str) -> int:
        """Number of a class that ``place`` names."""
        label = self.find(name)
        if label is None:
            raise RecipeError(
                f"{place}: the class {name!r} is not one of the {len(self.names)} classes of "
                f"{self.source}. Lists and names of classes must be of one release"
            )
        return label

    def folders(self, videos: "Videos") -> dict[Path, int]:
        """Those folders that directly hold files and are named like a class."""
        labels: dict[Path, int] = {}
        owners: dict[int, Path] = {}
        for folder in sorted({file.parent for file in videos.files} - {videos.folder}):
            label = self.find(folder.name)
            if label is None:
                continue
            if (other := owners.setdefault(label, folder)) != folder:
                raise RecipeError(
                    f"the folders {other} and {folder} are both of class {self.names[label]!r}. "
                    f"A class has one folder: put their {videos.kind}s into one"
                )
            labels[folder] = label
        return labels


class Videos:
    """The videos or images below a folder, by keys, and which of them were asked for.

    Files of the other kind, such as the thumbnail of a video, are counted and left out.
    """

    def __init__(
        self,
        folder: Path,
        key: Callable[[Path], str],
        *,
        suffix: str | None = None,
        kind: Kind = "video",
    ) -> None:
        self.folder = folder.absolute()
        self.kind = kind
        suffixes = IMAGE_SUFFIXES if kind == "image" else VIDEO_SUFFIXES
        if not self.folder.is_dir():
            raise RecipeError(f"there is no folder {self.folder}. Name the folder of the {kind}s")
        if suffix is not None and suffix.lower() not in suffixes:
            raise RecipeError(f"--suffix must be one of {' '.join(suffixes)}, got {suffix!r}")
        every = files_below(self.folder)
        own = [name for name in every if name.lower().endswith(suffixes)]
        if not own:
            raise _nothing(self.folder, kind, every)
        self.other_kind = len(every) - len(own)
        wanted = suffixes if suffix is None else suffix.lower()
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
        """The file of a clip, under the first of its keys that any file has."""
        files = next((self._by_key[key] for key in clip.keys if key in self._by_key), [])
        if len(files) > 1:
            raise RecipeError(
                f"{clip.place}: there are {len(files)} files for {clip.name}: {files[0]} and "
                f"{files[1]}. There must be one: move the others away, or take files of one "
                f"kind alone, as with --suffix {files[0].suffix}"
            )
        self._asked.update(files)
        return files[0] if files else None

    def unlisted(self) -> list[Path]:
        """Files that nobody asked for."""
        return [file for file in self.files if file not in self._asked]


def _nothing(folder: Path, kind: Kind, others: Sequence[str]) -> RecipeError:
    """A folder without files of a kind: whether it holds archives, or ``others``, or nothing."""
    if archives := sorted(folder.rglob("*.tar")):
        return RecipeError(
            f"there are no {kind}s in {folder}, but {len(archives)} archives, such as "
            f"{archives[0]}. Unpack them first, in the folder {archives[0].parent}: {UNPACK}"
        )
    if others:
        return RecipeError(
            f"there are no {kind}s in {folder}, but files of another kind, such as "
            f"{Path(others[0]).name}. Name the folder of the {kind}s"
        )
    suffixes = IMAGE_SUFFIXES if kind == "image" else VIDEO_SUFFIXES
    return RecipeError(
        f"there are no {kind}s in {folder}; looked, in its folders too, for names that end in one "
        f"of {' '.join(suffixes)}. Name the folder of the {kind}s"
    )


def folder_and_name(file: Path) -> str:
    """A key that tells files of one name in several class folders apart."""
    return f"{file.parent.name}/{file.name}"


def class_key(name: str) -> str:
    """What all spellings of a class name share: its letters and digits, without case."""
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


def read_text(path: Path, what: str) -> str:
    """A list as text. ``what`` names it in errors."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{what} {path} is not text in UTF-8. Download it again") from error
    except OSError as error:
        raise RecipeError(f"{what} {path} cannot be read: {error.strerror}") from error


def check_once(clips: Iterable[Clip]) -> None:
    """No clip may be listed twice."""
    places: dict[str, str] = {}
    for clip in clips:
        if (earlier := places.setdefault(clip.keys[0], clip.place)) != clip.place:
            raise RecipeError(
                f"{clip.place}: {clip.name} is listed already in {earlier}. "
                "It must have one line: remove one of them"
            )


def match(
    name: str,
    clips: Sequence[Clip],
    find: Callable[[Clip], Path | None],
    expected: str,
    kind: Kind = "video",
) -> Split:
    """The file of each clip. ``expected`` says in errors where files should be, and their names.

    Raises:
        RecipeError: no clip has a file.
    """
    files = [find(clip) for clip in clips]
    found = tuple((clip, file) for clip, file in zip(clips, files, strict=True) if file)
    if not clips:
        raise RecipeError(f"the list of {name} holds no {kind}s. Download it again")
    if not found:
        raise RecipeError(
            f"none of the {len(clips)} {kind}s of {name} was found, such as {clips[0].name} "
            f"({clips[0].place}). {expected}"
        )
    missing = tuple(clip for clip, file in zip(clips, files, strict=True) if not file)
    return Split(name, found, missing, kind)


def write(output: Path, names: Sequence[str], splits: Sequence[Split]) -> None:
    """Write ``labels.txt``, and of each split its manifest and a list of what is missing.

    Paths are relative where a file lies below ``output``, otherwise absolute.

    Raises:
        RecipeError: a manifest there, not written anew now, has other numbers for the classes;
            or the name of a file is not text. Nothing is written then.
    """
    output = output.absolute()
    content = {output / "labels.txt": "".join(f"{name}\n" for name in names)}
    for split in splits:
        missing = "".join(f"{clip.name}\n" for clip in split.missing)
        content[missing_list(output, split)] = missing
        content[manifest_of(output, split)] = _manifest_text(output, names, split)
    try:
        encoded = {path: text.encode("utf-8") for path, text in content.items()}
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 60, 0) : error.end + 60]
        raise RecipeError(
            f"the name of a file is not text in UTF-8, in {around!r}. Rename it"
        ) from error
    _check_other_manifests(output, encoded)
    for path, data in encoded.items():
        if not data:
            path.unlink(missing_ok=True)  # nothing is missing any more
            continue
        with written_beside(path) as beside:
            beside.write_bytes(data)


def _manifest_text(output: Path, names: Sequence[str], split: Split) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for clip, file in split.found:
        path = file.relative_to(output) if file.is_relative_to(output) else file
        known = ("", "") if clip.label == UNLABELLED else (clip.label, names[clip.label])
        writer.writerow((path, *known))
    return stream.getvalue()


def _check_other_manifests(output: Path, written: Mapping[Path, bytes]) -> None:
    """Those that stay must mean by a number what the new ``labels.txt`` means."""
    labels = output / "labels.txt"
    if not labels.exists() or labels.read_bytes() == written[labels]:
        return
    header = (",".join(COLUMNS) + "\n").encode()
    for path in sorted(set(output.glob("*.csv")) - set(written)):
        with path.open("rb") as stream:
            if stream.readline() == header:
                raise RecipeError(
                    f"{path} has the numbers of {labels}, which names other classes than this "
                    "run. Prepare all splits at once, name another folder by --output, or delete "
                    "that manifest"
                )


def manifest_of(output: Path, split: Split) -> Path:
    """Where the manifest of a split goes."""
    return output / f"{split.name}.csv"


def missing_list(output: Path, split: Split) -> Path:
    """Where the list of a split's missing files goes."""
    return output / f"missing_{split.name}.txt"


def report(
    output: Path,
    names: Sequence[str],
    splits: Sequence[Split],
    videos: Iterable[Videos],
    notes: Iterable[str] = (),
) -> str:
    """What was found and what was not, for people."""
    output = output.absolute()
    lines = [f"{len(names)} classes: {output / 'labels.txt'}"]
    for split in splits:
        listed, missing = len(split.found) + len(split.missing), len(split.missing)
        lines.append(
            f"{split.name}: {listed} {split.kind}s listed, {len(split.found)} found, {missing} "
            f"missing: {manifest_of(output, split)}"
        )
        if missing:
            some = _some([clip.name for clip in split.missing])
            lines.append(f"  missing: {some}; all in {missing_list(output, split)}")
        labels = Counter(clip.label for clip, _ in split.found)
        if set(labels) == {UNLABELLED}:
            lines.append("  without labels")
            continue
        empty = [name for label, name in enumerate(names) if label not in labels]
        lines.append(f"  classes without any {split.kind}: {_some(empty) if empty else 'none'}")
    for shelf in videos:
        unlisted = shelf.unlisted()
        some = f": {_some([str(file.relative_to(shelf.folder)) for file in unlisted])}"
        lines.append(
            f"on disk, but in none of these lists: {len(unlisted)} of {len(shelf.files)} "
            f"{shelf.kind}s in {shelf.folder}{some if unlisted else ''}"
        )
        if shelf.other_kind:
            other = "image" if shelf.kind == "video" else "video"
            lines.append(f"left out: {shelf.other_kind} {other}s in {shelf.folder}")
    text = "\n".join([*lines, *notes])
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # names that are not text


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(names) - NAMED_IN_REPORT
    return ", ".join(names[:NAMED_IN_REPORT]) + (f" and {more} more" if more > 0 else "")


def run_recipe(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    prepare: Callable[[argparse.Namespace], tuple[str, list[Split]]],
    *,
    beside: str,
    kind: Kind = "video",
) -> int:
    """Run a script ``prepare.py`` with the options that all of them have. -> its exit code

    ``prepare`` writes everything and returns the report and the splits. Manifests go beside the
    script, the file ``beside``, unless ``--output`` names another folder.
    """
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(beside).resolve().parent,
        metavar="DIR",
        help="where manifests and labels.txt go, by default beside this script",
    )
    example = ".JPEG" if kind == "image" else ".MP4"
    parser.add_argument("--suffix", metavar=example, help=f"take only {kind}s with this suffix")
    parser.add_argument("--strict", action="store_true", help=f"exit with 2 if a {kind} is missing")
    options = parser.parse_args(arguments)
    try:
        report, splits = prepare(options)
    except (RecipeError, ManifestError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{report}\n")
    return 2 if options.strict and any(split.missing for split in splits) else 0
