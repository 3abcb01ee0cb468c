"""Models of ours by the names of other projects, where these have such models."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hpm_video.config.choices import Positions
from hpm_video.files.weights import CheckpointError
from hpm_video.models.from_config import source_grid_of
from hpm_video.models.positions import position_table, resize_positions
from hpm_video.recognition.trained_model import OF_DECODERS, TrainedModel
from hpm_video.tokens.grid import TokenGrid
from hpm_video.weights.families import FAMILIES, TABLES, Family
from hpm_video.weights.files import Tensors

To = Literal["transformers", "timm", "mae", "videomae", "hpm", "onnx", "file"]
SAME_POSITIONS = 1e-5
ANY = "--to file takes every model, --to onnx every classifier"
POSITIONS_OF = "positions as model.positions={} computes them for {} of the size of pre-training"
BATCH_NORM_EPS = 1e-6
NO_PREDICTOR = "the loss predictor is of hard patches mining alone"
NO_DECODER = "it belongs to the decoder, and this is an encoder"
NO_KEY_BIAS = "in part: a bias on keys, which this has not; the softmax ignores it"


@dataclass(frozen=True)
class Expressed:
    """A model of ours by the names of another project."""

    family: Family
    tensors: Tensors
    left_out: dict[str, str]
    """Parts of ours that have no place there, each with the reason."""
    notes: tuple[str, ...]
    """What differs there, with the same result."""


def family_for(model: TrainedModel, to: To) -> Family:
    """Return what a model becomes. In transformers a class token is MAE's, and none VideoMAE's."""
    if to == "transformers" and model.config.model.class_token:
        begins = "transformers_vit" if model.is_classifier else "transformers_vitmae"
    elif to == "mae" and model.is_classifier:
        begins = "vit"
    else:
        begins = {"transformers": "transformers_videomae", "timm": "vit"}.get(to, to)
    name = f"{begins}_classifier" if model.is_classifier else begins
    return FAMILIES.get(name, FAMILIES["hpm" if to == "hpm" else "ours"])


def obstacles(model: TrainedModel, to: To) -> list[str]:
    """Return why a model cannot be expressed; empty where it can."""
    config, pooling, size = model.config.model, model.pooling, model.config.data.clip_size
    if to == "onnx" and not model.is_classifier:
        return ["it takes classifiers: ./run_finetune.sh CONFIG init_weights=CHECKPOINT makes one"]
    if to in ("onnx", "file"):
        return []
    _, height, width = config.patch_size
    pixels = model.pretraining is None or model.pretraining.mining.pixel_kind
    checks: list[tuple[object, str]] = [
        (to == "videomae" or height == width, "square patches"),
        (to == "timm" or pixels, "decoders of pixels, not of features (mining.target)"),
    ]
    if family_for(model, to).conventions == "videomae":
        checks += [
            (not config.class_token, "no class token (in transformers, of images alone)"),
            (_has_positions(model, "sequence"), POSITIONS_OF.format("sequence", "clips")),
            (pooling in (None, "mean_norm"), "heads on the normed mean (model.pooling=mean_norm)"),
            (
                config.conventions == "videomae" or model.is_classifier,
                "no bias from encoder to decoder (model.conventions=videomae)",
            ),
        ]
        return [f"it takes {what}; {ANY}" for fits, what in checks if not fits]
    of_vit = to == "transformers" and model.is_classifier
    computed = config.positions == "given" or _has_positions(model, "space_time")
    on_token = pooling in ("class_token", "batch_norm")
    predicts = "difficulty_decoder.head.weight" in model.tensors
    checks += [
        (size[0] == config.patch_size[0] == 1, "images, not clips of several frames"),
        (to == "timm" or config.class_token, "models with a class token"),
        (to == "timm" or of_vit or computed, POSITIONS_OF.format("space_time", "images")),
        (not of_vit or on_token, "heads on the class token (model.pooling), and --to timm others"),
        (pooling != "attentive", "no pooling by attention (model.pooling=attentive)"),
        (to != "hpm" or predicts, "models with a loss predictor, and --to mae those without"),
        (to != "transformers" or of_vit or size[1] == size[2], "square frames"),
    ]
    return [f"it takes {what}; {ANY}" for fits, what in checks if not fits]


def tables_of(model: TrainedModel) -> Tensors:
    """Return the positions of the tokens of a model's clips: -> (1, N, D), of its decoder too"""
    config = model.config
    kind, source = config.model.positions, TokenGrid(*source_grid_of(config))
    found: Tensors = {}
    sizes = [config.model.encoder]
    if model.pretraining:
        sizes.append(model.pretraining.model.decoder)
    for table, size in zip(TABLES, sizes, strict=False):
        if kind == "given":
            codes = resize_positions(model.tensors[table][0], source, model.grid)
        else:
            codes = position_table(model.grid, size.dim, kind, source)
        found[table] = codes.unsqueeze(0)
    return found


