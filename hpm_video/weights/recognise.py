"""Whose weights a file holds, by the names of its tensors, and those of frozen image models."""

import os
import re
from pathlib import Path

import torch

from hpm_video.files.weights import CheckpointError
from hpm_video.weights.families import FAMILIES, KERNEL, State, families_of, renamed
from hpm_video.weights.files import Source, Tensors, read_source

WRAPPERS = ("state_dict", "model_state", "module", "model", "")
"""Keys of the state dict in a file, the first that is there is taken."""


def recognise(source: Source, entry: str | None = None, prefix: str | None = None) -> State:
    """Find the family of weights, and read them by our names.

    The shortest prefix under which a family fits is taken off. A head may lie beside the part that
    has the prefix; with a prefix that is given, nothing else is read.

    Args:
        source: the content of a file.
        entry: the key of a state dict, where the file has several.
        prefix: how the names of the wanted model begin, where others lie beside it.

    Raises:
        CheckpointError: it is of no known family, or may be of several. Its tensors are listed.
    """
    entries, there = source.entries, ", ".join(map(repr, source.entries))
    known = [name for name in WRAPPERS if name in entries]
    if entry is not None and entry not in entries:
        raise CheckpointError(f"it has no state dict {entry!r}, but {there}")
    if entry is None and not known and len(entries) > 1:
        raise CheckpointError(f"it holds several state dicts: {there}; choose with --entry")
    entry = [*known, *entries][0] if entry is None else entry
    every = tensors = entries[entry]
    if prefix is not None:
        tensors = {name: value for name, value in every.items() if name.startswith(prefix)}
    prefixes = _prefixes(tensors) if prefix is None else [prefix]
    stripped = {each: _stripped(tensors, each) for each in prefixes}
    fit = [(each, family) for each in prefixes for family in families_of(stripped[each])]
    if not fit:
        raise CheckpointError(
            f"it holds weights of no family that is known ({', '.join(FAMILIES)}). Its tensors"
            f"{f' under {entry!r}' if entry else ''}:\n  "
            + "\n  ".join(list_shapes(every))
            + "\nKnown are plain vision transformers alone, without layer scale, relative "
            "positions or registers. --prefix reads only the names that begin with it."
        )
    prefix, family = fit[0]
    # A longer prefix is another reading of the same tensors, unless it begins otherwise.
    several = [one for one in fit if one[0] == prefix or not one[0].startswith(prefix)]
    if len(several) > 1:
        titles = " or ".join(f"{other.title} (--prefix {each!r})" for each, other in several)
        raise CheckpointError(
            f"it may be {titles}: it has tensors of both; choose with --prefix, or save the state "
            f"dict of one model alone"
        )
    state = family.read(stripped[prefix])
    state.entry, state.prefix = entry, prefix
    outside = [name for name in every if name not in tensors]
    state.left_out |= dict.fromkeys(outside, "it does not begin with the prefix")
    return state


def _prefixes(tensors: Tensors) -> list[str]:
    """Return what stands before the name of a patch kernel of any family, the shortest first."""
    kernels = {family.names(KERNEL)[0] for family in FAMILIES.values()}
    before = {name.removesuffix(end) for name in tensors for end in kernels if name.endswith(end)}
    whole = [each for each in before if each == "" or each.endswith(".")]
    return sorted(whole, key=lambda each: (len(each), each))


def _stripped(tensors: Tensors, prefix: str) -> Tensors:
    """Take off a prefix, or what all names begin with, unless two names would become one."""
    common = os.path.commonprefix([*tensors])
    common = common[: common.rfind(".") + 1]
    found = {
        name.removeprefix(prefix if name.startswith(prefix) else common): value
        for name, value in tensors.items()
    }
    return found if len(found) == len(tensors) else {}


def list_shapes(tensors: Tensors, most: int = 12) -> list[str]:
    """List names and shapes of the first tensors, those of all blocks as one."""
    kinds: dict[str, tuple[int, ...]] = {}
    for name, value in tensors.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), tuple(value.shape))
    shown = [f"{name} {shape}" for name, shape in list(kinds.items())[:most]]
    return [*shown, f"and {len(kinds) - most} more kinds of names"][: len(kinds)]


# --- Frozen image models, by the names of timm ----------------------------------------------------

OF_TOWERS = ("teacher", "state_dict", "model", "")
"""Keys of the state dict in a file of an image model, the first that is there is taken."""
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
    entry = next((name for name in OF_TOWERS if name in entries), None)
    if entry is None:
        raise CheckpointError(
            f"{path} must hold a state dict alone, or one under "
            f"{', '.join(map(repr, OF_TOWERS[:-1]))}, got {', '.join(map(repr, entries))}; save "
            f"the model's state_dict()"
        )
    weights = {name.removeprefix("module."): value for name, value in entries[entry].items()}
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
