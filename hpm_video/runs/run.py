"""The one sequence around ``fit``: from a task to a run that is trained to its end."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.checks import ConfigError
from hpm_video.data.clips import VideoClips
from hpm_video.data.loader import clip_batches, end_workers
from hpm_video.data.mixture import Places, deal_out
from hpm_video.files.failures import BadFiles
from hpm_video.files.wording import counted
from hpm_video.recognition.inference import Reading
from hpm_video.runs.autotune import choose_plan, precision_of
from hpm_video.runs.cost import cost_of_clips
from hpm_video.runs.data import describe_training
from hpm_video.runs.directory import RunDirectory, check_same_run, claim, locked
from hpm_video.runs.report import write_report
from hpm_video.runs.task import Task, make_engine, make_models
from hpm_video.training.checkpoint import read_optimizer
from hpm_video.training.curves import plot_curves
from hpm_video.training.device import choose_device, peak_flops
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import Engine
from hpm_video.training.fast import make_fast
from hpm_video.training.loop import fit
from hpm_video.training.metrics import Meter
from hpm_video.training.objective import Objective
from hpm_video.training.optim import schedule_of
from hpm_video.training.provenance import gather_facts, record_start
from hpm_video.training.run import Evaluation, Run
from hpm_video.training.stop import listen_for_stop
from hpm_video.training.trackers import check_trackers

log = logging.getLogger(__name__)


def run(task: Task, processes: Processes = Processes()) -> Path:  # noqa: B008 - it is frozen
    """Train a task, or resume the run in its output directory. -> that directory

    Raises an ExpectedError for what is wrong, before the directory is written to, or as ``fit``.
    """
    updates = task.data.timeline.num_updates
    check_trackers(task.config.logging)
    with locked(task.config, processes) as directory:
        task.resolve(directory)
        clips = task.training_clips()
        device = choose_device_of(task, directory, processes)
        notes = task.notes(directory)
        is_complete = directory.update == updates
        if not is_complete:
            model, ema = make_models(task, device, directory.newest)
            precision = precision_of(task, directory, device, processes)
            plan = choose_plan(task, device, processes, precision)
            engine = make_engine(task, model, ema, plan, precision, device, processes)
            objective = task.objective(ema, device, engine)
            make_fast(engine.compiled, objective)
            evaluation = task.evaluation(directory.path, objective, engine)
        if processes.is_first:
            claim(directory, task.config, notes)
        processes.wait()
        if is_complete:
            log.info("%s is complete, with %s", directory.path, counted(updates, "update"))
        else:
            train(task, clips, directory, plan, engine, objective, evaluation)
        if processes.is_first:
            plot_curves(directory.path / "metrics.jsonl", directory.path / "curves.png")
            write_report(directory.path)
    return directory.path


def choose_device_of(task: Task, directory: RunDirectory, processes: Processes) -> torch.device:
    """Choose the device, and make sure that a run in the directory can go on here."""
    config = task.config
    config.plan(processes.count)
    device = choose_device(config.engine.device, processes.count)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    check_same_run(directory, config, task.data)
    seen = processes.gather([directory])
    if any(each != seen[0] for each in seen):
        names = sorted({str(each.newest and each.newest.name) for each in seen})
        raise ConfigError(
            f"the processes see different files in {directory.path} (newest checkpoints: "
            f"{', '.join(names)}); output_dir must be a folder that all machines share"
        )
    return device


def train(
    task: Task,
    clips: Sequence[VideoClips],
    directory: RunDirectory,
    plan: BatchPlan,
    engine: Engine,
    objective: Objective,
    evaluation: Evaluation,
) -> None:
    """Train from where the directory stands to the end."""
    config, data, processes = task.config, task.data, engine.processes
    start, updates = directory.update, data.timeline.num_updates
    best = directory.state.get("best", {})
    size = f"{engine.num_parameters / 1e6:.1f} M parameters"
    model = f"{size} on {engine.device.type} in {engine.precision}, by {engine.name}"
    log.info("\n".join(describe_training(config, data, plan, model)))
    facts = gather_facts(engine.device, engine.precision, engine.name, plan)
    if start:
        log.info("resuming at update %d of %d", start, updates)
    if directory.newest is not None:
        engine.load_optimizer_state(read_optimizer(directory.newest, config.model.patch_size))
    if processes.is_first:
        record_start(directory.path, facts, start, directory.state.get("facts", {}))
    bad_files = open_bad_files(task, clips, directory, writes=processes.is_first)
    order, reading = deal_out(config.weights, updates), Reading.of(config.data)
    places = Places(order, plan.batch_size, start, rank=processes.rank, processes=plan.processes)
    try:
        batches = clip_batches(
            clips,
            places,
            batch_size=plan.micro_batch,
            workers=reading.workers,
            limits=reading.limits,
            gpu=engine.device if engine.device.type == "cuda" else None,
        )
        with listen_for_stop(patient=plan.processes > 1) as stop, closing(batches):
            state = Run(
                directory.path,
                data.timeline,
                config.logging,
                config.checkpoint,
                engine,
                objective.auxiliary_modules,
                evaluation,
                bad_files,
                stop,
                open_meter(task, engine),
                {"update": start, "best": best, "facts": facts, "data": data.fingerprint},
            )
            with closing(state):
                state.measure_beginning()
                fit(engine, objective, batches, schedule_of(config.recipe), state, start=start)
    finally:
        end_workers()


def open_bad_files(
    task: Task, clips: Sequence[VideoClips], directory: RunDirectory, *, writes: bool
) -> dict[str, BadFiles]:
    """Open the list of each source, and tell its clips not to try those files again."""
    bad_files = {}
    for stream, (name, source) in zip(clips, task.data.sources.items(), strict=True):
        bad_files[name] = BadFiles(
            directory.path / (f"bad_files_{name}.csv" if name else "bad_files.csv"),
            num_files=source.train.num_files,
            max_bad_share=task.config.data.max_bad_share,
            writes=writes,
        )
        bad_files[name].check()
        stream.bad |= bad_files[name].failures
    return bad_files


def open_meter(task: Task, engine: Engine) -> Meter:
    """Open a meter that on a GPU knows what a clip costs, and how fast the device could be."""
    device, processes, timeline = engine.device, engine.processes, task.data.timeline
    if device.type != "cuda":
        return Meter(device, processes)
    clip_cost = cost_of_clips(task.config)
    peak, source = peak_flops(device, engine.precision)
    log.info("100 %% MFU is %.0f TFLOP/s (%s, by %s)", peak / 1e12, engine.precision, source)

    def cost(name: str, update: int) -> float:
        return clip_cost(name, timeline.at(update))

    return Meter(device, processes, cost=cost, peak=peak)
