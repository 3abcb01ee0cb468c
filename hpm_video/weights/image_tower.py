"""Weights of frozen image models by the names that timm has for them: DINO's and CLIP's files."""

from pathlib import Path

import torch

from hpm_video.files.weights import CheckpointError
from hpm_video.weights.families import renamed
from hpm_video.weights.files import Tensors, read_source

WRAPPERS = ("teacher", "state_dict", "model", "")
"""Keys of the state dict in a file, the first that is there is taken."""
CLIP_NAMES = (
    ("visual.class_embedding", "cls_token"),
    ("visual.positional_embedding", "pos_embed"),
    ("visual.conv1.", "patch_embed.proj."),
    ("visual.ln_pre.", "norm_pre."),
    ("visual.transformer.resblocks.", "blocks."),
    ("visual.ln_post.", "norm."),
    ("visual.proj", "head.weight"),
)
"""Beginnings of names in the layout of OpenAI and OpenCLIP, and timm's."""
CLIP_BLOCKS = (
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
"""The same of parts of names within blocks."""


def read_image_tower(path: Path) -> Tensors:
    """The weights of the image model in a file, in the layout of timm, DINO, OpenAI or OpenCLIP.

    The file is .safetensors, or .pth, .pt or .bin of tensors: a state dict, or one under "teacher",
    "state_dict" or "model". Unknown names stay.

    Raises:
        CheckpointError: the file cannot be read safely, or holds none.
    """
    entries = read_source(path).entries
    there = [name for name in WRAPPERS if name in entries]
    if not there:
        raise CheckpointError(
            f"{path} must hold a state dict alone, or one under "
            f"{', '.join(map(repr, WRAPPERS[:-1]))}, got {', '.join(map(repr, entries))}; save the "
            f"model's state_dict()"
        )
    weights = {name.removeprefix("module."): value for name, value in entries[there[0]].items()}
    if "visual.class_embedding" not in weights:
        return {name.removeprefix("backbone."): value for name, value in weights.items()}
    found = {
        renamed(name, CLIP_NAMES, CLIP_BLOCKS): value
        for name, value in weights.items()
        if name.startswith("visual.")  # the rest is the text tower
    }
    found["cls_token"] = found["cls_token"].view(1, 1, -1)
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"].unsqueeze(0)
    if "head.weight" in found:
        found["head.weight"] = found["head.weight"].T
        found["head.bias"] = torch.zeros(len(found["head.weight"]))
    return found
