"""From a published data set, its lists and its folder of files, to manifests and a report.

What a data set's own lists look like is the business of ``datasets/<name>/prepare.py``: it turns
them into clips, finds the file of each (:mod:`hpm_video.preparation.sources`), and hands both to
:func:`run_recipe`.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpm_video.data.manifest import UNLABELLED, ManifestError
from hpm_video.files.atomic import written_beside
from hpm_video.preparation.sources import Kind, RecipeError, Split, Videos

COLUMNS = ("path", "label", "label_name")
NAMED_IN_REPORT = 5


class Prepared(NamedTuple):
    """What a recipe makes of a data set."""

    names: Sequence[str]
    """Of the classes."""
    splits: Sequence[Split]
    shelves: Iterable[Videos] = ()
    """Folders of files, of which those are reported that no list has."""
    notes: Sequence[str] = ()
    """Further lines of the report."""


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


def report(output: Path, prepared: Prepared) -> str:
    """What was found and what was not, for people."""
    output = output.absolute()
    names = prepared.names
    lines = [f"{len(names)} classes: {output / 'labels.txt'}"]
    for split in prepared.splits:
        listed, missing = len(split.found) + len(split.missing), len(split.missing)
        lines.append(
            f"{split.name}: {listed} {split.kind}s listed, {len(split.found)} found, {missing} "
            f"missing: {manifest_of(output, split)}"
        )
        if missing:
            some = _some([clip.name for clip in split.missing])
            lines.append(f"  missing: {some}; all in {missing_list(output, split)}")
        labels = {clip.label for clip, _ in split.found}
        if labels == {UNLABELLED}:
            lines.append("  without labels")
            continue
        empty = [name for label, name in enumerate(names) if label not in labels]
        lines.append(f"  classes without any {split.kind}: {_some(empty) if empty else 'none'}")
    for shelf in prepared.shelves:
        unlisted = shelf.unlisted()
        some = f": {_some([str(file.relative_to(shelf.folder)) for file in unlisted])}"
        lines.append(
            f"on disk, but in none of these lists: {len(unlisted)} of {len(shelf.files)} "
            f"{shelf.kind}s in {shelf.folder}{some if unlisted else ''}"
        )
        if shelf.other_kind:
            other = "image" if shelf.kind == "video" else "video"
            lines.append(f"left out: {shelf.other_kind} {other}s in {shelf.folder}")
    text = "\n".join([*lines, *prepared.notes])
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # names that are not text


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(names) - NAMED_IN_REPORT
    return ", ".join(names[:NAMED_IN_REPORT]) + (f" and {more} more" if more > 0 else "")


class RecipeParser(argparse.ArgumentParser):
    """The command line of a script ``prepare.py``, with the options that all of them have."""

    def __init__(self, about: str | None, script: str, kind: Kind = "video") -> None:
        """``about``: the script's docstring; ``script``: its file."""
        super().__init__(description=(about or "").partition("\n")[0])
        self.add_path(
            "--output",
            "where manifests and labels.txt go, by default beside this script",
            default=Path(script).resolve().parent,
        )
        example = ".JPEG" if kind == "image" else ".MP4"
        self.add_argument("--suffix", metavar=example, help=f"take only {kind}s with this suffix")
        self.add_argument(
            "--strict", action="store_true", help=f"exit with 2 if a {kind} is missing"
        )

    def add_path(self, name: str, about: str, metavar: str = "DIR", **options: Any) -> None:
        """Add an option that names a file or a folder."""
        self.add_argument(name, type=Path, metavar=metavar, help=about, **options)


def run_recipe(
    options: argparse.Namespace, prepare: Callable[[argparse.Namespace], Prepared]
) -> int:
    """Write what ``prepare`` makes of a data set, and report it. -> the exit code"""
    try:
        prepared = prepare(options)
        write(options.output, prepared.names, prepared.splits)
    except (RecipeError, ManifestError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{report(options.output, prepared)}\n")
    return 2 if options.strict and any(split.missing for split in prepared.splits) else 0
