"""The names that tensors have in other projects, and what they are here: one table, read both ways.

A :class:`Rule` says which tensors of theirs are which of ours. ``{}`` in a name stands for the
number of a block. Where theirs come in several spellings, the first rule is the one to write.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.grid import Size3
from hpm_video.weights.files import Tensors


@dataclass(frozen=True)
class Cut:
    """How clips are cut into patches, which decides the shape of the patch embedding."""

    patch_size: Size3
    channels: int = 3

    @property
    def values(self) -> int:
        """Values of a patch (P)."""
        time, height, width = self.patch_size
        return time * height * width * self.channels


Parts = Sequence[Tensor]


@dataclass(frozen=True)
class Change:
    """What is done to the tensors of a rule."""

    read: Callable[[Parts, Cut], Parts]
    """Theirs -> ours"""
    write: Callable[[Parts, Cut], Parts]
    """Ours -> theirs"""


@dataclass(frozen=True)
class Rule:
    """Which tensors of theirs are which of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    change: Change
    loses: str = ""
    """What of theirs has no place here, and why that changes nothing."""


@dataclass(frozen=True)
class PositionTable:
    """A table of positions: that which is computed here too, or another, which the model keeps."""

    theirs: tuple[str, ...]
    """Tables that are added up: of all tokens; or of a time step and of the steps."""
    of: Literal["encoder", "decoder"]
    first_row: str | None = None
    """Its first row is of the class token: within the table (the same name), or by itself."""


@dataclass(frozen=True)
class LeftOut:
    """Tensors that have no place here."""

    pattern: str
    """A regular expression of whole names."""
    reason: str


@dataclass(frozen=True)
class Layout:
    """All tensors that files of a family may hold."""

    rules: tuple[Rule, ...]
    tables: tuple[PositionTable, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def theirs_of(self, ours: str) -> str:
        """What a tensor of ours is called there."""
        for rule in self.rules:
            for name in rule.ours:
                pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
                if match := re.fullmatch(pattern, ours):
                    block = match[1] if match.groups() else ""
                    return " or ".join(theirs.format(block) for theirs in rule.theirs)
        return ours

    def under(self, prefix: str) -> "Layout":
        """The same with ``prefix`` before each of their names."""
        return Layout(
            tuple(
                replace(rule, theirs=tuple(prefix + name for name in rule.theirs))
                for rule in self.rules
            ),
            tuple(
                replace(
                    table,
                    theirs=tuple(prefix + name for name in table.theirs),
                    first_row=table.first_row and prefix + table.first_row,
                )
                for table in self.tables
            ),
            tuple(
                replace(left, pattern=re.escape(prefix) + f"(?:{left.pattern})")
                for left in self.left_out
            ),
        )


# --- What is done to tensors --------------------------------------------------------------------

SAME = Change(lambda parts, _: parts, lambda parts, _: parts)

TOKEN = Change(lambda parts, _: [parts[0].flatten()], lambda parts, _: [parts[0].reshape(1, 1, -1)])
"""A learned token: (1, 1, D) and (D,)"""


def _write_image_kernel(parts: Parts, cut: Cut) -> Parts:
    _, height, width = cut.patch_size
    return [rearrange(parts[0], "d (h w c) -> d c h w", h=height, w=width)]


def _write_clip_kernel(parts: Parts, cut: Cut) -> Parts:
    time, height, width = cut.patch_size
    return [rearrange(parts[0], "d (t h w c) -> d c t h w", t=time, h=height, w=width)]


IMAGE_KERNEL = Change(
    lambda parts, _: [rearrange(parts[0], "d c h w -> d (h w c)")], _write_image_kernel
)
"""The patch embedding as a two-dimensional convolution, and as a linear layer on patches."""

CLIP_KERNEL = Change(
    lambda parts, _: [rearrange(parts[0], "d c t h w -> d (t h w c)")], _write_clip_kernel
)
"""The same of patches of several frames."""

STACKED = Change(lambda parts, _: [torch.cat(list(parts))], lambda parts, _: parts[0].chunk(3))
"""Three linear layers, of queries, keys and values; in ours one."""

PARTED = Change(lambda parts, _: parts[0].chunk(3), lambda parts, _: [torch.cat(list(parts))])
"""One bias of queries, keys and values; in ours three."""


def _without_keys(parts: Parts, _: Cut) -> Parts:
    queries, _keys, values = parts[0].chunk(3)
    return [queries, values]


WITHOUT_KEYS = Change(
    _without_keys,
    lambda parts, _: [torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])],
)
"""One bias of queries, keys and values; in ours one of queries and one of values."""

