"""Weights of frozen image models by the names that timm has for them: DINO's and CLIP's files."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hpm_video.files.weights import CheckpointError
from hpm_video.weights.files import Tensors, read_source

WRAPPERS = ("teacher", "state_dict", "model", "")
"""Keys of the state dict in a file, the first that is there is taken."""
_BLOCK = r"transformer\.resblocks\.(\d+)\."
CLIP_NAMES = (
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.(.+)", r"patch_embed.proj.\1"),
    (r"ln_pre\.(.+)", r"norm_pre.\1"),
    (_BLOCK + r"ln_([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (_BLOCK + r"attn\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"mlp\.c_fc\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.c_proj\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"ln_post\.(.+)", r"norm.\1"),
    (r"proj", "head.weight"),
)
"""Names under ``visual.`` in the layout of OpenAI and OpenCLIP, and timm's."""


def read_image_tower(path: Path) -> Tensors:
    """The weights of the image model in a file, in the layout of timm, DINO, OpenAI or OpenCLIP.

    The file is .safetensors, or .pth, .pt or .bin of tensors: a state dict, or one under "teacher",
    "state_dict" or "model". Unknown names stay.

    Raises:
        CheckpointError: the file cannot be read safely, or holds none.
    """
    source = read_source(path)
    there = [name for name in WRAPPERS if name in source.entries]
    if not there:
        raise CheckpointError(
            f"{path} must hold a state dict alone, or one under "
            f"{', '.join(map(repr, WRAPPERS[:-1]))}, got {', '.join(map(repr, source.entries))}; "
            f"save the model's state_dict()"
        )
    weights = {
        name.removeprefix("module."): value for name, value in source.entries[there[0]].items()
    }
    if "visual.class_embedding" in weights:  # the rest is the text tower
        return _from_clip(
            {name: value for name, value in weights.items() if name.startswith("visual.")}
        )
    return {name.removeprefix("backbone."): value for name, value in weights.items()}


def _from_clip(weights: Mapping[str, Tensor]) -> Tensors:
    found = {}
    for name, value in weights.items():
        for pattern, replacement in CLIP_NAMES:
            if match := re.fullmatch(r"visual\." + pattern, name):
                name = match.expand(replacement)
                break
        found[name] = value
    found["cls_token"] = found["cls_token"].view(1, 1, -1)
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"].unsqueeze(0)
    if "head.weight" in found:
        found["head.weight"] = found["head.weight"].T
        found["head.bias"] = torch.zeros(len(found["head.weight"]))
    return found
