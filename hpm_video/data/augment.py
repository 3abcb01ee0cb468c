"""Random changes of training clips. The parts are those of torchvision and timm.

Both draw from the global generators of a process, so each part runs with generators of its own.
They are imported late: it takes seconds, and pre-training on videos needs neither.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hpm_video.config.choices import Interpolation
from hpm_video.data.transforms import Box, Change, ClipTransform, resize
from hpm_video.randomness import global_generators


@dataclass(frozen=True)
class Augmentation(ClipTransform):
    """Random changes of a clip: one draw for all its frames."""

    area: tuple[float, float]
    """Least and largest area of the box that is cut out, as shares of that of the frame."""
    ratio: tuple[float, float]
    """Least and largest width / height of the box, which is then stretched to the clip's size."""
    flip: bool
    """Whether half of the clips are mirrored. Not for labels that tell left from right."""
    rand_augment: str | None  # timm's string for RandAugment
    erasing: float  # chance that a box of the clip becomes noise
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """After normalisation with these the noise is standard normal, where 8 bits hold it."""
    interpolation: Interpolation = "bilinear"

    def prepare(self) -> None:
        importlib.import_module("torchvision.transforms")
        if self.rand_augment is not None or self.erasing > 0:
            importlib.import_module("timm.data")

    def draw(
        self, size: tuple[int, int], frame_size: tuple[int, int], draw: np.random.Generator
    ) -> tuple[Box, Change]:
        crop_key, change_key, erase_key = (int(key) for key in draw.integers(2**63, size=3))
        mirrored = draw.random() < 0.5 and self.flip
        box = random_box(*size, self.area, self.ratio, crop_key)
        change = partial(self._change, frame_size=frame_size, mirrored=mirrored)
        return box, partial(change, change_key=change_key, erase_key=erase_key)

    def _change(
        self,
        pixels: NDArray[np.uint8],
        *,
        frame_size: tuple[int, int],
        mirrored: bool,
        change_key: int,
        erase_key: int,
    ) -> Tensor:
        """Resize, mirror, change, erase, with the same operations and strengths for all frames."""
        clip = resize(pixels, frame_size, self.interpolation, mirrored=mirrored)
        if self.rand_augment is not None:
            change = _rand_augment(self.rand_augment, frame_size, self.mean)
            changed = []
            for frame in clip.permute(1, 2, 3, 0).contiguous().numpy():
                with global_generators(change_key):
                    changed.append(np.asarray(change(Image.fromarray(frame))))
            clip = torch.from_numpy(np.stack(changed)).permute(3, 0, 1, 2).contiguous()
        return self._erased(clip, erase_key) if self.erasing > 0 else clip

    def _erased(self, clip: Tensor, key: int) -> Tensor:
        """Fill the same box of all frames with noise, each pixel its own; shape and type stay.

        timm writes into frames that are not a number, so what is one afterwards is erased.
        """
        from timm.data.random_erasing import RandomErasing

        planes = torch.full(clip.shape, torch.nan).flatten(0, 1)
        with global_generators(key):
            RandomErasing(self.erasing, mode="pixel", device="cpu")(planes)  # type: ignore[no-untyped-call]
        erased = ~planes[0].isnan()
        noise = planes.view(clip.shape)[:, :, erased]
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        result = clip.clone()
        result[:, :, erased] = (255 * (noise * std + mean)).round().clamp(0, 255).to(torch.uint8)
        return result


def random_box(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], key: int
) -> Box:
    """Draw a box of random area, shape and place, as torchvision does."""
    from torchvision.transforms import RandomResizedCrop  # type: ignore[import-untyped]

    stand_in = torch.empty((1, height, width), device="meta")
    with global_generators(key):
        return Box(*RandomResizedCrop.get_params(stand_in, list(area), list(ratio)))


@lru_cache
def _rand_augment(
    config: str, frame_size: tuple[int, int], mean: tuple[float, ...]
) -> Callable[[Image.Image], Image.Image]:
    """Make RandAugment as timm sets it up for images of that size."""
    from timm.data.auto_augment import rand_augment_transform

    settings = {
        "translate_const": int(min(frame_size) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    rand_augment = rand_augment_transform(config, settings)
    for operation in rand_augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterize, operation.aug_fn)
    transform: Callable[[Image.Image], Image.Image] = rand_augment
    return transform


def _posterize(
    keep: Callable[..., Image.Image], image: Image.Image, bits: int, **settings: object
) -> Image.Image:
    """Keep bits of each value. At full strength timm keeps none, which Pillow 13 refuses."""
    return keep(image, bits, **settings) if bits > 0 else Image.new(image.mode, image.size)
