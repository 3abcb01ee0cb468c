"""Fine-tuning for action recognition: from a config to a run, and the test of what it trained."""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hpm_video.config.checks import ConfigError
from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.data.augment import Augmentation
from hpm_video.data.reading import Views
from hpm_video.data.transforms import ClipTransform
from hpm_video.files.weights import load_weights
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.from_config import build_classifier, source_grid_of
from hpm_video.recognition import labels, testing
from hpm_video.recognition.inference import Inference, Reading, find_failures, over_videos
from hpm_video.recognition.objective import Classification, Mixing
from hpm_video.recognition.trained_model import (
    OF_DECODERS,
    OF_POOLING,
    TrainedClassifier,
    open_trained,
)
from hpm_video.runs.data import RunData, open_data, open_manifest
from hpm_video.runs.directory import SAME_ENCODER, RunDirectory, config_beside, note_weights
from hpm_video.runs.report import write_report
from hpm_video.runs.run import run
from hpm_video.runs.task import Task
from hpm_video.training.checkpoint import read_state, read_weights
from hpm_video.training.device import Precision, choose_device
from hpm_video.training.distributed import Processes
from hpm_video.training.ema import MomentumSchedule
from hpm_video.training.engine import Engine
from hpm_video.training.fast import choose_compiling, make_fast
from hpm_video.training.optim import OPTIMIZERS, Tensors, layer_decay_of, parameter_groups
from hpm_video.training.run import Evaluation

log = logging.getLogger(__name__)

WEIGHTS_FILES = {"student": "model", "teacher": "teacher", "average": "average"}
"""Files of a checkpoint by ``init_from``."""


def finetune(config: FinetuneConfig, processes: Processes = Processes()) -> Path:  # noqa: B008
    """Fine-tune, or resume the run in the output directory. -> that directory"""
    return run(Finetuning(config), processes)


