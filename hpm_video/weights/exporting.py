"""Export of models to other projects: each is loaded back and compared, or not kept."""

import json
import logging
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpm_video.files.single_file import write_single_file
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.weights import express, verify
from hpm_video.weights.express import Expressed, To
from hpm_video.weights.families import licence_of
from hpm_video.weights.geometry import RESAMPLE
from hpm_video.weights.importing import import_weights, staged, texts_of, write_json
from hpm_video.weights.inspect import describe_left_out
from hpm_video.weights.verify import ParityReport, Peer, is_installed

LARGEST_ONNX = 1_900_000_000
"""Largest weights in bytes in one file of ONNX; larger ones lie in a second file."""
TO_INSTALL = ("onnx", "onnxscript", "onnxruntime")
Written = tuple[list[str], Callable[[], ParityReport]]
"""Notes on what the file does not hold, or holds otherwise; and its comparison, once loaded back"""


def write_own(model: TrainedModel, _: Expressed, file: Path) -> Written:
    """Write one file of our own, and read it alone, as ``tools/predict.py`` does."""
    write_single_file(file, model.tensors, model.file, model.kind, texts_of(model))

    def check() -> ParityReport:
        back = partial(verify.outputs_of, open_trained(file, TrainedModel, model.weights).build())
        return Peer("this package, from the file alone", back).compare(model)

    return [], check


def write_transformers(model: TrainedModel, expressed: Expressed, folder: Path) -> Written:
    """Write a folder that ``from_pretrained`` reads."""
    if not is_installed("transformers"):
        raise CheckpointError("it writes such a folder itself: pip install transformers")
    kind, data, notes = expressed.family.transformers_class, model.config.data, []
    of_clips = kind.startswith("VideoMAE")
    config = express.transformers_config(model, kind)
    verify.of_transformers(kind, None, config, expressed.tensors).model.save_pretrained(folder)
    height, width = data.frame_size
    preprocessor = {
        # Bit's resizes the shorter side and cuts out the middle, ViT's own resizes to a square.
        "image_processor_type": f"{'VideoMAE' if of_clips else 'Bit'}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": data.validation_short_side or max(height, width)},
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
    target = model.pretraining and model.pretraining.mining.target
    if target and target not in (["per_channel"] if of_clips else ["joint", "raw"]):
        notes.append(
            f"this model learned to predict target {target}, and the loss of {kind} compares with "
            f"another: what it predicts is ours, its loss is not"
        )
    if height != width and data.validation_short_side is None:
        notes.append(
            "the preprocessor cuts these rectangular frames out of a larger frame, where ours "
            "takes the largest box of their shape"
        )
    return notes, lambda: verify.of_transformers(kind, folder).compare(model)


