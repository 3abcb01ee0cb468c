"""Models of transformers and timm with the weights of a model of ours, to compare with it."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch.nn import functional as F

from hpm_video.files.weights import CheckpointError
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.weights.express import by_names_of, by_timm_names, family_for, obstacles
from hpm_video.weights.families import FAMILIES
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import OF_TEACHER, Imported
from hpm_video.weights.layouts import TABLES, read
from hpm_video.weights.model import TrainedModel
from hpm_video.weights.parity import (
    TOLERANCE,
    ParityReport,
    Peer,
    Said,
    Trial,
    compare_with,
    said_by,
    trial_of,
)
from hpm_video.weights.writing import timm_arguments, timm_name, transformers_config


def is_installed(library: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(library) is not None


def of_transformers(
    kind: str,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
) -> Peer:
    """Return a model of transformers: of a folder, or of a config and tensors.

    Raises:
        CheckpointError: it finds tensors that are missing or left over, or of other shapes.
    """
    import transformers

    made: Any = getattr(transformers, kind)
    options: dict[str, Any] = {}
    if config is not None:
        options["config"] = made.config_class.from_dict(dict(config))
    options |= {"add_pooling_layer": False} if kind == "ViTModel" else {}
    with _quiet(transformers):
        try:
            model, found = made.from_pretrained(
                folder,
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"its config.json says other sizes than its weights have: {error}"
            ) from error
    wrong = {
        key: [n for n in found.get(key) or () if not re.search(UNUSED, str(n))] for key in LOADING
    }
    told = [f"{key}: {sorted(map(str, names))}" for key, names in wrong.items() if names]
    if told:
        raise CheckpointError(f"transformers does not take these weights: {'; '.join(told)}")
    model = model.eval()
    name = f"transformers {transformers.__version__}: {kind}"
    return Peer(name, (model,), lambda trial: said_by_transformers(model, trial))


UNUSED = r"pooler|embeddings\.mask_token"
LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
"""What transformers tells of weights that do not fit."""


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bar and its advice."""
    logging = transformers.utils.logging
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


@torch.no_grad()
def said_by_transformers(model: Any, trial: Trial) -> Said:
    """Return what a model of transformers says."""
    kind, encoder = type(model).__name__, getattr(model, model.base_model_prefix, model)
    decodes = kind.endswith("ForPreTraining")
    if kind.startswith("VideoMAE"):
        frames = trial.clips.transpose(1, 2)
        said = {"tokens": encoder(frames).last_hidden_state}
        if decodes:
            # Its loss, which is not asked for, takes three channels where it normalises.
            model.config.norm_pix_loss = False
            said["hidden patches"] = model(frames, bool_masked_pos=trial.mask.masked).logits
    elif kind.startswith("ViTMAE"):
        frames, settings = trial.clips.squeeze(2), encoder.embeddings.config
        count, tokens = trial.noise.shape
        in_order = torch.linspace(0, 1, tokens).expand(count, -1)
        settings.mask_ratio = 0.0
        said = {"tokens": encoder(frames, noise=in_order).last_hidden_state}
        if decodes:
            hidden = int(trial.mask.masked[0].sum())
            settings.mask_ratio = (hidden - 0.5) / tokens  # what stays is cut to whole
            predicted = model(frames, noise=trial.noise).logits
            said["hidden patches"] = trial.mask.take_masked(predicted)
    else:
        frames = trial.clips.squeeze(2)
        said = {"tokens": encoder(frames).last_hidden_state}
    if kind.endswith("Classification"):
        said["logits"] = model(frames).logits
    return said


