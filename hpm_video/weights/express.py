"""Models of ours by the names of other projects, where these can be what ours is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hpm_video.config.choices import Positions
from hpm_video.files.weights import CheckpointError
from hpm_video.models.positions import position_table
from hpm_video.weights.families import FAMILIES, OURS, Family, read_ours
from hpm_video.weights.files import Tensors
from hpm_video.weights.layouts import TABLES, Layout, write
from hpm_video.weights.model import TrainedModel

To = Literal["transformers", "timm", "mae", "videomae", "hpm", "onnx", "file"]
SAME_POSITIONS = 1e-5
PARTS: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
"""Of whose tokens the tables of positions are."""
ANY = "--to file takes every model, --to onnx every classifier"
BATCH_NORM_EPS = 1e-6
PIXELS = ("raw", "joint", "per_channel")
"""Targets that are pixels, and not features."""
SAYS: dict[tuple[To, bool], str] = {
    ("mae", True): "MAE's classifier",
    ("mae", False): "MAE's pre-training",
    ("videomae", True): "VideoMAE's classifier",
    ("videomae", False): "VideoMAE's pre-training",
    ("hpm", False): "official HPM",
    ("timm", True): "timm's vision transformer",
    ("timm", False): "timm's vision transformer",
    ("onnx", True): "a program of ONNX",
    ("onnx", False): "a program of ONNX",
    ("file", True): "one file of this package",
    ("file", False): "one file of this package",
}
"""What a masked autoencoder (false) or a classifier becomes; in transformers its class there."""
NO_PREDICTOR = "the loss predictor is of hard patches mining alone"
NO_DECODER = "it belongs to the decoder, and this is an encoder"
NO_KEY_BIAS = "a bias on keys, which this has not; the softmax ignores it, so that nothing changes"


@dataclass(frozen=True)
class Expressed:
    """A model of ours by the names of another project."""

    family: Family
    tensors: Tensors
    left_out: dict[str, str]
    """Parts of ours that have no place there, each with the reason."""
    notes: tuple[str, ...]
    """What was made otherwise, with the same result."""
    says: str
    """What it becomes."""


def family_for(model: TrainedModel, to: To) -> Family:
    """Return what a model becomes. In transformers a class token is MAE's, and none VideoMAE's."""
    ends = "_classifier" if model.is_classifier else ""
    if to == "transformers" and model.config.model.class_token:
        return FAMILIES["transformers_vit_classifier" if ends else "transformers_vitmae"]
    beginnings = {"transformers": "transformers_videomae", "timm": "vit", "videomae": "videomae"}
    if to in beginnings:
        return FAMILIES[beginnings[to] + ends]
    if to == "mae" and ends:
        return FAMILIES["vit_classifier"]
    return FAMILIES[to] if to in FAMILIES else FAMILIES["ours" + ends]


def obstacles(model: TrainedModel, to: To) -> list[str]:
    """Return why a model cannot be expressed, each with a remedy; nothing where it can."""
    if to == "onnx" and not model.is_classifier:
        return [
            "it is of pre-training, and this takes classifiers; fine-tune it first "
            "(./run_finetune.sh CONFIG init_weights=CHECKPOINT)"
        ]
    if to in ("onnx", "file"):
        return []
    of_videomae = family_for(model, to).conventions == "videomae"
    found = list(_unlike_videomae(model) if of_videomae else _unlike_mae(model, to))
    if not model.is_classifier and to != "timm" and model.target not in PIXELS:
        found.append("its decoder predicts features (mining.target), and this has one of pixels")
    _, height, width = model.config.model.patch_size
    if to != "videomae" and height != width:
        found.append("its patches are not square, and those of this are")
    return [reason if ";" in reason else f"{reason}; {ANY}" for reason in found]


def _unlike_videomae(model: TrainedModel) -> Iterator[str]:
    if model.config.model.class_token:
        yield "it has a class token, which VideoMAE has not"
    if not _has_positions(model, "sequence"):
        yield (
            "its tokens have other positions than VideoMAE computes: only model.positions=sequence "
            "can be expressed, of clips of the size of pre-training"
        )
    if model.is_classifier and model.pooling != "mean_norm":
        yield (
            "its head does not stand on the normed mean of the tokens (model.pooling=mean_norm), "
            "as VideoMAE's does"
        )
    if "to_decoder.bias" in model.tensors:
        yield (
            "its layer from encoder to decoder has a bias (model.conventions=mae), and VideoMAE's "
            "has none"
        )


def _unlike_mae(model: TrainedModel, to: To) -> Iterator[str]:
    config, size = model.config.model, model.config.data.clip_size
    of_vit = to == "transformers" and model.is_classifier
    if size[0] != 1 or config.patch_size[0] != 1:
        yield "it takes clips of several frames, and this takes images"
    if to != "timm" and not config.class_token:
        yield "it has no class token, which this needs"
    computed = config.positions == "given" or _has_positions(model, "space_time")
    if to != "timm" and not of_vit and not computed:
        yield (
            "its tokens have other positions than MAE computes: only model.positions=space_time "
            "can be expressed, of images of the size of pre-training, or given ones"
        )
    if of_vit and model.pooling not in ("class_token", "batch_norm"):
        yield (
            "its head does not stand on the class token (model.pooling=class_token), as this one's "
            "does; --to timm takes mean_norm too"
        )
    elif model.pooling == "attentive":
        yield "it pools its tokens by attention (model.pooling=attentive), which this does not"
    if to == "hpm" and not model.has_predictor:
        yield (
            "it has no loss predictor, or is a classifier, and this is of hard patches mining; "
            "--to mae takes the others"
        )
    if to == "transformers" and not of_vit and size[1] != size[2]:
        yield "its frames are not square, and those of this are"


def _has_positions(model: TrainedModel, kind: Positions) -> bool:
    """Whether its tokens have the positions that a model of this kind has of its own clips."""
    usual = position_table(model.grid, model.encoder.dim, kind)
    return (model.positions("encoder") - usual).abs().max().item() <= SAME_POSITIONS


def express(model: TrainedModel, to: To) -> Expressed:
    """Return a model by the names of another project.

    Raises:
        CheckpointError: it cannot be expressed there. Every reason is given.
    """
    family, wrong = family_for(model, to), obstacles(model, to)
    says = SAYS.get((to, model.is_classifier), family.says)
    if wrong:
        raise CheckpointError("\n  ".join([f"{model.path} cannot become {says}:", *wrong]))
    if family.ours:
        return Expressed(family, {}, {}, (), says)
    return replace(by_names_of(family, model), says=says)


def by_timm_names(model: TrainedModel) -> Tensors:
    """Return the tensors of a model by timm's names, its positions among them."""
    tensors = fold_batch_norm(model.tensors) if model.pooling == "batch_norm" else model.tensors
    found = read_ours(tensors, model.config.model.patch_size).tensors
    for table, of in zip(TABLES, PARTS, strict=True):
        if of == "encoder" or model.decoder is not None:
            codes = model.positions(of).unsqueeze(0)
            first = torch.zeros_like(codes[:, : int(model.config.model.class_token)])
            found[table] = torch.cat([first, codes], dim=1)
    return found


