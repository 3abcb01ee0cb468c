"""Import of weights of other projects by the names of this one."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import TransformerSize
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.single_file import NAMES, as_folder
from hpm_video.files.weights import CheckpointError, misfits
from hpm_video.models.positions import position_table
from hpm_video.recognition.trained_model import (
    OF_DECODERS,
    TrainedAutoencoder,
    TrainedClassifier,
    TrainedModel,
    WeightsOf,
    open_trained,
)
from hpm_video.tokens.grid import TokenGrid
from hpm_video.weights.facts import Overrides
from hpm_video.weights.families import TABLES, Family, Renamed, licence_of
from hpm_video.weights.files import Source, Tensors, read_source
from hpm_video.weights.geometry import MissingOptionError, infer
from hpm_video.weights.recognise import TEACHER, Recognised, list_shapes, recognise

SAME_POSITIONS = 1e-3
"""Largest difference between computed tables of positions, beside the rounding of the file."""
NO_DECODER = "it is the decoder's, and only the encoder is taken"
NO_HEAD = "it belongs to a head, and only the encoder is taken"
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
        recognised = recognise(source, overrides.entry)
        own = recognised.family.name == "ours"
    if own:
        raise CheckpointError(f"{path} is of this package already: give its folder as init_weights")
    says = recognised.family.says
    try:
        return _imported(source, recognised, overrides)
    except MissingOptionError as error:
        raise MissingOptionError(f"{path} ({says}): {error}") from error
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path} ({says}): {error}") from error


def folder_of(path: Path) -> Path | None:
    """Return the checkpoint folder or single file of this package that a path is, or lies in."""
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.stem in NAMES) and (folder / "config.yaml").is_file():
        return folder
    if path.is_file() and path.suffix == ".safetensors":
        with suppress(CheckpointError), as_folder(path):
            return path
    return None


def _imported(source: Source, recognised: Recognised, overrides: Overrides) -> Imported:
    family, every = recognised.family, [recognised.tensors]
    if recognised.teacher is not None and not overrides.encoder_only:
        every.append(recognised.teacher)
    renamed = [family.read(_in_float32(stored)) for stored in every]
    inferred = infer(source, family, renamed[0], overrides)
    may_lack: tuple[str, ...] = ()
    if family.holds == "encoder" or overrides.encoder_only:
        # A model that norms the mean of its tokens has no norm of the tokens.
        means = "fc_norm.weight" in renamed[0].tensors
        may_lack = (*OF_DECODERS, *(["norm."] if means else []))
    for each in renamed:
        if not isinstance(inferred.config, FinetuneConfig):
            _leave_out(each, ("head.", "fc_norm."), NO_HEAD)
        if overrides.encoder_only:
            _leave_out(each, OF_DECODERS, NO_DECODER)
    config = _with_positions(inferred.config, family, renamed, every)
    model = trained(source.path, config, inferred.label_names, {})
    with torch.device("meta"):
        own = model.make().state_dict()
    for each in renamed:
        _check_fit(family, each, own, may_lack if each is renamed[0] else ())
    tensors, *teacher = (each.tensors for each in renamed)
    taken = {recognised.entry, *(TEACHER for _ in teacher)}
    others = [name for name in source.entries if name not in taken]
    left_out = renamed[0].left_out | dict.fromkeys(source.beside, "no weights")
    left_out |= dict.fromkeys(others, "another state dict; it can be chosen with --entry")
    for each in renamed[1:]:
        left_out |= {f"{OF_TEACHER}{name}": why for name, why in each.left_out.items()}
    return Imported(
        source,
        recognised,
        replace(model, held=tensors),
        teacher[0] if teacher else None,
        left_out,
        tuple(name for name in own if name not in tensors),
        inferred.assumed,
    )


def _check_fit(family: Family, renamed: Renamed, own: Tensors, may_lack: tuple[str, ...]) -> None:
    def called(name: str) -> str:
        return " and ".join(renamed.origins.get(name, [family.theirs(name)]))

    if wrong := misfits(own, renamed.tensors, may_lack=may_lack, called=called):
        raise CheckpointError("\n  ".join(["its tensors are not those of our model:", *wrong]))


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


def _in_float32(tensors: Tensors) -> Tensors:
    """Return copies in single precision."""
    found = {}
    for name, value in tensors.items():
        dense = value.layout == torch.strided and not value.is_quantized
        if value.is_meta or not value.numel() or not dense or not value.is_floating_point():
            raise CheckpointError(
                f"{name} must be a plain tensor of real floating-point numbers, got "
                f"{value.numel()} of {value.dtype} on {value.device}, {value.layout}"
            )
        found[name] = value.float().clone()
        if not found[name].isfinite().all():
            raise CheckpointError(f"{name} has numbers that are not finite; it is of no use")
    return found


def _leave_out(renamed: Renamed, beginnings: tuple[str, ...], why: str) -> None:
    for name in [each for each in renamed.tensors if each.startswith(beginnings)]:
        del renamed.tensors[name]
        renamed.left_out.update(dict.fromkeys(renamed.origins[name], why))


def _with_positions(
    config: PretrainConfig | FinetuneConfig,
    family: Family,
    renamed: list[Renamed],
    stored: list[Tensors],
) -> PretrainConfig | FinetuneConfig:
    """Leave out tables that are computed here. If any is another one, the model keeps them all."""
    distances: list[tuple[Renamed, str, float]] = []
    same, grid = True, TokenGrid.of_clip(config.data.clip_size, config.model.patch_size)
    sizes = [config.model.encoder.dim]
    if isinstance(config, PretrainConfig):
        sizes.append(config.model.decoder.dim)
    for each, tensors in zip(renamed, stored, strict=True):
        for table, dim in zip(TABLES, sizes, strict=False):
            if table not in each.tensors:
                if family.conventions == "mae" and "reconstructor.head.weight" in each.tensors:
                    raise CheckpointError(f"missing {family.theirs(table)}")
                continue
            ours = position_table(grid, dim, config.model.positions).unsqueeze(0)
            _cut_class_token(each, table, ours)
            dtype = tensors[each.origins[table][0]].dtype
            distance = (each.tensors[table] - ours.to(dtype)).abs().max().item()
            # Numbers near 1 are eps apart where they are stored.
            same = same and distance <= SAME_POSITIONS + torch.finfo(dtype).eps
            distances.append((each, table, distance))
    if not same:
        given: Any = replace(config.model, positions="given")
        return replace(config, model=given)
    for each, table, distance in distances:
        why = f"computed here, with the same numbers (largest difference {distance:.1e})"
        _leave_out(each, (table,), why)
    return config


def _cut_class_token(renamed: Renamed, table: str, ours: Tensor) -> None:
    """Add what a table has for the class token to that token."""
    found, named = renamed.tensors[table], " and ".join(renamed.origins[table])
    token = renamed.tensors.get("cls_token")
    if token is not None and found.shape[1] == ours.shape[1] + 1:
        first, found = found[:, :1], found[:, 1:]
        if first.any() and table != TABLES[0]:
            raise CheckpointError(f"{named} has a position for a class token of its own")
        if token.shape == first.shape:  # otherwise reported as misshapen later
            renamed.tensors["cls_token"] = token + first
    if found.shape != ours.shape:
        raise CheckpointError(
            f"{named} is of {tuple(found.shape[1:])} tokens and values, our model has "
            f"{tuple(ours.shape[1:])}"
        )
    renamed.tensors[table] = found


# --- Lines for the terminal -----------------------------------------------------------------------


def describe(imported: Imported) -> list[str]:
    """Return lines on an import for the terminal."""
    model, family, prefix = imported.model, imported.family, imported.recognised.prefix
    count = sum(value.numel() for value in model.tensors.values())
    epoch, pretraining = imported.source.epoch, model.pretraining
    remarks = [
        (prefix, f"names begin with {prefix!r}, which is left out"),
        (imported.teacher, "beside them are as many numbers of a teacher"),
        (epoch is not None, f"epoch {epoch}"),
        (imported.assumed, f"not in the file, defaults taken: {'; '.join(imported.assumed)}"),
        (imported.fresh, f"start fresh: {', '.join(_parts_of(imported.fresh))}"),
        (
            model.config.model.positions == "given",
            "its positions are its own: they are kept (model.positions=given)",
        ),
        (
            pretraining and pretraining.mining.predictor == "none",
            "it has no loss predictor: in pre-training that starts fresh",
        ),
        (
            pretraining and imported.teacher is None,
            "it has no teacher: in pre-training that starts as a copy",
        ),
    ]
    return [
        f"{family.name}: {family.says}",
        *describe_model(model),
        f"licence: {family.licence}",
        f"{count:,} numbers taken",
        *(line for holds, line in remarks if holds),
        *describe_left_out(imported.left_out),
    ]


def describe_left_out(left_out: dict[str, str]) -> list[str]:
    """Return lines on what is left out, and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(_parts_of(names))}: {why}" for why, names in reasons.items()]


