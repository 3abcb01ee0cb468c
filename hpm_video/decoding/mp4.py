"""The index of an H.264 video in an MP4 file, which spares a pass over the file.

FFmpeg gives the times of decoding. What leads from these to those of presentation is read here.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_LARGEST = 2**26  # bytes of an index


class Listing(NamedTuple):
    """What an MP4 file says about the samples of its only H.264 track."""

    runs: NDArray[np.uint32]  # (K, 2) so many samples, and what is added to their times of decoding
    file_bytes: int

    def packets(self, entries: Sequence[Any]) -> list[tuple[int, int, bool]]:
        """Return the times of presentation and decoding of FFmpeg's entries, and which are keys.

        Empty where times are not certain, such as after edits, or packets are not in the file.
        """
        ends = [entry.pos + entry.size for entry in entries]
        is_plain = all(entry.size > 0 and not entry.is_discard for entry in entries)
        if (
            not is_plain
            or self.runs[:, 0].sum() != len(entries)
            or max(ends, default=0) > self.file_bytes
        ):
            return []
        offsets = np.repeat(self.runs[:, 1], self.runs[:, 0]).tolist()
        return [
            (entry.timestamp + offset, entry.timestamp, entry.is_keyframe)
            for entry, offset in zip(entries, offsets, strict=True)
        ]


def read_listing(source: str | bytes) -> Listing | None:
    """Read the index of a path or of bytes; none where it is no plain one."""
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if file.read(8)[4:] != b"ftyp":
            return None
        moov = _moov(file)
        size = file.seek(0, io.SEEK_END)
    tables = [*_boxes(moov, "trak", "mdia", "minf", "stbl")]
    tables = [table for table in tables if [d[12:16] for d in _boxes(table, "stsd")] == [b"avc1"]]
    offsets = [*_boxes(tables[0], "ctts")] if len(tables) == 1 else []
    if len(offsets) != 1 or (len(offsets[0]) - 8) % 8:
        return None
    count = int.from_bytes(offsets[0][4:8], "big")
    runs = np.frombuffer(offsets[0], ">u4", offset=8).reshape(-1, 2)[:count]
    return None if runs.max(initial=0) >= 2**31 else Listing(runs, size)  # below zero


def _moov(file: io.BufferedIOBase) -> bytes:
    at = 0
    while file.seek(at) == at and len(header := file.read(16)) == 16:
        size, name, large = struct.unpack(">I4sQ", header)
        size = large if size == 1 else size
        if name == b"moov" and size < _LARGEST:
            return header[8:] + file.read(max(size - 16, 0))
        if size < 8:
            break
        at += size
    return b""


def _boxes(data: bytes, name: str, *inner: str) -> Iterator[bytes]:
    """Yield the contents of the boxes of a name, or of those of names inside."""
    at = 0
    while at + 8 <= len(data) and (size := int.from_bytes(data[at : at + 4], "big")) >= 8:
        if data[at + 4 : at + 8] == name.encode():
            content = data[at + 8 : at + size]
            yield from _boxes(content, *inner) if inner else (content,)
        at += size
