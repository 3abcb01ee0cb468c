"""The one sequence around ``fit``: from a task to a run that is trained to its end."""

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.checks import ConfigError
from hpm_video.config.schema import RunConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import clip_batches, end_workers
from hpm_video.data.mixture import Places, deal_out
from hpm_video.files.failures import BadFiles
from hpm_video.recognition.inference import Reading
from hpm_video.runs.autotune import choose_plan, plan_for, precision_of
from hpm_video.runs.data import RunData, describe_data, training_clips
from hpm_video.runs.directory import RunDirectory, check_same_run, claim, locked
from hpm_video.runs.engines import make_engine
from hpm_video.runs.task import Session, Task, make_models
from hpm_video.training.checkpoint import read_optimizer, read_state
from hpm_video.training.curves import plot_curves
from hpm_video.training.device import choose_device
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import Engine
from hpm_video.training.loop import fit
from hpm_video.training.metrics import Meter, MetricsLog, WaitingWarning
from hpm_video.training.objective import Objective
from hpm_video.training.provenance import bit_differences, gather_facts, record_start
from hpm_video.training.run import Evaluation, Run
from hpm_video.training.schedules import schedule_of
from hpm_video.training.stop import listen_for_stop
from hpm_video.workers.progress_bar import ProgressBar

log = logging.getLogger(__name__)


def run(task: Task, processes: Processes = Processes()) -> Path:  # noqa: B008 - it is frozen
    """Train a task, or resume the run in its output directory. -> that directory

    Whatever can be wrong is found before the directory is written to.

    Raises:
        ConfigError: the config cannot be run, or the directory holds a run of another one.
        ManifestError: the data cannot be read.
        CheckpointError: weights cannot be read, or do not fit.
        DeviceError, EngineError: the engine cannot be had.
        And what ``fit`` raises.
    """
    updates = task.data.timeline.num_updates
    with locked(task.config, processes):
        directory = RunDirectory.at(Path(task.config.output_dir).expanduser())
        task.resolve(directory)
        session = open_session(task, directory, processes)
        notes = task.notes(directory)
        is_complete = directory.update == updates
        if not is_complete:
            model, ema = make_models(task, session.device, directory.newest)
            precision = precision_of(task, session)
            plan = choose_plan(task, session, precision)
            engine = make_engine(task, session, plan, precision, model)
            if ema is not None:
                engine.shard(ema)
            objective = task.objective(ema, session.device, engine)
            evaluation = task.evaluation(session, objective, engine)
        if processes.is_first:
            claim(directory, task.config, notes)
        processes.wait()
        if is_complete:
            log.info("%s is complete: %d updates were made", directory.path, directory.update)
        else:
            train(task, session, plan, engine=engine, objective=objective, evaluation=evaluation)
        if processes.is_first:
            plot_curves(directory.path / "metrics.jsonl", directory.path / "curves.png")
    return directory.path


def open_session(task: Task, directory: RunDirectory, processes: Processes) -> Session:
    """Choose the device, and make sure that a run in the directory can go on here."""
    config = task.config
    plan_for(config, processes.count)
    device = choose_device(config.engine.device, processes.count)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    check_same_run(directory, config, task.data)
    seen = processes.gather([directory])
    if any(each != seen[0] for each in seen):
        names = sorted({str(each.newest and each.newest.name) for each in seen})
        raise ConfigError(
            f"the processes do not see the same in {directory.path} (newest checkpoints: "
            f"{', '.join(names)}); output_dir must be a folder that all machines share"
        )
    return Session(processes, device, directory)


