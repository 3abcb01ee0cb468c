"""Pre-training: from a config to an assembled run."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpm_video.config.checks import ConfigError, check
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.augment import Augmentation
from hpm_video.data.batch import collate
from hpm_video.data.clips import ValidationClips
from hpm_video.data.transforms import ClipTransform, MultiScaleCrop
from hpm_video.files.weights import load_weights
from hpm_video.mining.objective import OBJECTIVES, HardPatchesMining, named
from hpm_video.mining.pictures import write_pictures
from hpm_video.mining.targets import TARGETS, FeatureTarget, Target
from hpm_video.mining.validation import Measures, describe, measure
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.feature_model import load_feature_model
from hpm_video.models.from_config import build_student
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.recognition.inference import (
    CLIPS_PER_PASS,
    Inference,
    Reading,
    find_failures,
    over_videos,
)
from hpm_video.recognition.labels import class_names, numbered_as
from hpm_video.recognition.probes import nearest_neighbours
from hpm_video.recognition.testing import summarise
from hpm_video.recognition.trained_model import TrainedAutoencoder, open_trained
from hpm_video.runs.data import open_manifest
from hpm_video.runs.directory import RunDirectory, config_beside, note_weights
from hpm_video.runs.run import run
from hpm_video.runs.task import Task
from hpm_video.training.checkpoint import read_weights
from hpm_video.training.distributed import Processes
from hpm_video.training.ema import MomentumSchedule
from hpm_video.training.engine import Engine, Runner
from hpm_video.training.optim import OPTIMIZERS, Tensors, parameter_groups
from hpm_video.training.run import Evaluation
from hpm_video.weights.files import read_image_tower

log = logging.getLogger(__name__)

PICTURED_CLIPS = 4
"""Validation clips that are drawn during training."""


def build_target(config: PretrainConfig, device: torch.device) -> Target:
    """Build what is to be reconstructed."""
    mining, patch_size = config.mining, config.model.patch_size
    look = (patch_size, config.data.mean, config.data.std)
    if mining.feature_kind is None:
        return TARGETS[mining.target](*look)
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
    device: torch.device,
    engine: Engine | None = None,
) -> HardPatchesMining:
    """Build the objective of a config. ``engine``: the one that shards the teacher, if any does."""
    mining = config.mining
    by_engine: dict[str, Any] = {}
    if engine is not None:
        by_engine = {"gathered": engine.gathered, "ema_update": engine.ema_update}
    return OBJECTIVES[mining.objective](
        {name: config.mask_rule(name) for name in config.sources},
        build_target(config, device),
        predictor=mining.predictor,
        predictor_weight=mining.predictor_weight,
        ema=teacher,
        momentum=MomentumSchedule(mining.momentum, mining.first_momentum, mining.last_momentum),
        teacher_sees=mining.teacher_sees,
        decoded_share=mining.decoded_share,
        **by_engine,
    )


def load_run(
    checkpoint: Path, device: torch.device, overrides: Sequence[str] = ()
) -> tuple[PretrainConfig, MaskedAutoencoder, HardPatchesMining]:
    """Load config (with ``overrides``), student and objective from a checkpoint folder."""
    trained = open_trained(checkpoint, TrainedAutoencoder, overrides=overrides)
    config, student, teacher = trained.config, trained.build(), None
    if config.mining.has_teacher:
        of_teacher = open_trained(checkpoint, TrainedAutoencoder, "teacher", overrides=overrides)
        teacher = of_teacher.build().requires_grad_(requires_grad=False).to(device)
    return config, student.to(device), build_objective(config, teacher, device)


def pretrain(config: PretrainConfig, processes: Processes = Processes()) -> Path:  # noqa: B008
    """Pre-train, or resume the run in the output directory. -> that directory"""
    return run(Pretraining(config), processes)


class Pretraining(Task[MaskedAutoencoder, HardPatchesMining]):
    """Hard patches mining; without a loss predictor, a plain masked autoencoder."""

    config: PretrainConfig

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config, "teacher" if config.mining.has_teacher else None)

    def notes(self, directory: RunDirectory) -> dict[str, str]:
        given = self.config.mining.feature_weights
        return {} if given is None else note_weights(directory, "mining.feature_weights", given)

    def model(self) -> MaskedAutoencoder:
        return build_student(self.config)

    def initialise(self, model: MaskedAutoencoder) -> Tensors | None:
        given = self.config.init_weights
        if given is None:
            return None
        config_beside(self.config)
        source, patch_size = Path(given).expanduser(), self.config.model.patch_size
        weights = read_weights(source, patch_size)
        lacking = load_weights(model, weights, source, may_lack=("difficulty_decoder.",))
        log.info("start from the weights of %s", source)
        if lacking:
            log.info("which lack a loss predictor: its %d tensors start fresh", len(lacking))
        if self.ema is None:
            return None
        stored = (source / "teacher.safetensors").is_file()
        log.info("the teacher is %s", "of there too" if stored else "a copy of the student")
        return read_weights(source, patch_size, "teacher") if stored else None

    def optimizer(self, model: MaskedAutoencoder) -> torch.optim.Optimizer:
        recipe = self.config.recipe
        groups = parameter_groups(model, recipe.weight_decay, also_decayed=model.decayed_tokens)
        return OPTIMIZERS[recipe.optimizer](groups, betas=recipe.betas)

    def transforms(self) -> dict[str, ClipTransform]:
        found: dict[str, ClipTransform] = {}
        for name, data in self.config.sources.items():
            found[name] = MultiScaleCrop(data.flip, data.interpolation)
            if data.crop == "random_resized":
                look, ratio = (data.mean, data.std, data.interpolation), (3 / 4, 4 / 3)
                found[name] = Augmentation(data.crop_area, ratio, data.flip, None, 0.0, *look)
        return found

    def objective(
        self, ema: MaskedAutoencoder | None, device: torch.device, engine: Engine | None = None
    ) -> HardPatchesMining:
        return build_objective(self.config, ema, device, engine)

    def evaluation(self, folder: Path, objective: HardPatchesMining, engine: Engine) -> Evaluation:
        """Measure clips of each source, a share in each process, draw some, and probe features."""
        config, processes = self.config, engine.processes
        probe = _neighbour_probe(config, processes, engine) if config.knn.train else None
        reading = Reading.of(config.data)
        measured: dict[str, ValidationClips] = {}
        for name, source in self.data.sources.items():
            if source.validation is None:
                continue
            measured[name] = self._validation_clips(name, config.logging.validation_clips)
            find_failures(measured[name], reading, processes)

        def validate() -> Measures:
            found: Measures = {}
            with _gathered(objective, engine) as (seen, student):
                for name, clips in measured.items():
                    share = processes.share(len(clips))
                    at_most = min(max(config.recipe.batch_size, 8), CLIPS_PER_PASS)
                    with closing(reading.batches(clips, share, at_most)) as batches:
                        measures = measure(seen, student, batches, processes)
                    found |= {named(name, what): value for what, value in measures.items()}
            return found

        def draw(done: int) -> None:
            with _gathered(objective, engine) as (seen, student):
                for name in measured if processes.is_first else ():
                    clips = self._validation_clips(name, PICTURED_CLIPS)
                    shown = collate([clips[i] for i in range(len(clips))])
                    sheet = f"update-{done:08d}"
                    write_pictures(folder / "pictures" / name, sheet, seen, student, shown)

        return Evaluation(
            validate if measured else None,
            score=named(next(iter(measured), ""), "relative_error"),
            describe=partial(describe_sources, tuple(measured), objective.target.baseline),
            draw=draw if measured else None,
            probe=probe,
            probe_every_epochs=config.knn.every_epochs,
        )

    def _validation_clips(self, source: str, count: int) -> ValidationClips:
        manifest = self.data.sources[source].validation
        assert manifest is not None
        how, seed = self.config.sources[source], self.config.seed
        return ValidationClips(manifest.spread(count), how, seed=seed, source=source)


@contextmanager
def _gathered(
    objective: HardPatchesMining, engine: Engine
) -> Iterator[tuple[HardPatchesMining, Runner]]:
    """Yield objective and student with all weights, so that any process can call them alone."""
    with ExitStack() as stack:
        student = stack.enter_context(engine.gathered(engine.model))
        teacher = objective.ema
        if teacher is not None:
            gathered = stack.enter_context(engine.gathered(teacher))
            assert isinstance(gathered, MaskedAutoencoder)
            teacher = gathered
        yield objective.with_teacher(teacher), Runner(student, engine.device, engine.precision)


def describe_sources(sources: Sequence[str], baseline: str, measures: Measures) -> str:
    """Return the measures of each source in a few lines, for the terminal."""
    own: dict[str, Measures] = {source: {} for source in sources}
    for name, value in measures.items():
        source, _, measure_of_source = name.rpartition("/")
        own[source][measure_of_source] = value
    return "\n".join(
        f"{source}{source and ', '}{describe(values, baseline)}" for source, values in own.items()
    )


def _neighbour_probe(
    config: PretrainConfig, processes: Processes, engine: Engine
) -> Callable[[], dict[str, float]]:
    """Return a function that tests nearest neighbours by the student's frozen features."""
    how = config.knn
    assert how.train is not None
    assert how.validation is not None
    lists = {"knn.train": how.train, "knn.validation": how.validation}
    train, validation = (
        open_manifest(config.data, path, key).spread(how.videos) for key, path in lists.items()
    )
    validation = numbered_as(train.label_names, validation)
    names = class_names(train, validation)
    check("knn.k", how.k, f"be at most {len(train)}, as knn.train", lambda k: k <= len(train))
    reading = Reading.of(config.data)
    both = [reading.clips(manifest, config.data) for manifest in (train, validation)]
    for clips in both:
        find_failures(clips, reading, processes)

    def probe() -> dict[str, float]:
        with engine.gathered(engine.model) as student:
            assert isinstance(student, ClipEncoder)
            encoder = Inference(student, config.data, engine.device, engine.precision)
            bank, asked = (over_videos(encoder.pooled, each, reading, processes) for each in both)
        scores = nearest_neighbours(bank, asked, len(names), [how.k], how.temperature)[how.k]
        return {"knn_top1": summarise(scores, names)["top1"]}

    return probe
