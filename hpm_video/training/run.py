"""The state of a run, and what is logged, measured, drawn and saved when."""

import logging
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hpm_video.config.training import CheckpointConfig, LoggingConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.files.failures import BadFiles, Failure
from hpm_video.training.checkpoint import (
    checkpoint_path,
    point_to_newest_and_best,
    remove_superseded,
    save_checkpoint,
)
from hpm_video.training.curves import plot_curves
from hpm_video.training.engine import Engine
from hpm_video.training.metrics import Meter, MetricsLog, WaitingWarning
from hpm_video.training.progress import Progress, Timeline
from hpm_video.training.stop import Interrupted, StopRequest
from hpm_video.workers.progress_bar import ProgressBar

log = logging.getLogger(__name__)
ATTACHED = ("config.yaml", "labels.txt")
"""Files of the run directory of which each checkpoint holds a copy, so that it stands alone."""


@dataclass(frozen=True)
class Evaluation:
    """What a run measures and draws at intervals."""

    validate: Callable[[], dict[str, float]] | None = None
    """Returns the validation measures."""
    score: str = ""
    """The measure that decides the best checkpoint."""
    more_is_better: bool = False
    describe: Callable[[dict[str, float]], str] = str
    draw: Callable[[int], None] | None = None
    """Draws pictures after so many updates."""
    probe: Callable[[], dict[str, float]] | None = None
    """Returns how well frozen features serve a task."""
    probe_every_epochs: float = math.inf


@dataclass
class Run:
    """The state of a run that is not the model's."""

    folder: Path
    timeline: Timeline
    logging: LoggingConfig
    saving: CheckpointConfig
    engine: Engine
    auxiliary_modules: dict[str, nn.Module]
    """What checkpoints hold beside the model, by name."""
    facts: dict[str, Any]
    """What the run runs with, stored with every checkpoint."""
    meter: Meter
    metrics: MetricsLog
    bar: ProgressBar
    bad_files: Mapping[str, BadFiles]
    """Bad files by the name of their source."""
    stop: StopRequest
    evaluation: Evaluation
    waiting: WaitingWarning
    data: str
    """What the order of the data depends on, stored with every checkpoint."""
    best: dict[str, Any] = field(default_factory=dict)
    """Update and score of the best checkpoint so far."""
    _failures: list[tuple[str, Failure]] = field(default_factory=list)
    _answer: Callable[[], int] = int

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def after_update(self, progress: Progress, settings: dict[str, float]) -> None:
        """Log, measure, draw, save and stop, where it is time to.

        All processes do the same at the same time; the first one writes.

        Raises:
            NonFiniteLossError, TooManyBadFiles, CheckpointError, Interrupted: see ``fit``.
        """
        update, done = progress.update, progress.update + 1
        last = done == self.timeline.num_updates
        self.bar.count()
        if done % self.logging.every_updates == 0 or last:
            self._share_failures()
            values = self.meter.read() | settings
            self.metrics.write("train", done, self.timeline.at(done).exact_epoch, values)
            self.bar.show(
                f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, "
                f"{values['clips_per_second']:.0f} clips/s, waiting {values['data_wait']:.0%}",
                at_once=last,
            )
            self.waiting.look(values["data_wait"])
        with self.meter.paused():
            keep = self._due(update, self.saving.keep_every_epochs)
            improved = False
            if last or self._due(update, self.logging.validate_every_epochs):
                improved = self._validate(done)
            if self.evaluation.probe and (
                last or self._due(update, self.evaluation.probe_every_epochs)
            ):
                self._probe(done, self.evaluation.probe)
            stop = self._asked_to_stop()
            if last or keep or improved or stop or done % self.saving.every_updates == 0:
                self.save(done, keep=keep)
            if last or self._due(update, self.logging.picture_every_epochs):
                self._draw(done, last=last)
        if stop and not last:
            raise Interrupted(stop, done)

    def save(self, done: int, *, keep: bool = False) -> None:
        """Save the state after ``done`` updates.

        Raises:
            NonFiniteLossError: a loss since the last look at them was not a number: nothing is
                saved.
            CheckpointError: it cannot be written.
        """
        self.meter.check()
        self._share_failures()
        processes = self.engine.processes
        modules = {"model": self.engine.model, **self.auxiliary_modules}
        weights = {name: self.engine.weights(module) for name, module in modules.items()}
        optimizer = self.engine.optimizer_state()
        if processes.is_first:
            state = {"update": done, "keep": keep, "best": self.best, "facts": self.facts}
            save_checkpoint(
                checkpoint_path(self.checkpoints, done),
                weights,
                optimizer=optimizer,
                state={**state, "data": self.data},
                attached=[path for path in map(self.folder.joinpath, ATTACHED) if path.exists()],
            )
            self.metrics.flush()
            point_to_newest_and_best(self.checkpoints)
            best = checkpoint_path(self.checkpoints, self.best.get("update", done))
            remove_superseded(self.checkpoints, self.saving.keep_last, [best])
        processes.wait()

    def note_failures(self, batch: ClipBatch) -> None:
        """Remember the files of a batch that did not decode."""
        self._failures += [(batch.source, failure) for failure in batch.failures]
        if self.engine.processes.count == 1 and batch.failures:
            self._share_failures()

    def _share_failures(self) -> None:
        """Record what failed in any process."""
        found = self.engine.processes.gather(self._failures)
        self._failures = []
        for name, files in self.bad_files.items():
            files.note([failure for source, failure in found if source == name])

    def _asked_to_stop(self) -> signal.Signals | None:
        """Whether any process was, as all of them know in the same update.

        Several processes look at what was asked in the update before, so that nobody waits.
        """
        answer = self.engine.processes.ask(self.stop.received or 0)
        if self.engine.processes.count > 1:
            answer, self._answer = self._answer, answer
        asked = answer()
        return signal.Signals(asked) if asked else None

    def _due(self, update: int, every_epochs: float | None) -> bool:
        return every_epochs is not None and self.timeline.passes(update, every_epochs)

    def _probe(self, done: int, probe: Callable[[], dict[str, float]]) -> None:
        self.meter.check()
        measures = probe()
        epoch = self.timeline.at(done).exact_epoch
        self.metrics.write("probe", done, epoch, measures)
        text = ", ".join(f"{name} {value:.3f}" for name, value in measures.items())
        log.info("epoch %.1f, frozen features: %s", epoch, text)

    def _draw(self, done: int, *, last: bool) -> None:
        if self.evaluation.draw:
            self.evaluation.draw(done)
        if self.engine.processes.is_first and not last:  # at the end: once it is complete
            plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        self.engine.processes.wait()

    def _validate(self, done: int) -> bool:
        """Measure validation clips. -> whether this is the best so far"""
        if self.evaluation.validate is None:
            return False
        self.meter.check()
        measures = self.evaluation.validate()
        epoch = self.timeline.at(done).exact_epoch
        self.metrics.write("held_out", done, epoch, measures)
        log.info("epoch %.1f, %s", epoch, self.evaluation.describe(measures))
        score = measures[self.evaluation.score]
        sign = -1 if self.evaluation.more_is_better else 1
        improved = not self.best or sign * score < sign * self.best["score"]
        if improved:
            self.best = {"update": done, "score": score, "measure": self.evaluation.score}
        return improved
