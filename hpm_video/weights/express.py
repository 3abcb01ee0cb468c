"""Models of ours as those of other projects: tensors, and the configs beside them."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hpm_video.config.choices import Positions, TransformerSize
from hpm_video.files.weights import CheckpointError
from hpm_video.models.from_config import source_grid_of
from hpm_video.models.positions import position_table, resize_positions
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.recognition.trained_model import OF_DECODERS, TrainedModel
from hpm_video.tokens.grid import TokenGrid
from hpm_video.weights.families import FAMILIES, TABLES, Family
from hpm_video.weights.files import Tensors

To = Literal["transformers", "timm", "mae", "videomae", "hpm", "onnx", "file"]
POSITIONS_OF = "positions as model.positions={} computes them for {} of the size of pre-training"
BATCH_NORM_EPS = 1e-6
NO_KEY_BIAS = "in part: a bias on keys, which this has not; the softmax ignores it"


@dataclass(frozen=True)
class Expressed:
    """A model of ours by the names of another project."""

    family: Family
    tensors: Tensors
    left_out: dict[str, str]  # parts of ours that have no place there, each with the reason
    notes: tuple[str, ...]  # what differs there, with the same result


def family_for(model: TrainedModel, to: To) -> Family:
    """Return what a model becomes. In transformers a class token is MAE's, and none VideoMAE's."""
    if to in ("hpm", "onnx", "file"):
        return FAMILIES["hpm" if to == "hpm" else "ours"]
    name: str = {"timm": "vit", "transformers": "transformers_videomae"}.get(to, to)
    if to == "transformers" and model.config.model.class_token:
        name = "transformers_vit" if model.is_classifier else "transformers_vitmae"
    if model.is_classifier:
        return FAMILIES[f"{'vit' if name == 'mae' else name}_classifier"]
    return FAMILIES[name]


def obstacles(model: TrainedModel, to: To) -> list[str]:
    """Return why a model cannot be expressed; empty where it can."""
    config, pooling, size = model.config.model, model.pooling, model.config.data.clip_size
    if to == "onnx" and not model.is_classifier:
        return ["it takes classifiers: ./run_finetune.sh CONFIG init_weights=CHECKPOINT makes one"]
    if to in ("onnx", "file"):
        return []
    family, (_, height, width) = family_for(model, to), config.patch_size
    pixels = model.pretraining is None or model.pretraining.mining.pixel_kind
    of_vit = family.name == "transformers_vit_classifier"
    checks: list[tuple[object, str]] = [
        (to == "videomae" or height == width, "square patches"),
        (to == "timm" or pixels, "decoders of pixels, not of features (mining.target)"),
    ]
    if family.conventions == "videomae":
        biased = config.conventions == "mae" and not model.is_classifier
        checks += [
            (not config.class_token, "no class token (in transformers, of images alone)"),
            (_has_positions(model, "sequence"), POSITIONS_OF.format("sequence", "clips")),
            (pooling in (None, "mean_norm"), "heads on the normed mean (model.pooling=mean_norm)"),
            (not biased, "no bias from encoder to decoder (model.conventions=videomae)"),
        ]
    else:
        free = to == "timm" or of_vit or config.positions == "given"
        placed = free or _has_positions(model, "space_time")
        on_token = not of_vit or pooling in ("class_token", "batch_norm")
        square = to != "transformers" or of_vit or size[1] == size[2]
        predicts = to != "hpm" or "difficulty_decoder.head.weight" in model.tensors
        checks += [
            (size[0] == config.patch_size[0] == 1, "images, not clips of several frames"),
            (to == "timm" or config.class_token, "models with a class token"),
            (placed, POSITIONS_OF.format("space_time", "images")),
            (on_token, "heads on the class token (model.pooling), and --to timm others"),
            (pooling != "attentive", "no pooling by attention (model.pooling=attentive)"),
            (predicts, "models with a loss predictor, and --to mae those without"),
            (square, "square frames"),
        ]
    every = "--to file takes every model, --to onnx every classifier"
    return [f"it takes {what}; {every}" for fits, what in checks if not fits]


def _tables_of(model: TrainedModel) -> Tensors:
    """Return the positions of the tokens of a model's clips: -> (1, N, D), of its decoder too"""
    kind, source = model.config.model.positions, TokenGrid(*source_grid_of(model.config))
    sizes = [model.config.model.encoder]
    if model.pretraining:
        sizes.append(model.pretraining.model.decoder)
    found: Tensors = {}
    for table, size in zip(TABLES, sizes, strict=False):
        if kind == "given":
            own = resize_positions(model.tensors[table][0], source, model.grid)
        else:
            own = position_table(model.grid, size.dim, kind, source)
        found[table] = own.unsqueeze(0)
    return found


