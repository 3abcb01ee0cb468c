"""What a run would do and need, before a job of many GPUs is submitted."""

from functools import partial

import torch

from hpm_video.runs.autotune import trial_update
from hpm_video.runs.data import describe_training
from hpm_video.runs.task import Task
from hpm_video.training.deepspeed_settings import sharding_of
from hpm_video.training.device import Precision
from hpm_video.training.memory import (
    ActivationBytes,
    Sharding,
    describe_memory,
    simulate_update,
    training_memory,
)

SIMULATED = (8, 16)
"""Files of the two updates through which the line of activations is drawn."""


def describe_run(task: Task, processes: int) -> str:
    """Describe a run in so many processes. The weights to start from may be missing."""
    task.resolve()
    config = task.config
    with torch.device("meta"):
        parameters = [*task.model().parameters()]
    count = sum(p.numel() for p in parameters)
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    ema = 0 if task.ema is None else count
    plans = [task.plan(processes)]
    if config.engine.micro_batch is None:  # any that is possible
        plans = [task.plan(processes, size) for size in task.micro_batches(processes)]
    precision: Precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    sharding, clip_grad = Sharding(processes, None), config.recipe.clip_grad
    if config.engine.name == "deepspeed":
        sharding = sharding_of(config.engine, plans[-1], clip_grad=clip_grad, precision=precision)
    memory = training_memory(learning, ema + count - learning, sharding)
    activations = _activations(task, precision)
    follows = f", and {ema / 1e6:.1f} M more that follow them" if ema else ""
    model = f"{count / 1e6:.1f} M parameters{follows}; activations in {precision}"
    lines = [
        *describe_training(config, task.data, plans[-1], model),
        "",
        describe_memory(memory, activations.of(plans[-1].micro_batch)),
        "",
        "engine.micro_batch   passes per update   GB on the device",
    ]
    for plan in plans:
        needed = (memory.device.total + activations.of(plan.micro_batch)) / 1e9
        lines.append(f"{plan.micro_batch:18}{plan.accumulate:20}{needed:19.1f}")
    if config.engine.micro_batch is None:
        lines.append("a run on GPUs finds the largest of these that fits")
    return "\n".join(lines)


def _activations(task: Task, precision: Precision) -> ActivationBytes:
    """Return what a file of the source that needs most keeps."""
    update = partial(trial_update, task, torch.device("cpu"), precision)
    found = []
    for source, data in task.config.sources.items():
        simulated = {
            files: simulate_update(partial(update, files * data.repeats, source=source))
            for files in SIMULATED
        }
        found.append(ActivationBytes.through(simulated))
    return max(found, key=lambda one: one.per_clip)
