"""Which files decoders other than PyAV may read: those of which they return the right frames."""

import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpm_video.decoding.orientation import orientation_of
from hpm_video.decoding.pyav import PyavReader, open_container
from hpm_video.decoding.reader import TRANSCODE, DecodeError, VideoReader

_LIST = re.compile(rb"[^\0]*<(mpd|compositionplaylist|smoothstreamingmedia)", re.IGNORECASE)
"""How a file begins that FFmpeg may take for a list of others, though it looks like a video."""


class CheckedReader(VideoReader):
    """A video that another library decodes, as :func:`check_exact` allows; PyAV has its times."""

    def __init__(self, path: str, source: str | bytes) -> None:
        super().__init__(path)
        self._source = source

    def seconds(self, count: int) -> NDArray[np.float64]:
        with PyavReader(self.path, self._source) as reader:
            return reader.seconds(count)


def check_exact(
    source: str | bytes, library: str, formats: Collection[str], *, shows_all: bool
) -> None:
    """Raise a DecodeError unless a library is known to return the right frames of a video.

    The FFmpeg of other libraries cannot be kept from opening further files, as PyAV's can, so PyAV
    says what the file is.

    Args:
        source: the path of the video, or its bytes.
        library: its name.
        formats: FFmpeg's names of the containers on which it was found exact.
        shows_all: it reads the first stream, and also the frames that are not to be shown.
    """
    container, stream = open_container(source)
    with container:
        name = container.format.name.partition(",")[0]
        if isinstance(source, str):
            with Path(source).open("rb") as file:
                source = file.read(4096)
        if name not in formats or _LIST.match(source[:4096]):
            raise DecodeError(
                f"{library} is not known to be exact on this container, {name}, only on "
                f"{', '.join(formats)}; use PyAV"
            )
        why = ""
        if shows_all:
            tracks = container.streams.video
            entries = [*stream.index_entries] if name == "mov" else []
            if stream is not tracks[0]:
                why = f"it has {len(tracks)} video streams, and the one to read is not the first"
            elif any(entry.is_discard for entry in entries) or (
                name == "mov" and len(entries) < stream.frames
            ):
                why = "its container says that some frames are not to be shown"
        frames = islice(container.decode(stream), 1)
        if not why and any(orientation_of(frame).is_mirrored for frame in frames):
            why = "it is mirrored"
    if why:
        raise DecodeError(f"{why}, which {library} gets wrong and PyAV does not. {TRANSCODE}")
