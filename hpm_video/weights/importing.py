"""Weights of other projects as weights of this one, and as a checkpoint folder."""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import TransformerSize
from hpm_video.config.loading import save_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.models.positions import position_table
from hpm_video.training.checkpoint import checksums_of, flush, on_host, sha256_of
from hpm_video.weights.families import OURS, Family, read_ours
from hpm_video.weights.files import ORIGIN, Source, Tensors, read_source
from hpm_video.weights.geometry import DECODER, HEAD, Inferred, Overrides, infer
from hpm_video.weights.layouts import TABLES, Renamed, read, write
from hpm_video.weights.model import TrainedModel
from hpm_video.weights.recognise import TEACHER, Recognised, recognise

SAME_POSITIONS = 1e-3
"""Largest difference of a table of positions that was computed, beside the rounding of the file."""
OF_DECODERS = ("mask_token", "to_decoder.", "reconstructor.", "difficulty_decoder.", TABLES[1])
OF_HEADS = ("head.", "fc_norm.")
NO_DECODER = "it is the decoder's, and only the encoder is taken"
NO_HEAD = "it belongs to a head, and only the encoder is taken"
OF_TEACHER = "of the teacher: "


@dataclass(frozen=True)
class Imported:
    """Weights of another project, by our names and checked against our model."""

    source: Source
    recognised: Recognised
    model: TrainedModel
    """Its tensors are those of the file alone."""
    teacher: Tensors | None
    left_out: dict[str, str]
    """Tensors and other parts of the file that are not taken, each with the reason."""
    fresh: tuple[str, ...]
    """Tensors of our model that the file lacks, and that start with drawn weights."""
    assumed: tuple[str, ...]
    """What the file does not say, and was taken as usual."""

    @property
    def family(self) -> Family:
        """Whose weights they are."""
        return self.recognised.family


def import_weights(path: Path, overrides: Overrides | None = None) -> Imported:
    """Read the weights of a file or folder of another project. See :class:`Imported`.

    Every tensor of the file is used, or left out with a reason. A classifier keeps its head. An
    encoder becomes a masked autoencoder whose decoder starts fresh; so does a classifier with
    ``encoder_only``. Positions that are not those that are computed here are kept.

    Raises:
        CheckpointError: the file cannot be read safely, is of no known family, or does not fit:
            each tensor that is unknown, missing or of another shape is named.
    """
    overrides = overrides or Overrides()
    source = read_source(path)
    recognised = recognise(source, overrides.entry)
    family = recognised.family
    if family.ours:
        raise CheckpointError(
            f"{path} is of this package already ({family.says}): give its folder as init_weights"
        )
    try:
        return _imported(source, recognised, overrides)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path} ({family.says}): {error}") from error


def _imported(source: Source, recognised: Recognised, overrides: Overrides) -> Imported:
    family = recognised.family
    every = [recognised.tensors]
    if recognised.teacher is not None and not overrides.encoder_only:
        every.append(recognised.teacher)
    renamed = [read(family.layout, _in_float32(stored)) for stored in every]
    inferred = infer(source, family, renamed[0], overrides)
    may_lack: tuple[str, ...] = ()
    if family.holds == "encoder" or overrides.encoder_only:
        # A model that norms the mean of its tokens has no norm of the tokens.
        may_lack = (*OF_DECODERS, *(["norm."] if "fc_norm.weight" in renamed[0].tensors else []))
    weights: Any = (
        "model" if family.holds == "classifier" and not overrides.encoder_only else "student"
    )
    model = TrainedModel(source.path, inferred.config, {}, inferred.label_names, weights)
    for each in renamed:
        _leave_out(each, model, encoder_only=overrides.encoder_only)
    model = _with_positions(model, renamed, every)
    student, *others = (
        _fit(model, each, may_lack if each is renamed[0] else ()) for each in renamed
    )
    left_out = renamed[0].left_out | {
        f"{OF_TEACHER}{name}": why for each in renamed[1:] for name, why in each.left_out.items()
    }
    left_out |= dict.fromkeys(source.beside, "no weights")
    for name in source.entries:
        if name != recognised.entry and not (others and name == TEACHER):
            left_out[name] = "another state dict; it can be chosen with --entry"
    model = replace(model, tensors=student)
    with torch.device("meta"):
        fresh = tuple(name for name in model.make().state_dict() if name not in student)
    teacher = others[0] if others else None
    return Imported(source, recognised, model, teacher, left_out, fresh, inferred.assumed)


def _in_float32(tensors: Tensors) -> Tensors:
    """Return the same in single precision, each with a place in memory of its own."""
    found = {}
    for name, value in tensors.items():
        dense = value.layout == torch.strided and not value.is_quantized
        if value.is_meta or not value.numel() or not dense:
            empty = "" if value.numel() else "an empty one of "
            raise CheckpointError(
                f"{name} must be a plain tensor with data, got {empty}{value.dtype} on "
                f"{value.device}, {value.layout}"
            )
        if not value.is_floating_point():
            raise CheckpointError(
                f"{name} must hold real floating-point numbers, got {value.dtype}"
            )
        found[name] = value.float().clone()
        if not found[name].isfinite().all():
            raise CheckpointError(f"{name} has numbers that are not finite; it is of no use")
    return found


