"""What a run would do and need, before a job of many GPUs is submitted."""

from functools import partial

import torch
from torch import nn

from hpm_video.config.batch_plan import micro_batches
from hpm_video.runs.autotune import plan_for, trial_update
from hpm_video.runs.data import describe_training
from hpm_video.runs.engines import sharding_of
from hpm_video.runs.task import Task
from hpm_video.training.device import Precision
from hpm_video.training.memory import (
    ActivationBytes,
    describe_memory,
    simulate_update,
    training_memory,
)

SIMULATED = (8, 16)
"""Files of the two updates through which the line of activations is drawn."""


def describe_run(task: Task, processes: int) -> str:
    """Describe a run in so many processes. The weights to start from may be missing."""
    task.resolve()
    config, data = task.config, task.data
    with torch.device("meta"):
        model = task.model()
    ema = 0 if task.ema is None else _count(model)
    plans = [plan_for(config, processes, multiple=task.multiple)]
    if config.engine.micro_batch is None:  # any that is possible
        sizes = micro_batches(config.recipe.batch_size, processes, task.multiple)
        plans = [plan_for(config, processes, size, task.multiple) for size in sizes]
    precision: Precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sharding = sharding_of(config, plans[-1], precision)
    still = _count(model) - learning
    memory = training_memory(learning, ema + still, sharding)
    activations = _activations(task, precision)
    fixed = memory.device.total + activations.fixed
    follows = f", and {ema / 1e6:.1f} M more that follow them" if ema else ""
    size = f"{_count(model) / 1e6:.1f} M parameters{follows}; activations in {precision}"
    lines = [
        *describe_training(config, data, plans[-1], size),
        "",
        describe_memory(memory, activations.of(plans[-1].micro_batch)),
        "",
        "engine.micro_batch   passes per update   GB on the device",
        *(
            f"{plan.micro_batch:18}{plan.accumulate:20}"
            f"{(fixed + activations.per_clip * plan.micro_batch) / 1e9:19.1f}"
            for plan in plans
        ),
    ]
    if config.engine.micro_batch is None:
        lines.append("a run on GPUs finds the largest of these that fits")
    return "\n".join(lines)


def _activations(task: Task, precision: Precision) -> ActivationBytes:
    """Return what a file of the source that needs most keeps."""
    device = torch.device("cpu")
    found = []
    for source, data in task.config.sources.items():
        simulated = {
            files: simulate_update(
                partial(trial_update, task, device, precision, files * data.repeats, source=source)
            )
            for files in SIMULATED
        }
        found.append(ActivationBytes.through(simulated))
    return max(found, key=lambda one: one.per_clip)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
