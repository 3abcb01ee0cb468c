"""Pre-training: from a config to an assembled run."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hpm_video.config.checks import ConfigError
from hpm_video.config.data import PretrainDataConfig
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.augment import Augmentation
from hpm_video.data.clips import HeldOutClips, collate
from hpm_video.data.transforms import ClipTransform, MultiScaleCrop
from hpm_video.files.atomic import written_beside
from hpm_video.files.weights import load_weights
from hpm_video.mining.objective import HardPatchesMining, named
from hpm_video.mining.pictures import write_pictures
from hpm_video.mining.targets import FeatureTarget, PixelTarget, Target
from hpm_video.mining.teacher import MomentumSchedule, make_teacher
from hpm_video.mining.validation import Measures, describe, measure
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.feature_model import load_feature_model
from hpm_video.models.from_config import build_student
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.recognition.inference import (
    CLIPS_PER_PASS,
    Inference,
    Reading,
    clip_spec,
    find_failures,
)
from hpm_video.recognition.labels import names_of_both
from hpm_video.recognition.probes import FeatureTable, nearest_neighbours
from hpm_video.recognition.testing import summarise
from hpm_video.recognition.trained_model import TrainedAutoencoder, open_trained
from hpm_video.runs.init_weights import check_same_model, config_beside
from hpm_video.runs.run import (
    RunDirectory,
    Session,
    claim,
    key_of_source,
    locked,
    make_engine,
    open_data,
    open_manifest,
    open_session,
    settle_plan,
    settle_precision,
    timed_update,
    train,
    training_clips,
)
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import MaskRule, count_masked
from hpm_video.training.checkpoint import read_weights, weights_digest
from hpm_video.training.curves import plot_curves
from hpm_video.training.device import Precision
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import Engine, TorchEngine, WholeModel
from hpm_video.training.optim import make_adamw, parameter_groups
from hpm_video.training.run import Watch
from hpm_video.weights.image_tower import read_image_tower

log = logging.getLogger(__name__)

FEATURES = "feature_weights.sha256"
"""File of the run directory that tells the weights of the model whose features are the target."""
PICTURED_CLIPS = 4
"""Held-out clips that are drawn during training."""


def build_target(config: PretrainConfig, device: torch.device) -> Target:
    """What is to be reconstructed.

    Raises:
        CheckpointError, ConfigError: the weights of a feature model cannot be used.
    """
    mining, patch_size = config.mining, config.model.patch_size
    look = (patch_size, config.data.mean, config.data.std)
    if mining.pixel_kind is not None:
        return PixelTarget(*look, mining.pixel_kind)
    if mining.feature_kind is None:
        return FeatureTarget(*look, None)
    assert mining.feature_weights is not None
    path = Path(mining.feature_weights).expanduser()
    try:
        model = load_feature_model(
            mining.feature_kind,
            mining.feature_name,
            read_image_tower(path),
            path,
            frame_size=config.data.frame_size,
            patch_size=patch_size,
        )
    except ValueError as error:
        raise ConfigError(f"mining.feature_model: {error}") from error
    return FeatureTarget(*look, model.to(device))


def build_objective(
    config: PretrainConfig,
    teacher: MaskedAutoencoder | None,
    target: Target,
    whole: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
) -> HardPatchesMining:
    """Hard patches mining as a config wants it; without a teacher, a plain masked autoencoder.

    ``whole``: of the engine that holds the teacher.
    """
    mining = config.mining
    return HardPatchesMining(
        {name: mask_rule(config, name) for name in config.sources},
        target,
        predictor=mining.predictor,
        predictor_weight=mining.predictor_weight,
        teacher=teacher,
        momentum=MomentumSchedule(mining.momentum, mining.first_momentum, mining.last_momentum),
        whole=whole,
    )


def mask_rule(config: PretrainConfig, source: str) -> MaskRule:
    """How the clips of a source are masked."""
    masking = config.maskings[source]
    grid = TokenGrid.of_clip(config.sources[source].clip_size, config.model.patch_size)
    units = grid.num_tokens if masking.unit == "token" else grid.tokens_per_step
    num_masked = count_masked(units, masking.ratio, masking.count_rule)
    return MaskRule(grid, masking.unit, num_masked, masking.mask_strategy)


def crops_of(config: PretrainConfig) -> dict[str, ClipTransform]:
    """How training clips of each source are cropped."""
    mixed = {name: source.data for name, source in config.mix.items()}
    return {name: _crop_of(data) for name, data in {"": config.data, **mixed}.items()}


def _crop_of(data: PretrainDataConfig) -> ClipTransform:
    if data.crop == "multi_scale":
        return MultiScaleCrop(data.flip, data.interpolation)
    return Augmentation(
        area=data.crop_area,
        ratio=(3 / 4, 4 / 3),
        flip=data.flip,
        rand_augment=None,
        erasing=0.0,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
    )


def load_run(
    checkpoint: Path, device: torch.device, overrides: Sequence[str] = ()
) -> tuple[PretrainConfig, MaskedAutoencoder, HardPatchesMining]:
    """What a checkpoint folder holds: its config, the student, the objective with the teacher.

    ``overrides`` of the config: such as where the weights of a feature model are now.

    Raises:
        ConfigError, CheckpointError: the folder is not a whole checkpoint of a pre-training run.
    """
    trained = open_trained(checkpoint, TrainedAutoencoder, overrides=overrides)
    config, student = trained.config, trained.build()
    teacher = None
    if config.mining.has_teacher:
        of_teacher = open_trained(checkpoint, TrainedAutoencoder, "teacher", overrides=overrides)
        teacher = of_teacher.build().requires_grad_(requires_grad=False).to(device)
    target = build_target(config, device)
    return config, student.to(device), build_objective(config, teacher, target)


def pretrain(config: PretrainConfig, processes: Processes = Processes()) -> Path:  # noqa: B008
    """Pre-train as ``config`` says, or go on where its run directory stands. -> that directory

    Raises:
        ConfigError: the config cannot be run, or the directory holds a run of another one.
        ManifestError: the data cannot be read.
        CheckpointError: weights cannot be read, or do not fit.
        And what ``fit`` raises.
    """
    data = open_data(config)
    with locked(config, processes):
        session = open_session(PretrainConfig, config, data, processes)
        directory = session.directory
        if not session.is_complete:
            features = _check_same_features(config, directory)
            models = _make_models(config, directory.newest, session.device)
            target = build_target(config, session.device)
        claim(session, config)
        if session.is_complete:
            log.info("%s is complete: %d updates were made", directory.path, directory.update)
        else:
            if features is not None and processes.is_first:
                with written_beside(directory.path / FEATURES) as path:
                    path.write_text(f"{features}\n")
            _train(config, session, models, target)
        if processes.is_first:
            plot_curves(directory.path / "metrics.jsonl", directory.path / "curves.png")
    return directory.path


def _train(
    config: PretrainConfig,
    session: Session,
    models: tuple[MaskedAutoencoder, MaskedAutoencoder | None],
    target: Target,
) -> None:
    student, teacher = models
    maker = partial(make_update, config)
    precision = settle_precision(config, session, maker)
    plan = settle_plan(config, session, precision, maker)
    engine = make_engine(config, session, plan, precision, student, _optimizer(config, student))
    if teacher is not None:
        engine.hold(teacher)
    objective = build_objective(config, teacher, target, engine.whole)
    train(
        config,
        session,
        plan,
        engine=engine,
        objective=objective,
        clips=training_clips(config, session.data, crops_of(config), same_frames=False),
        watch=_watch(config, session, objective, engine),
    )


def _check_same_features(config: PretrainConfig, directory: RunDirectory) -> str | None:
    """The SHA-256 of the weights of the feature model, as it was when the run began.

    Raises:
        ConfigError: other weights lie there now.
    """
    given = config.mining.feature_weights
    if given is None:
        return None
    now = weights_digest(Path(given).expanduser())
    path = directory.path / FEATURES
    before = path.read_text().strip() if directory.newest and path.is_file() else now
    if before != now:
        raise ConfigError(
            f"{directory.path} began with other weights than mining.feature_weights={given} holds "
            f"now; take another output_dir, or give the weights of before"
        )
    return now


def make_update(
    config: PretrainConfig,
    device: torch.device,
    precision: Precision,
    clips: int,
    *,
    source: str = "",
    accumulate: int = 1,
) -> Callable[[], None]:
    """A whole update on random clips by one process, to see how long it takes and what it needs."""
    config = replace(config, init_weights=None)
    student, teacher = _make_models(config, None, device)
    objective = build_objective(config, teacher, build_target(config, device))
    engine = TorchEngine(
        student,
        _optimizer(config, student),
        device=device,
        accumulate=accumulate,
        clip_grad=config.recipe.clip_grad,
        precision=precision,
    )
    return timed_update(config, engine, objective, clips, source)


def _optimizer(config: PretrainConfig, student: MaskedAutoencoder) -> torch.optim.Optimizer:
    decay = config.recipe.weight_decay
    groups = parameter_groups(student, decay, also_decayed=student.decayed_tokens)
    return make_adamw(groups, betas=config.recipe.betas)


def _make_models(
    config: PretrainConfig, newest: Path | None, device: torch.device
) -> tuple[MaskedAutoencoder, MaskedAutoencoder | None]:
    """Student and teacher where the run stands: at a checkpoint, at given weights, or fresh."""
    student = build_student(config)
    given = Path(config.init_weights).expanduser() if config.init_weights else None
    source = newest or given
    beside = None if newest else config_beside(config.init_weights)
    if beside is not None:
        check_same_model(config, beside)
    if source is not None:
        fresh = () if newest else ("difficulty_decoder.",)
        lacking = load_weights(student, read_weights(source), source, may_lack=fresh)
        if newest is None:
            log.info("start from the weights of %s", source)
        if lacking:
            log.info("which lack a loss predictor: its %d tensors start fresh", len(lacking))
    teacher = None
    if config.mining.has_teacher:
        teacher = make_teacher(student)
        stored = newest or (given and (given / "teacher.safetensors").is_file())
        if stored:
            assert source is not None
            load_weights(teacher, read_weights(source, "teacher"), source)
        if given and newest is None:
            log.info("the teacher is %s", "of there too" if stored else "a copy of the student")
        teacher.to(device)
    return student.to(device), teacher


def _watch(
    config: PretrainConfig, session: Session, objective: HardPatchesMining, engine: Engine
) -> Watch:
    """Held-out measures, pictures and nearest neighbours, where there are videos for them.

    Of several processes each measures its share of the clips, and the first one draws.
    """
    processes, run_dir = session.processes, session.directory.path
    probe = _neighbour_probe(config, session, engine) if config.knn.train is not None else None
    measured = {
        name: _held_out(config, session, name, config.logging.validation_clips)
        for name in _sources_with_validation(session)
    }
    pictured = {name: _held_out(config, session, name, PICTURED_CLIPS) for name in measured}
    reading = Reading.of(config.data)
    for clips in measured.values():
        find_failures(clips, reading, processes)
    if not measured:
        return Watch(probe=probe, probe_every_epochs=config.knn.every_epochs)

    def validate() -> Measures:
        found: Measures = {}
        with _looking(objective, engine) as (seen, student):
            for name, clips in measured.items():
                share = processes.share(len(clips))
                at_most = min(max(config.recipe.batch_size, 8), CLIPS_PER_PASS)
                with closing(reading.batches(clips, share, at_most)) as batches:
                    measures = measure(seen, student, batches, processes)
                found |= {named(name, what): value for what, value in measures.items()}
        return found

    def draw(done: int) -> None:
        with _looking(objective, engine) as (seen, student):
            for name, clips in pictured.items() if processes.is_first else ():
                shown = collate([clips[i] for i in range(len(clips))])
                folder = run_dir / "pictures" / name
                write_pictures(folder, f"update-{done:08d}", seen, student, shown)
        if processes.is_first and done < session.data.timeline.num_updates:  # at the end: later
            plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")

    return Watch(
        validate,
        score=named(next(iter(measured)), "relative_error"),
        describe=partial(describe_sources, tuple(measured), objective.target.yardstick),
        draw=draw,
        probe=probe,
        probe_every_epochs=config.knn.every_epochs,
    )


def _sources_with_validation(session: Session) -> list[str]:
    """Names of the sources that have held-out clips."""
    there = []
    for name, source in session.data.sources.items():
        if source.validation is None:
            log.info("no %sdata.validation: none of its clips are measured", key_of_source(name))
        else:
            there.append(name)
    return there


@contextmanager
def _looking(
    objective: HardPatchesMining, engine: Engine
) -> Iterator[tuple[HardPatchesMining, WholeModel]]:
    """Objective and student with all weights here, so that a process can look by itself."""
    with ExitStack() as stack:
        student = stack.enter_context(engine.whole(engine.model))
        teacher = objective.teacher
        if teacher is not None:
            whole = stack.enter_context(engine.whole(teacher))
            assert isinstance(whole, MaskedAutoencoder)
            teacher = whole
        yield objective.seen_with(teacher), WholeModel(student, engine.device, engine.precision)


def _held_out(config: PretrainConfig, session: Session, source: str, count: int) -> HeldOutClips:
    """Some held-out clips of a source."""
    how, manifest = config.sources[source], session.data.sources[source].validation
    assert manifest is not None
    return HeldOutClips(
        manifest.spread(count),
        clip_spec(how),
        decoder=how.decoder,
        seed=config.seed,
        source=source,
    )


def describe_sources(sources: Sequence[str], yardstick: str, measures: Measures) -> str:
    """The measures of each source in a few lines, for the terminal."""
    told = []
    for source in sources:
        own = {name: measures[named(source, name)] for name in names_of(source, measures)}
        told.append(f"{source}, {describe(own, yardstick)}" if source else describe(own, yardstick))
    return "\n".join(told)


def names_of(source: str, measures: Measures) -> list[str]:
    """The measures of one source, by the names that those of the main one have."""
    if not source:
        return [name for name in measures if "/" not in name]
    return [name.split("/", 1)[1] for name in measures if name.startswith(f"{source}/")]


def _neighbour_probe(
    config: PretrainConfig, session: Session, engine: Engine
) -> Callable[[], dict[str, float]]:
    """Nearest neighbours of the student's frozen features, on one clip of each video.

    Raises:
        ConfigError, ManifestError: the manifests of ``config.knn`` cannot be used.
    """
    how = config.knn
    assert how.train is not None
    assert how.validation is not None
    manifests = [
        open_manifest(config.data, path).spread(how.videos) for path in (how.train, how.validation)
    ]
    names = names_of_both(*manifests)
    if how.k > len(manifests[0]):
        raise ConfigError(
            f"knn.k must be at most the number of videos of knn.train, {len(manifests[0])}, got "
            f"{how.k}"
        )
    reading, spec = Reading.of(config.data), clip_spec(config.data)
    both = [reading.clips(manifest, spec) for manifest in manifests]
    for clips in both:
        find_failures(clips, reading, session.processes)

    def probe() -> dict[str, float]:
        with engine.whole(engine.model) as student:
            assert isinstance(student, ClipEncoder)
            encoder = Inference.of(student, config.data, engine.device, engine.precision)
            train, held_out = (
                FeatureTable.of(encoder, clips, reading, session.processes) for clips in both
            )
        scores = nearest_neighbours(train, held_out, len(names), [how.k], how.temperature)[how.k]
        return {"knn_top1": summarise(scores, names)["top1"]}

    return probe