def describe_model(model: TrainedModel) -> list[str]:
    """Return lines on the sizes of encoder, clips, and decoder or head."""
    config = model.config
    patches, clips = (
        " x ".join(map(str, size)) for size in (config.model.patch_size, config.data.clip_size)
    )
    lines = [f"encoder {_size(config.model.encoder)}; patches of {patches}; clips of {clips}"]
    if isinstance(config, FinetuneConfig):
        return [*lines, f"head of {len(model.label_names)} classes on {config.model.pooling}"]
    predictor = "" if config.mining.predictor == "none" else ", and a loss predictor"
    return [*lines, f"decoder {_size(config.model.decoder)}{predictor}"]


def _size(size: TransformerSize) -> str:
    return f"{size.dim} wide, {size.depth} deep, {size.num_heads} heads"


def _parts_of(names: Iterable[str]) -> list[str]:
    """Return the names of tensors, with all blocks as one."""
    kinds = Counter(re.sub(r"((^|[._])(blocks\w*|layers?))\.\d+\..*", r"\1", n) for n in names)
    return [f"{name} ({count} tensors)" if count > 1 else name for name, count in kinds.items()]


def _describe_file(path: Path, overrides: Overrides | None) -> list[str]:
    """Return lines on a file whose model is not known in full."""
    source = read_source(path)
    found = recognise(source, overrides.entry if overrides else None)
    count = sum(value.numel() for value in found.tensors.values())
    where = f" under {found.entry!r}" if found.entry else ""
    others = [name for name in source.entries if name != found.entry]
    beside = ", ".join([*others, *source.beside])
    return [
        f"{found.family.name}: {found.family.says}",
        *(f"  {line}" for line in list_shapes(found.tensors)),
        f"{len(found.tensors)} tensors{where}, {count:,} parameters",
        *([] if source.epoch is None else [f"epoch {source.epoch}"]),
        *([f"beside them: {beside}"] if beside else []),
        f"licence: {found.family.licence}",
    ]


