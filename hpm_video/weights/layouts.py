"""Names and shapes of the tensors in a file: each layout is read into timm's, and written from it.

In the middle stand the names of timm's vision transformer, and beside them ``to_decoder``,
``mask_token``, ``reconstructor`` and ``difficulty_decoder`` in the same words. There the patch
embedding is the kernel of a convolution (D, C, T, H, W), queries, keys and values are one layer
with one bias, tokens are (1, 1, D), and tables of positions (1, N, D), or (1, 1 + N, D) with a row
for the class token. Our own files have a layout like all others.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.grid import Size3
from hpm_video.weights.files import Tensors

Pairs = tuple[tuple[str, str], ...]
NO_KEY_BIAS = "a bias on keys shifts all scores of a query alike, which the softmax ignores"
KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"
TOKENS, TABLES = ("cls_token", "mask_token"), (POSITIONS, "decoder_pos_embed")
SPACE, TIME, FIRST = "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"
"""Tables that add up to one of all tokens, and its row for the class token."""
SCORE = ("difficulty_decoder.head.weight", "difficulty_decoder.head.bias")
BLOCK = re.compile(r"((?:.+\.)?blocks\.\d+\.)(.+)")


@dataclass(frozen=True)
class Layout:
    """How the files of a project hold a model."""

    parts: Pairs
    """Their names and timm's, of tensors or of all whose names go on behind a dot. Where several
    have one name in timm, the first is the one to write."""
    kernel_axes: Literal[2, 4, 5]
    """4 of images, 5 of clips, 2 of a linear layer on flat patches, as ours is."""
    inner: Pairs = ()
    """The same within a block, where names differ."""
    split: Literal["nothing", "biases", "all"] = "nothing"
    """What there is for queries, keys and values one by one."""
    key_bias: bool = True
    score_of_values: bool = False
    """Whether difficulty is the mean of an output for each value of a patch."""
    left_out: Pairs = ()
    """Regular expressions of whole names that have no place here, and why."""

    def timm(self, theirs: str) -> str:
        """Return timm's name of a tensor, empty where this layout has none such."""
        name = _renamed(theirs, self.parts)
        block = BLOCK.fullmatch(name)
        return block[1] + (_renamed(block[2], self.inner) or block[2]) if block else name

    def theirs(self, timm: str) -> str:
        """Return the name here of a tensor of timm's, empty where it has no place."""
        if block := BLOCK.fullmatch(timm):
            inner = tuple((ours, theirs) for theirs, ours in self.inner)
            timm = block[1] + (_renamed(block[2], inner) or block[2])
        return _renamed(timm, tuple((ours, theirs) for theirs, ours in self.parts))


def _renamed(name: str, pairs: Pairs) -> str:
    for old, new in pairs:
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return ""


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file by timm's names."""

    layout: Layout
    tensors: Tensors
    origins: dict[str, list[str]]
    """Names in the file of each."""
    left_out: dict[str, str]
    """Names of the file that have no place here, each with the reason."""
    steps: int = 0
    """Time steps that its positions are of, where they tell."""

    def named(self, timm: str) -> str:
        """Return the name in the file, or that which it should have there."""
        return " and ".join(self.origins.get(timm, [self.layout.theirs(timm) or timm]))


def read(layout: Layout, stored: Mapping[str, Tensor], patch_size: Size3 | None = None) -> Renamed:
    """Return the tensors of a file by timm's names. ``patch_size``: of a model of ours.

    Raises:
        CheckpointError: some are unknown, incomplete or given twice. Each is named.
    """
    renamed, wrong = _by_name(layout, stored)
    found, origins = renamed.tensors, renamed.origins
    steps = len(found[TIME][0]) if TIME in found and found[TIME].ndim == 3 else 0
    wrong += _fuse(layout, found, origins)
    if SPACE in found or TIME in found:
        wrong += _add_up(found, origins)
    if wrong:
        raise CheckpointError("\n  ".join(["these tensors do not fit the layout:", *wrong]))
    if layout.kernel_axes == 4:
        found[KERNEL] = found[KERNEL].unsqueeze(2)
    elif layout.kernel_axes == 2:
        _unflatten(found, patch_size)
    if layout.score_of_values:
        values = math.prod(found[KERNEL].shape[1:])
        for name in SCORE:
            if name in found and found[name].shape[:1] == (values,):
                found[name] = found[name].double().mean(dim=0, keepdim=True).to(found[name].dtype)
    return replace(renamed, steps=steps)


def _by_name(layout: Layout, stored: Mapping[str, Tensor]) -> tuple[Renamed, list[str]]:
    """-> the tensors as they are, what is wrong"""
    renamed, wrong = Renamed(layout, {}, {}, {}), []
    for name, value in stored.items():
        timm = layout.timm(name)
        reasons = [reason for pattern, reason in layout.left_out if re.fullmatch(pattern, name)]
        if reasons:
            renamed.left_out[name] = reasons[0]
        elif not timm:
            wrong.append(f"unknown {name} {tuple(value.shape)}")
        elif timm in renamed.tensors:
            wrong.append(f"{name} is given twice, by {renamed.origins[timm][0]}")
        else:
            renamed.tensors[timm], renamed.origins[timm] = value, [name]
            if not layout.key_bias and re.search(r"\.attn\.(qkv|k)\.bias$", timm):
                renamed.left_out[name] = f"in part: {NO_KEY_BIAS}"
    return renamed, wrong


