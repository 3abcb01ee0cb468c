"""Models of ours as other projects read them: their files, and what lies beside the weights."""

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
from safetensors.torch import save_file
from torch import nn

from hpm_video.config.choices import Pooling, TransformerSize
from hpm_video.files.single_file import write_single_file
from hpm_video.files.weights import CheckpointError
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.weights.forms import FORMS, Expressed, express
from hpm_video.weights.notes import RESAMPLE
from hpm_video.weights.own import OwnModel
from hpm_video.weights.trial import random_clips

WEIGHTS = "model.safetensors"
LARGEST_ONNX = 1_900_000_000
"""Bytes of weights that a file of ONNX takes; those of larger models lie in a second file."""
OPSET = 18
TO_INSTALL = ("onnx", "onnxscript", "onnxruntime")

# --- transformers -------------------------------------------------------------------------------

MODEL_TYPES = {
    "VideoMAEForPreTraining": "videomae",
    "VideoMAEForVideoClassification": "videomae",
    "ViTMAEForPreTraining": "vit_mae",
    "ViTForImageClassification": "vit",
}
IMAGE_PROCESSORS = {"videomae": "VideoMAEImageProcessor"}
OTHER_IMAGE_PROCESSOR = "BitImageProcessor"
"""The one of transformers that resizes the shorter side and cuts out the middle; ViT's own resizes
to a square."""
STANDARDISED = {"videomae": "per_channel", "vit_mae": "joint"}
"""What a model of transformers learns to predict with norm_pix_loss."""


