"""How well a model reconstructs and ranks on clips that it was not trained on.

A ranking accuracy means nothing alone: where targets are raw pixels, the patches that vary most
are the hardest, and no network is needed to find them. So student and teacher stand beside
rankers that look at the patch itself. A predictor has learned something where it beats the best.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from einops import rearrange, reduce
from torch import Tensor

from hpm_video.data.dataset import ClipBatch
from hpm_video.losses import count_ordered_pairs
from hpm_video.mining import HardPatchesMining
from hpm_video.pixels import to_unit_range
from hpm_video.targets import patchify
from hpm_video.token_grid import Size3
from hpm_video.training.engine import Engine

Measures = dict[str, float]
TRIVIAL = "ranking_by_"
"""Prefix of the measures of rankers that need no model."""


@torch.no_grad()
def measure(objective: HardPatchesMining, engine: Engine, batches: Iterable[ClipBatch]) -> Measures:
    """Measures over all clips of ``batches``, under one random mask of each.

    ``relative_error``: reconstruction error divided by that of predicting the mean of each patch
    and channel. ``student_ranking``, ``teacher_ranking``: share of the pairs of hidden tokens of a
    clip that are scored in the order of the student's errors; the student sees the visible tokens,
    the teacher the whole clip. ``ranking_by_...``: the same for the trivial rankers.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=engine.device))
    for cpu_batch in batches:
        batch = cpu_batch.to(engine.device)
        with engine.autocast():
            seen = objective.examine(engine, batch)
        sums["error"] += seen.errors.sum()
        sums["mean_error"] += seen.mean_errors.sum()
        rankers = {
            f"{TRIVIAL}{name}": seen.mask.take_masked(scores.unsqueeze(-1)).squeeze(-1)
            for name, scores in trivial_difficulties(
                batch.clips, objective.targets.patch_size
            ).items()
        }
        if seen.prediction.difficulty is not None and seen.teacher_difficulty is not None:
            rankers["student_ranking"] = seen.prediction.difficulty
            teacher = seen.mask.take_masked(seen.teacher_difficulty.unsqueeze(-1))
            rankers["teacher_ranking"] = teacher.squeeze(-1)
        for name, scores in rankers.items():
            counts = count_ordered_pairs(scores, seen.errors)
            sums[f"{name} correct"] += counts.correct
            sums[f"{name} total"] += counts.total
    measures = {"relative_error": _ratio(sums["error"], sums["mean_error"])}
    names = [key.removesuffix(" total") for key in sums if key.endswith(" total")]
    for name in names:
        measures[name] = _ratio(sums[f"{name} correct"], sums[f"{name} total"])
    return dict(sorted(measures.items(), key=lambda item: item[0].startswith(TRIVIAL)))


def trivial_difficulties(clips: Tensor, patch_size: Size3) -> dict[str, Tensor]:
    """Scores that need no model: (B, C, T, H, W) uint8 -> (B, N) each

    ``variance`` of the pixels of a patch around the mean of their channel, and ``motion``, the
    mean absolute difference to the frame before (of the first frame: to the second); and both
    turned round, as ``flatness`` and ``stillness``.
    """
    pixels = to_unit_range(clips)
    patches = rearrange(patchify(pixels, patch_size), "b n (p c) -> b n p c", c=clips.shape[1])
    variance = patches.var(dim=2, correction=0).mean(dim=-1)
    second = min(1, clips.shape[2] - 1)
    before = torch.cat([pixels[:, :, second : second + 1], pixels[:, :, :-1]], dim=2)
    motion = reduce(patchify((pixels - before).abs(), patch_size), "b n p -> b n", "mean")
    return {
        "variance": variance,
        "flatness": -variance,
        "motion": motion,
        "stillness": -motion,
    }


def describe(measures: Measures) -> str:
    """The measures in one paragraph, for the terminal."""
    text = f"held out: error {measures['relative_error']:.3f} of the patch mean's"
    if "student_ranking" not in measures:
        return text
    trivial = ", ".join(
        f"{name.removeprefix(TRIVIAL)} {value:.3f}"
        for name, value in measures.items()
        if name.startswith(TRIVIAL)
    )
    return (
        f"{text}; ranking: student {measures['student_ranking']:.3f}, teacher "
        f"{measures['teacher_ranking']:.3f} (trivial: {trivial})"
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if float(whole) else float("nan")
