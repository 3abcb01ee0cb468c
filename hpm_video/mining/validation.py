"""Validation: how well a model reconstructs and ranks on clips that it was not trained on.

A ranking accuracy means nothing alone: where targets are raw pixels, the patches that vary most
are the hardest, and no network is needed to find them. So student and teacher are compared with
trivial rankers of the patches. A predictor has learned something where it beats the best of them.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from einops import rearrange, reduce
from torch import Tensor

from hpm_video.data.batch import ClipBatch
from hpm_video.mining.losses import count_ordered_pairs
from hpm_video.mining.objective import HardPatchesMining, StudentOutput, average_errors
from hpm_video.randomness import uniform
from hpm_video.tokens.grid import Size3
from hpm_video.tokens.masking import MaskRule
from hpm_video.tokens.patches import patchify, to_unit_range
from hpm_video.tokens.views import VIEWS
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import Runner

Measures = dict[str, float]
NUM_MASKS = 10
"""Random masks of each clip, as many as the paper averages true errors over in its Figure 2."""
TRIVIAL, TRIVIAL_FOR_STUDENT = "ranking_by_", "student_ranking_by_"
"""Prefixes of the measures of rankers that need no model, measured as teacher and student are."""
RANDOM = "random scores"


@torch.no_grad()
def measure(
    objective: HardPatchesMining,
    student: Runner,
    batches: Iterable[ClipBatch],
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
) -> Measures:
    """Measures over all clips of all processes, under ``NUM_MASKS`` random masks of each.

    ``relative_error``: reconstruction error divided by that of the baseline; where the target is
    pixels, the mean of each patch and channel. The rankings are shares of pairs of tokens
    of a clip that are scored in the order of their error. ``student_ranking``: hidden tokens,
    scored by the student that sees the visible ones, by their error under the same mask.
    ``teacher_ranking``: all tokens, scored by the teacher as in training, by their error averaged
    over the masks, since it cannot know the mask. ``ranking_by_...`` and
    ``student_ranking_by_...``: the trivial rankers, measured as the teacher and as the student.
    """
    counts = Counts(student.device)
    for cpu_batch in batches:
        batch = cpu_batch.to(student.device)
        with student.autocast():
            outputs = objective.evaluate(
                student, batch, (f"held out {i}" for i in range(NUM_MASKS))
            )
            teacher = objective.difficulty(batch)
        counts.add_outputs("", outputs)
        errors = average_errors(outputs)
        if teacher is not None:
            counts.add_pairs("teacher_ranking", teacher, errors)
        trivial = trivial_difficulties(batch.clips, objective.target.patch_size)
        for name, scores in trivial.items():
            counts.add_pairs(f"{TRIVIAL}{name}", scores, errors)
            for output in outputs:
                hidden = output.mask.take_masked(scores.unsqueeze(-1)).squeeze(-1)
                counts.add_pairs(f"{TRIVIAL_FOR_STUDENT}{name}", hidden, output.errors)
    return counts.ratios(processes)


class Counts:
    """Numerators and denominators of ratios, summed over batches on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, device=device))

    def add(self, name: str, part: Tensor, total: Tensor) -> None:
        self._sums[name] += torch.stack([part.float(), total.float()])

    def add_pairs(self, name: str, scores: Tensor, errors: Tensor) -> None:
        self.add(name, *count_ordered_pairs(scores, errors))

    def add_outputs(self, prefix: str, outputs: Sequence[StudentOutput]) -> None:
        for output in outputs:
            self.add(f"{prefix}relative_error", output.errors.sum(), output.baseline_errors.sum())
            if output.difficulty is not None:
                self.add_pairs(f"{prefix}student_ranking", output.difficulty, output.errors)

    def ratios(self, processes: Processes = Processes()) -> Measures:  # noqa: B008
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, sums in processes.gather([(n, s.tolist()) for n, s in self._sums.items()]):
            totals[name] = [before + more for before, more in zip(totals[name], sums, strict=True)]
        return {name: part / total if total else math.nan for name, (part, total) in totals.items()}