NO_KEY_BIAS = "a bias on keys shifts all scores of a query alike, which the softmax ignores"


def _fold(parts: Parts, cut: Cut) -> Parts:
    if parts[0].shape[:1] != (cut.values,):
        raise ValueError(f"an output for each value of a patch, {cut.values}, is to be averaged")
    return [parts[0].double().mean(dim=0, keepdim=True).to(parts[0].dtype)]


def _unfold(parts: Parts, cut: Cut) -> Parts:
    return [parts[0].expand(cut.values, *parts[0].shape[1:]).contiguous()]


FOLDED = Change(_fold, _unfold)
"""A linear layer whose outputs are averaged, and the layer that it is: with the mean weights."""


# --- The tables ---------------------------------------------------------------------------------


def _both(theirs: str, ours: str) -> list[Rule]:
    """Weight and bias of a layer."""
    return [_rule(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def _rule(theirs: str, ours: str, change: Change = SAME) -> Rule:
    return Rule((theirs,), (ours,), change)


def _patches(theirs: str, kernel: Change) -> list[Rule]:
    return [
        _rule(f"{theirs}.weight", "patch_embed.weight", kernel),
        _rule(f"{theirs}.bias", "patch_embed.bias"),
    ]


TIMM_LAYERS = {
    "norm1": "norm1",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
"""Layers of a block in timm, MAE, HPM and VideoMAE, and in ours."""

TRANSFORMERS_LAYERS = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.0",
    "output.dense": "mlp.2",
}
"""In transformers, as files of every version have them."""

TRANSFORMERS_5_LAYERS = {"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
"""In models of transformers 5, where they are called otherwise."""

PARTS = ("q", "k", "v")


def _blocks(
    theirs: str, ours: str, layers: Mapping[str, str], attention: Iterable[Rule]
) -> list[Rule]:
    """The rules of all blocks; names in ``attention`` are those within a block."""
    within = [rule for name, own in layers.items() for rule in _both(name, own)]
    return [
        replace(
            rule,
            theirs=tuple(f"{theirs}.{{}}.{name}" for name in rule.theirs),
            ours=tuple(f"{ours}.{{}}.{name}" for name in rule.ours),
        )
        for rule in (*within, *attention)
    ]


FUSED = _rule("attn.qkv.weight", "attn.qkv.weight")
THREE_BIASES = tuple(f"attn.{part}_bias" for part in PARTS)
MAE_ATTENTION = [FUSED, Rule(("attn.qkv.bias",), THREE_BIASES, PARTED)]
VIDEOMAE_ATTENTION = [
    FUSED,
    _rule("attn.q_bias", "attn.q_bias"),
    _rule("attn.v_bias", "attn.v_bias"),
    Rule(("attn.qkv.bias",), ("attn.q_bias", "attn.v_bias"), WITHOUT_KEYS, NO_KEY_BIAS),
]


def _separate(names: Sequence[str], biases: Iterable[str] = PARTS) -> list[Rule]:
    """Attention with a layer each for queries, keys and values."""
    of_parts = dict(zip(PARTS, names, strict=True))
    weights = tuple(f"{name}.weight" for name in names)
    return [
        Rule(weights, ("attn.qkv.weight",), STACKED),
        *(_rule(f"{of_parts[part]}.bias", f"attn.{part}_bias") for part in biases),
    ]


OF_TRANSFORMERS = [f"attention.attention.{name}" for name in ("query", "key", "value")]
OF_TRANSFORMERS_5 = [f"attention.{part}_proj" for part in PARTS]


def _blocks_of_transformers(theirs: str, theirs_in_5: str, ours: str) -> list[Rule]:
    return [
        *_blocks(theirs, ours, TRANSFORMERS_LAYERS, _separate(OF_TRANSFORMERS)),
        *_blocks(
            theirs_in_5,
            ours,
            TRANSFORMERS_LAYERS | TRANSFORMERS_5_LAYERS,
            _separate(OF_TRANSFORMERS_5),
        ),
    ]


def _blocks_of_transformers_videomae(theirs: str, ours: str) -> list[Rule]:
    attention = [
        *_separate(OF_TRANSFORMERS, biases=()),
        *(_rule(f"attention.attention.{part}_bias", f"attn.{part}_bias") for part in "qv"),
        *_separate(OF_TRANSFORMERS, biases=("q", "v"))[1:],
    ]
    return _blocks(theirs, ours, TRANSFORMERS_LAYERS, attention)


def _layout(*rules: Iterable[Rule], **options: tuple[object, ...]) -> Layout:
    every = dict.fromkeys(rule for group in rules for rule in group)
    return Layout(tuple(every), **options)  # type: ignore[arg-type]


RECONSTRUCTOR = "reconstructor.transformer"
PREDICTOR = "difficulty_decoder.transformer"
OF_DECODER = "it is the decoder's, and only the encoder is taken"

_VIT = [
    _rule("cls_token", "class_token", TOKEN),
    *_patches("patch_embed.proj", IMAGE_KERNEL),
    *_blocks("blocks", "encoder.blocks", TIMM_LAYERS, MAE_ATTENTION),
    *_both("norm", "encoder.norm"),
]
_MAE_DECODER = [
    _rule("mask_token", "mask_token", TOKEN),
    *_both("decoder_embed", "to_decoder"),
    *_blocks("decoder_blocks", f"{RECONSTRUCTOR}.blocks", TIMM_LAYERS, MAE_ATTENTION),
    *_both("decoder_norm", f"{RECONSTRUCTOR}.norm"),
    *_both("decoder_pred", "reconstructor.head"),
]
_HPM_PREDICTOR = [
    *_blocks("decoder_blocks_losspred", f"{PREDICTOR}.blocks", TIMM_LAYERS, MAE_ATTENTION),
    *_both("decoder_norm_losspred", f"{PREDICTOR}.norm"),
    _rule("decoder_pred_losspred.weight", "difficulty_decoder.head.weight", FOLDED),
    _rule("decoder_pred_losspred.bias", "difficulty_decoder.head.bias", FOLDED),
]
_HEAD = [*_both("fc_norm", "pooling.norm"), *_both("head", "head")]
_IMAGE_TABLE = PositionTable(("pos_embed",), "encoder", "pos_embed")
_MAE_TABLES = (
    _IMAGE_TABLE,
    PositionTable(("decoder_pos_embed",), "decoder", "decoder_pos_embed"),
)

VIT = _layout(_VIT, _HEAD, tables=(_IMAGE_TABLE,))
"""timm's vision transformer, MAE's encoder, and MAE after fine-tuning."""
MAE = _layout(_VIT, _MAE_DECODER, tables=_MAE_TABLES)
HPM = _layout(_VIT, _MAE_DECODER, _HPM_PREDICTOR, tables=_MAE_TABLES)

MAE_ST = _layout(
    [_rule("cls_token", "class_token", TOKEN)],
    _patches("patch_embed.proj", CLIP_KERNEL),
    _blocks("blocks", "encoder.blocks", TIMM_LAYERS, _separate([f"attn.{part}" for part in PARTS])),
    _both("norm", "encoder.norm"),
    tables=(
        PositionTable(("pos_embed_spatial", "pos_embed_temporal"), "encoder", "pos_embed_class"),
    ),
    left_out=(
        LeftOut(
            r"decoder_.+|mask_token|pred_head\..+",
            "its decoder has a class token and positions of its own, which ours has not",
        ),
    ),
)
"""Meta's masked autoencoder of video. Its decoder cannot be ours."""
MAE_ST_CLASSIFIER = replace(MAE_ST, rules=(*MAE_ST.rules, *_both("head", "head")))

_CLIP_ENCODER = [
    *_patches("patch_embed.proj", CLIP_KERNEL),
    *_blocks("blocks", "encoder.blocks", TIMM_LAYERS, VIDEOMAE_ATTENTION),
    *_both("norm", "encoder.norm"),
]
VIDEOMAE_FINETUNED = _layout(_CLIP_ENCODER, _HEAD)
"""VideoMAE's classifier, or its encoder alone."""
VIDEOMAE = _layout(
    Layout(tuple(_CLIP_ENCODER)).under("encoder.").rules,
    [
        _rule("mask_token", "mask_token", TOKEN),
        _rule("encoder_to_decoder.weight", "to_decoder.weight"),
    ],
    _blocks("decoder.blocks", f"{RECONSTRUCTOR}.blocks", TIMM_LAYERS, VIDEOMAE_ATTENTION),
    _both("decoder.norm", f"{RECONSTRUCTOR}.norm"),
    _both("decoder.head", "reconstructor.head"),
)

_TRANSFORMERS_CLIPS = [
    *_patches("embeddings.patch_embeddings.projection", CLIP_KERNEL),
    *_blocks_of_transformers_videomae("encoder.layer", "encoder.blocks"),
    *_both("layernorm", "encoder.norm"),
]
TRANSFORMERS_VIDEOMAE_ENCODER = _layout(_TRANSFORMERS_CLIPS)
_UNDER_VIDEOMAE = TRANSFORMERS_VIDEOMAE_ENCODER.under("videomae.").rules
TRANSFORMERS_VIDEOMAE_CLASSIFIER = _layout(
    _UNDER_VIDEOMAE, _both("fc_norm", "pooling.norm"), _both("classifier", "head")
)
TRANSFORMERS_VIDEOMAE = _layout(
    _UNDER_VIDEOMAE,
    [
        _rule("mask_token", "mask_token", TOKEN),
        _rule("encoder_to_decoder.weight", "to_decoder.weight"),
    ],
    _blocks_of_transformers_videomae("decoder.decoder_layers", f"{RECONSTRUCTOR}.blocks"),
    _both("decoder.norm", f"{RECONSTRUCTOR}.norm"),
    _both("decoder.head", "reconstructor.head"),
)

_TRANSFORMERS_TABLE = PositionTable(
    ("embeddings.position_embeddings",), "encoder", "embeddings.position_embeddings"
)
TRANSFORMERS_VIT_ENCODER = _layout(
    [_rule("embeddings.cls_token", "class_token", TOKEN)],
    _patches("embeddings.patch_embeddings.projection", IMAGE_KERNEL),
    _blocks_of_transformers("encoder.layer", "layers", "encoder.blocks"),
    _both("layernorm", "encoder.norm"),
    tables=(_TRANSFORMERS_TABLE,),
    left_out=(
        LeftOut(r"pooler\..+", "our encoder ends with its norm"),
        LeftOut(r"embeddings\.mask_token", "our encoder sees no hidden patches"),
    ),
)
_UNDER_VIT = TRANSFORMERS_VIT_ENCODER.under("vit.")
TRANSFORMERS_VIT_CLASSIFIER = replace(
    _UNDER_VIT, rules=(*_UNDER_VIT.rules, *_both("classifier", "head"))
)
TRANSFORMERS_VITMAE = replace(
    _layout(
        _UNDER_VIT.rules,
        [_rule("decoder.mask_token", "mask_token", TOKEN)],
        _both("decoder.decoder_embed", "to_decoder"),
        _blocks_of_transformers(
            "decoder.decoder_layers", "decoder.decoder_layers", f"{RECONSTRUCTOR}.blocks"
        ),
        _blocks_of_transformers(
            "decoder.decoder_encoder.layer", "decoder.decoder_layers", f"{RECONSTRUCTOR}.blocks"
        ),
        _both("decoder.decoder_norm", f"{RECONSTRUCTOR}.norm"),
        _both("decoder.decoder_pred", "reconstructor.head"),
    ),
    tables=(
        *_UNDER_VIT.tables,
        PositionTable(("decoder.decoder_pos_embed",), "decoder", "decoder.decoder_pos_embed"),
    ),
    left_out=_UNDER_VIT.left_out,
)


# --- Reading and writing ------------------------------------------------------------------------


@dataclass(frozen=True)
class Renamed:
    """Tensors by our names, and what became of the others."""

    layout: Layout
    tensors: Tensors
    tables: Tensors
    """Of positions, by their own names."""
    left_out: dict[str, str]
    """Names that have no place here, each with the reason."""


def to_ours(layout: Layout, tensors: Mapping[str, Tensor], cut: Cut) -> Renamed:
    """Their tensors by our names. Every one of them is used, or left out with a reason.

    Raises:
        CheckpointError: there are some that the layout does not know, or a part is missing of what
            is one tensor here, or two say the same. Each is named.
    """
    found: Tensors = {}
    used: dict[str, str] = {}
    wrong: list[str] = []
    for rule in layout.rules:
        for block in _blocks_that_have(rule, tensors):
            theirs = [name.format(block) for name in rule.theirs]
            if any(name not in tensors for name in theirs):
                wrong += [f"missing {name}" for name in theirs if name not in tensors]
                used |= dict.fromkeys(theirs, "")
                continue
            ours = [name.format(block) for name in rule.ours]
            wrong += [f"{name} is given twice, by {theirs[0]}" for name in ours if name in found]
            try:
                found |= zip(
                    ours, rule.change.read([tensors[name] for name in theirs], cut), strict=True
                )
            except (EinopsError, RuntimeError, ValueError):
                wrong += [f"misshapen {name} {tuple(tensors[name].shape)}" for name in theirs]
            used |= dict.fromkeys(theirs, rule.loses)
    names = [name for table in layout.tables for name in (*table.theirs, table.first_row) if name]
    tables = {name: tensors[name] for name in names if name in tensors}
    left_out = {name: f"in part: {reason}" for name, reason in used.items() if reason}
    rest = {name: _left_out(layout, name) for name in tensors.keys() - used.keys() - tables.keys()}
    left_out |= {name: rest[name] for name in tensors if rest.get(name)}
    wrong += [
        f"unknown {name} {tuple(tensors[name].shape)}" for name in tensors if rest.get(name) == ""
    ]
    if wrong:
        raise CheckpointError("\n  ".join(["these tensors do not fit the layout:", *wrong]))
    return Renamed(layout, found, tables, left_out)


def _left_out(layout: Layout, name: str) -> str:
    """Why a tensor has no place here; empty where nothing is known of it."""
    reasons = [left.reason for left in layout.left_out if re.fullmatch(left.pattern, name)]
    return reasons[0] if reasons else ""


def to_theirs(layout: Layout, tensors: Mapping[str, Tensor], cut: Cut) -> Tensors:
    """Our tensors by their names; tables of positions are not among them.

    Raises:
        CheckpointError: the layout has no place for one of them; each is named.
    """
    found: Tensors = {}
    done: set[str] = set()
    for rule in layout.rules:
        for block in _blocks_that_have(replace(rule, theirs=rule.ours), tensors):
            ours = [name.format(block) for name in rule.ours]
            if any(name in done or name not in tensors for name in ours):
                continue
            theirs = [name.format(block) for name in rule.theirs]
            parts = rule.change.write([tensors[name] for name in ours], cut)
            found |= zip(theirs, (part.contiguous() for part in parts), strict=True)
            done |= set(ours)
    without = [name for name in tensors if name not in done]
    if without:
        raise CheckpointError("\n  ".join(["the layout has no place for these tensors:", *without]))
    return found


def _blocks_that_have(rule: Rule, tensors: Mapping[str, Tensor]) -> list[str]:
    """Numbers of the blocks that have any of the tensors of a rule; of a rule of none, ``""``."""
    patterns = [re.escape(name).replace(r"\{\}", r"(\d+)") for name in rule.theirs]
    if not any("{}" in name for name in rule.theirs):
        return [""] if any(name in tensors for name in rule.theirs) else []
    blocks = [
        match[1]
        for name in tensors
        for pattern in patterns
        if (match := re.fullmatch(pattern, name))
    ]
    return list(dict.fromkeys(blocks))
