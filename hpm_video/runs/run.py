"""What every training run needs around its model: data, a directory, an engine, a loop."""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hpm_video.config.batch_plan import BatchPlan, PlanError, micro_batches, plan_batches
from hpm_video.config.checks import ConfigError
from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_any_config, result_differences, save_config
from hpm_video.config.schema import RunConfig
from hpm_video.config.training import EngineConfig
from hpm_video.data.clips import ClipBatch, Repeats, VideoClips
from hpm_video.data.loader import (
    BadFiles,
    end_workers,
    training_batches,
)
from hpm_video.data.manifest import Manifest, read_manifest
from hpm_video.data.mixture import MixedClips, Places, deal_out
from hpm_video.data.transforms import ClipTransform
from hpm_video.decoding.locations import base_name
from hpm_video.files.atomic import written_beside
from hpm_video.recognition.inference import Reading, clip_spec
from hpm_video.training.checkpoint import (
    check_name,
    checkpoints_in,
    mend,
    read_optimizer,
    read_state,
)
from hpm_video.training.deepspeed_engine import DeepSpeedEngine
from hpm_video.training.deepspeed_settings import DeepSpeedChoice, read_settings
from hpm_video.training.device import Precision, choose_device, choose_precision
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import Engine, TorchEngine
from hpm_video.training.loop import fit
from hpm_video.training.metrics import Meter, MetricsLog, ProgressBar, WaitingWarning
from hpm_video.training.objective import Objective
from hpm_video.training.plan import fits_in_memory, largest_fitting
from hpm_video.training.progress import Progress, Timeline
from hpm_video.training.provenance import bit_differences, gather_facts, record_start
from hpm_video.training.run import Cadence, Run, Watch
from hpm_video.training.schedules import WarmupCosine, scaled_lr
from hpm_video.training.stop import listen_for_stop

log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=RunConfig)
RUN_FILES = {
    ".lock",
    "checkpoints",
    "config.yaml",
    "labels.txt",
    "init_weights.sha256",
    "feature_weights.sha256",
}
"""What a run that was killed at its very start may have left."""
TIMED_CLIPS = 8
"""At most so many clips make the updates that are timed to choose a precision."""
GPU_SHARE = 0.9
"""Of a GPU's memory, what updates may take where their size is found by trial: the rest is for
what comes between them, and for what the processes exchange."""
MakeUpdate = Callable[..., Callable[[], None]]
"""(device, precision, clips, source="", accumulate=1) -> an update on random clips, or each of
several forward passes that make one, by this process alone"""


@dataclass(frozen=True)
class SourceData:
    """The videos of one source."""

    train: Manifest
    validation: Manifest | None

    @property
    def fingerprint(self) -> str:
        """What the order of the training files depends on: how many they are, and their names."""
        names = "\n".join(base_name(file) for file in self.train.files)
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
    """The directory of a run, and where the run stood when it was looked at."""

    path: Path
    newest: Path | None
    """The newest complete checkpoint."""

    @classmethod
    def at(cls, path: Path) -> "RunDirectory":
        """Look at a directory."""
        return cls(path, next(reversed(checkpoints_in(path / "checkpoints")), None))

    @property
    def update(self) -> int:
        """The next update."""
        return 0 if self.newest is None else int(read_state(self.newest, of_run=True)["update"])

    @property
    def precision(self) -> Precision | None:
        """The precision that the run began with."""
        if self.newest is None:
            return None
        precision: Precision = read_state(self.newest, of_run=True)["facts"]["precision"]
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