def _leave_out(renamed: Renamed, model: TrainedModel, *, encoder_only: bool) -> None:
    """Take decoder or head out of the tensors, where they are not wanted."""
    reasons: dict[tuple[str, ...], str] = {} if model.is_classifier else {OF_HEADS: NO_HEAD}
    if encoder_only:
        reasons[OF_DECODERS] = NO_DECODER
    for beginnings, why in reasons.items():
        for name in [each for each in renamed.tensors if each.startswith(beginnings)]:
            del renamed.tensors[name]
            renamed.left_out.update(dict.fromkeys(renamed.origins[name], why))


def _with_positions(
    model: TrainedModel, renamed: list[Renamed], stored: list[Tensors]
) -> TrainedModel:
    """Leave out tables that are computed here. If any is another one, the model keeps them all."""
    distances: list[tuple[Renamed, str, float]] = []
    same = True
    for each, tensors in zip(renamed, stored, strict=True):
        for table in TABLES:
            if table not in each.tensors:
                if each.layout.theirs(table) and "reconstructor.head.weight" in each.tensors:
                    raise CheckpointError(f"missing {each.named(table)}")
                continue
            ours = _cut_table(each, table, model)
            dtype = tensors[each.origins[table][0]].dtype
            ours = ours.to(dtype).float()
            distance = (each.tensors[table] - ours).abs().max().item()
            # Numbers near 1 are eps apart where they are stored.
            same = same and distance <= SAME_POSITIONS + torch.finfo(dtype).eps
            distances.append((each, table, distance))
    if not same:
        given: Any = replace(model.config.model, positions="given")
        return replace(model, config=replace(model.config, model=given))
    for each, table, distance in distances:
        del each.tensors[table]
        why = f"computed here, with the same numbers (largest difference {distance:.1e})"
        each.left_out.update(dict.fromkeys(each.origins[table], why))
    return model


def _cut_table(renamed: Renamed, table: str, model: TrainedModel) -> Tensor:
    """Add what a table has for the class token to that token. -> (N, D) as it is computed here"""
    found, named = renamed.tensors[table], renamed.named(table)
    if found.ndim != 3:
        raise CheckpointError(f"{named} must be a table of three axes, got {tuple(found.shape)}")
    size = model.encoder if table == TABLES[0] else model.decoder
    assert size is not None
    ours = position_table(model.grid, size.dim, model.config.model.positions)
    if model.config.model.class_token and found.shape[1] == len(ours) + 1:
        first, found = found[:, :1], found[:, 1:]
        token = renamed.tensors.get("cls_token")
        if first.any() and (table != TABLES[0] or token is None):
            raise CheckpointError(f"{named} has a position for a class token of its own")
        if token is not None and first.any() and token.shape == first.shape:  # or it is told later
            renamed.tensors["cls_token"] = token + first
    if found.shape[1:] != ours.shape:
        raise CheckpointError(
            f"{named} is of {tuple(found.shape[1:])} tokens and values, our model has "
            f"{tuple(ours.shape)}"
        )
    renamed.tensors[table] = found
    return ours


def _fit(model: TrainedModel, renamed: Renamed, may_lack: tuple[str, ...]) -> Tensors:
    """Return the tensors by our names, if our model takes them."""
    tensors, config = renamed.tensors, model.config.model
    with torch.device("meta"):
        own = read_ours(model.make().state_dict(), config.patch_size).tensors
    wrong = [
        f"missing {renamed.named(name)}"
        for name in own
        if name not in tensors and not name.startswith(may_lack)
    ]
    for name, value in tensors.items():
        shape, named = tuple(value.shape), renamed.named(name)
        if name not in own:
            wrong.append(f"unknown {named} {shape}")
        elif value.shape != own[name].shape:
            wrong.append(f"{named} has shape {shape}, our model's is {tuple(own[name].shape)}")
    if wrong:
        raise CheckpointError("\n  ".join(["its tensors are not those of our model:", *wrong]))
    return write(replace(OURS, key_bias=config.conventions == "mae"), tensors)


# --- Words ----------------------------------------------------------------------------------------


