"""The videos of a run, as its config names them."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from hpm_video.config.batch_plan import BatchPlan
from hpm_video.config.checks import ConfigError
from hpm_video.config.data import DataConfig
from hpm_video.config.schema import FinetuneConfig, RunConfig, key_of_source
from hpm_video.data.manifest import NOT_STATED, Manifest, ManifestError, read_manifest
from hpm_video.decoding.locations import base_name
from hpm_video.decoding.registry import check_name
from hpm_video.files.wording import counted
from hpm_video.training.optim import schedule_of
from hpm_video.training.progress import Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceData:
    """The videos of one source."""

    train: Manifest
    validation: Manifest | None

    @property
    def fingerprint(self) -> str:
        """What the order of the training files depends on: their number and names."""
        names = "\n".join(base_name(file) for file in self.train.files)
        return f"{len(self.train)} files, {hashlib.sha256(names.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class RunData:
    """The videos of a run, and how long it is."""

    sources: dict[str, SourceData]  # by name; the main one is ``""`` and comes first
    timeline: Timeline

    @property
    def main(self) -> SourceData:
        return self.sources[""]

    @property
    def fingerprint(self) -> str:
        return "; ".join(source.fingerprint for source in self.sources.values())


def open_data(config: RunConfig) -> RunData:
    """Read the manifests.

    Raises:
        ConfigError, DecoderError, ManifestError: what the config names cannot be used.
    """
    sources = {}
    for name, data in config.sources.items():
        key = f"{key_of_source(name)}data"
        check_name(data.decoder)
        if not data.train:
            raise ConfigError(f"{key}.train is not set; give {key}.train=MANIFEST or =FOLDER")
        train = open_manifest(data, data.train, f"{key}.train")
        if data.clips_per_minute is not None:
            train = train.by_length(data.clips_per_minute)
        validation = None
        if data.validation is not None:
            validation = open_manifest(data, data.validation, f"{key}.validation")
            if shared := len({*train.files} & {*validation.files}):
                log.warning(
                    f"{shared} of the {len(validation)} validation files are training files too; "
                    f"tools/split.py makes two lists of one"
                )
        sources[name] = SourceData(train, validation)
    return RunData(sources, _timeline(config, len(sources[""].train)))


def planned_data(config: RunConfig, files: int) -> RunData:
    """What :func:`open_data` returns, of so many training files that need not be there yet."""
    classes = (isinstance(config, FinetuneConfig) and config.model.num_classes) or 2
    labels = tuple(i % classes for i in range(files))
    unknown = Manifest(tuple(map(str, range(files))), labels, (NOT_STATED,) * files)
    sources = dict.fromkeys(config.sources, SourceData(unknown, None))
    return RunData(sources, _timeline(config, files))


def _timeline(config: RunConfig, files: int) -> Timeline:
    share = config.weights[0] / sum(config.weights)
    try:
        return Timeline(round(files / share), config.recipe.batch_size, config.recipe.epochs)
    except ValueError as error:
        raise ConfigError(f"recipe: {error}") from error


def open_manifest(data: DataConfig, path: str, key: str) -> Manifest:
    """Read the list or folder that ``key`` of a config names. Raises a ManifestError with it."""
    place = Path(path).expanduser()
    try:
        return read_manifest(place, None if data.root is None else Path(data.root).expanduser())
    except ManifestError as error:
        recipe, makes = place.parent / "prepare.py", ""
        if recipe.is_file() and not place.exists():
            makes = f". {recipe} makes it, see {recipe.with_name('README.md')}"
        raise ManifestError(f"{key}: {error}{makes}") from error


def describe_training(config: RunConfig, data: RunData, plan: BatchPlan, model: str) -> list[str]:
    """Describe the sources, the model, how the batch is spread and the schedule, line by line."""
    lines = []
    for name, source in data.sources.items():
        given = config.sources[name]
        often = f"{len(source.train)} samples per epoch, " if given.clips_per_minute else ""
        measured = ", no validation"
        if source.validation:
            measured = f"; validation on {len(source.validation)} ({given.validation})"
        lines.append(
            f"{name or 'data'}: {counted(source.train.num_files, 'file')} to train on "
            f"({given.train}), {often}{counted(given.repeats, 'clip')} of each{measured}"
        )
    epochs, updates = config.recipe.epochs, data.timeline.num_updates
    return [
        *lines,
        model,
        f"{counted(plan.batch_size, 'file')} per update = {plan.micro_batch} per forward pass x "
        f"{counted(plan.accumulate, 'pass')} x {counted(plan.processes, 'process')}",
        f"{counted(epochs, 'epoch')} = {counted(updates, 'update')}, {updates / epochs:.4g} per "
        f"epoch; peak learning rate {schedule_of(config.recipe).peak:.2e}",
    ]