def _unflatten(found: Tensors, patch_size: Size3 | None) -> None:
    """Give what is flat in ours its axes."""
    if patch_size is not None:
        time, height, width = patch_size
        axes = {"t": time, "h": height, "w": width}
        found[KERNEL] = rearrange(found[KERNEL], "d (t h w c) -> d c t h w", **axes)
    for name in (*TOKENS, *TABLES):
        if name in found:
            found[name] = found[name].reshape(1, -1, found[name].shape[-1])


def _fuse(layout: Layout, found: Tensors, origins: dict[str, list[str]]) -> list[str]:
    """Make one layer of queries, keys and values. -> what is wrong"""
    wrong: list[str] = []
    parts = [re.fullmatch(r"(.+\.attn\.)[qkv](\.(?:weight|bias))", name) for name in found]
    for before, kind in dict.fromkeys((part[1], part[2]) for part in parts if part):
        queries, keys, values = names = [f"{before}{part}{kind}" for part in "qkv"]
        like = found.get(queries, found.get(values))
        if kind == ".bias" and not layout.key_bias and like is not None:
            found.setdefault(keys, torch.zeros_like(like))
        missing = [layout.theirs(name) for name in names if name not in found]
        wrong += [f"missing {name}" for name in missing]
        named = [theirs for name in names for theirs in origins.pop(name, [])]
        given = [found.pop(name) for name in names if name in found]
        try:
            whole = torch.cat(given)
        except RuntimeError:
            shapes = ", ".join(str(tuple(value.shape)) for value in given)
            wrong.append(f"misshapen {' and '.join(named)}: {shapes}")
            continue
        if f"{before}qkv{kind}" in found:
            wrong.append(f"{named[0]} is given twice, by {origins[f'{before}qkv{kind}'][0]}")
        found[f"{before}qkv{kind}"], origins[f"{before}qkv{kind}"] = whole, named
    return wrong


def _add_up(found: Tensors, origins: dict[str, list[str]]) -> list[str]:
    """Make one table of positions of those of space, of time and of the class token."""
    wrong = [f"missing {name}" for name in (SPACE, TIME) if name not in found]
    there = [name for name in (SPACE, TIME, FIRST) if name in found]
    shapes = {name: tuple(found[name].shape) for name in there}
    wrong += [
        f"{name} must be a table of three axes, as wide as {there[0]}, got {shape}"
        for name, shape in shapes.items()
        if len(shape) != 3 or shape[-1:] != shapes[there[0]][-1:]
    ]
    tables = {name: found.pop(name).float() for name in there}
    origins[POSITIONS] = [theirs for name in there for theirs in origins.pop(name)]
    if not wrong:
        both = (tables[TIME].unsqueeze(2) + tables[SPACE].unsqueeze(1)).flatten(1, 2)
        first = tables.get(FIRST, torch.zeros_like(both[:, :1]))
        found[POSITIONS] = torch.cat([first, both], dim=1)
    return wrong


def write(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors of timm's names by those of a layout.

    Raises:
        CheckpointError: it has no place for one of them; each is named.
    """
    found: Tensors = {}
    values = math.prod(tensors[KERNEL].shape[1:])
    for name, value in tensors.items():
        qkv = re.search(r"\.attn\.qkv\.(weight|bias)$", name)
        if qkv and (layout.split == "all" or (layout.split == "biases" and qkv[1] == "bias")):
            parts = dict(zip("qkv", value.chunk(3), strict=True))
            if qkv[1] == "bias" and not layout.key_bias:
                del parts["k"]
            found |= {name.replace(".qkv.", f".{part}."): share for part, share in parts.items()}
        elif name in SCORE and layout.score_of_values:
            found[name] = value.expand(values, *value.shape[1:])
        else:
            found[name] = _flat(layout, name, value)
    without = [name for name in found if not layout.theirs(name)]
    if without:
        raise CheckpointError("\n  ".join(["the layout has no place for these tensors:", *without]))
    return {layout.theirs(name): value.contiguous() for name, value in found.items()}


def _flat(layout: Layout, name: str, value: Tensor) -> Tensor:
    """Return a tensor with the axes that it has in a layout."""
    if name == KERNEL and layout.kernel_axes == 4:
        # Frames of a patch are channels of an image; of images there is one.
        return value.flatten(1, 2)
    if name == KERNEL and layout.kernel_axes == 2:
        return rearrange(value, "d c t h w -> d (t h w c)")
    if layout.kernel_axes == 2 and name in (*TOKENS, *TABLES):
        return value.flatten() if name in TOKENS else value[0]
    return value
