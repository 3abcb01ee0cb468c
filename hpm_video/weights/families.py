"""Families of weights that are read and written: their marks, names, axes and licences.

Our names are timm's. A family holds what is called otherwise in its files, and which of three
operations lie between them: queries, keys and values are several tensors there, the patch kernel
has no axis of time, or the score is the mean of many outputs.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hpm_video.config.choices import Conventions
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.files import Tensors

Pairs = tuple[tuple[str, str], ...]
Holds = Literal["autoencoder", "encoder", "classifier"]
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
    holds: Holds
    axes: Literal[4, 5] = 4  # of the kernel of the patches: 4 of images, 5 of clips
    transformers_class: str = ""
    renames: Pairs = ()  # beginnings of names there and here; the first that fits is taken
    inner: Pairs = ()  # the same of parts of names within blocks
    split: tuple[str, ...] = ()
    """Kinds of tensors ("weight", "bias") that queries, keys and values have one by one."""
    key_bias: bool = True
    """Whether keys have a bias there. It shifts all scores of a query alike: softmax ignores it."""
    left_out: str = ""  # regular expression of names that have no place here
    conventions: Conventions = "mae"
    target: TargetKind = "joint"  # what pre-training predicts, unless the file says otherwise
    pixels: tuple[tuple[float, ...], ...] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """Their mean and standard deviation, unless the file says otherwise."""

    @property
    def licence(self) -> str:
        """What is known of their licence."""
        return next(text for begins, text in LICENCES.items() if self.name.startswith(begins))

    def names(self, ours: str) -> list[str]:
        """Return their names of a tensor of ours, or of its parts."""
        parts, qkv = [ours], QKV.fullmatch(ours)
        if qkv and qkv[2] in self.split:
            every = "qv" if qkv[2] == "bias" and not self.key_bias else "qkv"
            parts = [f"{qkv[1]}{part}.{qkv[2]}" for part in every]
        back = [tuple((own, other) for other, own in p) for p in (self.renames, self.inner)]
        return [renamed(part, back[0], back[1]) for part in parts]

    @property
    def marks(self) -> set[str]:
        """Names of tensors that distinguish the family from others."""
        ours = [KERNEL, *MARKS[self.holds]]
        if not self.transformers_class:  # whose names of queries depend on its version
            ours.append("blocks.0.attn.qkv.weight")
        if self.name == "hpm":
            ours.append(f"{SCORE}weight")
        return {self.names(name)[0] for name in ours}

    def read(self, stored: Tensors) -> "State":
        """Return the tensors of a file by our names, copied, in single precision.

        Raises:
            CheckpointError: one is given twice, in part, or is of no use.
        """
        state = State(self)
        for name, value in stored.items():
            _check_numbers(name, value)
            ours = renamed(name, self.renames, self.inner)
            if re.fullmatch(self.left_out, name):
                state.left_out[name] = "our model has no such part"
            elif ours in state.tensors:
                raise CheckpointError(f"{name} is given twice, by {state.names[ours]}")
            else:
                state.tensors[ours], state.names[ours] = value.float().clone(), name
                state.eps = max(state.eps, torch.finfo(value.dtype).eps)
        self._join(state.tensors, state.names)
        return state

    def _join(self, tensors: Tensors, names: dict[str, str]) -> None:
        """Make parts of tensors those of our model."""
        if self.axes == 4:
            tensors[KERNEL] = tensors[KERNEL].unsqueeze(2)
        for name in [each for each in tensors if re.search(r"\.attn\.q\.(weight|bias)$", each)]:
            query, key, value, fused = (
                name.replace(".q.", f".{n}.") for n in ("q", "k", "v", "qkv")
            )
            if name.endswith("bias") and not self.key_bias:
                tensors.setdefault(key, torch.zeros_like(tensors[query]))
            shape = tensors[query].shape
            parts = (tensors.pop(part, None) for part in (query, key, value))
            found = [part for part in parts if part is not None and part.shape == shape]
            if len(found) < 3:
                there = ", ".join(self.names(fused))
                raise CheckpointError(f"missing, or not of one shape: {there}")
            tensors[fused] = torch.cat(found)
            names[fused] = names[query]
        if self.name == "hpm":
            # The difficulty of official HPM is the mean of outputs for each value of a patch.
            values = tensors["reconstructor.head.weight"].shape[:1]
            for name in [each for each in tensors if each.startswith(SCORE)]:
                if tensors[name].shape[:1] == values:
                    tensors[name] = tensors[name].double().mean(dim=0, keepdim=True).float()

    def write(self, tensors: Tensors) -> Tensors:
        """Return tensors of ours as a file of theirs has them."""
        found: Tensors = {}
        for name, value in tensors.items():
            names = self.names(name)
            if self.name == "hpm" and name.startswith(SCORE):
                value = value.expand(len(tensors["reconstructor.head.bias"]), *value.shape[1:])
            elif self.axes == 4 and name == KERNEL:  # frames of a patch are channels of an image
                value = value.flatten(1, 2)
            pieces = (value,) if len(names) == 1 else value.chunk(3)
            pieces = pieces[::2] if len(names) == 2 else pieces
            found |= {each: part.contiguous() for each, part in zip(names, pieces, strict=True)}
        return found


@dataclass
class State:
    """The tensors of a state dict by our names."""

    family: Family
    tensors: Tensors = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Their names in the file, of several parts that of the first."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Names in the file that have no place here, each with the reason."""
    eps: float = 0.0  # the distance of numbers near 1 where they are stored
    entry: str = ""  # the key of the state dict in the file
    prefix: str = ""  # what was taken off the names, or off those of a part

    def called(self, name: str) -> str:
        """Return the name of a tensor of ours in the file."""
        return self.names.get(name) or self.family.names(name)[0]

    def leave_out(self, beginnings: tuple[str, ...], why: str) -> None:
        for name in [each for each in self.tensors if each.startswith(beginnings)]:
            del self.tensors[name]
            self.left_out[self.called(name)] = why


