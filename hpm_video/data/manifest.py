"""Lists of videos or images, and what is known of each. An image is a video of one frame."""

import csv
import hashlib
import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd

from hpm_video.data import places
from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Section
from hpm_video.files.atomic import written_beside
from hpm_video.files.errors import ExpectedError, read_text
from hpm_video.files.wording import counted

UNLABELLED = NOT_STATED = -1
Verdict = Literal["fine", "suspicious", "bad"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)  # of tools/check_videos.py
LARGEST = 1e15  # limit of the numbers in a manifest
_SUFFIXES = f"one of {' '.join(VIDEO_SUFFIXES)} (videos) or {' '.join(IMAGE_SUFFIXES)} (images)"
_EXPECTED = (
    "Expected: a CSV file whose first line names its columns (path; optional are label, "
    "label_name, num_frames, kept_every, start, end, fps and verdict), or a list without a header "
    "of lines 'file label', 'file 0 -1' (unlabelled), 'file num_frames label' or 'file' alone, "
    f"where the name of the file ends in {_SUFFIXES}"
)
_LIST_LINE = re.compile(
    rf"(?P<path>\"(?:[^\"]|\"\")+\"|.*(?:{'|'.join(map(re.escape, places.MEDIA_SUFFIXES))}))"
    r"(?P<numbers>(?:[ \t,;]+-?\d+(?:\.0+)?)*)",
    re.IGNORECASE,
)
_OTHERS = ("label", "label_name", "num_frames", "kept_every", "start", "end", "fps", "verdict")
_COLUMNS = ("path", *_OTHERS)
_PATHS = ("video_path", "file_path", "filepath", "file_name", "filename", "video", "file")
"""What others call the column of files, where there is none called path."""


class ManifestError(ExpectedError, ValueError):
    """A manifest cannot be used. The message names the file, the line and the remedy."""


@dataclass(frozen=True)
class Listing:
    """A list of files as it is written: every row and column of it, bad files included."""

    source: Path
    table: pd.DataFrame  # its cells as strings, each row under the number of its line
    files: tuple[str, ...]  # place of the file of each row, as in Manifest.files

    def __len__(self) -> int:
        return len(self.files)

    def column(self, name: str) -> list[str]:
        """Return the cells of a column; they are empty where there is no such column."""
        if name not in self.table:
            return [""] * len(self)
        return [cell.strip() for cell in self.table[name].tolist()]


