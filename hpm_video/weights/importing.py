"""Import of weights of other projects by the names of this one."""

import json
import re
import shutil
from collections.abc import Iterator
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
from hpm_video.weights.families import SUMMED, TABLES, TEACHER, Family, Recognised, recognise
from hpm_video.weights.files import Source, Tensors, read_source
from hpm_video.weights.geometry import Inference, MissingOptionError, Overrides

SAME_POSITIONS = 1e-3
"""Largest difference between computed tables of positions, beside the rounding of the file."""
OF_TEACHER = "of the teacher: "


@dataclass(frozen=True)
class Imported:
    """Weights of another project, by our names and checked against our model."""

    source: Source
    recognised: Recognised
    model: TrainedModel
    """Its weights are those of the file alone."""
    teacher: Tensors | None
    left_out: dict[str, str]
    """Tensors and other parts of the file that are not taken, each with the reason."""
    fresh: tuple[str, ...]
    """Tensors of our model that the file lacks, and that start with random weights."""
    assumed: tuple[str, ...]
    """Defaults for facts that are not in the file."""

    @property
    def family(self) -> Family:
        """Whose weights they are."""
        return self.recognised.family


def import_weights(path: Path, overrides: Overrides | None = None) -> Imported:
    """Read the weights of a file or folder of another project.

    Every tensor of the file is used, or left out with a reason. A classifier keeps its head. An
    encoder becomes a masked autoencoder whose decoder starts fresh; so does a classifier with
    ``encoder_only``. Positions that are not those that are computed here are kept.

    Raises:
        CheckpointError: the file cannot be read safely, is of no known family, or does not fit:
            each tensor that is unknown, missing or of another shape is named.
    """
    overrides = overrides or Overrides()
    own = folder_of(path) is not None
    if not own:
        source = read_source(path)
        recognised = recognise(source, overrides.entry, overrides.prefix)
        own = recognised.family.name == "ours"
    if own:
        raise CheckpointError(f"{path} is of this package already: give its folder as init_weights")
    if overrides.encoder_only:
        recognised = replace(recognised, teacher=None)
    try:
        return _imported(source, recognised, overrides)
    except (CheckpointError, ConfigError, ValueError) as error:
        kind = MissingOptionError if isinstance(error, MissingOptionError) else CheckpointError
        raise kind(f"{path} ({recognised.family.title}): {error}") from error


def folder_of(path: Path) -> Path | None:
    """Return the checkpoint folder or single file of this package that a path is, or lies in."""
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.stem in NAMES) and (folder / "config.yaml").is_file():
        return folder
    if path.is_file() and path.suffix == ".safetensors":
        with suppress(CheckpointError), as_folder(path):
            return path
    return None


class State:
    """The tensors of a state dict by our names; queries, keys and values in parts as there."""

    def __init__(self, family: Family, stored: Tensors) -> None:
        """Copy them in single precision.

        Raises:
            CheckpointError: one is given twice, or is of no use.
        """
        self.family, self.tensors = family, Tensors()
        self.origins: dict[str, str] = {}
        """Their names in the file."""
        self.left_out: dict[str, str] = {}
        """Names in the file that have no place here, each with the reason."""
        self.eps = 0.0
        """The distance of numbers near 1 where they are stored."""
        for name, value in stored.items():
            _check_numbers(name, value)
            ours = family.ours(name)
            if reasons := [why for pattern, why in family.left_out if re.fullmatch(pattern, name)]:
                self.left_out[name] = reasons[0]
            elif ours in self.tensors:
                raise CheckpointError(f"{name} is given twice, by {self.origins[ours]}")
            else:
                self.tensors[ours], self.origins[ours] = value.float().clone(), name
                self.eps = max(self.eps, torch.finfo(value.dtype).eps)

    def called(self, name: str) -> str:
        """Return the name of a tensor of ours in the file."""
        return self.origins.get(name) or self.family.theirs(name)

    def leave_out(self, beginnings: tuple[str, ...], why: str) -> None:
        """Take out tensors by how their names begin."""
        for name in [each for each in self.tensors if each.startswith(beginnings)]:
            del self.tensors[name]
            self.left_out[self.called(name)] = why

    def distance(self, table: str, ours: Tensor) -> float:
        """Return how far positions are from ours; one of the class token is added to that."""
        name, token = self.called(table), self.tensors.get("cls_token")
        if table not in self.tensors:
            raise CheckpointError(f"missing {name}")
        found, shape = self.tensors[table], tuple(self.tensors[table].shape)
        if token is not None and shape == (1, ours.shape[1] + 1, ours.shape[2]):
            first, found = found[:, :1], found[:, 1:]
            if table != TABLES[0] and first.any():
                raise CheckpointError(f"{name} has a position for a class token of its own")
            if token.shape == first.shape and table == TABLES[0]:
                self.tensors["cls_token"] = token + first
        if found.shape != ours.shape:
            raise CheckpointError(
                f"{name} has the shape {shape}, our model has {ours.shape[1]} tokens of "
                f"{ours.shape[2]} values; give the frame size of its training: --frame-size"
            )
        self.tensors[table] = found
        return (found - ours).abs().max().item()


