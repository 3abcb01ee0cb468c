"""Weights of other projects as weights of this one."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hpm_video.features import OF_DECODERS
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.pos_embed import position_table
from hpm_video.training.checkpoint import CheckpointError
from hpm_video.weights.families import LICENCES, Family, Recognised, recognise
from hpm_video.weights.files import Source, Tensors, read_source
from hpm_video.weights.layouts import OF_DECODER, PositionTable, Renamed, to_ours
from hpm_video.weights.sizes import Given, ModelFacts, cut_of, facts_of, in_float32, parameters_of

SAME_POSITIONS = 1e-3
"""Largest difference of a table of positions that was computed: as far as half precision goes."""
OF_HEADS = ("head.", "pooling.")


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
    positions_replaced: bool = False
    """Whether learned positions gave way to computed ones."""

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
    ``given.encoder_only``.

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
    cut = cut_of(recognised.tensors[family.kernel])
    try:
        renamed = to_ours(family.layout, in_float32(recognised.tensors), cut)
        facts = facts_of(source, family, renamed.tensors, renamed.tables, given, cut)
        student = _settle(renamed, family, facts, given)
        teacher = None
        if recognised.teacher is not None and not given.encoder_only:
            of_teacher = to_ours(family.layout, in_float32(recognised.teacher), cut)
            teacher = _settle(of_teacher, family, facts, given)
        may_start_fresh = _may_start_fresh(family, renamed.tensors, given)
        fresh = check_fit(facts, student.tensors, may_start_fresh)
        if teacher is not None:
            check_fit(facts, teacher.tensors, ())
    except CheckpointError as error:
        raise CheckpointError(f"{path} ({family.says}): {error}") from error
    return Imported(
        source,
        recognised,
        facts,
        student.tensors,
        None if teacher is None else teacher.tensors,
        student.left_out | _not_weights(source, recognised, used_teacher=teacher is not None),
        fresh,
        student.replaced,
    )


def build_model(facts: ModelFacts) -> MaskedAutoencoder | ClipClassifier:
    """Our model of this shape, with initial weights."""
    if facts.pooling is not None:
        return ClipClassifier(facts.shape, len(facts.label_names), pooling=facts.pooling)
    if facts.decoder is None:
        raise CheckpointError(
            f"it has no decoder, and none is known for an encoder of width {facts.encoder.dim}; "
            f"give the size of one that starts fresh: --decoder WIDTH DEPTH HEADS"
        )
    return MaskedAutoencoder(facts.shape, facts.decoder, predictor=facts.predictor)


def check_fit(
    facts: ModelFacts, tensors: Tensors, may_start_fresh: tuple[str, ...]
) -> tuple[str, ...]:
    """Make sure that our model takes these weights. -> what they lack, of what they may

    Raises:
        CheckpointError: some are missing, left over, or of another shape. Each is named.
    """
    with torch.device("meta"):
        own: dict[str, torch.Tensor] = build_model(facts).state_dict()
    missing = [name for name in own if name not in tensors]
    wrong = [f"missing {name}" for name in missing if not name.startswith(may_start_fresh)]
    wrong += [f"left over {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, our model's is {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError("\n  ".join(["its tensors are not those of our model:", *wrong]))
    return tuple(missing)


@dataclass(frozen=True)
class _Student:
    tensors: Tensors
    left_out: dict[str, str]
    replaced: bool


def _settle(renamed: Renamed, family: Family, facts: ModelFacts, given: Given) -> _Student:
    """Positions checked, and what is not wanted left out."""
    tensors, left_out, replaced = dict(renamed.tensors), dict(renamed.left_out), False
    for table in family.layout.tables:
        if any(name in renamed.tables for name in table.theirs):
            if table.of == "decoder" and given.encoder_only:
                left_out[table.theirs[0]] = OF_DECODER
                continue
            told, changed = _compare_positions(table, renamed.tables, tensors, facts, given)
            left_out |= told
            replaced = replaced or changed
    if given.encoder_only:
        for name in _named(tensors, OF_DECODERS):
            left_out[name] = OF_DECODER
            del tensors[name]
    if facts.pooling is None:
        for name in _named(tensors, OF_HEADS):
            left_out[name] = "it belongs to a head, and only the encoder is taken"
            del tensors[name]
    return _Student(tensors, left_out, replaced)


def _compare_positions(
    table: PositionTable, tables: Tensors, tensors: Tensors, facts: ModelFacts, given: Given
) -> tuple[dict[str, str], bool]:
    """Make sure that a table holds what we compute. -> what is said of it, whether it did not

    What it has for the class token is added to that token, where it is the same.

    Raises:
        CheckpointError: it was learned, and is not to be replaced.
    """
    theirs, first = _joined(table, tables, facts)
    size = facts.encoder if table.of == "encoder" else facts.decoder
    assert size is not None
    ours = position_table(facts.grid, size.dim, facts.positions)
    names = [name for name in (*table.theirs, table.first_row) if name in tables]
    if theirs.shape != ours.shape:
        raise CheckpointError(
            f"{table.theirs[0]} is of {tuple(theirs.shape)} tokens and values, our "
            f"{table.of} has {tuple(ours.shape)}"
        )
    difference = (theirs - ours).abs().max().item()
    if first is not None and table.of == "encoder" and "class_token" in tensors:
        tensors["class_token"] = tensors["class_token"] + first
    elif first is not None:
        difference = max(difference, first.abs().max().item())
    if difference <= SAME_POSITIONS:
        says = f"computed here, with the same numbers (largest difference {difference:.1e})"
        return dict.fromkeys(map(str, names), says), False
    if not given.replace_positions:
        raise CheckpointError(
            f"{', '.join(map(str, names))}: its positions were learned (up to {difference:.2g} "
            f"from the fixed ones), and ours are fixed. To begin training from it all the same, "
            f"with fixed positions in their place, give --replace-positions; what it predicts "
            f"changes then"
        )
    says = f"learned positions, up to {difference:.2g} from the fixed ones that replace them"
    return dict.fromkeys(map(str, names), says), True


def _joined(
    table: PositionTable, tables: Tensors, facts: ModelFacts
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> (N, D), and (D,) what is added to the class token"""
    parts = [tables[name].float().flatten(0, 1) for name in table.theirs]
    if len(parts) == 2:
        space, time = parts
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
        f"licence: {imported.licence}",
        f"{parameters_of(imported.tensors.values()):,} numbers taken"
        + (", and as many of the teacher" if imported.teacher else ""),
    ]
    if facts.assumed:
        lines.append(f"not in the file, taken as usual: {'; '.join(facts.assumed)}")
    lines += [f"left out: {told}" for told in _grouped(imported.left_out)]
    if imported.fresh:
        lines.append(f"start fresh: {', '.join(_parts(imported.fresh))}")
    if not imported.is_classifier:
        if not facts.predictor:
            lines.append("it has no loss predictor: in pre-training that starts fresh")
        if imported.teacher is None:
            lines.append("it has no teacher: in pre-training that starts as a copy")
    return lines


