"""Classification by weighted nearest neighbours of frozen features.

Axes here: Q queries, S labelled samples of the bank, D feature width, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100, 200)
"""Numbers of neighbours that are customary."""
TEMPERATURE = 0.07
CHUNK = 128
"""Queries whose similarities to the whole bank are held at a time."""


@torch.no_grad()
def knn_probabilities(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: Sequence[int] = NEIGHBOURS,
    num_classes: int,
    temperature: float = TEMPERATURE,
    chunk: int = CHUNK,
) -> dict[int, Tensor]:
    """Class shares for each number ``k`` of neighbours.

    (Q, D), (S, D), (S,) int -> (Q, K) float32 for each k

    The k samples of the bank that are nearest by cosine similarity vote for their class, each with
    exp(similarity / temperature); a row of shares sums to 1. The similarities are computed once for
    all k. Of samples that are equally near, any may be the last one that votes.

    Raises:
        ValueError: shapes that do not fit, labels that are no class, values that are not finite,
            or more neighbours than the bank has samples.
    """
    _check_bank(features, bank, bank_labels, num_classes)
    _check_settings(k, temperature, chunk, len(bank))
    bank = F.normalize(bank.float(), dim=1)
    classes = torch.arange(num_classes, device=bank.device)
    shares: dict[int, list[Tensor]] = {count: [] for count in k}
    for queries in torch.split(F.normalize(features.float(), dim=1), chunk):
        nearest = (queries @ bank.T).topk(max(k), dim=1)
        # Against the nearest, so that no weight overflows and not all of them vanish.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes = (bank_labels[nearest.indices].unsqueeze(-1) == classes).float()
        for count, found in shares.items():
            summed = torch.einsum("qk,qkc->qc", weights[:, :count], votes[:, :count])
            found.append(summed / weights[:, :count].sum(dim=1, keepdim=True))
    return {count: torch.cat(found) for count, found in shares.items()}


def _check_bank(features: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int) -> None:
    fits = features.ndim == bank.ndim == 2 and features.shape[1] == bank.shape[1]
    if not fits or bank_labels.shape != bank.shape[:1]:
        raise ValueError(
            f"features, bank and labels must be (Q, D), (S, D) and (S,), got "
            f"{tuple(features.shape)}, {tuple(bank.shape)} and {tuple(bank_labels.shape)}; "
            f"take all features from one model, and one label for each sample of the bank"
        )
    if len(bank) and not 0 <= int(bank_labels.min()) <= int(bank_labels.max()) < num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, got {int(bank_labels.min())}.."
            f"{int(bank_labels.max())}; number the classes from 0, or raise num_classes"
        )
    for name, values in ("features", features), ("bank", bank):
        if not values.isfinite().all():
            broken = int((~values.isfinite()).any(dim=1).sum())
            raise ValueError(
                f"{name} must be finite, got {broken} of {len(values)} rows that are not; look for "
                f"the model or the precision that made them"
            )


def _check_settings(k: Sequence[int], temperature: float, chunk: int, bank_size: int) -> None:
    if not k or min(k) < 1 or max(k) > bank_size:
        raise ValueError(
            f"each k must be in 1..{bank_size}, the size of the bank, got {list(k)}; "
            f"lower k or extract features of more samples"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; {TEMPERATURE} is usual")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 query, got {chunk}; {CHUNK} is the default")
