"""Tar files in the layout of webdataset, and names of outputs.

The files of a sample follow each other in a tar and share a key, the name up to the first dot:
``class/a.cls`` (the class, if it has one), ``class/a.json`` (metadata) and
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
from typing import IO, Any

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
"""Limit of the bytes in a part of a name; file systems take 255."""
CHUNK = 2**22
"""Number of bytes to read at once."""


@dataclass(frozen=True)
class Sample:
    """A sample that is to be packed."""

    key: str
    place: str
    """Path of a file, or member of another tar."""
    suffix: str
    """Suffix of the member, such as ``.mp4``."""
    label: int
    """-1 where it has none."""
    info: Mapping[str, Any]
    """Content of the JSON file."""


@dataclass(frozen=True)
class Shard:
    """Samples of one tar file."""

    temporary: str
    """Path to write to first."""
    target: str
    samples: tuple[Sample, ...]


class Packer:
    """Work of a process that writes shards."""

    def __call__(self, shard: Shard) -> Iterator[Step | Broken | list[TarMember]]:
        """-> steps, and the member of each sample at the end"""
        return paced(self._pack(shard))

    def _pack(self, shard: Shard) -> Steps[Broken | list[TarMember]]:
        try:
            packed = yield from write_shard(Path(shard.temporary), shard.samples)
            Path(shard.temporary).replace(shard.target)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the run reports any error
            return Broken(f"{shard.target} cannot be written: {reason_of(error)}")
        finally:
            remove(shard.temporary)
        return packed


def write_shard(path: Path, samples: Sequence[Sample]) -> Steps[list[TarMember]]:
    """Write a tar file and verify it. -> the member of each sample

    Raises:
        WrongOutputError: the tar differs from what was written.
        OSError: a file cannot be read or written.
    """
    digests: dict[str, str] = {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            texts = {".cls": str(sample.label)} if sample.label >= 0 else {}
            texts[".json"] = json.dumps(dict(sample.info), sort_keys=True, ensure_ascii=True)
            for suffix, text in texts.items():
                data = text.encode()
                tar.addfile(_header(sample.key + suffix, len(data)), io.BytesIO(data))
            with open_place(sample.place) as (source, size):
                digests[sample.key + sample.suffix] = _digest(source)
                source.seek(0)
                tar.addfile(_header(sample.key + sample.suffix, size), source)
            yield Step()
    return (yield from _verify(path, digests))


def _verify(path: Path, digests: Mapping[str, str]) -> Steps[list[TarMember]]:
    found = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            data = tar.extractfile(member)
            if member.name not in digests or data is None:
                continue
            if _digest(data) != digests[member.name]:
                raise WrongOutputError(
                    f"{path}: {member.name} is not what was written: a disk error"
                )
            found[member.name] = TarMember(path.name, member.name, member.offset_data, member.size)
            yield Step()
    if found.keys() != digests.keys():
        raise WrongOutputError(
            f"{path} lacks {sorted(digests.keys() - found.keys())[:3]}: a disk error"
        )
    return [found[name] for name in digests]


def _digest(file: IO[bytes]) -> str:
    total = hashlib.sha256()
    while data := file.read(CHUNK):
        total.update(data)
    return total.hexdigest()


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Make a header without times and owners, by which equal shards would differ."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header


@contextlib.contextmanager
def open_place(place: str) -> Iterator[tuple[IO[bytes], int]]:
    """Open a place as a file. -> the file and its size"""
    if member := TarMember.parse(place):
        yield io.BytesIO(member.read()), member.size
    else:
        with Path(place).open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


def suffix_of(place: str) -> str:
    """Return the lower-case suffix of a place that is no folder of frames."""
    member = TarMember.parse(place)
    name = (member.name if member else place).lower()
    return next(end for end in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, "") if name.endswith(end))


def output_names(
    places: Sequence[str], base: str, *, dots: bool = True, nests: bool = True
) -> dict[str, str | None]:
    """Name the output of each place: a relative path without a suffix that is safe to write to.

    It is the path below ``base``, or the full path of a place elsewhere, and never contains ``..``.
    Of two names that differ in letter case at most, the first stays as it is, so that names do not
    change when places are appended; the others get a part of their place's digest. A place with
    control characters has none.

    Without ``dots`` the last part has no dot, which webdataset takes for the start of the suffix.
    Without ``nests`` no name lies below another, which may be a folder of frames.
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
    """Return a relative path without a suffix and without ``..``."""
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
    """Make each part of a name acceptable to any file system."""
    *folders, last = name.split("/")
    parts = [*folders, last if dots else last.replace(".", "_")]
    safe = [re.sub(r"[\\\ud800-\udfff]", "_", part).encode()[-LONGEST_PART:] for part in parts]
    texts = [part.decode(errors="ignore") for part in safe]
    return "/".join("_" if text in ("", ".", "..") else text for text in texts)


def _folders(name: str) -> set[str]:
    return {parent.as_posix() for parent in PurePosixPath(name).parents} - {"."}
