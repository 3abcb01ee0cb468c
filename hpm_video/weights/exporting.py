"""Models of this package for other projects: written, loaded back and compared, or not at all."""

import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hpm_video.files.single_file import as_folder, write_single_file
from hpm_video.files.weights import CheckpointError
from hpm_video.training.checkpoint import flush
from hpm_video.weights.express import Expressed, To, express
from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import import_weights, parts_of, write_json
from hpm_video.weights.model import TrainedModel, file_of, load_model
from hpm_video.weights.parity import (
    NOT_ASKED,
    TOLERANCE,
    ParityReport,
    Peer,
    compare_with,
    differences,
    said_by,
    trial_of,
)
from hpm_video.weights.peers import compare, is_installed, of_timm, of_transformers, said_by_timm
from hpm_video.weights.writing import (
    WEIGHTS,
    notes_of_hpm,
    notes_of_transformers,
    timm_arguments,
    timm_name,
    write_hpm,
    write_onnx,
    write_pickle,
    write_timm,
    write_transformers,
)

PARITY = "parity.json"
KEPT = "what was exported computes something else than our model, and is not kept"
NO_LOCAL_SAFETENSORS = (
    "timm {} cannot read a folder of safetensors by local-dir, as later versions do: create the "
    "model and load the state dict"
)


def check_file(model: TrainedModel, _: Expressed, file: Path) -> ParityReport:
    """Read a file of another project back with our importer, and compare that with a library's."""
    imported = import_weights(file, overrides_for(model))
    if imported.fresh:
        raise CheckpointError(f"the exported file lacks {', '.join(imported.fresh)}")
    trial = trial_of(model)
    back = differences(said_by(model.build(), trial), said_by(imported.model.build(), trial))
    other = compare(imported)
    return replace(
        other,
        with_what=f"our importer and {other.with_what}",
        differences=(
            *(replace(each, of=f"{each.of} read back") for each in back),
            *other.differences,
        ),
    )


def overrides_for(model: TrainedModel) -> Overrides:
    """Return what an importer has to be told of a file that says little of itself."""
    data = model.config.data
    return Overrides(
        heads=model.encoder.num_heads,
        decoder=model.decoder,
        decoder_heads=None if model.decoder is None else model.decoder.num_heads,
        num_frames=data.num_frames,
        frame_size=data.frame_size,
        frame_stride=data.frame_stride,
        target=model.pretraining.mining.pixel_kind if model.pretraining else None,
        label_names=model.label_names or None,
    )


def check_own(model: TrainedModel, _: Expressed, file: Path) -> ParityReport:
    """Read one file of our own alone, as ``tools/predict.py`` does."""
    trial = trial_of(model)
    with as_folder(file) as folder:
        back = load_model(folder, model.weights).build()
    return ParityReport(
        "this package, from the file alone",
        differences(said_by(model.build(), trial), said_by(back, trial)),
    )


def check_transformers(model: TrainedModel, expressed: Expressed, folder: Path) -> ParityReport:
    """Read a folder with ``from_pretrained``."""
    if not is_installed("transformers"):
        return ParityReport(
            "", not_checked="transformers is not installed (pip install transformers)"
        )
    trial = trial_of(model)
    peer = of_transformers(expressed.family.transformers_class, folder)
    return compare_with(peer, said_by(model.build(), trial), trial)


def check_timm(model: TrainedModel, _: Expressed, folder: Path) -> ParityReport:
    """Read a folder with ``create_model``: with the state dict, and by the folder's name."""
    import timm

    trial, channels = trial_of(model), model.config.model.channels
    ours = said_by(model.build(), trial)
    sizes = {"num_classes": len(model.label_names), "in_chans": channels}
    arguments = timm_arguments(model) | sizes
    report = compare_with(
        of_timm(timm_name(model), arguments, load_file(folder / WEIGHTS)), ours, trial
    )
    logging.getLogger("timm").setLevel(logging.WARNING)
    try:
        by_name = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=channels)
    except pickle.UnpicklingError:
        return replace(report, notes=(NO_LOCAL_SAFETENSORS.format(timm.__version__),))
    peer = Peer(report.with_what, (by_name.eval(),), lambda each: said_by_timm(by_name, each))
    second = compare_with(peer, ours, trial).differences
    told = tuple(replace(each, of=f"{each.of} by local-dir") for each in second)
    return replace(report, differences=report.differences + told)


def check_onnx(model: TrainedModel, _: Expressed, file: Path) -> ParityReport:
    """Run a program of ONNX with onnxruntime, on several clips at once and on one."""
    if not is_installed("onnxruntime"):
        return ParityReport(
            "", not_checked="onnxruntime is not installed (pip install onnxruntime)"
        )
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    trial = trial_of(model, clips=3)
    ours = said_by(model.build(), trial)["logits"]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    of_three, of_one = (
        torch.from_numpy(session.run(["logits"], {"clips": clips.numpy()})[0])
        for clips in (trial.clips, trial.clips[:1])
    )
    found = differences(
        {"logits of 3 clips": ours, "logits of 1 clip": ours[:1]},
        {"logits of 3 clips": of_three, "logits of 1 clip": of_one},
    )
    return ParityReport(f"onnxruntime {onnxruntime.__version__}", found)


def write_own(model: TrainedModel, _: Expressed, file: Path) -> None:
    """Write the whole model as one file of safetensors."""
    write_single_file(file, model.tensors, file_of(model.weights), model.kind, model.texts())


