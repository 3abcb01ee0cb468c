"""Pre-training: from a config to an assembled run."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hpm_video.config import (
    ConfigError,
    PretrainConfig,
    load_config,
    result_differences,
    save_config,
)
from hpm_video.curves import plot_curves
from hpm_video.data.dataset import ClipBatch, ClipSpec, HeldOutClips, VideoClips, collate
from hpm_video.data.loader import BadFiles, default_workers, held_out_batches, training_batches
from hpm_video.data.manifest import Manifest, read_manifest
from hpm_video.held_out import Measures, describe, measure
from hpm_video.masking import MaskRule, count_masked
from hpm_video.mining import HardPatchesMining, TargetRule
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.pictures import write_pictures
from hpm_video.progress import Progress, Timeline
from hpm_video.randomness import key_of
from hpm_video.token_grid import TokenGrid
from hpm_video.training.checkpoint import (
    checkpoints_in,
    load_weights,
    read_optimizer,
    read_state,
    read_weights,
    remove_unfinished,
)
from hpm_video.training.device import AUTOCAST, Precision, choose_device, choose_precision
from hpm_video.training.engine import TorchEngine
from hpm_video.training.interruption import listen_for_stop
from hpm_video.training.loop import fit
from hpm_video.training.metrics import Meter, MetricsLog, ProgressBar
from hpm_video.training.optim import make_adamw
from hpm_video.training.provenance import Facts, bit_differences, gather_facts, record_start
from hpm_video.training.run import Cadence, Run, Watch
from hpm_video.training.schedules import WarmupCosine, scaled_lr
from hpm_video.training.teacher import MomentumSchedule, make_teacher

log = logging.getLogger(__name__)

PICTURED_CLIPS = 3
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
        And what ``fit`` raises.
    """
    data = _open_data(config)
    run_dir = _claim_directory(config)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    device = choose_device(config.engine.device)
    saved = checkpoints_in(run_dir / "checkpoints")
    start = read_state(saved[-1])["update"] if saved else 0
    if start == data.timeline.num_updates:
        log.info("%s is complete: %d updates were made", run_dir, start)
        return run_dir

    precision = _precision(config, device, saved)
    student, teacher = _weights(config, saved, device)
    objective = build_objective(config, teacher)
    engine = _engine(config, student, device, precision)
    if saved:
        engine.load_optimizer_state(read_optimizer(saved[-1]))
    facts = gather_facts(device, precision)
    _announce(config, data, student, start, facts)
    if saved:
        _compare_facts(read_state(saved[-1])["facts"], facts)
    record_start(run_dir, facts, start)

    with (
        listen_for_stop() as stop,
        ProgressBar(start, data.timeline.num_updates) as bar,
        MetricsLog(run_dir, first_update=start, tensorboard=config.logging.tensorboard) as metrics,
    ):
        run = Run(
            run_dir,
            data.timeline,
            _cadence(config),
            engine,
            {"model": student, **objective.companions},
            facts,
            Meter(device),
            metrics,
            bar,
            BadFiles(
                run_dir / "bad_files.csv",
                num_files=len(data.train),
                max_bad_share=config.data.max_bad_share,
            ),
            stop,
            _watch(config, data, objective, engine, run_dir),
        )
        if saved:
            run.restore_best(saved[-1])
        batches = _training_stream(config, data, start, device)
        schedule = WarmupCosine(
            scaled_lr(config.recipe.base_lr, config.recipe.batch_size),
            scaled_lr(config.recipe.min_lr, config.recipe.batch_size),
            config.recipe.warmup_epochs,
        )
        fit(engine, objective, batches, schedule, run, start=start)
    plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    return run_dir


@dataclass(frozen=True)
class _Data:
    """The manifests of a run, and how long it is."""

    train: Manifest
    validation: Manifest | None
    timeline: Timeline


