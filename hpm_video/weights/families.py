"""Families of weights that are read and written: their marks, names, axes and licences.

Our names are timm's. A family holds what is called otherwise in its files, and where queries, keys
and values are several tensors there, the patch kernel has no axis of time, or positions are summed.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hpm_video.config.choices import Conventions
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.files import Tensors

Pairs = tuple[tuple[str, str], ...]
KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"
TABLES = (POSITIONS, "decoder_pos_embed")
SPACE, TIME, FIRST = "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"
"""Tables that add up to one of all tokens, and its row for the class token."""
FUSED, SEPARATE = "blocks.0.attn.qkv.weight", "blocks.0.attn.q.weight"
SCORE = "difficulty_decoder.head."
MARKS = {
    "autoencoder": ("reconstructor.head.weight",),
    "classifier": ("head.weight",),
    "encoder": (),
}


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file by our names."""

    tensors: Tensors
    origins: dict[str, list[str]]
    """Their names in the file."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Names in the file that have no place here, each with the reason."""
    steps: int = 0
    """Time steps of its positions, where they are of space and time."""


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind of one project."""

    name: str
    says: str
    """What they are."""
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
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
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
        """Its class there, where it is of transformers."""
        return self.says.partition(" ")[0] if self.name.startswith("transformers") else ""

    @property
    def has(self) -> set[str]:
        """Names of tensors that distinguish the family from others."""
        ours = [KERNEL, *MARKS[self.holds]]
        if not self.transformers_class:
            ours.append(SEPARATE if "weight" in self.split else FUSED)
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
        renames, inner = (
            tuple((ours, theirs) for theirs, ours in pairs) for pairs in (self.renames, self.inner)
        )
        return renamed(name, renames, inner)

    def read(self, stored: Mapping[str, Tensor]) -> Renamed:
        """Return the tensors of a file by our names.

        Raises:
            CheckpointError: some are incomplete or given twice. Each is named.
        """
        found: Tensors = {}
        origins: dict[str, list[str]] = {}
        left_out: dict[str, str] = {}
        wrong: list[str] = []
        for name, value in stored.items():
            ours = self.ours(name)
            if why := [why for pattern, why in self.left_out if re.fullmatch(pattern, name)]:
                left_out[name] = why[0]
            elif ours in found:
                wrong.append(f"{name} is given twice, by {origins[ours][0]}")
            elif value.ndim != 3 if ours in (*TABLES, SPACE, TIME, FIRST) else not value.ndim:
                wrong.append(f"{name} must have other axes, got {tuple(value.shape)}")
            else:
                found[ours], origins[ours] = value, [name]
        steps = len(found[TIME][0]) if TIME in found and found[TIME].ndim == 3 else 0
        wrong += self._concatenate(found, origins) + _add_up(found, origins)
        if wrong:
            raise CheckpointError("\n  ".join(["its tensors do not fit together:", *wrong]))
        if self.axes == 4:
            found[KERNEL] = found[KERNEL].unsqueeze(2)
        _average_scores(found)
        return Renamed(found, origins, left_out, steps)

    def _concatenate(self, found: Tensors, origins: dict[str, list[str]]) -> list[str]:
        """Make one tensor of those of queries, keys and values. -> what is wrong"""
        wrong: list[str] = []
        matches = [re.fullmatch(r"(.+\.attn\.)[qkv](\.(?:weight|bias))", name) for name in found]
        for before, kind in dict.fromkeys((match[1], match[2]) for match in matches if match):
            queries, keys, _ = names = [f"{before}{part}{kind}" for part in "qkv"]
            if kind == ".bias" and not self.key_bias and queries in found:
                found.setdefault(keys, torch.zeros_like(found[queries]))
            wrong += [f"missing {self.theirs(name)}" for name in names if name not in found]
            named = [theirs for name in names for theirs in origins.pop(name, [])]
            parts = [found.pop(name) for name in names if name in found]
            joined = f"{before}qkv{kind}"
            if joined in found:
                wrong.append(f"{named[0]} is given twice, by {origins[joined][0]}")
            try:
                found[joined], origins[joined] = torch.cat(parts), named
            except RuntimeError:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                wrong.append(f"misshapen {' and '.join(named)}: {shapes}")
        return wrong

    def write(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return tensors of ours as a file of theirs has them."""
        found: Tensors = {}
        values = math.prod(tensors[KERNEL].shape[1:])
        for name, value in tensors.items():
            qkv = re.search(r"\.attn\.qkv\.(weight|bias)$", name)
            if qkv and qkv[1] in self.split:
                parts = dict(zip("qkv", value.chunk(3), strict=True))
                if qkv[1] == "bias" and not self.key_bias:
                    del parts["k"]
                found |= {name.replace(".qkv.", f".{part}."): parts[part] for part in parts}
            elif self.name == "hpm" and name.startswith(SCORE):
                found[name] = value.expand(values, *value.shape[1:])
            elif self.axes == 4 and name == KERNEL:  # frames of a patch are channels of an image
                found[name] = value.flatten(1, 2)
            else:
                found[name] = value
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


