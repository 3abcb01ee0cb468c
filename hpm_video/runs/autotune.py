"""The precision and the micro-batch that suit a device, by trial, and what a run would need."""

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.checks import ConfigError
from hpm_video.config.training import CompileMode
from hpm_video.data.batch import ClipBatch
from hpm_video.runs.data import describe_training, planned_data
from hpm_video.runs.directory import RunDirectory
from hpm_video.runs.task import Task
from hpm_video.training.deepspeed_engine import settings_of
from hpm_video.training.device import Precision, choose_precision
from hpm_video.training.distributed import Processes
from hpm_video.training.ema import make_ema
from hpm_video.training.engine import TorchEngine
from hpm_video.training.fast import make_fast
from hpm_video.training.memory import (
    activation_bytes,
    describe_memory,
    simulate_update,
    training_memory,
)
from hpm_video.training.objective import Losses, Objective
from hpm_video.training.progress import Progress
from hpm_video.training.trackers import check_trackers

TIMED_CLIPS = 8
"""At most so many clips make the updates that are timed to choose a precision."""
SIMULATED = (8, 16)
"""Files per update in the two updates from which a dry run extrapolates the activations."""
GPU_SHARE = 0.9
"""Share of a GPU's memory for the updates by which their size is found; the rest is for what comes
between them, and for what the processes exchange."""


@dataclass(frozen=True)
class Trial:
    """A complete update on random clips by one process, to time it and to see its memory."""

    engine: TorchEngine
    objective: Objective
    batch: ClipBatch
    progress: Progress

    def __call__(self) -> Losses:
        for group in self.engine.param_groups:
            group["lr"] = 1e-6
        with self.engine.autocast():
            losses = self.objective.losses(self.engine, self.batch, self.progress)
        self.engine.backward(losses.total)
        self.engine.step()
        self.objective.after_update(self.engine.model, self.progress)
        return losses


def trial_update(
    task: Task,
    device: torch.device,
    precision: Precision,
    clips: int,
    *,
    source: str = "",
    accumulate: int = 1,
    compiled: CompileMode = "off",
) -> Trial:
    """Return an update to try, or one of its ``accumulate`` passes, of a resolved ``task``."""
    config = task.config
    with device if device.type == "cuda" else nullcontext():  # it draws weights much faster
        model = task.model()
    ema = None if task.ema is None else make_ema(model).to(device)
    model = model.to(device)
    make_fast(compiled, model, ema, residual=config.engine.residual)
    engine = TorchEngine(
        model,
        task.optimizer(model),
        device=device,
        accumulate=accumulate,
        clip_grad=config.recipe.clip_grad,
        precision=precision,
    )
    objective = task.objective(ema, device, engine)
    make_fast(compiled, objective)
    clips += -clips % task.config.multiple
    data = config.sources[source]
    batch = ClipBatch(
        torch.randint(256, (clips, data.channels, *data.clip_size), dtype=torch.uint8),
        keys=torch.arange(clips),
        labels=torch.zeros(clips, dtype=torch.int64),
        files=("random pixels",) * clips,
        failures=(),
        source=source,
    ).to(device)
    return Trial(engine, objective, batch, last_epoch(task))


def last_epoch(task: Task) -> Progress:
    """Return a moment at which a teacher scores if it ever does."""
    epochs = task.config.recipe.epochs
    return Progress(1, epochs - 0.5, epochs)


