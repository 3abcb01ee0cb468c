"""Names of outputs."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES, TarMember, is_frame_folder

LONGEST_PART = 150  # limit of the bytes in a part of a name; file systems take 255
UNSAFE = r"[\0-\x1f\x7f-\x9f\\\ud800-\udfff]"  # control characters and those that are not text


def suffix_of(place: str) -> str:
    """Return the lower-case suffix of a place that is no folder of frames."""
    member = TarMember.parse(place)
    name = (member.name if member else place).lower()
    return next(end for end in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, "") if name.endswith(end))


def output_names(places: Sequence[str], base: str, *, dots: bool = True) -> dict[str, str]:
    """Name the output of each place: a relative path without a suffix that is safe to write to.

    It is the path below ``base``, or the full path of a place elsewhere, and never contains ``..``.
    No name lies below another, which may be a folder of frames. Of two that do, or that differ in
    letter case at most, the first stays as it is, so that names do not change when places are
    appended. The others get a part of their place's digest, and so do those with characters that
    are no good in a name.

    Without ``dots`` the last part has no dot, which webdataset takes for the start of the suffix.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    above: set[str] = set()
    for place in dict.fromkeys(places):
        wish = _wish(place, base)
        name = _cleaned(wish, dots)
        folded = name.casefold()
        clashes = folded in taken or folded in above or not taken.isdisjoint(_folders(folded))
        if clashes or name.replace(".", "_") != wish.replace(".", "_"):
            mark = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:10]
            name = f"{_cleaned(name.replace('/', '+'), dots)}-{mark}"
            folded = name.casefold()
        taken.add(folded)
        above.update(_folders(folded))
        names[place] = name
    return names


def _wish(place: str, base: str) -> str:
    """Return the path of a place from ``base`` on, without a suffix."""
    member = TarMember.parse(place)
    path, base = os.path.abspath(member.tar if member else place), os.path.abspath(base)  # noqa: PTH100 - it takes out ..
    wish = path.removeprefix(base.rstrip("/") + "/").lstrip("/")
    if member:
        inside = os.path.normpath("/" + member.name).lstrip("/")
        wish = f"{wish[: -len('.tar')]}/{inside}"
    return wish if is_frame_folder(place) else wish[: -len(suffix_of(place)) or None]


def _cleaned(name: str, dots: bool) -> str:
    """Make each part of a name acceptable to any file system."""
    *folders, last = name.split("/")
    parts = [*folders, last if dots else last.replace(".", "_")]
    safe = [re.sub(UNSAFE, "_", part).encode()[-LONGEST_PART:] for part in parts]
    texts = [part.decode(errors="ignore") for part in safe]
    return "/".join("_" if text in ("", ".", "..") else text for text in texts)


def _folders(name: str) -> set[str]:
    return {parent.as_posix() for parent in PurePosixPath(name).parents} - {"."}
