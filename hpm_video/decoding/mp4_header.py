"""The tables of a track of an MP4 or QuickTime file, which FFmpeg passes on packet by packet."""

import io
import struct
from collections.abc import Iterator
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
_DAMAGED = (struct.error, LookupError, ValueError, ArithmeticError)
"""What reading a header raises that is not as it should be."""

Boxes = dict[bytes, memoryview]
"""What lies in a box, by its kind: of several of a kind, the last."""


def open_source(source: str | bytes) -> BinaryIO:
    """A path, or the bytes of a file, as a file."""
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def read_delays(source: str | bytes, track_id: int) -> NDArray[np.int64] | None:
    """From the time of decoding to that of presentation, of each sample of a track: -> (n,)

    None where the header is of another kind, or damaged. Files in fragments say it elsewhere.
    """
    with open_source(source) as file:
        header = _find_header(file)
    try:
        for movie, track in _tracks(header or b""):
            place = 20 if track[b"tkhd"][0] else 12
            of_id = struct.unpack_from(">I", track[b"tkhd"], place)[0] == track_id
            if of_id and b"mvex" not in movie:
                return _delays(_tables(track))
    except _DAMAGED:
        pass
    return None


def is_trimmed(source: str | bytes) -> bool:
    """Whether an edit list leaves out frames of a video track, as far as it can be read."""
    with open_source(source) as file:
        header = _find_header(file)
    try:
        return header is not None and any(
            _leaves_out(movie, track)
            for movie, track in _tracks(header)
            if bytes(dict(_boxes(track[b"mdia"]))[b"hdlr"][8:12]) == b"vide"
        )
    except _DAMAGED:
        return False


def _find_header(file: BinaryIO) -> bytes | None:
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
            return None
        if kind == b"moov":
            file.seek(place + length)
            return file.read(size - length) if size < _LARGEST else None
        place += size
    return None


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


def _tracks(header: bytes) -> Iterator[tuple[Boxes, Boxes]]:
    """The movie, each time, and each of its tracks."""
    parts = [*_boxes(memoryview(header))]
    for kind, content in parts:
        if kind == b"trak":
            yield dict(parts), dict(_boxes(content))


def _tables(track: Boxes) -> Boxes:
    """The tables of the samples of a track."""
    media = dict(_boxes(track[b"mdia"]))
    return dict(_boxes(dict(_boxes(media[b"minf"]))[b"stbl"]))


def _leaves_out(movie: Boxes, track: Boxes) -> bool:
    if b"edts" not in track:
        return False
    edits = dict(_boxes(track[b"edts"]))[b"elst"]
    long = edits[0] != 0
    (count,) = struct.unpack_from(">I", edits, 4)
    shown = [
        struct.unpack_from(">Qq" if long else ">Ii", edits, 8 + (20 if long else 12) * i)
        for i in range(count)
    ]
    shown = [(duration, start) for duration, start in shown if start >= 0]  # others are pauses
    if len(shown) != 1:
        return len(shown) > 1
    tables = _tables(track)
    steps = _runs(tables[b"stts"])
    durations = np.repeat(steps[:, 1], steps[:, 0])
    times = np.cumsum(durations) - durations + _delays(tables)
    duration, start = shown[0]
    header = dict(_boxes(track[b"mdia"]))[b"mdhd"]
    end = start + -(-duration * _timescale(header) // _timescale(movie[b"mvhd"]))
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


def _delays(tables: Boxes) -> NDArray[np.int64]:
    """Shift offsets as FFmpeg does, until none is negative, whatever the last two are."""
    sizes = tables[b"stsz"] if b"stsz" in tables else tables[b"stz2"]
    (num_samples,) = struct.unpack_from(">I", sizes, 8)
    if num_samples > _MOST_SAMPLES:
        raise ValueError("more samples than are believed")
    delays = np.zeros(num_samples, np.int64)
    if b"ctts" in tables:
        runs = _runs(tables[b"ctts"])
        if runs[:, 0].sum() != num_samples:
            raise ValueError("not as many delays as samples")
        delays = np.repeat(runs[:, 1], runs[:, 0]) - min(0, runs[:-2, 1].min(initial=0))
    return delays