def describe(imported: Imported) -> list[str]:
    """Tell what came of an import, in lines for the terminal."""
    model, family = imported.model, imported.family
    count = sum(value.numel() for value in model.tensors.values())
    reasons: dict[str, list[str]] = {}
    for name, reason in imported.left_out.items():
        reasons.setdefault(reason, []).append(name)
    lines = [
        *describe_model(Inferred(model.config, model.label_names, imported.assumed, ()), family),
        *imported.recognised.lines(),
        f"licence: {family.licence}",
        f"{count:,} numbers taken" + (", and as many of the teacher" if imported.teacher else ""),
        *describe_assumed(imported.assumed),
        *(f"left out: {', '.join(parts_of(names))}: {why}" for why, names in reasons.items()),
    ]
    if model.config.model.positions == "given":
        lines.append("its positions are its own: they are kept (model.positions=given)")
    if imported.fresh:
        lines.append(f"start fresh: {', '.join(parts_of(imported.fresh))}")
    if model.pretraining is not None:
        if model.pretraining.mining.predictor == "none":
            lines.append("it has no loss predictor: in pre-training that starts fresh")
        if imported.teacher is None:
            lines.append("it has no teacher: in pre-training that starts as a copy")
    return lines


def describe_model(inferred: Inferred, family: Family) -> list[str]:
    """Tell of what kind and size a model is."""
    lines = [f"{family.name}: {family.says}", *describe_sizes(inferred)]
    for what in inferred.unknown:
        lines = [line.replace(", 1 heads", "") for line in lines]
        lines.append(f"{what}: not in the file")
    return lines


def describe_assumed(assumed: Sequence[str]) -> list[str]:
    """Tell what was taken as usual."""
    return [f"not in the file, taken as usual: {'; '.join(assumed)}"] if assumed else []


def describe_sizes(inferred: Inferred) -> list[str]:
    """Tell the sizes of encoder, clips, and decoder or head."""
    config = inferred.config
    patches, clips = (
        " x ".join(map(str, size)) for size in (config.model.patch_size, config.data.clip_size)
    )
    lines = [f"encoder {_size(config.model.encoder)}; patches of {patches}; clips of {clips}"]
    if isinstance(config, FinetuneConfig):
        on = "" if HEAD in inferred.unknown else f" on {config.model.pooling}"
        return [*lines, f"head of {len(inferred.label_names)} classes{on}"]
    predictor = "" if config.mining.predictor == "none" else ", and a loss predictor"
    known = DECODER not in inferred.unknown
    return lines + ([f"decoder {_size(config.model.decoder)}{predictor}"] if known else [])


def _size(size: TransformerSize) -> str:
    return f"{size.dim} wide, {size.depth} deep, {size.num_heads} heads"


def parts_of(names: Iterable[str]) -> list[str]:
    """Return names of tensors, those of all blocks as one."""
    kinds: dict[str, int] = {}
    for name in names:
        beginning = re.sub(r"((^|[._])(blocks\w*|layers?))\.\d+\..*", r"\1", name)
        kinds[beginning] = kinds.get(beginning, 0) + 1
    return [f"{name} ({count} tensors)" if count > 1 else name for name, count in kinds.items()]


# --- A checkpoint folder --------------------------------------------------------------------------


def write_folder(imported: Imported, folder: Path, parity: dict[str, Any]) -> list[Path]:
    """Write what ``init_weights`` and the programs of ``tools/`` read. -> the files

    Raises:
        CheckpointError: the folder exists, or the disk does not take it.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; give another folder, or delete it")
    model = imported.model
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        tensors = model.tensors
        if imported.fresh:
            drawn = model.make().state_dict()
            tensors = {name: tensors.get(name, drawn[name]) for name in drawn}
        save_file(on_host(tensors), writing / "model.safetensors")
        if imported.teacher is not None:
            save_file(on_host(imported.teacher), writing / "teacher.safetensors")
        save_config(model.config, writing / "config.yaml")
        state = {"update": 0, "imported_from": imported.family.name}
        write_json(writing / "state.json", {**state, "sha256": checksums_of(writing)})
        write_json(writing / ORIGIN, _origin(imported))
        write_json(writing / "parity.json", parity)
        if model.is_classifier:
            names = "".join(f"{name}\n" for name in model.label_names)
            (writing / "labels.txt").write_text(names, encoding="utf-8")
        flush(writing)
        writing.rename(folder)
        flush(folder.parent, recursive=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}. Make room, and start the same command again"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return sorted(folder.iterdir())


def _origin(imported: Imported) -> dict[str, Any]:
    """Tell where the weights come from, and what was done to them."""
    path, recognised = imported.source.path, imported.recognised
    endings = (".safetensors", ".bin", ".json")
    files = [path] if path.is_file() else [p for p in sorted(path.iterdir()) if p.suffix in endings]
    return {
        "family": imported.family.name,
        "source": str(path.absolute()),
        "sha256": {file.name: sha256_of(file) for file in files},
        "state_dict": recognised.entry,
        "prefix": recognised.prefix,
        "epoch": imported.source.epoch,
        "licence": imported.family.licence,
        "assumed": list(imported.assumed),
        "left_out": imported.left_out,
        "start_fresh": list(imported.fresh),
        "positions": imported.model.config.model.positions,
    }


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a table."""
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
