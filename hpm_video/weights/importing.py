"""Weights of other projects as weights of this one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hpm_video.config.choices import TransformerSize
from hpm_video.config.model import ClassifierConfig, ModelConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.positions import position_table
from hpm_video.recognition.trained_model import OF_DECODERS
from hpm_video.tokens.grid import Size3
from hpm_video.weights.families import LICENCES, Family, Recognised, recognise
from hpm_video.weights.files import Source, Tensors, read_source
from hpm_video.weights.layouts import OF_DECODER, PositionTable, Renamed, to_ours
from hpm_video.weights.sizes import (
    ON_WHAT,
    Given,
    ModelFacts,
    cut_of,
    facts_of,
    in_float32,
    parameters_of,
)

SAME_POSITIONS = 1e-3
"""Largest difference of a table of positions that was computed, beside the rounding of the file."""
OF_HEADS = ("head.", "pooling.")
OF_TEACHER = "of the teacher: "


@dataclass(frozen=True)
class Imported:
    """Weights of another project, by our names and checked against our model."""

    source: Source
    recognised: Recognised
    facts: ModelFacts
    tensors: Tensors
    """Of a :class:`MaskedAutoencoder`, or of a :class:`ClipClassifier` where there is a head."""
    teacher: Tensors | None
    left_out: dict[str, str]
    """Tensors and other parts of the file that are not taken, each with the reason."""
    fresh: tuple[str, ...]
    """Tensors of our model that the file lacks, and that start with drawn weights."""

    @property
    def family(self) -> Family:
        """Whose weights they are."""
        return self.recognised.family

    @property
    def licence(self) -> str:
        """What is known of their licence."""
        return LICENCES[self.family.licence]

    @property
    def is_classifier(self) -> bool:
        """Whether they are of a classifier, otherwise of a masked autoencoder."""
        return self.facts.pooling is not None

    def build(self) -> MaskedAutoencoder | ClipClassifier:
        """Our model of this shape, without these weights."""
        return build_model(self.facts)


def import_weights(path: Path, given: Given = Given()) -> Imported:  # noqa: B008 - it is frozen
    """The weights of a file or folder of another project. See :class:`Imported`.

    Every tensor of the file is used, or left out with a reason. A classifier keeps its head. An
    encoder becomes a masked autoencoder whose decoder starts fresh; so does a classifier with
    ``given.encoder_only``. Positions that are not those that are computed here are kept.

    Raises:
        CheckpointError: the file cannot be read safely, is of no known family, or does not fit:
            each tensor that is unknown, missing or of another shape is named.
    """
    source = read_source(path)
    recognised = recognise(source, given.entry)
    family = recognised.family
    if family.licence == "ours":
        raise CheckpointError(
            f"{path} is of this package already ({family.says}): give its folder as init_weights"
        )
    try:
        return _imported(source, recognised, given)
    except CheckpointError as error:
        raise CheckpointError(f"{path} ({family.says}): {error}") from error


def _imported(source: Source, recognised: Recognised, given: Given) -> Imported:
    family = recognised.family
    cut = cut_of(recognised.tensors[family.kernel])
    renamed = to_ours(family.layout, in_float32(recognised.tensors), cut)
    facts = facts_of(source, family, renamed, given, cut)
    takes_teacher = recognised.teacher is not None and not given.encoder_only
    every = [_settle(renamed, recognised.tensors, facts, given)]
    if takes_teacher:
        assert recognised.teacher is not None
        of_teacher = to_ours(family.layout, in_float32(recognised.teacher), cut)
        every.append(_settle(of_teacher, recognised.teacher, facts, given))
    if any(each.other_positions for each in every):
        facts = replace(facts, positions="given")
    every = [each.with_positions(facts) for each in every]
    may_start_fresh = _may_start_fresh(family, renamed.tensors, given)
    fresh = check_fit(facts, renamed, every[0].tensors, may_start_fresh)
    for each in every[1:]:
        check_fit(facts, renamed, each.tensors, ())
    left_out = every[0].left_out | {
        f"{OF_TEACHER}{name}": reason
        for each in every[1:]
        for name, reason in each.left_out.items()
    }
    return Imported(
        source,
        recognised,
        facts,
        every[0].tensors,
        every[1].tensors if takes_teacher else None,
        left_out | _not_weights(source, recognised, used_teacher=takes_teacher),
        fresh,
    )


def build_model(facts: ModelFacts) -> MaskedAutoencoder | ClipClassifier:
    """Our model of this shape, with initial weights."""
    shape = facts.shape
    if facts.pooling is not None:
        classifier = ClassifierConfig(**shape.settings, pooling=facts.pooling)
        return ClipClassifier(classifier, len(facts.label_names), shape.grid, shape.source_grid)
    if facts.decoder is None:
        raise CheckpointError(
            f"it has no decoder, and none is known for an encoder of width {facts.encoder.dim}; "
            f"give the size of one that starts fresh: --decoder WIDTH DEPTH HEADS"
        )
    return MaskedAutoencoder(
        ModelConfig(**shape.settings, decoder=facts.decoder),
        shape.grid,
        source_grid=shape.source_grid,
        predictor=facts.predictor,
    )


def check_fit(
    facts: ModelFacts, renamed: Renamed, tensors: Tensors, may_start_fresh: tuple[str, ...]
) -> tuple[str, ...]:
    """Make sure that our model takes these weights. -> what they lack, of what they may

    Raises:
        CheckpointError: some are missing, left over, or of another shape. Each is named.
    """
    with torch.device("meta"):
        own: dict[str, Tensor] = build_model(facts).state_dict()
    theirs = renamed.layout.theirs_of
    missing = [name for name in own if name not in tensors]
    wrong = [f"missing {theirs(name)}" for name in missing if not name.startswith(may_start_fresh)]
    wrong += [f"left over {theirs(name)}" for name in tensors if name not in own]
    wrong += [
        f"{theirs(name)} has shape {tuple(tensors[name].shape)}, our model's is "
        f"{tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError("\n  ".join(["its tensors are not those of our model:", *wrong]))
    return tuple(missing)


@dataclass(frozen=True)
class _Settled:
    """Tensors of one state dict, without those that are not wanted."""

    tensors: Tensors
    left_out: dict[str, str]
    positions: dict[str, "_Positions"]
    """By the names that ours have."""

    @property
    def other_positions(self) -> bool:
        """Whether any are not those that are computed here."""
        return any(not found.same for found in self.positions.values())

    def with_positions(self, facts: ModelFacts) -> "_Settled":
        """The same with its own positions, or with the reason why they are left out."""
        if facts.positions == "given":
            tables = {name: found.table for name, found in self.positions.items()}
            return replace(self, tensors=self.tensors | tables)
        told = {
            name: f"computed here, with the same numbers (largest difference {found.farthest:.1e})"
            for found in self.positions.values()
            for name in found.names
        }
        return replace(self, left_out=self.left_out | told)


@dataclass(frozen=True)
class _Positions:
    """A table of positions, beside the one that is computed here."""

    names: tuple[str, ...]
    table: Tensor
    """(N, D)"""
    farthest: float
    """Largest difference."""
    same: bool
    """Whether they are the same, as far as the precision of the file goes."""


def _settle(renamed: Renamed, stored: Tensors, facts: ModelFacts, given: Given) -> _Settled:
    """Positions read, and what is not wanted left out. ``stored``: the tensors of the file."""
    tensors, left_out = dict(renamed.tensors), dict(renamed.left_out)
    positions = {}
    for table in renamed.layout.tables:
        if table.of == "decoder" and given.encoder_only:
            left_out |= {name: OF_DECODER for name in table.theirs if name in renamed.tables}
        else:
            precision = stored.get(table.theirs[0], torch.empty(0)).dtype
            found = _read_positions(table, renamed.tables, tensors, facts, precision)
            positions[f"{table.of}_positions.table"] = found
    if given.encoder_only:
        for name in _named(tensors, OF_DECODERS):
            left_out[renamed.layout.theirs_of(name)] = OF_DECODER
            del tensors[name]
    if facts.pooling is None:
        for name in _named(tensors, OF_HEADS):
            left_out[renamed.layout.theirs_of(name)] = OF_A_HEAD
            del tensors[name]
    return _Settled(tensors, left_out, positions)


OF_A_HEAD = "it belongs to a head, and only the encoder is taken"


def _read_positions(
    table: PositionTable, tables: Tensors, tensors: Tensors, facts: ModelFacts, stored: torch.dtype
) -> _Positions:
    """A table as ours would be. What it has for the class token is added to that token.

    Raises:
        CheckpointError: a part is missing, or it is of other tokens.
    """
    missing = [name for name in table.theirs if name not in tables]
    if missing:
        raise CheckpointError(f"missing {', '.join(missing)}")
    theirs, first = _joined(table, tables, facts)
    size = facts.encoder if table.of == "encoder" else facts.decoder
    assert size is not None
    ours = position_table(facts.grid, size.dim, facts.positions)
    if theirs.shape != ours.shape:
        raise CheckpointError(
            f"{table.theirs[0]} is of {tuple(theirs.shape)} tokens and values, our "
            f"{table.of} has {tuple(ours.shape)}"
        )
    if first is not None and first.any():
        if table.of == "decoder" or "class_token" not in tensors:
            raise CheckpointError(f"{table.theirs[0]} has a position for a class token of its own")
        if tensors["class_token"].shape == first.shape:  # another shape is told later
            tensors["class_token"] = tensors["class_token"] + first
    # Numbers near 1 are this far apart where they are stored.
    rounding = torch.finfo(stored).eps if stored.is_floating_point else 0.0
    farthest = (theirs - ours.to(stored).float()).abs().max().item()
    names = (*table.theirs, *([table.first_row] if table.first_row in tables else []))
    return _Positions(
        tuple(dict.fromkeys(map(str, names))),
        theirs,
        farthest,
        farthest <= SAME_POSITIONS + rounding,
    )


def _joined(
    table: PositionTable, tables: Tensors, facts: ModelFacts
) -> tuple[Tensor, Tensor | None]:
    """-> (N, D), and (D,) what is added to the class token"""
    odd = [name for name in table.theirs if tables[name].ndim != 3]
    if odd:
        shape = tuple(tables[odd[0]].shape)
        raise CheckpointError(f"{odd[0]} must be a table of three axes, got {shape}")
    parts = [tables[name].float().flatten(0, 1) for name in table.theirs]
    if len(parts) == 2:
        space, time = parts
        if space.shape[-1] != time.shape[-1]:
            raise CheckpointError(f"{' and '.join(table.theirs)} must be of the same width")
        both = (time.unsqueeze(1) + space).flatten(0, 1)
        first = tables.get(table.first_row or "")
        return both, None if first is None else first.float().flatten()
    whole = parts[0]
    if facts.class_token and len(whole) == facts.grid.num_tokens + 1:
        return whole[1:], whole[0]
    return whole, None


def _named(tensors: Tensors, beginnings: tuple[str, ...]) -> list[str]:
    return [name for name in tensors if name.startswith(beginnings)]


def _may_start_fresh(family: Family, tensors: Tensors, given: Given) -> tuple[str, ...]:
    """What a file of this family may lack."""
    if family.holds != "encoder" and not given.encoder_only:
        return ()
    # A model that norms the mean of its tokens has no norm of the tokens.
    norm = ("encoder.norm.",) if "pooling.norm.weight" in tensors else ()
    return (*OF_DECODERS, *norm)


def _not_weights(source: Source, recognised: Recognised, *, used_teacher: bool) -> dict[str, str]:
    """What else is in the file."""
    told = dict.fromkeys(source.beside, "no weights")
    for name in source.entries:
        if name != recognised.entry and not (used_teacher and name == "ema_state_dict"):
            told[name] = "another state dict; it can be chosen with --entry"
    return told


def describe(imported: Imported) -> list[str]:
    """What came of an import, in lines for the terminal."""
    facts = imported.facts
    lines = [
        *describe_model(facts, imported.family),
        *imported.recognised.told(),
        f"licence: {imported.licence}",
        f"{parameters_of(imported.tensors.values()):,} numbers taken"
        + (", and as many of the teacher" if imported.teacher else ""),
    ]
    if facts.assumed:
        lines.append(f"not in the file, taken as usual: {'; '.join(facts.assumed)}")
    lines += [f"left out: {told}" for told in _grouped(imported.left_out)]
    if facts.positions == "given":
        lines.append("its positions are its own: they are kept (model.positions=given)")
    if imported.fresh:
        lines.append(f"start fresh: {', '.join(parts_of(imported.fresh))}")
    if not imported.is_classifier:
        if not facts.predictor:
            lines.append("it has no loss predictor: in pre-training that starts fresh")
        if imported.teacher is None:
            lines.append("it has no teacher: in pre-training that starts as a copy")
    return lines


def describe_model(facts: ModelFacts, family: Family) -> list[str]:
    """The kind and the size of a model, in lines for the terminal."""
    lines = [
        f"{family.name}: {family.says}",
        describe_encoder(facts.encoder, facts.cut.patch_size, facts.clip_size),
    ]
    if facts.pooling is not None:
        on = "" if ON_WHAT in facts.unknown else f" on {facts.pooling}"
        lines.append(f"head of {len(facts.label_names)} classes{on}")
    elif facts.decoder is not None:
        lines.append(describe_decoder(facts.decoder, predictor=facts.predictor))
    for what in facts.unknown:
        lines = [line.replace(", 1 heads", "") for line in lines]
        lines.append(f"{what}: not in the file")
    return lines


def describe_encoder(size: TransformerSize, patch_size: Size3, clip_size: Size3) -> str:
    """A line of an encoder, and of what it takes."""
    return (
        f"encoder {_size(size)}; patches of {' x '.join(map(str, patch_size))}; clips of "
        f"{' x '.join(map(str, clip_size))}"
    )


def describe_decoder(size: TransformerSize, *, predictor: bool) -> str:
    """A line of a decoder."""
    return f"decoder {_size(size)}" + (", and a loss predictor" if predictor else "")


def _size(size: TransformerSize) -> str:
    return f"{size.dim} wide, {size.depth} deep, {size.num_heads} heads"


def _grouped(left_out: dict[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(parts_of(names))}: {reason}" for reason, names in reasons.items()]


def parts_of(names: Iterable[str]) -> list[str]:
    """Names of tensors, those of all blocks as one."""
    kinds: dict[str, int] = {}
    for name in names:
        beginning = re.sub(r"((^|[._])(blocks\w*|layers?))\.\d+\..*", r"\1", name)
        kinds[beginning] = kinds.get(beginning, 0) + 1
    return [f"{name} ({count} tensors)" if count > 1 else name for name, count in kinds.items()]
