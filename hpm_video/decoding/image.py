"""Images, each a video of one frame, and folders of frames: with Pillow, JPEGs by libjpeg-turbo."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from hpm_video.decoding.locations import frames_in, read_bytes
from hpm_video.decoding.orientation import orientation_of_image
from hpm_video.decoding.reader import DecodeError, Frames, VideoReader

if TYPE_CHECKING:
    from PIL import Image

_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What an image may hold, whatever its suffix: Pillow would also start programs, as for EPS."""


class ImageReader(VideoReader):
    """The one frame of an image."""

    def __init__(self, path: str, data: bytes, *, of_video: bool = False) -> None:
        """``of_video``: it is one of many, and torchvision decodes a JPEG to the same pixels.

        That takes half the time, but its libjpeg prints a line about each that is damaged.
        """
        super().__init__(path)
        self._frames: Frames | None = None
        self._data = data if of_video else b""
        with _pillow():
            self.image = _open_image(data)
            count = 1 if self.image.format == "MPO" else getattr(self.image, "n_frames", 1)
        if count != 1:
            raise DecodeError(
                f"it holds {count} pictures, and nothing says which is meant. Save one of them as "
                "an image, or all of them as a video"
            )

    def _count(self) -> int:
        return 1

    def _decode(self, indices: list[int]) -> Frames:  # noqa: ARG002 - it is one
        if self._frames is None:
            with _pillow():
                pixels = self._pixels()
                upright = orientation_of_image(self.image).apply(pixels)
                self._frames = np.ascontiguousarray(upright)[None]
        return self._frames

    def _pixels(self) -> Frames:
        """-> (H, W, 3)"""
        is_plain = self.image.format == "JPEG" and self.image.mode in ("RGB", "L")
        # Where steps of a progressive one are missing, each version of libjpeg smooths otherwise.
        if self._data and is_plain and "progressive" not in self.image.info:
            import torch
            from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]

            with contextlib.suppress(RuntimeError):  # Pillow says what is wrong with it
                data = torch.frombuffer(self._data, dtype=torch.uint8)
                pixels: Any = decode_jpeg(data, ImageReadMode.RGB)
                return np.asarray(pixels.permute(1, 2, 0))
        self.image.load()
        return _rgb(self.image)

    def close(self) -> None:
        self.image.close()


class FrameFolder(VideoReader):
    """The images of a folder as the frames of a video."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._files = frames_in(path)
        if not self._files:
            raise DecodeError("there are no images in the folder")

    def _count(self) -> int:
        return len(self._files)

    def _decode(self, indices: list[int]) -> Frames:
        return self._stacked(map(self._frame_at, indices))

    def _frame_at(self, index: int) -> Frames:
        file = self._files[index]
        try:
            with ImageReader(str(file), read_bytes(str(file)), of_video=True) as image:
                picture: Frames = image.read([0])[0]
                return picture
        except DecodeError as error:
            raise DecodeError(f"{file.name}: {error.reason}") from error.__cause__

    def close(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def _pillow() -> Iterator[None]:
    """Silence Pillow's warnings (damaged metadata, large pictures), and make its errors plain."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise DecodeError(f"it has too many pixels: {error}. Shrink it") from error
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        if "not available" in str(error):  # a codec that this Pillow was built without
            raise
        raise DecodeError(f"it is cut off or damaged: {error}; download it again") from error


def _open_image(data: bytes) -> "Image.Image":
    """Open an image, of which all must be there as far as its format tells that."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise DecodeError(
            f"it is no image of the formats {', '.join(_IMAGE_FORMATS)}, or it is cut off or "
            "damaged; download it again"
        ) from error
    if image.format in ("JPEG", "MPO") and not _has_end(data):
        raise DecodeError(
            "it is cut off: the mark of its end is missing. Download it again, or save it again"
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


def _rgb(image: "Image.Image") -> Frames:
    if image.mode[0] not in "IF":
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    # 16 bits, which Pillow would cut off at 255 instead of scaling them.
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise DecodeError(
            f"its values are {grey.dtype} from {grey.min():g} to {grey.max():g}, and nothing says "
            "which is white. Save it with 8 or 16 bits"
        )
    grey = grey.astype(np.int64)
    return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=-1)
