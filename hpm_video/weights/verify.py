"""Models of ours as those of libraries, and the comparison of what both compute."""

import importlib.util
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from hpm_video.files.weights import CheckpointError
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.tokens.masking import STRATEGIES, MaskRule, TokenMask, count_masked
from hpm_video.weights import express
from hpm_video.weights.families import FAMILIES
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import OF_TEACHER, Imported

TOLERANCE = 1e-4  # largest difference in single precision, as a share of the largest value
Outputs = dict[str, Tensor]
UNUSED = r"pooler|embeddings\.mask_token|\.key\.bias$"
"""Tensors of transformers that change nothing of what is compared."""


class Trial(NamedTuple):
    """Clips of noise (B, C, T, H, W), and a mask whose lowest noise (B, N) stays visible."""

    clips: Tensor
    noise: Tensor
    mask: TokenMask


Peer = nn.Module | Callable[[Trial], Outputs]
"""A model of ours or of a library, or what computes the outputs of one."""


class Difference(NamedTuple):
    """How far an output of two models for the same clips differs."""

    of: str
    largest: float
    largest_value: float  # of the other implementation

    @property
    def share(self) -> float:
        """The difference as a share of the largest value; scores may all be small."""
        return self.largest / max(1e-6, self.largest_value)


@dataclass(frozen=True)
class ParityReport:
    """The result of a comparison."""

    with_what: str = ""  # the other implementation; empty where there was none
    differences: tuple[Difference, ...] = ()
    not_checked: str = ""  # why nothing, or not everything, was compared
    notes: tuple[str, ...] = ()
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether no difference is above the tolerance."""
        return all(found.share <= self.tolerance for found in self.differences)

    def lines(self) -> list[str]:
        lines = [
            f"parity with {self.with_what}, {of}: largest difference {largest:.1e} of values up to "
            f"{largest_value:.2g}"
            for of, largest, largest_value in self.differences
        ]
        unchecked = [f"parity not checked: {self.not_checked}"] if self.not_checked else []
        return [*lines, *unchecked, *self.notes]

    def as_table(self) -> dict[str, Any]:
        differences = [each._asdict() for each in self.differences]
        return {**vars(self), "holds": self.holds, "differences": differences}

    def judged(self, what: str, tolerance: float) -> "ParityReport":
        """Return the report, if no difference is above the tolerance.

        Raises:
            CheckpointError: one is; ``what`` computes something else then.
        """
        report = replace(self, tolerance=tolerance)
        if report.holds:
            return report
        lines = "\n  ".join(report.lines())
        raise CheckpointError(
            f"{what}:\n  {lines}\nmore than {tolerance:g} of the largest value is too much"
        )


NOT_ASKED = ParityReport(not_checked="it was not asked for")


def against(
    peer: Peer, model: TrainedModel, title: str = "", *, clips: int = 1, of: str = "{}"
) -> ParityReport:
    """Compare what a model and another implementation compute of clips of noise.

    Args:
        peer: the other one. The eps of its layer norms is set to ours, as no config can.
        model: ours.
        title: of the other one, where it is no model of a library.
        clips: how many.
        of: format of the outputs' names.
    """
    notes: tuple[str, ...] = ()
    if isinstance(peer, nn.Module) and not title:
        library = type(peer).__module__.partition(".")[0]
        version = importlib.import_module(library).__version__
        title = f"{library} {version}: {type(peer).__name__}"
        if others := _set_eps(peer):
            usual, eps = " and ".join(f"{eps:g}" for eps in sorted(others)), LAYER_NORM_EPS
            notes = (f"{title} has eps {usual} in layer norms; for equality set .eps = {eps:g}",)
    trial, found = trial_of(model, clips), []
    ours = outputs_of(model.build(), trial)
    for name, value in outputs_of(peer, trial).items():
        if name in ours:
            largest = (ours[name] - value).abs().max().item()
            found.append(Difference(of.format(name), largest, value.abs().max().item()))
    return ParityReport(title, tuple(found), notes=notes)


def _set_eps(model: nn.Module) -> set[float]:
    """Set the eps of all layer norms to ours. -> others that they had"""
    norms = [each for each in model.modules() if isinstance(each, nn.LayerNorm)]
    others = {norm.eps for norm in norms} - {LAYER_NORM_EPS}
    for norm in norms:
        norm.eps = LAYER_NORM_EPS
    return others


def trial_of(model: TrainedModel, clips: int = 1) -> Trial:
    """Return clips of noise, and a mask of the share that a model was trained with."""
    config, grid = model.config, model.grid
    ratio = model.pretraining.masking.ratio if model.pretraining else 0.5
    rule = MaskRule(
        grid, "token", count_masked(grid.num_tokens, ratio, "hpm"), STRATEGIES["random"]
    )
    size = (clips, config.model.channels, *config.data.clip_size)
    frames = torch.randn(size, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(clips, grid.num_tokens, generator=torch.Generator().manual_seed(1))
    return Trial(frames, noise, rule.draw(None, noise, num_picked=0))


@torch.no_grad()
def outputs_of(peer: Peer, trial: Trial) -> Outputs:
    """Return the outputs of a model of ours, of timm or of transformers, by what they are."""
    if not isinstance(peer, nn.Module):
        return peer(trial)
    model: Any = peer.eval()
    if isinstance(model, ClipClassifier):
        return {"logits": model(trial.clips)}
    if isinstance(model, MaskedAutoencoder):
        predicted, tokens = model(trial.clips, trial.mask), model.encode(trial.clips)
        found = {"tokens": tokens, "hidden patches": predicted.content}
        if predicted.difficulty is not None:
            found["difficulty"] = predicted.difficulty
        return found | {"features": model.pool(tokens)}
    if hasattr(model, "forward_features"):  # of timm; time steps lie below each other
        time = model.patch_embed.proj.in_channels // trial.clips.shape[1]
        images = rearrange(trial.clips, "b c (t p) h w -> b (c p) (t h) w", p=time)
        if model.num_classes:
            return {"logits": model(images)}
        return {"tokens": model.forward_features(images), "features": model(images)}
    return _outputs_of_transformers(model, trial)


def _outputs_of_transformers(model: Any, trial: Trial) -> Outputs:
    kind, encoder = type(model).__name__, getattr(model, model.base_model_prefix, model)
    frames, decodes = trial.clips.squeeze(2), kind.endswith("ForPreTraining")
    if kind.startswith("VideoMAE"):
        frames = trial.clips.transpose(1, 2)
    elif kind.startswith("ViTMAE"):
        settings, (count, tokens) = encoder.embeddings.config, trial.noise.shape
        hidden = int(trial.mask.masked[0].sum())
        if decodes:
            settings.mask_ratio = (hidden - 0.5) / tokens  # what stays is cut to whole
            predicted = trial.mask.take_masked(model(frames, noise=trial.noise).logits)
        settings.mask_ratio = 0.0
        in_order = torch.linspace(0, 1, tokens).expand(count, -1)
        found = {"tokens": encoder(frames, noise=in_order).last_hidden_state}
        return found | ({"hidden patches": predicted} if decodes else {})
    found = {"tokens": encoder(frames).last_hidden_state}
    if decodes:
        # Its loss, which is not asked for, takes three channels where it normalises.
        model.config.norm_pix_loss = False
        found["hidden patches"] = model(frames, bool_masked_pos=trial.mask.masked).logits
    if kind.endswith("Classification"):
        found["logits"] = model(frames).logits
    return found


# --- Models of libraries --------------------------------------------------------------------------


def is_installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def of_transformers(
    kind: str,
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
) -> nn.Module:
    """Return a model of transformers: of a folder, or of a config and tensors.

    Raises:
        CheckpointError: it finds tensors that are missing or left over, or of other shapes.
    """
    import transformers

    logging: Any = transformers.utils.logging
    made: Any = getattr(transformers, kind)
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    if config is not None:
        options |= {"config": made.config_class.from_dict(dict(config)), "state_dict": tensors}
    logging.set_verbosity_error()  # without its advice
    logging.disable_progress_bar()
    options |= {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    model, found = made.from_pretrained(folder, **options)
    assert isinstance(model, nn.Module)
    misfits = [
        f"{key}: {wrong}"
        for key, names in found.items()
        if (wrong := sorted(str(name) for name in names if not re.search(UNUSED, str(name))))
    ]
    if misfits:
        raise CheckpointError(f"transformers does not take these weights: {'; '.join(misfits)}")
    return model


def of_timm(folder: Path, **options: Any) -> nn.Module:
    """Return the model in a folder that timm saved.

    Raises:
        CheckpointError: timm has no such model, or does not take these weights.
    """
    import timm

    there = f"local-dir:{folder}"
    try:
        return timm.create_model(there, pretrained=True, **options)
    except pickle.UnpicklingError:  # earlier versions read no safetensors so
        weights = str(folder / "model.safetensors")
        return timm.create_model(there, checkpoint_path=weights, **options)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"timm {timm.__version__} does not make the model of {folder}: {error}; where it is "
            f"right, import it with --no-parity"
        ) from error


def as_timm(model: TrainedModel, tensors: Tensors) -> nn.Module:
    """Return a vision transformer of timm with these weights, of the size of a model."""
    import timm

    name, arguments = express.timm_arguments(model)
    made: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    made.load_state_dict(tensors)
    return made


def compare(imported: Imported, tolerance: float = TOLERANCE) -> ParityReport:
    """Compare an imported model with a library's. A teacher beside a student is compared too.

    Where a folder has a config, that alone makes the library's: a mistake in reading it is then not
    one of both. Otherwise, autoencoders are made with transformers, encoders and classifiers with
    timm, of clips as well.

    Raises:
        CheckpointError: they differ by more than the tolerance, or the library takes no such model.
    """
    model, source, lacks = imported.model, imported.source, ""
    drawn = model.make().state_dict() if imported.fresh else {}
    complete = replace(model, held=drawn | model.tensors)
    config = {} if "norm.weight" in imported.fresh else source.config
    kind = imported.family.transformers_class if config else ""
    if kind == "ViTModel" and config.get("model_type") == "vit_mae":
        kind = "ViTMAEModel"
    if "architecture" in config:
        reports = [against(of_timm(source.path), complete)]
    elif kind and is_installed("transformers"):
        reports = [against(of_transformers(kind, source.path), complete)]
    else:
        encoder = bool(imported.fresh or model.is_classifier)
        missing = [] if is_installed("transformers") else ["transformers is not installed"]
        if not encoder and (wrong := express.obstacles(model, "transformers") or missing):
            encoder, lacks = True, f"the decoder: {wrong[0].partition(';')[0]}"
        reports = [_made_anew(complete, "{}", encoder=encoder)]
        if imported.teacher is not None:
            teacher = replace(model, held=drawn | imported.teacher)
            reports.append(_made_anew(teacher, f"{OF_TEACHER}{{}}", encoder=encoder))
    left_out = ("hidden patches", "difficulty", "features") if imported.fresh else ("features",)
    every = [found for report in reports for found in report.differences]
    found = tuple(each for each in every if not each.of.endswith(left_out))
    told = "the imported model computes something else than the original"
    return replace(reports[0], differences=found, not_checked=lacks).judged(told, tolerance)


def _made_anew(model: TrainedModel, of: str, *, encoder: bool) -> ParityReport:
    """Compare a model with one of a library that gets its weights, or those of its encoder."""
    heads = "not verified: the number of heads, which weights do not show"
    if encoder:
        tensors = express.by_names_of(FAMILIES["vit"], model).tensors  # a head keeps its name
        report = against(as_timm(model, tensors), model, of=of)
        return replace(report, notes=(*report.notes, heads))
    family = express.family_for(model, "transformers")
    config = express.transformers_config(model, family.transformers_class)

    def made(tensors: Tensors) -> nn.Module:
        there = express.by_names_of(family, replace(model, held=tensors)).tensors
        return of_transformers(family.transformers_class, None, config, there)

    report = against(made(model.tensors), model, of=of)
    if family.conventions == "mae" and "difficulty_decoder.norm.weight" in model.tensors:
        # HPM's loss predictor is the decoder of one more model.
        own, begins = model.tensors, "difficulty_decoder."
        content = {name: name.replace(begins, "reconstructor.") for name in own if begins in name}
        second = made(own | {new: own[name].expand_as(own[new]) for name, new in content.items()})
        _set_eps(second)

        def difficulty(trial: Trial) -> Outputs:
            return {"difficulty": outputs_of(second, trial)["hidden patches"].mean(dim=-1)}

        more = against(difficulty, model, report.with_what, of=of).differences
        report = replace(report, differences=(*report.differences, *more))
    return replace(report, notes=(*report.notes, heads))
