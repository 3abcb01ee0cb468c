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
from hpm_video.weights.families import licence_of
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import describe_left_out, import_weights, staged, texts_of
from hpm_video.weights.verify import ParityReport, against, is_installed

NEEDS: dict[To, tuple[str, ...]] = {
    "transformers": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
"""Libraries that write or check a format, where this package does not require them anyway."""
ENDINGS: dict[To, str] = {
    "transformers": "",
    "timm": "",
    "mae": ".pth",
    "videomae": ".pth",
    "hpm": ".pth",
    "onnx": ".onnx",
    "file": ".safetensors",
}
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
    program.save(file)


def _write(to: To, model: TrainedModel, tensors: Tensors, out: Path) -> None:
    if to == "file":
        write_single_file(out, model.tensors, model.file, model.kind, texts_of(model))
    elif to == "onnx":
        _write_onnx(model, out)
    elif to == "timm":
        _write_timm(model, tensors, out)
    elif to == "transformers":
        _write_transformers(model, tensors, out)
    else:
        _write_pickle(model, tensors, out, to)


def _check(to: To, model: TrainedModel, out: Path) -> ParityReport:
    """Load what was written back, and compare it with the model."""
    if to == "onnx":
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]

        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

        def logits(trial: verify.Trial) -> verify.Outputs:
            return {"logits": torch.from_numpy(*session.run(None, {"clips": trial.clips.numpy()}))}

        found = verify.differences(model, logits, clips=3)
        return ParityReport(f"onnxruntime {onnxruntime.__version__}", found)
    if to == "timm":
        peer = verify.from_folder(out, in_chans=model.config.model.channels)
        return against(peer, model)
    if to == "transformers":
        return against(verify.from_folder(out, express.transformers_class(model)), model)
    if to == "file":
        back, report = open_trained(out, TrainedModel, model.weights), ParityReport("this package")
    else:  # what our importer reads is compared with the model, and with a library's
        imported = import_weights(out)
        back, report = imported.model, verify.compare(imported)
        report = replace(report, with_what=f"our importer and {report.with_what}")
    own = verify.differences(model, lambda trial: verify.outputs_of(back.build(), trial))
    return replace(report, differences=(*own, *report.differences))


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

    Nothing is left behind where that fails. ``skip``: do not compare.

    Raises:
        CheckpointError: it exists already, the format cannot express the model, a library is
            missing, the disk does not take it, or what was written computes something else.
    """
    ending, licence = ENDINGS[to], licence_of(model.origin)
    if ending and out.suffix != ending:
        raise CheckpointError(f"--to {to} writes a file that ends in {ending}, got {out}")
    parity_file = out.with_name(f"{out.name}.parity.json") if ending else out / "parity.json"
    for path in (out, parity_file):
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} exists already; give another name, or delete it")
    if not all(is_installed(name) for name in NEEDS.get(to, ())):
        raise CheckpointError(f"--to {to} needs more libraries: pip install {' '.join(NEEDS[to])}")
    model = replace(model, held=model.tensors)
    (tensors, left_out), parity = express.express(model, to), verify.NOT_ASKED
    with staged(out) as writing:
        there = writing / out.name
        _write(to, model, tensors, there)
        if not skip:
            wrong = "what was exported computes something else than our model, and is not kept"
            parity = _check(to, model, there).judged(wrong, tolerance)
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
