"""Fine-tuning for action recognition: from a config to an assembled run, and its test."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.data.augment import Augmentation
from hpm_video.data.clips import Views
from hpm_video.files.atomic import written_beside
from hpm_video.files.weights import load_weights
from hpm_video.mining.teacher import make_teacher
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.from_config import build_classifier, source_grid_of
from hpm_video.recognition.inference import (
    Inference,
    Reading,
    clip_spec,
    find_failures,
    over_videos,
)
from hpm_video.recognition.labels import (
    check_labels,
    check_same_names,
    read_label_names,
    with_numbers,
)
from hpm_video.recognition.mixing import Mixing
from hpm_video.recognition.objective import Classification
from hpm_video.recognition.testing import (
    Scores,
    describe,
    describe_test,
    score_videos,
    summarise,
    write_results,
)
from hpm_video.recognition.trained_model import OF_DECODERS, TrainedClassifier, open_trained
from hpm_video.runs.init_weights import SAME_ENCODER, check_same_model, config_beside
from hpm_video.runs.run import (
    RunData,
    RunDirectory,
    Session,
    claim,
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
from hpm_video.training.checkpoint import read_state, read_weights, weights_digest
from hpm_video.training.curves import plot_curves
from hpm_video.training.device import Precision, choose_device
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import Engine, TorchEngine
from hpm_video.training.optim import layer_decay_of, make_adamw, make_sgd, parameter_groups
from hpm_video.training.run import Watch

log = logging.getLogger(__name__)

START = "init_weights.sha256"
"""File of the run directory that tells the weights it began with."""


def finetune(config: FinetuneConfig, processes: Processes = Processes()) -> Path:  # noqa: B008
    """Fine-tune as ``config`` says, or go on where its run directory stands. -> that directory

    Raises:
        ConfigError: the config cannot be run, or the directory holds a run of another one.
        ManifestError: the data cannot be read.
        CheckpointError: weights cannot be read, or do not fit.
        And what ``fit`` raises.
    """
    data = open_data(config)
    label_names = find_label_names(config, data)
    with locked(config, processes):
        before = RunDirectory.at(Path(config.output_dir).expanduser())
        config = resolve(config, len(label_names), before)
        session = open_session(FinetuneConfig, config, data, processes)
        directory = session.directory
        _check_same_names(directory, label_names)
        start = _check_same_start(config, directory)
        models = _make_models(config, directory.newest, session.device, label_names)
        if directory.newest is None and config.init_weights is None:
            log.info("no init_weights: the model starts from scratch")
        claim(session, config)
        if processes.is_first:
            with written_beside(directory.path / "labels.txt") as path:
                path.write_text("".join(f"{name}\n" for name in label_names), encoding="utf-8")
            with written_beside(directory.path / START) as path:
                path.write_text(f"{start}\n")
        if session.is_complete:
            log.info("%s is complete: %d updates were made", directory.path, directory.update)
        else:
            _train(config, session, models)
        if processes.is_first:
            plot_curves(directory.path / "metrics.jsonl", directory.path / "curves.png")
    return directory.path


def _train(
    config: FinetuneConfig,
    session: Session,
    models: tuple[ClipClassifier, ClipClassifier | None],
) -> None:
    model, average = models
    maker, multiple = partial(make_update, config), multiple_of(config)
    precision = settle_precision(config, session, maker)
    plan = settle_plan(config, session, precision, maker, multiple)
    engine = make_engine(config, session, plan, precision, model, make_optimizer(config, model))
    if average is not None:
        engine.hold(average)
    objective = build_objective(config, average)
    train(
        config,
        session,
        plan,
        engine=engine,
        objective=objective,
        clips=training_clips(config, session.data, {"": augmentation(config)}, same_frames=True),
        watch=_watch(config, session, objective, engine, model.head.out_features),
    )


def multiple_of(config: FinetuneConfig) -> int:
    """What the videos of a forward pass must be a multiple of.

    Mixing pairs them, and a batch norm needs two clips at least.
    """
    needs_two_clips = config.model.pooling == "batch_norm" and config.data.repeats == 1
    return 2 if config.augmentation.mixes or needs_two_clips else 1


def evaluate_run(
    config: FinetuneConfig,
    run_dir: Path,
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
) -> dict[str, Any] | None:
    """Test a finished run as its config says. -> the result, none without a manifest to test on

    Of several processes each tests a share of the videos. The result is written to a folder in
    ``test/`` that is named by what is tested and how. The same test of the same weights and videos
    is not repeated.

    Raises:
        BadVideosError: videos do not decode.
        ConfigError, ManifestError, CheckpointError: the test cannot be run.
    """
    how = config.test
    source = how.manifest or config.data.validation
    if source is None:
        log.info("no data.validation and no test.manifest: nothing is tested")
        return None
    # Of one process: a link that was just replaced may be seen late elsewhere.
    checkpoint = processes.of_first((run_dir / "checkpoints" / how.checkpoint).resolve)
    precision: Precision = read_state(checkpoint, of_run=True)["facts"]["precision"]
    manifest, views = open_manifest(config.data, source), Views(how.clips, how.crops)
    device = choose_device(config.engine.device, processes.count)
    trained = open_trained(checkpoint, TrainedClassifier, how.weights)
    classifier = Inference.load(trained, device, precision)
    what = {
        "checkpoint": str(run_dir / "checkpoints" / checkpoint.name),
        "chosen_as": how.checkpoint,
        "manifest": source,
        "exclude_bad_files": how.exclude_bad_files,
        **describe_test(trained, classifier, manifest, views),
    }
    folder = run_dir / "test" / name_of_test(config, source)
    path = folder / "result.json"
    before = processes.of_first(lambda: _result_before(path, what))
    if before is not None:
        return before
    log.info(
        "testing the %s checkpoint (%s of update %d) with %d x %d views of each video",
        how.checkpoint,
        how.weights,
        what["update"],
        how.clips,
        how.crops,
    )
    reading = Reading.of(config.data, exclude_bad_files=how.exclude_bad_files)
    names = trained.label_names
    scores = score_videos(classifier, names, manifest, views, reading, processes)
    result = {"folder": str(folder), "test": what, **summarise(scores, names)}
    if processes.is_first:
        write_results(folder, scores, result, names)
    return result


def _result_before(path: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    """The result that was written of the same test. One of another test is removed."""
    if not path.is_file():
        return None
    try:
        before: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # it was not written whole
        before = None
    if isinstance(before, dict) and before.get("test") == what:
        return before
    path.unlink()  # of other weights or videos: what lies there is not to be mixed
    return None


def name_of_test(config: FinetuneConfig, source: str) -> str:
    """Of the folder of a test: checkpoint, weights, views and videos."""
    how = config.test
    return f"{how.checkpoint}-{how.weights}-{how.clips}x{how.crops}-{Path(source).stem}"


# --- From a config to its parts -----------------------------------------------------------------


def find_label_names(config: FinetuneConfig, data: RunData) -> tuple[str, ...]:
    """The name of each class: of the file in the config, of the manifest, or else its number.

    Raises:
        ConfigError: they do not fit the number of classes of the config.
        ManifestError: a video has no label or one beyond them, or the manifests disagree.
    """
    count = config.model.num_classes
    if config.data.label_names is not None:
        names = read_label_names(Path(config.data.label_names).expanduser())
        check_same_names(names, data.train)
    else:
        used = max(data.train.labels, default=-1) + 1
        names = with_numbers(data.train.label_names or (), count or used)
    if count is not None and len(names) != count:
        raise ConfigError(
            f"model.num_classes is {count}, but there are names for {len(names)} classes; take "
            f"model.num_classes={len(names)}, or other data.label_names"
        )
    if len(names) < 2:
        raise ConfigError(
            f"a classifier needs two classes at least, and {config.data.train} has {len(names)}; "
            f"give a manifest with a column label, or a folder of class folders"
        )
    check_labels(data.train, len(names), "the videos of data.train")
    without = [name for label, name in enumerate(names) if label not in set(data.train.labels)]
    if without:
        log.warning("no training video of %d classes: %s", len(without), ", ".join(without[:10]))
    if data.validation is not None:
        check_labels(data.validation, len(names), "the videos of data.validation")
        check_same_names(names, data.validation)
    return names


def _check_same_names(directory: RunDirectory, label_names: tuple[str, ...]) -> None:
    if directory.newest is not None:
        before = read_label_names(directory.newest / "labels.txt")
        if before != label_names:
            raise ConfigError(
                f"{directory.path} holds a run with other classes ({len(before)}, now "
                f"{len(label_names)}); take another output_dir"
            )


def _check_same_start(config: FinetuneConfig, directory: RunDirectory) -> str:
    """The SHA-256 of the weights that a run begins with, as it was when the run began.

    Raises:
        ConfigError: other weights lie there now.
    """
    path = directory.path / START
    before = path.read_text().strip() if directory.newest and path.is_file() else None
    now = "scratch"
    if config.init_weights is not None:
        source = Path(config.init_weights).expanduser()
        if before is not None and not source.exists():
            return before  # a run that goes on does not need them
        now = weights_digest(source, weights_file(config))
    if before is not None and before != now:
        raise ConfigError(
            f"{directory.path} began with other weights than init_weights={config.init_weights} "
            f"holds now; take another output_dir, or delete this run to begin anew"
        )
    return now


def weights_file(config: FinetuneConfig) -> str:
    """Name of the file in the checkpoint ``init_weights`` that a run begins with."""
    return "model" if config.init_from == "student" else config.init_from


def resolve(
    config: FinetuneConfig, num_classes: int, directory: RunDirectory | None = None
) -> FinetuneConfig:
    """The config with what it left open: the number of classes, and the grid of pre-training.

    A run that goes on in ``directory`` knows that grid, though its ``init_weights`` may be gone.

    Raises:
        ConfigError: the encoder of ``init_weights`` is of another shape.
    """
    model = replace(config.model, num_classes=num_classes)
    if directory is not None and directory.newest is not None and model.pretrained_grid is None:
        before = load_any_config(directory.newest / "config.yaml")
        if isinstance(before, FinetuneConfig):
            model = replace(model, pretrained_grid=before.model.pretrained_grid)
    source = config_beside(config.init_weights)
    if source is not None:
        check_same_model(config, source)
        if model.pretrained_grid is None:
            model = replace(model, pretrained_grid=source_grid_of(source))
    elif config.init_weights is not None and model.pretrained_grid is None:
        log.warning(
            "nothing beside init_weights=%s says which clips it was trained on: positions are "
            "those of this run's clips; else give model.pretrained_grid=[TIME,HEIGHT,WIDTH]",
            config.init_weights,
        )
    return replace(config, model=model)


def for_checkpoint(
    config: FinetuneConfig, checkpoint: Path, weights: Literal["student", "teacher", "untrained"]
) -> FinetuneConfig:
    """The config for the encoder of a pre-training run, and for clips as it was trained on.

    Raises:
        ConfigError: ``checkpoint`` is no folder of a run's checkpoint.
    """
    source = load_any_config(checkpoint / "config.yaml")
    # Clips of one time step are not spread over anything.
    test = replace(config.test, clips=1) if source_grid_of(source)[0] == 1 else config.test
    return replace(
        config,
        init_weights=None if weights == "untrained" else str(checkpoint),
        init_from="teacher" if weights == "teacher" else "student",
        test=test,
        model=replace(
            config.model,
            init="xavier",
            pretrained_grid=source_grid_of(source),
            **{name: getattr(source.model, name) for name in SAME_ENCODER},
        ),
        data=replace(
            source.data.plain(),
            max_frame_stride=None,
            repeats=config.data.repeats,
            flip=config.data.flip,
        ),
    )


def build_objective(config: FinetuneConfig, average: ClipClassifier | None) -> Classification:
    """Classification as a config wants it."""
    how = config.augmentation
    assert config.model.num_classes is not None
    mixing = None
    if how.mixes:
        mixing = Mixing(
            config.model.num_classes,
            mixup=how.mixup,
            cutmix=how.cutmix,
            probability=how.mix_probability,
            switch_probability=how.cutmix_probability,
            label_smoothing=how.label_smoothing,
        )
    return Classification(
        mean=config.data.mean,
        std=config.data.std,
        label_smoothing=how.label_smoothing,
        mixing=mixing,
        average=average,
        average_momentum=config.recipe.average_momentum or 0.0,
        seed=config.seed,
    )


def augmentation(config: FinetuneConfig) -> Augmentation:
    """The random changes of training clips."""
    how = config.augmentation
    return Augmentation(
        area=how.area,
        ratio=how.ratio,
        flip=config.data.flip,
        rand_augment=how.rand_augment,
        erasing=how.erasing,
        mean=config.data.mean,
        std=config.data.std,
        interpolation=config.data.interpolation,
    )


def make_optimizer(config: FinetuneConfig, model: ClipClassifier) -> torch.optim.Optimizer:
    """The optimizer of a config, each layer at its share of the learning rate."""
    recipe = config.recipe
    scale = layer_decay_of(model.layer_of, model.num_layers, recipe.layer_decay)
    groups = parameter_groups(model, recipe.weight_decay, scale)
    if recipe.optimizer == "sgd":
        return make_sgd(groups, momentum=recipe.betas[0])
    return make_adamw(groups, betas=recipe.betas)


def make_update(
    config: FinetuneConfig,
    device: torch.device,
    precision: Precision,
    clips: int,
    *,
    source: str = "",
    accumulate: int = 1,
) -> Callable[[], None]:
    """A whole update on random clips by one process, to see how long it takes and what it needs.

    ``config`` is a resolved one.
    """
    config = replace(config, init_weights=None)
    model, average = _make_models(config, None, device)
    engine = TorchEngine(
        model,
        make_optimizer(config, model),
        device=device,
        accumulate=accumulate,
        clip_grad=config.recipe.clip_grad,
        precision=precision,
    )
    objective = build_objective(config, average)
    return timed_update(config, engine, objective, clips + clips % 2, source)


def _make_models(
    config: FinetuneConfig,
    newest: Path | None,
    device: torch.device,
    label_names: Sequence[str] = (),
) -> tuple[ClipClassifier, ClipClassifier | None]:
    """The classifier and its average where the run stands: at a checkpoint, or at the start."""
    assert config.model.num_classes is not None
    model = build_classifier(config, config.model.num_classes)
    if newest is not None:
        load_weights(model, read_weights(newest), newest)
    elif config.init_weights is not None:
        load_pretrained(model, Path(config.init_weights).expanduser(), config, label_names)
    average = None
    if config.recipe.average_momentum is not None:
        average = make_teacher(model)
        if newest is not None:
            load_weights(average, read_weights(newest, "average"), newest)
        average.to(device)
    return model.to(device), average


def load_pretrained(
    model: ClipClassifier, source: Path, config: FinetuneConfig, label_names: Sequence[str]
) -> None:
    """Put the encoder of a masked autoencoder, or a classifier, into ``model``.

    The head of a classifier is taken if its classes are the same; otherwise, as where there is
    none, it starts fresh.

    Raises:
        CheckpointError: the weights do not fit; every key left over or missing is named.
    """
    stored = read_weights(source, weights_file(config))
    own = model.state_dict()
    weights = dict(stored)
    if not _has_these_classes(source, stored, own, label_names):
        weights = {key: value for key, value in stored.items() if not key.startswith("head.")}
    norm = ("encoder.norm.",) if config.model.pooling == "mean_norm" else ()
    fresh = load_weights(
        model,
        weights,
        source,
        may_lack=("pooling.", "head."),
        may_leave=(*OF_DECODERS, "pooling.", *norm),
    )
    whose = "" if config.init_from == "student" else f"the {config.init_from}'s "
    log.info("start from %sweights of %s", whose, source)
    log.info("  start fresh: %s", ", ".join(fresh) or "none")
    left = dict.fromkeys(
        key if key.startswith(("encoder.", "pooling.", "head.")) else key.split(".")[0]
        for key in stored
        if key not in weights or key not in own
    )
    log.info("  left out: %s", ", ".join(left) or "none")


def _has_these_classes(
    source: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor], names: Sequence[str]
) -> bool:
    """Whether weights have a head, and one for these classes as far as that can be known."""
    if "head.weight" not in stored or stored["head.weight"].shape != own["head.weight"].shape:
        return False
    listed = source / "labels.txt"
    return not listed.is_file() or read_label_names(listed) == tuple(names)


# --- What a run looks at ------------------------------------------------------------------------


def _watch(
    config: FinetuneConfig,
    session: Session,
    objective: Classification,
    engine: Engine,
    num_classes: int,
) -> Watch:
    """Accuracy on held-out videos, one view of each, where there is a validation manifest.

    Of several processes each sees its share of the videos.
    """
    processes, run_dir = session.processes, session.directory.path
    if session.data.validation is None:
        log.info("no data.validation: nothing is measured on held-out videos")
        return Watch()
    manifest = session.data.validation.spread(config.logging.validation_clips)
    reading = Reading.of(config.data, exclude_bad_files=config.test.exclude_bad_files)
    clips = reading.clips(manifest, clip_spec(config.data))
    find_failures(clips, reading, processes)
    measured = objective.average if config.test.weights == "average" else engine.model
    assert measured is not None
    names = [str(label) for label in range(num_classes)]

    def validate() -> dict[str, float]:
        with engine.whole(measured) as model:
            assert isinstance(model, ClipClassifier)
            per_pass = config.test.clips_per_pass
            classifier = Inference.of(model, config.data, engine.device, engine.precision, per_pass)
            values = classifier.probabilities
            scores = Scores(manifest, over_videos(values, clips, reading, processes, per_pass))
        return _measures_of(scores, names)

    def draw(done: int) -> None:
        if processes.is_first and done < session.data.timeline.num_updates:  # at the end: later
            plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")

    return Watch(
        validate, score="top1", more_is_better=True, describe=_describe_held_out, draw=draw
    )


def _measures_of(scores: Scores, names: Sequence[str]) -> dict[str, float]:
    result = summarise(scores, names)
    of_label = np.take_along_axis(scores.probabilities, scores.labels[:, None], axis=1)
    return {
        "top1": result["top1"],
        "top5": result["top5"],
        "cross_entropy": float(-np.nanmean(np.log(np.maximum(of_label, 1e-12)))),
    }


def _describe_held_out(measures: dict[str, float]) -> str:
    return (
        f"held out: top-1 {measures['top1']:.3f}, top-5 {measures['top5']:.3f}, cross-entropy "
        f"{measures['cross_entropy']:.3f}"
    )


def describe_evaluation(result: dict[str, Any]) -> str:
    """The result of :func:`evaluate_run` in some lines, for the terminal."""
    how = result["test"]
    return (
        f"the {how['chosen_as']} checkpoint ({how['weights']} of update {how['update']}), "
        f"{how['clips']} x {how['crops']} views of each video:\n{describe(result)}"
    )
