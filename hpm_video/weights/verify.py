"""Comparison of imported models with those of libraries."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.weights.express import by_names_of, family_for, obstacles, tables_of
from hpm_video.weights.families import FAMILIES, TABLES
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import OF_TEACHER, Imported
from hpm_video.weights.parity import (
    TOLERANCE,
    Outputs,
    ParityReport,
    Peer,
    Trial,
    is_installed,
    of_timm,
    of_transformers,
    outputs_of,
    trial_of,
)
from hpm_video.weights.writing import timm_arguments, timm_name, transformers_config


def library_peer(model: TrainedModel, *, decodes: bool) -> tuple[Peer, str]:
    """Return the model of a library that equals one of ours, and which part it lacks.

    Autoencoders are in transformers, and HPM's loss predictor is the decoder of one more; encoders
    and classifiers are in timm, whatever clips they take.
    """
    missing = ""
    if decodes:
        wrong = obstacles(model, "transformers")
        missing = wrong[0].partition(";")[0] if wrong else "transformers is not installed"
        if not wrong and is_installed("transformers"):
            return _autoencoder(model), ""
    time = model.config.model.patch_size[0]
    tensors = by_names_of(FAMILIES["vit"], model).tensors
    peer = of_timm(timm_name(model), timm_arguments(model, time), tensors, time)
    return peer, f"the decoder: {missing}" if missing else ""


def _autoencoder(model: TrainedModel) -> Peer:
    family = family_for(model, "transformers")
    kind, tensors = family.transformers_class, model.tensors
    config = transformers_config(model, kind)
    first = of_transformers(kind, None, config, by_names_of(family, model).tensors)
    predictor = {name for name in tensors if name.startswith("difficulty_decoder.")}
    if not predictor or family.conventions != "mae":
        return first
    swapped = dict(tensors)
    for name in predictor:
        content = name.replace("difficulty_decoder", "reconstructor")
        swapped[content] = tensors[name].expand_as(tensors[content])
    other = by_names_of(family, replace(model, held=swapped)).tensors
    second = of_transformers(kind, None, config, other)

    def outputs(trial: Trial) -> Outputs:
        difficulty = second.outputs(trial)["hidden patches"].mean(dim=-1)
        return {**first.outputs(trial), "difficulty": difficulty}

    return Peer(first.name, first.models + second.models, outputs)


def compare(imported: Imported, tolerance: float = TOLERANCE) -> ParityReport:
    """Compare an imported model with a library's. A teacher beside a student is compared too.

    Raises:
        CheckpointError: they differ by more than the tolerance.
    """
    model, recognised = imported.model, imported.recognised
    every = [("{}", model.tensors, recognised.tensors)]
    if imported.teacher is not None and recognised.teacher is not None:
        every.append((f"{OF_TEACHER}{{}}", imported.teacher, recognised.teacher))
    drawn = model.make().state_dict() if imported.fresh else {}
    compared = ["tokens", "logits"]
    if not imported.fresh:
        compared += ["hidden patches", "difficulty"]
    trial, report = trial_of(model), ParityReport()
    for who, ours, stored in every:
        complete = replace(model, held=drawn | ours)
        peer, missing = _peer_of(imported, complete, stored)
        own = outputs_of(complete.build(), trial)
        one = peer.report({name: own[name] for name in compared if name in own}, trial)
        found = report.differences + one.of(who)
        report = ParityReport(one.with_what, found, missing, report.notes or one.notes)
    report = replace(report, notes=(*report.notes, *_notes(imported)))
    return report.judged("the imported model computes something else than the original", tolerance)


def _peer_of(imported: Imported, model: TrainedModel, stored: Tensors) -> tuple[Peer, str]:
    """Return the library's model, made only of the config where a folder has one.

    A mistake in reading it is then not a mistake of both models.
    """
    config, family = imported.source.config, imported.family
    tensors = {name: value.float() for name, value in stored.items()}
    for table, ours in tables_of(model).items() if _rounded(imported) else ():
        name = family.theirs(table)
        if name in tensors:
            rest = tensors[name][:, : -ours.shape[1]]
            tensors[name] = torch.cat([rest, ours], dim=1)
    complete = "norm.weight" not in imported.fresh
    if complete and "architecture" in config:
        return _of_timm_config(config, tensors), ""
    if complete and config and family.transformers_class and is_installed("transformers"):
        kind = family.transformers_class
        if kind == "ViTModel" and config.get("model_type") == "vit_mae":
            kind = "ViTMAEModel"
        return of_transformers(kind, None, config, tensors), ""
    # Read once more, so that it does not go through the imported model.
    again = family.read(tensors).tensors
    names = (again.keys() & model.tensors.keys()) - {*TABLES, "cls_token"}
    model = replace(model, held=model.tensors | {name: again[name] for name in names})
    return library_peer(model, decodes=not imported.fresh and not model.is_classifier)


def _of_timm_config(config: Mapping[str, Any], tensors: Tensors) -> Peer:
    arguments: dict[str, Any] = dict(config.get("model_args") or {})
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    if size is not None:
        arguments.setdefault("img_size", size[1:])
    arguments["num_classes"] = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    return of_timm(config["architecture"], arguments, tensors)


def _rounded(imported: Imported) -> bool:
    """Whether positions that are computed here are stored in less than single precision."""
    stored = {value.dtype for value in imported.recognised.tensors.values()}
    computed = imported.model.config.model.positions != "given"
    return computed and imported.family.conventions == "mae" and stored != {torch.float32}


def _notes(imported: Imported) -> list[str]:
    """Return what a comparison cannot show, and what it left out."""
    config, source, notes = imported.model.config, imported.source.config, []
    if not (source and (imported.family.transformers_class or "architecture" in source)):
        heads = f"{config.model.encoder.num_heads} of the encoder"
        if imported.model.pretraining and not imported.fresh:
            decoder = imported.model.pretraining.model.decoder
            heads += f" and {decoder.num_heads} of the decoder"
        notes.append(
            f"not verified: the number of heads ({heads}), which weights do not show: both models "
            f"have it as given or usual"
        )
    if _rounded(imported):
        notes.append("positions are computed in single precision in both models, not as stored")
    return notes
