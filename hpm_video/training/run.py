"""The state of a run, and what is logged, measured, drawn and saved when."""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hpm_video.config.training import CheckpointConfig, LoggingConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.files.failures import BadFiles, Failure
from hpm_video.training.checkpoint import checkpoint_path, remove_superseded, save_checkpoint
from hpm_video.training.curves import plot_curves
from hpm_video.training.engine import Engine
from hpm_video.training.fast import as_written, compile_seconds
from hpm_video.training.metrics import Meter
from hpm_video.training.progress import Progress, Timeline
from hpm_video.training.stop import Interrupted, StopRequest
from hpm_video.training.trackers import MetricsLog
from hpm_video.workers.progress_bar import ProgressBar

log = logging.getLogger(__name__)
Measures = dict[str, float]
Describe = Callable[[Measures], str]
ATTACHED = ("config.yaml", "labels.txt")
"""Files of the run directory of which each checkpoint holds a copy."""


@dataclass(frozen=True)
class Evaluation:
    """What a run measures and draws at intervals."""

    validate: Callable[[], Measures] | None = None
    """Returns the validation measures."""
    score: str = ""
    """The measure that decides the best checkpoint."""
    more_is_better: bool = False
    describe: Describe = str
    draw: Callable[[int], None] | None = None
    """Draws pictures after so many updates."""
    probe: Callable[[], Measures] | None = None
    """Returns how well frozen features serve a task."""
    probe_every_epochs: float = math.inf


