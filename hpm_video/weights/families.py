"""Weights of other projects by our names, and whose they are.

Our names are timm's. One table reads the names of all other projects, since none of them means by a
name what another does not. What a file holds, and whose it is, then follows from the tensors alone.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hpm_video.config.choices import Conventions
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.files import Source, Tensors

KERNEL, CONTENT = "patch_embed.proj.weight", "reconstructor.head.weight"
SCORE = "difficulty_decoder.head."
TABLES = ("pos_embed", "decoder_pos_embed")
SUMMED = ("pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")
"""Tables of mae_st that add up to one of all tokens, and its row for the class token."""
NAMES = (
    # MAE and HPM
    (r"^decoder_(blocks|norm|pred)_losspred\.", r"difficulty_decoder.\1."),
    (r"^decoder_(blocks|norm|pred)\.", r"reconstructor.\1."),
    # VideoMAE
    (r"^decoder\.(blocks|norm|head)\.", r"reconstructor.\1."),
    (r"^encoder_to_decoder\.", "decoder_embed."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    # transformers, in files and in memory
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "reconstructor.blocks."),
    (r"^decoder\.decoder_(norm|pred)\.", r"reconstructor.\1."),
    (r"^decoder\.(decoder_embed|decoder_pos_embed|mask_token)", r"\1"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.attention\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    # both of the above
    (r"^(reconstructor|difficulty_decoder)\.pred\.", r"\1.head."),
)
"""Parts of their names and of ours, replaced one after the other."""
KERNELS = re.compile(r"(|.*\.)(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight")
NO_PLACE = r"pooler\..+|embeddings\.mask_token"
OF_MAE_ST = rf"{NO_PLACE}|decoder_.+|mask_token|pred_head\..+"
"""Names that have no place in our models. The decoder of mae_st has a class token of its own."""
WRAPPERS = ("state_dict", "model_state", "module", "model", "")
"""Keys of the state dict in a file; the first that is there is taken."""


NON_COMMERCIAL = "CC-BY-NC 4.0: no commercial use, name the authors"
CARD = "other models with these names each have their own licence, see their cards"
LICENCES = {
    "hpm": "HPM's code is Apache-2.0 and derived from MAE, which is CC-BY-NC 4.0; of the weights "
    "its authors say nothing: take them as CC-BY-NC 4.0",
    "mae": f"Meta's weights of MAE, for images and for video, are {NON_COMMERCIAL}",
    "vit": f"MAE's weights, fine-tuned ones too, are {NON_COMMERCIAL}; {CARD}",
    "videomae": f"the weights of VideoMAE and VideoMAE V2 are {NON_COMMERCIAL}; {CARD}",
    "ours": "that of what it was trained on and began with; this project's code is Apache-2.0",
}
"""What is known of the licences of weights."""
TARGETS: dict[Conventions, TargetKind] = {"mae": "joint", "videomae": "per_channel"}
"""What the two projects predict if they normalise."""


class Family(NamedTuple):
    """Checkpoints of one kind of one project, and what they are unless the file says otherwise."""

    name: str
    holds: Literal["autoencoder", "encoder", "classifier"]
    licence: str
    conventions: Conventions
    normalises: bool = True  # the target of pre-training
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixels
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


FAMILIES = {
    family.name: family
    for family in (
        Family("hpm", "autoencoder", LICENCES["hpm"], "mae", normalises=False),
        Family("mae", "autoencoder", LICENCES["mae"], "mae"),
        Family("vit", "encoder", LICENCES["vit"], "mae"),  # of MAE, timm or transformers
        Family("vit_classifier", "classifier", LICENCES["vit"], "mae"),
        Family("mae_st", "encoder", LICENCES["mae"], "mae", mean=(0.45,) * 3, std=(0.225,) * 3),
        # The second version's and transformers' are alike.
        Family("videomae", "autoencoder", LICENCES["videomae"], "videomae"),
        Family("videomae_encoder", "encoder", LICENCES["videomae"], "videomae"),
        Family("videomae_classifier", "classifier", LICENCES["videomae"], "videomae"),
    )
}


def licence_of(origin: str) -> str:
    """Return what is known of the licence of weights of this package. ``origin``: of origin.json"""
    return str((json.loads(origin) if origin else {}).get("licence", LICENCES["ours"]))


def by_our_names(theirs: Iterable[str], prefix: str) -> dict[str, str]:
    """Return our names of tensors by theirs. ``prefix``: of an encoder, such as "module.encoder."

    What all names begin with is taken off the others.
    """
    theirs = [*theirs]
    common = os.path.commonprefix(theirs)
    common = common[: common.rfind(".") + 1]
    found = {}
    for name in theirs:
        ours = name.removeprefix(prefix if name.startswith(prefix) else common)
        for pattern, replacement in NAMES:
            ours = re.sub(pattern, replacement, ours)
        found[name] = ours
    return found


def prefixes_of(theirs: Iterable[str]) -> list[str]:
    """Return what stands before the kernel of each patch embedding: of an encoder each."""
    return [match[1] for name in theirs if (match := KERNELS.fullmatch(name))]


@dataclass
class State:
    """The tensors of a state dict by our names, copied, in single precision."""

    prefix: str  # what was taken off the names of the encoder
    entry: str = ""  # the key of the state dict in the file
    family: Family = FAMILIES["vit"]
    tensors: Tensors = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """In the file, of several parts that of the first."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Names in the file that have no place here, each with the reason."""
    eps: float = 0.0  # the distance of numbers near 1 where they are stored

    def called(self, name: str) -> str:
        """Return the name of a tensor in the file, or ours where it has none."""
        return self.names.get(name, name)

    def leave_out(self, beginnings: tuple[str, ...], why: str) -> None:
        for name in [each for each in self.tensors if each.startswith(beginnings)]:
            del self.tensors[name]
            self.left_out[self.called(name)] = why


