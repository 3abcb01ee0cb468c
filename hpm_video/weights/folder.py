"""Imported weights as a checkpoint folder, which every program of this package reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hpm_video.config.data import DataConfig, PretrainDataConfig
from hpm_video.config.loading import save_config
from hpm_video.config.mining import MaskingConfig, MiningConfig
from hpm_video.config.model import ClassifierConfig, ModelConfig
from hpm_video.config.recognition import EvaluationConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.randomness import key_of
from hpm_video.training.checkpoint import checksums_of, flush, on_host, sha256_of
from hpm_video.weights.files import ORIGIN, Tensors
from hpm_video.weights.importing import Imported, build_model
from hpm_video.weights.parity import ParityReport
from hpm_video.weights.sizes import ModelFacts

MODEL, TEACHER = "model.safetensors", "teacher.safetensors"
PARITY = "parity.json"


def pretrain_config(facts: ModelFacts) -> PretrainConfig:
    """The config of pre-training whose model this is."""
    assert facts.decoder is not None
    hides = MaskingConfig(ratio=0.9 if facts.grid.time > 1 else 0.75)
    plain = MaskingConfig(ratio=hides.ratio, strategy="random")
    return PretrainConfig(
        data=PretrainDataConfig(
            **_of_data(facts), crop="multi_scale" if facts.grid.time > 1 else "random_resized"
        ),
        model=ModelConfig(**_of_encoder(facts), decoder=facts.decoder),
        masking=hides if facts.predictor else plain,
        mining=MiningConfig(
            target=facts.target, predictor="relative" if facts.predictor else "none"
        ),
    )


def finetune_config(facts: ModelFacts) -> FinetuneConfig:
    """The config of fine-tuning whose classifier this is."""
    assert facts.pooling is not None
    grid = facts.grid
    return FinetuneConfig(
        data=DataConfig(**_of_data(facts)),
        model=ClassifierConfig(
            **_of_encoder(facts),
            num_classes=len(facts.label_names),
            pretrained_grid=(grid.time, grid.height, grid.width),
            pooling=facts.pooling,
        ),
        test=EvaluationConfig() if grid.time > 1 else EvaluationConfig(clips=1, crops=1),
    )


def _of_encoder(facts: ModelFacts) -> dict[str, Any]:
    return {
        "encoder": facts.encoder,
        "patch_size": facts.cut.patch_size,
        "channels": facts.cut.channels,
        "positions": facts.positions,
        "class_token": facts.class_token,
        "conventions": facts.conventions,
    }


def _of_data(facts: ModelFacts) -> dict[str, Any]:
    """Clips as the model was trained on."""
    frames, *size = facts.clip_size
    return {
        "num_frames": frames,
        "frame_stride": facts.frame_stride,
        "frame_size": tuple(size),
        "mean": facts.mean,
        "std": facts.std,
        "interpolation": facts.interpolation,
        "held_out_short_side": facts.short_side,
    }


def whole(imported: Imported) -> Tensors:
    """The weights, with drawn ones where the file has none."""
    if not imported.fresh:
        return imported.tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(0, "weights"))
        drawn = build_model(imported.facts).state_dict()
    return {name: imported.tensors.get(name, drawn[name]) for name in drawn}


def config_of(imported: Imported) -> PretrainConfig | FinetuneConfig:
    """The config of the folder.

    Raises:
        ConfigError: this package has no such model.
    """
    facts = imported.facts
    return finetune_config(facts) if imported.is_classifier else pretrain_config(facts)


def write_folder(imported: Imported, folder: Path, parity: ParityReport) -> list[Path]:
    """Write what ``init_weights`` and the programs of ``tools/`` read. -> the files

    Raises:
        CheckpointError: the folder exists, or the disk does not take them.
        ConfigError: this package has no such model.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; give another folder, or delete it")
    config = config_of(imported)
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        save_file(on_host(whole(imported)), writing / MODEL)
        if imported.teacher is not None:
            save_file(on_host(imported.teacher), writing / TEACHER)
        save_config(config, writing / "config.yaml")
        state = {"update": 0, "imported_from": imported.family.name}
        _write_json(writing / "state.json", {**state, "sha256": checksums_of(writing)})
        _write_json(writing / ORIGIN, origin_of(imported))
        _write_json(writing / PARITY, parity.as_table())
        if imported.is_classifier:
            names = "".join(f"{name}\n" for name in imported.facts.label_names)
            (writing / "labels.txt").write_text(names, encoding="utf-8")
        flush(writing)
        writing.rename(folder)
        flush(folder.parent, recursive=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}. Make room, and start the same command again"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return sorted(folder.iterdir())


def origin_of(imported: Imported) -> dict[str, Any]:
    """Where the weights come from, and what was done to them."""
    source = imported.source
    return {
        "family": imported.family.name,
        "source": str(source.path.absolute()),
        "sha256": _digests(source.path),
        "state_dict": imported.recognised.entry,
        "prefix": imported.recognised.prefix,
        "epoch": source.epoch,
        "licence": imported.licence,
        "assumed": list(imported.facts.assumed),
        "left_out": imported.left_out,
        "start_fresh": list(imported.fresh),
        "positions": imported.facts.positions,
    }


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of the file, or of the files of weights of a folder."""
    endings = (".safetensors", ".bin", ".json")
    files = [path] if path.is_file() else [p for p in sorted(path.iterdir()) if p.suffix in endings]
    return {file.name: sha256_of(file) for file in files}


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
