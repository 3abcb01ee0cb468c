"""Pixels normalised for models, patches of clips, and targets made of them."""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from hpm_video.tokens.grid import Size3, TokenGrid

TargetKind = Literal["raw", "joint", "per_channel"]
"""``raw`` pixels; standardised over all values of the patch at once (MAE); or over the pixels of
each channel (VideoMAE). The first two are cut from the clip as the model sees it, normalised
with mean and standard deviation of each channel; the last one from pixels in [0, 1]."""


class PatchStatistics(NamedTuple):
    """What is subtracted from a patch and what it is divided by, each broadcasting to (B, N, P)."""

    mean: Tensor
    scale: Tensor


def to_unit_range(pixels: Tensor) -> Tensor:
    """0..255 -> 0..1: (...) uint8 -> (...) float32. TypeError: of others the range is not known."""
    if pixels.dtype != torch.uint8:
        raise TypeError(
            f"pixels must be uint8, from 0 to 255, got {pixels.dtype}; where they are numbers from "
            "0 to 1, give (255 * pixels).round().to(torch.uint8)"
        )
    return pixels.to(torch.float32) / 255


def normalise(
    pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, channel_axis: int = 1
) -> Tensor:
    """Pixels in [0, 1] less the mean of a channel, by its std: (..., C, ...) uint8 -> float32"""
    shape = [1] * pixels.ndim
    shape[channel_axis] = len(mean)
    centre = _on_device(mean, pixels.device).view(shape)
    return (to_unit_range(pixels) - centre) / _on_device(std, pixels.device).view(shape)


def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Fill values in on the device: copying them would make the host wait for it."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def patchify(clips: Tensor, patch_size: Size3) -> Tensor:
    """Cut clips into patches, in grid order: (B, C, T, H, W) -> (B, N, P)

    The values of a patch run over its frames, rows, columns and, fastest, channels.
    """
    pt, ph, pw = patch_size
    layout = "b c (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw c)"
    return rearrange(clips, layout, pt=pt, ph=ph, pw=pw)


def unpatchify(patches: Tensor, patch_size: Size3, grid: TokenGrid) -> Tensor:
    """Put patches together again: (B, N, P) -> (B, C, T, H, W)"""
    pt, ph, pw = patch_size
    layout = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
    return rearrange(patches, layout, t=grid.time, h=grid.height, pt=pt, ph=ph, pw=pw)


def patch_statistics(patches: Tensor, kind: TargetKind, channels: int) -> PatchStatistics:
    """Mean and scale with which patches become targets of ``kind``: (B, N, P) -> 2 x (B, N, .)

    ``joint``: the unbiased standard deviation sqrt(var + 1e-6) of all P values, as in MAE.
    ``per_channel``: sqrt(var) + 1e-6 over the pixels of each channel, as in VideoMAE. ``raw``: 0
    and 1.
    """
    if kind == "raw":
        mean = torch.zeros_like(patches[..., :1])
        return PatchStatistics(mean, torch.ones_like(mean))
    if kind == "joint":
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return PatchStatistics(mean, (variance + 1e-6).sqrt())
    # Channel by channel, since reducing over the last axis is several times faster on a CPU.
    pixels = rearrange(patches, "b n (p c) -> b n c p", c=channels).contiguous()
    variance, mean = torch.var_mean(pixels, dim=-1)
    scale, repeats = variance.sqrt() + 1e-6, pixels.shape[-1]
    return PatchStatistics(mean.repeat(1, 1, repeats), scale.repeat(1, 1, repeats))


def standardise(patches: Tensor, kind: TargetKind, channels: int) -> Tensor:
    """Patches as targets of ``kind``: (B, N, P) -> (B, N, P)"""
    if kind == "raw":
        return patches
    mean, scale = patch_statistics(patches, kind, channels)
    return (patches - mean).div_(scale)


def patch_mean_errors(target: Tensor, channels: int) -> Tensor:
    """Error of the best constant prediction of each patch and channel: (B, N, P) -> (B, N)"""
    pixels = rearrange(target, "b n (p c) -> b n p c", c=channels)
    return pixels.var(dim=2, correction=0).mean(dim=-1)