def write_transformers(own: OwnModel, expressed: Expressed, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` reads."""
    folder.mkdir()
    save_file(expressed.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / "config.json", transformers_config(own, kind_of(expressed)))
    write_json(folder / "preprocessor_config.json", preprocessor(own, kind_of(expressed)))


def kind_of(expressed: Expressed) -> str:
    """Name of the class in transformers."""
    return expressed.form.name.partition(" ")[0]


def transformers_config(own: OwnModel, kind: str) -> dict[str, Any]:
    """``config.json`` of a model of transformers."""
    model_type, size = MODEL_TYPES[kind], own.shape.size
    _, height, width = own.clip_size
    table: dict[str, Any] = {
        "architectures": [kind],
        "model_type": model_type,
        "image_size": height if height == width else [height, width],
        "patch_size": own.shape.patch_size[1],
        "num_channels": own.shape.channels,
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": _wide(size),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
    }
    if model_type == "videomae":
        table["num_frames"] = own.clip_size[0]
        table["tubelet_size"] = own.shape.patch_size[0]
        table["use_mean_pooling"] = own.is_classifier
    if own.decoder is not None:
        table |= {
            "decoder_hidden_size": own.decoder.dim,
            "decoder_num_hidden_layers": own.decoder.depth,
            "decoder_num_attention_heads": own.decoder.num_heads,
            "decoder_intermediate_size": _wide(own.decoder),
            "norm_pix_loss": own.target != "raw",
        }
    if model_type == "vit_mae":
        table["mask_ratio"] = own.mask_ratio
    if own.is_classifier:
        table["id2label"] = {str(i): name for i, name in enumerate(own.label_names)}
        names = own.label_names
        table["label2id"] = {
            f"{name} ({i})" if name in names[:i] else name: i for i, name in enumerate(names)
        }
    return table


def _wide(size: TransformerSize) -> int:
    """Width within the MLPs."""
    return size.mlp_dim or 4 * size.dim


def preprocessor(own: OwnModel, kind: str) -> dict[str, Any]:
    """``preprocessor_config.json``: frames as the model is tested on, the middle crop alone."""
    _, height, width = own.clip_size
    return {
        "image_processor_type": IMAGE_PROCESSORS.get(MODEL_TYPES[kind], OTHER_IMAGE_PROCESSOR),
        "do_resize": True,
        "size": {"shortest_edge": own.short_side or max(height, width)},
        "resample": RESAMPLE[own.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(own.mean),
        "image_std": list(own.std),
    }


def notes_of_transformers(own: OwnModel, kind: str) -> list[str]:
    """What the folder cannot say of the model."""
    notes = []
    standardised = STANDARDISED.get(MODEL_TYPES[kind])
    same = own.target == standardised or (own.target == "raw" and standardised == "joint")
    if not own.is_classifier and not same:
        notes.append(
            f"this model learned to predict target {own.target}, and the loss of {kind} compares "
            f"with another: what it predicts is ours, its loss is not"
        )
    if own.clip_size[1] != own.clip_size[2] and own.short_side is None:
        notes.append(
            "the preprocessor cuts these rectangular frames out of a larger frame, where ours "
            "takes the largest box of their shape"
        )
    return notes


# --- timm ---------------------------------------------------------------------------------------

TIMM_NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
"""Names of timm's models by their width; whatever else they are is given."""
OTHER_TIMM_NAME = "vit_base_patch16_224"
TIMM_POOLS: dict[tuple[Pooling | None, bool], tuple[str, bool]] = {
    ("mean_norm", True): ("avg", True),
    ("mean_norm", False): ("avg", True),
    ("class_token", True): ("token", False),
    ("batch_norm", True): ("token", False),
    ("batch_norm", False): ("avg", False),
    (None, True): ("token", False),
    (None, False): ("avg", False),
}
"""By pooling and whether there is a class token: timm's global_pool, and whether its norm stands
behind the mean."""


def timm_name(own: OwnModel) -> str:
    """Of the model of timm that this is a kind of."""
    return TIMM_NAMES.get(own.shape.size.dim, OTHER_TIMM_NAME)


def timm_arguments(own: OwnModel) -> dict[str, Any]:
    """What ``timm.create_model`` has to be told beside the name."""
    size, shape = own.shape.size, own.shape
    pool, norm_behind = TIMM_POOLS[own.pooling, shape.class_token]
    return {
        "img_size": list(own.clip_size[1:]),
        "patch_size": shape.patch_size[1],
        "embed_dim": size.dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "mlp_ratio": (_wide(size) + 0.5) / size.dim if size.mlp_dim else 4,  # it is cut to whole
        "qkv_bias": True,
        "class_token": shape.class_token,
        "global_pool": pool,
        "fc_norm": norm_behind,
    }


def write_timm(own: OwnModel, expressed: Expressed, folder: Path) -> None:
    """Write a folder that timm reads as ``local-dir:FOLDER``."""
    folder.mkdir()
    save_file(expressed.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _, height, width = own.clip_size
    arguments, channels = timm_arguments(own), own.shape.channels
    table: dict[str, Any] = {
        "architecture": timm_name(own),
        "num_classes": len(own.label_names),
        "num_features": own.shape.size.dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": len(own.label_names),
            "input_size": [channels, height, width],
            "interpolation": own.interpolation,
            "crop_pct": _crop_share(max(height, width), own.short_side),
            "crop_mode": "center",
            "mean": list(own.mean),
            "std": list(own.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if own.is_classifier:
        table["label_names"] = list(own.label_names)
    write_json(folder / "config.json", table)


def _crop_share(size: int, short_side: int | None) -> float:
    """Of a crop in what it is cut out of; timm divides by it and drops what is not whole."""
    if short_side is None:
        return 1.0
    share = size / short_side
    return share if math.floor(size / share) == short_side else size / (short_side + 0.5)


# --- Files of MAE and VideoMAE ------------------------------------------------------------------


def write_pickle(own: OwnModel, expressed: Expressed, file: Path) -> None:
    """Write a file of torch.save with the weights under ``model``, of plain values alone."""
    torch.save({"model": expressed.tensors, "args": _arguments(own)}, file)


def write_hpm(own: OwnModel, expressed: Expressed, file: Path) -> None:
    """Write a file as official HPM does: the student, and the teacher as ``ema_state_dict``."""
    teacher = own.read_teacher()
    second = expressed if teacher is None else express(replace(own, tensors=teacher), FORMS["hpm"])
    content = {
        "state_dict": {f"module.{name}": value for name, value in expressed.tensors.items()},
        "ema_state_dict": second.tensors,
        "model": own.kind,
        "args": _arguments(own),
    }
    torch.save(content, file)


def notes_of_hpm(own: OwnModel) -> list[str]:
    """What was made otherwise, with the same result."""
    copied = "" if own.read_teacher() is not None else "; it has no teacher: that is a copy"
    return [
        f"the one output of the loss predictor is written {own.cut.values} times, as the official "
        f"model has it, which averages them: the same score but for rounding{copied}"
    ]


def _arguments(own: OwnModel) -> dict[str, Any]:
    """What such files keep of a run, and what an importer needs to know, by plain values."""
    _, height, width = own.clip_size
    told: dict[str, Any] = {
        "input_size": height if height == width else [height, width],
        "num_frames": own.clip_size[0],
        "sampling_rate": own.frame_stride,
        "num_attention_heads": own.shape.size.num_heads,
        "image_mean": list(own.mean),
        "image_std": list(own.std),
        "interpolation": own.interpolation,
        "short_side": own.short_side,
    }
    if own.decoder is not None:
        told["decoder_num_attention_heads"] = own.decoder.num_heads
        told["norm_pix_loss"] = own.target != "raw"
    return told


# --- ONNX ---------------------------------------------------------------------------------------


def check_onnx_libraries() -> None:
    """Make sure that a program of ONNX can be written.

    Raises:
        CheckpointError: a library for it is missing.
    """
    missing = [name for name in TO_INSTALL[:2] if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"to write ONNX needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} "
            f"not installed: pip install {' '.join(TO_INSTALL)}"
        )


def write_onnx(own: OwnModel, file: Path) -> None:
    """Write a classifier as a program for onnxruntime: clips -> logits, of any number of clips.

    Raises:
        CheckpointError: a library is missing.
    """
    check_onnx_libraries()
    import onnx

    model = own.build()
    assert isinstance(model, ClipClassifier)
    size = sum(tensor.nbytes for tensor in own.tensors.values())
    with _quiet():
        program = torch.onnx.export(
            _Logits(model).eval(),
            (random_clips(own.shape.channels, own.clip_size, 2),),
            input_names=["clips"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    batch = None if shape is None else shape[0]
    if isinstance(batch, int):
        raise CheckpointError(
            f"torch.onnx made a program for {batch} clips alone, and not for any number of them; "
            f"this is a fault of this package with torch {torch.__version__}: please report it"
        )
    program.model.metadata_props.update(_told_in_onnx(own))
    program.save(file, external_data=size > LARGEST_ONNX)
    onnx.checker.check_model(str(file))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells of each of its steps, and of its own future."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _told_in_onnx(own: OwnModel) -> dict[str, str]:
    return {
        "kind": own.kind,
        "labels": json.dumps(list(own.label_names)),
        "clips": json.dumps(
            {
                "axes": "B C T H W",
                "size": [own.shape.channels, *own.clip_size],
                "frame_stride": own.frame_stride,
                "short_side": own.short_side,
                "interpolation": own.interpolation,
                "pixels": "in [0, 1], then less the mean and divided by the deviation",
                "mean": list(own.mean),
                "std": list(own.std),
            }
        ),
    }


class _Logits(nn.Module):
    """A classifier of which nothing but its logits is asked."""

    def __init__(self, classifier: ClipClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) normalised -> (B, classes)"""
        logits: torch.Tensor = self.classifier(clips)
        return logits


# --- Our own ------------------------------------------------------------------------------------


def write_own(own: OwnModel, file: Path) -> None:
    """Write the whole model as one file of safetensors."""
    write_single_file(file, own.tensors, own.file, own.kind, own.texts)


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a table."""
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
