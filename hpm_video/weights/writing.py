"""Files of other projects, written from models of ours: weights and the configs beside them."""

import contextlib
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hpm_video.config.choices import TransformerSize
from hpm_video.files.single_file import write_single_file
from hpm_video.files.weights import CheckpointError
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.weights.express import Expressed, express
from hpm_video.weights.facts import RESAMPLE, crop_share, facts_of
from hpm_video.weights.folder import texts_of, write_json
from hpm_video.weights.parity import is_installed, of_timm, of_transformers

LARGEST_ONNX = 1_900_000_000
"""Largest weights in bytes in one file of ONNX; larger ones lie in a second file."""
OPSET = 18
TO_INSTALL = ("onnx", "onnxscript", "onnxruntime")
TIMM_NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
"""Names of timm's models by width; all other sizes are given as arguments."""


def write_own(model: TrainedModel, _: Expressed, file: Path) -> list[str]:
    """Write the whole model as one file of safetensors."""
    write_single_file(file, model.tensors, model.file, model.kind, texts_of(model))
    return []


# --- transformers ---------------------------------------------------------------------------------


def write_transformers(model: TrainedModel, expressed: Expressed, folder: Path) -> list[str]:
    """Write a folder that ``from_pretrained`` reads. -> notes on what it does not hold"""
    if not is_installed("transformers"):
        raise CheckpointError("it writes such a folder itself: pip install transformers")
    kind, config = expressed.family.transformers_class, model.config
    (theirs,) = of_transformers(
        kind, None, transformers_config(model, kind), expressed.tensors
    ).models
    theirs.save_pretrained(folder)
    data, notes = config.data, []
    height, width = data.frame_size
    # Bit's resizes the shorter side and cuts out the middle, where ViT's own resizes to a square.
    made_by = "VideoMAE" if kind.startswith("VideoMAE") else "Bit"
    preprocessor = {
        "image_processor_type": f"{made_by}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": data.held_out_short_side or max(height, width)},
        "resample": RESAMPLE[data.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    if model.pretraining:
        target = model.pretraining.mining.target
        if target not in (("per_channel",) if made_by == "VideoMAE" else ("joint", "raw")):
            notes.append(
                f"this model learned to predict target {target}, and the loss of {kind} compares "
                f"with another: what it predicts is ours, its loss is not"
            )
    if height != width and data.held_out_short_side is None:
        notes.append(
            "the preprocessor cuts these rectangular frames out of a larger frame, where ours "
            "takes the largest box of their shape"
        )
    return notes


def transformers_config(model: TrainedModel, kind: str) -> dict[str, Any]:
    """Return ``config.json`` of a model of transformers."""
    config, size, facts = model.config, model.config.model.encoder, facts_of(model)
    table: dict[str, Any] = {
        "image_size": facts["input_size"],
        "patch_size": config.model.patch_size[1],
        "num_channels": config.model.channels,
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": facts["num_attention_heads"],
        "intermediate_size": _wide(size),
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    if kind.startswith("VideoMAE"):
        table |= {"num_frames": config.data.num_frames, "tubelet_size": config.model.patch_size[0]}
        table["use_mean_pooling"] = model.is_classifier
    if pretraining := model.pretraining:
        decoder = pretraining.model.decoder
        table |= {
            "decoder_hidden_size": decoder.dim,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_intermediate_size": _wide(decoder),
        } | {key: facts[key] for key in ("decoder_num_attention_heads", "norm_pix_loss")}
        if not kind.startswith("VideoMAE"):
            table["mask_ratio"] = pretraining.masking.ratio
    else:
        names = model.label_names
        table["id2label"] = dict(enumerate(names))
        table["label2id"] = {
            f"{name} ({i})" if name in names[:i] else name: i for i, name in enumerate(names)
        }
    return table


def _wide(size: TransformerSize) -> int:
    """Width within the MLPs."""
    return size.mlp_dim or 4 * size.dim


# --- timm -----------------------------------------------------------------------------------------


def timm_name(model: TrainedModel) -> str:
    """Return the name of the timm model of this width."""
    return TIMM_NAMES.get(model.config.model.encoder.dim, TIMM_NAMES[768])


def timm_arguments(model: TrainedModel, time: int = 1) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` beside the name.

    The time steps of clips lie below each other in one image. ``time``: frames of a patch.
    """
    size, config = model.config.model.encoder, model.config.model
    _, patch_height, patch_width = config.patch_size
    height, width = model.config.data.frame_size
    means = model.pooling == "mean_norm"
    on_token = config.class_token and not means
    return {
        "img_size": [model.grid.time * height, width],
        "patch_size": patch_height if patch_height == patch_width else [patch_height, patch_width],
        "embed_dim": size.dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "mlp_ratio": (_wide(size) + 0.5) / size.dim if size.mlp_dim else 4,  # it is cut to whole
        "class_token": config.class_token,
        "global_pool": "token" if on_token else "avg",
        "fc_norm": means,
        "num_classes": len(model.label_names),
        "in_chans": config.channels * time,
    }


def write_timm(model: TrainedModel, expressed: Expressed, folder: Path) -> list[str]:
    """Write a folder that timm reads as ``local-dir:FOLDER``."""
    from timm.models import save_for_hf

    data, arguments = model.config.data, timm_arguments(model)
    (theirs,) = of_timm(timm_name(model), arguments, expressed.tensors).models
    # Without the tag and the licence of the weights that timm has for such a model.
    theirs.pretrained_cfg = {
        "architecture": timm_name(model),
        "num_classes": len(model.label_names),
        "input_size": (model.config.model.channels, *data.frame_size),
        "interpolation": data.interpolation,
        "crop_pct": crop_share(max(data.frame_size), data.held_out_short_side),
        "crop_mode": "center",
        "mean": data.mean,
        "std": data.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    labels = {"label_names": list(model.label_names)} if model.is_classifier else {}
    kept: dict[str, Any] = {
        "model_config": labels,
        "model_args": arguments,
        "safe_serialization": True,
    }
    save_for_hf(theirs, str(folder), **kept)
    return []


# --- Files of MAE, VideoMAE and HPM ---------------------------------------------------------------


def write_pickle(model: TrainedModel, expressed: Expressed, file: Path) -> list[str]:
    """Write a file of torch.save with the weights under ``model``, of plain values alone."""
    torch.save({"model": expressed.tensors, "args": facts_of(model)}, file)
    return []


def write_hpm(model: TrainedModel, expressed: Expressed, file: Path) -> list[str]:
    """Write a file as official HPM does: the student, and the teacher as ``ema_state_dict``."""
    teacher = model.teacher
    second = expressed if teacher is None else express(replace(model, held=teacher), "hpm")
    content = {
        "state_dict": {f"module.{name}": value for name, value in expressed.tensors.items()},
        "ema_state_dict": second.tensors,
        "model": model.kind,
        "args": facts_of(model),
    }
    torch.save(content, file)
    copied = "; it has no teacher: that is a copy" if teacher is None else ""
    values = model.config.model.channels * math.prod(model.config.model.patch_size)
    return [
        f"the one output of the loss predictor is written {values} times, as the official "
        f"model has it, which averages them: the same score but for rounding{copied}"
    ]


# --- ONNX ---------------------------------------------------------------------------------------


def write_onnx(model: TrainedModel, _: Expressed, file: Path) -> list[str]:
    """Write a classifier as a program for onnxruntime: clips -> logits, of any number of clips.

    Raises:
        CheckpointError: a library is missing.
    """
    missing = [name for name in TO_INSTALL[:2] if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"to write ONNX needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} "
            f"not installed: pip install {' '.join(TO_INSTALL)}"
        )
    import onnx

    config, data = model.config, model.config.data
    with _quiet():
        program = torch.onnx.export(
            model.build(),
            (torch.zeros(2, config.model.channels, *data.clip_size),),
            input_names=["clips"],
            output_names=["logits"],
            dynamic_shapes={"clips": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    if shape is not None and isinstance(shape[0], int):
        raise CheckpointError(
            f"torch.onnx made a program for {shape[0]} clips alone, and not for any number of "
            f"them: a fault of this package with torch {torch.__version__}, please report it"
        )
    clips = {
        "axes": "B C T H W",
        "size": [config.model.channels, *data.clip_size],
        "frame_stride": data.frame_stride,
        "short_side": data.held_out_short_side,
        "interpolation": data.interpolation,
        "pixels": "in [0, 1], minus the mean and divided by the standard deviation",
        "mean": list(data.mean),
        "std": list(data.std),
    }
    labels = json.dumps(list(model.label_names))
    metadata = {"kind": model.kind, "labels": labels, "clips": json.dumps(clips)}
    program.model.metadata_props.update(metadata)
    size = sum(tensor.nbytes for tensor in model.tensors.values())
    program.save(file, external_data=size > LARGEST_ONNX)
    onnx.checker.check_model(str(file))
    return []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages on its steps and its deprecations."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(logging.NOTSET)