def train(
    task: Task,
    session: Session,
    plan: BatchPlan,
    *,
    engine: Engine,
    objective: Objective,
    evaluation: Evaluation,
) -> None:
    """Train from where the directory stands to the end. Raises what ``fit`` raises."""
    config, data = task.config, task.data
    directory, processes = session.directory, session.processes
    start, newest, is_first = directory.update, directory.newest, processes.is_first
    facts = gather_facts(engine.device, engine.precision, engine.name, plan)
    size, device = f"{engine.num_parameters / 1e6:.1f} M parameters", engine.device.type
    on_device = f"{size} on {device} in {engine.precision}, by {engine.name}"
    for line in [*describe_data(config, data), on_device, *describe_plan(config, data, plan)]:
        log.info(line)
    if start:
        log.info("going on at update %d of %d", start, data.timeline.num_updates)
    if newest is not None:
        engine.load_optimizer_state(read_optimizer(newest, config.model.patch_size))
        for difference in bit_differences(read_state(newest, of_run=True)["facts"], facts):
            log.warning("the last bits may differ from an unbroken run's: %s", difference)
    if is_first:
        record_start(directory.path, facts, start)
    clips = training_clips(config, data, task.transforms(), same_frames=task.same_frames)
    bad_files = _bad_files(task, directory, clips, writes=is_first)
    updates = data.timeline.num_updates
    try:
        with (
            listen_for_stop(patient=processes.count > 1) as stop,
            closing(ProgressBar(updates, "updates", first=start, silent=not is_first)) as bar,
            closing(
                MetricsLog(directory.path, config.logging, first_update=start, writes=is_first)
            ) as metrics,
            closing(_training_stream(task, session, plan, clips, start)) as batches,
        ):
            state = Run(
                directory.path,
                data.timeline,
                config.logging,
                config.checkpoint,
                engine,
                objective.auxiliary_modules,
                facts,
                Meter(engine.device, processes),
                metrics,
                bar,
                bad_files,
                stop,
                evaluation,
                WaitingWarning(directory.path / "config.yaml"),
                best={} if newest is None else read_state(newest, of_run=True)["best"],
                data=data.fingerprint,
            )
            fit(engine, objective, batches, schedule_of(config.recipe), state, start=start)
    finally:
        end_workers()


def _bad_files(
    task: Task, directory: RunDirectory, clips: Sequence[VideoClips], *, writes: bool
) -> dict[str, BadFiles]:
    """Open the lists of bad files of each source: those that failed before are not tried again."""
    found = {}
    for (name, source), stream in zip(task.data.sources.items(), clips, strict=True):
        found[name] = BadFiles(
            directory.path / (f"bad_files_{name}.csv" if name else "bad_files.csv"),
            num_files=len(source.train),
            max_bad_share=task.config.data.max_bad_share,
            writes=writes,
        )
        found[name].check()
        stream.bad |= found[name].failures
    return found


def _training_stream(
    task: Task, session: Session, plan: BatchPlan, clips: Sequence[VideoClips], start: int
) -> Generator[ClipBatch, None, None]:
    """This process's micro-batches from update ``start`` to the last."""
    config = task.config
    rank, sources = session.processes.rank, deal_out(config.weights, task.data.timeline.num_updates)
    places = Places(sources, plan.batch_size, start, rank=rank, processes=plan.processes)
    reading = Reading.of(config.data)
    return clip_batches(
        clips,
        places,
        batch_size=plan.micro_batch,
        workers=reading.workers,
        limits=reading.limits,
        pin=session.device.type == "cuda",
    )


def describe_plan(config: RunConfig, data: RunData, plan: BatchPlan) -> list[str]:
    """How the batch is spread, how many updates there are, and how fast they learn."""
    timeline, recipe = data.timeline, config.recipe
    updates = timeline.num_updates
    return [
        f"{plan.batch_size} files per update = {plan.micro_batch} per forward pass x "
        f"{_plural(plan.accumulate, 'pass')} x {_plural(plan.processes, 'process')}",
        f"{recipe.epochs} epochs = {updates} updates, {updates / recipe.epochs:.4g} per epoch; "
        f"peak learning rate {schedule_of(config.recipe).peak:.2e}",
    ]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'es' * (count != 1)}"