def write_timm(model: TrainedModel, expressed: Expressed, folder: Path) -> Written:
    """Write a folder that timm reads as ``local-dir:FOLDER``."""
    import timm

    logging.getLogger("timm").setLevel(logging.WARNING)
    name, arguments = express.timm_name(model), express.timm_arguments(model)
    data = model.config.data
    theirs = verify.of_timm(name, arguments, expressed.tensors).model
    # Without the tag and the licence of the weights that timm has for such a model.
    theirs.pretrained_cfg = {
        "architecture": name,
        "num_classes": len(model.label_names),
        "input_size": (model.config.model.channels, *data.frame_size),
        "interpolation": data.interpolation,
        "crop_pct": express.crop_share(max(data.frame_size), data.validation_short_side),
        "crop_mode": "center",
        "mean": data.mean,
        "std": data.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    options: dict[str, Any] = {"model_args": arguments, "safe_serialization": True}
    if model.is_classifier:
        options["model_config"] = {"label_names": list(model.label_names)}
    timm.models.save_for_hf(theirs, str(folder), **options)

    def check() -> ParityReport:
        there, weights = f"local-dir:{folder}", str(folder / "model.safetensors")
        try:
            built = timm.create_model(there, pretrained=True, in_chans=arguments["in_chans"])
        except pickle.UnpicklingError:  # earlier versions read no safetensors so
            built = timm.create_model(there, checkpoint_path=weights)
        title = f"timm {timm.__version__}: {name}"
        return Peer.of(title, built, verify.outputs_of_timm).compare(model)

    return [], check


def write_pickle(model: TrainedModel, expressed: Expressed, file: Path) -> Written:
    """Write a file of torch.save, of plain values alone: the weights, and the facts of a run."""
    torch.save({"model": expressed.tensors, "args": express.facts_of(model)}, file)
    return [], lambda: _check_file(model, file)


def write_hpm(model: TrainedModel, expressed: Expressed, file: Path) -> Written:
    """Write a file as official HPM does: the student, and the teacher as ``ema_state_dict``."""
    teacher = model.teacher
    second = expressed if teacher is None else express.express(replace(model, held=teacher), "hpm")
    content = {
        "state_dict": {f"module.{name}": value for name, value in expressed.tensors.items()},
        "ema_state_dict": second.tensors,
        "model": model.kind,
        "args": express.facts_of(model),
    }
    torch.save(content, file)
    copied = "; it has no teacher: that is a copy" if teacher is None else ""
    values = model.config.model.channels * math.prod(model.config.model.patch_size)
    note = (
        f"the one output of the loss predictor is written {values} times, as the official model "
        f"has it, which averages them: the same score but for rounding{copied}"
    )
    return [note], lambda: _check_file(model, file)


def _check_file(model: TrainedModel, file: Path) -> ParityReport:
    """Read a file of another project back with our importer, and compare that with a library's."""
    imported = import_weights(file)
    other = verify.compare(imported)
    built = imported.model.build()
    back = Peer("our importer", partial(verify.outputs_of, built)).compare(model, of="{} read back")
    return replace(
        other,
        with_what=f"our importer and {other.with_what}",
        differences=(*back.differences, *other.differences),
    )


def write_onnx(model: TrainedModel, _: Expressed, file: Path) -> Written:
    """Write a classifier as a program for onnxruntime: clips -> logits, of any number of clips.

    Raises:
        CheckpointError: a library is missing.
    """
    if missing := [name for name in TO_INSTALL[:2] if not is_installed(name)]:
        raise CheckpointError(
            f"to write ONNX needs {' and '.join(missing)}: pip install {' '.join(TO_INSTALL)}"
        )
    import onnx

    data, channels = model.config.data, model.config.model.channels
    logging.disable(logging.WARNING)  # the exporter's messages on its steps and deprecations
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model.build(),
                (torch.zeros(2, channels, *data.clip_size),),
                input_names=["clips"],
                output_names=["logits"],
                dynamic_shapes={"clips": {0: torch.export.Dim("batch", min=1)}},
                opset_version=18,
                dynamo=True,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    clips = {
        "axes": "B C T H W",
        "size": [channels, *data.clip_size],
        "frame_stride": data.frame_stride,
        "short_side": data.validation_short_side,
        "interpolation": data.interpolation,
        "pixels": "in [0, 1], minus the mean and divided by the standard deviation",
        "mean": list(data.mean),
        "std": list(data.std),
    }
    labels = json.dumps(list(model.label_names))
    program.model.metadata_props.update(
        {"kind": model.kind, "labels": labels, "clips": json.dumps(clips)}
    )
    size = sum(tensor.nbytes for tensor in model.tensors.values())
    program.save(file, external_data=size > LARGEST_ONNX)
    onnx.checker.check_model(str(file))
    return [], lambda: _check_onnx(model, file)


def _check_onnx(model: TrainedModel, file: Path) -> ParityReport:
    """Run a program of ONNX with onnxruntime, on several clips at once and on one."""
    if not is_installed("onnxruntime"):
        return ParityReport(not_checked="onnxruntime is not installed (pip install onnxruntime)")
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def outputs(trial: verify.Trial) -> verify.Outputs:
        (logits,) = session.run(["logits"], {"clips": trial.clips.numpy()})
        return {"logits": torch.from_numpy(logits)}

    peer = Peer(f"onnxruntime {onnxruntime.__version__}", outputs)
    of_three, of_one = (
        peer.compare(model, 3, "{} of 3 clips"),
        peer.compare(model, 1, "{} of 1 clip"),
    )
    return replace(of_three, differences=of_three.differences + of_one.differences)


class Format(NamedTuple):
    """A format that models are exported to; ``ending`` is empty where it is a folder."""

    title: str
    ending: str
    write: Callable[[TrainedModel, Expressed, Path], Written]
    load: str = 'torch.load("{out}", weights_only=True)["model"]'


FORMATS: dict[To, Format] = {
    "transformers": Format(
        "a folder of transformers: VideoMAE, or of images with a class token ViTMAE or ViT",
        "",
        write_transformers,
        'transformers.{kind}.from_pretrained("{out}")',
    ),
    "timm": Format(
        "a folder of timm, of images: a classifier, or the encoder alone",
        "",
        write_timm,
        'timm.create_model("local-dir:{out}", pretrained=True)',
    ),
    "mae": Format(
        "a file with MAE's names, of images: what ViTDet in Detectron2 and MMSegmentation read",
        ".pth",
        write_pickle,
    ),
    "videomae": Format("a file with VideoMAE's names", ".pth", write_pickle),
    "hpm": Format(
        "a file of official HPM, of images: student, teacher and loss predictor",
        ".pth",
        write_hpm,
        'torch.load("{out}", weights_only=True)["ema_state_dict"], or ["state_dict"]',
    ),
    "onnx": Format(
        "a program for onnxruntime, of a classifier",
        ".onnx",
        write_onnx,
        'onnxruntime.InferenceSession("{out}").run(["logits"], {{"clips": clips}})',
    ),
    "file": Format(
        "one file of this package: weights, config and labels", ".safetensors", write_own, "{use}"
    ),
}


@dataclass(frozen=True)
class Exported:
    """The result of an export, and what to print of it."""

    expressed: Expressed
    parity: ParityReport
    files: tuple[Path, ...]
    notes: tuple[str, ...]
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
        CheckpointError: it exists already, the format cannot express the model, the disk does not
            take it, or what was written computes something else.
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
    use = f"python tools/predict.py {out} VIDEO" if model.is_classifier else f"init_weights={out}"
    load = chosen.load.format(out=out, kind=expressed.family.transformers_class, use=use)
    with staged(out) as writing:
        more, check = chosen.write(model, expressed, writing / out.name)
        notes = (*expressed.notes, *more)
        if not skip:
            wrong = "what was exported computes something else than our model, and is not kept"
            parity = check().judged(wrong, tolerance)
        table = parity.as_table() | {
            "format": to,
            "checkpoint": str(model.path.absolute()),
            "weights": model.weights,
            "update": model.update,
            "left_out": expressed.left_out,
            "remarks": notes,
            "load": load,
            "licence": licence,
        }
        write_json(writing / parity_file.relative_to(out.parent), table)
        files = tuple(out.parent / path.name for path in sorted(writing.iterdir()))
    lines = [
        f"{model.kind} as {chosen.title}",
        *describe_left_out(expressed.left_out),
        *notes,
        *parity.lines(),
        f"licence: {licence}",
        f"wrote {', '.join(map(str, files))}",
        f"load it with {load}",
    ]
    return Exported(expressed, parity, files, notes, lines)
