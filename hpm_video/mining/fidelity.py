"""How near a cheaper update comes to the exact one: what its teacher ranks and its student learns.

Levers leave out a part of the work of an update. They are compared on one trained model, so nothing
is trained: the teacher's scores are held against true errors and against those of a teacher that
sees everything, and the student's errors against those under full decoders.
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

    ``VIEW/ranking``: as the teacher's in validation, under ``NUM_MASKS`` random masks of each clip,
    which ``seed`` draws. ``VIEW/overlap``: share of the tokens that it picks which the teacher
    that sees all picks too. Beside the views there are ``random scores``, which need no teacher.
    ``SHARE/relative_error`` and ``SHARE/student_ranking``: as in validation, of the decoded tokens.
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

    In the epoch in which most are.
    """
    strategy = rule.strategy
    count = int(rule.num_masked * max(strategy.first_fraction, strategy.last_fraction))
    no_draws = difficulty.new_zeros(len(difficulty), rule.num_units)
    return replace(rule, num_masked=count).draw(difficulty, no_draws, count).masked