def check_output_dir(config: RunConfig) -> Path:
    """The directory of a run, which there may not be yet.

    Raises:
        ConfigError: it is not set, or what is there is no run.
    """
    if not config.output_dir:
        raise ConfigError("output_dir is not set; give the run a directory: output_dir=runs/NAME")
    folder = Path(config.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={folder} is a file; name a folder")
    foreign = [item.name for item in folder.glob("*") if item.name not in RUN_FILES]
    if (
        foreign
        and not (folder / "config.yaml").is_file()
        and not checkpoints_in(folder / "checkpoints")
    ):
        raise ConfigError(
            f"{folder} holds no run, but other files ({foreign[0]}); take another output_dir"
        )
    return folder


@contextmanager
def locked(config: RunConfig, processes: Processes) -> Iterator[None]:
    """Keep other runs out of the run's directory: what is read there holds as long as this lasts.

    The first process does it, and makes the directory; the others wait until it is done. Of a run
    that never began nothing is left.

    Raises:
        ConfigError: there can be no run, or another one trains there.
    """
    folder = check_output_dir(config)
    if not processes.is_first:
        processes.wait()
        yield
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
            yield
        finally:
            if is_new and [*folder.iterdir()] == [path]:
                path.unlink()
                folder.rmdir()


def look_into_directory(schema: type[Config], config: Config, data: RunData) -> RunDirectory:
    """Find out where a run stands, and make sure that it is a run of the same config and data.

    Raises:
        ConfigError: the directory holds a run of another config or data.
        CheckpointError: the newest checkpoint cannot be read.
    """
    folder = Path(config.output_dir).expanduser()
    directory = RunDirectory.at(folder)
    if directory.newest is None:
        return directory
    check_name(directory.newest)
    stored = load_any_config(directory.newest / "config.yaml")
    if not isinstance(stored, schema):
        raise ConfigError(
            f"{folder} holds a run of another kind ({type(stored).__name__}, this is a "
            f"{schema.__name__}); take another output_dir"
        )
    differences = result_differences(stored, config)
    before = read_state(directory.newest, of_run=True)["data"]
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


@dataclass(frozen=True)
class Session:
    """A run in one of its processes."""

    processes: Processes
    device: torch.device
    data: RunData
    directory: RunDirectory

    @property
    def is_complete(self) -> bool:
        """Whether all updates were made."""
        return self.directory.update == self.data.timeline.num_updates


def open_session(
    schema: type[Config], config: Config, data: RunData, processes: Processes
) -> Session:
    """Choose the device, and see where the run stands. Its directory is locked, nothing is written.

    Raises:
        ConfigError: see :func:`look_into_directory`; or the processes do not see the same there,
            or the batch does not spread over them.
        CheckpointError: the newest checkpoint cannot be read.
        DeviceError: there is no such device.
    """
    plan_for(config, processes.count)
    device = choose_device(config.engine.device, processes.count)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    directory = look_into_directory(schema, config, data)
    seen = processes.gather([directory])
    if any(each != seen[0] for each in seen):
        names = sorted({str(each.newest and each.newest.name) for each in seen})
        raise ConfigError(
            f"the processes do not see the same in {directory.path} (newest checkpoints: "
            f"{', '.join(names)}); output_dir must be a folder that all machines share"
        )
    return Session(processes, device, data, directory)


def claim(session: Session, config: RunConfig) -> None:
    """Mend what a killed run left in the directory, and write the config.

    The first process does it; the others wait until it is done.

    Raises:
        CheckpointError: a checkpoint there is damaged.
    """
    if session.processes.is_first:
        checkpoints = session.directory.path / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        mend(checkpoints)
        with written_beside(session.directory.path / "config.yaml") as path:
            save_config(config, path)
    session.processes.wait()


def plan_for(
    config: RunConfig, processes: int, micro_batch: int | None = None, multiple: int = 1
) -> BatchPlan:
    """How an update's batch is spread, with the config's micro-batch or another.

    Raises:
        ConfigError: it does not come out even.
    """
    chosen = config.engine.micro_batch if micro_batch is None else micro_batch
    try:
        return plan_batches(config.recipe.batch_size, processes, chosen, multiple=multiple)
    except PlanError as error:
        raise ConfigError(str(error)) from error


def settle_plan(
    config: RunConfig,
    session: Session,
    precision: Precision,
    make_update: MakeUpdate,
    multiple: int = 1,
) -> BatchPlan:
    """How an update's batch is spread: as the config says, or on a GPU by trial.

    Each process tries whole updates of plain torch on its GPU, and all take what fits everywhere.
    The weights of the run lie there too meanwhile, which leaves room for what engines keep besides.

    Raises:
        ConfigError: the batch does not come out even, or not even one video fits.
    """
    processes = session.processes
    plan = plan_for(config, processes.count, multiple=multiple)
    if config.engine.micro_batch is not None or session.device.type != "cuda":
        return plan
    sizes = micro_batches(plan.batch_size, plan.processes, multiple)
    torch.cuda.set_per_process_memory_fraction(GPU_SHARE, session.device)
    try:
        largest = find_micro_batch(config, session.device, precision, make_update, sizes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, session.device)
        torch.cuda.reset_accumulated_memory_stats(session.device)
    return plan_for(config, processes.count, min(processes.gather([largest])), multiple)


def find_micro_batch(
    config: RunConfig,
    device: torch.device,
    precision: Precision,
    make_update: MakeUpdate,
    sizes: Sequence[int],
) -> int:
    """The largest of ``sizes`` of which whole updates fit the device, of every source.

    Raises:
        ConfigError: not even the smallest does.
    """

    def two_updates(size: int) -> None:
        for source, data in config.sources.items():
            forward_pass = make_update(
                device, precision, size * data.repeats, source=source, accumulate=2
            )
            for _ in range(4):  # of which the last has gradients and moments beside it
                forward_pass()

    try:
        return largest_fitting(sizes, lambda size: fits_in_memory(lambda: two_updates(size)))
    except PlanError as error:
        raise ConfigError(str(error)) from error


def make_engine(
    config: RunConfig,
    session: Session,
    plan: BatchPlan,
    precision: Precision,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Engine:
    """The engine that updates ``model``, which is on the device of the session.

    Raises:
        DeepSpeedError: DeepSpeed cannot be used.
        DeepSpeedSettingsError: the user's settings of it contradict the run.
    """
    how = config.engine
    common: dict[str, Any] = {
        "device": session.device,
        "clip_grad": config.recipe.clip_grad,
        "precision": precision,
        "processes": session.processes,
    }
    if how.name == "torch":
        return TorchEngine(model, optimizer, accumulate=plan.accumulate, **common)
    return DeepSpeedEngine(model, optimizer, deepspeed_choice(how), plan, **common)


def deepspeed_choice(how: EngineConfig) -> DeepSpeedChoice:
    """What a config wants of DeepSpeed.

    Raises:
        DeepSpeedSettingsError: the user's file of settings cannot be read.
    """
    return DeepSpeedChoice(
        stage=how.stage,
        offload_optimizer=how.offload != "none",
        offload_parameters=how.offload == "all",
        own={} if how.deepspeed is None else read_settings(Path(how.deepspeed).expanduser()),
    )


def train(
    config: RunConfig,
    session: Session,
    plan: BatchPlan,
    *,
    engine: Engine,
    objective: Objective,
    clips: MixedClips,
    watch: Watch,
) -> None:
    """Train on ``clips`` from where the directory stands to the end. Raises what ``fit`` raises."""
    data, directory, processes = session.data, session.directory, session.processes
    start, newest, is_first = directory.update, directory.newest, processes.is_first
    facts = gather_facts(engine.device, engine.precision, engine.name, plan)
    _announce(config, data, engine, plan, start)
    if newest is not None:
        engine.load_optimizer_state(read_optimizer(newest))
        for difference in bit_differences(read_state(newest, of_run=True)["facts"], facts):
            log.warning("the last bits may differ from an unbroken run's: %s", difference)
    if is_first:
        record_start(directory.path, facts, start)
    tensorboard, bad_files = config.logging.tensorboard, _bad_files(config, session)
    for name, stream in zip(data.sources, clips.streams, strict=True):
        bad_files[name].check()
        stream.bad |= bad_files[name].failures
    try:
        with (
            listen_for_stop(patient=processes.count > 1) as stop,
            closing(ProgressBar(start, data.timeline.num_updates, silent=not is_first)) as bar,
            closing(
                MetricsLog(
                    directory.path, first_update=start, tensorboard=tensorboard, writes=is_first
                )
            ) as metrics,
            closing(_training_stream(config, session, plan, clips, start)) as batches,
        ):
            run = Run(
                directory.path,
                data.timeline,
                _cadence(config),
                engine,
                objective.companions,
                facts,
                Meter(engine.device, processes),
                metrics,
                bar,
                bad_files,
                stop,
                watch,
                WaitingWarning(directory.path / "config.yaml"),
                best={} if newest is None else read_state(newest, of_run=True)["best"],
                data=data.fingerprint,
            )
            fit(engine, objective, batches, _schedule(config), run, start=start)
    finally:
        end_workers()


def _bad_files(config: RunConfig, session: Session) -> dict[str, BadFiles]:
    """Of each source."""
    folder = session.directory.path
    return {
        name: BadFiles(
            folder / (f"bad_files_{name}.csv" if name else "bad_files.csv"),
            num_files=len(source.train),
            max_bad_share=config.data.max_bad_share,
            writes=session.processes.is_first,
        )
        for name, source in session.data.sources.items()
    }


def settle_precision(config: RunConfig, session: Session, make_update: MakeUpdate) -> Precision:
    """As the config says, as the run began, or as this device makes faster updates."""
    if config.engine.precision != "auto":
        return config.engine.precision
    if session.directory.precision is not None:
        return session.directory.precision
    share = config.recipe.batch_size // session.processes.count
    clips = min(share * config.data.repeats, TIMED_CLIPS)

    def measured() -> Precision:
        return choose_precision(
            session.device, lambda name: make_update(session.device, name, clips)
        )

    return session.processes.of_first(measured)


def timed_update(
    config: RunConfig, engine: Engine, objective: Objective, clips: int, source: str = ""
) -> Callable[[], None]:
    """A whole update on so many random clips: forward, backward, step, what follows it.

    Where the engine sums up several forward passes, each call is one.
    """
    batch = ClipBatch(
        torch.randint(256, (clips, 3, *config.sources[source].clip_size), dtype=torch.uint8),
        keys=torch.arange(clips),
        labels=torch.zeros(clips, dtype=torch.int64),
        files=("random pixels",) * clips,
        failures=(),
        source=source,
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


def _training_stream(
    config: RunConfig, session: Session, plan: BatchPlan, clips: MixedClips, start: int
) -> Generator[ClipBatch, None, None]:
    """This process's micro-batches from update ``start`` to the last."""
    sources = deal_out(config.weights, session.data.timeline.num_updates)
    places = Places(
        sources, plan.batch_size, start, rank=session.processes.rank, processes=plan.processes
    )
    reading = Reading.of(config.data)
    return training_batches(
        clips,
        places,
        batch_size=plan.micro_batch,
        workers=reading.workers,
        limits=reading.limits,
        pin=session.device.type == "cuda",
    )


def _schedule(config: RunConfig) -> WarmupCosine:
    recipe = config.recipe
    return WarmupCosine(
        peak=scaled_lr(recipe.base_lr, recipe.batch_size),
        final=scaled_lr(recipe.min_lr, recipe.batch_size),
        warmup_epochs=recipe.warmup_epochs,
    )


def _cadence(config: RunConfig) -> Cadence:
    return Cadence(
        log_updates=config.logging.every_updates,
        save_updates=config.checkpoint.every_updates,
        keep_last=config.checkpoint.keep_last,
        keep_every_epochs=config.checkpoint.keep_every_epochs,
        validate_every_epochs=config.logging.validate_every_epochs,
        picture_every_epochs=config.logging.picture_every_epochs,
    )


def _announce(
    config: RunConfig, data: RunData, engine: Engine, plan: BatchPlan, start: int
) -> None:
    for line in describe_data(config, data):
        log.info(line)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters()) / 1e6
    device = f"{engine.device.type} in {engine.precision}, by {engine.name}"
    log.info(f"{parameters:.1f} M parameters on {device}")
    for line in describe_plan(config, data, plan):
        log.info(line)
    if start:
        log.info(f"going on at update {start} of {data.timeline.num_updates}")


def describe_data(config: RunConfig, data: RunData) -> list[str]:
    """How many files each source has."""
    told = []
    for name, source in data.sources.items():
        held_out = f"{len(source.validation)} held out" if source.validation else "none held out"
        told.append(
            f"{name or 'data'}: {len(source.train)} files to train on, "
            f"{config.sources[name].repeats} clip(s) of each; {held_out}"
        )
    return told


def describe_plan(config: RunConfig, data: RunData, plan: BatchPlan) -> list[str]:
    """How the batch is spread, how many updates there are, and how fast they learn."""
    timeline, recipe = data.timeline, config.recipe
    updates = timeline.num_updates
    return [
        f"{plan.batch_size} files per update = {plan.micro_batch} per forward pass x "
        f"{plan.accumulate} pass(es) x {plan.processes} process(es)",
        f"{recipe.epochs} epochs = {updates} updates, {updates / recipe.epochs:.4g} per epoch; "
        f"peak learning rate {_schedule(config).peak:.2e}",
    ]
