"""Writing tar files in the layout of webdataset, and names for what is written.

The files of a sample follow each other in a tar and share a key, the name up to the first dot:
``class/a.cls`` (its class, where it has one), ``class/a.json`` (what is known of it) and
``class/a.mp4``. The same samples give the same bytes.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES, TarMember, is_frame_folder
from hpm_video.preparation.jobs import (
    Broken,
    Step,
    Steps,
    WrongOutputError,
    paced,
    reason_of,
    remove,
)

LONGEST_PART = 150
"""Bytes of a part of a name; file systems take 255."""
CHUNK = 2**22
"""Bytes that are read at once."""


@dataclass(frozen=True)
class Packable:
    """A sample, as it goes into a shard."""

    key: str
    place: str
    """Where the bytes lie: the path of a file, or a member of another tar."""
    suffix: str
    """Of the member, such as ``.mp4``."""
    label: int
    """-1 where it has none."""
    info: Mapping[str, Any]
    """What goes into the JSON file."""


class Packed(NamedTuple):
    """Where in its tar the bytes of a sample lie."""

    member: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """Samples that go into one tar file."""

    beside: str
    """A path to write to first."""
    target: str
    samples: tuple[Packable, ...]


class Packer:
    """Writes shards: work for a process."""

    def __call__(self, shard: Shard) -> Iterator[Step | Broken | list[Packed]]:
        """-> steps, and at last where each sample lies"""
        return paced(self._pack(shard))

    def _pack(self, shard: Shard) -> Steps[Broken | list[Packed]]:
        try:
            packed = yield from write_shard(Path(shard.beside), shard.samples)
            Path(shard.beside).replace(shard.target)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the run is told, whatever it is
            return Broken(f"{shard.target} cannot be written: {reason_of(error)}")
        finally:
            remove(shard.beside)
        return packed


def write_shard(path: Path, samples: Sequence[Packable]) -> Steps[list[Packed]]:
    """Write a tar file and read it again. -> where each sample's bytes lie

    Raises:
        WrongOutputError: what is read is not what was written.
        OSError: a file cannot be read or written.
    """
    sums: dict[str, str] = {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            told = json.dumps(dict(sample.info), sort_keys=True, ensure_ascii=True)
            small = {".cls": str(sample.label)} if sample.label >= 0 else {}
            for suffix, text in (small | {".json": told}).items():
                data = text.encode()
                tar.addfile(_header(sample.key + suffix, len(data)), io.BytesIO(data))
            with opened(sample.place) as (source, size):
                sums[sample.key + sample.suffix] = _sum(source)
                source.seek(0)
                tar.addfile(_header(sample.key + sample.suffix, size), source)
            yield Step()
    return (yield from _read_again(path, sums))


def _read_again(path: Path, sums: Mapping[str, str]) -> Steps[list[Packed]]:
    found = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            data = tar.extractfile(member)
            if member.name not in sums or data is None:
                continue
            if _sum(data) != sums[member.name]:
                raise WrongOutputError(
                    f"{path}: {member.name} is not what was written: a disk error"
                )
            found[member.name] = Packed(member.name, member.offset_data, member.size)
            yield Step()
    if found.keys() != sums.keys():
        raise WrongOutputError(
            f"{path} lacks {sorted(sums.keys() - found.keys())[:3]}: a disk error"
        )
    return [found[name] for name in sums]


def _sum(file: IO[bytes]) -> str:
    total = hashlib.sha256()
    while data := file.read(CHUNK):
        total.update(data)
    return total.hexdigest()


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Neither times nor owners, which would tell equal shards apart."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header


@contextlib.contextmanager
def opened(place: str) -> Iterator[tuple[IO[bytes], int]]:
    """The bytes of a place as a file, and how many they are."""
    if member := TarMember.parse(place):
        yield io.BytesIO(member.read()), member.size
    else:
        with Path(place).open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


def suffix_of(place: str) -> str:
    """The suffix of a place that is no folder of frames, in small letters: ``.mp4``."""
    member = TarMember.parse(place)
    name = (member.name if member else place).lower()
    return next(end for end in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, "") if name.endswith(end))


def output_names(
    places: Sequence[str], base: str, *, dots: bool = True, nests: bool = True
) -> dict[str, str | None]:
    """A name for what is made of each place: a relative path, without a suffix, safe to write to.

    It is the path from ``base`` on; of a place outside it the whole path, without the slash in
    front. No name holds ``..``. Where two are alike, letter case aside, the first keeps its name,
    so that names stay as places are appended; the others end in a part of their place's digest.
    None stands for a place whose name cannot be made safe: it holds control characters.

    ``dots``: without it the last part holds none, for webdataset takes what follows as the kind.
    ``nests``: without it no name lies in another, as it would in a folder of frames.
    """
    names: dict[str, str | None] = {}
    taken: set[str] = set()
    above: set[str] = set()
    for place in dict.fromkeys(places):
        if re.search(r"[\0-\x1f\x7f-\x9f]", place):
            names[place] = None
            continue
        wish = _relative(place, base)
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


def _relative(place: str, base: str) -> str:
    """-> a path without a suffix, a slash in front, or a part that is ``..``"""
    if member := TarMember.parse(place):
        inside = os.path.normpath("/" + member.name).lstrip("/")
        path = f"{_from_base(member.tar, base)[: -len('.tar')]}/{inside}"
    else:
        path = _from_base(place, base)
    return path if is_frame_folder(place) else path[: -len(suffix_of(place)) or None]


def _from_base(path: str, base: str) -> str:
    path, base = os.path.abspath(path), os.path.abspath(base)  # noqa: PTH100 - it takes out ..
    return path.removeprefix(base.rstrip("/") + "/").lstrip("/")


def _cleaned(name: str, dots: bool) -> str:
    """A name that any file system takes, each part on its own."""
    *folders, last = name.split("/")
    parts = [*folders, last if dots else last.replace(".", "_")]
    safe = [re.sub(r"[\\\ud800-\udfff]", "_", part).encode()[-LONGEST_PART:] for part in parts]
    texts = [part.decode(errors="ignore") for part in safe]
    return "/".join("_" if text in ("", ".", "..") else text for text in texts)


def _folders(name: str) -> set[str]:
    return {parent.as_posix() for parent in PurePosixPath(name).parents} - {"."}
