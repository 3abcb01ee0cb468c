"""Frames out of video and image files: the only place that reads them, with PyAV, decord or Pillow.

An image is a video of one frame, and needs neither PyAV nor decord.

Frame i of a video is the i-th in the order of presentation, whatever the decoder. PyAV comes
first: it is exact on every container tried, and no slower. decord (0.6.0) seeks to wrong frames
in videos with open groups of pictures (HEVC, MPEG-4 and H.264 in AVI, some MP4) and in ASF, and
loses the first group of an MPEG transport stream. So here it never seeks, which makes it exact
and slow, and it is kept away from containers that it was not tried on.
"""

import contextlib
import importlib
import io
import os
import re
import struct
import tempfile
import warnings
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch  # noqa: F401 - decord imported before torch can hang a DataLoader (decord#251)
from numpy.typing import NDArray
from typing_extensions import Self

from hpm_video.data.manifest import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import av
    from PIL import Image

Frames = NDArray[np.uint8]
"""(K, H, W, 3) uint8, RGB."""
DecoderName = Literal["pyav", "decord"]
DecoderChoice = Literal["auto", "pyav", "decord"]

_REMEDY = {
    "pyav": "install it with: pip install av",
    "decord": "install it with: pip install decord (there are wheels for Linux on x86-64 only)",
}
_DECORD_SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".webm", ".wmv")
_NO_ORDER = ("avi", "mpeg")
"""Containers whose presentation times are made up by the demuxer, or missing."""
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What an image may hold, whatever its suffix: Pillow would also start programs, as for EPS."""


class DecodeError(Exception):
    """A video or an image that cannot be decoded. The message names the file and the reason."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason, path)
        self.reason = " ".join(reason.split())
        self.path = path

    def __str__(self) -> str:
        return f"cannot decode {self.path}: {self.reason}" if self.path else self.reason


class DecoderError(RuntimeError):
    """No usable decoder. The message says what to install."""