def choose_plan(
    task: Task, device: torch.device, processes: Processes, precision: Precision
) -> BatchPlan:
    """Plan an update as the config says, or on a GPU by trial: all take what fits everywhere."""
    if task.config.engine.micro_batch is not None or device.type != "cuda":
        return task.config.plan(processes.count)
    torch.cuda.set_per_process_memory_fraction(GPU_SHARE, device)
    sizes = task.config.micro_batches(processes.count)
    try:
        largest = find_micro_batch(task, device, precision, sizes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.reset_accumulated_memory_stats(device)
    return task.config.plan(processes.count, min(processes.gather([largest])))


def find_micro_batch(
    task: Task, device: torch.device, precision: Precision, sizes: Sequence[int]
) -> int:
    """Find the largest of ascending ``sizes`` of which updates of every source fit the device."""

    def two_updates(size: int) -> None:
        for source, data in task.config.sources.items():
            forward_pass = trial_update(
                task, device, precision, size * data.repeats, source=source, accumulate=2
            )
            for _ in range(4):  # of which the last has gradients and moments beside it
                forward_pass()

    return largest_fitting(sizes, two_updates)


def largest_fitting(sizes: Sequence[int], run_once: Callable[[int], None]) -> int:
    """Find by bisection the largest of ascending ``sizes`` that the device has the memory to run.

    Raises a ConfigError if not even the smallest fits.
    """

    def fits(size: int) -> bool:
        found = False
        with suppress(torch.OutOfMemoryError):
            run_once(size)
            found = True
        gc.collect()  # only here: before, the traceback holds the tensors of the run
        torch.cuda.empty_cache()
        return found

    if not fits(sizes[0]):
        raise ConfigError(
            f"engine.micro_batch={sizes[0]} does not fit on the device, and is the smallest; "
            f"take model.checkpoint_activations=true, smaller clips, or more processes"
        )
    return sizes[bisect_left(sizes, 1, lo=1, key=lambda size: int(not fits(size))) - 1]


def precision_of(
    task: Task, directory: RunDirectory, device: torch.device, processes: Processes
) -> Precision:
    """Return the precision of the config, else of the run so far, else the faster one here."""
    config = task.config
    if config.engine.precision != "auto":
        return config.engine.precision
    if directory.newest is not None:
        known: Precision = directory.state["facts"]["precision"]
        return known
    clips = min(config.recipe.batch_size // processes.count * config.data.repeats, TIMED_CLIPS)
    return processes.of_first(
        lambda: choose_precision(device, lambda name: trial_update(task, device, name, clips))
    )


def describe_run(
    task: Task, processes: int, files: int | None = None, clips_per_second: float | None = None
) -> str:
    """Describe a run in so many processes; ``clips_per_second`` is that of all together.

    ``files``: so many are trained on, whether or not the lists are there.
    """
    check_trackers(task.config.logging)
    if files is not None:
        task.data = planned_data(task.config, files)
    task.resolve()
    config, engine = task.config, task.config.engine
    with torch.device("meta"):
        parameters = [*task.model().parameters()]
    count = sum(p.numel() for p in parameters)
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    ema = 0 if task.ema is None else count
    plans = [config.plan(processes, size) for size in config.micro_batches(processes)]
    precision: Precision = "fp32" if engine.precision == "fp32" else "bf16"
    zero, clip_grad = None, config.recipe.clip_grad
    if engine.name == "deepspeed":
        settings = settings_of(engine, plans[-1], clip_grad=clip_grad, precision=precision)
        zero = settings["zero_optimization"]
    memory = training_memory(learning, ema + count - learning, processes, zero)
    per_file, fixed = _activations(task, precision)
    of_ema = f", and {ema / 1e6:.1f} M more of the {task.ema}" if ema else ""
    model = f"{count / 1e6:.1f} M parameters{of_ema}; activations in {precision}"
    lines = describe_training(config, task.data, plans[-1], model)
    device = "a GPU" if engine.device == "auto" else engine.device
    lines.append(f"planned for {device} in each process, whatever this machine has")
    if clips_per_second is not None:
        shares = zip(config.weights, config.sources.values(), strict=True)
        of_file = sum(share * source.repeats for share, source in shares) / sum(config.weights)
        clips = task.data.timeline.num_updates * config.recipe.batch_size * of_file
        hours = clips / clips_per_second / 3600
        lines.append(f"{clips:,.0f} clips at {clips_per_second:g} per second: {hours:.3g} hours")
    lines += ["", describe_memory(memory, fixed + per_file * plans[-1].micro_batch), ""]
    lines.append("engine.micro_batch   passes per update   GB on the device")
    for plan in plans:
        needed = (sum(memory.device.values()) + fixed + per_file * plan.micro_batch) / 1e9
        lines.append(f"{plan.micro_batch:18}{plan.accumulate:20}{needed:19.1f}")
    return "\n".join(lines)


def _activations(task: Task, precision: Precision) -> tuple[float, float]:
    """Return the activations of the source that needs most per file: per file, and besides."""
    update = partial(trial_update, task, torch.device("cpu"), precision)
    found = []
    for source, data in task.config.sources.items():
        made = {n: partial(update, n * data.repeats, source=source) for n in SIMULATED}
        found.append(activation_bytes({n: simulate_update(each) for n, each in made.items()}))
    return max(found)