def _has_positions(model: TrainedModel, kind: Positions) -> bool:
    """Whether its tokens have the positions that a model of this kind has of its own clips."""
    usual = position_table(model.grid, model.config.model.encoder.dim, kind)
    return (tables_of(model)[TABLES[0]] - usual).abs().max().item() <= SAME_POSITIONS


def express(model: TrainedModel, to: To) -> Expressed:
    """Return a model by the names of another project.

    Raises:
        CheckpointError: it cannot be expressed there. Every reason is given.
    """
    family, wrong = family_for(model, to), obstacles(model, to)
    if wrong:
        first = f"{model.path} cannot become what --to {to} writes:"
        raise CheckpointError("\n  ".join([first, *wrong]))
    return Expressed(family, {}, {}, ()) if family.name == "ours" else by_names_of(family, model)


def by_names_of(family: Family, model: TrainedModel) -> Expressed:
    """Return a model by the names of a family, whether or not this has such models."""
    tensors, config = dict(model.tensors), model.config
    notes: list[str] = []
    if model.pooling == "batch_norm":
        tensors = fold_batch_norm(tensors)
        notes.append("the batch norm before the head is folded into the head")
    if family.conventions == "mae":
        first = int(config.model.class_token)
        for name, table in tables_of(model).items():
            tensors[name] = torch.cat([torch.zeros_like(table[:, :first]), table], dim=1)
    weight = tensors.get("decoder_embed.weight")
    decodes = family.holds == "autoencoder" and family.conventions == "mae"
    if decodes and weight is not None and "decoder_embed.bias" not in tensors:
        tensors["decoder_embed.bias"] = weight.new_zeros(len(weight))
        notes.append("a bias that this has and ours has not is 0 (decoder_embed.bias)")
    if model.pretraining and model.pretraining.mix:
        notes.append(
            f"of the clips that it was pre-trained on, this knows those of the main source alone, "
            f"not those of {', '.join(model.pretraining.mix)}"
        )
    reasons = {name: _no_place(family, name, value) for name, value in tensors.items()}
    kept = {name: tensors[name] for name, why in reasons.items() if why in ("", NO_KEY_BIAS)}
    left_out = {name: why for name, why in reasons.items() if why and name not in TABLES}
    return Expressed(family, family.write(kept), left_out, tuple(notes))


def _no_place(family: Family, name: str, value: Tensor) -> str:
    """Return why a family has no place for a tensor, or for a part of it."""
    if name.startswith("difficulty_decoder.") and family.name != "hpm":
        return NO_PREDICTOR
    if name.startswith(OF_DECODERS) and family.holds != "autoencoder":
        return NO_DECODER
    keys = name.endswith(".attn.qkv.bias") and not family.key_bias and value.chunk(3)[1].any()
    return NO_KEY_BIAS if keys else ""


def fold_batch_norm(tensors: Tensors) -> Tensors:
    """Return a head behind a batch norm as a head alone, which computes the same in use."""
    kept = {name: value for name, value in tensors.items() if not name.startswith("head_norm.")}
    mean = tensors["head_norm.running_mean"].double()
    scale = (tensors["head_norm.running_var"].double() + BATCH_NORM_EPS).sqrt()
    weight = tensors["head.weight"].double() / scale
    bias = tensors["head.bias"].double() - weight @ mean
    return kept | {"head.weight": weight.float(), "head.bias": bias.float()}