class VideoReader(ABC):
    """An open video or image file."""

    path: str
    num_frames: int

    def read(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> Frames:
        """Frames in the order asked; each distinct one is decoded once: K indices -> (K, H, W, 3)

        Raises:
            IndexError: the video has no such frame.
            DecodeError: a frame cannot be decoded.
        """
        distinct, where = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if not len(distinct) or distinct[0] < 0 or distinct[-1] >= self.num_frames:
            raise IndexError(
                f"frame indices must lie in 0..{self.num_frames - 1} for {self.path}, got "
                f"{list(indices)}"
            )
        with _as_decode_error(self.path):
            frames = self._decode(distinct.tolist())
        return frames if np.array_equal(where, np.arange(len(frames))) else frames[where]

    @abstractmethod
    def _decode(self, indices: list[int]) -> Frames:
        """Frames of ascending indices, none twice."""

    @abstractmethod
    def close(self) -> None:
        """Free what the decoder holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_image(path: str) -> bool:
    """Whether a file is read as an image, a video of one frame: its suffix says so."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def open_video(path: str, decoder: DecoderChoice = "auto") -> VideoReader:
    """Open a video file, or an image, for which ``decoder`` plays no part.

    An image comes as 8-bit RGB, turned upright as its EXIF data say. Grey of 16 bits is scaled,
    transparency dropped (a pixel has the colour that is stored with it), colour profiles are not
    applied. Of a telephone's several pictures in one file (MPO) it is the first. Animations and
    files of several pages are refused, and so are pixels in floating point.

    Raises:
        DecodeError: it is missing, empty, of another kind or broken.
        DecoderError: the decoder of a video is not there.
    """
    reader = _ImageReader if is_image(path) else _READERS[choose_decoder(decoder)]
    with _as_decode_error(path):
        if os.stat(path).st_size == 0:  # noqa: PTH116 - a path is a string in here
            raise DecodeError("the file is empty", path)
        if reader is _DecordReader and not path.lower().endswith(_DECORD_SUFFIXES):
            raise DecodeError(
                "decord is not known to be exact on this container, only on "
                f"{' '.join(_DECORD_SUFFIXES)}; PyAV is",
                path,
            )
        return reader(path)


def available_decoders() -> tuple[DecoderName, ...]:
    """The decoders that import and decode, the preferred one first."""
    return tuple(name for name in _READERS if not _what_is_wrong(name))


def choose_decoder(decoder: DecoderChoice) -> DecoderName:
    """The decoder of that name, or for ``auto`` the best there is.

    Raises:
        DecoderError: it is not there.
    """
    names: list[DecoderName] = [*_READERS] if decoder == "auto" else [decoder]
    wrong = {name: _what_is_wrong(name) for name in names}
    for name, reason in wrong.items():
        if not reason:
            return name
    raise DecoderError(
        f"no decoder for videos (data.decoder: {decoder}). "
        + " ".join(f"{name} cannot be used: {why}; {_REMEDY[name]}." for name, why in wrong.items())
    )


def decoder_versions() -> dict[str, str]:
    """Version of each decoder that can be used."""
    modules = {"pyav": "av", "decord": "decord"}
    return {
        name: str(importlib.import_module(modules[name]).__version__)
        for name in available_decoders()
    }


@contextlib.contextmanager
def _as_decode_error(path: str) -> Iterator[None]:
    try:
        yield
    except DecodeError as error:
        raise DecodeError(error.reason, path) from error.__cause__
    except FileNotFoundError as error:
        raise DecodeError("there is no such file", path) from error
    except Exception as error:  # noqa: BLE001 - native libraries raise anything
        raise DecodeError(f"{type(error).__name__}: {error}"[:500], path) from error


@cache
def _what_is_wrong(name: DecoderName) -> str:
    """Why a decoder cannot be used here, nothing where it can: two grey frames are tried."""
    luma = (60, 190)
    frames = [b"FRAME\n" + bytes([y]) * 64 * 64 + bytes([128]) * 2 * 32 * 32 for y in luma]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grey.y4m"
        path.write_bytes(b"YUV4MPEG2 W64 H64 F25:1 Ip C420jpeg\n" + b"".join(frames))
        try:
            with _READERS[name](str(path)) as reader:
                grey = reader.read([0, 1]).mean(axis=(1, 2, 3))
        except Exception as error:  # noqa: BLE001 - a broken installation raises anything
            return f"{type(error).__name__}: {error}"
    dark, bright = grey
    return "" if dark < 80 < 170 < bright else "it decodes a test video to wrong pixels"


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    is_key: bool


class _PyavReader(VideoReader):
    """Seeks to the key frame before the first frame that is wanted, and decodes from there on."""

    def __init__(self, path: str) -> None:
        from av.video.reformatter import VideoReformatter

        self.path = path
        # One for all frames: making one takes longer than converting a small frame.
        self._reformatter = VideoReformatter()
        self._open()
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        import av

        self._container = av.open(self.path, metadata_errors="ignore")
        if not self._container.streams.video:
            self._container.close()
            raise DecodeError("it has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # the loader's workers take the cores

    def _index(self) -> None:
        packets = [
            _Packet(packet.pts, packet.dts, packet.is_keyframe)
            for packet in self._container.demux(self._stream)
            if packet.size and not packet.is_discard
        ]
        times = {packet.pts for packet in packets if packet.pts is not None}
        self._ordered = len(times) == len(packets) and self._container.format.name not in _NO_ORDER
        self._times = sorted(times)
        self._keys = sorted(
            (packet for packet in packets if packet.is_key), key=lambda key: key.pts or 0
        )
        self.num_frames = len(packets) if self._ordered else self._count()
        if not self.num_frames:
            raise DecodeError("it has no frames")

    def _count(self) -> int:
        self._reopen()
        return sum(1 for _ in self._container.decode(self._stream))

    def _decode(self, indices: list[int]) -> Frames:
        if not self._ordered:
            self._reopen()
            return self._take(enumerate(self._container.decode(self._stream)), indices)
        parts = []
        for times in self._runs([self._times[index] for index in indices]):
            found = self._frames_from([key for key in self._keys if (key.pts or 0) <= times[0]])
            parts.append(self._take(((frame.pts, frame) for frame in found), times))
        return np.concatenate(parts)

    def _runs(self, times: list[int]) -> Iterator[list[int]]:
        """Cut ascending times where more than a whole group of pictures lies between two."""
        starts = [key.pts or 0 for key in self._keys]
        run = times[:1]
        for time in times[1:]:
            if bisect_right(starts, time) - bisect_right(starts, run[-1]) > 1:
                yield run
                run = []
            run.append(time)
        yield run

    def _frames_from(self, keys: list[_Packet]) -> Iterator["av.VideoFrame"]:
        """Frames from the last of ``keys`` on, from the first frame where that cannot be found."""
        for time in (keys[-1].pts, keys[-1].dts) if keys else ():
            # Some containers seek by the time of presentation, some by that of decoding.
            if time is None:
                continue
            self._container.seek(time, stream=self._stream, backward=True)
            first = next(self._container.demux(self._stream))
            if first.is_keyframe and first.dts is not None and first.dts <= (keys[-1].dts or 0):
                yield from first.decode()
                yield from self._container.decode(self._stream)
                return
        self._reopen()
        yield from self._container.decode(self._stream)

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _take(
        self, frames: Iterator[tuple[int | None, "av.VideoFrame"]], wanted: list[int]
    ) -> Frames:
        """The frames of which the number is wanted, in that order."""
        taken: list[Frames] = []
        for number, frame in frames:
            if number == wanted[len(taken)]:
                taken.append(self._pixels(frame))
                if len(taken) == len(wanted):
                    return np.stack(taken)
        raise DecodeError(
            f"only {len(taken)} of {len(wanted)} frames came out of the decoder. Encode the video "
            "anew, for example with ffmpeg"
        )

    def _pixels(self, frame: "av.VideoFrame") -> Frames:
        """Upright: cameras of telephones note how they were held. -> (H, W, 3)

        In one thread, since the loader's workers take the cores.
        """
        converted = self._reformatter.reformat(frame, format="rgb24", threads=1)
        pixels = converted.to_ndarray()
        return np.rot90(pixels, round(frame.rotation / 90)).astype(np.uint8, copy=False)

    def close(self) -> None:
        self._container.close()


class _DecordReader(VideoReader):
    """Decodes from the first frame on, for decord's seeks are not exact. It turns upright."""

    def __init__(self, path: str) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.path = path
        self._video = decord.VideoReader
        self._reader = self._video(path, num_threads=1)
        self.num_frames = len(self._reader)
        self._next = 0

    def _decode(self, indices: list[int]) -> Frames:
        if indices[0] < self._next:
            self._reader, self._next = self._video(self.path, num_threads=1), 0
        taken: list[Frames] = []
        for index in indices:
            while self._next <= index:
                frame = self._reader.next()
                self._next += 1
            taken.append(frame.asnumpy())
        return np.stack(taken)

    def close(self) -> None:
        self._reader = None


class _ImageReader(VideoReader):
    """The one frame of an image."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_frames = 1
        data = Path(path).read_bytes()
        with _pillow():
            self._image = _open_image(data)
            count = 1 if self._image.format == "MPO" else getattr(self._image, "n_frames", 1)
        if count != 1:
            raise DecodeError(
                f"it holds {count} pictures, an animation or several pages, and which of them is "
                "meant cannot be told. Save one of them as an image, or all of them as a video"
            )
        if self._image.mode == "F":
            raise DecodeError(
                "its pixels are floating point numbers, and nothing says which of them is white. "
                "Save it with 8 or 16 bits"
            )

    def _decode(self, indices: list[int]) -> Frames:  # noqa: ARG002 - there is one frame
        with _pillow():
            self._image.load()
            return _rgb(_upright(self._image))[None]

    def close(self) -> None:
        self._image.close()


@contextlib.contextmanager
def _pillow() -> Iterator[None]:
    """Silence where Pillow warns, of damaged metadata and of large pictures; its errors plain."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        pixels, limit, *_ = [*re.findall(r"\d+", str(error)), "too many", "limit"]
        raise DecodeError(
            f"it has {pixels} pixels, more than Pillow's limit, {limit}. Shrink it"
        ) from error
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        if "not available" in str(error):  # a codec that this Pillow was built without
            raise
        raise DecodeError(f"it is cut off or damaged: {error}; download it again") from error


def _open_image(data: bytes) -> "Image.Image":
    """An image of which all is there, as far as its format tells that."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise DecodeError(
            f"it is no image of the formats {', '.join(_IMAGE_FORMATS)}, or it is cut off or "
            "damaged; download it again, or save it in one of them"
        ) from error
    if image.format in ("JPEG", "MPO") and not _has_end(data):
        raise DecodeError(
            "it is cut off: the mark of its end is missing. Download it again or, where it looks "
            "whole, open it and save it again"
        )
    if image.format == "PNG":
        image.verify()  # the sums, at which decoding does not look; it ends with the file
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    return image


def _has_end(data: bytes) -> bool:
    """Whether the end of a JPEG lies behind the start of its pixels.

    Pillow takes zeros there for pixels. (The small picture in EXIF data has an end of its own.)
    """
    start_of_pixels, end = 0xDA, b"\xff\xd9"
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"":
        if data[place + 1] == start_of_pixels:
            return data.find(end, place) >= 0
        filling = data[place + 1] == 0xFF
        place += 1 if filling else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True  # of another structure: it is for Pillow to refuse it


def _upright(image: "Image.Image") -> "Image.Image":
    """Turned and mirrored as EXIF says, if that can be read: a damaged one is of no account.

    Not by Pillow's ``exif_transpose``, which fails on files of which another entry is damaged.
    """
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image.transpose(turns[orientation]) if orientation in turns else image


def _rgb(image: "Image.Image") -> Frames:
    """-> (H, W, 3)"""
    if not image.mode.startswith("I"):
        return np.array(image.convert("RGB"))
    # 16 bits, which Pillow would cut off at 255 instead of scaling them.
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise DecodeError(
            f"its values go from {grey.min()} to {grey.max()}, not from 0 to 65535 as those of "
            "16 bits, and nothing says which of them is white. Save it with 8 or 16 bits"
        )
    return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=-1)


_READERS: dict[DecoderName, type[_PyavReader] | type[_DecordReader]] = {
    "pyav": _PyavReader,
    "decord": _DecordReader,
}
"""The preferred one first."""
