"""Export of models to other projects: each is loaded back and compared, or not kept."""

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.weights.express import Expressed, To, express
from hpm_video.weights.families import licence_of
from hpm_video.weights.folder import staged, write_json
from hpm_video.weights.importing import describe_left_out, import_weights
from hpm_video.weights.parity import (
    NOT_ASKED,
    TOLERANCE,
    Outputs,
    ParityReport,
    Peer,
    Trial,
    is_installed,
    of_timm,
    of_transformers,
    outputs_of,
    peer_of_timm,
)
from hpm_video.weights.verify import compare
from hpm_video.weights.writing import (
    timm_arguments,
    timm_name,
    write_hpm,
    write_onnx,
    write_own,
    write_pickle,
    write_timm,
    write_transformers,
)

KEPT = "what was exported computes something else than our model, and is not kept"


def check_file(model: TrainedModel, _: Expressed, file: Path) -> ParityReport:
    """Read a file of another project back with our importer, and compare that with a library's."""
    imported = import_weights(file)
    built, other = imported.model.build(), compare(imported)
    back = Peer("our importer", (), partial(outputs_of, built)).compare(model)
    return replace(
        other,
        with_what=f"our importer and {other.with_what}",
        differences=(*back.of("{} read back"), *other.differences),
    )


def check_own(model: TrainedModel, _: Expressed, file: Path) -> ParityReport:
    """Read one file of our own alone, as ``tools/predict.py`` does."""
    back = open_trained(file, TrainedModel, model.weights).build()
    name = "this package, from the file alone"
    return Peer(name, (), partial(outputs_of, back)).compare(model)


def check_transformers(model: TrainedModel, expressed: Expressed, folder: Path) -> ParityReport:
    """Read a folder with ``from_pretrained``."""
    return of_transformers(expressed.family.transformers_class, folder).compare(model)


def check_timm(model: TrainedModel, _: Expressed, folder: Path) -> ParityReport:
    """Read a folder with ``create_model``."""
    import timm

    logging.getLogger("timm").setLevel(logging.WARNING)
    channels, name = model.config.model.channels, f"timm {timm.__version__}: {timm_name(model)}"
    try:
        built = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=channels)
        peer = peer_of_timm(name, built.eval())
    except pickle.UnpicklingError:  # earlier versions read no safetensors so
        tensors = load_file(folder / "model.safetensors")
        peer = of_timm(timm_name(model), timm_arguments(model), tensors)
    return peer.compare(model)


def check_onnx(model: TrainedModel, _: Expressed, file: Path) -> ParityReport:
    """Run a program of ONNX with onnxruntime, on several clips at once and on one."""
    if not is_installed("onnxruntime"):
        return ParityReport(not_checked="onnxruntime is not installed (pip install onnxruntime)")
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def outputs(trial: Trial) -> Outputs:
        (logits,) = session.run(["logits"], {"clips": trial.clips.numpy()})
        return {"logits": torch.from_numpy(logits)}

    peer = Peer(f"onnxruntime {onnxruntime.__version__}", (), outputs)
    of_three, of_one = (peer.compare(model, clips) for clips in (3, 1))
    found = (*of_three.of("{} of 3 clips"), *of_one.of("{} of 1 clip"))
    return replace(of_three, differences=found)


@dataclass(frozen=True)
class Format:
    """A format that models are exported to."""

    says: str
    ending: str
    """Of the file; empty where it is a folder."""
    load: str
    """How to load it."""
    write: Callable[[TrainedModel, Expressed, Path], list[str]]
    """Returns notes: what the file does not hold, or holds otherwise."""
    check: Callable[[TrainedModel, Expressed, Path], ParityReport]


OF_A_FILE = 'torch.load("{out}", weights_only=True)["model"]'
FORMATS: dict[To, Format] = {
    "transformers": Format(
        "a folder of transformers: VideoMAE, or of images with a class token ViTMAE or ViT",
        "",
        'transformers.{kind}.from_pretrained("{out}")',
        write_transformers,
        check_transformers,
    ),
    "timm": Format(
        "a folder of timm, of images: a classifier, or the encoder alone",
        "",
        'timm.create_model("local-dir:{out}", pretrained=True)',
        write_timm,
        check_timm,
    ),
    "mae": Format(
        "a file with MAE's names, of images: what ViTDet in Detectron2 and MMSegmentation read",
        ".pth",
        OF_A_FILE,
        write_pickle,
        check_file,
    ),
    "videomae": Format("a file with VideoMAE's names", ".pth", OF_A_FILE, write_pickle, check_file),
    "hpm": Format(
        "a file of official HPM, of images: student, teacher and loss predictor",
        ".pth",
        'torch.load("{out}", weights_only=True)["ema_state_dict"], or ["state_dict"]',
        write_hpm,
        check_file,
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


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    model: TrainedModel
    format: Format
    expressed: Expressed
    parity: ParityReport
    files: tuple[Path, ...]
    load: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        return [
            f"{self.model.kind} as {self.format.says}",
            *describe_left_out(self.expressed.left_out),
            *self.notes,
            *self.parity.lines(),
            f"licence: {licence_of(self.model.origin)}",
            f"wrote {', '.join(map(str, self.files))}",
            f"load it with {self.load}",
        ]


def export(
    model: TrainedModel, out: Path, to: To, tolerance: float = TOLERANCE, *, skip: bool = False
) -> Exported:
    """Write a model as another project reads it, load it back there, and compare.

    Nothing is left behind where that fails. ``skip``: do not compare.

    Raises:
        CheckpointError: it exists already, the format cannot express the model, the disk does not
            take it, or what was written computes something else.
    """
    chosen = FORMATS[to]
    if out.suffix != chosen.ending and chosen.ending:
        raise CheckpointError(f"--to {to} writes a file that ends in {chosen.ending}, got {out}")
    parity_file = out.with_name(f"{out.name}.parity.json") if chosen.ending else out / "parity.json"
    for path in (out, parity_file):
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} exists already; give another name, or delete it")
    model = replace(model, held=model.tensors)
    expressed, parity = express(model, to), NOT_ASKED
    with staged(out) as writing:
        staged_out = writing / out.name
        notes = (*expressed.notes, *chosen.write(model, expressed, staged_out))
        if not skip:
            parity = chosen.check(model, expressed, staged_out).judged(KEPT, tolerance)
        use = f"python tools/predict.py {out} VIDEO"
        use = use if model.is_classifier else f"init_weights={out}"
        load = chosen.load.format(out=out, kind=expressed.family.transformers_class, use=use)
        table = parity.as_table() | {
            "format": to,
            "checkpoint": str(model.path.absolute()),
            "weights": model.weights,
            "update": model.update,
            "left_out": expressed.left_out,
            "remarks": notes,
            "load": load,
            "licence": licence_of(model.origin),
        }
        write_json(writing / parity_file.relative_to(out.parent), table)
        files = tuple(out.parent / path.name for path in sorted(writing.iterdir()))
    return Exported(model, chosen, expressed, parity, files, load, notes)
