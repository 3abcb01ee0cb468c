"""Tensors of checkpoints from before parameters had timm's names, by the names of today.

Only names tell such a file: those of today are left as they are.
"""

import math
import re
from collections.abc import Mapping

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


def by_current_names(
    stored: Mapping[str, Tensor], patch_size: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Return weights, or moments of an optimizer, concatenated, permuted or reshaped as of today.

    ``patch_size``: time, height and width of a patch, which its flat weights do not tell.
    """
    time, height, width = patch_size
    found = {}
    for old, value in stored.items():
        if old.endswith(JOINED):
            continue
        name = current_name(old)
        if old.endswith(".q_bias"):
            keys = stored.get(old.replace("q_bias", "k_bias"), torch.zeros_like(value))
            value = torch.cat([value, keys, stored[old.replace("q_bias", "v_bias")]])
        elif name == "patch_embed.proj.weight" and value.ndim == 2:
            if value.shape[1] % math.prod(patch_size) == 0:  # otherwise the patches are others
                flat = "d (t h w c) -> d c t h w"
                value = rearrange(value, flat, t=time, h=height, w=width).contiguous()
        elif (name in TOKENS and value.ndim == 1) or (name in TABLES and value.ndim == 2):
            value = value.reshape(1, -1, value.shape[-1])
        found[name] = value
    return found


def current_name(name: str) -> str:
    """Return today's name of what a file calls ``name``, which may be today's as well."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name
