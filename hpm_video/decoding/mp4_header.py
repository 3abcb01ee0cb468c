"""Whether the header of an MP4 or QuickTime file leaves out frames, of which decord takes no note.

A header that is damaged or of another kind says nothing. Files in fragments say it elsewhere.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_LARGEST = 2**26
"""Bytes of a header: a larger one is not read."""
_MOST_BOXES = 10_000
"""Entries in one box: more would be an attack."""
_MOST_SAMPLES = 2**22
"""Frames of a track: as many last for 38 hours."""

Boxes = dict[bytes, memoryview]
"""What lies in a box, by its kind: of several of a kind, the last."""


def is_trimmed(source: str | bytes) -> bool:
    """Whether an edit list leaves out frames of a video track, as far as it can be read."""
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        header = memoryview(_find_header(file))
    with suppress(struct.error, LookupError, ValueError, ArithmeticError):  # it is damaged
        parts = [*_boxes(header)]
        for kind, content in parts:
            if kind == b"trak":
                track = dict(_boxes(content))
                media = dict(_boxes(track[b"mdia"]))
                if bytes(media[b"hdlr"][8:12]) == b"vide" and b"edts" in track:
                    edits = dict(_boxes(track[b"edts"]))[b"elst"]
                    if _leaves_out(edits, media, dict(parts)):
                        return True
    return False


def _find_header(file: BinaryIO) -> bytes:
    """The content of the box of the movie; none where there is no such box."""
    size_of_file = file.seek(0, 2)
    place = 0
    for _ in range(_MOST_BOXES):
        if place + 8 > size_of_file:
            break
        file.seek(place)
        start = file.read(16)
        size, kind = struct.unpack(">I4s", start[:8])
        length = 8
        if size == 1 and len(start) == 16:
            size, length = int.from_bytes(start[8:], "big"), 16
        elif size == 0:
            size = size_of_file - place
        if size < length:
            break
        if kind == b"moov":
            file.seek(place + length)
            return file.read(size - length) if size < _LARGEST else b""
        place += size
    return b""


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """What lies in a box: kind and content of each."""
    place = 0
    for _ in range(_MOST_BOXES):
        if place + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, place)
        if size < 8 or place + size > len(data):
            raise ValueError("a box does not end where the one around it does")
        yield kind, data[place + 8 : place + size]
        place += size
    raise ValueError("more boxes than are believed")


def _leaves_out(edits: memoryview, media: Boxes, movie: Boxes) -> bool:
    """Whether an edit list leaves out samples of a track; ``media``: its boxes."""
    layout, size = (">Qq", 20) if edits[0] else (">Ii", 12)
    (count,) = struct.unpack_from(">I", edits, 4)
    shown = [struct.unpack_from(layout, edits, 8 + size * i) for i in range(count)]
    shown = [(duration, start) for duration, start in shown if start >= 0]  # others are pauses
    if len(shown) != 1:
        return len(shown) > 1
    tables = dict(_boxes(dict(_boxes(media[b"minf"]))[b"stbl"]))
    steps = _runs(tables[b"stts"])
    durations = np.repeat(steps[:, 1], steps[:, 0])
    times = np.cumsum(durations) - durations
    if b"ctts" in tables:  # from decoding to presentation, shifted as by FFmpeg: never negative
        delays = _runs(tables[b"ctts"])
        times += np.repeat(delays[:, 1], delays[:, 0]) - min(0, delays[:-2, 1].min(initial=0))
    duration, start = shown[0]
    end = start + -(-duration * _timescale(media[b"mdhd"]) // _timescale(movie[b"mvhd"]))
    return bool(times.min() < start or (duration and times.max() >= end))


def _timescale(content: memoryview) -> int:
    value: int = struct.unpack_from(">I", content, 20 if content[0] else 12)[0]
    return value


def _runs(table: memoryview) -> NDArray[np.int64]:
    """How often, and what: (n, 2)"""
    (count,) = struct.unpack_from(">I", table, 4)
    runs = np.frombuffer(table, ">i4", 2 * count, 8).reshape(count, 2).astype(np.int64)
    if runs[:, 0].min(initial=0) < 0 or runs[:, 0].sum() > _MOST_SAMPLES:
        raise ValueError("more samples than are believed")
    return runs
