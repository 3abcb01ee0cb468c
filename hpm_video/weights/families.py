"""Whose weights a file holds: recognised by the names and axes of its tensors, never guessed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hpm_video.config.choices import Conventions, Positions
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights import layouts
from hpm_video.weights.files import Source, Tensors
from hpm_video.weights.layouts import Layout

Holds = Literal["autoencoder", "encoder", "classifier"]
"""What a file holds: encoder and decoder, an encoder alone, or an encoder with a head."""

NON_COMMERCIAL = "CC-BY-NC 4.0: no commercial use, name the authors"
LICENCES = {
    "hpm": "HPM's code is Apache-2.0 and derived from MAE, which is CC-BY-NC 4.0; of the weights "
    "its authors say nothing: take them as CC-BY-NC 4.0",
    "mae": f"MAE's weights are {NON_COMMERCIAL}",
    "mae_st": f"Meta's weights of MAE for video are {NON_COMMERCIAL}",
    "vit": "MAE's encoders and fine-tuned models have these names too, and MAE's weights are "
    f"{NON_COMMERCIAL}; of timm's models each has its own licence, see its card",
    "videomae": f"the weights of VideoMAE and VideoMAE V2 are {NON_COMMERCIAL}",
    "transformers_videomae": f"if these descend from VideoMAE: its weights are {NON_COMMERCIAL}",
    "transformers_vitmae": f"if these descend from MAE: its weights are {NON_COMMERCIAL}",
    "transformers_vit": "each model has its own licence, see its card; if these descend from MAE: "
    f"its weights are {NON_COMMERCIAL}",
    "ours": "that of what it was trained on and began with; this project's code is Apache-2.0",
}
"""What is known of the licences of weights, by kind of family."""

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "videomae.", "vit.")
"""That all names of a file may begin with: of wrappers, and of a part that was saved by itself."""
OF_PARTS = ("backbone.", "encoder.")
"""Those that the names of a part may begin with beside a head that has none."""
WRAPPERS = ("state_dict", "model_state", "module", "model", "")
"""Keys of the state dict in a file, the first that is there is taken."""
TEACHERS = ("ema_state_dict",)
"""Key of the teacher beside a student's state dict."""
SHOWN = 12
"""Names that are told of a file that is not recognised."""


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind of one project."""

    name: str
    says: str
    """What they are."""
    holds: Holds
    licence: str
    layout: Layout
    kernel: str
    """Weight of their patch embedding."""
    axes: int
    """Of that weight: 4 of images, 5 of clips, 2 of ours."""
    has: tuple[str, ...] = ()
    """Further tensors that all of them have."""
    lacks: tuple[str, ...] = ()
    """Tensors that none of them has."""
    conventions: Conventions = "videomae"
    positions: Positions = "sequence"
    target: TargetKind = "per_channel"
    """Of pre-training, unless the file says otherwise."""
    peer: str = ""
    """What such models are in another project: a class of transformers, or timm."""
    class_token: bool = False
    """Whether all of them have one."""
    head_is_told: bool = True
    """Whether its tensors tell what a head stands on."""
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Of the pixels, unless the file says otherwise; ImageNet's if none."""

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors with these names may be of this family."""
        return (
            self.kernel in tensors
            and tensors[self.kernel].ndim == self.axes
            and all(name in tensors for name in self.has)
            and not any(name in tensors for name in self.lacks)
        )


_HF = "embeddings.patch_embeddings.projection.weight"
_PATCHES = "patch_embed.proj.weight"
_QKV = "blocks.0.attn.qkv.weight"
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_45 = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))

FAMILIES = (
    Family(
        *("hpm", "official HPM of images", "autoencoder", "hpm", layouts.HPM, _PATCHES, 4),
        has=(_QKV, "decoder_pred.weight", "decoder_pred_losspred.weight"),
        conventions="mae",
        positions="space_time",
        target="raw",
        peer="ViTMAEForPreTraining",
        class_token=True,
    ),
    Family(
        *("mae", "MAE pre-training", "autoencoder", "mae", layouts.MAE, _PATCHES, 4),
        has=(_QKV, "decoder_pred.weight"),
        lacks=("decoder_pred_losspred.weight",),
        conventions="mae",
        positions="space_time",
        target="joint",
        peer="ViTMAEForPreTraining",
        class_token=True,
    ),
    Family(
        *("vit", "encoder of MAE or timm's ViT", "encoder", "vit", layouts.VIT, _PATCHES, 4),
        has=(_QKV,),
        lacks=("decoder_pred.weight", "head.weight"),
        conventions="mae",
        positions="space_time",
        target="joint",
        peer="timm",
    ),
    Family(
        "vit_classifier",
        "classifier of images: MAE fine-tuned, or timm's ViT",
        *("classifier", "vit", layouts.VIT, _PATCHES, 4),
        has=(_QKV, "head.weight"),
        lacks=("decoder_pred.weight",),
        conventions="mae",
        positions="space_time",
        target="joint",
        peer="timm",
    ),
    Family(
        "mae_st",
        "encoder of Meta's MAE for video",
        *("encoder", "mae_st", layouts.MAE_ST, _PATCHES, 5),
        has=("blocks.0.attn.q.weight",),
        lacks=("head.weight",),
        conventions="mae",
        positions="space_time",
        target="joint",
        peer="timm's blocks",
        class_token=True,
        mean_and_std=_45,
    ),
    Family(
        "mae_st_classifier",
        "classifier of clips: Meta's MAE for video, fine-tuned",
        *("classifier", "mae_st", layouts.MAE_ST_CLASSIFIER, _PATCHES, 5),
        has=("blocks.0.attn.q.weight", "head.weight"),
        conventions="mae",
        positions="space_time",
        target="joint",
        peer="timm's blocks",
        class_token=True,
        head_is_told=False,
        mean_and_std=_45,
    ),
    Family(
        "videomae",
        "VideoMAE pre-training, first or second version",
        *("autoencoder", "videomae", layouts.VIDEOMAE, f"encoder.{_PATCHES}", 5),
        has=(f"encoder.{_QKV}", "encoder_to_decoder.weight"),
        peer="VideoMAEForPreTraining",
    ),
    Family(
        "videomae_encoder",
        "encoder of VideoMAE, first or second version",
        *("encoder", "videomae", layouts.VIDEOMAE_FINETUNED, _PATCHES, 5),
        has=(_QKV,),
        lacks=("head.weight",),
        peer="VideoMAEModel",
    ),
    Family(
        "videomae_classifier",
        "VideoMAE fine-tuned or distilled, first or second version",
        *("classifier", "videomae", layouts.VIDEOMAE_FINETUNED, _PATCHES, 5),
        has=(_QKV, "head.weight"),
        peer="VideoMAEForVideoClassification",
    ),
    Family(
        "transformers_videomae",
        "VideoMAEForPreTraining of transformers",
        *("autoencoder", "transformers_videomae", layouts.TRANSFORMERS_VIDEOMAE),
        *(f"videomae.{_HF}", 5),
        has=("encoder_to_decoder.weight",),
        peer="VideoMAEForPreTraining",
    ),
    Family(
        "transformers_videomae_classifier",
        "VideoMAEForVideoClassification of transformers",
        *("classifier", "transformers_videomae", layouts.TRANSFORMERS_VIDEOMAE_CLASSIFIER),
        *(f"videomae.{_HF}", 5),
        has=("classifier.weight",),
        peer="VideoMAEForVideoClassification",
    ),
    Family(
        "transformers_videomae_encoder",
        "VideoMAEModel of transformers",
        *("encoder", "transformers_videomae", layouts.TRANSFORMERS_VIDEOMAE_ENCODER, _HF, 5),
        peer="VideoMAEModel",
    ),
    Family(
        "transformers_vitmae",
        "ViTMAEForPreTraining of transformers",
        *("autoencoder", "transformers_vitmae", layouts.TRANSFORMERS_VITMAE, f"vit.{_HF}", 4),
        has=("decoder.decoder_pred.weight",),
        conventions="mae",
        positions="space_time",
        target="raw",
        peer="ViTMAEForPreTraining",
    ),
    Family(
        "transformers_vit_classifier",
        "ViTForImageClassification of transformers",
        *("classifier", "transformers_vit", layouts.TRANSFORMERS_VIT_CLASSIFIER),
        *(f"vit.{_HF}", 4),
        has=("classifier.weight",),
        conventions="mae",
        positions="space_time",
        mean_and_std=_HALF,
        peer="ViTForImageClassification",
    ),
    Family(
        "transformers_vit_encoder",
        "ViTModel or ViTMAEModel of transformers",
        *("encoder", "transformers_vit", layouts.TRANSFORMERS_VIT_ENCODER, _HF, 4),
        conventions="mae",
        positions="space_time",
        target="joint",
        peer="ViTModel",
    ),
    Family(
        "ours",
        "pre-training with this package",
        *("autoencoder", "ours", Layout(()), "patch_embed.weight", 2),
        has=("to_decoder.weight",),
    ),
    Family(
        "ours_classifier",
        "classifier of this package",
        *("classifier", "ours", Layout(()), "patch_embed.weight", 2),
        has=("head.weight",),
        lacks=("to_decoder.weight",),
    ),
)


@dataclass(frozen=True)
class Recognised:
    """The tensors of a file, and whose they are."""

    family: Family
    tensors: Tensors
    """By the names of the family, without prefixes."""
    entry: str
    """Their key in the file."""
    prefix: str
    """What their names began with."""
    with_prefix: int
    """How many of them began so."""
    teacher: Tensors | None = None

    def told(self) -> list[str]:
        """The prefix, in a line for the terminal, where there is one."""
        if not self.prefix:
            return []
        count = self.with_prefix
        who = "all names" if count == len(self.tensors) else f"{count} of {len(self.tensors)} names"
        return [f"{who} begin with {self.prefix!r}, which is left out"]


def recognise(source: Source, entry: str | None = None) -> Recognised:
    """Whose weights a file holds. ``entry``: the key of its state dict, where there are several.

    Raises:
        CheckpointError: it is of no family that is known, or may be of several. What was seen in
            the file is told.
    """
    key = _choose(source, entry)
    bare, prefix, with_prefix, family = _family_of(source, key)
    teacher = None
    if entry is None and family.holds == "autoencoder":
        for name in TEACHERS:
            if name in source.entries and name != key:
                of_teacher, _, _, same = _family_of(source, name)
                if same is not family:
                    raise CheckpointError(
                        f"{source.path} holds {family.says} under {key!r} and {same.says} under "
                        f"{name!r}; give one of them: --entry {key}"
                    )
                teacher = of_teacher
    return Recognised(family, bare, key, prefix, with_prefix, teacher)


def _choose(source: Source, entry: str | None) -> str:
    there = ", ".join(repr(name) for name in source.entries)
    if entry is not None:
        if entry not in source.entries:
            raise CheckpointError(f"{source.path} has no state dict {entry!r}, but {there}")
        return entry
    known = [name for name in WRAPPERS if name in source.entries]
    if known:
        return known[0]
    if len(source.entries) == 1:
        return next(iter(source.entries))
    raise CheckpointError(f"{source.path} holds several state dicts: {there}; choose with --entry")


def _family_of(source: Source, entry: str) -> tuple[Tensors, str, int, Family]:
    """-> tensors without their prefix, that prefix, how many names had it, whose they are"""
    tensors, prefix = source.entries[entry], ""
    while not (fit := _fitting(tensors)):
        found = [each for each in PREFIXES if all(name.startswith(each) for name in tensors)]
        if not found:
            return _with_some_prefixed(source, entry, tensors, prefix)
        prefix += found[0]
        tensors = _stripped(tensors, found[0])
    return tensors, prefix, len(tensors), _the_only(source, fit)


def _with_some_prefixed(
    source: Source, entry: str, tensors: Tensors, before: str
) -> tuple[Tensors, str, int, Family]:
    """The same where only a part of a model has a prefix, and a head beside it has none."""
    for prefix in OF_PARTS:
        stripped = _stripped(tensors, prefix)
        fit = _fitting(stripped)
        if fit and len(stripped) == len(tensors):
            count = sum(name.startswith(prefix) for name in tensors)
            return stripped, before + prefix, count, _the_only(source, fit)
    raise CheckpointError(_unknown(source, entry, tensors))


def _fitting(tensors: Tensors) -> list[Family]:
    return [family for family in FAMILIES if family.fits(tensors)]


def _stripped(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _the_only(source: Source, fit: list[Family]) -> Family:
    if len(fit) > 1:
        raise CheckpointError(
            f"{source.path} may be {' or '.join(family.says for family in fit)}: it has tensors "
            f"of both; save the state dict of one model alone"
        )
    return fit[0]


def _unknown(source: Source, entry: str, tensors: Tensors) -> str:
    kinds: dict[str, tuple[int, ...]] = {}
    for name, value in tensors.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), tuple(value.shape))
    shown = [f"{name} {shape}" for name, shape in list(kinds.items())[:SHOWN]]
    if len(kinds) > SHOWN:
        shown.append(f"and {len(kinds) - SHOWN} more kinds of names")
    where = f" under {entry!r}" if entry else ""
    known = ", ".join(family.name for family in FAMILIES)
    return (
        f"{source.path} holds weights{where} of no family that is known ({known}). Its tensors:\n  "
        + "\n  ".join(shown)
        + "\nKnown are plain vision transformers alone, without layer scale, relative positions "
        "or registers."
    )
