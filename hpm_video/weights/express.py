"""Models of ours as those of other projects: tensors, and the configs beside them."""

import re
from typing import Any, Literal

import torch

from hpm_video.config.choices import TransformerSize
from hpm_video.files.weights import CheckpointError
from hpm_video.models.from_config import source_grid_of
from hpm_video.models.positions import position_table, resize_positions
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.recognition.trained_model import OF_DECODERS, TrainedModel
from hpm_video.tokens.grid import TokenGrid
from hpm_video.weights.families import SCORE, TABLES
from hpm_video.weights.files import Tensors

To = Literal["transformers", "timm", "mae", "videomae", "hpm", "onnx", "file"]
NO_KEY_BIAS = "in part: a bias on keys, which our model lacks; the softmax ignores it"
OFFICIAL: dict[str, tuple[tuple[str, str], ...]] = {
    "videomae": ((r"^reconstructor\.", "decoder."), (r"^decoder_embed\.", "encoder_to_decoder.")),
    "mae": (
        (r"^(reconstructor|difficulty_decoder)\.head\.", r"\1.pred."),
        (r"^reconstructor\.", "decoder_"),
        (r"^difficulty_decoder\.(\w+)\.", r"decoder_\1_losspred."),
    ),
}
"""Parts of our names and of those in files of other projects, replaced one after the other."""


def becomes_videomae(model: TrainedModel, to: To) -> bool:
    """Whether it is a VideoMAE there. In transformers those without a class token are."""
    return to == "videomae" or (to == "transformers" and not model.config.model.class_token)


def tables_of(model: TrainedModel) -> Tensors:
    """Return the positions of the tokens of a model's clips, of its decoder too.

    -> (1, N, D), or one row more where a class token goes first
    """
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
        first = torch.zeros(int(model.config.model.class_token), size.dim)
        found[table] = torch.cat([first, own]).unsqueeze(0)
    return found


def express(model: TrainedModel, to: To) -> tuple[Tensors, dict[str, str]]:
    """Return what a format holds of a model, by our names, and what it has no place for.

    Raises a CheckpointError if the format computes other positions.
    """
    drops = OF_DECODERS if to == "timm" else () if to == "hpm" else ("difficulty_decoder.",)
    every = model.tensors | tables_of(model)
    kept = {name: value for name, value in every.items() if not name.startswith(drops)}
    kind = model.config.model.positions
    if becomes_videomae(model, to) and kind != "sequence":
        raise CheckpointError(f"VideoMAE has model.positions=sequence alone, not {kind}")
    left_out = {name: "the format has no such part" for name in every if name not in kept}
    if becomes_videomae(model, to):
        kept = {name: value for name, value in kept.items() if name not in TABLES}
        biases = (each for each in kept if each.endswith(".attn.qkv.bias"))
        left_out |= {each: NO_KEY_BIAS for each in biases if kept[each].chunk(3)[1].any()}
    return kept, left_out


def official(tensors: Tensors, of: Literal["mae", "videomae"]) -> Tensors:
    """Return tensors by the names in files of MAE or HPM, or of VideoMAE, and in their shapes."""
    found: Tensors = {}
    for ours, value in tensors.items():
        name = ours
        for pattern, replacement in OFFICIAL[of]:
            name = re.sub(pattern, replacement, name)
        if of == "mae" and ours.startswith(SCORE):  # one output for each value of a patch
            outputs = len(tensors["reconstructor.head.bias"])
            found[name] = value.expand(outputs, *value.shape[1:]).contiguous()
        elif of == "mae":
            found[name] = value.flatten(1, 2) if value.ndim == 5 else value
        else:
            if "mask_token" in tensors and re.match(r"(patch_embed|blocks|norm)\.", name):
                name = f"encoder.{name}"
            if name.endswith(".qkv.bias"):
                query, _, values = value.chunk(3)
                begins = name.removesuffix("qkv.bias")
                found |= {f"{begins}q_bias": query.clone(), f"{begins}v_bias": values.clone()}
            else:
                found[name] = value
    return found


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


def transformers_config(model: TrainedModel) -> dict[str, Any]:
    """Return ``config.json`` of a model of transformers."""
    config, facts = model.config, facts_of(model)
    table: dict[str, Any] = _sizes(config.model.encoder, "") | {
        "image_size": facts["input_size"],
        "patch_size": config.model.patch_size[1],
        "num_channels": config.model.channels,
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    if becomes_videomae(model, "transformers"):
        table |= {"num_frames": config.data.num_frames, "tubelet_size": config.model.patch_size[0]}
        table["use_mean_pooling"] = model.is_classifier
    if pretraining := model.pretraining:
        table |= _sizes(pretraining.model.decoder, "decoder_")
        table["norm_pix_loss"] = facts["norm_pix_loss"]
        if config.model.class_token:
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