def _open_data(config: PretrainConfig) -> _Data:
    if not config.data.train:
        raise ConfigError(
            "data.train is not set; give a manifest or a folder of videos: data.train=PATH"
        )
    root = None if config.data.root is None else Path(config.data.root)
    train = read_manifest(Path(config.data.train), root)
    held_out = config.data.validation
    validation = None if held_out is None else read_manifest(Path(held_out), root)
    return _Data(
        train, validation, Timeline(len(train), config.recipe.batch_size, config.recipe.epochs)
    )


def _claim_directory(config: PretrainConfig) -> Path:
    """Make the run directory, or make sure that it holds a run of the same config."""
    if not config.output_dir:
        raise ConfigError("output_dir is not set; give the run a directory: output_dir=runs/NAME")
    run_dir = Path(config.output_dir)
    path = run_dir / "config.yaml"
    if path.is_file():
        differences = result_differences(load_config(PretrainConfig, path, []), config)
        if differences:
            raise ConfigError(
                f"{run_dir} holds a run of another config:\n  "
                + "\n  ".join(differences)
                + "\nTake another output_dir, or the values of before to go on with that run."
            )
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(
            f"{run_dir} is not empty and holds no run (no config.yaml); take another output_dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, path)
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    remove_unfinished(run_dir / "checkpoints")
    return run_dir


def _weights(
    config: PretrainConfig, saved: list[Path], device: torch.device
) -> tuple[MaskedAutoencoder, MaskedAutoencoder | None]:
    """Student and teacher where the run stands: at a checkpoint, at given weights, or fresh."""
    student = build_student(config)
    source = saved[-1] if saved else Path(config.init_weights) if config.init_weights else None
    if source is not None:
        fresh = ("difficulty_decoder.",) if not saved else ()
        lacking = load_weights(student, read_weights(source), source, may_lack=fresh)
        if not saved:
            log.info("start from the weights of %s", source)
        if lacking:
            log.info("which lack a loss predictor: %d of its tensors start fresh", len(lacking))
    teacher = None
    if config.mining.predictor != "none":
        teacher = make_teacher(student)
        if source is not None and source.is_dir() and (source / "teacher.safetensors").is_file():
            load_weights(teacher, read_weights(source, "teacher"), source)
        teacher.to(device)
    return student.to(device), teacher


def _engine(
    config: PretrainConfig, student: MaskedAutoencoder, device: torch.device, precision: Precision
) -> TorchEngine:
    return TorchEngine(
        student,
        make_adamw(student, weight_decay=config.recipe.weight_decay, betas=config.recipe.betas),
        device=device,
        accumulate=config.recipe.batch_size // config.micro_batch,
        clip_grad=config.recipe.clip_grad,
        autocast=AUTOCAST[precision],
    )


def make_update(
    config: PretrainConfig, device: torch.device, precision: Precision, clips: int
) -> Callable[[], None]:
    """A whole update on random clips, for timing: forward, backward, step, teacher."""
    student, teacher = _weights(replace(config, init_weights=None), [], device)
    objective = build_objective(config, teacher)
    engine = _engine(
        replace(config, engine=replace(config.engine, micro_batch=None)), student, device, precision
    )
    shape = (clips, config.model.channels, *config.data.clip_size)
    batch = ClipBatch(
        torch.randint(256, shape, dtype=torch.uint8, device=device),
        keys=torch.arange(clips, device=device),
        labels=torch.full((clips,), -1, device=device),
        files=("random pixels",) * clips,
        failures=(),
    )
    progress = Progress(1, config.recipe.epochs - 0.5, config.recipe.epochs)

    def update() -> None:
        for group in engine.param_groups:
            group["lr"] = 1e-6
        with engine.autocast():
            losses = objective.losses(engine, batch, progress)
        engine.backward(losses.total)
        engine.step()
        objective.after_update(student, progress)

    return update


def _precision(config: PretrainConfig, device: torch.device, saved: list[Path]) -> Precision:
    """As the config says, as the run began, or as this device is faster."""
    if config.engine.precision != "auto":
        return config.engine.precision
    if saved:
        precision: Precision = read_state(saved[-1])["facts"]["precision"]
        return precision
    clips = min(config.micro_batch * config.data.repeats, 8)
    return choose_precision(device, lambda name: make_update(config, device, name, clips))


def _announce(
    config: PretrainConfig, data: _Data, student: MaskedAutoencoder, start: int, facts: Facts
) -> None:
    recipe, masks = config.recipe, student.grid.num_tokens
    log.info(
        "%d videos to train on, %s held out; %d tokens a clip, %.1f M parameters",
        len(data.train),
        len(data.validation) if data.validation else "none",
        masks,
        sum(p.numel() for p in student.parameters()) / 1e6,
    )
    log.info(
        "%d epochs = %d updates of %d videos x %d clips; peak learning rate %.2e; %s, %s, %s",
        recipe.epochs,
        data.timeline.num_updates,
        recipe.batch_size,
        config.data.repeats,
        scaled_lr(recipe.base_lr, recipe.batch_size),
        facts["device"],
        facts["precision"],
        f"{facts['threads']} threads",
    )
    if start:
        log.info("going on at update %d of %d", start, data.timeline.num_updates)


def _compare_facts(before: Facts, now: Facts) -> None:
    differences = bit_differences(before, now)
    if differences:
        log.warning(
            "the run began with something else, so its last bits may differ from an unbroken "
            "run's: %s",
            "; ".join(differences),
        )


def _cadence(config: PretrainConfig) -> Cadence:
    return Cadence(
        log_updates=config.logging.every_updates,
        save_updates=config.checkpoint.every_updates,
        keep_last=config.checkpoint.keep_last,
        keep_every_epochs=config.checkpoint.keep_every_epochs,
        validate_every_epochs=config.logging.validate_every_epochs,
        picture_every_epochs=config.logging.picture_every_epochs,
    )


def _clip_spec(config: PretrainConfig) -> ClipSpec:
    data = config.data
    return ClipSpec(
        num_frames=data.num_frames,
        frame_stride=data.frame_stride,
        max_frame_stride=data.max_frame_stride,
        frame_size=data.frame_size,
        repeats=data.repeats,
    )


def _training_stream(
    config: PretrainConfig, data: _Data, start: int, device: torch.device
) -> Iterator[ClipBatch]:
    """The micro-batches from update ``start`` to the last."""
    dataset = VideoClips(
        data.train,
        _clip_spec(config),
        decoder=config.data.decoder,
        seed=config.seed,
        max_bad_share=config.data.max_bad_share,
    )
    videos = config.recipe.batch_size
    return training_batches(
        dataset,
        range(start * videos, data.timeline.num_updates * videos),
        batch_size=config.micro_batch,
        workers=_workers(config),
        pin=device.type == "cuda",
    )


def _workers(config: PretrainConfig) -> int:
    return default_workers() if config.data.workers is None else config.data.workers


def _watch(
    config: PretrainConfig,
    data: _Data,
    objective: HardPatchesMining,
    engine: TorchEngine,
    run_dir: Path,
) -> Watch:
    """Held-out measures and pictures, where there is a validation manifest."""
    if data.validation is None:
        log.info("no data.validation: nothing is measured or drawn on held-out clips")
        return Watch()
    clips = HeldOutClips(
        data.validation.spread(config.logging.validation_clips),
        _clip_spec(config),
        decoder=config.data.decoder,
        seed=config.seed,
    )
    batch_size = min(len(clips), max(config.micro_batch, 8), 32)

    def validate() -> Measures:
        batches = held_out_batches(clips, batch_size=batch_size, workers=_workers(config))
        return measure(objective, engine, batches)

    def draw(done: int) -> None:
        shown = collate([clips[i] for i in range(min(len(clips), PICTURED_CLIPS))])
        write_pictures(run_dir / "pictures", f"update-{done:08d}", objective, engine, shown)
        plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")

    return Watch(validate, score="relative_error", describe=describe, draw=draw)
