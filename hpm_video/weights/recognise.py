"""The family of the weights in a file, recognised by names and axes, never guessed."""

import re
from dataclasses import dataclass, replace

from hpm_video.files.weights import CheckpointError
from hpm_video.weights.families import FAMILIES, Family
from hpm_video.weights.files import Source, Tensors

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "videomae.", "vit.")
"""Prefixes that all names of a file may have: of wrappers, or of a part that was saved alone."""
OF_PARTS = ("backbone.", "encoder.")
"""Prefixes that the names of a part may have beside a head without one."""
WRAPPERS = ("state_dict", "model_state", "module", "model", "")
"""Keys of the state dict in a file, the first that is there is taken."""
TEACHER = "ema_state_dict"
"""Key of the teacher beside a student's state dict."""
SHOWN = 12
"""Names listed of a file that is not recognised."""


@dataclass(frozen=True)
class Recognised:
    """The tensors of a file and their family."""

    family: Family
    tensors: Tensors
    """By the names of the family, without prefixes."""
    entry: str
    """Their key in the file."""
    prefix: str
    """The prefix that their names, or those of a part, had."""
    teacher: Tensors | None = None


def recognise(source: Source, entry: str | None = None) -> Recognised:
    """Find the family of weights. ``entry``: the key of a state dict, where a file has several.

    Raises:
        CheckpointError: it is of no known family, or may be of several. Its tensors are listed.
    """
    there = ", ".join(map(repr, source.entries))
    known = [name for name in WRAPPERS if name in source.entries]
    if entry is not None and entry not in source.entries:
        raise CheckpointError(f"{source.path} has no state dict {entry!r}, but {there}")
    if entry is None and not known and len(source.entries) > 1:
        raise CheckpointError(
            f"{source.path} holds several state dicts: {there}; choose with --entry"
        )
    chosen = _of_entry(source, [*known, *source.entries][0] if entry is None else entry)
    if entry is not None or chosen.family.holds != "autoencoder":
        return chosen
    if TEACHER not in source.entries or chosen.entry == TEACHER:
        return chosen
    teacher = _of_entry(source, TEACHER)
    if teacher.family is not chosen.family:
        raise CheckpointError(
            f"{source.path} holds {chosen.family.says} under {chosen.entry!r} and "
            f"{teacher.family.says} under {TEACHER!r}; give one of them: --entry {chosen.entry}"
        )
    return replace(chosen, teacher=teacher.tensors)


def _of_entry(source: Source, entry: str) -> Recognised:
    """Leave out prefixes, of all names or of those of a part beside a head, until a family fits."""
    tensors, prefix = source.entries[entry], ""
    while not (fit := _fitting(tensors)):
        of_all = [each for each in PREFIXES if all(name.startswith(each) for name in tensors)]
        of_part = [each for each in OF_PARTS if _fitting(_stripped(tensors, each))]
        if not of_all and not of_part:
            raise CheckpointError(_unknown(source, entry, tensors))
        found = (of_all or of_part)[0]
        prefix, tensors = prefix + found, _stripped(tensors, found)
    if len(fit) > 1:
        raise CheckpointError(
            f"{source.path} may be {' or '.join(family.says for family in fit)}: it has tensors "
            f"of both; save the state dict of one model alone"
        )
    return Recognised(fit[0], tensors, entry, prefix)


def _fitting(tensors: Tensors) -> list[Family]:
    """Return the most specific families that the tensors fit."""
    fit = [family for family in FAMILIES.values() if family.fits(tensors)]
    return [family for family in fit if not any(family.has < other.has for other in fit)]


def _stripped(tensors: Tensors, prefix: str) -> Tensors:
    """Leave out a prefix, unless two names would become one."""
    found = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return found if len(found) == len(tensors) else {}


def _unknown(source: Source, entry: str, tensors: Tensors) -> str:
    where = f" under {entry!r}" if entry else ""
    return (
        f"{source.path} holds weights{where} of no family that is known ({', '.join(FAMILIES)}). "
        f"Its tensors:\n  "
        + "\n  ".join(list_shapes(tensors))
        + "\nKnown are plain vision transformers alone, without layer scale, relative positions "
        "or registers."
    )


def list_shapes(tensors: Tensors) -> list[str]:
    """List names and shapes of the first tensors, those of all blocks as one."""
    kinds: dict[str, tuple[int, ...]] = {}
    for name, value in tensors.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), tuple(value.shape))
    shown = [f"{name} {shape}" for name, shape in list(kinds.items())[:SHOWN]]
    return [*shown, f"and {len(kinds) - SHOWN} more kinds of names"][: len(kinds)]
