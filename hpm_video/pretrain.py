"""Pre-training: from a config to an assembled run."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hpm_video.config import ConfigError, PretrainConfig, load_config
from hpm_video.curves import plot_curves
from hpm_video.data.dataset import MIDDLE, HeldOutClips, collate
from hpm_video.data.loader import held_out_batches
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.evaluation import summarise
from hpm_video.experiment import (
    RunData,
    claim,
    find_failures,
    in_one_pass,
    look_into_directory,
    make_engine,
    num_workers,
    open_data,
    open_manifest,
    settle_precision,
    timed_update,
    train,
    training_clips,
)
from hpm_video.features import Extractor, Reading, clip_spec, encoder_shape
from hpm_video.held_out import Measures, describe, measure
from hpm_video.labels import names_of_both
from hpm_video.masking import MaskRule, count_masked
from hpm_video.mining import HardPatchesMining, TargetRule
from hpm_video.models.classifier import ClipEncoder
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.pictures import write_pictures
from hpm_video.probing import FeatureTable, nearest_neighbours
from hpm_video.randomness import key_of
from hpm_video.token_grid import TokenGrid
from hpm_video.training.checkpoint import load_weights, read_weights
from hpm_video.training.device import Precision, choose_device
from hpm_video.training.distributed import Processes
from hpm_video.training.engine import TorchEngine
from hpm_video.training.optim import make_adamw, parameter_groups
from hpm_video.training.run import Watch
from hpm_video.training.teacher import MomentumSchedule, make_teacher

log = logging.getLogger(__name__)

PICTURED_CLIPS = 4
"""Held-out clips that are drawn during training."""


def build_student(config: PretrainConfig) -> MaskedAutoencoder:
    """The model of a config, its weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(config.seed, "weights"))
        return MaskedAutoencoder(
            TokenGrid.of_clip(config.data.clip_size, config.model.patch_size),
            config.model.patch_size,
            config.model.encoder,
            config.model.decoder,
            channels=config.model.channels,
            predictor=config.mining.predictor != "none",
            positions=config.model.positions,
            drop_path=config.model.drop_path,
            checkpoint_activations=config.model.checkpoint_activations,
        )


def build_objective(config: PretrainConfig, teacher: MaskedAutoencoder | None) -> HardPatchesMining:
    """Hard patches mining as a config wants it; without a teacher, a plain masked autoencoder."""
    masking, mining = config.masking, config.mining
    grid = TokenGrid.of_clip(config.data.clip_size, config.model.patch_size)
    units = grid.num_tokens if masking.unit == "token" else grid.tokens_per_frame
    return HardPatchesMining(
        MaskRule(
            grid,
            masking.unit,
            count_masked(units, masking.ratio, masking.count_rule),
            config.strategy,
        ),
        TargetRule(mining.target, config.model.patch_size, config.data.mean, config.data.std),
        predictor=mining.predictor,
        predictor_weight=mining.predictor_weight,
        teacher=teacher,
        momentum=MomentumSchedule(mining.momentum, mining.first_momentum, mining.last_momentum),
    )


