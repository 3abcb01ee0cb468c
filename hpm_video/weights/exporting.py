"""Models of this package for other projects: written, loaded back and compared, or not at all."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from hpm_video.files.weights import CheckpointError
from hpm_video.training.checkpoint import flush
from hpm_video.weights.forms import FORMS, ONNX, OWN, Expressed, Form, express, of_transformers
from hpm_video.weights.own import OwnModel
from hpm_video.weights.parity import TOLERANCE, ParityReport
from hpm_video.weights.verify import (
    check_file,
    check_onnx,
    check_own,
    check_timm,
    check_transformers,
    not_checked,
)
from hpm_video.weights.writing import (
    kind_of,
    notes_of_hpm,
    notes_of_transformers,
    timm_arguments,
    timm_name,
    write_hpm,
    write_json,
    write_onnx,
    write_own,
    write_pickle,
    write_timm,
    write_transformers,
)

To = Literal["transformers", "timm", "mae", "videomae", "hpm", "onnx", "file"]
PARITY = "parity.json"
KEPT = "what was exported computes something else than our model, and is not kept"


def _no_notes(_own: OwnModel, _expressed: Expressed) -> list[str]:
    return []


@dataclass(frozen=True)
class Format:
    """A kind of files that models are exported to."""

    says: str
    ending: str
    """Of the file; empty where it is a folder."""
    form: Callable[[OwnModel], Form]
    write: Callable[[OwnModel, Expressed, Path], None]
    check: Callable[[OwnModel, Expressed, Path], ParityReport]
    load: Callable[[OwnModel, Expressed, Path], str]
    """How to load it."""
    notes: Callable[[OwnModel, Expressed], list[str]] = _no_notes


def _load_timm(own: OwnModel, _expressed: Expressed, folder: Path) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in timm_arguments(own).items())
    return (
        f'timm.create_model("local-dir:{folder}", pretrained=True), or timm.create_model('
        f'"{timm_name(own)}", num_classes={len(own.label_names)}, {arguments}) and '
        f"load_state_dict of {folder / 'model.safetensors'}"
    )


def _load_transformers(_own: OwnModel, expressed: Expressed, folder: Path) -> str:
    return f'transformers.{kind_of(expressed)}.from_pretrained("{folder}")'


def _load_pickle(_own: OwnModel, _expressed: Expressed, file: Path) -> str:
    return f'torch.load("{file}", weights_only=True)["model"]'


def _load_hpm(_own: OwnModel, _expressed: Expressed, file: Path) -> str:
    return f'torch.load("{file}", weights_only=True)["ema_state_dict"], or ["state_dict"]'


def _load_onnx(_own: OwnModel, _expressed: Expressed, file: Path) -> str:
    return f'onnxruntime.InferenceSession("{file}").run(["logits"], {{"clips": clips}})'


def _load_own(own: OwnModel, _expressed: Expressed, file: Path) -> str:
    if own.is_classifier:
        return f"python tools/predict.py {file} VIDEO"
    return f"init_weights={file}"


FORMATS: dict[To, Format] = {
    "transformers": Format(
        "a folder of transformers: VideoMAE, or of images with a class token ViTMAE or ViT",
        "",
        lambda own: FORMS[of_transformers(own)],
        write_transformers,
        check_transformers,
        _load_transformers,
        lambda own, expressed: notes_of_transformers(own, kind_of(expressed)),
    ),
    "timm": Format(
        "a folder of timm, of images: a classifier, or the encoder alone",
        "",
        lambda _: FORMS["timm"],
        write_timm,
        lambda own, _, folder: check_timm(own, folder),
        _load_timm,
    ),
    "mae": Format(
        "a file with MAE's names, of images: what ViTDet in Detectron2 and MMSegmentation read",
        ".pth",
        lambda own: FORMS["mae_classifier" if own.is_classifier else "mae"],
        write_pickle,
        lambda own, _, file: check_file(own, file),
        _load_pickle,
    ),
    "videomae": Format(
        "a file with VideoMAE's names",
        ".pth",
        lambda own: FORMS["videomae_classifier" if own.is_classifier else "videomae"],
        write_pickle,
        lambda own, _, file: check_file(own, file),
        _load_pickle,
    ),
    "hpm": Format(
        "a file of official HPM, of images: student, teacher and loss predictor",
        ".pth",
        lambda _: FORMS["hpm"],
        write_hpm,
        lambda own, _, file: check_file(own, file),
        _load_hpm,
        lambda own, _: notes_of_hpm(own),
    ),
    "onnx": Format(
        "a program for onnxruntime, of a classifier",
        ".onnx",
        lambda _: ONNX,
        lambda own, _, file: write_onnx(own, file),
        lambda own, _, file: check_onnx(own, file),
        _load_onnx,
    ),
    "file": Format(
        "one file of this package: weights, config and labels",
        ".safetensors",
        lambda _: OWN,
        lambda own, _, file: write_own(own, file),
        lambda own, _, file: check_own(own, file),
        _load_own,
    ),
}


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    own: OwnModel
    expressed: Expressed
    parity: ParityReport
    files: tuple[Path, ...]
    load: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the terminal."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.expressed.left_out.items():
            reasons.setdefault(reason, []).append(name)
        return [
            f"{self.own.kind} as {self.expressed.form.name}",
            *(f"left out: {_parts(names)}: {reason}" for reason, names in reasons.items()),
            *self.notes,
            *self.parity.lines(),
            f"licence: {self.own.licence}",
            f"wrote {', '.join(map(str, self.files))}",
            f"load it with {self.load}",
        ]


def _parts(names: list[str]) -> str:
    first = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"{first} ({len(names)} tensors)" if len(names) > 1 else names[0]


def export(
    own: OwnModel, out: Path, to: To, tolerance: float = TOLERANCE, *, skip: bool = False
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
    expressed = express(own, form.form(own))
    writing = out.with_name(f".writing-{out.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        staged = writing / out.name
        form.write(own, expressed, staged)
        parity = not_checked("it was not asked for")
        if not skip:
            parity = form.check(own, expressed, staged).judged(KEPT, tolerance)
        notes = (*expressed.notes, *form.notes(own, expressed))
        load = form.load(own, expressed, out)
        table = parity.as_table() | {
            "format": to,
            "form": expressed.form.name,
            "checkpoint": str(own.checkpoint.absolute()),
            "weights": own.weights,
            "update": own.update,
            "left_out": expressed.left_out,
            "remarks": notes,
            "load": load,
            "licence": own.licence,
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
    return Exported(own, expressed, parity, files, load, notes)


def _move(writing: Path, folder: Path) -> tuple[Path, ...]:
    """Put what was written in its place. -> the files and folders

    Raises:
        CheckpointError: something is there already.
    """
    found = sorted(writing.iterdir())
    taken = [path.name for path in found if (folder / path.name).exists()]
    if taken:
        raise CheckpointError(f"{folder / taken[0]} exists already; give another name")
    return tuple(path.rename(folder / path.name) for path in found)
