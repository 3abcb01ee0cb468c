"""Import of weights of other projects by the names of this one."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import config_text
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.atomic import write_json
from hpm_video.files.single_file import NAMES, as_folder
from hpm_video.files.weights import CheckpointError, misfits
from hpm_video.models.from_config import check_sizes
from hpm_video.models.positions import position_table
from hpm_video.recognition.trained_model import (
    OF_DECODERS,
    TrainedAutoencoder,
    TrainedClassifier,
    TrainedModel,
)
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.checkpoint import checksums_of, flush, on_host, sha256_of
from hpm_video.weights.families import CONTENT, SUMMED, TABLES, Family, State, recognise
from hpm_video.weights.files import Source, Tensors, read_source
from hpm_video.weights.geometry import Inference, Overrides

SAME_POSITIONS = 1e-3
"""Largest difference between computed tables of positions, beside the rounding of the file."""
TEACHER, OF_TEACHER = "ema_state_dict", "of the teacher: "
"""Key of the teacher beside a student's state dict, and what stands before names of it."""


@dataclass(frozen=True)
class Imported:
    """Weights of another project, by our names and checked against our model."""

    source: Source
    state: State
    model: TrainedModel  # its weights are those of the file alone
    teacher: Tensors | None
    left_out: dict[str, str]
    """Tensors and other parts of the file that are not taken, each with the reason."""
    fresh: tuple[str, ...]
    """Tensors of our model that the file lacks, and that start with random weights."""
    assumed: tuple[str, ...]  # defaults for facts that are not in the file

    @property
    def family(self) -> Family:
        """Whose weights they are."""
        return self.state.family

    @property
    def origin(self) -> dict[str, Any]:
        """The content of origin.json."""
        return {
            "family": self.family.name,
            "source": str(self.source.path.absolute()),
            "state_dict": self.state.entry,
            "prefix": self.state.prefix,
            "teacher": self.teacher is not None,
            "epoch": self.source.epoch,
            "licence": self.family.licence,
            "assumed": list(self.assumed),
            "left_out": self.left_out,
            "start_fresh": list(self.fresh),
        }

    @property
    def complete(self) -> TrainedModel:
        """The model with random weights where the file lacks some."""
        drawn = self.model.make().state_dict() if self.fresh else {}
        return replace(self.model, held=drawn | self.model.tensors)