def load_run(
    checkpoint: Path, device: torch.device
) -> tuple[PretrainConfig, MaskedAutoencoder, HardPatchesMining]:
    """What a checkpoint folder holds: its config, the student, the objective with the teacher.

    Raises:
        ConfigError, CheckpointError: the folder is not a whole checkpoint of a pre-training run.
    """
    config = load_config(PretrainConfig, checkpoint / "config.yaml", [])
    student = build_student(config)
    load_weights(student, read_weights(checkpoint), checkpoint)
    teacher = None
    if config.mining.predictor != "none":
        teacher = make_teacher(student)
        load_weights(teacher, read_weights(checkpoint, "teacher"), checkpoint)
        teacher.to(device)
    return config, student.to(device).eval(), build_objective(config, teacher)


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train as ``config`` says, or go on where its run directory stands. -> that directory

    Raises:
        ConfigError: the config cannot be run, or the directory holds a run of another one.
        ManifestError: the data cannot be read.
        CheckpointError: weights cannot be read, or do not fit.
        And what ``fit`` raises.
    """
    data = open_data(config)
    device = choose_device(config.engine.device)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    directory = look_into_directory(PretrainConfig, config, data)
    student, teacher = _make_models(config, directory.newest, device)
    objective = build_objective(config, teacher)
    with claim(directory, config):
        if directory.update == data.timeline.num_updates:
            log.info("%s is complete: %d updates were made", directory.path, directory.update)
        else:
            precision = settle_precision(config, directory, device, partial(make_update, config))
            engine = make_engine(config, student, _optimizer(config, student), device, precision)
            train(
                config,
                data,
                directory,
                engine=engine,
                objective=objective,
                clips=training_clips(
                    config, data, MultiScaleCrop(config.data.flip), same_frames=False
                ),
                watch=_watch(config, data, objective, engine, directory.path),
            )
        plot_curves(directory.path / "metrics.jsonl", directory.path / "curves.png")
    return directory.path


def make_update(
    config: PretrainConfig, device: torch.device, precision: Precision, clips: int
) -> Callable[[], None]:
    """A whole update on random clips, for timing: forward, backward, step, teacher."""
    config = in_one_pass(replace(config, init_weights=None))
    student, teacher = _make_models(config, None, device)
    objective = build_objective(config, teacher)
    engine = make_engine(config, student, _optimizer(config, student), device, precision)
    return timed_update(config, engine, objective, clips)


def _optimizer(config: PretrainConfig, student: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(student, config.recipe.weight_decay)
    return make_adamw(groups, betas=config.recipe.betas)


def _make_models(
    config: PretrainConfig, newest: Path | None, device: torch.device
) -> tuple[MaskedAutoencoder, MaskedAutoencoder | None]:
    """Student and teacher where the run stands: at a checkpoint, at given weights, or fresh."""
    student = build_student(config)
    given = Path(config.init_weights).expanduser() if config.init_weights else None
    source = newest or given
    if source is not None:
        fresh = () if newest else ("difficulty_decoder.",)
        lacking = load_weights(student, read_weights(source), source, may_lack=fresh)
        if newest is None:
            log.info("start from the weights of %s", source)
        if lacking:
            log.info("which lack a loss predictor: its %d tensors start fresh", len(lacking))
    teacher = None
    if config.mining.predictor != "none":
        teacher = make_teacher(student)
        if newest or (given and (given / "teacher.safetensors").is_file()):
            assert source is not None
            load_weights(teacher, read_weights(source, "teacher"), source)
        teacher.to(device)
    return student.to(device), teacher


def _watch(
    config: PretrainConfig,
    data: RunData,
    objective: HardPatchesMining,
    engine: TorchEngine,
    run_dir: Path,
) -> Watch:
    """Held-out measures, pictures and nearest neighbours, where there are videos for them."""
    probe = _neighbour_probe(config, engine) if config.knn.train is not None else None
    if data.validation is None:
        log.info("no data.validation: nothing is measured or drawn on held-out clips")
        return Watch(probe=probe)
    clips = HeldOutClips(
        data.validation.spread(config.logging.validation_clips),
        clip_spec(config.data),
        decoder=config.data.decoder,
        seed=config.seed,
    )
    batch_size = min(len(clips), max(config.micro_batch, 8), 32)
    find_failures(clips, batch_size=batch_size, workers=num_workers(config.data))

    pictured = HeldOutClips(
        data.validation.spread(PICTURED_CLIPS),
        clip_spec(config.data),
        decoder=config.data.decoder,
        seed=config.seed,
    )

    def validate() -> Measures:
        batches = held_out_batches(clips, batch_size=batch_size, workers=num_workers(config.data))
        return measure(objective, engine, batches)

    def draw(done: int) -> None:
        shown = collate([pictured[i] for i in range(len(pictured))])
        write_pictures(run_dir / "pictures", f"update-{done:08d}", objective, engine, shown)
        plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")

    return Watch(validate, score="relative_error", describe=describe, draw=draw, probe=probe)


def _neighbour_probe(config: PretrainConfig, engine: TorchEngine) -> Callable[[], dict[str, float]]:
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
    encoder = ClipEncoder(encoder_shape(config.model, config.data, None))
    encoder.patch_embed = engine.model.get_submodule("patch_embed")  # type: ignore[assignment]
    encoder.encoder = engine.model.get_submodule("encoder")  # type: ignore[assignment]
    extractor = Extractor(
        encoder.to(engine.device),
        clip_spec(config.data),
        config.data.mean,
        config.data.std,
        engine.device,
        engine.precision,
    )
    reading = Reading(config.data.decoder, num_workers(config.data))
    for manifest in manifests:
        clips = HeldOutClips(
            manifest, extractor.spec, decoder=config.data.decoder, seed=config.seed
        )
        find_failures(clips, batch_size=min(len(clips), 32), workers=reading.workers)

    def probe() -> dict[str, float]:
        train, held_out = (
            FeatureTable(manifest, extractor.of_videos(manifest, MIDDLE, reading, Processes()))
            for manifest in manifests
        )
        scores = nearest_neighbours(train, held_out, len(names), [how.k], how.temperature)[how.k]
        return {"knn_top1": summarise(scores, names)["top1"]}

    return probe
