"""What models say of one clip of noise, and how far apart that is."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpm_video.files.weights import CheckpointError
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.tokens.masking import STRATEGIES, MaskRule, TokenMask, count_masked
from hpm_video.weights.model import TrainedModel

TOLERANCE = 1e-4
"""Largest difference in single precision, as a share of the largest value."""
SMALLEST = 1e-6
"""A largest value that is smaller than this counts as this."""
Said = dict[str, Tensor]


# --- A clip, and what is said of it ---------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Clips, and which of their tokens are hidden from a masked autoencoder."""

    clips: Tensor
    """(B, C, T, H, W)"""
    noise: Tensor
    """(B, N) the lowest stay visible"""
    mask: TokenMask


@dataclass(frozen=True)
class Difference:
    """Of what two models say about the same clip."""

    of: str
    largest: float
    largest_value: float
    """Of the other implementation."""

    @property
    def share(self) -> float:
        """The difference as a share of the largest value; scores may all be small."""
        return self.largest / max(SMALLEST, self.largest_value)


def trial_of(model: TrainedModel, clips: int = 1) -> Trial:
    """Return clips of noise, and a mask of the share that a model was trained with."""
    config, grid = model.config, model.grid
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(clips, grid.num_tokens, generator=generator)
    ratio = model.pretraining.masking.ratio if model.pretraining else 0.5
    num_masked = count_masked(grid.num_tokens, ratio, "hpm")
    rule = MaskRule(grid, "token", num_masked, STRATEGIES["random"])
    size = (clips, config.model.channels, *config.data.clip_size)
    frames = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return Trial(frames, noise, rule.draw(None, noise, num_picked=0))


@torch.no_grad()
def said_by(model: nn.Module, trial: Trial) -> Said:
    """Return what a model of ours says of them."""
    if isinstance(model, ClipClassifier):
        return {"logits": model(trial.clips)}
    assert isinstance(model, MaskedAutoencoder)
    predicted = model(trial.clips, trial.mask)
    tokens = model.encode(trial.clips)
    said = {"tokens": tokens, "hidden patches": predicted.content, "features": model.pool(tokens)}
    return said if predicted.difficulty is None else said | {"difficulty": predicted.difficulty}


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[Difference, ...]:
    """Return those of everything that both say."""
    return tuple(
        Difference(name, (ours[name] - value).abs().max().item(), value.abs().max().item())
        for name, value in theirs.items()
        if name in ours
    )


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
        """Tell of it in the terminal."""
        told = [
            f"parity with {self.with_what}, {found.of}: largest difference {found.largest:.1e} of "
            f"values up to {found.largest_value:.2g}"
            for found in self.differences
        ]
        if self.not_checked:
            told.append(f"parity not checked: {self.not_checked}")
        return told + list(self.notes)

    def as_table(self) -> dict[str, Any]:
        """Return it for a file."""
        return {**asdict(self), "holds": self.holds}

    def judged(self, what: str, tolerance: float) -> "ParityReport":
        """Return the report, if no difference is above the tolerance.

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


NOT_ASKED = ParityReport("", not_checked="it was not asked for")


@dataclass(frozen=True)
class Peer:
    """A model of a library."""

    name: str
    models: tuple[nn.Module, ...]
    say: Callable[[Trial], Said]


@torch.no_grad()
def compare_with(peer: Peer, ours: Said, trial: Trial) -> ParityReport:
    """Return how far a library's model is from ours, with our eps in all its layer norms.

    Of a model that has another eps, the difference as it is loaded is told too.
    """
    as_loaded = differences(ours, peer.say(trial))
    norms = {
        name: module
        for model in peer.models
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.eps != LAYER_NORM_EPS
    }
    if not norms:
        return ParityReport(peer.name, as_loaded)
    usual = " and ".join(sorted({f"{norm.eps:g}" for norm in norms.values()}))
    where = ", ".join(norms) if len(norms) < 4 else "its layer norms"
    for norm in norms.values():
        norm.eps = LAYER_NORM_EPS
    farthest = max(as_loaded, key=lambda each: each.share)
    note = (
        f"{peer.name} has eps {usual} in {where}; as it is loaded, {farthest.of} differ by "
        f"{farthest.largest:.1e} of values up to {farthest.largest_value:.2g}. For equality set "
        f"{'model.' if len(norms) < 4 else ''}{where}.eps = {LAYER_NORM_EPS:g}"
    )
    return ParityReport(peer.name, differences(ours, peer.say(trial)), notes=(note,))
