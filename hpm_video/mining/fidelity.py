"""How close cheaper updates come to exact ones, in the teacher's ranking and the student's errors.

A lever leaves out part of the work of an update. Levers are compared on one trained model, without
training it: the teacher's scores are compared with the true errors and with the scores of a teacher
that sees everything, and the student's errors with those of full decoders.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hpm_video.data.batch import ClipBatch
from hpm_video.mining.objective import HardPatchesMining, average_errors
from hpm_video.mining.validation import NUM_MASKS, Counts, Measures
from hpm_video.randomness import uniform
from hpm_video.tokens.masking import MaskRule
from hpm_video.tokens.views import VIEWS
from hpm_video.training.engine import Runner

RANDOM = "random scores"


@torch.no_grad()
def measure_levers(
    objective: HardPatchesMining,
    student: Runner,
    batches: Iterable[ClipBatch],
    shares: Sequence[float],
    seed: int,
) -> Measures:
    """Measure each view of the teacher, and each share of the hidden tokens that is decoded.

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
    """Return the tokens that are hidden for their difficulty: (B, N) -> (B, N) bool

    It takes the epoch in which their number is largest.
    """
    strategy = rule.strategy
    count = int(rule.num_masked * max(strategy.first_fraction, strategy.last_fraction))
    no_draws = difficulty.new_zeros(len(difficulty), rule.num_units)
    return replace(rule, num_masked=count).draw(difficulty, no_draws, count).masked
