"""How a frame is turned and mirrored to stand upright, as its container or its EXIF data say."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av
    from PIL import Image


class Orientation(NamedTuple):
    """What is done to a frame, in this order."""

    transposed: bool = False  # rows become columns
    mirrored_x: bool = False  # left and right change places
    mirrored_y: bool = False  # top and bottom change places

    @property
    def is_mirrored(self) -> bool:
        """Whether more than turning is needed."""
        return self.transposed ^ self.mirrored_x ^ self.mirrored_y

    @property
    def degrees(self) -> int:
        """Degrees clockwise, of what is not mirrored besides."""
        quarters = (0, 2) if not self.transposed else (3, 1)
        return 90 * quarters[self.mirrored_x]

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Make a frame upright: (H, W, ...) -> (H, W, ...) or (W, H, ...), a view"""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.mirrored_y else 1, :: -1 if self.mirrored_x else 1]


def orientation_of_image(image: "Image.Image") -> Orientation:
    """Read the orientation of an image from its EXIF data; damaged data do not matter.

    Pillow's ``exif_transpose`` fails on files of which another entry is damaged.
    """
    from PIL import ExifTags

    with suppress(Exception):
        code = image.getexif()[ExifTags.Base.Orientation]
        return Orientation(code in (5, 6, 7, 8), code in (2, 3, 6, 7), code in (3, 4, 7, 8))
    return Orientation()


def orientation_of(frame: "av.VideoFrame") -> Orientation:
    """Read the display matrix of a frame; cameras of telephones note there how they were held.

    The matrix takes a column (x, y) to (a x + c y, b x + d y), here to the nearest quarter turn.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    a, b, _, c, d, *_ = np.frombuffer(memoryview(data), dtype=np.int32).tolist()  # type: ignore[arg-type]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def upright_size(frame: "av.VideoFrame") -> tuple[int, int]:
    """Return height and width of a frame, upright."""
    size = frame.height, frame.width
    return size[::-1] if orientation_of(frame).transposed else size
