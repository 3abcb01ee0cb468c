"""Studies of clips: true error, predicted difficulty, mask and reconstruction."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.data.batch import ClipBatch
from hpm_video.mining.losses import count_ordered_pairs
from hpm_video.mining.objective import HardPatchesMining, average_errors
from hpm_video.mining.targets import PixelTarget
from hpm_video.randomness import uniform
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.masking import Pick, TokenMask
from hpm_video.tokens.patches import PatchStatistics, TargetKind, patchify, unpatchify
from hpm_video.tokens.views import View
from hpm_video.training.objective import Model

Frames = NDArray[np.uint8]  # (T, H, W, 3)
Scores = NDArray[np.float32]  # (N,)
Flags = NDArray[np.bool_]  # (N,)
StatisticsSource = Literal["none", "input", "visible"]
"""Where mean and contrast of a reconstructed patch come from: raw pixels need none; the hidden
patch itself; or the visible patches around it, which gives nothing away."""


@dataclass(frozen=True, eq=False)
class Study:
    """True error, predicted difficulty, mask and reconstruction of one clip."""

    name: str
    grid: TokenGrid
    patch_size: Size3
    frames: Frames
    true_error: Scores  # mean over the masks in which the token was hidden; NaN where it never was
    difficulty: Scores | None  # the teacher's scores; none without a predictor
    teacher_sees: View
    masked: Flags
    picked: Flags  # which of the hidden tokens are hidden for their difficulty
    reconstruction: Frames | None  # made from that mask; none where features are predicted
    pick: Pick
    num_masks: int  # random masks that the true error is averaged over
    target: TargetKind | None  # none where features are predicted, not pixels
    statistics: StatisticsSource

    @property
    def ranking_accuracy(self) -> float | None:
        """Share of pairs of tokens that the teacher puts in the order of their true error."""
        if self.difficulty is None:
            return None
        scores, errors = map(torch.from_numpy, (self.difficulty, self.true_error))
        correct, total = count_ordered_pairs(scores[None], errors[None])
        return float(correct / total) if total else None


@torch.no_grad()
def study_clips(
    objective: HardPatchesMining,
    student: Model,
    batch: ClipBatch,
    *,
    num_masks: int = 10,
    hard_fraction: float | None = None,
    ground_truth_statistics: bool = True,
) -> list[Study]:
    """Study each clip of a batch. Draws are keyed by the clip, so a picture can be made again.

    ``hard_fraction``: share of the hidden units that is picked by difficulty; by default as at the
    end of training. Without a teacher masks are random. ``ground_truth_statistics``: give each
    reconstructed patch mean and contrast of the hidden one, else of the visible ones around it.
    """
    rule, target = objective.masks[batch.source], objective.target
    fraction = rule.strategy.last_fraction if hard_fraction is None else hard_fraction
    difficulty = objective.difficulty(batch)
    num_picked = 0 if difficulty is None else int(rule.num_masked * fraction)
    priority = uniform(batch.keys, rule.num_units, "picture")
    mask = rule.draw(difficulty, priority, num_picked)
    picked = replace(rule, num_masked=num_picked).draw(difficulty, priority, num_picked).masked
    source: StatisticsSource = "input" if ground_truth_statistics else "visible"
    kind, filled = None, None
    if isinstance(target, PixelTarget):
        kind = target.kind
        predicted = student(objective.normalised(batch), mask).content
        filled = reconstruct(predicted, batch.clips, mask, target, source)
    outputs = objective.evaluate(student, batch, (f"picture {i}" for i in range(num_masks)))
    true_errors = average_errors(outputs)
    return [
        Study(
            name=Path(batch.files[i]).stem,
            grid=rule.grid,
            patch_size=target.patch_size,
            frames=_to_frames(batch.clips[i]),
            true_error=true_errors[i].cpu().numpy(),
            difficulty=None if difficulty is None else difficulty[i].cpu().numpy(),
            teacher_sees=objective.teacher_sees,
            masked=mask.masked[i].cpu().numpy(),
            picked=picked[i].cpu().numpy(),
            reconstruction=None if filled is None else _to_frames(filled[i]),
            pick=rule.strategy.pick,
            num_masks=num_masks,
            target=kind,
            statistics="none" if kind in (None, "raw") else source,
        )
        for i in range(len(batch.clips))
    ]


def reconstruct(
    predicted: Tensor,
    clips: Tensor,
    mask: TokenMask,
    target: PixelTarget,
    source: StatisticsSource,
) -> Tensor:
    """Fill the hidden patches of clips with what was predicted for them.

    (B, M, P) predicted targets, (B, C, T, H, W) uint8 -> (B, C, T, H, W) uint8
    """
    time, height, width = clips.shape[2:]
    grid, patches = (
        TokenGrid.of_clip((time, height, width), target.patch_size),
        target.patches(clips),
    )
    statistics = target.statistics(mask.take_masked(patches))
    if source == "visible":
        visible = target.statistics(mask.take_visible(patches))
        with torch.autocast(clips.device.type, enabled=False):
            statistics = statistics_from_visible(visible, mask, grid)
    hidden = predicted.float() * statistics.scale + statistics.mean
    visible_pixels = mask.take_visible(patchify(clips, target.patch_size))
    filled = mask.merge(visible_pixels, target.to_pixels(hidden))
    return unpatchify(filled, target.patch_size, grid)


def statistics_from_visible(
    visible: PatchStatistics, mask: TokenMask, grid: TokenGrid
) -> PatchStatistics:
    """Estimate the statistics of hidden patches: 2 x (B, V, .) of the visible -> 2 x (B, M, .)

    A mean weighted by distance ** -4 in steps of the grid: with a power of at most 3, the many
    patches far away would outweigh the few near ones.
    """
    axes = [torch.arange(size, device=mask.masked.device) for size in grid.shape]
    places = torch.cartesian_prod(*axes).float()
    weights = torch.cdist(places[mask.masked_ids], places[mask.visible_ids]) ** -4
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return PatchStatistics(weights @ visible.mean, weights @ visible.scale)


def _to_frames(clip: Tensor) -> Frames:
    """(C, T, H, W) uint8 -> (T, H, W, 3); other than three channels are averaged to grey"""
    if len(clip) != 3:
        clip = repeat(clip.float().mean(dim=0).round().to(torch.uint8), "t h w -> c t h w", c=3)
    return rearrange(clip, "c t h w -> t h w c").cpu().numpy()
