"""The training loop: the only one, whatever is trained and wherever."""

from collections.abc import Iterator

from hpm_video.data.batch import ClipBatch
from hpm_video.training.engine import Engine
from hpm_video.training.objective import Objective
from hpm_video.training.optim import Schedule
from hpm_video.training.run import Run


def fit(
    engine: Engine,
    objective: Objective,
    batches: Iterator[ClipBatch],
    schedule: Schedule,
    run: Run,
    *,
    start: int,
) -> None:
    """Train from update ``start`` to the end of the run's timeline.

    ``batches`` yields the micro-batches of those updates in order. A group of parameters with an
    ``lr_scale`` gets that share of the learning rate.

    Raises:
        NonFiniteLossError: a loss is not a number.
        TooManyBadFiles: more files do not decode than the data allows.
        CheckpointError: the state cannot be saved.
        Interrupted: the run was asked to stop, and its state is saved.
    """
    for update in range(start, run.timeline.num_updates):
        progress = run.timeline.at(update)
        lr = schedule.at(progress)
        for group in engine.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for _ in range(engine.accumulate):
            with run.meter.waiting():
                batch = next(batches)
            run.note_failures(batch)
            batch = batch.to(engine.device)
            with engine.autocast():
                losses = objective.losses(engine, batch, progress)
            engine.backward(losses.total)
            engine.step()
            run.meter.add(update, losses, batch.files, batch.source)
        run.meter.add_update(update, engine.gradient_norm)
        objective.after_update(engine.model, progress)
        run.after_update(progress, {"lr": lr, **objective.settings(progress)})
