"""Families of weights that are read and written: their marks, names, axes and licences.

Our names are timm's. A family holds what is called otherwise in its files, and which of three
operations lie between them: queries, keys and values are several tensors there, the patch kernel
has no axis of time, or positions are summed.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from hpm_video.config.choices import Conventions
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.files import Source, Tensors

Pairs = tuple[tuple[str, str], ...]
KERNEL, SCORE = "patch_embed.proj.weight", "difficulty_decoder.head."
TABLES = ("pos_embed", "decoder_pos_embed")
SUMMED = ("pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")
"""Tables of positions that add up to one of all tokens, and its row for the class token."""
QKV = re.compile(r"(.+\.attn\.)qkv\.(weight|bias)")
MARKS = {"autoencoder": ["reconstructor.head.weight"], "classifier": ["head.weight"], "encoder": []}


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind of one project."""

    name: str
    title: str
    axes: Literal[4, 5]
    """Of the kernel of the patches: 4 of images, 5 of clips."""
    renames: Pairs = ()
    """Beginnings of names there and here; the first that fits is taken."""
    inner: Pairs = ()
    """The same of parts of names within blocks."""
    split: tuple[str, ...] = ()
    """Kinds of tensors ("weight", "bias") that queries, keys and values have one by one."""
    key_bias: bool = True
    """Whether keys have a bias there. It shifts all scores of a query alike: softmax ignores it."""
    left_out: Pairs = ()
    """Regular expressions of names that have no place here, and why."""
    conventions: Conventions = "mae"
    target: TargetKind = "joint"
    """What pre-training predicts, unless the file says otherwise."""
    pixels: tuple[tuple[float, ...], ...] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """Their mean and standard deviation, unless the file says otherwise."""

    @property
    def holds(self) -> Literal["autoencoder", "encoder", "classifier"]:
        """What of a model it has."""
        if self.name.endswith("classifier"):
            return "classifier"
        encoder = self.name.endswith("encoder") or self.name in ("vit", "mae_st")
        return "encoder" if encoder else "autoencoder"

    @property
    def licence(self) -> str:
        """What is known of their licence."""
        return next(text for begins, text in LICENCES.items() if self.name.startswith(begins))

    @property
    def transformers_class(self) -> str:
        """Its class in transformers; empty where it is of another project."""
        return self.title.partition(" ")[0] if self.name.startswith("transformers") else ""

    @property
    def has(self) -> set[str]:
        """Names of tensors that distinguish the family from others."""
        ours = [KERNEL, *MARKS[self.holds]]
        if not self.transformers_class:
            ours.append(f"blocks.0.attn.{'q' if 'weight' in self.split else 'qkv'}.weight")
        if self.name == "hpm":
            ours.append(f"{SCORE}weight")
        return {self.theirs(name) for name in ours}

    def fits(self, tensors: Tensors) -> bool:
        """Whether tensors with these names may be of this family."""
        there = tensors.keys() >= self.has and tensors[self.theirs(KERNEL)].ndim == self.axes
        # No VideoMAE has a class token; by their names alone some models of ours might be one.
        return there and not (self.conventions == "videomae" and "cls_token" in tensors)

    def ours(self, name: str) -> str:
        """Return our name of a tensor of theirs."""
        return renamed(name, self.renames, self.inner)

    def theirs(self, name: str) -> str:
        """Return their name of a tensor of ours."""
        back = (tuple((ours, theirs) for theirs, ours in p) for p in (self.renames, self.inner))
        return renamed(name, *back)

    def parts(self, tensors: Tensors, like: Tensors | None = None) -> Tensors:
        """Return tensors of ours in the parts that their files have, by our names.

        ``like``: such parts of a file, which may fuse, or have a bias on keys, where most do not.
        """
        found: Tensors = {}
        like = like or {}
        for name, value in tensors.items():
            qkv = QKV.fullmatch(name)
            if qkv and qkv[2] in self.split and name not in like:
                names = {part: f"{qkv[1]}{part}.{qkv[2]}" for part in "qkv"}
                if qkv[2] == "bias" and not self.key_bias and names["k"] not in like:
                    del names["k"]
                each: Tensors = dict(zip("qkv", value.chunk(3), strict=True))
                found |= {name: each[part] for part, name in names.items()}
            elif self.name == "hpm" and name.startswith(SCORE):
                values = math.prod(tensors[KERNEL].shape[1:])
                found[name] = value.expand(values, *value.shape[1:])
            elif self.axes == 4 and name == KERNEL:  # frames of a patch are channels of an image
                found[name] = value.flatten(1, 2)
            else:
                found[name] = value
        return found

    def join(self, parts: Tensors) -> Tensors:
        """Return the tensors that these parts of a file become."""
        found = dict(parts)
        if self.axes == 4:
            found[KERNEL] = found[KERNEL].unsqueeze(2)
        for name in parts:
            if match := re.fullmatch(r"(.+\.attn\.)q\.(weight|bias)", name):
                queries, keys, values = (f"{match[1]}{part}.{match[2]}" for part in "qkv")
                zeros = torch.zeros_like(found[queries])
                three = found.pop(queries), found.pop(keys, zeros), found.pop(values)
                found[f"{match[1]}qkv.{match[2]}"] = torch.cat(three)
            elif self.name == "hpm" and name.startswith(SCORE):
                # The difficulty of official HPM is the mean of outputs for each value of a patch.
                found[name] = found[name].double().mean(dim=0, keepdim=True).to(found[name].dtype)
        return found

    def write(self, tensors: Tensors) -> Tensors:
        """Return tensors of ours as a file of theirs has them."""
        found = self.parts(tensors)
        return {self.theirs(name): value.contiguous() for name, value in found.items()}


