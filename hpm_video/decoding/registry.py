"""Frames out of videos and images: the only way to read them, with PyAV, torchcodec or decord.

An image is a video of one frame, and needs Pillow alone; so do folders of frames.

Frame i of a video is the i-th in the order of presentation, whatever the decoder. PyAV comes
first: it is exact on every container tried. decord (0.6.0) seeks to wrong frames in many, so here
it never seeks, and torchcodec (0.17) in AVI; both are kept away from containers that they were not
tried on. docs/decoders.md has the counts of wrong frames.

A file cannot make a decoder open other files or addresses: what is no container of frames, such as
a playlist, is refused.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from hpm_video.config.choices import DecoderChoice, DecoderName
from hpm_video.decoding.decord import DecordReader
from hpm_video.decoding.image import FrameFolder, ImageReader
from hpm_video.decoding.locations import is_frame_folder, is_image, read_bytes, source_of
from hpm_video.decoding.pyav import PyavReader
from hpm_video.decoding.reader import DecoderError, VideoReader, as_decode_error
from hpm_video.decoding.torchcodec import TorchcodecReader


@dataclass(frozen=True)
class Decoder:
    """What reads videos."""

    reader: Callable[[str, str | bytes, bytes], VideoReader]
    """Opens a video: its place, its path or its bytes, and the first of them."""
    library: str
    """The module that it needs, which tells its version."""
    install: str


DECODERS: dict[DecoderName, Decoder] = {
    "pyav": Decoder(PyavReader, "av", "pip install av"),
    "torchcodec": Decoder(
        TorchcodecReader, "torchcodec", "pip install torchcodec, and FFmpeg from the system"
    ),
    "decord": Decoder(
        DecordReader, "decord", "pip install decord (there are wheels for Linux on x86-64 only)"
    ),
}
"""The preferred one first. An entry adds a decoder: ``data.decoder`` and ``--decoder`` know it."""


def open_video(place: str, decoder: DecoderChoice = "auto") -> VideoReader:
    """Open a video, or an image or a folder of frames, for which ``decoder`` plays no part.

    ``place`` is the path of a file, a folder of frames, or a member of a tar file: see
    :mod:`hpm_video.decoding.locations`.

    An image comes as 8-bit RGB, turned upright as its EXIF data say. Grey of 16 bits is scaled,
    transparency dropped (a pixel has the colour that is stored with it), colour profiles are not
    applied. Of a telephone's several pictures in one file (MPO) it is the first. Animations and
    files of several pages are refused, and so are pixels in floating point.

    Raises:
        DecodeError: it is missing, empty, of another kind or broken.
        DecoderError: the decoder of a video is not there.
    """
    if is_frame_folder(place):
        with as_decode_error(place):
            return FrameFolder(place)
    if is_image(place):
        with as_decode_error(place):
            return ImageReader(place, read_bytes(place))
    reader = DECODERS[choose_decoder(decoder)].reader
    with as_decode_error(place):
        return reader(place, *source_of(place))


def decoder_choices() -> tuple[DecoderChoice, ...]:
    """What ``data.decoder`` may be."""
    return ("auto", *DECODERS)


def available_decoders() -> tuple[DecoderName, ...]:
    """The decoders that import and decode, the preferred one first."""
    return tuple(name for name in DECODERS if not _what_is_wrong(name))


def check_name(decoder: DecoderChoice) -> None:
    """Make sure that there is such a choice.

    Raises:
        DecoderError: there is none.
    """
    if decoder not in decoder_choices():
        raise DecoderError(
            f"data.decoder must be one of {', '.join(decoder_choices())}, got {decoder}"
        )


def choose_decoder(decoder: DecoderChoice) -> DecoderName:
    """The decoder of that name, or for ``auto`` the best there is.

    Raises:
        DecoderError: it is not there.
    """
    check_name(decoder)
    names = [*DECODERS] if decoder == "auto" else [decoder]
    wrong = {}
    for name in names:
        wrong[name] = _what_is_wrong(name)
        if not wrong[name]:
            return name
    raise DecoderError(
        f"no decoder for videos (data.decoder: {decoder}). "
        + " ".join(
            f"{name} cannot be used: {why}; install it with: {DECODERS[name].install}."
            for name, why in wrong.items()
        )
    )


def decoder_versions() -> dict[str, str]:
    """Version of each decoder that can be used."""
    return {
        name: str(importlib.import_module(DECODERS[name].library).__version__)
        for name in available_decoders()
    }


@cache
def _what_is_wrong(name: DecoderName) -> str:
    """Why a decoder cannot be used here, nothing where it can: two grey frames are tried."""
    luma = (60, 190)
    frames = [b"FRAME\n" + bytes([y]) * 64 * 64 + bytes([128]) * 2 * 32 * 32 for y in luma]
    data = b"YUV4MPEG2 W64 H64 F25:1 Ip C420jpeg\n" + b"".join(frames)
    try:
        with DECODERS[name].reader("grey.y4m", data, data) as reader:
            colours = reader.read([0, 1])[..., :3]  # a reader may give further channels
            grey = colours.mean(axis=(1, 2, 3))
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        return f"{type(error).__name__}: {error}"
    dark, bright = grey
    return "" if dark < 80 < 170 < bright else "it decodes a test video to wrong pixels"
