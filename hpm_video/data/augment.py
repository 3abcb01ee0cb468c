"""Random changes of training clips. The parts are those of torchvision and timm.

Both draw from the global generators of a process, so each part runs with generators of its own.
They are imported when a clip is first changed: it takes seconds, and pre-training on videos needs
neither.
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
from hpm_video.data.transforms import Box, ClipTransform, DrawnCrop
from hpm_video.randomness import global_generators


@dataclass(frozen=True)
class Augmentation(ClipTransform):
    """Random changes of a clip: one draw for all its frames."""

    area: tuple[float, float]
    """Least and largest share of the frame that the box has that is cut out."""
    ratio: tuple[float, float]
    """Width / height of the box, in pixels of the frame. The box is then stretched to the size of
    the clip, whatever the shape of that."""
    flip: bool
    """Half of the clips are mirrored. Not for labels that tell left from right."""
    rand_augment: str | None
    """timm's string for RandAugment."""
    erasing: float
    """Chance that a box of the clip becomes noise."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """After normalisation with these the noise is standard normal, but for what 8 bits clip."""
    interpolation: Interpolation = "bilinear"

    def prepare(self) -> None:
        importlib.import_module("torchvision.transforms")
        if self.rand_augment is not None or self.erasing > 0:
            importlib.import_module("timm.data")

    def draw(
        self, size: tuple[int, int], frame_size: tuple[int, int], draw: np.random.Generator
    ) -> "DrawnAugmentation":
        crop_key, change_key, erase_key = (int(key) for key in draw.integers(2**63, size=3))
        mirrored = draw.random() < 0.5
        return DrawnAugmentation(
            random_box(*size, self.area, self.ratio, crop_key),
            frame_size,
            self.interpolation,
            self.flip and mirrored,
            self,
            change_key=change_key,
            erase_key=erase_key,
        )


@dataclass(frozen=True)
class DrawnAugmentation(DrawnCrop):
    """What is done to one clip, to all its frames alike."""

    how: Augmentation
    change_key: int
    erase_key: int

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Resize the box, mirror, change, erase: (T, H, W, C) uint8 -> (C, T, h, w) uint8

        RandAugment applies the same operations with the same strengths to all frames. Those that
        look at the pixels (AutoContrast, Equalize, Contrast) look at those of each frame.
        """
        how = self.how
        clip = super().__call__(pixels)
        if how.rand_augment is not None:
            change = _rand_augment(how.rand_augment, self.frame_size, how.mean)
            changed = []
            for frame in clip.permute(1, 2, 3, 0).contiguous().numpy():
                with global_generators(self.change_key):
                    changed.append(np.asarray(change(Image.fromarray(frame))))
            clip = torch.from_numpy(np.stack(changed)).permute(3, 0, 1, 2).contiguous()
        if how.erasing > 0:
            clip = _erase(clip, how.erasing, how.mean, how.std, self.erase_key)
        return clip


def random_box(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], key: int
) -> Box:
    """A box of random area, shape and place, as torchvision draws it."""
    from torchvision.transforms import RandomResizedCrop  # type: ignore[import-untyped]

    stand_in = torch.empty((1, height, width), device="meta")
    with global_generators(key):
        return Box(*RandomResizedCrop.get_params(stand_in, list(area), list(ratio)))


@lru_cache
def _rand_augment(
    config: str, frame_size: tuple[int, int], mean: tuple[float, ...]
) -> Callable[[Image.Image], Image.Image]:
    """RandAugment as timm sets it up for images of that size."""
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
    """At its full strength timm keeps no bits: black, but an error of Pillow 13."""
    return keep(image, bits, **settings) if bits > 0 else Image.new(image.mode, image.size)


def _erase(
    clip: Tensor, chance: float, mean: tuple[float, ...], std: tuple[float, ...], key: int
) -> Tensor:
    """The same box of all frames becomes noise, each pixel its own: (C, T, h, w) uint8 -> the same

    timm writes into frames that are not a number, so what is one afterwards is erased.
    """
    from timm.data.random_erasing import RandomErasing

    planes = torch.full(clip.shape, torch.nan).flatten(0, 1)
    with global_generators(key):
        erase = RandomErasing(chance, mode="pixel", device="cpu")  # type: ignore[no-untyped-call]
        erase(planes)
    erased = ~planes[0].isnan()
    noise = planes.view(clip.shape)[:, :, erased]
    pixels = 255 * (noise * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1))
    result = clip.clone()
    result[:, :, erased] = pixels.round().clamp(0, 255).to(torch.uint8)
    return result