@dataclass
class Run:
    """The state of a run beside the model, and what is done between updates."""

    folder: Path
    timeline: Timeline
    logging: LoggingConfig
    saving: CheckpointConfig
    engine: Engine
    auxiliary_modules: dict[str, nn.Module]
    """What checkpoints hold beside the model, by name."""
    evaluation: Evaluation
    bad_files: Mapping[str, BadFiles]
    """Bad files by the name of their source."""
    stop: StopRequest
    meter: Meter
    state: dict[str, Any]
    """``state.json`` of the next checkpoint: the update that the run begins or goes on with, the
    best checkpoint so far (empty: there is none), what the run runs with, and its data."""

    def __post_init__(self) -> None:
        writes, updates = self.engine.processes.is_first, self.timeline.num_updates
        start, trackers = self.state["update"], self.logging.trackers if writes else ()
        self._metrics = MetricsLog(self.folder, trackers, first_update=start)
        self._bar = ProgressBar(updates, "updates", first=start, silent=not writes)
        self._failures: list[tuple[str, Failure]] = []
        self._compiled = compile_seconds()
        self._answer: Callable[[], int] = int

    def close(self) -> None:
        """Close trackers and progress bar."""
        self._metrics.close()
        self._bar.close()

    def measure_beginning(self) -> None:
        """Measure what a run begins with: validation that fails does so before any work."""
        if self.state["update"] == 0 and self.evaluation.validate:
            with self._aside():
                self._measure("validation", 0, self.evaluation.validate, self.evaluation.describe)

    def after_update(self, progress: Progress, settings: dict[str, float]) -> None:
        """Log, measure, draw, save and stop, where it is time to, in all processes alike.

        Raises:
            NonFiniteLossError, TooManyBadFiles, CheckpointError, Interrupted: see ``fit``.
        """
        update, done = progress.update, progress.update + 1
        last, evaluation = done == self.timeline.num_updates, self.evaluation
        how, saving = self.logging, self.saving
        self._bar.count()
        if done % how.every_updates == 0 or last:
            self._write_line(done, settings, last=last)
        with self._aside():
            passes = partial(self.timeline.passes, update)
            keep = passes(saving.keep_every_epochs or math.inf)
            improved = False
            if evaluation.validate and (last or passes(how.validate_every_epochs)):
                found = self._measure("validation", done, evaluation.validate, evaluation.describe)
                improved = self._note_score(done, found[evaluation.score])
            if evaluation.probe and (last or passes(evaluation.probe_every_epochs)):
                self._measure("probe", done, evaluation.probe, _describe_probe)
            stop = self._asked_to_stop()
            # Before the state is saved: a run that is killed meanwhile comes here again.
            if last or passes(how.picture_every_epochs):
                self.draw(done)
            if last or keep or improved or stop or done % saving.every_updates == 0:
                self.save(done, keep=keep)
        if stop and not last:
            raise Interrupted(stop, done)

    def save(self, done: int, *, keep: bool = False) -> None:
        """Save the state after ``done`` updates.

        Raises:
            NonFiniteLossError: a loss was not a number: nothing is saved.
            CheckpointError: it cannot be written.
        """
        self.meter.check()
        self._share_failures()
        modules = {"model": self.engine.model, **self.auxiliary_modules}
        weights = {name: self.engine.weights(module) for name, module in modules.items()}
        optimizer = self.engine.optimizer_state()
        self.state |= {"update": done, "keep": keep}
        if self.engine.processes.is_first:
            folder = self.folder / "checkpoints"
            save_checkpoint(
                checkpoint_path(folder, done),
                weights,
                optimizer=optimizer,
                state=self.state,
                attached=[path for path in map(self.folder.joinpath, ATTACHED) if path.exists()],
            )
            remove_superseded(folder, self.saving.keep_last)
        self.engine.processes.wait()

    def note_failures(self, batch: ClipBatch) -> None:
        """Remember the files of a batch that did not decode."""
        self._failures += [(batch.source, failure) for failure in batch.failures]
        if self.engine.processes.count == 1 and batch.failures:
            self._share_failures()

    def _share_failures(self) -> None:
        found = self.engine.processes.gather(self._failures)
        self._failures = []
        for name, files in self.bad_files.items():
            files.note([failure for source, failure in found if source == name])

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave the time out of the meter, and compile nothing for shapes that are seen rarely."""
        with self.meter.paused(), as_written(self.engine.compiled):
            yield

    def _write_line(self, done: int, settings: dict[str, float], *, last: bool) -> None:
        self._share_failures()
        before, self._compiled = self._compiled, compile_seconds()
        if (seconds := self._compiled - before) > 0:
            self.meter.left_out += seconds
            log.info("compiling took %.1f s", seconds)
        values = self.meter.read() | settings
        self._metrics.write("train", done, self.timeline.at(done).exact_epoch, values)
        shown = (
            f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, "
            f"{values['clips_per_second']:.0f} clips/s, waiting {values['data_wait']:.0%}"
        )
        if "mfu" in values:
            shown += (
                f", {values['tflops_per_gpu']:.0f} TFLOP/s (MFU {values['mfu']:.1%}), "
                f"{values['peak_memory_gb']:.1f} GB"
            )
        self._bar.show(shown, at_once=last)

    def _asked_to_stop(self) -> signal.Signals | None:
        """Whether any process was, as all of them know in the same update.

        Several processes look at what was asked in the update before, so that nobody waits.
        """
        answer = self.engine.processes.ask(self.stop.received or 0)
        if self.engine.processes.count > 1:
            answer, self._answer = self._answer, answer
        asked = answer()
        return signal.Signals(asked) if asked else None

    def _measure(
        self, kind: str, done: int, measure: Callable[[], Measures], describe: Describe
    ) -> Measures:
        self.meter.check()
        measures = measure()
        epoch = self.timeline.at(done).exact_epoch
        self._metrics.write(kind, done, epoch, measures)
        log.info("epoch %.1f, %s", epoch, describe(measures))
        return measures

    def _note_score(self, done: int, score: float) -> bool:
        sign, best = -1 if self.evaluation.more_is_better else 1, self.state["best"]
        improved = not best or sign * score < sign * best["score"]
        if improved:
            self.state["best"] = {"update": done, "score": score, "measure": self.evaluation.score}
        return improved

    def draw(self, done: int) -> None:
        """Draw pictures after ``done`` updates, and the curves."""
        self.meter.check()
        if self.evaluation.draw:
            self.evaluation.draw(done)
        if self.engine.processes.is_first:
            self._metrics.pictures(self.folder / "pictures", done)
            if done < self.timeline.num_updates:  # at the end: once it is complete
                plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        self.engine.processes.wait()


def _describe_probe(measures: Measures) -> str:
    found = (f"{name} {value:.3f}" for name, value in measures.items())
    return f"frozen features: {', '.join(found)}"