@dataclass(frozen=True)
class Manifest:
    """Video or image files, and what is known of each of them."""

    files: tuple[str, ...]
    """Absolute paths, or places of the other kinds that :mod:`hpm_video.decoding.locations` has.
    Where rows are sections of videos, so are these: they tell the rows apart."""
    labels: tuple[int, ...]  # class of each file, -1 where it has none
    num_frames: tuple[int, ...]
    """Frames that each file is known to have, -1 where the manifest does not state it."""
    label_names: tuple[str, ...] | None = None
    """Name of each class, where the manifest names classes."""
    has_class_folders: bool = field(default=False, compare=False)
    """Whether classes are folders, numbered in the order of their names."""
    fps: Mapping[str, float] = field(default_factory=dict)
    """Frames per second of files, as far as the manifest states them."""
    kept_every: Mapping[str, int] = field(default_factory=dict)
    """Files that hold only every N-th frame of a video, with that N, at least 2."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_files(self) -> int:
        """The number of different files, or sections of files."""
        return len({*self.files})

    @property
    def digest(self) -> str:
        """SHA-256 of the files' paths and labels, in hexadecimal."""
        rows = zip(self.files, self.labels, strict=True)
        return hashlib.sha256(repr(list(rows)).encode()).hexdigest()

    def spread(self, count: int) -> "Manifest":
        """Keep at most ``count`` of the files, evenly over a list that may be sorted by class."""
        taken = min(count, len(self))
        return self.of([i * len(self) // taken for i in range(taken)])

    def by_length(self, per_minute: float) -> "Manifest":
        """Repeat each row so many times per minute of its video, at least once.

        Raises ManifestError if the length of a video is not known.
        """
        rows = list[int]()
        for row, (file, frames) in enumerate(zip(self.files, self.num_frames, strict=True)):
            section, fps = Section.parse(file), self.fps.get(file)
            whole = frames / fps if fps and frames > 0 else math.inf
            seconds = min(section.end, whole) - section.start
            if not math.isfinite(seconds):
                raise ManifestError(
                    f"data.clips_per_minute needs the length of every video, but the manifest does "
                    f"not state num_frames and fps of {file}; tools/check_videos.py "
                    f"writes these columns"
                )
            rows += [row] * max(1, round(per_minute * seconds / 60))
        return self.of(rows)

    def of(self, rows: Sequence[int]) -> "Manifest":
        return replace(
            self,
            files=tuple(self.files[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
            num_frames=tuple(self.num_frames[i] for i in rows),
        )


def read_manifest(path: Path | str, root: Path | str | None = None) -> Manifest:
    """Read a list of videos or images, or find those of a folder.

    - A CSV file (by commas, semicolons or tabs) whose first line names its columns: ``path``, of
      any kind that :mod:`hpm_video.decoding.locations` has, and optionally ``label``,
      ``label_name``, ``num_frames``, ``kept_every`` (N where the file holds every N-th frame of a
      video), ``start`` and ``end`` (seconds: a row is then a section of its file), ``fps`` and
      ``verdict`` (``bad``: left out). An empty cell says nothing; other columns are ignored.
    - A list without such a line, as VideoMAE and its descendants use: see :func:`_meaning`. The
      numbers at the end of a line are split off, so a path may hold spaces; it may be quoted. Other
      lines that begin with ``#`` are comments.
    - A folder of class folders, where each file lies in a folder directly below: the classes are
      the sorted names of those folders.
    - Any other folder: all videos in it, or all images, however deep, unlabelled. Those whose names
      no manifest can hold (they are not UTF-8, or hold a line break) are left out, and named.

    Relative paths start from ``root``, by default from the manifest's own folder. With ``..`` a
    path may not climb out of it; where ``root`` is given, absolute paths have to lie in it too.
    Links are followed wherever they lead. Whether a listed file exists is not looked at here.

    Raises:
        ManifestError: it cannot be read or holds nothing, a path leads out of the root, all files
            are bad, or a folder holds videos and images.
    """
    listing = read_listing(path, root)
    labels, num_frames = _whole_numbers(listing, "label", 0), _whole_numbers(listing, "num_frames")
    names = _label_names(listing, labels)
    has_class_folders = listing.source.is_dir() and "label" in listing.table
    files = _sections(listing)
    rates = pd.to_numeric(pd.Series(listing.column("fps")), errors="coerce").tolist()
    fps = {file: rate for file, rate in zip(files, rates, strict=True) if 0 < rate < math.inf}
    every = zip(files, _whole_numbers(listing, "kept_every"), strict=True)
    kept_every = {file: number for file, number in every if number > 1}
    manifest = Manifest(files, labels, num_frames, names, has_class_folders, fps, kept_every)
    verdicts = pd.Series(listing.column("verdict"))
    wrong = np.flatnonzero(~verdicts.isin(["", *VERDICTS]))
    _refuse(listing, wrong.tolist(), f"verdict must be one of {', '.join(VERDICTS)} or empty")
    kept = np.flatnonzero(verdicts != "bad").tolist()
    if not kept:
        raise ManifestError(
            f"all {len(manifest)} files of {listing.source} have the verdict bad; see "
            "its column reason. If they have been repaired, check them again: tools/check_videos.py"
        )
    if left_out := len(manifest) - len(kept):
        places.log_once(
            logging.INFO,
            f"{left_out} of {len(manifest)} files of {listing.source} are left out, since "
            "their verdict is bad",
        )
    return manifest.of(kept) if left_out else manifest


def read_listing(path: Path | str, root: Path | str | None = None) -> Listing:
    """Read what :func:`read_manifest` reads, with all its rows and columns.

    Raises ManifestError as that does, but looks at no labels, numbers and verdicts.
    """
    source = Path(path).absolute()
    if source.is_dir():
        return _read_folder(source)
    if not source.exists():
        raise ManifestError(
            f"there is no manifest or folder {source}; a relative path starts from the working "
            f"directory, {Path.cwd()}"
        )
    text = read_text(source, ManifestError, _EXPECTED)
    first_line = text.partition("\n")[0]
    for separator in ",;\t":
        if columns := _columns(first_line, separator):
            table = _read_table(source, text, columns, separator)
            break
    else:
        table = _read_list(source, text)
    if table.empty:
        raise ManifestError(f"{source} lists no videos or images. {_EXPECTED}")
    base, files = Path(root).absolute() if root else source.parent, list[str]()
    try:
        for each in table["path"].tolist():
            files.append(places.place_of(each, base, confined=bool(root)))
    except ValueError as error:
        row = ",".join(table.iloc[len(files)])
        raise _bad_line(source, table.index[len(files)], row, str(error)) from None
    return Listing(source, table, tuple(files))


def write_manifest(table: pd.DataFrame, path: Path | str) -> None:
    """Write a table with at least a column ``path``. What lies at ``path`` is always complete."""
    with written_beside(Path(path)) as beside:
        table.to_csv(beside, index=False)


def _bad_line(source: Path, line: object, row: str, why: str) -> ManifestError:
    return ManifestError(f"{source}, line {line}: {why}, got {row!r}. {_EXPECTED}")


def _refuse(listing: Listing, rows: Sequence[int], why: str) -> None:
    """Raise a ManifestError that names the first of these rows, if there are any."""
    if len(rows):
        cells = ",".join(listing.table.iloc[rows[0]])
        raise _bad_line(listing.source, listing.table.index[rows[0]], cells, why)


def _columns(line: str, separator: str) -> list[str]:
    """Return the columns that a first line names, as we spell them; none where it has no files."""
    cells = [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    names = [cell.lower() if cell.lower() in _COLUMNS else cell for cell in cells]
    others = [cell for cell in cells if cell.lower() in _PATHS]
    if "path" not in names and len(others) == 1 and len(cells) > 1:
        names[cells.index(others[0])] = "path"
    return names if "path" in names else []


def _read_table(source: Path, text: str, header: list[str], separator: str) -> pd.DataFrame:
    if len({*header}) < len(header):
        raise _bad_line(source, 1, ",".join(header), "a column appears more than once")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    next(reader)
    rows = {}
    for row in filter(None, reader):
        if len(row) != len(header):
            why = f"need {len(header)} columns as in the first line ({','.join(header)})"
            raise _bad_line(source, reader.line_num, ",".join(row), why)
        rows[reader.line_num] = row
    return pd.DataFrame.from_dict(rows, orient="index", columns=header, dtype=str)


def _read_list(source: Path, text: str) -> pd.DataFrame:
    """Turn a list without a header into the columns of our own format."""
    rows: dict[int, tuple[str, ...]] = {}
    columns = None
    for line, row in enumerate(text.splitlines(), start=1):
        match = _LIST_LINE.fullmatch(row.strip())
        if not match and (not row.strip() or row.startswith("#")):
            continue
        if not match:
            why = "need the path of a video or an image, then whole numbers"
            if line == 1 and not re.search(r"\d|/", row):
                why += ", or a first line that names the columns, one of them path"
            raise _bad_line(source, line, row, f"{why} (folders of frames are not read)")
        numbers = re.sub(r"[,;]|\.0+\b", " ", match["numbers"]).split()
        columns = len(numbers) if columns is None else columns
        if len(numbers) != columns:
            why = f"need {1 + columns} columns as in the lines before"
            raise _bad_line(source, line, row, why)
        path = match["path"]
        path = path[1:-1].replace('""', '"') if path[0] == '"' else path
        rows[line] = (path, *_meaning(source, line, row, numbers))
    names = ["path", "label", "num_frames"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=names, dtype=str)


def _meaning(source: Path, line: int, row: str, numbers: list[str]) -> tuple[str, str]:
    """Return the label and the number of frames, where the numbers behind a path say so.

    One is the label, as in ImageNet's lists. Of two, ``0 -1`` marks an unlabelled video (VideoMAE
    V2), and ``num_frames label`` says both (VideoMAE). Three are ``start num_frames label``, where
    the start must be 0. Of any other nothing tells which number means what.
    """
    match numbers:
        case [] | ["0", "-1"]:
            return "", ""
        case [label] | ["0", "-1", label]:
            return label, ""
        case [num_frames, label] if int(num_frames) > 0 and int(label) >= 0:
            return label, num_frames
        case ["0", num_frames, label] if int(num_frames) > 0:
            return label, num_frames
        case _:
            why = (
                "cannot tell what these numbers mean. Write a CSV file with named columns, or "
                "'file 0 -1' where there is no label"
            )
            raise _bad_line(source, line, row, why)


def _sections(listing: Listing) -> tuple[str, ...]:
    """Return the place of each row, of a section where its cells ``start`` and ``end`` say so."""
    if not {"start", "end"} & {*listing.table.columns}:
        return listing.files
    cells = [pd.Series(listing.column(name)) for name in ("start", "end")]
    starts = pd.to_numeric(cells[0].replace("", "0"), errors="coerce")
    ends = pd.to_numeric(cells[1].replace("", str(LARGEST)), errors="coerce")
    is_right = (starts >= 0) & (starts < ends) & (ends <= LARGEST)
    why = "start and end must be seconds, the end after the start, or empty"
    _refuse(listing, np.flatnonzero(~is_right).tolist(), why)
    found = []
    for file, start, end in zip(listing.files, *cells, strict=True):
        first, last = (
            cell and np.format_float_positional(float(cell), trim="-") for cell in (start, end)
        )
        found.append(f"{file}#t={first}{last and ','}{last}" if first or last else file)
    return tuple(found)


def _whole_numbers(listing: Listing, column: str, least: int = 1) -> tuple[int, ...]:
    """Read a column of numbers, -1 where a cell is empty or there is no such column."""
    cells = pd.Series(listing.column(column))
    # A cell may be 3.0, as pandas writes it where another row of the column is empty.
    numbers = pd.to_numeric(cells.replace("", "-1"), errors="coerce")
    is_whole = (numbers % 1 == 0) & (numbers < LARGEST)
    is_right = (numbers == -1) | (numbers >= least) & is_whole
    why = f"{column} must be a whole number of at least {least}, or -1 for none"
    _refuse(listing, np.flatnonzero(~is_right).tolist(), why)
    return tuple(numbers.astype(int).tolist())


def _label_names(listing: Listing, labels: Sequence[int]) -> tuple[str, ...] | None:
    if "label_name" not in listing.table:
        return None
    if "label" not in listing.table:
        raise ManifestError(
            f"{listing.source} has a column label_name but no column label. Add the number of each "
            "class: numbers made up here would differ from one manifest to the next"
        )
    names: dict[int, str] = {}
    for row, (label, cell) in enumerate(zip(labels, listing.column("label_name"), strict=True)):
        name = " ".join(cell.split())  # on one line, as a list of names can hold it
        if label >= 0 and name and names.setdefault(label, name) != name:
            _refuse(listing, [row], "this label had another label_name in a line before")
    return tuple(names.get(label, str(label)) for label in range(max(labels) + 1))


def _read_folder(folder: Path) -> Listing:
    if why := places.unwritable(str(folder)):
        raise ManifestError(f"the path of the folder {str(folder)!r} {why}; rename it")
    every = places.files_below(folder)
    found = [name for name in every if not places.unwritable(name)]
    if odd := [name for name in every if places.unwritable(name)]:
        places.log_once(
            logging.WARNING,
            f"{len(odd)} of {len(every)} files in {folder} are left out: no manifest can hold "
            f"their names. Rename them or their folders: {odd[0]!r} {places.unwritable(odd[0])}",
        )
    if not found:
        raise ManifestError(
            f"there are no videos in {folder} or its subfolders, and no images; their names must "
            f"end in {_SUFFIXES}"
        )
    images = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in found)
    if 0 < images < len(found):
        raise ManifestError(
            f"{folder} holds both {counted(len(found) - images, 'video')} and "
            f"{counted(images, 'image')}. Move one kind to another folder, or write a manifest of "
            "the files to use"
        )
    columns = {"path": found}
    if all(name.count("/") == 1 for name in found):
        classes = [name.partition("/")[0] for name in found]
        labels = {name: str(label) for label, name in enumerate(sorted({*classes}))}
        columns |= {"label": [labels[name] for name in classes], "label_name": classes}
    start = str(folder).rstrip("/") + "/"
    return Listing(folder, pd.DataFrame(columns, dtype=str), tuple(start + name for name in found))
