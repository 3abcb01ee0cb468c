"""How large a forward pass the memory of a device holds."""

import gc
from collections.abc import Callable, Sequence

import torch

from hpm_video.config.batch_plan import (
    PlanError,
)


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of ascending ``sizes`` that fits, if every smaller one does where a larger does.

    The smallest is tried first, then the middle of what is left open.

    Raises:
        PlanError: there are no sizes, or not even the smallest fits.
    """
    if not sizes:
        raise PlanError("there is no size to try; give at least one")
    if not fits(sizes[0]):
        raise PlanError(
            f"a forward and backward pass of engine.micro_batch={sizes[0]} does not fit the "
            f"device, and no smaller one is possible; take model.checkpoint_activations=true, a "
            f"higher engine.zero_stage, smaller or shorter clips, or more processes"
        )
    fitting, open_end = 0, len(sizes)
    while open_end - fitting > 1:
        middle = (fitting + open_end) // 2
        if fits(sizes[middle]):
            fitting = middle
        else:
            open_end = middle
    return sizes[fitting]


def fits_in_memory(run_once: Callable[[], None]) -> bool:
    """Whether the device has the memory for one run. What the run left is freed."""
    try:
        run_once()
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    # Not in the except clause: there, the traceback still holds the tensors of the run.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits
