"""The engine that a config asks for. A further one has a file of its own, and an entry here."""

from typing import Any

from torch import nn

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.schema import RunConfig
from hpm_video.runs.task import Session, Task
from hpm_video.training.deepspeed_engine import DeepSpeedEngine
from hpm_video.training.deepspeed_settings import buckets_of, settings_of
from hpm_video.training.device import Precision
from hpm_video.training.engine import Engine, TorchEngine
from hpm_video.training.memory import Sharding


def make_engine(
    task: Task, session: Session, plan: BatchPlan, precision: Precision, model: nn.Module
) -> Engine:
    """The engine that updates ``model``, which is on the device of the session."""
    how, optimizer = task.config.engine, task.optimizer(model)
    common: dict[str, Any] = {
        "device": session.device,
        "clip_grad": task.config.recipe.clip_grad,
        "precision": precision,
        "processes": session.processes,
    }
    if how.name == "deepspeed":
        return DeepSpeedEngine(model, optimizer, how, plan, **common)
    return TorchEngine(model, optimizer, accumulate=plan.accumulate, **common)


def sharding_of(config: RunConfig, plan: BatchPlan, precision: Precision) -> Sharding:
    """How that engine spreads what it keeps in memory."""
    how = config.engine
    if how.name == "torch":
        return Sharding(plan.processes, None)
    settings = settings_of(how, plan, clip_grad=config.recipe.clip_grad, precision=precision)
    return Sharding(
        plan.processes,
        how.stage,
        offload_optimizer=how.offload != "none",
        offload_parameters=how.offload == "all",
        buckets=buckets_of(settings),
    )