def of_timm(name: str, arguments: Mapping[str, Any], tensors: Tensors, time: int = 1) -> Peer:
    """Return a vision transformer of timm. ``time``: frames of a patch, which are its channels.

    Raises:
        CheckpointError: timm has no such model, or it does not take these weights.
    """
    import timm

    if name not in timm.list_models(module="vision_transformer"):
        raise CheckpointError(
            f"its config.json must name a vision transformer of timm {timm.__version__}, got "
            f"architecture={name!r}; where it is right, import it with --no-parity"
        )
    model: Any = timm.create_model(name, pretrained=False, **arguments).eval()
    try:
        model.load_state_dict({key: value.float() for key, value in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(f"timm does not take these weights: {error}") from error
    return Peer(
        f"timm {timm.__version__}: {name}", (model,), lambda trial: said_by_timm(model, trial, time)
    )


@torch.no_grad()
def said_by_timm(model: Any, trial: Trial, time: int = 1) -> Said:
    """Return what a model of timm says. Time steps lie below each other in its images."""
    images = rearrange(trial.clips, "b c (t p) h w -> b (c p) (t h) w", p=time)
    if model.num_classes:
        return {"logits": model(images)}
    return {"tokens": model.forward_features(images), "features": model(images)}


def library_peer(model: TrainedModel, tensors: Tensors, *, decodes: bool) -> tuple[Peer, str]:
    """Return the model of a library that is what a model of ours is, and what of it is not.

    Autoencoders are in transformers, and HPM's loss predictor is the decoder of one more; encoders
    and classifiers are in timm, whatever clips they take. ``tensors``: by timm's names.
    """
    missing = ""
    if decodes:
        wrong = obstacles(model, "transformers")
        missing = wrong[0].partition(";")[0] if wrong else "transformers is not installed"
        if not wrong and is_installed("transformers"):
            return _autoencoder(model, tensors), ""
    time = model.config.model.patch_size[0]
    arguments = timm_arguments(model) | {
        "num_classes": len(model.label_names),
        "in_chans": model.config.model.channels * time,
    }
    renamed = by_names_of(FAMILIES["vit"], model, tensors).tensors
    peer = of_timm(timm_name(model), arguments, renamed, time)
    return peer, f"the decoder: {missing}" if missing else ""


def _autoencoder(model: TrainedModel, tensors: Tensors) -> Peer:
    family = family_for(model, "transformers")
    table = transformers_config(model, family.transformers_class)

    def made_of(tensors: Tensors) -> Peer:
        renamed = by_names_of(family, model, tensors).tensors
        return of_transformers(family.transformers_class, None, table, renamed)

    first = made_of(tensors)
    predictor = {name: each for name, each in tensors.items() if name.startswith("difficulty_")}
    if not predictor or family.conventions != "mae":
        return first
    as_decoder = {
        name.replace("difficulty_decoder", "reconstructor"): predictor[name] for name in predictor
    }
    second = made_of(
        tensors | {name: value.expand_as(tensors[name]) for name, value in as_decoder.items()}
    )

    def say(trial: Trial) -> Said:
        difficulty = second.say(trial)["hidden patches"].mean(dim=-1)
        return first.say(trial) | {"difficulty": difficulty}

    return Peer(first.name, first.models + second.models, say)


# --- Imports --------------------------------------------------------------------------------------


def compare(imported: Imported, tolerance: float = TOLERANCE) -> ParityReport:
    """Compare an imported model with a library's. A teacher beside a student is compared too.

    Raises:
        CheckpointError: they differ by more than the tolerance.
    """
    every = [("", imported.model.tensors, imported.recognised.tensors)]
    if imported.teacher is not None and imported.recognised.teacher is not None:
        every.append((OF_TEACHER, imported.teacher, imported.recognised.teacher))
    trial = trial_of(imported.model)
    reports: list[ParityReport] = []
    for who, ours, theirs in every:
        drawn = imported.model.make().state_dict() if imported.fresh else {}
        model = replace(imported.model, tensors=drawn | ours)
        peer, missing = _peer_of_import(imported, model, theirs)
        found = said_by(model.build(), trial)
        names = ("tokens", *(() if imported.fresh else ("hidden patches", "difficulty")), "logits")
        found = {name: found[name] for name in names if name in found}
        report = compare_with(peer, found, trial)
        told = tuple(replace(each, of=f"{who}{each.of}") for each in report.differences)
        reports.append(replace(report, differences=told, not_checked=missing))
    whole = replace(
        reports[0],
        differences=tuple(each for report in reports for each in report.differences),
        notes=(*reports[0].notes, *_notes(imported)),
    )
    return whole.judged("the imported model computes something else than the original", tolerance)


def _peer_of_import(imported: Imported, model: TrainedModel, stored: Tensors) -> tuple[Peer, str]:
    """Where a folder has a config, the library's model is made of that alone.

    A mistake in reading it is then no mistake of both models.
    """
    config, family = imported.source.config, imported.family
    if "architecture" in config:
        peer = _of_timm_config(config, _exact(imported, model, stored))
    elif config and family.transformers_class and is_installed("transformers"):
        kind = family.transformers_class
        if kind == "ViTModel" and config.get("model_type") == "vit_mae":
            kind = "ViTMAEModel"
        peer = of_transformers(kind, None, config, _exact(imported, model, stored))
    else:
        tensors = _by_timm_names(imported, model, stored)
        return library_peer(model, tensors, decodes=not imported.fresh and not model.is_classifier)
    if "encoder.norm.weight" not in imported.fresh:
        return peer, ""

    def say(trial: Trial) -> Said:
        tokens = peer.say(trial)["tokens"]
        return {"tokens": F.layer_norm(tokens, tokens.shape[-1:], eps=LAYER_NORM_EPS)}

    return replace(peer, say=say), ""


def _of_timm_config(config: Mapping[str, Any], tensors: Tensors) -> Peer:
    arguments: dict[str, Any] = dict(config.get("model_args") or {})
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    if size is not None:
        arguments.setdefault("img_size", size[1:])
    arguments["num_classes"] = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    return of_timm(config["architecture"], arguments, tensors)


def _exact(imported: Imported, model: TrainedModel, stored: Tensors) -> Tensors:
    """Return the tensors of a file in single precision, computed positions too."""
    found, layout = {name: value.float() for name, value in stored.items()}, imported.family.layout
    ours, count = by_timm_names(model), model.grid.num_tokens
    for table in TABLES if model.config.model.positions != "given" else ():
        name = layout.theirs(table)
        if name in found and stored[name].dtype != torch.float32:
            found[name] = torch.cat([found[name][:, :-count], ours[table][:, -count:]], dim=1)
    return found


def _by_timm_names(imported: Imported, model: TrainedModel, stored: Tensors) -> Tensors:
    """Return the tensors of a file by timm's names, and those of our model where it has none.

    They do not go through our names, so that a mistake in these shows.
    """
    ours = by_timm_names(model)
    given = read(imported.family.layout, _exact(imported, model, stored)).tensors
    for table in TABLES:
        if table in given and given[table].shape[1] < ours[table].shape[1]:
            given[table] = torch.cat([torch.zeros_like(ours[table][:, :1]), given[table]], dim=1)
    return ours | {name: value for name, value in given.items() if name in ours}


def _notes(imported: Imported) -> tuple[str, ...]:
    """Tell what a comparison cannot show, and what it left out."""
    model, config, notes = imported.model, imported.source.config, []
    if not (config and (imported.family.transformers_class or "architecture" in config)):
        of_decoder = ""
        if model.decoder is not None and not imported.fresh:
            of_decoder = f" and {model.decoder.num_heads} of the decoder"
        notes.append(
            f"not verified: the number of heads ({model.encoder.num_heads} of the encoder"
            f"{of_decoder}), which weights do not tell: both models have it as given or usual"
        )
    stored = {value.dtype for value in imported.recognised.tensors.values()}
    tables = any(imported.family.layout.theirs(table) for table in TABLES)
    if model.config.model.positions != "given" and tables and stored != {torch.float32}:
        notes.append("positions are computed in single precision in both models, not as stored")
    return tuple(notes)
