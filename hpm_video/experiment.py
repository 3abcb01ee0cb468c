"""What every training run needs around its model: data, a directory, an engine, a loop."""

import fcntl
import hashlib
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from hpm_video.config import (
    ConfigError,
    DataConfig,
    PretrainConfig,
    RunConfig,
    load_any_config,
    result_differences,
    save_config,
)
from hpm_video.data.dataset import ClipBatch, Failure, HeldOutClips, Repeats, VideoClips
from hpm_video.data.loader import (
    BadFiles,
    default_workers,
    end_workers,
    held_out_batches,
    training_batches,
)
from hpm_video.data.manifest import Manifest, read_manifest
from hpm_video.data.mixture import MixedClips, Places, deal_out
from hpm_video.data.transforms import ClipTransform
from hpm_video.features import clip_spec
from hpm_video.progress import Progress, Timeline
from hpm_video.training.checkpoint import (
    checkpoints_in,
    point_to_newest_and_best,
    read_optimizer,
    read_state,
    remove_unfinished,
)
from hpm_video.training.device import AUTOCAST, Precision, choose_precision
from hpm_video.training.engine import TorchEngine
from hpm_video.training.interruption import listen_for_stop
from hpm_video.training.loop import fit
from hpm_video.training.metrics import Meter, MetricsLog, ProgressBar
from hpm_video.training.objective import Objective
from hpm_video.training.provenance import bit_differences, gather_facts, record_start
from hpm_video.training.run import Cadence, Run, Watch
from hpm_video.training.schedules import WarmupCosine, scaled_lr
from hpm_video.whole_files import written_beside

log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=RunConfig)
RUN_FILES = {
    *(".lock", "checkpoints", "config.yaml", "labels.txt"),
    *("init_weights.sha256", "feature_weights.sha256"),
}
"""What a run that was killed at its very start may have left."""
TIMED_CLIPS = 8
"""At most so many clips make the updates that are timed to choose a precision."""