def inspect(path: Path, overrides: Overrides | None = None) -> list[str]:
    """Return family, size, clips, patches, head, epoch, number of parameters and licence of a file.

    Raises:
        CheckpointError: it cannot be read safely, or is of no known family.
    """
    folder = folder_of(path)
    if folder is None:
        try:
            return describe(import_weights(path, overrides))
        except MissingOptionError as error:
            return [*_describe_file(path, overrides), f"not all of it is in the file: {error}"]
    names: dict[str, WeightsOf] = {"teacher": "teacher", "average": "average"}
    model = open_trained(folder, TrainedModel, names.get(path.stem))
    config = model.config
    kind = "pre-training with" if isinstance(config, PretrainConfig) else "classifier of"
    state = f"{model.weights} at update {model.update} of a run of {config.recipe.epochs} epochs"
    if model.origin:
        origin = json.loads(model.origin)
        epoch = "" if origin["epoch"] is None else f", epoch {origin['epoch']}"
        state = f"{model.weights}, imported from {origin['source']} ({origin['family']}{epoch})"
    return [
        f"ours: {kind} this package",
        *describe_model(model),
        f"positions {config.model.positions}, frame stride {config.data.frame_stride}",
        state,
        f"{sum(value.numel() for value in model.tensors.values()):,} parameters",
        f"licence: {licence_of(model.origin)}",
    ]
