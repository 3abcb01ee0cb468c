"""Export of models to other projects: each is loaded back and compared, or not kept."""

import json
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpm_video.files.atomic import write_json
from hpm_video.files.single_file import write_single_file
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.weights import express, verify
from hpm_video.weights.express import Expressed, To
from hpm_video.weights.families import licence_of
from hpm_video.weights.importing import import_weights, staged, texts_of
from hpm_video.weights.inspect import describe_left_out
from hpm_video.weights.verify import ParityReport, against, is_installed

LARGEST_ONNX = 1_900_000_000
"""Largest weights in bytes in one file of ONNX; larger ones lie in a second file."""
TO_INSTALL = ("onnx", "onnxscript", "onnxruntime")


def _write_transformers(model: TrainedModel, expressed: Expressed, folder: Path) -> None:
    if not is_installed("transformers"):
        raise CheckpointError("it writes such a folder itself: pip install transformers")
    kind, data = expressed.family.transformers_class, model.config.data
    (height, width), short_side = data.frame_size, data.validation_short_side
    config = express.transformers_config(model, kind)
    made: Any = verify.of_transformers(kind, None, config, expressed.tensors)
    made.save_pretrained(folder)
    # Bit's resizes the shorter side and cuts out the middle, ViT's own resizes to a square.
    processor = "VideoMAE" if kind.startswith("VideoMAE") else "Bit"
    preprocessor = {
        "image_processor_type": f"{processor}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": short_side or max(height, width)},
        "resample": {"bilinear": 2, "bicubic": 3}[data.interpolation],  # PIL's numbers
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }
    write_json(folder / "preprocessor_config.json", preprocessor)


def _write_timm(model: TrainedModel, expressed: Expressed, folder: Path) -> None:
    import timm

    logging.getLogger("timm").setLevel(logging.WARNING)
    name, arguments = express.timm_arguments(model)
    data, theirs = model.config.data, verify.as_timm(model, expressed.tensors)
    size, short_side = max(data.frame_size), data.validation_short_side
    # Without the tag and the licence of the weights that timm has for such a model.
    theirs.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": name,
        "num_classes": len(model.label_names),
        "input_size": (model.config.model.channels, *data.frame_size),
        "interpolation": data.interpolation,
        "crop_pct": size / (short_side + 0.5) if short_side else 1.0,  # timm drops the fraction
        "crop_mode": "center",
        "mean": data.mean,
        "std": data.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    names = {"model_config": {"label_names": list(model.label_names)}} if model.label_names else {}
    options: dict[str, Any] = {"model_args": arguments, "safe_serialization": True} | names
    timm.models.save_for_hf(theirs, str(folder), **options)


def _write_pickle(model: TrainedModel, expressed: Expressed, file: Path) -> None:
    """Write plain values alone: the weights, and the facts of a run. HPM has a teacher too."""
    content: dict[str, Any] = {"model": expressed.tensors, "args": express.facts_of(model)}
    if expressed.family.name == "hpm":
        teacher = model.tensors if model.teacher is None else model.teacher
        second = express.express(replace(model, held=teacher), "hpm")
        student = {f"module.{name}": value for name, value in expressed.tensors.items()}
        content |= {"state_dict": student, "ema_state_dict": second.tensors, "model": model.kind}
    torch.save(content, file)


def _write_onnx(model: TrainedModel, _: Expressed, file: Path) -> None:
    """Write a classifier as a program for onnxruntime: clips -> logits, of any number of clips."""
    if missing := [name for name in TO_INSTALL[:2] if not is_installed(name)]:
        raise CheckpointError(
            f"to write ONNX needs {' and '.join(missing)}: pip install {' '.join(TO_INSTALL)}"
        )
    clips = torch.zeros(2, model.config.model.channels, *model.config.data.clip_size)
    logging.disable(logging.WARNING)  # the exporter's messages on its steps and deprecations
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model.build(),
                (clips,),
                input_names=["clips"],
                output_names=["logits"],
                dynamic_shapes={"clips": {0: torch.export.Dim("batch", min=1)}},
                opset_version=18,
                dynamo=True,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    facts = {"labels": list(model.label_names), "clips": express.facts_of(model)}
    facts |= {"kind": model.kind}
    program.model.metadata_props.update({name: json.dumps(each) for name, each in facts.items()})
    size = sum(tensor.nbytes for tensor in model.tensors.values())
    program.save(file, external_data=size > LARGEST_ONNX)


