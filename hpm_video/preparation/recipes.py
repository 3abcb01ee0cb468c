"""Manifests of published data sets, and a report about them.

``datasets/<name>/prepare.py`` reads the lists of its data set and finds the file of each clip
(:mod:`hpm_video.preparation.sources`); :func:`run_recipe` does the rest.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpm_video.data.manifest import UNLABELLED
from hpm_video.data.places import unwritable
from hpm_video.files.atomic import written_beside
from hpm_video.files.errors import ExpectedError
from hpm_video.files.printing import printable, safe_output
from hpm_video.files.wording import counted
from hpm_video.preparation.sources import Kind, RecipeError, Split, Videos, stem

FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}  # settings of options that name one
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
REQUIRED_FOLDER = {"required": True, **FOLDER}
COLUMNS = ("path", "label", "label_name")
NAMED_IN_REPORT = 5


class Prepared(NamedTuple):
    """Result of a recipe."""

    class_names: Sequence[str]
    splits: Sequence[Split]
    notes: Sequence[str] = ()  # further lines of the report


@safe_output()
def run_recipe(
    about: str | None,
    script: str,
    options: Mapping[str, dict[str, Any]],
    prepare: Callable[[argparse.Namespace], Prepared],
    arguments: Sequence[str] | None = None,
    *,
    kind: Kind = "video",
) -> int:
    """Run ``prepare``, and write and report its result. -> the exit code

    ``about``: the docstring of the recipe; ``script``: its file, beside which the output goes by
    default; ``options``: its own options, as ``add_argument`` takes them; ``kind``: of its files.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    add = parser.add_argument
    for name, settings in options.items():
        add(name, **settings)
    where = "where manifests and labels.txt go, by default beside this script"
    add("--output", default=Path(script).resolve().parent, help=where, **FOLDER)
    add("--suffix", metavar=".EXT", help=f"take only {kind}s with this suffix")
    add("--strict", action="store_true", help=f"exit with 2 if any {kind} is missing")
    given = parser.parse_args(arguments)
    try:
        prepared = prepare(given)
        write(given.output.absolute(), prepared.class_names, prepared.splits)
    except (ExpectedError, OSError) as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        return 2
    sys.stdout.write(f"{report(given.output.absolute(), prepared, kind)}\n")
    return 2 if given.strict and any(split.missing for split in prepared.splits) else 0


def open_splits(
    options: argparse.Namespace,
    names: Sequence[str],
    list_option: str,
    key: Callable[[Path], str],
    kind: Kind = "video",
) -> tuple[dict[str, Videos], dict[str, Path]]:
    """Open the folders of splits, such as --train, and take their lists, such as --train-csv.

    The list of the first split may come without a folder, for its classes. ``key``: of files that
    no list names. Splits may share a folder.
    """
    given = {name: vars(options)[name] for name in names}
    every = {name: vars(options)[f"{name}_{list_option}"] for name in names}
    lists: dict[str, Path] = {name: path for name, path in every.items() if path}
    if not any(given.values()):
        *first, last = (f"--{name}" for name in names)
        raise RecipeError(f"name the folder of at least one split: {', '.join(first)} or {last}")
    if absent := [name for name in names[1:] if lists.get(name) and not given[name]]:
        raise RecipeError(
            f"--{absent[0]}-{list_option} needs --{absent[0]}, the folder of its {kind}s"
        )
    opened: dict[tuple[Path, bool], Videos] = {}
    folders = {}
    for name, folder in given.items():
        if folder:
            place = (folder.resolve(), name in lists)
            if place not in opened:
                by = stem if name in lists else key
                opened[place] = Videos(folder, by, suffix=options.suffix, kind=kind)
            folders[name] = opened[place]
    return folders, lists


def write(output: Path, names: Sequence[str], splits: Sequence[Split]) -> None:
    """Write ``labels.txt``, and for each split a manifest and a list of missing files.

    Paths are relative where a file lies below ``output``, otherwise absolute. Nothing is written
    where another manifest there numbers the classes differently, or the name of a file is not text.
    """
    content = {"labels.txt": "".join(f"{name}\n" for name in names)}
    for split in splits:
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for clip, file in split.found:
            if why := unwritable(str(file)):
                raise RecipeError(f"the name of the file {str(file)!r} {why}. Rename it")
            path = file.relative_to(output) if file.is_relative_to(output) else file
            known = ("", "") if clip.label == UNLABELLED else (clip.label, names[clip.label])
            writer.writerow((path, *known))
        content[f"missing_{split.name}.txt"] = "".join(f"{clip.name}\n" for clip in split.missing)
        content[f"{split.name}.csv"] = stream.getvalue()
    labels = output / "labels.txt"
    others = [path for path in sorted(output.glob("*.csv")) if path.name not in content]
    same = not labels.exists() or labels.read_bytes() == content[labels.name].encode()
    for path in others if not same else ():
        with path.open("rb") as stream_of_other:
            is_manifest = stream_of_other.readline() == (",".join(COLUMNS) + "\n").encode()
        if is_manifest:
            raise RecipeError(
                f"{path} has the numbers of {labels}, which names other classes than this run. "
                "Prepare all splits at once, name another folder by --output, or delete that "
                "manifest"
            )
    for name, text in content.items():
        if not text:
            (output / name).unlink(missing_ok=True)  # no file is missing any more
            continue
        with written_beside(output / name) as beside:
            beside.write_text(text, encoding="utf-8", newline="")


def report(output: Path, prepared: Prepared, kind: Kind) -> str:
    """Report found, missing and unlisted files."""
    lines = [f"{counted(len(prepared.class_names), 'class')}: {output / 'labels.txt'}"]
    for split in prepared.splits:
        found, missing = len(split.found), len(split.missing)
        lines.append(
            f"{split.name}: {counted(found + missing, kind)} listed, {found} found, {missing} "
            f"missing: {output / split.name}.csv"
        )
        if missing:
            some = _some([clip.name for clip in split.missing])
            lines.append(f"  missing: {some}; all in {output}/missing_{split.name}.txt")
        if not split.listed:
            lines.append("  without a list, so what is missing is not known")
        labels = {clip.label for clip, _ in split.found}
        empty = [name for label, name in enumerate(prepared.class_names) if label not in labels]
        without = f"classes without any {kind}: {_some(empty) or 'none'}"
        lines.append(f"  {'without labels' if labels == {UNLABELLED} else without}")
    for folder in dict.fromkeys(split.videos for split in prepared.splits if split.videos):
        unlisted = [str(file.relative_to(folder.folder)) for file in folder.unlisted()]
        lines.append(
            f"on disk, but in none of these lists: {len(unlisted)} of "
            f"{counted(len(folder.files), kind)} in {folder.folder}"
            f"{': ' * bool(unlisted)}{_some(unlisted)}"
        )
        if folder.other_kind:
            other = "image" if kind == "video" else "video"
            lines.append(f"left out: {counted(folder.other_kind, other)} in {folder.folder}")
    text = "\n".join([*lines, *prepared.notes])
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # names that are not text


def _some(names: Sequence[str]) -> str:
    """Name the first few, and count the others."""
    more = len(names) - NAMED_IN_REPORT
    return ", ".join(names[:NAMED_IN_REPORT]) + (f" and {more} more" if more > 0 else "")