def _has_positions(model: TrainedModel, kind: Positions) -> bool:
    """Whether its tokens have the positions that a model of this kind has of its own clips."""
    usual = position_table(model.grid, model.config.model.encoder.dim, kind)
    return (_tables_of(model)[TABLES[0]] - usual).abs().max().item() <= 1e-5


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
    tensors, notes = dict(model.tensors), list[str]()
    if model.pooling == "batch_norm":  # a head alone computes the same in use
        names = ("running_mean", "running_var", "num_batches_tracked")
        mean, var, _ = (tensors.pop(f"head_norm.{name}").double() for name in names)
        weight = tensors["head.weight"].double() / (var + BATCH_NORM_EPS).sqrt()
        tensors["head.bias"] = (tensors["head.bias"].double() - weight @ mean).float()
        tensors["head.weight"] = weight.float()
        notes.append("the batch norm before the head is folded into the head")
    if family.conventions == "mae":
        first = int(model.config.model.class_token)
        for name, table in _tables_of(model).items():
            tensors[name] = torch.cat([torch.zeros_like(table[:, :first]), table], dim=1)
        if family.holds == "autoencoder" and "decoder_embed.bias" not in tensors:
            tensors["decoder_embed.bias"] = torch.zeros(len(tensors["decoder_embed.weight"]))
            notes.append("a bias that this has and ours has not is 0 (decoder_embed.bias)")
    reasons = {name: _no_place(family, name, value) for name, value in tensors.items()}
    kept = {name: tensors[name] for name, why in reasons.items() if why in ("", NO_KEY_BIAS)}
    left_out = {name: why for name, why in reasons.items() if why and name not in TABLES}
    if family.name == "hpm":
        count = model.config.model.channels * math.prod(model.config.model.patch_size)
        notes.append(
            f"the one output of the loss predictor is written {count} times, as the official model "
            f"has it, which averages them: the same score but for rounding"
            + ("; it has no teacher: that is a copy" if model.teacher is None else "")
        )
    return Expressed(family, family.write(kept), left_out, tuple(notes))


def _no_place(family: Family, name: str, value: Tensor) -> str:
    """Return why a family has no place for a tensor, or for a part of it."""
    if name.startswith("difficulty_decoder.") and family.name != "hpm":
        return "the loss predictor is of hard patches mining alone"
    if name.startswith(OF_DECODERS) and family.holds != "autoencoder":
        return "it belongs to the decoder, and this is an encoder"
    keys = name.endswith(".attn.qkv.bias") and not family.key_bias and value.chunk(3)[1].any()
    return NO_KEY_BIAS if keys else ""


# --- What lies beside the tensors -----------------------------------------------------------------


def facts_of(model: TrainedModel) -> dict[str, Any]:
    """Return the facts of a model by the first of their names, in plain values."""
    config, data = model.config, model.config.data
    height, width = data.frame_size
    facts: dict[str, Any] = {
        "num_attention_heads": config.model.encoder.num_heads,
        "num_frames": data.num_frames,
        "input_size": height if height == width else [height, width],
        "sampling_rate": data.frame_stride,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
        "interpolation": data.interpolation,
        "short_side": data.validation_short_side,
    }
    if pretraining := model.pretraining:
        facts["decoder_num_attention_heads"] = pretraining.model.decoder.num_heads
        facts["norm_pix_loss"] = pretraining.mining.target != "raw"
    return facts


def transformers_config(model: TrainedModel, kind: str) -> dict[str, Any]:
    """Return ``config.json`` of a model of transformers."""
    config, facts = model.config, facts_of(model)
    table: dict[str, Any] = _sizes(config.model.encoder, "") | {
        "image_size": facts["input_size"],
        "patch_size": config.model.patch_size[1],
        "num_channels": config.model.channels,
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    if kind.startswith("VideoMAE"):
        table |= {"num_frames": config.data.num_frames, "tubelet_size": config.model.patch_size[0]}
        table["use_mean_pooling"] = model.is_classifier
    if pretraining := model.pretraining:
        table |= _sizes(pretraining.model.decoder, "decoder_")
        table["norm_pix_loss"] = facts["norm_pix_loss"]
        if not kind.startswith("VideoMAE"):
            table["mask_ratio"] = pretraining.masking.ratio
    else:
        table["id2label"] = dict(enumerate(model.label_names))
        table["label2id"] = {name: i for i, name in table["id2label"].items()}
    return table


def _sizes(size: TransformerSize, part: str) -> dict[str, int]:
    return {
        f"{part}hidden_size": size.dim,
        f"{part}num_hidden_layers": size.depth,
        f"{part}num_attention_heads": size.num_heads,
        f"{part}intermediate_size": size.mlp_dim or 4 * size.dim,
    }


def timm_arguments(model: TrainedModel) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of ``timm.create_model``.

    The name is that of the timm model of this width; all other sizes are given as arguments. The
    time steps of clips lie below each other in one image, and frames of a patch are its channels.
    """
    names = {192: "tiny_patch16", 384: "small_patch16", 1024: "large_patch16", 1280: "huge_patch14"}
    size, config = model.config.model.encoder, model.config.model
    height, width = model.config.data.frame_size
    means = model.pooling == "mean_norm"
    return f"vit_{names.get(size.dim, 'base_patch16')}_224", {
        "img_size": [model.grid.time * height, width],
        "patch_size": config.patch_size[1:],
        "embed_dim": size.dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "mlp_ratio": (size.mlp_dim + 0.5) / size.dim if size.mlp_dim else 4,  # it is cut to whole
        "class_token": config.class_token,
        "global_pool": "token" if config.class_token and not means else "avg",
        "fc_norm": means,
        "num_classes": len(model.label_names),
        "in_chans": config.channels * config.patch_size[0],
    }