def describe_model(facts: ModelFacts, family: Family) -> list[str]:
    """The kind and the size of a model, in lines for the terminal."""
    time, height, width = facts.cut.patch_size
    encoder, decoder = facts.encoder, facts.decoder
    lines = [
        f"{family.name}: {family.says}",
        f"encoder {encoder.dim} wide, {encoder.depth} deep, {encoder.num_heads} heads; "
        f"patches of {time} x {height} x {width}; clips of "
        f"{' x '.join(map(str, facts.clip_size))}",
    ]
    if facts.pooling is not None:
        lines.append(f"head of {len(facts.label_names)} classes on {facts.pooling}")
    elif decoder is not None:
        lines.append(
            f"decoder {decoder.dim} wide, {decoder.depth} deep, {decoder.num_heads} heads"
            + (", and a loss predictor" if facts.predictor else "")
        )
    return lines


def _grouped(left_out: dict[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(_parts(names))}: {reason}" for reason, names in reasons.items()]


def _parts(names: Iterable[str]) -> list[str]:
    """Names of tensors, those of all blocks as one."""
    kinds: dict[str, int] = {}
    for name in names:
        beginning = name.partition(".blocks.")[0] + ".blocks" if ".blocks." in name else name
        kinds[beginning] = kinds.get(beginning, 0) + 1
    return [f"{name} ({count} tensors)" if count > 1 else name for name, count in kinds.items()]