@dataclass(frozen=True)
class Format:
    """A kind of files that models are exported to."""

    says: str
    ending: str
    """Of the file; empty where it is a folder."""
    load: str
    """How to load it."""
    write: Callable[[TrainedModel, Expressed, Path], None]
    check: Callable[[TrainedModel, Expressed, Path], ParityReport]
    notes: Callable[[TrainedModel, Expressed], list[str]] = lambda _model, _expressed: []


FORMATS: dict[To, Format] = {
    "transformers": Format(
        "a folder of transformers: VideoMAE, or of images with a class token ViTMAE or ViT",
        "",
        'transformers.{kind}.from_pretrained("{out}")',
        write_transformers,
        check_transformers,
        notes_of_transformers,
    ),
    "timm": Format(
        "a folder of timm, of images: a classifier, or the encoder alone",
        "",
        'timm.create_model("local-dir:{out}", pretrained=True), or timm.create_model("{timm}", '
        "num_classes={classes}, {arguments}) and load_state_dict of {out}/model.safetensors",
        write_timm,
        check_timm,
    ),
    "mae": Format(
        "a file with MAE's names, of images: what ViTDet in Detectron2 and MMSegmentation read",
        ".pth",
        'torch.load("{out}", weights_only=True)["model"]',
        write_pickle,
        check_file,
    ),
    "videomae": Format(
        "a file with VideoMAE's names",
        ".pth",
        'torch.load("{out}", weights_only=True)["model"]',
        write_pickle,
        check_file,
    ),
    "hpm": Format(
        "a file of official HPM, of images: student, teacher and loss predictor",
        ".pth",
        'torch.load("{out}", weights_only=True)["ema_state_dict"], or ["state_dict"]',
        write_hpm,
        check_file,
        notes_of_hpm,
    ),
    "onnx": Format(
        "a program for onnxruntime, of a classifier",
        ".onnx",
        'onnxruntime.InferenceSession("{out}").run(["logits"], {{"clips": clips}})',
        write_onnx,
        check_onnx,
    ),
    "file": Format(
        "one file of this package: weights, config and labels",
        ".safetensors",
        "{use}",
        write_own,
        check_own,
    ),
}


def _how_to_load(model: TrainedModel, expressed: Expressed, to: To, out: Path) -> str:
    arguments = timm_arguments(model)
    return FORMATS[to].load.format(
        out=out,
        kind=expressed.family.transformers_class,
        timm=timm_name(model),
        classes=len(model.label_names),
        arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()),
        use=f"python tools/predict.py {out} VIDEO"
        if model.is_classifier
        else f"init_weights={out}",
    )


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    model: TrainedModel
    expressed: Expressed
    parity: ParityReport
    files: tuple[Path, ...]
    load: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Tell of it in the terminal."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.expressed.left_out.items():
            reasons.setdefault(reason, []).append(name)
        return [
            f"{self.model.kind} as {self.expressed.says}",
            *(f"left out: {', '.join(parts_of(names))}: {why}" for why, names in reasons.items()),
            *self.notes,
            *self.parity.lines(),
            f"licence: {self.model.licence}",
            f"wrote {', '.join(map(str, self.files))}",
            f"load it with {self.load}",
        ]


def export(
    model: TrainedModel, out: Path, to: To, tolerance: float = TOLERANCE, *, skip: bool = False
) -> Exported:
    """Write a model as another project reads it, load it back there, and compare.

    Nothing is left behind where that fails. ``skip``: do not compare, only say so.

    Raises:
        CheckpointError: it exists already, the format cannot express the model, the disk does not
            take it, or what was written computes something else.
    """
    form = FORMATS[to]
    if out.suffix != form.ending and form.ending:
        raise CheckpointError(f"--to {to} writes a file that ends in {form.ending}, got {out}")
    parity_file = out / PARITY if not form.ending else out.with_name(f"{out.name}.{PARITY}")
    for path in (out, parity_file):
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} exists already; give another name, or delete it")
    expressed = express(model, to)
    writing = out.with_name(f".writing-{out.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        staged = writing / out.name
        form.write(model, expressed, staged)
        parity = NOT_ASKED
        if not skip:
            parity = form.check(model, expressed, staged).judged(KEPT, tolerance)
        notes = (*expressed.notes, *form.notes(model, expressed))
        load = _how_to_load(model, expressed, to, out)
        table = parity.as_table() | {
            "format": to,
            "form": expressed.says,
            "checkpoint": str(model.path.absolute()),
            "weights": model.weights,
            "update": model.update,
            "left_out": expressed.left_out,
            "remarks": notes,
            "load": load,
            "licence": model.licence,
        }
        write_json(writing / parity_file.relative_to(out.parent), table)
        for folder in (staged, writing):
            if folder.is_dir():
                flush(folder)
        files = _move(writing, out.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {out}: {error}. Make room, and start the same command again"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return Exported(model, expressed, parity, files, load, notes)


def _move(writing: Path, folder: Path) -> tuple[Path, ...]:
    """Put what was written in its place. -> the files and folders"""
    found = sorted(writing.iterdir())
    taken = [path.name for path in found if (folder / path.name).exists()]
    if taken:
        raise CheckpointError(f"{folder / taken[0]} exists already; give another name")
    return tuple(path.rename(folder / path.name) for path in found)
