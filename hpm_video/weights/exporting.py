"""Export of models to other projects: each is loaded back and compared, or not kept."""

import json
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hpm_video.files.atomic import write_json
from hpm_video.files.single_file import write_single_file
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.weights import express, verify
from hpm_video.weights.express import To
from hpm_video.weights.families import SCORE, licence_of
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import describe_left_out, import_weights, staged, texts_of
from hpm_video.weights.verify import ParityReport, is_installed

NEEDS = {"transformers": ["transformers"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}
"""Libraries that write or check a format, where this package does not require them anyway."""
ENDINGS: dict[To, str] = {"transformers": "", "timm": "", "onnx": ".onnx", "file": ".safetensors"}
ENDINGS |= {"mae": ".pth", "videomae": ".pth", "hpm": ".pth"}
"""How the names of files end; those of folders have none."""


def _write_transformers(model: TrainedModel, tensors: Tensors, folder: Path) -> None:
    verify.as_transformers(model, tensors).save_pretrained(folder)
    data = model.config.data
    (height, width), short_side = data.frame_size, data.validation_short_side
    # Bit's resizes the shorter side and cuts out the middle, ViT's own resizes to a square.
    processor = "Bit" if model.config.model.class_token else "VideoMAE"
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


def _write_timm(model: TrainedModel, tensors: Tensors, folder: Path) -> None:
    import timm

    logging.getLogger("timm").setLevel(logging.WARNING)
    name, arguments = express.timm_arguments(model)
    data, theirs = model.config.data, verify.as_timm(model, tensors)
    size, short_side = max(data.frame_size), data.validation_short_side
    # Without the tag and the licence of the weights that timm has for such a model.
    theirs.pretrained_cfg = {
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
    names = {"label_names": list(model.label_names)} if model.label_names else {}
    timm.models.save_for_hf(
        theirs, str(folder), names, model_args=arguments, safe_serialization=True
    )


def _write_pickle(model: TrainedModel, tensors: Tensors, file: Path, to: To) -> None:
    """Write plain values alone: the weights, and the facts of a run; of HPM the teacher, too."""
    if to == "hpm" and f"{SCORE}weight" not in tensors:
        raise CheckpointError("HPM takes models with a loss predictor")
    names: Any = "videomae" if to == "videomae" else "mae"
    state = express.official(tensors, names)
    content: dict[str, Any] = {"model": state, "args": express.facts_of(model)}
    if to == "hpm":
        content["state_dict"] = {f"module.{name}": value for name, value in state.items()}
        content["model"] = model.kind
        if model.teacher is not None:
            teacher, _ = express.express(replace(model, held=model.teacher), to)
            content["ema_state_dict"] = express.official(teacher, names)
    torch.save(content, file)


def _write_onnx(model: TrainedModel, file: Path) -> None:
    """Write a classifier as a program for onnxruntime: clips -> logits, of any number of clips."""
    if not model.is_classifier:
        raise CheckpointError("a program takes classifiers")
    clips = torch.zeros(3, model.config.model.channels, *model.config.data.clip_size)
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
    facts = {"labels": model.label_names, "clips": express.facts_of(model), "kind": model.kind}
    program.model.metadata_props.update({name: json.dumps(each) for name, each in facts.items()})
    program.save(file)


def _write(to: To, model: TrainedModel, out: Path) -> dict[str, str]:
    """Write a model. -> what the format has no place for, and why"""
    if to == "file":
        write_single_file(out, model.tensors, model.file, model.kind, texts_of(model))
        return {}
    if to == "onnx":
        _write_onnx(model, out)
        return {}
    frames = model.config.data.num_frames
    if to in ("timm", "mae", "hpm") and frames > 1:
        raise CheckpointError(f"it takes images, not clips of {frames} frames")
    if to != "timm" and model.pretraining and not model.pretraining.mining.pixel_kind:
        raise CheckpointError("it takes decoders of pixels, not of features (mining.target)")
    tensors, left_out = express.express(model, to)
    if to == "timm":
        _write_timm(model, tensors, out)
    elif to == "transformers":
        _write_transformers(model, tensors, out)
    else:
        _write_pickle(model, tensors, out, to)
    return left_out


def _check(to: To, model: TrainedModel, out: Path, tolerance: float, *, skip: bool) -> ParityReport:
    """Read back what was written: it must compute the same, here and in a library.

    ``skip``: not in a library.
    """
    if to == "onnx":
        report = verify.NOT_ASKED if skip else _of_onnxruntime(model, out)
        return report.judged(tolerance)
    if to == "file":
        back = open_trained(out, TrainedModel, model.weights)
        return verify.against(back.build(), model).judged(tolerance)
    imported = import_weights(out)
    same = imported.complete.build()
    report = verify.against(same, model, encoder_alone=bool(imported.fresh)).judged(tolerance)
    if skip:
        return report
    other = verify.compare(imported, tolerance)
    return replace(other, differences=(*report.differences, *other.differences))


def _of_onnxruntime(model: TrainedModel, program: Path) -> ParityReport:
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])

    def outputs(trial: verify.Trial) -> verify.Outputs:
        return {"logits": torch.from_numpy(*session.run(None, {"clips": trial.clips.numpy()}))}

    found = verify.differences(model, outputs)
    return ParityReport(f"onnxruntime {onnxruntime.__version__}", found)


@dataclass(frozen=True)
class Exported:
    """The result of an export, and what to print of it."""

    parity: ParityReport
    left_out: dict[str, str]
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

    Nothing is left behind where that fails. ``skip``: do not compare in a library.

    Raises:
        CheckpointError: it exists already, a library is missing, the disk does not take it, or what
            was written is read back as another model or computes something else.
    """
    ending, licence = ENDINGS[to], licence_of(model.origin)
    if ending and out.suffix != ending:
        raise CheckpointError(f"--to {to} writes a file that ends in {ending}, got {out}")
    parity_file = out.with_name(f"{out.name}.parity.json") if ending else out / "parity.json"
    if not all(is_installed(name) for name in NEEDS.get(to, [])):
        raise CheckpointError(f"--to {to} needs more libraries: pip install {' '.join(NEEDS[to])}")
    model = replace(model, held=model.tensors)
    with staged(out, parity_file) as writing:
        there = writing / out.name
        try:
            left_out = _write(to, model, there)
            parity = _check(to, model, there, tolerance, skip=skip)
        except CheckpointError as error:
            raise CheckpointError(
                f"{model.path} cannot become what --to {to} writes: "
                f"{str(error).replace(f'{there}: ', '')}\n"
                f"--to file takes every model, and --to onnx every classifier"
            ) from error
        table = parity.as_table() | {
            "format": to,
            "checkpoint": str(model.path.absolute()),
            "weights": model.weights,
            "update": model.update,
            "left_out": left_out,
            "licence": licence,
        }
        write_json(writing / parity_file.relative_to(out.parent), table)
        files = tuple(out.parent / path.name for path in sorted(writing.iterdir()))
    lines = [
        f"{model.kind} for {to}",
        *describe_left_out(left_out),
        *parity.lines(),
        f"licence: {licence}",
        f"wrote {', '.join(map(str, files))}",
    ]
    return Exported(parity, left_out, files, lines)