def renamed(name: str, beginnings: Pairs, inner: Pairs) -> str:
    """Return a name with the first beginning and the first part within that fit replaced."""
    for old, new in beginnings:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inner:
        if old in name:
            return name.replace(old, new, 1)
    return name


# --- The table ------------------------------------------------------------------------------------

NON_COMMERCIAL = "CC-BY-NC 4.0: no commercial use, name the authors"
LICENCES = {
    "hpm": "HPM's code is Apache-2.0 and derived from MAE, which is CC-BY-NC 4.0; of the weights "
    "its authors say nothing: take them as CC-BY-NC 4.0",
    "mae_st": f"Meta's weights of MAE for video are {NON_COMMERCIAL}",
    "mae": f"MAE's weights are {NON_COMMERCIAL}",
    "vit": "MAE's encoders and fine-tuned models have these names too, and MAE's weights are "
    f"{NON_COMMERCIAL}; of timm's models each has its own licence, see its card",
    "videomae": f"the weights of VideoMAE and VideoMAE V2 are {NON_COMMERCIAL}",
    "transformers_videomae": f"if these descend from VideoMAE: its weights are {NON_COMMERCIAL}",
    "transformers_vitmae": f"if these descend from MAE: its weights are {NON_COMMERCIAL}",
    "transformers_vit": "each model has its own licence, see its card; if these descend from MAE: "
    f"its weights are {NON_COMMERCIAL}",
    "ours": "that of what it was trained on and began with; this project's code is Apache-2.0",
}
"""What is known of the licences of weights, by how the names of families begin."""


def licence_of(origin: str) -> str:
    """Return what is known of the licence of weights of this package. ``origin``: of origin.json"""
    table = json.loads(origin) if origin else {}
    return str(table.get("licence", LICENCES["ours"]))


