"""Normalisation of 8-bit pixels for models, on the device where the pixels are."""

import torch
from torch import Tensor


def to_unit_range(pixels: Tensor) -> Tensor:
    """0..255 -> 0..1: (...) uint8 -> (...) float32

    Raises:
        TypeError: they are of another type, of which nothing tells the range.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(
            f"pixels must be uint8, from 0 to 255, got {pixels.dtype}; where they are numbers from "
            "0 to 1, give (255 * pixels).round().to(torch.uint8)"
        )
    return pixels.to(torch.float32) / 255


def normalise(
    pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, channel_axis: int = 1
) -> Tensor:
    """Pixels in [0, 1] less their ``mean``, divided by ``std``: (..., C, ...) uint8 -> float32

    ``mean`` and ``std`` have a value for each channel.
    """
    shape = [1] * pixels.ndim
    shape[channel_axis] = len(mean)
    centre = _on_device(mean, pixels.device).view(shape)
    return (to_unit_range(pixels) - centre) / _on_device(std, pixels.device).view(shape)


def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Fill values in on the device: copying them would make the host wait for it."""
    return torch.stack([torch.full((), value, device=device) for value in values])
