"""The directory of a run: its lock, its state, and whether a config and weights belong to it."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_any_config, result_differences, save_config
from hpm_video.config.schema import PretrainConfig, RunConfig, key_of_source
from hpm_video.files.atomic import remove_unfinished, written_beside
from hpm_video.files.weights import OF_ANOTHER_PROJECT, CheckpointError
from hpm_video.models.from_config import AnyConfig
from hpm_video.runs.data import RunData
from hpm_video.training import checkpoint
from hpm_video.training.distributed import Processes

log = logging.getLogger(__name__)

HASHES = {"init_weights.sha256", "feature_weights.sha256"}
RUN_FILES = {".lock", "checkpoints", "config.yaml", "labels.txt"} | HASHES
"""What a run that was killed at its very start may have left."""
SAME_ENCODER = ("encoder", "patch_size", "channels", "positions", "class_token", "conventions")
"""Fields of a model's config that must equal those of its weights."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run, and where the run stood when it was looked at."""

    path: Path
    newest: Path | None
    """The newest complete checkpoint."""

    @classmethod
    def at(cls, path: Path) -> "RunDirectory":
        newest = next(reversed(checkpoint.checkpoints_in(path / "checkpoints")), None)
        return cls(path, newest)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What ``state.json`` of that checkpoint says; empty without one."""
        return {} if self.newest is None else checkpoint.read_state(self.newest, of_run=True)

    @property
    def update(self) -> int:
        """The next update."""
        return int(self.state.get("update", 0))


def check_output_dir(config: RunConfig) -> Path:
    """Return the directory of a run, or raise a ConfigError if it is unset or holds no run."""
    if not config.output_dir:
        raise ConfigError("output_dir is not set; give output_dir=runs/NAME")
    folder = Path(config.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={folder} is a file; name a folder")
    foreign = [item.name for item in folder.glob("*") if item.name not in RUN_FILES]
    is_run = (folder / "config.yaml").is_file() or checkpoint.checkpoints_in(folder / "checkpoints")
    if foreign and not is_run:
        raise ConfigError(
            f"{folder} holds no run, but other files ({foreign[0]}); take another output_dir"
        )
    return folder


@contextmanager
def locked(config: RunConfig, processes: Processes) -> Iterator[RunDirectory]:
    """Keep other runs out of the run's directory. Of a run that never began nothing is left.

    Raises:
        ConfigError: there can be no run, or another one trains there.
    """
    folder = check_output_dir(config)
    if not processes.is_first:
        processes.wait()
        yield RunDirectory.at(folder)
        return
    path, is_new = folder / ".lock", not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise BlockingIOError("the file was replaced meanwhile")
        except OSError as error:
            raise ConfigError(
                f"another process trains in {folder}; wait for it, or take another output_dir"
            ) from error
        try:
            processes.wait()
            yield RunDirectory.at(folder)
        finally:
            if is_new and [*folder.iterdir()] == [path]:
                path.unlink()
                folder.rmdir()


def check_same_run(directory: RunDirectory, config: RunConfig, data: RunData) -> None:
    """Raise a ConfigError unless the run in ``directory`` is one of the same config and data."""
    if directory.newest is None:
        return
    stored = load_any_config(directory.newest / "config.yaml")
    if type(stored) is not type(config):
        raise ConfigError(f"{directory.path} holds another kind of run; take another output_dir")
    differences = result_differences(stored, config)
    before = directory.state["data"]
    if not differences and before != data.fingerprint:
        differences = [
            f"the files of {key_of_source(name)}data.train: {then} -> {source.fingerprint}"
            for (name, source), then in zip(data.sources.items(), before.split("; "), strict=False)
            if then != source.fingerprint
        ]
    if differences:
        raise ConfigError(
            f"{directory.path} holds a run of another config:\n  "
            + "\n  ".join(differences)
            + "\nTake another output_dir, or the earlier values."
        )


def note_weights(
    directory: RunDirectory, key: str, given: str | None, file: str = "model"
) -> dict[str, str]:
    """Return the SHA-256 of the weights that a run begins with, under the name of its file.

    ``key`` of the config names the weights as ``given``; ``file`` is that of a checkpoint folder.
    Raises a ConfigError where the run began with others, a CheckpointError where there are none.
    """
    path = directory.path / f"{key.rpartition('.')[2]}.sha256"
    before = path.read_text().strip() if directory.newest and path.is_file() else None
    now = "scratch"
    if given is not None:
        source = Path(given).expanduser()
        if before is not None and not source.exists():
            return {path.name: f"{before}\n"}  # whether the run still needs them is seen later
        now = checkpoint.weights_digest(source, file)
    if before is not None and before != now:
        raise ConfigError(
            f"{directory.path} began with other weights than {key}={given} holds now; take another "
            f"output_dir, or give the earlier weights"
        )
    return {path.name: f"{now}\n"}


def config_beside(config: AnyConfig) -> AnyConfig | None:
    """The config of the run that initial weights are of; none where they are of no run.

    Raises:
        CheckpointError, ConfigError: they are of another project, or of another model.
    """
    if config.init_weights is None:
        return None
    source = Path(config.init_weights).expanduser()
    if source.is_file() and source.suffix != ".safetensors":
        raise CheckpointError(f"{source} is not a safetensors file. {OF_ANOTHER_PROJECT}")
    path = (source if source.is_dir() else source.parent) / "config.yaml"
    if not path.is_file():
        return None
    beside = load_any_config(path)
    check_same_model(config, beside)
    return beside


def check_same_model(config: AnyConfig, source: AnyConfig) -> None:
    """Make sure that the encoder of ``source``, and of pre-training the decoder, is that here.

    Weights alone do not tell their heads or positions. The ConfigError names every difference.
    """
    same, different = [*SAME_ENCODER], []
    if isinstance(config, PretrainConfig) and isinstance(source, PretrainConfig):
        same.append("decoder")
    for name in same:
        theirs, ours = getattr(source.model, name), getattr(config.model, name)
        different += result_differences(theirs, ours, f"model.{name}.")
    if different:
        raise ConfigError(
            f"the model of init_weights={config.init_weights} differs (its value -> here):\n  "
            + "\n  ".join(different)
            + "\nTake its values, or other weights."
        )
    was, now = (f"data.mean={one.data.mean} data.std={one.data.std}" for one in (source, config))
    if was != now:
        log.warning(f"init_weights={config.init_weights} was trained with {was}, here it is {now}")


def claim(directory: RunDirectory, config: RunConfig, notes: dict[str, str]) -> None:
    """Mend what a killed run left in a locked directory, and write the config and ``notes``."""
    checkpoints = directory.path / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    checkpoint.mend(checkpoints)
    remove_unfinished(directory.path)
    with written_beside(directory.path / "config.yaml") as path:
        save_config(config, path)
    for name, text in notes.items():
        with written_beside(directory.path / name) as path:
            path.write_text(text, encoding="utf-8")
