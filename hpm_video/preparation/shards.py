"""Tar files in the layout of webdataset, and names of outputs.

The files of a sample follow each other in a tar and share a key, the name up to the first dot:
``class/a.cls`` (the class, if it has one), ``class/a.json`` (metadata) and
``class/a.mp4``. The same samples give the same bytes.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES, TarMember, is_frame_folder
from hpm_video.files.failures import Failure
from hpm_video.preparation.jobs import Steps, attempt

LONGEST_PART = 150  # limit of the bytes in a part of a name; file systems take 255
UNSAFE = r"[\0-\x1f\x7f-\x9f\\\ud800-\udfff]"  # control characters and those that are not text


@dataclass(frozen=True)
class Sample:
    """A sample that is to be packed."""

    key: str
    place: str  # path of a file, or member of another tar
    suffix: str  # suffix of the member, such as ``.mp4``
    label: int  # -1 where it has none
    info: Mapping[str, Any]  # content of the JSON file


@dataclass(frozen=True)
class Shard:
    """Samples of one tar file."""

    temporary: str  # path to write to first
    target: str
    samples: tuple[Sample, ...]


def pack_shard(shard: Shard) -> Iterator[list[TarMember] | Failure | None]:
    """Work of a process: write a shard. -> the member of each sample"""
    return attempt(write_shard(shard), shard.target, shard.temporary)


def write_shard(shard: Shard) -> Steps[list[TarMember]]:
    """Write a tar file, and move it to its place. -> the member of each sample"""
    names = [sample.key + sample.suffix for sample in shard.samples]
    with tarfile.open(shard.temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample, name in zip(shard.samples, names, strict=True):
            texts = {".cls": str(sample.label)} if sample.label >= 0 else {}
            texts[".json"] = json.dumps(dict(sample.info), sort_keys=True)
            for suffix, text in texts.items():
                _add(tar, sample.key + suffix, io.BytesIO(text.encode()))
            member = TarMember.parse(sample.place)
            with io.BytesIO(member.read()) if member else Path(sample.place).open("rb") as source:
                _add(tar, name, source)
            yield
    with tarfile.open(shard.temporary, "r:") as tar:
        written = {member.name: member for member in tar}
    Path(shard.temporary).replace(shard.target)
    tar_name = Path(shard.target).name
    members = [written[name] for name in names]
    return [TarMember(tar_name, each.name, each.offset_data, each.size) for each in members]


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    """Append a file without times and owners, by which equal shards would differ."""
    header = tarfile.TarInfo(name)
    header.size = file.seek(0, os.SEEK_END)
    file.seek(0)
    tar.addfile(header, file)


def suffix_of(place: str) -> str:
    """Return the lower-case suffix of a place that is no folder of frames."""
    member = TarMember.parse(place)
    name = (member.name if member else place).lower()
    return next(end for end in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, "") if name.endswith(end))


def output_names(
    places: Sequence[str], base: str, *, dots: bool = True, nests: bool = True
) -> dict[str, str]:
    """Name the output of each place: a relative path without a suffix that is safe to write to.

    It is the path below ``base``, or the full path of a place elsewhere, and never contains ``..``.
    Of two names that differ in letter case at most, the first stays as it is, so that names do not
    change when places are appended. The others get a part of their place's digest, and so do those
    with characters that are no good in a name.

    Without ``dots`` the last part has no dot, which webdataset takes for the start of the suffix.
    Without ``nests`` no name lies below another, which may be a folder of frames.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    above: set[str] = set()
    for place in dict.fromkeys(places):
        wish = _wish(place, base)
        name = _cleaned(wish, dots)
        folded = name.casefold()
        clashes = folded in taken
        if not nests:
            clashes = clashes or folded in above or not taken.isdisjoint(_folders(folded))
        if clashes or name.replace(".", "_") != wish.replace(".", "_"):
            mark = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:10]
            name = f"{name if nests else _cleaned(name.replace('/', '+'), dots)}-{mark}"
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