@dataclass(frozen=True)
class SourceData:
    """The videos of one source."""

    train: Manifest
    validation: Manifest | None

    @property
    def fingerprint(self) -> str:
        """What the order of the training files depends on: how many they are, and their names."""
        names = "\n".join(Path(file).name for file in self.train.files)
        return f"{len(self.train)} files, {hashlib.sha256(names.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class RunData:
    """The videos of a run, and how long it is."""

    sources: dict[str, SourceData]
    """By name; the main source is ``""`` and comes first."""
    timeline: Timeline

    @property
    def train(self) -> Manifest:
        """Training videos of the main source."""
        return self.sources[""].train

    @property
    def validation(self) -> Manifest | None:
        """Held-out videos of the main source."""
        return self.sources[""].validation

    @property
    def fingerprint(self) -> str:
        """What the order of the training files depends on."""
        return "; ".join(source.fingerprint for source in self.sources.values())


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run, and where the run stands."""

    path: Path

    @property
    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(checkpoints_in(self.path / "checkpoints")), None)

    @property
    def update(self) -> int:
        """The next update."""
        return 0 if self.newest is None else int(read_state(self.newest)["update"])

    @property
    def precision(self) -> Precision | None:
        """The precision that the run began with."""
        if self.newest is None:
            return None
        precision: Precision = read_state(self.newest)["facts"]["precision"]
        return precision


def open_data(config: RunConfig) -> RunData:
    """Read the manifests.

    Raises:
        ConfigError: no data is named, or it does not fill a batch.
        ManifestError: a manifest cannot be used.
    """
    recipe, sources = config.recipe, {}
    for name, data in config.sources.items():
        if not data.train:
            key = f"{key_of_source(name)}data.train"
            raise ConfigError(
                f"{key} is not set; give a manifest, or a folder of videos or images: {key}=PATH"
            )
        train = open_manifest(data, data.train)
        validation = None if data.validation is None else open_manifest(data, data.validation)
        sources[name] = SourceData(train, validation)
    share = config.weights[0] / sum(config.weights)
    try:
        timeline = Timeline(round(len(sources[""].train) / share), recipe.batch_size, recipe.epochs)
    except ValueError as error:
        raise ConfigError(f"recipe: {error}") from error
    return RunData(sources, timeline)


def key_of_source(name: str) -> str:
    """What the keys of a source begin with in a config."""
    return f"mix.{name}." if name else ""


def open_manifest(data: DataConfig, path: str) -> Manifest:
    """Read one of the manifests of a config, or the videos of a folder.

    Raises:
        ManifestError: it cannot be used.
    """
    root = None if data.root is None else Path(data.root).expanduser()
    return read_manifest(Path(path).expanduser(), root)


def look_into_directory(schema: type[Config], config: Config, data: RunData) -> RunDirectory:
    """Find out where a run stands, and make sure that it is a run of the same config and data.

    Raises:
        ConfigError: the directory holds a run of another config or data, or something else.
        CheckpointError: the newest checkpoint cannot be read.
    """
    if not config.output_dir:
        raise ConfigError("output_dir is not set; give the run a directory: output_dir=runs/NAME")
    folder = Path(config.output_dir).expanduser()
    path = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={folder} is a file; name a folder")
    directory = RunDirectory(folder)
    if directory.newest is None:
        foreign = [item.name for item in folder.glob("*") if item.name not in RUN_FILES]
        if foreign and not path.is_file():
            raise ConfigError(
                f"{folder} holds no run, but other files ({foreign[0]}); take another output_dir"
            )
        return directory
    stored = load_any_config(directory.newest / "config.yaml")
    if not isinstance(stored, schema):
        raise ConfigError(
            f"{folder} holds a run of another kind ({type(stored).__name__}, this is a "
            f"{schema.__name__}); take another output_dir"
        )
    differences = result_differences(stored, config)
    before = read_state(directory.newest)["data"]
    if not differences and before != data.fingerprint:
        differences = [
            f"the files of {key_of_source(name)}data.train: {then} -> {source.fingerprint}"
            for (name, source), then in zip(data.sources.items(), before.split("; "), strict=False)
            if then != source.fingerprint
        ]
    if differences:
        raise ConfigError(
            f"{folder} holds a run of another config:\n  "
            + "\n  ".join(differences)
            + "\nTake another output_dir, or the values of before to go on with that run."
        )
    return directory


@contextmanager
def claim(directory: RunDirectory, config: RunConfig) -> Iterator[None]:
    """Make the directory this process's own, mend what a killed one left, write the config.

    Raises:
        ConfigError: another process trains there.
    """
    checkpoints = directory.path / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    with (directory.path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process trains in {directory.path}; wait for it, or take another "
                f"output_dir"
            ) from error
        remove_unfinished(checkpoints)
        point_to_newest_and_best(checkpoints)
        with written_beside(directory.path / "config.yaml") as path:
            save_config(config, path)
        yield


def make_engine(
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    precision: Precision,
) -> TorchEngine:
    """The engine that updates ``model``, which is on ``device``."""
    recipe = config.recipe
    return TorchEngine(
        model,
        optimizer,
        device=device,
        accumulate=recipe.batch_size // config.micro_batch,
        clip_grad=recipe.clip_grad,
        autocast=AUTOCAST[precision],
    )


def train(
    config: RunConfig,
    data: RunData,
    directory: RunDirectory,
    *,
    engine: TorchEngine,
    objective: Objective,
    clips: MixedClips,
    watch: Watch,
) -> None:
    """Train on ``clips`` from where the directory stands to the end. Raises what ``fit`` raises."""
    start, newest = directory.update, directory.newest
    facts = gather_facts(engine.device, engine.precision, engine.accumulate)
    _announce(config, data, engine, start)
    if newest is not None:
        engine.load_optimizer_state(read_optimizer(newest))
        for difference in bit_differences(read_state(newest)["facts"], facts):
            log.warning("the last bits may differ from an unbroken run's: %s", difference)
    record_start(directory.path, facts, start)
    logging_ = config.logging
    try:
        with (
            listen_for_stop() as stop,
            closing(ProgressBar(start, data.timeline.num_updates)) as bar,
            closing(
                MetricsLog(directory.path, first_update=start, tensorboard=logging_.tensorboard)
            ) as metrics,
        ):
            run = Run(
                directory.path,
                data.timeline,
                _cadence(config),
                engine,
                {"model": engine.model, **objective.companions},
                facts,
                Meter(engine.device),
                metrics,
                bar,
                {
                    name: BadFiles(
                        directory.path / (f"bad_files_{name}.csv" if name else "bad_files.csv"),
                        num_files=len(source.train),
                        max_bad_share=config.data.max_bad_share,
                    )
                    for name, source in data.sources.items()
                },
                stop,
                watch,
                best={} if newest is None else read_state(newest)["best"],
                data=data.fingerprint,
            )
            with closing(_training_stream(config, data, clips, start, engine.device)) as batches:
                fit(engine, objective, batches, _schedule(config), run, start=start)
    finally:
        end_workers()


def settle_precision(
    config: RunConfig,
    directory: RunDirectory,
    device: torch.device,
    make_update: Callable[[torch.device, Precision, int], Callable[[], None]],
) -> Precision:
    """As the config says, as the run began, or as this device makes faster updates."""
    if config.engine.precision != "auto":
        return config.engine.precision
    if directory.precision is not None:
        return directory.precision
    clips = min(config.micro_batch * config.data.repeats, TIMED_CLIPS)
    return choose_precision(device, lambda name: make_update(device, name, clips))


def in_one_pass(config: Config) -> Config:
    """The config of updates that are not summed up over several forward passes."""
    return replace(config, engine=replace(config.engine, micro_batch=None))


def timed_update(
    config: RunConfig, engine: TorchEngine, objective: Objective, clips: int
) -> Callable[[], None]:
    """A whole update on so many random clips: forward, backward, step, what follows it.

    The engine must be one of :func:`in_one_pass`.
    """
    batch = ClipBatch(
        torch.randint(256, (clips, 3, *config.data.clip_size), dtype=torch.uint8),
        keys=torch.arange(clips),
        labels=torch.zeros(clips, dtype=torch.int64),
        files=("random pixels",) * clips,
        failures=(),
    ).to(engine.device)
    progress = Progress(1, config.recipe.epochs - 0.5, config.recipe.epochs)

    def update() -> None:
        for group in engine.param_groups:
            group["lr"] = 1e-6
        with engine.autocast():
            losses = objective.losses(engine, batch, progress)
        engine.backward(losses.total)
        engine.step()
        objective.after_update(engine.model, progress)

    return update


def training_clips(
    config: RunConfig,
    data: RunData,
    transforms: Mapping[str, ClipTransform],
    *,
    same_frames: bool,
) -> MixedClips:
    """The training clips of a run; ``same_frames``: whether repeats show the same frames.

    ``transforms``: by the name of the source.
    """
    return MixedClips(
        [
            VideoClips(
                data.sources[name].train,
                clip_spec(source),
                transforms[name],
                repeats=Repeats(source.repeats, same_frames),
                decoder=source.decoder,
                seed=config.seed,
                max_bad_share=config.data.max_bad_share,
                source=name,
            )
            for name, source in config.sources.items()
        ]
    )


def find_failures(clips: HeldOutClips, *, batch_size: int, workers: int) -> list[Failure]:
    """Decode held-out clips once, so that a bad file can stop a run before it begins.

    Raises:
        DecodeError: a file does not decode, and ``clips`` do not report that.
    """
    batches = held_out_batches(clips, batch_size=batch_size, workers=workers)
    return [failure for batch in batches for failure in batch.failures]


def num_workers(data: DataConfig) -> int:
    """Processes that decode."""
    return default_workers() if data.workers is None else data.workers


def _training_stream(
    config: RunConfig, data: RunData, clips: MixedClips, start: int, device: torch.device
) -> Generator[ClipBatch, None, None]:
    """The micro-batches from update ``start`` to the last."""
    sources = deal_out(config.weights, data.timeline.num_updates)
    return training_batches(
        clips,
        Places(sources, config.recipe.batch_size, start),
        batch_size=config.micro_batch,
        workers=num_workers(config.data),
        pin=device.type == "cuda",
    )


def _schedule(config: RunConfig) -> WarmupCosine:
    recipe = config.recipe
    return WarmupCosine(
        peak=scaled_lr(recipe.base_lr, recipe.batch_size),
        final=scaled_lr(recipe.min_lr, recipe.batch_size),
        warmup_epochs=recipe.warmup_epochs,
    )


def _cadence(config: RunConfig) -> Cadence:
    probe = config.knn.every_epochs if isinstance(config, PretrainConfig) else math.inf
    return Cadence(
        log_updates=config.logging.every_updates,
        save_updates=config.checkpoint.every_updates,
        keep_last=config.checkpoint.keep_last,
        keep_every_epochs=config.checkpoint.keep_every_epochs,
        validate_every_epochs=config.logging.validate_every_epochs,
        picture_every_epochs=config.logging.picture_every_epochs,
        probe_every_epochs=probe,
    )


def _announce(config: RunConfig, data: RunData, engine: TorchEngine, start: int) -> None:
    for name, source in data.sources.items():
        held_out = f"{len(source.validation)} held out" if source.validation else "none held out"
        repeats = config.sources[name].repeats
        log.info(
            f"{name or 'data'}: {len(source.train)} files to train on, {repeats} clip(s) of each; "
            f"{held_out}"
        )
    parameters = sum(p.numel() for p in engine.model.parameters()) / 1e6
    log.info(f"{parameters:.1f} M parameters on {engine.device.type} in {engine.precision}")
    recipe = config.recipe
    log.info(
        f"{recipe.epochs} epochs = {data.timeline.num_updates} updates of {recipe.batch_size} "
        f"files in {engine.accumulate} forward pass(es); "
        f"peak learning rate {_schedule(config).peak:.2e}"
    )
    if start:
        log.info(f"going on at update {start} of {data.timeline.num_updates}")