def by_names_of(family: Family, model: TrainedModel, tensors: Tensors | None = None) -> Expressed:
    """Return a model by the names of a family, whether or not this has such models.

    ``tensors``: by timm's names, by default those of the model.
    """
    layout, ours, notes = family.layout, model.tensors, []
    if model.pooling == "batch_norm":
        ours = fold_batch_norm(ours)
        notes.append("the batch norm before the head is folded into the head")
    tensors = by_timm_names(model) if tensors is None else tensors
    tensors = {name: value for name, value in tensors.items() if layout.theirs(name)}
    filled = 0
    if layout.key_bias and not any(name.endswith(".k_bias") for name in ours):
        filled = sum(name.endswith(".attn.qkv.bias") for name in tensors)
    weight = tensors.get("to_decoder.weight")
    if family.conventions == "mae" and weight is not None and "to_decoder.bias" not in tensors:
        tensors["to_decoder.bias"] = weight.new_zeros(len(weight))
        filled += 1
    if filled:
        notes.append(f"biases that this has and ours has not are 0 ({filled} tensors)")
    if model.pretraining and model.pretraining.mix:
        notes.append(
            f"of the clips that it was pre-trained on, this knows those of the main source alone, "
            f"not those of {', '.join(model.pretraining.mix)}"
        )
    left_out = _left_out(layout, ours)
    return Expressed(family, write(layout, tensors), left_out, tuple(notes), family.says)


def _left_out(layout: Layout, ours: Tensors) -> dict[str, str]:
    """Tell why tensors of ours have no place in a layout."""
    found: dict[str, str] = {}
    for name in ours:
        timm = OURS.timm(name)
        if timm not in TABLES and not layout.theirs(timm):
            found[name] = NO_PREDICTOR if timm.startswith("difficulty_decoder.") else NO_DECODER
        elif name.endswith(".k_bias") and not layout.key_bias:
            found[name] = NO_KEY_BIAS
    return found


def fold_batch_norm(tensors: Tensors) -> Tensors:
    """Return a head behind a batch norm as a head alone, which computes the same in use."""
    kept = {name: value for name, value in tensors.items() if not name.startswith("pooling.")}
    mean = tensors["pooling.norm.running_mean"].double()
    scale = (tensors["pooling.norm.running_var"].double() + BATCH_NORM_EPS).sqrt()
    weight = tensors["head.weight"].double() / scale
    bias = tensors["head.bias"].double() - weight @ mean
    return kept | {"head.weight": weight.float(), "head.bias": bias.float()}
