"""Fixed position codes. They are computed, never learned and never in a checkpoint."""

import torch
from torch import Tensor


def sinusoid(num_positions: int, dim: int) -> Tensor:
    """One-dimensional code over the flattened token index, as in VideoMAE: -> (N, D)

    Column j holds the angle position / 10000^(2 floor(j / 2) / D): its sine where j is even, its
    cosine where j is odd.
    """
    position = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1)
    angle = position / 10000 ** (2 * (torch.arange(dim) // 2) / dim)
    angle[:, 0::2] = angle[:, 0::2].sin()
    angle[:, 1::2] = angle[:, 1::2].cos()
    return angle.float()