def _check_onnx(model: TrainedModel, file: Path) -> ParityReport:
    if not is_installed("onnxruntime"):
        return ParityReport(not_checked="onnxruntime is not installed (pip install onnxruntime)")
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def outputs(trial: verify.Trial) -> verify.Outputs:
        (logits,) = session.run(["logits"], {"clips": trial.clips.numpy()})
        return {"logits": torch.from_numpy(logits)}

    return against(outputs, model, f"onnxruntime {onnxruntime.__version__}", clips=3)


def _check(to: To, model: TrainedModel, expressed: Expressed, out: Path) -> ParityReport:
    """Load what was written back, and compare it with the model."""
    if to == "onnx":
        return _check_onnx(model, out)
    if to == "timm":
        channels = model.config.model.channels
        return against(verify.of_timm(out, in_chans=channels), model)
    if to == "transformers":
        return against(verify.of_transformers(expressed.family.transformers_class, out), model)
    if to == "file":
        back = open_trained(out, TrainedModel, model.weights).build()
        return against(back, model, "this package, from the file alone")
    # What our importer reads is compared with the model, and with a library's.
    imported = import_weights(out)
    other, back = verify.compare(imported), imported.model.build()
    report = against(back, model, f"our importer and {other.with_what}", of="{} read back")
    found = (*report.differences, *other.differences)
    return replace(other, with_what=report.with_what, differences=found)


class Format(NamedTuple):
    """A format that models are exported to; ``ending`` is empty where it is a folder."""

    title: str
    ending: str = ""


FORMATS: dict[To, Format] = {
    "transformers": Format(
        "a folder of transformers: VideoMAE, or of images with a class token ViTMAE or ViT"
    ),
    "timm": Format("a folder of timm, of images: a classifier or the encoder alone"),
    "mae": Format(
        "a file with MAE's names, of images: what ViTDet in Detectron2 and MMSegmentation read",
        ".pth",
    ),
    "videomae": Format("a file with VideoMAE's names", ".pth"),
    "hpm": Format("a file of official HPM, of images: student, teacher and loss predictor", ".pth"),
    "onnx": Format("a program for onnxruntime, of a classifier", ".onnx"),
    "file": Format("one file of this package: weights, config and labels", ".safetensors"),
}


@dataclass(frozen=True)
class Exported:
    """The result of an export, and what to print of it."""

    expressed: Expressed
    parity: ParityReport
    files: tuple[Path, ...]
    lines: list[str]


def export(
    model: TrainedModel,
    out: Path,
    to: To,
    tolerance: float = verify.TOLERANCE,
    *,
    skip: bool = False,
) -> Exported:
    """Write a model as another project reads it, load it back there, and compare.

    Nothing is left behind where that fails. ``skip``: do not compare.

    Raises:
        CheckpointError: it exists already, the format cannot express the model, a library is
            missing, the disk does not take it, or what was written computes something else.
    """
    chosen, licence = FORMATS[to], licence_of(model.origin)
    if out.suffix != chosen.ending and chosen.ending:
        raise CheckpointError(f"--to {to} writes a file that ends in {chosen.ending}, got {out}")
    parity_file = out.with_name(f"{out.name}.parity.json") if chosen.ending else out / "parity.json"
    for path in (out, parity_file):
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} exists already; give another name, or delete it")
    model = replace(model, held=model.tensors)
    expressed, parity = express.express(model, to), verify.NOT_ASKED
    with staged(out) as writing:
        there = writing / out.name
        if to == "file":
            write_single_file(there, model.tensors, model.file, model.kind, texts_of(model))
        else:
            folders = {"transformers": _write_transformers, "timm": _write_timm}
            (folders | {"onnx": _write_onnx}).get(to, _write_pickle)(model, expressed, there)
        if not skip:
            wrong = "what was exported computes something else than our model, and is not kept"
            parity = _check(to, model, expressed, there).judged(wrong, tolerance)
        table = parity.as_table() | {
            "format": to,
            "checkpoint": str(model.path.absolute()),
            "weights": model.weights,
            "update": model.update,
            "left_out": expressed.left_out,
            "remarks": expressed.notes,
            "licence": licence,
        }
        write_json(writing / parity_file.relative_to(out.parent), table)
        files = tuple(out.parent / path.name for path in sorted(writing.iterdir()))
    lines = [
        f"{model.kind} as {chosen.title}",
        *describe_left_out(expressed.left_out),
        *expressed.notes,
        *parity.lines(),
        f"licence: {licence}",
        f"wrote {', '.join(map(str, files))}",
    ]
    return Exported(expressed, parity, files, lines)
