"""What a run would do and need, told without doing it: before a job of many GPUs is submitted."""

from functools import partial

import torch
from torch import nn

from hpm_video.config.batch_plan import BatchPlan, micro_batches
from hpm_video.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.runs.finetuning import find_label_names, multiple_of, resolve
from hpm_video.runs.finetuning import make_update as make_classifier_update
from hpm_video.runs.pretraining import make_update as make_pretraining_update
from hpm_video.runs.run import (
    MakeUpdate,
    RunData,
    deepspeed_choice,
    describe_data,
    describe_plan,
    open_data,
    plan_for,
)
from hpm_video.training.deepspeed_settings import buckets_of, settings_of
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


def plan_pretraining(config: PretrainConfig, processes: int) -> str:
    """What ``pretrain`` would do in so many processes.

    Raises:
        ConfigError, ManifestError, EngineError: it could not be run.
    """
    with torch.device("meta"):
        student = build_student(config)
    teacher = _count(student) if config.mining.has_teacher else 0
    update = partial(make_pretraining_update, config)
    return _describe(config, open_data(config), processes, student, teacher, update)


def plan_finetuning(config: FinetuneConfig, processes: int) -> str:
    """What ``finetune`` would do in so many processes. The weights to start from may be missing.

    Raises:
        ConfigError, ManifestError, EngineError: it could not be run.
    """
    data = open_data(config)
    config = resolve(config, len(find_label_names(config, data)))
    assert config.model.num_classes is not None
    with torch.device("meta"):
        model = build_classifier(config, config.model.num_classes)
    average = 0 if config.recipe.average_momentum is None else _count(model)
    update = partial(make_classifier_update, config)
    return _describe(config, data, processes, model, average, update)


def _describe(
    config: RunConfig,
    data: RunData,
    processes: int,
    model: nn.Module,
    follower: int,
    make_update: MakeUpdate,
) -> str:
    """``follower``: parameters of the teacher, or of the average of the weights."""
    plans = _possible_plans(config, processes)
    precision: Precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sharding = _sharding(config, plans[-1], precision)
    still = _count(model) - learning
    memory = training_memory(learning, follower + still, sharding)
    activations = _activations(config, precision, make_update)
    fixed = memory.device.total + activations.fixed
    lines = [
        *describe_data(config, data),
        f"{_count(model) / 1e6:.1f} M parameters{_and_what_follows(follower)}; "
        f"activations in {precision}",
        *describe_plan(config, data, plans[-1]),
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


def _and_what_follows(parameters: int) -> str:
    return f", and {parameters / 1e6:.1f} M more that follow them" if parameters else ""


def _possible_plans(config: RunConfig, processes: int) -> list[BatchPlan]:
    """With the micro-batch of the config, or with any that is possible."""
    multiple = multiple_of(config) if isinstance(config, FinetuneConfig) else 1
    if config.engine.micro_batch is not None:
        return [plan_for(config, processes, multiple=multiple)]
    plan_for(config, processes, multiple=multiple)
    sizes = micro_batches(config.recipe.batch_size, processes, multiple)
    return [plan_for(config, processes, size, multiple) for size in sizes]


def _sharding(config: RunConfig, plan: BatchPlan, precision: Precision) -> Sharding:
    how = config.engine
    if how.name == "torch":
        return Sharding(plan.processes, None)
    settings = settings_of(
        deepspeed_choice(how), plan, clip_grad=config.recipe.clip_grad, precision=precision
    )
    return Sharding(
        plan.processes,
        how.stage,
        offload_optimizer=how.offload != "none",
        offload_parameters=how.offload == "all",
        buckets=buckets_of(settings),
    )


def _activations(
    config: RunConfig, precision: Precision, make_update: MakeUpdate
) -> ActivationBytes:
    """Of a file of the source that needs most."""
    device = torch.device("cpu")
    found = []
    for source, data in config.sources.items():
        simulated = {
            files: simulate_update(
                partial(make_update, device, precision, files * data.repeats, source=source)
            )
            for files in SIMULATED
        }
        found.append(ActivationBytes.through(simulated))
    return max(found, key=lambda one: one.per_clip)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
