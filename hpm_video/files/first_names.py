"""Tensors of checkpoints from before parameters had timm's names, by the names of today.

Only names tell such a file: those of today are left as they are.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from einops import rearrange
from torch import Tensor

RENAMED = (
    (r"^pixel_decoder\.", "reconstructor."),
    (r"^(reconstructor|difficulty_decoder)\.transformer\.", r"\1."),
    (r"^encoder\.(blocks|norm)\.", r"\1."),
    (r"^class_token$", "cls_token"),
    (r"^patch_embed\.(weight|bias)$", r"patch_embed.proj.\1"),
    (r"^to_decoder\.", "decoder_embed."),
    (r"^encoder_positions\.table$", "pos_embed"),
    (r"^decoder_positions\.table$", "decoder_pos_embed"),
    (r"^pooling\.norm\.(weight|bias)$", r"fc_norm.\1"),
    (r"^pooling\.norm\.", "head_norm."),
    (r"^pooling\.query$", "attn_pool.latent"),
    (r"^pooling\.", "attn_pool."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
    (r"\.attn\.q_bias$", ".attn.qkv.bias"),
)
"""Patterns of old names and their replacements, applied one after the other."""
JOINED = (".attn.k_bias", ".attn.v_bias")
"""Names of what is now a part of ``attn.qkv.bias``; VideoMAE's blocks had no bias on keys."""
TOKENS = ("cls_token", "mask_token", "attn_pool.latent")
"""Parameters that were vectors, and are (1, 1, D)."""
TABLES = ("pos_embed", "decoder_pos_embed")  # positions that were (N, D), and are (1, N, D)


class ByCurrentNames(Mapping[str, Tensor]):
    """Weights, or moments of an optimizer, each read when it is asked for."""

    def __init__(
        self,
        names: Collection[str],
        read: Callable[[str], Tensor],
        patch_size: tuple[int, int, int],
    ) -> None:
        """Take the names in a file, which may be of either kind, and how a tensor is read.

        ``patch_size``: time, height and width of a patch, which its flat weights do not tell.
        """
        self._stored = set(names)
        self._read = read
        self._patch_size = patch_size
        self._names = {current_name(name): name for name in names if not name.endswith(JOINED)}

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        """Read one: concatenated, permuted or reshaped, as its name wants it."""
        stored = self._names[name]
        value = self._read(stored)
        if stored.endswith(".q_bias"):
            keys = stored.replace("q_bias", "k_bias")
            key_bias = self._read(keys) if keys in self._stored else torch.zeros_like(value)
            return torch.cat([value, key_bias, self._read(stored.replace("q_bias", "v_bias"))])
        if name == "patch_embed.proj.weight" and value.ndim == 2:
            return self._to_convolution(value)
        if (name in TOKENS and value.ndim == 1) or (name in TABLES and value.ndim == 2):
            return value.reshape(1, -1, value.shape[-1])
        return value

    def _to_convolution(self, weight: Tensor) -> Tensor:
        """(D, P), or as it is where patches are others -> (D, C, T, H, W)"""
        time, height, width = self._patch_size
        if weight.shape[1] % math.prod(self._patch_size):
            return weight
        flat = "d (t h w c) -> d c t h w"
        return rearrange(weight, flat, t=time, h=height, w=width).contiguous()


def current_name(name: str) -> str:
    """Return today's name of what a file calls ``name``, which may be today's as well."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name
