"""AdamW and which parameters it decays."""

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices, which decay, and vectors, which do not: biases, norms, the mask token."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (vectors if parameter.ndim <= 1 else matrices).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with eps 1e-8; its learning rate is set before every update.

    The fused form updates all parameters in one call, which is what counts for small models.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
