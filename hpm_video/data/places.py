"""Paths as manifests and folders spell them, and where the files then lie."""

import logging
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES, TarMember

log = logging.getLogger(__name__)

MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
_ODD = ("/.", "//", "::")


def place_of(path: str, base: Path, *, confined: bool) -> str:
    """Return a path from ``base`` on, as pathlib spells it; a folder of frames keeps its slash.

    Raises ValueError if it is not a path, or leads out of ``base``.
    """
    plain_ends = path[:1] not in "./ " and path[-1] != "/"
    if plain_ends and path.isprintable() and not any(odd in path for odd in _ODD):
        return f"{str(base).rstrip('/')}/{path}"  # most of a million paths need no more
    if not path.strip():
        raise ValueError("the path is empty")
    if why := unwritable(path):
        raise ValueError(f"the path {why}; rename the file")
    if member := TarMember.parse(path):
        if _climbs(member.name) or member.name[0] == "/":
            raise ValueError(
                "the name of a member must not lead out of its tar file, by .. or a leading slash; "
                "pack it anew"
            )
        return str(replace(member, tar=place_of(member.tar, base, confined=confined)))
    if path[0] != "/" and _climbs(path):
        raise ValueError(
            f"a path must not climb out of its root, {base}, by ..; give a root further up "
            "(data.root, or --root of a tool), and paths relative to it"
        )
    place = base / re.sub("^//+", "/", path)
    if confined and not Path(os.path.normpath(place)).is_relative_to(os.path.normpath(base)):
        raise ValueError(
            f"the path lies outside the given root, {base}; give another root (data.root, or "
            "--root of a tool), or none: absolute paths are then taken as they are"
        )
    return f"{place}/" if path.endswith("/") and str(place) != "/" else str(place)


def _climbs(path: str) -> bool:
    """Whether ``..`` leads out of the folder where a relative path starts, at any point of it."""
    return os.path.normpath(path).split("/")[0] == ".."


def unwritable(path: str) -> str:
    """Say why no manifest can hold a path; the text is empty where one can."""
    if any(character in path for character in "\0\n\r"):
        return "holds a line break or a null character"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "is not text in UTF-8"
    return ""


@cache
def log_once(level: int, message: str) -> None:
    """Log what is found again when a program reads a list or a folder again."""
    log.log(level, "%s", message)


def files_below(folder: Path) -> list[str]:
    """Return all videos and images below a folder, folder by folder: paths from ``folder`` on."""
    found, seen = [], set()  # links to folders are followed, but not in circles
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := Path(place).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        start = "" if Path(place) == folder else f"{Path(place).relative_to(folder)}/"
        media = [name for name in files if name.lower().endswith(MEDIA_SUFFIXES)]
        found += [start + name for name in media if name[0] != "."]
    return sorted(found, key=lambda name: name.split("/"))
