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
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from hpm_video.decoding.locations import IMAGE_SUFFIXES, VIDEO_SUFFIXES, TarMember, is_frame_folder
from hpm_video.preparation.jobs import Broken, Step, WrongOutputError, reason_of, remove
from hpm_video.workers.heartbeat import Beat

LONGEST_PART = 150
"""Characters of a part of a name; file systems take 255 bytes."""
CHUNK = 2**22
"""Bytes that are copied at once."""


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
        beat, packed = Beat(), None
        try:
            for packed in write_shard(Path(shard.beside), shard.samples):
                if packed is None and beat.is_due():
                    yield Step()
            Path(shard.beside).replace(shard.target)
            yield packed or []
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the run is told, whatever it is
            yield Broken(f"{shard.target} cannot be written: {reason_of(error)}")
        finally:
            remove(shard.beside)


def write_shard(path: Path, samples: Sequence[Packable]) -> Iterator[list[Packed] | None]:
    """Write a tar file and read it again.

    Yields nothing in particular now and then, and at last where each sample's bytes lie.

    Raises:
        WrongOutputError: what is read is not what was written.
        OSError: a file cannot be read or written.
    """
    sums: dict[str, str] = {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            for member, data in _small_files(sample):
                tar.addfile(_header(member, len(data)), io.BytesIO(data))
            with opened(sample.place) as (source, size):
                hashing = _Hashing(source)
                tar.addfile(_header(sample.key + sample.suffix, size), hashing)
            sums[sample.key + sample.suffix] = hashing.sum.hexdigest()
            yield None
    yield from _read_again(path, sums)


class _Hashing(io.RawIOBase):
    """A file that is summed while it is read."""

    def __init__(self, source: IO[bytes]) -> None:
        self.sum = hashlib.sha256()
        self._source = source

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.sum.update(data)
        return data


def _read_again(path: Path, sums: Mapping[str, str]) -> Iterator[list[Packed] | None]:
    found = {}
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        for member in tar:
            if member.name not in sums:
                continue
            file.seek(member.offset_data)
            total, left = hashlib.sha256(), member.size
            while left and (data := file.read(min(left, CHUNK))):
                total.update(data)
                left -= len(data)
            if left or total.hexdigest() != sums[member.name]:
                raise WrongOutputError(
                    f"{path}: {member.name} is not what was written: a disk error"
                )
            found[member.name] = Packed(member.name, member.offset_data, member.size)
            yield None
    if found.keys() != sums.keys():
        raise WrongOutputError(
            f"{path} lacks {sorted(sums.keys() - found.keys())[:3]}: a disk error"
        )
    yield [found[name] for name in sums]


def _small_files(sample: Packable) -> Iterator[tuple[str, bytes]]:
    if sample.label >= 0:
        yield f"{sample.key}.cls", str(sample.label).encode()
    text = json.dumps(dict(sample.info), sort_keys=True, ensure_ascii=True)
    yield f"{sample.key}.json", text.encode()


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = size, 0, 0o644
    header.uid = header.gid = 0
    header.uname = header.gname = ""
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
    for place in places:
        if place in names:
            continue
        if any(unicodedata.category(letter) == "Cc" for letter in place):
            names[place] = None
            continue
        wish = _relative(place, base)
        name = _cleaned(wish, dots)
        parents = _parents(name.casefold())
        clashes = name.casefold() in taken
        if not nests:
            clashes = clashes or name.casefold() in above or not taken.isdisjoint(parents)
        if clashes or name.replace(".", "_") != wish.replace(".", "_"):
            mark = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:10]
            name = name if nests else _cleaned(name.replace("/", "+"), dots)
            name = f"{name}-{mark}"
            parents = _parents(name.casefold())
        taken.add(name.casefold())
        above.update(parents)
        names[place] = name
    return names


def _relative(place: str, base: str) -> str:
    """-> a path without a suffix, a slash in front, or a part that is ``..``"""
    member = TarMember.parse(place)
    if member:
        inside = os.path.normpath("/" + member.name).lstrip("/")
        tar = _from_base(member.tar, base)[: -len(".tar")]
        return f"{tar}/{inside}"[: -len(suffix_of(place)) or None]
    path = _from_base(place, base)
    return path if is_frame_folder(place) else path[: -len(suffix_of(place)) or None]


def _from_base(path: str, base: str) -> str:
    path, base = os.path.abspath(path), os.path.abspath(base)  # noqa: PTH100 - it takes out ..
    return path.removeprefix(base.rstrip("/") + "/").lstrip("/")


def _cleaned(name: str, dots: bool) -> str:
    """A name that any file system takes, each part on its own."""
    *folders, last = name.split("/")
    if not dots:
        last = last.replace(".", "_")
    parts = [
        "".join(
            "_" if letter == "\\" or unicodedata.category(letter) == "Cs" else letter
            for letter in part
        )[-LONGEST_PART:]
        .encode()[-LONGEST_PART:]
        .decode(errors="ignore")
        for part in (*folders, last)
    ]
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


def _parents(name: str) -> set[str]:
    parts = name.split("/")
    return {"/".join(parts[:i]) for i in range(1, len(parts))}