BLOCKS_OF_TRANSFORMERS = (
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.attention.query.", ".attn.q."),
    (".attention.attention.key.", ".attn.k."),
    (".attention.attention.value.", ".attn.v."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    # Of models in memory in transformers 5:
    (".attention.q_proj.", ".attn.q."),
    (".attention.k_proj.", ".attn.k."),
    (".attention.v_proj.", ".attn.v."),
    (".attention.o_proj.", ".attn.proj."),
)
VIDEOMAE_BIASES = (
    (".attention.attention.q_bias", ".attn.q.bias"),
    (".attention.attention.v_bias", ".attn.v.bias"),
)


def _of_transformers(prefix: str, *others: tuple[str, str]) -> dict[str, Any]:
    encoder = (
        (f"{prefix}embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        (f"{prefix}embeddings.cls_token", "cls_token"),
        (f"{prefix}embeddings.position_embeddings", "pos_embed"),
        (f"{prefix}encoder.layer.", "blocks."),
        (f"{prefix}layers.", "blocks."),
        (f"{prefix}layernorm.", "norm."),
        ("classifier.", "head."),
    )
    inner = BLOCKS_OF_TRANSFORMERS if prefix == "vit." else VIDEOMAE_BIASES + BLOCKS_OF_TRANSFORMERS
    return {"renames": (*encoder, *others), "inner": inner, "split": ("weight", "bias")}


def _decoder(there: str, ours: str) -> Pairs:
    parts = {"blocks": "blocks", "norm": "norm", "pred": "head"}
    return tuple((there.format(part), f"{ours}.{name}.") for part, name in parts.items())


MAE = _decoder("decoder_{}.", "reconstructor")
HPM = _decoder("decoder_{}_losspred.", "difficulty_decoder")
NO_PLACE = "its decoder has a class token and positions of its own, which ours has not"
MAE_ST: dict[str, Any] = {
    "axes": 5,
    "split": ("weight", "bias"),
    "left_out": ((r"decoder_.+|mask_token|pred_head\..+", NO_PLACE),),
    "pixels": ((0.45,) * 3, (0.225,) * 3),
}
CLIPS: dict[str, Any] = {
    "axes": 5,
    "inner": ((".attn.q_bias", ".attn.q.bias"), (".attn.v_bias", ".attn.v.bias")),
    "split": ("bias",),
    "key_bias": False,
    "conventions": "videomae",
    "target": "per_channel",
}
TO_DECODER = ("encoder_to_decoder.", "decoder_embed.")
LAYERS = ("decoder.decoder_layers.", "reconstructor.blocks.")
DECODER = ("decoder.", "reconstructor.")
VIDEOMAE = (TO_DECODER, DECODER, ("mask_token", "mask_token"), ("encoder.", ""))
VIT: dict[str, Any] = {
    "axes": 4,
    "left_out": (
        (r"(vit\.)?pooler\..+", "our encoder ends with its norm"),
        (r"(vit\.)?embeddings\.mask_token", "our encoder sees no hidden patches"),
    ),
}
VITMAE = (
    LAYERS,
    ("decoder.decoder_encoder.layer.", "reconstructor.blocks."),
    *_decoder("decoder.decoder_{}.", "reconstructor"),
    ("decoder.", ""),
)
OF_VIDEOMAE = CLIPS | _of_transformers("videomae.", TO_DECODER, LAYERS, DECODER)
OF_VIT = VIT | _of_transformers("vit.", *VITMAE)
HALVES = ((0.5,) * 3, (0.5,) * 3)
_ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("hpm", "official HPM of images", {"axes": 4, "renames": MAE + HPM, "target": "raw"}),
    ("mae", "MAE pre-training", {"axes": 4, "renames": MAE}),
    ("vit", "encoder of MAE or timm's ViT", {"axes": 4}),
    ("vit_classifier", "classifier of images: MAE fine-tuned, or timm's ViT", {"axes": 4}),
    ("mae_st", "encoder of Meta's MAE for video", MAE_ST),
    ("mae_st_classifier", "classifier of clips: Meta's MAE for video, fine-tuned", MAE_ST),
    ("videomae", "VideoMAE pre-training, first or second version", CLIPS | {"renames": VIDEOMAE}),
    ("videomae_encoder", "encoder of VideoMAE, first or second version", CLIPS),
    ("videomae_classifier", "VideoMAE fine-tuned or distilled, first or second version", CLIPS),
    ("transformers_videomae", "VideoMAEForPreTraining", OF_VIDEOMAE),
    ("transformers_videomae_classifier", "VideoMAEForVideoClassification", OF_VIDEOMAE),
    ("transformers_videomae_encoder", "VideoMAEModel", CLIPS | _of_transformers("")),
    ("transformers_vitmae", "ViTMAEForPreTraining", OF_VIT | {"target": "raw"}),
    ("transformers_vit_classifier", "ViTForImageClassification", OF_VIT | {"pixels": HALVES}),
    ("transformers_vit_encoder", "ViTModel or ViTMAEModel", VIT | _of_transformers("")),
    ("ours", "pre-training with this package", {"axes": 5}),
)
FAMILIES = {
    name: Family(name, f"{title} of transformers" if "transformers" in name else title, **layout)
    for name, title, layout in _ROWS
}


# --- Whose weights a file holds -------------------------------------------------------------------

OF_PARTS = ("backbone.", "encoder.")
"""Prefixes that the names of a part may have beside a head without one."""
WRAPPERS = ("state_dict", "model_state", "module", "model", "")
"""Keys of the state dict in a file, the first that is there is taken."""
TEACHER = "ema_state_dict"
"""Key of the teacher beside a student's state dict."""


@dataclass(frozen=True)
class Recognised:
    """The tensors of a file and their family."""

    family: Family
    tensors: Tensors
    """By the names of the family, without prefixes."""
    entry: str
    """Their key in the file."""
    prefix: str
    """The prefix that their names, or those of a part, had."""
    outside: tuple[str, ...] = ()
    """Names in the file of what is not part of the model."""
    teacher: Tensors | None = None


def recognise(source: Source, entry: str | None = None, prefix: str | None = None) -> Recognised:
    """Find the family of weights.

    ``entry``: the key of a state dict, where a file has several; ``prefix``: how the names of the
    model begin, where a wrapper has several models.

    Raises:
        CheckpointError: it is of no known family, or may be of several. Its tensors are listed.
    """
    there = ", ".join(map(repr, source.entries))
    known = [name for name in WRAPPERS if name in source.entries]
    if entry is not None and entry not in source.entries:
        raise CheckpointError(f"{source.path} has no state dict {entry!r}, but {there}")
    if entry is None and not known and len(source.entries) > 1:
        raise CheckpointError(
            f"{source.path} holds several state dicts: {there}; choose with --entry"
        )
    chosen = _of_entry(source, [*known, *source.entries][0] if entry is None else entry, prefix)
    beside = entry is None and TEACHER in source.entries and chosen.entry != TEACHER
    if not beside or chosen.family.holds != "autoencoder":
        return chosen
    teacher = _of_entry(source, TEACHER)
    return replace(chosen, teacher=teacher.tensors) if teacher.family is chosen.family else chosen


def _of_entry(source: Source, entry: str, prefix: str | None = None) -> Recognised:
    """Find the family of the tensors whose names begin with a prefix: the one that fits."""
    tensors = source.entries[entry]
    kernels = {family.theirs(KERNEL) for family in FAMILIES.values()}
    beginnings = {
        name.removesuffix(end) for name in tensors for end in kernels if name.endswith(end)
    }
    likely = sorted((each for each in beginnings if each[-1:] in ("", ".")), key=len)
    fitting: dict[str, tuple[Tensors, list[Family]]] = {}
    for each in likely if prefix is None else [prefix and f"{prefix.rstrip('.')}."]:
        own = _under(tensors, each)
        if (fit := _fitting(own)) and not any(each.startswith(outer) for outer in fitting):
            fitting[each] = own, fit
    under = f" under {entry!r}" if entry else ""
    if len(fitting) > 1:
        raise CheckpointError(
            f"{source.path} holds several models{under}: their names begin with "
            f"{' or '.join(map(repr, fitting))}; choose with --prefix"
        )
    if not fitting:
        named = "" if prefix is None else f" whose names begin with {prefix!r}"
        raise CheckpointError(
            f"{source.path} holds no weights{under}{named} of a family that is known "
            f"({', '.join(FAMILIES)}). Its tensors:\n  "
            + "\n  ".join(list_shapes(tensors))
            + "\nKnown are plain vision transformers alone, without layer scale, relative "
            "positions or registers."
        )
    ((taken, (own, fit)),) = fitting.items()
    if len(fit) > 1:
        raise CheckpointError(
            f"{source.path} may be {' or '.join(family.title for family in fit)}: it has tensors "
            f"of both; save the state dict of one model alone"
        )
    outer = _outer(taken)
    left_out = tuple(n for n in tensors if not n.startswith(taken) and n[len(outer) :] not in own)
    return Recognised(fit[0], own, entry, taken, left_out)


def _under(tensors: Tensors, prefix: str) -> Tensors:
    """Return what is under a prefix, without it, and a head beside a part that is under it."""
    own = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    outer, names = _outer(prefix), set(own.values())
    there = [name for name in tensors if name.startswith(outer) and name not in names]
    beside = {name.removeprefix(outer): name for name in there}
    found = {ours: tensors[name] for ours, name in own.items()}
    whole = found | {ours: tensors[name] for ours, name in beside.items()}
    is_more = any(family.holds != "encoder" for family in _fitting(whole))
    return whole if is_more and not own.keys() & beside.keys() else found


def _outer(prefix: str) -> str:
    """Return the prefix of what lies beside a part."""
    part = next((part for part in OF_PARTS if prefix.endswith(part)), "")
    return prefix.removesuffix(part)


def _fitting(tensors: Tensors) -> list[Family]:
    """Return the most specific families that the tensors fit."""
    fit = [family for family in FAMILIES.values() if family.fits(tensors)]
    return [family for family in fit if not any(family.has < other.has for other in fit)]


def list_shapes(tensors: Tensors, most: int = 12) -> list[str]:
    """List names and shapes of the first tensors, those of all blocks as one."""
    kinds: dict[str, tuple[int, ...]] = {}
    for name, value in tensors.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), tuple(value.shape))
    shown = [f"{name} {shape}" for name, shape in list(kinds.items())[:most]]
    return [*shown, f"and {len(kinds) - most} more kinds of names"][: len(kinds)]
