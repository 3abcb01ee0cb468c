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

FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
"""Of options that name one."""
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


def run_recipe(
    about: str | None,
    script: str,
    options: Mapping[str, dict[str, Any]],
    prepare: Callable[[argparse.Namespace], Prepared],
    arguments: Sequence[str] | None = None,
    *,
    kind: Kind = "video",
) -> int:
    """Write what ``prepare`` makes of a data set, and report it. -> the exit code

    Args:
        about: the docstring of the recipe.
        script: its file, beside which its output goes.
        options: those that it has of its own, as ``add_argument`` takes them.
        prepare: takes the options.
        arguments: the command line.
        kind: of its files.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    add = parser.add_argument
    for name, settings in options.items():
        add(name, **settings)
    beside, example = Path(script).resolve().parent, ".JPEG" if kind == "image" else ".MP4"
    where = "where manifests and labels.txt go, by default beside this script"
    add("--output", default=beside, help=where, **FOLDER)
    add("--suffix", metavar=example, help=f"take only {kind}s with this suffix")
    add("--strict", action="store_true", help=f"exit with 2 if a {kind} is missing")
    given = parser.parse_args(arguments)
    try:
        prepared = prepare(given)
        write(given.output.absolute(), prepared.names, prepared.splits)
    except (RecipeError, ManifestError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{report(given.output.absolute(), prepared)}\n")
    return 2 if given.strict and any(split.missing for split in prepared.splits) else 0


def write(output: Path, names: Sequence[str], splits: Sequence[Split]) -> None:
    """Write ``labels.txt``, and of each split its manifest and a list of what is missing.

    Paths are relative where a file lies below ``output``, otherwise absolute.

    Raises:
        RecipeError: a manifest there, not written anew now, has other numbers for the classes;
            or the name of a file is not text. Nothing is written then.
    """
    content = {"labels.txt": "".join(f"{name}\n" for name in names)}
    for split in splits:
        content[f"missing_{split.name}.txt"] = "".join(f"{clip.name}\n" for clip in split.missing)
        content[f"{split.name}.csv"] = _manifest_text(output, names, split)
    try:
        encoded = {name: text.encode("utf-8") for name, text in content.items()}
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 60, 0) : error.end + 60]
        raise RecipeError(
            f"the name of a file is not text in UTF-8, in {around!r}. Rename it"
        ) from error
    labels = output / "labels.txt"
    if labels.exists() and labels.read_bytes() != encoded[labels.name]:
        _check_other_manifests(output, encoded)
    for name, data in encoded.items():
        if not data:
            (output / name).unlink(missing_ok=True)  # nothing is missing any more
            continue
        with written_beside(output / name) as beside:
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


def _check_other_manifests(output: Path, written: Iterable[str]) -> None:
    """Make sure that no manifest stays that means other classes by its numbers."""
    for path in sorted(output.glob("*.csv")):
        with path.open("rb") as stream:
            is_manifest = stream.readline() == (",".join(COLUMNS) + "\n").encode()
        if is_manifest and path.name not in written:
            raise RecipeError(
                f"{path} has the numbers of {output / 'labels.txt'}, which names other classes "
                "than this run. Prepare all splits at once, name another folder by --output, or "
                "delete that manifest"
            )


def report(output: Path, prepared: Prepared) -> str:
    """Say what was found and what was not."""
    lines = [f"{len(prepared.names)} classes: {output / 'labels.txt'}"]
    for split in prepared.splits:
        listed, missing = len(split.found) + len(split.missing), len(split.missing)
        lines.append(
            f"{split.name}: {listed} {split.kind}s listed, {len(split.found)} found, {missing} "
            f"missing: {output / split.name}.csv"
        )
        if missing:
            some = _some([clip.name for clip in split.missing])
            lines.append(f"  missing: {some}; all in {output}/missing_{split.name}.txt")
        if not split.listed:
            lines.append("  without a list, so what is missing is not known")
        labels = {clip.label for clip, _ in split.found}
        if labels == {UNLABELLED}:
            lines.append("  without labels")
            continue
        empty = [name for label, name in enumerate(prepared.names) if label not in labels]
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