def _average_scores(found: Tensors) -> None:
    """Average the heads of official HPM, whose difficulty is the mean of outputs for each value."""
    for name in [name for name in found if name.startswith(SCORE)]:
        if len(found[name]) == math.prod(found[KERNEL].shape[1:]):
            mean = found[name].double().mean(dim=0, keepdim=True)
            found[name] = mean.to(found[name].dtype)


def _add_up(found: Tensors, origins: dict[str, list[str]]) -> list[str]:
    """Make one table of positions of those of space, of time and of the class token."""
    there = [name for name in (SPACE, TIME, FIRST) if name in found]
    if not there:
        return []
    wrong = [f"missing {name}" for name in (SPACE, TIME) if name not in found]
    tables = {name: found.pop(name).float() for name in there}
    origins[POSITIONS] = [theirs for name in there for theirs in origins.pop(name)]
    try:
        both = (tables[TIME].unsqueeze(2) + tables[SPACE].unsqueeze(1)).flatten(1, 2)
        first = tables.get(FIRST, torch.zeros_like(both[:, :1]))
        found[POSITIONS] = torch.cat([first, both], dim=1)
    except (KeyError, IndexError, RuntimeError):
        shapes = (f"{name} {tuple(table.shape)}" for name, table in tables.items())
        wrong.append(f"these do not add up: {', '.join(shapes)}")
    return wrong


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
    # Of models in memory in transformers 5, where they are called otherwise.
    (".attention.q_proj.", ".attn.q."),
    (".attention.k_proj.", ".attn.k."),
    (".attention.v_proj.", ".attn.v."),
    (".attention.o_proj.", ".attn.proj."),
)


VIDEOMAE_BIASES = (
    (".attention.attention.q_bias", ".attn.q.bias"),
    (".attention.attention.v_bias", ".attn.v.bias"),
)


def _of_transformers(prefix: str, *decoder: tuple[str, str]) -> dict[str, Any]:
    encoder = (
        (f"{prefix}embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        (f"{prefix}embeddings.cls_token", "cls_token"),
        (f"{prefix}embeddings.position_embeddings", POSITIONS),
        (f"{prefix}encoder.layer.", "blocks."),
        (f"{prefix}layers.", "blocks."),
        (f"{prefix}layernorm.", "norm."),
        ("classifier.", "head."),
    )
    inner = BLOCKS_OF_TRANSFORMERS if prefix == "vit." else VIDEOMAE_BIASES + BLOCKS_OF_TRANSFORMERS
    return {"renames": (*encoder, *decoder), "inner": inner, "split": ("weight", "bias")}


IMAGES: dict[str, Any] = {"axes": 4}
MAE = (
    ("decoder_blocks.", "reconstructor.blocks."),
    ("decoder_norm.", "reconstructor.norm."),
    ("decoder_pred.", "reconstructor.head."),
)
HPM = (
    ("decoder_blocks_losspred.", "difficulty_decoder.blocks."),
    ("decoder_norm_losspred.", "difficulty_decoder.norm."),
    ("decoder_pred_losspred.", SCORE),
)
MAE_ST: dict[str, Any] = {
    "axes": 5,
    "split": ("weight", "bias"),
    "left_out": (
        (
            r"decoder_.+|mask_token|pred_head\..+",
            "its decoder has a class token and positions of its own, which ours has not",
        ),
    ),
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
DECODER = ("decoder.", "reconstructor.")
VIDEOMAE = (TO_DECODER, DECODER, ("mask_token", "mask_token"), ("encoder.", ""))
TRANSFORMERS_CLIPS = CLIPS | _of_transformers("videomae.")
TRANSFORMERS_VIDEOMAE = CLIPS | _of_transformers(
    "videomae.", TO_DECODER, ("decoder.decoder_layers.", "reconstructor.blocks."), DECODER
)
POOLER: dict[str, Any] = {
    "axes": 4,
    "left_out": (
        (r"(vit\.)?pooler\..+", "our encoder ends with its norm"),
        (r"(vit\.)?embeddings\.mask_token", "our encoder sees no hidden patches"),
    ),
}
TRANSFORMERS_VITMAE = POOLER | _of_transformers(
    "vit.",
    ("decoder.decoder_layers.", "reconstructor.blocks."),
    ("decoder.decoder_encoder.layer.", "reconstructor.blocks."),
    ("decoder.decoder_norm.", "reconstructor.norm."),
    ("decoder.decoder_pred.", "reconstructor.head."),
    ("decoder.", ""),
)
TRANSFORMERS_VIT = POOLER | _of_transformers("vit.") | {"pixels": ((0.5,) * 3, (0.5,) * 3)}
_ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("hpm", "official HPM of images", IMAGES | {"renames": MAE + HPM, "target": "raw"}),
    ("mae", "MAE pre-training", IMAGES | {"renames": MAE}),
    ("vit", "encoder of MAE or timm's ViT", IMAGES),
    ("vit_classifier", "classifier of images: MAE fine-tuned, or timm's ViT", IMAGES),
    ("mae_st", "encoder of Meta's MAE for video", MAE_ST),
    ("mae_st_classifier", "classifier of clips: Meta's MAE for video, fine-tuned", MAE_ST),
    ("videomae", "VideoMAE pre-training, first or second version", CLIPS | {"renames": VIDEOMAE}),
    ("videomae_encoder", "encoder of VideoMAE, first or second version", CLIPS),
    ("videomae_classifier", "VideoMAE fine-tuned or distilled, first or second version", CLIPS),
    (
        "transformers_videomae",
        "VideoMAEForPreTraining of transformers",
        TRANSFORMERS_VIDEOMAE,
    ),
    (
        "transformers_videomae_classifier",
        "VideoMAEForVideoClassification of transformers",
        TRANSFORMERS_CLIPS,
    ),
    (
        "transformers_videomae_encoder",
        "VideoMAEModel of transformers",
        CLIPS | _of_transformers(""),
    ),
    (
        "transformers_vitmae",
        "ViTMAEForPreTraining of transformers",
        TRANSFORMERS_VITMAE | {"target": "raw"},
    ),
    (
        "transformers_vit_classifier",
        "ViTForImageClassification of transformers",
        TRANSFORMERS_VIT,
    ),
    (
        "transformers_vit_encoder",
        "ViTModel or ViTMAEModel of transformers",
        POOLER | _of_transformers(""),
    ),
    ("ours", "pre-training with this package", {"axes": 5}),
)
FAMILIES = {name: Family(name, says, **kind) for name, says, kind in _ROWS}
