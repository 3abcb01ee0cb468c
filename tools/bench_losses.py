"""Measure time and memory of the ranking loss, forward and backward: bench.py losses.

The package computes it in blocks of rows of token pairs; the plain form, as the loss is defined,
holds tensors of B x M x M. They take turns, and medians are shown. Memory is the peak of the
tensors that exist at the same time.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bench_update import medians_of_turns  # type: ignore[import-not-found] # beside this file
from torch import Tensor
from torch.nn.functional import softplus

from hpm_video.mining.losses import ranking_loss
from hpm_video.runs.console import add_options, positive
from hpm_video.training.device import choose_device, time_updates
from hpm_video.training.memory import measure_update


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--clips", type=positive, default=32, help="clips per call (32)")
    add("--tokens", type=positive, default=1412, help="hidden tokens per clip (1412)")
    add("--repeats", type=positive, default=6, help="timed calls of each (6)")
    add_options(parser, "device")


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Make one table, with a row for each form of the loss."""
    device, size = choose_device(arguments.device), (arguments.clips, arguments.tokens)
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(size, generator=draw).to(device).requires_grad_()
    errors = torch.rand(size, generator=draw).to(device)

    def step(name: str) -> float:
        scores.grad = None
        value = LOSSES[name](scores, errors)
        torch.autograd.backward(value)
        return float(value.detach())  # waits for the device

    def row_of(name: str) -> dict[str, Any]:
        memory = measure_update(lambda: partial(step, name)).activations / 1e6
        ms = 1000 * medians[name]
        return {"form": name, "ms": ms, "peak memory, MB": memory, "loss": step(name)}

    ways = {
        name: partial(time_updates, partial(step, name), device, warmup=1, repeats=1)
        for name in LOSSES
    }
    medians = medians_of_turns(ways, arguments.repeats)
    rows = [row_of(name) for name in LOSSES]
    yield f"ranking loss of {size[0]} clips x {size[1]} tokens, {device.type}", rows


def plain_ranking_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """Compute the same loss as it is defined: (B, M), (B, M) -> ()

    -log sigmoid(s_i - s_j), which is softplus(s_j - s_i), averaged over ordered pairs e_i > e_j.
    """
    counted = errors[:, :, None] > errors[:, None, :]
    wrong_by = scores[:, None, :] - scores[:, :, None]
    return (softplus(wrong_by) * counted).sum() / counted.sum().clamp(min=1)


LOSSES = {"plain": plain_ranking_loss, "blockwise": ranking_loss}