def _check_numbers(name: str, value: Tensor) -> None:
    dense = value.layout == torch.strided and not value.is_quantized
    if value.is_meta or not value.numel() or not dense or not value.is_floating_point():
        raise CheckpointError(
            f"{name} must be a plain tensor of real floating-point numbers, got {value.numel()} of "
            f"{value.dtype} on {value.device}, {value.layout}"
        )
    if not value.isfinite().all():
        raise CheckpointError(f"{name} has numbers that are not finite; it is of no use")


def renamed(name: str, beginnings: Pairs, inner: Pairs) -> str:
    """Return a name with the first beginning and the first part within that fit replaced."""
    old, new = next((pair for pair in beginnings if name.startswith(pair[0])), ("", ""))
    name = new + name.removeprefix(old)
    old, new = next((pair for pair in inner if pair[0] in name), ("", ""))
    return name.replace(old, new, 1)


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
    return str((json.loads(origin) if origin else {}).get("licence", LICENCES["ours"]))


def _decoder(there: str, ours: str) -> Pairs:
    parts = {"blocks": "blocks", "norm": "norm", "pred": "head"}
    return tuple((there.format(part), f"{ours}.{name}.") for part, name in parts.items())


MAE = _decoder("decoder_{}.", "reconstructor")
HPM = _decoder("decoder_{}_losspred.", "difficulty_decoder")
MAE_ST: dict[str, Any] = {
    "axes": 5,
    "split": ("weight", "bias"),
    "left_out": r"decoder_.+|mask_token|pred_head\..+",  # a decoder with a class token of its own
    "pixels": ((0.45,) * 3, (0.225,) * 3),
}
VIDEOMAE: dict[str, Any] = {
    "axes": 5,
    "inner": ((".attn.q_bias", ".attn.q.bias"), (".attn.v_bias", ".attn.v.bias")),
    "split": ("bias",),
    "key_bias": False,
    "conventions": "videomae",
    "target": "per_channel",
}
VERSIONS = ", first or second version"
TO_DECODER = ("encoder_to_decoder.", "decoder_embed.")
DECODER = ("decoder.", "reconstructor.")
OF_VIDEOMAE = (TO_DECODER, ("decoder.decoder_layers.", "reconstructor.blocks."), DECODER)
OF_MAE = (
    ("decoder.decoder_layers.", "reconstructor.blocks."),
    ("decoder.decoder_encoder.layer.", "reconstructor.blocks."),
    *_decoder("decoder.decoder_{}.", "reconstructor"),
    ("decoder.", ""),
)
IN_BLOCKS: Pairs = (
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


def _of_transformers(
    name: str, kind: str, holds: Holds, prefix: str, others: Pairs = (), **layout: Any
) -> Family:
    encoder = (
        (f"{prefix}embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        (f"{prefix}embeddings.cls_token", "cls_token"),
        (f"{prefix}embeddings.position_embeddings", "pos_embed"),
        (f"{prefix}encoder.layer.", "blocks."),
        (f"{prefix}layers.", "blocks."),
        (f"{prefix}layernorm.", "norm."),
        ("classifier.", "head."),
    )
    inner, left_out = IN_BLOCKS, r"(vit\.)?(pooler\..+|embeddings\.mask_token)"
    if name.startswith("videomae"):
        biases = ((f".attention.attention.{part}_bias", f".attn.{part}.bias") for part in "qv")
        inner, layout, left_out = (*biases, *IN_BLOCKS), VIDEOMAE | layout, ""
    layout |= {"inner": inner, "split": ("weight", "bias"), "left_out": left_out}
    title, renames = f"{kind} of transformers", (*encoder, *others)
    return Family(
        f"transformers_{name}", title, holds, transformers_class=kind, renames=renames, **layout
    )


_TABLE: tuple[Family, ...] = (
    Family("hpm", "official HPM of images", "autoencoder", renames=MAE + HPM, target="raw"),
    Family("mae", "MAE pre-training", "autoencoder", renames=MAE),
    Family("vit", "encoder of MAE or timm's ViT", "encoder"),
    Family("vit_classifier", "classifier of images: MAE fine-tuned, or timm's ViT", "classifier"),
    Family("mae_st", "encoder of Meta's MAE for video", "encoder", **MAE_ST),
    Family(
        "videomae",
        f"VideoMAE pre-training{VERSIONS}",
        "autoencoder",
        renames=(TO_DECODER, DECODER, ("mask_token", "mask_token"), ("encoder.", "")),
        **VIDEOMAE,
    ),
    Family("videomae_encoder", f"encoder of VideoMAE{VERSIONS}", "encoder", **VIDEOMAE),
    Family(
        "videomae_classifier",
        f"VideoMAE fine-tuned or distilled{VERSIONS}",
        "classifier",
        **VIDEOMAE,
    ),
    _of_transformers("videomae", "VideoMAEForPreTraining", "autoencoder", "videomae.", OF_VIDEOMAE),
    _of_transformers(
        "videomae_classifier", "VideoMAEForVideoClassification", "classifier", "videomae."
    ),
    _of_transformers("videomae_encoder", "VideoMAEModel", "encoder", ""),
    _of_transformers("vitmae", "ViTMAEForPreTraining", "autoencoder", "vit.", OF_MAE, target="raw"),
    _of_transformers(
        "vit_classifier",
        "ViTForImageClassification",
        "classifier",
        "vit.",
        pixels=((0.5,) * 3,) * 2,
    ),
    _of_transformers("vit_encoder", "ViTModel", "encoder", ""),
    Family("ours", "pre-training with this package", "autoencoder", axes=5),
)
FAMILIES = {family.name: family for family in _TABLE}


def families_of(tensors: Tensors) -> list[Family]:
    """Return the most specific families that tensors fit. No VideoMAE has a class token."""
    fit = [
        family
        for family in FAMILIES.values()
        if tensors.keys() >= family.marks
        and tensors[family.names(KERNEL)[0]].ndim == family.axes
        and not (family.conventions == "videomae" and "cls_token" in tensors)
    ]
    return [family for family in fit if not any(family.marks < other.marks for other in fit)]
