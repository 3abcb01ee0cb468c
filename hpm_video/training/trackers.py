"""Trackers, to which a run writes its metrics, pictures and config."""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from hpm_video.config.checks import ConfigError, check_names
from hpm_video.config.training import LoggingConfig
from hpm_video.files.atomic import written_beside
from hpm_video.files.errors import ExpectedError
from hpm_video.training.metrics import read_lines

log = logging.getLogger(__name__)
PROJECT = "hpm_video"
"""Default name of the project in W&B and of the experiment in MLflow."""


class Tracker(Protocol):
    """Where a run writes its metrics. After an error it gets nothing more.

    An entry of ``TRACKERS`` makes it of the run's directory, which has its config.yaml, and of the
    number of updates made so far: what it holds beyond them comes from an interrupted run.
    """

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Take the values of one line, so that they survive the process."""

    def picture(self, name: str, update: int, path: Path) -> None:
        """Take a picture (PNG)."""

    def close(self) -> None:
        """Write what is not written yet, and end."""


class JsonLines(Tracker):
    """A tracker that writes ``metrics.jsonl``, without the lines of an interrupted run."""

    def __init__(self, run_dir: Path, first_update: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        lines = read_lines(self._path) if first_update else []
        kept = [line for line in lines if line["update"] <= first_update]
        with written_beside(self._path) as beside:
            beside.write_text("".join(f"{json.dumps(line)}\n" for line in kept))

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, "update": update, **values}) + "\n")


class TensorBoard:
    """A tracker that writes the folder ``tensorboard``."""

    def __init__(self, run_dir: Path, first_update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = first_update and first_update + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purged)
        if not first_update:
            config = (run_dir / "config.yaml").read_text(encoding="utf-8")
            self._writer.add_text("config", f"```yaml\n{config}\n```")
        self.close = self._writer.close

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, update)
        self._writer.flush()

    def picture(self, name: str, update: int, path: Path) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, update, dataformats="HWC")


class WeightsAndBiases:
    """A tracker for W&B. Its own environment variables choose server, project and mode."""

    def __init__(self, run_dir: Path, first_update: int) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            id=_remembered(run_dir / "wandb.id", first_update, lambda: uuid.uuid4().hex),
            resume="allow",
            dir=str(run_dir),
            config=yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")),
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="update")
        self.close = self._run.finish

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({"update": update, **named})

    def picture(self, name: str, update: int, path: Path) -> None:
        self._run.log({"update": update, name: self._image(str(path))})


class Mlflow:
    """A tracker for MLflow. Its own environment variables choose server and experiment."""

    def __init__(self, run_dir: Path, first_update: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client: Any = MlflowClient()
        self._metric = Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)

        def start() -> str:
            return str(self._client.create_run(experiment, run_name=run_dir.name).info.run_id)

        self._id = _remembered(run_dir / "mlflow.id", first_update, start)
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_artifact(self._id, str(run_dir / "config.yaml"))

    def write(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        pairs = [(f"{kind}/{name}", value) for name, value in values.items()]
        self._client.log_batch(self._id, [self._metric(*pair, now, update) for pair in pairs])

    def picture(self, name: str, update: int, path: Path) -> None:  # noqa: ARG002 - its name has it
        self._client.log_artifact(self._id, str(path), name)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _remembered(path: Path, first_update: int, make: Callable[[], str]) -> str:
    """Return what a tracker calls this run; one that goes on has the name of before."""
    if not (first_update and path.is_file()):
        path.write_text(make())
    return path.read_text()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
}
"""Trackers by their names in ``logging.trackers``."""
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Packages that trackers need beside those of this project, by the names of their modules."""


def check_trackers(config: LoggingConfig) -> None:
    """Raise a ConfigError where trackers or their libraries are missing, which only a run needs."""
    check_names("logging", config, "trackers", "tracker", TRACKERS)
    for name in config.trackers:
        if name in PACKAGES and find_spec(name) is None:
            raise ConfigError(
                f"logging.trackers has {name}: pip install {PACKAGES[name]}, or leave it out"
            )


class MetricsLog:
    """What a run writes to its trackers; one that fails is left out from then on."""

    def __init__(self, run_dir: Path, names: Iterable[str], *, first_update: int) -> None:
        """Continue at ``first_update``.

        Raises:
            MetricsError: ``metrics.jsonl`` of an earlier start cannot be read.
        """
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            with self._tolerating(name):
                self._trackers[name] = TRACKERS[name](run_dir, first_update)

    def write(self, kind: str, update: int, epoch: float, values: Mapping[str, float]) -> None:
        """Add one line. ``update`` is the number of updates made so far."""
        line = {"epoch": round(epoch, 4), **values}
        self._each(lambda tracker: tracker.write(kind, update, line))

    def pictures(self, folder: Path, update: int) -> None:
        """Hand over what was drawn after ``update`` to ``folder`` and the folders in it."""
        for path in sorted(folder.rglob(f"update-{update:08d}.png")):
            name = path.parent.relative_to(folder.parent).as_posix()
            self._each(lambda tracker, name=name, path=path: tracker.picture(name, update, path))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            with self._tolerating(name):
                tell(tracker)

    @contextmanager
    def _tolerating(self, name: str) -> Iterator[None]:
        try:
            yield
        except ExpectedError:
            raise
        except Exception as error:  # noqa: BLE001 - a run is worth more than what is written of it
            self._trackers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            log.warning("the tracker %s failed, and gets nothing more (%s)", name, reason)
