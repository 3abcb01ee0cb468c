"""Places of videos, as manifests spell them, and reading members of tar files.

A place is one string, of which there are three kinds:

- the path of a video file or of an image: ``/data/a.mp4``;
- a folder of frames: a path that ends in a slash, ``/data/a/``. Its images in the natural order
  of their names are the frames;
- a member of a tar file, such as a shard in the layout of webdataset: the path of the tar, the name
  of the member, and how many bytes lie before it and in it:
  ``/data/shard.tar::class/a.mp4@1536+20480``.

A section of a video is its place and then the seconds from which and up to which it goes, either
of which may be missing: ``/data/a.mp4#t=5,12.5``, as in web addresses.
"""

import math
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE, HeaderError, TarInfo
from typing import BinaryIO

from typing_extensions import Self

from hpm_video.decoding.reader import DecodeError

_VIDEOS = "3gp avi flv m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv"
_IMAGES = "bmp jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
VIDEO_SUFFIXES = tuple(f".{name}" for name in _VIDEOS.split())
IMAGE_SUFFIXES = tuple(f".{name}" for name in _IMAGES.split())

_MEMBER = re.compile(
    r"(?P<tar>.+?\.tar)::(?P<name>.+)@(?P<offset>[0-9]{1,18})\+(?P<size>[0-9]{1,18})",
    re.DOTALL | re.IGNORECASE,
)
_SECONDS = r"\d+(?:\.\d+)?"
_SECTION = re.compile(
    rf"(?P<file>.+)(?P<mark>#t=(?=[\d,])(?P<start>{_SECONDS})?(?:,(?P<end>{_SECONDS}))?)",
    re.DOTALL | re.ASCII,
)


@dataclass(frozen=True)
class TarMember:
    """A file within a tar file."""

    tar: str  # its path
    name: str  # of the member, of any characters
    offset: int  # bytes of the tar in front of the member's own
    size: int  # the member's own bytes

    @classmethod
    def parse(cls, place: str) -> Self | None:
        """Return the member that a place names; none if it is a place of another kind."""
        if not (match := _MEMBER.fullmatch(place)):
            return None
        return cls(match["tar"], match["name"], int(match["offset"]), int(match["size"]))

    def __str__(self) -> str:
        return f"{self.tar}::{self.name}@{self.offset}+{self.size}"

    def read(self) -> bytes:
        """Read its bytes. Raises as :func:`read_bytes`, also if they do not lie there any more."""
        with _opened(self.tar) as file:
            is_inside = BLOCKSIZE <= self.offset <= file.seek(0, 2) - self.size
            file.seek(max(self.offset - BLOCKSIZE, 0))
            if not is_inside or not self._begins_after(file.read(BLOCKSIZE)):
                raise DecodeError(
                    "that file does not lie there: the tar file has changed since its manifest was "
                    "written. Write the manifest anew",
                    str(self),
                )
            return file.read(self.size)

    def _begins_after(self, header: bytes) -> bool:
        """Whether a block of the tar is the header of this member, as far as one block tells."""
        with suppress(HeaderError):
            info = TarInfo.frombuf(header, "utf-8", "surrogateescape")
            # Longer and other names continue in blocks in front of it.
            is_plain = self.name.isascii() and len(self.name) <= 100
            is_it = info.name == self.name or not is_plain
            return is_it and info.isreg() and info.size == self.size
        return False


@dataclass(frozen=True)
class Section:
    """A place, and which part of the video there is meant."""

    file: str
    mark: str = ""  # what follows the file in the place of a section, nothing where it is all of it
    start: float = 0.0  # in seconds from the first frame on
    end: float = math.inf  # without the frame that is shown then

    @classmethod
    def parse(cls, place: str) -> Self:
        """Read a place of any kind."""
        if "#t=" not in place or not (match := _SECTION.fullmatch(place)):
            return cls(place)
        start, end = float(match["start"] or 0), float(match["end"] or math.inf)
        return cls(match["file"], match["mark"], start, end)


def read_bytes(place: str, count: int = -1) -> bytes:
    """Read the first bytes of a file or of a member of a tar, by default all.

    Raises DecodeError if there are none, FileNotFoundError if there is no such file.
    """
    if member := TarMember.parse(place):
        data = member.read()
    else:
        with _opened(place) as file:
            data = file.read(count)
    if not data:
        raise DecodeError("the file is empty", place)
    return data


def source_of(place: str) -> str | bytes:
    """Return what decoders open: the path of a file, or the bytes of a member of a tar.

    Raises as :func:`read_bytes`.
    """
    if TarMember.parse(place):
        return read_bytes(place)
    read_bytes(place, 1)
    return os.path.abspath(place)  # noqa: PTH100


def _opened(path: str) -> BinaryIO:
    kind = os.stat(path).st_mode  # noqa: PTH116 - a path is a string in here
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # to open a pipe may take for ever
        raise DecodeError("it is no file, but a pipe, a socket or a device", path)
    return open(path, "rb")  # noqa: PTH123, SIM115 - the caller closes it


def base_name(place: str) -> str:
    """Return the last part of a place's path, for a member of a tar that of its name in there.

    A section keeps its seconds.
    """
    section = Section.parse(place)
    member = TarMember.parse(section.file)
    path = member.name if member else section.file
    return path.rstrip("/").rpartition("/")[2] + section.mark


def is_frame_folder(place: str) -> bool:
    """Whether a place is a folder of frames: it ends in a slash."""
    return place.endswith("/")


def is_image(place: str) -> bool:
    """Whether a place is read as an image, a video of one frame: its suffix says so."""
    return not is_frame_folder(place) and base_name(place).lower().endswith(IMAGE_SUFFIXES)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key to sort names by that takes digits as numbers: ``img_2`` before ``img_10``."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


def frames_in(folder: str) -> list[Path]:
    """Return the images of a folder of frames in their order, without hidden ones."""
    names = (entry.name for entry in Path(folder).iterdir())
    shown = [name for name in names if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)]
    return [Path(folder, name) for name in sorted(shown, key=natural_order)]
