"""Whether imported weights compute here what they compute in an independent implementation."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hpm_video.files.weights import CheckpointError
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import OF_TEACHER, Imported
from hpm_video.weights.peers import (
    has_square_frames,
    is_installed,
    is_made_of_a_config,
    kind_of_peer,
    peer_of,
)
from hpm_video.weights.trial import Difference, differences, make_trial, said_by

TOLERANCE = 1e-4
"""Largest difference in single precision, as a share of the largest value."""
RATIO = 0.75


@dataclass(frozen=True)
class ParityReport:
    """What a comparison found."""

    with_what: str
    """The other implementation; empty where there was none."""
    differences: tuple[Difference, ...] = ()
    not_checked: str = ""
    """Why nothing, or not everything, was compared."""
    notes: tuple[str, ...] = ()
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether no difference is above the tolerance."""
        return all(found.share <= self.tolerance for found in self.differences)

    def lines(self) -> list[str]:
        """For the terminal."""
        told = [
            f"parity with {self.with_what}, {found.of}: largest difference {found.largest:.1e} of "
            f"values up to {found.largest_value:.2g}"
            for found in self.differences
        ]
        if self.not_checked:
            told.append(f"parity not checked: {self.not_checked}")
        return told + list(self.notes)

    def as_table(self) -> dict[str, Any]:
        """For a file."""
        return {**asdict(self), "holds": self.holds}

    def judged(self, what: str, tolerance: float) -> "ParityReport":
        """The report, if no difference is above the tolerance.

        Raises:
            CheckpointError: one is; ``what`` computes something else then.
        """
        report = replace(self, tolerance=tolerance)
        if not report.holds:
            raise CheckpointError(
                f"{what}:\n  "
                + "\n  ".join(report.lines())
                + f"\nmore than {tolerance:g} of the largest value is too much"
            )
        return report


def compare(
    imported: Imported, tolerance: float = TOLERANCE, *, skip: bool = False
) -> ParityReport:
    """The imported model and an independent one with the same weights, on the same random clip.

    A teacher beside the student is compared too. ``skip``: only say that it was not done.

    Raises:
        CheckpointError: they differ by more than the tolerance.
    """
    reason = "it was not asked for" if skip else _not_comparable(imported)
    if reason:
        return ParityReport("", not_checked=reason, tolerance=tolerance)
    found: list[Difference] = []
    name = ""
    for who, ours, theirs in _state_dicts(imported):
        name, of_one = _compared(imported, ours, theirs)
        found += [replace(each, of=f"{who}{each.of}") for each in of_one]
    partly = ""
    if imported.family.peer == "ViTMAEForPreTraining" and not has_square_frames(imported):
        partly = "the decoder: transformers has it for square frames only"
    report = ParityReport(name, tuple(found), not_checked=partly, notes=_notes(imported))
    return report.judged("the imported model computes something else than the original", tolerance)


def _state_dicts(imported: Imported) -> Iterator[tuple[str, Tensors, Tensors]]:
    """-> whose it is, by our names, by theirs"""
    yield "", imported.tensors, imported.recognised.tensors
    if imported.teacher is not None:
        assert imported.recognised.teacher is not None
        yield OF_TEACHER, imported.teacher, imported.recognised.teacher


@torch.no_grad()
def _compared(
    imported: Imported, ours: Tensors, theirs: Tensors
) -> tuple[str, tuple[Difference, ...]]:
    """-> the name of the other implementation, differences

    A model that is made of a config is compared as it is, and once more with our eps.
    """
    model = imported.build().eval()
    left = model.load_state_dict(ours, strict=False)
    assert set(left.missing_keys) <= set(imported.fresh)
    trial = make_trial(imported.facts.shape, imported.facts.clip_size, RATIO)
    said = said_by(model, trial)
    peer = peer_of(imported, theirs)
    found: tuple[Difference, ...] = ()
    if is_made_of_a_config(imported):
        found = differences(said, peer.say(trial))
    if peer.set_eps(LAYER_NORM_EPS) or not found:
        exact = differences(said, peer.say(trial))
        with_eps = f" with eps {LAYER_NORM_EPS:g}" if found else ""
        found += tuple(replace(each, of=f"{each.of}{with_eps}") for each in exact)
    return peer.name, found


def _notes(imported: Imported) -> tuple[str, ...]:
    """What a comparison cannot show, and what it left out."""
    facts, notes = imported.facts, []
    if not is_made_of_a_config(imported):
        decoder = (
            ""
            if imported.fresh or facts.decoder is None
            else (f" and {facts.decoder.num_heads} of the decoder")
        )
        notes.append(
            f"not verified: the number of heads ({facts.encoder.num_heads} of the encoder{decoder})"
            f", which weights do not tell: both models have it as given or usual"
        )
    stored = {value.dtype for value in imported.recognised.tensors.values()}
    if facts.positions != "given" and imported.family.layout.tables and stored != {torch.float32}:
        notes.append("positions are computed in single precision in both models, not as stored")
    return tuple(notes)


def _not_comparable(imported: Imported) -> str:
    kind = kind_of_peer(imported)
    if not kind.startswith("timm") and not is_installed("transformers"):
        return "transformers is not installed"
    if kind.startswith("ViTMAE") and not has_square_frames(imported):
        return "transformers has ViTMAE for square frames only"
    return ""
