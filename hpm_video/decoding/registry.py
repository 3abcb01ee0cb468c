"""Frames out of videos and images: the only way to read them, with PyAV, torchcodec or decord.

An image is a video of one frame; it and folders of frames need no decoder of videos. Frame i is the
i-th in the order of presentation, whatever the decoder; docs/decoders.md says why PyAV comes first.
A file cannot make a decoder open others: what is no container of frames is refused.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from hpm_video.config.choices import DecoderChoice, DecoderName
from hpm_video.decoding.image import FrameFolder, ImageReader
from hpm_video.decoding.locations import is_frame_folder, is_image, read_bytes, source_of
from hpm_video.decoding.others import DecordReader, TorchcodecReader
from hpm_video.decoding.pyav import PyavReader
from hpm_video.decoding.reader import DecoderError, VideoReader, as_decode_error


@dataclass(frozen=True)
class Decoder:
    """What reads videos."""

    reader: Callable[[str, str | bytes], VideoReader]  # of a place, and its path or its bytes
    library: str  # the module that it needs, which tells its version
    install: str  # how to install that


DECODERS: dict[DecoderName, Decoder] = {
    "pyav": Decoder(PyavReader, "av", "pip install av"),
    "torchcodec": Decoder(
        TorchcodecReader, "torchcodec", "pip install torchcodec, and FFmpeg from the system"
    ),
    "decord": Decoder(DecordReader, "decord", "pip install decord (wheels: Linux on x86-64 only)"),
}
"""The preferred one first. An entry adds a decoder: ``data.decoder`` and ``--decoder`` know it."""


def open_video(place: str, decoder: DecoderChoice = "auto") -> VideoReader:
    """Open a video, or an image or a folder of frames, for which ``decoder`` plays no part.

    ``place`` is of any kind that :mod:`hpm_video.decoding.locations` has.

    An image comes as 8-bit RGB, turned upright as its EXIF data say, of a telephone's file of
    several pictures (MPO) the first. Grey of 16 bits is scaled, transparency dropped (a pixel has
    the colour that is stored with it), colour profiles are not applied. Animations, files of
    several pages and pixels in floating point are refused.

    Raises:
        DecodeError: it is missing, empty, of another kind or broken.
        DecoderError: the decoder of a video is not there.
    """
    is_still = is_frame_folder(place) or is_image(place)
    reader = None if is_still else DECODERS[choose_decoder(decoder)].reader
    with as_decode_error(place):
        if reader:
            return reader(place, source_of(place))
        if is_frame_folder(place):
            return FrameFolder(place)
        return ImageReader(place, read_bytes(place))


def decoder_choices() -> tuple[DecoderChoice, ...]:
    """Return what ``data.decoder`` may be."""
    return ("auto", *DECODERS)


def available_decoders() -> tuple[DecoderName, ...]:
    """Return the decoders that import and decode, the preferred one first."""
    return tuple(name for name in DECODERS if not what_is_wrong(name))


def check_name(decoder: DecoderChoice) -> None:
    """Make sure that there is such a choice; otherwise that is a DecoderError."""
    if decoder not in decoder_choices():
        raise DecoderError(
            f"data.decoder must be one of {', '.join(decoder_choices())}, got {decoder}"
        )


def choose_decoder(decoder: DecoderChoice) -> DecoderName:
    """Return the decoder of that name, or for ``auto`` the best; a DecoderError if not there."""
    check_name(decoder)
    wrong = []
    for name in [*DECODERS] if decoder == "auto" else [decoder]:
        if not (why := what_is_wrong(name)):
            return name
        wrong.append(f"{name} cannot be used: {why}; install it with: {DECODERS[name].install}.")
    raise DecoderError(f"no decoder works for videos (data.decoder={decoder}). {' '.join(wrong)}")


def decoder_versions() -> dict[str, str]:
    """Return the version of each decoder that can be used."""
    return {
        name: str(importlib.import_module(DECODERS[name].library).__version__)
        for name in available_decoders()
    }


@cache
def what_is_wrong(name: DecoderName) -> str:
    """Why a decoder cannot be used here, nothing where it can: two grey frames are tried."""
    luma = (60, 190)
    frames = [b"FRAME\n" + bytes([y]) * 64 * 64 + bytes([128]) * 2 * 32 * 32 for y in luma]
    data = b"YUV4MPEG2 W64 H64 F25:1 Ip C420jpeg\n" + b"".join(frames)
    try:
        with DECODERS[name].reader("grey.y4m", data) as reader:
            colours = reader.read([0, 1])[..., :3]  # a reader may give further channels
            grey = colours.mean(axis=(1, 2, 3))
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        return f"{type(error).__name__}: {error}"
    dark, bright = grey
    return "" if dark < 80 < 170 < bright else "it decodes a test video to wrong pixels"
