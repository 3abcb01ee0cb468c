"""The kind of a file by its first bytes: FFmpeg would follow a list of other files anywhere."""

import re
from collections.abc import Sequence

from hpm_video.decoding.reader import DecodeError

MP4 = "MP4 or QuickTime"
MATROSKA = "Matroska or WebM"
HEAD = 4096
"""Bytes of a file that are looked at."""

_LISTS = {
    "a playlist (HLS)": re.compile(rb"\s*#EXTM3U"),
    "a list of files to be joined": re.compile(rb"\s*(ffconcat|file\s|# ?ffconcat)"),
    "a presentation in parts (DASH, IMF, Smooth Streaming)": re.compile(
        rb"[^\0]{0,4000}<(mpd|compositionplaylist|smoothstreamingmedia)", re.IGNORECASE
    ),
    "a description of a network stream (SDP)": re.compile(rb"\s*v=0\r?\n"),
    "a playlist": re.compile(
        rb"\s*(\[playlist\]|<asx|\[reference\]|rtsptext|<\?wpl)", re.IGNORECASE
    ),
}
"""Files that name other files or addresses."""
_NOT_READ = {
    "IVF": re.compile(rb"DKIF"),
    "RealMedia": re.compile(rb"\.RMF"),
    "MXF": re.compile(rb"\x06\x0e\x2b\x34"),
    "NUT": re.compile(rb"nut/multimedia container"),
    "a raw stream of H.264": re.compile(rb"\0?\0\0\x01[\x09\x27\x67]"),
    "a raw stream of HEVC": re.compile(rb"\0?\0\0\x01[\x40\x46]\x01"),
}
"""Containers that no decoder here is asked to open."""
_CONTAINERS = {
    MP4: re.compile(rb"(\0...ftyp|....(moov|mdat|wide|free|skip|pnot))", re.DOTALL),
    MATROSKA: re.compile(rb"\x1a\x45\xdf\xa3"),
    "AVI": re.compile(rb"RIFF....AVI[ \x19]", re.DOTALL),
    "FLV": re.compile(rb"FLV\x01"),
    "ASF": re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    "Ogg": re.compile(rb"OggS"),
    "MPEG program stream": re.compile(rb"\0\0\x01[\xba\xb3]"),
    "MPEG transport stream": re.compile(rb"(\x47.{187}|\x47.{203}|.{4}\x47.{191})\x47", re.DOTALL),
    "YUV4MPEG": re.compile(rb"YUV4MPEG2 "),
    "GIF": re.compile(rb"GIF8[79]a"),
}


def refuse_others(head: bytes) -> None:
    """Raise a DecodeError for a file that names others, or whose container is not read."""
    for what, pattern in _NOT_READ.items():
        if pattern.match(head):
            command = "ffmpeg -i FILE " + ("FILE.mp4" if "raw" in what else "-c copy FILE.mkv")
            raise DecodeError(
                f"it is {what}, which is not read. Put its frames into a container: {command}"
            )
    for what, pattern in _LISTS.items():
        if pattern.match(head):
            raise DecodeError(
                f"it is {what}, which names other files or addresses: only files that hold their "
                "frames themselves are read. Save the video that it stands for"
            )


def exact_container(head: bytes, decoder: str, exact_on: Sequence[str]) -> str:
    """Return the container that a file is by its first bytes, if ``decoder`` is exact on it.

    Otherwise it is a DecodeError: the FFmpeg of such a decoder cannot be restricted to formats.
    """
    refuse_others(head)
    name = next((name for name, pattern in _CONTAINERS.items() if pattern.match(head)), None)
    if name is None:
        raise DecodeError(
            f"its first bytes are those of no known container ({', '.join(_CONTAINERS)}): it is "
            "damaged, or no video. Download it again"
        )
    if name not in exact_on:
        raise DecodeError(
            f"{decoder} is not known to be exact on this container, {name}, only on "
            f"{', '.join(exact_on)}; PyAV is"
        )
    return name