def _check_numbers(name: str, value: Tensor) -> None:
    dense = value.layout == torch.strided and not value.is_quantized
    if value.is_meta or not value.numel() or not dense or not value.is_floating_point():
        raise CheckpointError(
            f"{name} must be a plain tensor of real floating-point numbers, got {value.numel()} of "
            f"{value.dtype} on {value.device}, {value.layout}"
        )
    if not value.isfinite().all():
        raise CheckpointError(f"{name} has numbers that are not finite; it is of no use")


def _imported(source: Source, recognised: Recognised, overrides: Overrides) -> Imported:
    family, every = recognised.family, (recognised.tensors, recognised.teacher)
    states = [State(family, each) for each in every if each is not None]
    inferred = Inference(source, family, states[0].tensors, overrides)
    may_lack: tuple[str, ...] = ()
    if family.holds == "encoder" or overrides.encoder_only:
        # A model that norms the mean of its tokens has no norm of the tokens.
        means = "fc_norm.weight" in states[0].tensors
        may_lack = (*OF_DECODERS, "norm.") if means else OF_DECODERS
    if overrides.encoder_only:
        states[0].leave_out((*OF_DECODERS, "head.", "fc_norm."), "only the encoder is taken")
    held = sum(value.nbytes for state in states for value in state.tensors.values())
    check_sizes(inferred.config, len(inferred.label_names), held, source.path)
    config = _with_positions(inferred.config, family, states)
    model = trained(source.path, config, inferred.label_names, {})
    with torch.device("meta"):
        own = model.make().state_dict()
    for state in states:
        parts = family.parts(own, like=state.tensors)
        if wrong := misfits(parts, state.tensors, may_lack=may_lack, called=state.called):
            raise CheckpointError("\n  ".join(["its tensors are not those of our model:", *wrong]))
    tensors, *teacher = (family.join(state.tensors) for state in states)
    left_out = states[0].left_out | dict.fromkeys(source.beside, "no weights")
    outside = f"their names do not begin with {recognised.prefix!r}"
    left_out |= dict.fromkeys(recognised.outside, outside)
    others = source.entries.keys() - {recognised.entry, *(TEACHER for _ in teacher)}
    left_out |= dict.fromkeys(sorted(others), "another state dict; choose it with --entry")
    for state in states[1:]:
        left_out |= {f"{OF_TEACHER}{name}": why for name, why in state.left_out.items()}
    return Imported(
        source,
        recognised,
        replace(model, held=tensors),
        teacher[0] if teacher else None,
        left_out,
        tuple(name for name in own if name not in tensors),
        tuple(inferred.assumed),
    )