class Finetuning(Task[ClipClassifier, Classification]):
    """Classification of clips."""

    config: FinetuneConfig
    same_frames = True

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config, None if config.recipe.average_momentum is None else "average")

    @cached_property
    def data(self) -> RunData:
        """The videos that the config names; class folders are numbered as those of training."""
        data = open_data(self.config)
        main = data.main
        if main.validation is None:
            return data
        validation = labels.numbered_as(main.train.label_names, main.validation)
        return replace(data, sources=data.sources | {"": replace(main, validation=validation)})

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The name of each class."""
        main, count = self.data.main, self.config.model.num_classes
        file = self.config.data.label_names
        return labels.class_names(main.train, main.validation, count=count, file=file)

    def resolve(self, directory: RunDirectory | None = None) -> None:
        self.config = resolve(self.config, len(self.label_names), directory)

    def notes(self, directory: RunDirectory) -> dict[str, str]:
        if directory.newest is not None:
            before = labels.read_label_names(directory.newest / "labels.txt")
            if before != self.label_names:
                raise ConfigError(
                    f"{directory.path} holds a run with other classes ({len(before)}, now "
                    f"{len(self.label_names)}); take another output_dir"
                )
        given, file = self.config.init_weights, WEIGHTS_FILES[self.config.init_from]
        names = "".join(f"{name}\n" for name in self.label_names)
        return {"labels.txt": names, **note_weights(directory, "init_weights", given, file)}

    def model(self) -> ClipClassifier:
        assert self.config.model.num_classes is not None
        return build_classifier(self.config, self.config.model.num_classes)

    def initialise(self, model: ClipClassifier) -> Tensors | None:
        given = self.config.init_weights
        if given is None:
            log.info("no init_weights: the model starts from scratch")
        else:
            load_pretrained(model, Path(given).expanduser(), self.config, self.label_names)
        return None

    def optimizer(self, model: ClipClassifier) -> torch.optim.Optimizer:
        recipe = self.config.recipe
        scale = layer_decay_of(model.layer_of, model.num_layers, recipe.layer_decay)
        groups = parameter_groups(model, recipe.weight_decay, scale)
        return OPTIMIZERS[recipe.optimizer](groups, betas=recipe.betas)

    def transforms(self) -> dict[str, ClipTransform]:
        how, data = self.config.augmentation, self.config.data
        look = (data.mean, data.std, data.interpolation)
        crop = Augmentation(how.area, how.ratio, data.flip, how.rand_augment, how.erasing, *look)
        return {"": crop}

    def objective(
        self, ema: ClipClassifier | None, _device: torch.device, engine: Engine | None = None
    ) -> Classification:
        config, how = self.config, self.config.augmentation
        assert config.model.num_classes is not None
        momentum = config.recipe.average_momentum or 0.0
        return Classification(
            mean=config.data.mean,
            std=config.data.std,
            label_smoothing=how.label_smoothing,
            mixing=Mixing(config.model.num_classes, how) if how.mixes else None,
            ema=ema,
            momentum=MomentumSchedule("paper", momentum, momentum),
            seed=config.seed,
            **({"ema_update": engine.ema_update} if engine else {}),
        )

    def evaluation(self, _folder: Path, objective: Classification, engine: Engine) -> Evaluation:
        """Measure the accuracy on one view of each validation video, a share in each process."""
        config, processes = self.config, engine.processes
        if self.data.main.validation is None:
            return Evaluation()
        manifest = self.data.main.validation.spread(config.logging.validation_clips)
        reading = Reading.of(config.data, exclude_bad_files=config.test.exclude_bad_files)
        clips, per_pass = reading.clips(manifest, config.data), config.test.clips_per_pass
        find_failures(clips, reading, processes)
        measured = objective.ema if config.test.weights == "average" else engine.model
        assert measured is not None
        names = self.label_names

        def validate() -> dict[str, float]:
            with engine.gathered(measured) as model:
                assert isinstance(model, ClipClassifier)
                classifier = Inference(
                    model, config.data, engine.device, engine.precision, per_pass
                )
                found = over_videos(classifier.probabilities, clips, reading, processes, per_pass)
            result = testing.summarise(found, names)
            of_label = np.take_along_axis(found.values, found.labels[:, None], axis=1)
            cross_entropy = float(-np.nanmean(np.log(np.maximum(of_label, 1e-12))))
            tops = {
                name: result[name] for name in ("top1", "top5")[: 1 + (len(names) > testing.TOP)]
            }
            return tops | {"cross_entropy": cross_entropy}

        return Evaluation(validate, score="top1", more_is_better=True, describe=_describe_measures)


def resolve(
    config: FinetuneConfig, num_classes: int, directory: RunDirectory | None = None
) -> FinetuneConfig:
    """Fill in the number of classes and the grid of pre-training, which a run keeps once begun."""
    grid, source = config.model.pretrained_grid, config_beside(config)
    if grid is None and directory is not None and directory.newest is not None:
        before = load_any_config(directory.newest / "config.yaml")
        grid = before.model.pretrained_grid if isinstance(before, FinetuneConfig) else None
    if grid is None and source is not None:
        grid = source_grid_of(source)
    if grid is None and config.init_weights is not None:
        log.warning(
            "nothing beside init_weights=%s says which clips it was trained on: positions are "
            "those of this run's clips; else give model.pretrained_grid=[TIME,HEIGHT,WIDTH]",
            config.init_weights,
        )
    model = replace(config.model, num_classes=num_classes, pretrained_grid=grid)
    return replace(config, model=model)


def for_checkpoint(
    config: FinetuneConfig, checkpoint: Path, weights: Literal["student", "teacher", "untrained"]
) -> FinetuneConfig:
    """Adapt a config to the encoder of a pre-training run, and to the clips of that run."""
    source = load_any_config(checkpoint / "config.yaml")
    grid = source_grid_of(source)
    clips = {item.name: getattr(source.data, item.name) for item in fields(DataConfig)}
    clips |= {"repeats": config.data.repeats, "flip": config.data.flip, "max_frame_stride": None}
    encoder = {name: getattr(source.model, name) for name in SAME_ENCODER}
    return replace(
        config,
        init_weights=None if weights == "untrained" else str(checkpoint),
        init_from="teacher" if weights == "teacher" else "student",
        # Clips of one time step are not spread over anything.
        test=replace(config.test, clips=1) if grid[0] == 1 else config.test,
        model=replace(config.model, init="xavier", pretrained_grid=grid, **encoder),
        data=DataConfig(**clips),
    )


def load_pretrained(
    model: ClipClassifier, source: Path, config: FinetuneConfig, label_names: Sequence[str]
) -> None:
    """Put an encoder or a classifier into ``model``, the head where the classes are the same."""
    stored = read_weights(source, config.model.patch_size, WEIGHTS_FILES[config.init_from])
    own, listed = model.state_dict(), source / "labels.txt"
    head = stored.get("head.weight")
    same_classes = head is not None and head.shape == own["head.weight"].shape
    if same_classes and listed.is_file():
        same_classes = labels.read_label_names(listed) == tuple(label_names)
    weights = {
        key: value for key, value in stored.items() if same_classes or not key.startswith("head.")
    }
    norm = ("norm.",) if config.model.pooling == "mean_norm" else ()
    fresh = load_weights(
        model,
        weights,
        source,
        may_lack=(*OF_POOLING, "head."),
        may_leave=(*OF_DECODERS, *OF_POOLING, *norm),
    )
    whose = "" if config.init_from == "student" else f"the {config.init_from}'s "
    log.info("start from %sweights of %s", whose, source)
    log.info("  start fresh: %s", ", ".join(fresh) or "none")
    left = [key for key in stored if key not in weights or key not in own]
    parts = dict.fromkeys(k.split(".")[0] if k.startswith(OF_DECODERS) else k for k in left)
    log.info("  left out: %s", ", ".join(parts) or "none")


def _describe_measures(measures: dict[str, float]) -> str:
    words = {"top1": "top-1", "top5": "top-5", "cross_entropy": "cross-entropy"}
    return "validation: " + ", ".join(f"{words[key]} {measures[key]:.3f}" for key in measures)


def evaluate_run(
    config: FinetuneConfig,
    run_dir: Path,
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
) -> dict[str, Any] | None:
    """Test a finished run as its config says. -> the result, none without a manifest to test on

    It is written to ``test/``, and the same test of the same weights and videos is not repeated.

    Raises:
        BadFilesError, ConfigError, ManifestError, CheckpointError: the test cannot be run.
    """
    how = config.test
    source = how.manifest or config.data.validation
    if source is None:
        log.info("no data.validation and no test.manifest: nothing is tested")
        return None
    # Of one process: a link that was just replaced may be seen late elsewhere.
    checkpoint = processes.of_first((run_dir / "checkpoints" / how.checkpoint).resolve)
    precision: Precision = read_state(checkpoint, of_run=True)["facts"]["precision"]
    key = "test.manifest" if how.manifest else "data.validation"
    manifest, views = open_manifest(config.data, source, key), Views(how.clips, how.crops)
    trained = open_trained(checkpoint, TrainedClassifier, how.weights)
    engine = config.engine
    device = choose_device(engine.device, processes.count)
    classifier = Inference.load(trained, device, precision)
    make_fast(choose_compiling(engine, device), classifier.model, residual=engine.residual)
    what = {
        "checkpoint": str(run_dir / "checkpoints" / checkpoint.name),
        "chosen_as": how.checkpoint,
        "manifest": source,
        "exclude_bad_files": how.exclude_bad_files,
        **testing.describe_test(trained, classifier, manifest, views),
    }
    name = f"{how.checkpoint}-{how.weights}-{how.clips}x{how.crops}-{Path(source).stem}"
    folder = run_dir / "test" / name
    before = processes.of_first(lambda: _result_before(folder / "result.json", what))
    if before is not None:
        return before
    log.info("testing %s", _describe_test(what))
    reading = Reading.of(config.data, exclude_bad_files=how.exclude_bad_files)
    names = trained.label_names
    scores = testing.score_videos(classifier, names, manifest, views, reading, processes)
    result = {"folder": str(folder), "test": what, **testing.summarise(scores, names)}
    if processes.is_first:
        testing.write_results(folder, scores, result, names)
        write_report(run_dir)
    return result


def _result_before(path: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of the same test, if it was written."""
    with suppress(OSError, ValueError):
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if before.get("test") == what:
            return before
    return None


def _describe_test(how: dict[str, Any]) -> str:
    return (
        f"the {how['chosen_as']} checkpoint ({how['weights']} of update {how['update']}), "
        f"{how['clips']} x {how['crops']} views of each video"
    )


def describe_evaluation(result: dict[str, Any]) -> str:
    """Describe the result of :func:`evaluate_run` for the terminal."""
    return f"{_describe_test(result['test'])}:\n{testing.describe(result)}"