def recognise(source: Source, entry: str | None = None, prefix: str | None = None) -> State:
    """Read weights by our names, and find their family.

    The prefix of an encoder is taken off. A head may lie beside it without that prefix.

    Args:
        source: the content of a file.
        entry: the key of a state dict, where the file has several.
        prefix: how the names of the wanted model begin, where others lie beside it.

    Raises:
        CheckpointError: it is of no known family, or holds several models; or a tensor is given
            twice, in part, or is of no use.
    """
    entry = _entry_of(source, entry)
    every = source.entries[entry]
    stored = {name: value for name, value in every.items() if name.startswith(prefix or "")}
    if CONTENT in stored:
        raise CheckpointError("it is of this package already: give its folder as init_weights")
    prefixes = prefixes_of(stored)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"it holds several models, whose names begin with {' or '.join(map(repr, prefixes))}; "
            f"choose with --prefix, or save the state dict of one model alone"
        )
    begins = prefixes[0] if prefixes else ""
    state = _read(stored, begins)
    state.entry = entry
    outside = (name for name in every if name not in stored)
    state.left_out |= dict.fromkeys(outside, "it does not begin with the prefix")
    family = _family_of(state.tensors)
    if family is None:
        shapes = (f"{name} {tuple(value.shape)}" for name, value in islice(every.items(), 12))
        raise CheckpointError(
            f"it is none of {', '.join(FAMILIES)}: plain vision transformers, without layer scale, "
            f"relative positions or registers. Its first tensors:\n  " + "\n  ".join(shapes)
        )
    state.family, tensors = family, state.tensors
    if tensors[KERNEL].ndim == 4:  # of images
        tensors[KERNEL] = tensors[KERNEL].unsqueeze(2)
    # The difficulty of official HPM is the mean of outputs for each value of a patch.
    for name in [each for each in tensors if each.startswith(SCORE) and CONTENT in tensors]:
        if tensors[name].shape[:1] == tensors[CONTENT].shape[:1]:
            tensors[name] = tensors[name].double().mean(dim=0, keepdim=True).float()
    return state


def _entry_of(source: Source, asked: str | None) -> str:
    """Return the key of the wanted state dict."""
    there = ", ".join(map(repr, source.entries))
    known = [name for name in WRAPPERS if name in source.entries]
    if asked is not None and asked not in source.entries:
        raise CheckpointError(f"it has no state dict {asked!r}, but {there}")
    if asked is None and not known and len(source.entries) > 1:
        raise CheckpointError(f"it holds several state dicts: {there}; choose with --entry")
    return [*known, *source.entries][0] if asked is None else asked


def _read(stored: Tensors, prefix: str) -> State:
    """Take the tensors of a state dict by our names, where each has a place."""
    state, ours = State(prefix), by_our_names(stored, prefix)
    no_place = OF_MAE_ST if f"{prefix}{SUMMED[0]}" in stored else NO_PLACE
    for name, value in stored.items():
        _check_numbers(name, value)
        if re.fullmatch(no_place, name.removeprefix(prefix)):
            state.left_out[name] = "our model has no such part"
        elif ours[name] in state.tensors:
            raise CheckpointError(f"{name} is given twice, by {state.names[ours[name]]}")
        else:
            state.tensors[ours[name]], state.names[ours[name]] = value.float().clone(), name
            state.eps = max(state.eps, torch.finfo(value.dtype).eps)
    _join_queries_keys_and_values(state.tensors, state.names)
    return state


def _check_numbers(name: str, value: Tensor) -> None:
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    if not plain or not value.is_floating_point() or not value.numel():
        raise CheckpointError(f"{name} must hold real floating-point numbers, got {value!r:.80}")
    if not value.isfinite().all():
        raise CheckpointError(f"{name} has numbers that are not finite; it is of no use")


def _join_queries_keys_and_values(tensors: Tensors, names: dict[str, str]) -> None:
    """Make one tensor of three. A missing bias on keys is 0: the softmax ignores it anyway."""
    for query in [each for each in tensors if each.endswith((".attn.q.weight", ".attn.q.bias"))]:
        key, value, fused = (query.replace(".q.", f".{part}.") for part in ("k", "v", "qkv"))
        if query.endswith("bias"):
            tensors.setdefault(key, torch.zeros_like(tensors[query]))
        shape = tensors[query].shape
        parts = (tensors.pop(name, None) for name in (query, key, value))
        found = [part for part in parts if part is not None and part.shape == shape]
        if len(found) < 3 or fused in tensors:
            raise CheckpointError(
                f"missing, given twice, or not of one shape: {query}, {key}, {value}"
            )
        tensors[fused], names[fused] = torch.cat(found), names[query]


def _family_of(tensors: Tensors) -> Family | None:
    """Return whose tensors they are; none where they are of nobody who is known."""
    axes = tensors[KERNEL].ndim if KERNEL in tensors else 0
    if axes not in (4, 5) or "blocks.0.attn.qkv.weight" not in tensors:
        return None
    if SUMMED[0] in tensors:
        return FAMILIES["mae_st"]
    decodes = any(name.startswith("reconstructor.") for name in tensors)
    first = "cls_token" in tensors
    if axes == 4 and decodes:
        name = "hpm" if f"{SCORE}weight" in tensors else "mae"
        return FAMILIES[name] if first else None
    if axes == 5 and first:  # VideoMAE has none
        return None
    name = "vit" if axes == 4 else "videomae" if decodes else "videomae_encoder"
    if "head.weight" in tensors and not decodes:
        name = f"{name.partition('_')[0]}_classifier"
    return FAMILIES[name]