def trained(
    path: Path,
    config: PretrainConfig | FinetuneConfig,
    label_names: tuple[str, ...],
    tensors: Tensors,
) -> TrainedModel:
    """Return a model that is held in memory."""
    if isinstance(config, FinetuneConfig):
        return TrainedClassifier(path, "model", 0, config.data, config, label_names, held=tensors)
    return TrainedAutoencoder(path, "student", 0, config.data, config, held=tensors)


def _with_positions(
    config: PretrainConfig | FinetuneConfig, family: Family, states: list[State]
) -> PretrainConfig | FinetuneConfig:
    """Leave out tables that are computed here. If any is another one, the model keeps them all."""
    distances: list[tuple[State, str, float]] = []
    grid = TokenGrid.of_clip(config.data.clip_size, config.model.patch_size)
    sizes = {TABLES[0]: config.model.encoder.dim}
    if isinstance(config, PretrainConfig) and "reconstructor.head.weight" in states[0].tensors:
        sizes[TABLES[1]] = config.model.decoder.dim
    for state in states if family.conventions == "mae" else ():
        if SUMMED[0] in state.tensors:
            space, time, first = (state.tensors.pop(name) for name in SUMMED)
            both = (time.unsqueeze(2) + space.unsqueeze(1)).flatten(1, 2)
            state.tensors[TABLES[0]] = torch.cat([first, both], dim=1)
        for table, dim in sizes.items():
            ours = position_table(grid, dim, config.model.positions).unsqueeze(0)
            distances.append((state, table, state.distance(table, ours)))
    if any(distance > SAME_POSITIONS + state.eps for state, _, distance in distances):
        given: Any = replace(config.model, positions="given")
        return replace(config, model=given)
    for state, table, distance in distances:
        why = f"computed here, with the same numbers (largest difference {distance:.1e})"
        state.leave_out((table,), why)
    return config


# --- Files that are complete or absent ------------------------------------------------------------


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Return a folder to write ``out`` in: at the end all of its content is moved out, or nothing.

    Raises:
        CheckpointError: something of that name exists, or the disk does not take it.
    """
    writing = out.with_name(f".writing-{out.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        written = {path: out.parent / path.name for path in sorted(writing.iterdir())}
        for folder in (*filter(Path.is_dir, written), writing):
            flush(folder)
        for target in written.values():
            if target.exists():
                raise CheckpointError(f"{target} exists already; give another name, or delete it")
        for path, target in written.items():
            path.rename(target)
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
    model, path = imported.model, imported.source.path
    files = [path]
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".bin", ".json")]
    origin = {
        "family": imported.family.name,
        "source": str(path.absolute()),
        "sha256": {file.name: sha256_of(file) for file in files},
        "state_dict": imported.recognised.entry,
        "prefix": imported.recognised.prefix,
        "epoch": imported.source.epoch,
        "licence": imported.family.licence,
        "assumed": list(imported.assumed),
        "left_out": imported.left_out,
        "start_fresh": list(imported.fresh),
        "positions": model.config.model.positions,
    }
    with staged(folder) as staging:
        writing = staging / folder.name
        writing.mkdir()
        drawn = model.make().state_dict() if imported.fresh else {}
        save_file(on_host(drawn | model.tensors), writing / "model.safetensors")
        if imported.teacher is not None:
            save_file(on_host(imported.teacher), writing / "teacher.safetensors")
        for name, text in texts_of(model).items():
            (writing / name).write_text(text, encoding="utf-8")
        state = {"update": 0, "imported_from": imported.family.name}
        write_json(writing / "state.json", {**state, "sha256": checksums_of(writing)})
        write_json(writing / "origin.json", origin)
        write_json(writing / "parity.json", parity)


def texts_of(model: TrainedModel) -> dict[str, str]:
    """Return the files of a checkpoint folder beside weights: their texts by name."""
    found = {
        "config.yaml": config_text(model.config),
        "state.json": json.dumps({"update": model.update}) + "\n",
        "labels.txt": "".join(f"{name}\n" for name in model.label_names),
        "origin.json": model.origin,
    }
    return {name: text for name, text in found.items() if text}


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a table as JSON."""
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