def import_weights(path: Path, overrides: Overrides | None = None) -> Imported:
    """Read the weights of a file or folder of another project.

    Every tensor of the file is used, or left out with a reason. A classifier keeps its head. An
    encoder becomes a masked autoencoder whose decoder starts fresh; so does a classifier with
    ``encoder_only``. Positions that are not those that are computed here are kept.

    Raises:
        CheckpointError: the file cannot be read safely, is of no known family, or does not fit:
            each tensor that is unknown, missing or of another shape is named.
    """
    given = overrides or Overrides()
    if _is_ours(path):
        raise CheckpointError(f"{path} is of this package already: give it as init_weights")
    source = read_source(path)
    try:
        states = [recognise(source, given.entry, given.prefix)]
        alone = given.entry or given.prefix or given.encoder_only
        beside = source.entries.keys() - {states[0].entry}
        if TEACHER in beside and states[0].family.holds == "autoencoder" and not alone:
            teacher = recognise(source, TEACHER)
            states += [teacher] if teacher.family is states[0].family else []
        return _fit(source, states, given)
    except (CheckpointError, ConfigError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _is_ours(path: Path) -> bool:
    """Whether it is a checkpoint of this package: a folder, its weights, or a single file."""
    if path.is_dir() or path.stem in NAMES:
        return ((path if path.is_dir() else path.parent) / "config.yaml").is_file()
    with suppress(CheckpointError), as_folder(path):
        return path.is_file()
    return False


def _fit(source: Source, states: list[State], given: Overrides) -> Imported:
    """Infer the model of which the first of the states is, and fit them all to it."""
    state, *of_teacher = states
    inferred = Inference(source, state, given)
    may_lack: tuple[str, ...] = ()
    if state.family.holds == "encoder" or given.encoder_only:
        # A model that norms the mean of its tokens has no norm of the tokens.
        means = "fc_norm.weight" in state.tensors
        may_lack = (*OF_DECODERS, "norm.") if means else OF_DECODERS
    if given.encoder_only:
        state.leave_out((*OF_DECODERS, "head.", "fc_norm."), "only the encoder is taken")
    held = sum(value.nbytes for each in states for value in each.tensors.values())
    check_sizes(inferred.config, len(inferred.label_names), held, source.path)
    config, path = _with_positions(inferred.config, states), source.path
    model: TrainedModel
    if isinstance(config, FinetuneConfig):
        labels = inferred.label_names
        model = TrainedClassifier(path, "model", 0, config.data, config, labels, held=state.tensors)
    else:
        model = TrainedAutoencoder(path, "student", 0, config.data, config, held=state.tensors)
    with torch.device("meta"):
        own = model.make().state_dict()
    for each in states:
        if wrong := misfits(own, each.tensors, may_lack=may_lack, called=each.called):
            hint = "--encoder-only leaves out a head"
            if each.prefix:
                hint += f", --prefix {each.prefix} all names that do not begin with it"
            lines = [f"the tensors of {each.family.name} are not those of our model ({hint}):"]
            raise CheckpointError("\n  ".join([*lines, *wrong]))
    left_out = state.left_out | dict.fromkeys(source.beside, "no weights")
    others = source.entries.keys() - {each.entry for each in states}
    left_out |= dict.fromkeys(sorted(others), "another state dict; choose it with --entry")
    for each in of_teacher:
        left_out |= {f"{OF_TEACHER}{name}": why for name, why in each.left_out.items()}
    fresh = tuple(name for name in own if name not in state.tensors)
    teacher = of_teacher[0].tensors if of_teacher else None
    return Imported(source, state, model, teacher, left_out, fresh, tuple(inferred.assumed))


def _with_positions(
    config: PretrainConfig | FinetuneConfig, states: list[State]
) -> PretrainConfig | FinetuneConfig:
    """Leave out tables that are computed here. If any is another one, the model keeps them all."""
    if config.model.conventions == "videomae":  # which has none in its files
        return config
    grid = TokenGrid.of_clip(config.data.clip_size, config.model.patch_size)
    sizes, learned = {TABLES[0]: config.model.encoder.dim}, False
    if isinstance(config, PretrainConfig) and CONTENT in states[0].tensors:
        sizes[TABLES[1]] = config.model.decoder.dim
    for state in states:
        if SUMMED[0] in state.tensors:
            space, time, first = (state.tensors.pop(name) for name in SUMMED)
            both = (time.unsqueeze(2) + space.unsqueeze(1)).flatten(1, 2)
            state.tensors[TABLES[0]] = torch.cat([first, both], dim=1)
        for table, dim in sizes.items():
            ours = position_table(grid, dim, config.model.positions).unsqueeze(0)
            distance = _to_own_positions(state, table, ours)
            learned |= distance > SAME_POSITIONS + state.eps
    if learned:
        given: Any = replace(config.model, positions="given")
        return replace(config, model=given)
    for state in states:
        state.leave_out(TABLES, "computed here, with the same numbers")
    return config


def _to_own_positions(state: State, table: str, ours: Tensor) -> float:
    """Take off a position of the class token, which is added to it. -> distance from ``ours``"""
    name, token = state.called(table), state.tensors.get("cls_token")
    if table not in state.tensors:
        raise CheckpointError(f"missing {name}")
    found = state.tensors[table]
    if token is not None and found.shape == (1, ours.shape[1] + 1, ours.shape[2]):
        first, found = found[:, :1], found[:, 1:]
        if table == TABLES[0] and token.shape == first.shape:
            state.tensors["cls_token"] = token + first
        elif first.any():
            raise CheckpointError(f"{name} has a position for a class token of its own")
    if found.shape != ours.shape:
        raise CheckpointError(
            f"{name} has the shape {tuple(state.tensors[table].shape)}, our model has "
            f"{ours.shape[1]} tokens of {ours.shape[2]} values; give the frame size of its "
            f"training: --frame-size"
        )
    state.tensors[table] = found
    return (found - ours).abs().max().item()


# --- What a file holds, in words ------------------------------------------------------------------


def describe(imported: Imported) -> list[str]:
    """Return the model, its licence and all that is not the file's own, in lines."""
    config = imported.model.config
    told = imported.origin | {"start_fresh": _grouped(imported.fresh), "left_out": None}
    count = sum(value.numel() for value in imported.model.tensors.values())
    return [
        f"{config.model}",
        f"{count / 1e6:.1f} M parameters",
        f"{config.data.num_frames} frames of {config.data.frame_size}",
        *(f"{name.replace('_', ' ')}: {value}" for name, value in told.items() if value),
        *describe_left_out(imported.left_out),
    ]


def describe_left_out(left_out: dict[str, str]) -> list[str]:
    """Return lines on what is left out, and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"left out: {_grouped(names)}: {why}" for why, names in reasons.items()]


def _grouped(names: Iterable[str]) -> str:
    """List the names of tensors, those of all blocks as one."""
    kinds = Counter(re.sub(r"((^|[._])(blocks\w*|layers?))\.\d+\..*", r"\1", n) for n in names)
    return ", ".join(f"{n} ({count} tensors)" if count > 1 else n for n, count in kinds.items())


# --- Files that are complete or absent ------------------------------------------------------------


@contextmanager
def staged(out: Path, *beside: Path) -> Iterator[Path]:
    """Return a folder to write ``out`` in: at the end all of its content is moved out, or nothing.

    Raises:
        CheckpointError: it or what is written ``beside`` it exists, or the disk does not take it.
    """
    for path in (out, *beside):
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} exists already; give another name, or delete it")
    writing = out.with_name(f".writing-{out.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        written = sorted(writing.iterdir())
        for folder in (*filter(Path.is_dir, written), writing):
            flush(folder)
        for path in written:
            path.rename(out.parent / path.name)
        flush(out.parent, recursive=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write {out}: {error}. Make room, and start the same command again"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def write_folder(imported: Imported, folder: Path, parity: dict[str, Any]) -> None:
    """Write what ``init_weights`` and the programs of ``tools/`` read.

    Raises:
        CheckpointError: the folder exists, or the disk does not take it.
    """
    path = imported.source.path
    inside = (p for p in sorted(path.glob("*")) if p.suffix in (".safetensors", ".bin", ".json"))
    sums = {file.name: sha256_of(file) for file in (inside if path.is_dir() else [path])}
    weights = {"model": imported.complete.tensors}
    if imported.teacher is not None:
        weights["teacher"] = imported.teacher
    with staged(folder) as staging:
        writing = staging / folder.name
        write_model(writing, imported.model, weights, imported_from=imported.family.name)
        write_json(writing / "origin.json", imported.origin | {"sha256": sums})
        write_json(writing / "parity.json", parity)


def write_model(
    folder: Path, model: TrainedModel, weights: dict[str, Tensors], **state: str
) -> None:
    """Write a checkpoint folder. ``state``: what its state.json has beside update and checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in weights.items():
        save_file(on_host(tensors), folder / f"{name}.safetensors", metadata={"format": "pt"})
    for name, text in texts_of(model).items():
        (folder / name).write_text(text, encoding="utf-8")
    sums = {"sha256": checksums_of(folder)}
    write_json(folder / "state.json", {"update": model.update, **state, **sums})


def texts_of(model: TrainedModel) -> dict[str, str]:
    """Return the files of a checkpoint folder beside weights: their texts by name."""
    found = {
        "config.yaml": config_text(model.config),
        "state.json": json.dumps({"update": model.update}) + "\n",
        "labels.txt": "".join(f"{name}\n" for name in model.label_names),
        "origin.json": model.origin,
    }
    return {name: text for name, text in found.items() if text}