@torch.no_grad()
def measure_levers(
    objective: HardPatchesMining,
    student: Runner,
    batches: Iterable[ClipBatch],
    shares: Sequence[float],
    seed: int,
) -> Measures:
    """Measure how close cheaper updates come to exact ones, on one model that is not trained.

    They are each view of the teacher, and each share of the hidden tokens that is decoded.
    ``VIEW/ranking``: the teacher's, as in validation, under ``NUM_MASKS`` random masks of each
    clip, which ``seed`` determines. ``VIEW/overlap``: share of the tokens picked by a teacher that
    sees everything that are also picked under the view. ``random scores`` need no teacher.
    ``SHARE/relative_error``, ``SHARE/student_ranking``: as in validation, on the decoded tokens.
    """
    counts, purposes = Counts(student.device), [f"fidelity {seed} {i}" for i in range(NUM_MASKS)]
    for cpu_batch in batches:
        batch = cpu_batch.to(student.device)
        rule, scores = objective.masks[batch.source], dict[str, Tensor]()
        with student.autocast():
            outputs = {
                share: objective.evaluate(student, batch, purposes, decoded_share=share)
                for share in {1.0, *shares}
            }
            for view in VIEWS:
                seeing = copy.copy(objective)
                seeing.teacher_sees = view
                found = seeing.difficulty(batch)
                assert found is not None
                scores[view] = found
        scores[RANDOM] = uniform(batch.keys, rule.grid.num_tokens, f"random scores {seed}")
        for share, found_of_share in outputs.items():
            counts.add_outputs(f"{share}/", found_of_share)
        errors, hard = average_errors(outputs[1.0]), pick(rule, scores["all"])
        for name, difficulty in scores.items():
            counts.add_pairs(f"{name}/ranking", difficulty, errors)
            counts.add(f"{name}/overlap", (pick(rule, difficulty) & hard).sum(), hard.sum())
    return counts.ratios()


def pick(rule: MaskRule, difficulty: Tensor) -> Tensor:
    """The tokens hidden for their difficulty in the epoch of most: (B, N) -> (B, N) bool"""
    strategy = rule.strategy
    count = int(rule.num_masked * max(strategy.first_fraction, strategy.last_fraction))
    no_draws = difficulty.new_zeros(len(difficulty), rule.num_units)
    return replace(rule, num_masked=count).draw(difficulty, no_draws, count).masked


def trivial_difficulties(clips: Tensor, patch_size: Size3) -> dict[str, Tensor]:
    """Scores that need no model: (B, C, T, H, W) uint8 -> (B, N) each

    ``variance`` of the pixels of a patch around the mean of their channel, and ``motion``, the
    mean absolute difference to the frame before (of the first frame: to the second); and both
    negated, as ``flatness`` and ``stillness``. Where all frames are alike there is no motion.
    """
    pixels = to_unit_range(clips)
    patches = rearrange(patchify(pixels, patch_size), "b n (p c) -> b n p c", c=clips.shape[1])
    variance = patches.var(dim=2, correction=0).mean(dim=-1)
    scores = {"variance": variance, "flatness": -variance}
    if clips.shape[2] > 1:
        before = torch.cat([pixels[:, :, 1:2], pixels[:, :, :-1]], dim=2)
        motion = reduce(patchify((pixels - before).abs(), patch_size), "b n p -> b n", "mean")
        if motion.any():
            motion = motion.masked_fill(~motion.any(dim=1, keepdim=True), float("nan"))
            scores |= {"motion": motion, "stillness": -motion}
    return scores


def describe(measures: Measures, baseline: str = "the patch mean") -> str:
    """Return the measures in a few lines for the terminal; ``baseline``: see ``Target``."""
    lines = [f"validation: error {measures['relative_error']:.3f} of {baseline}'s"]
    for who, prefix in ("student", TRIVIAL_FOR_STUDENT), ("teacher", TRIVIAL):
        if f"{who}_ranking" in measures:
            trivial = ", ".join(
                f"{name.removeprefix(prefix)} {value:.3f}"
                for name, value in measures.items()
                if name.startswith(prefix)
            )
            own = measures[f"{who}_ranking"]
            lines.append(f"  ranking by the {who} {own:.3f} (without a model: {trivial})")
    return "\n".join(lines)
