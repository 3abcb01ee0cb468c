"""Models of ours as those of libraries, and the comparison of what both compute."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from hpm_video.weights.families import FAMILIES, TABLES
from hpm_video.weights.files import Tensors
from hpm_video.weights.importing import OF_TEACHER, Imported, State

TOLERANCE = 1e-4
"""Largest difference in single precision, as a share of the largest value."""
Outputs = Mapping[str, Tensor]
UNUSED = r"pooler|embeddings\.mask_token|\.key\.bias$"
"""Tensors of transformers that change nothing of what is compared."""


class Trial(NamedTuple):
    """Clips of noise (B, C, T, H, W), and a mask whose lowest noise (B, N) stays visible."""

    clips: Tensor
    noise: Tensor
    mask: TokenMask


class Difference(NamedTuple):
    """How far an output of two models for the same clips differs."""

    of: str
    largest: float
    largest_value: float
    """Of the other implementation."""

    @property
    def share(self) -> float:
        """The difference as a share of the largest value; scores may all be small."""
        return self.largest / max(1e-6, self.largest_value)


@dataclass(frozen=True)
class ParityReport:
    """The result of a comparison."""

    with_what: str = ""
    """The other implementation; empty where there was none."""
    differences: tuple[Difference, ...] = ()
    not_checked: str = ""
    """Why nothing, or not everything, was compared."""
    notes: tuple[str, ...] = ()
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether no difference is above the tolerance."""
        return all(found.share <= self.tolerance for found in self.differences)

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        lines = [
            f"parity with {self.with_what}, {of}: largest difference {largest:.1e} of values up to "
            f"{largest_value:.2g}"
            for of, largest, largest_value in self.differences
        ]
        unchecked = [f"parity not checked: {self.not_checked}"] if self.not_checked else []
        return [*lines, *unchecked, *self.notes]

    def as_table(self) -> dict[str, Any]:
        """Return plain values for a file."""
        table = {**vars(self), "holds": self.holds}
        return table | {"differences": [each._asdict() for each in self.differences]}

    def judged(self, what: str, tolerance: float) -> "ParityReport":
        """Return the report, if no difference is above the tolerance.

        Raises:
            CheckpointError: one is; ``what`` computes something else then.
        """
        report = replace(self, tolerance=tolerance)
        if not report.holds:
            lines = "\n  ".join(report.lines())
            raise CheckpointError(
                f"{what}:\n  {lines}\nmore than {tolerance:g} of the largest value is too much"
            )
        return report


NOT_ASKED = ParityReport(not_checked="it was not asked for")


def trial_of(model: TrainedModel, clips: int = 1) -> Trial:
    """Return clips of noise, and a mask of the share that a model was trained with."""
    config, grid = model.config, model.grid
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(clips, grid.num_tokens, generator=generator)
    ratio = model.pretraining.masking.ratio if model.pretraining else 0.5
    num_masked = count_masked(grid.num_tokens, ratio, "hpm")
    rule = MaskRule(grid, "token", num_masked, STRATEGIES["random"])
    size = (clips, config.model.channels, *config.data.clip_size)
    frames = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return Trial(frames, noise, rule.draw(None, noise, num_picked=0))


@torch.no_grad()
def outputs_of(model: nn.Module, trial: Trial) -> Outputs:
    """Return the outputs of a model of ours."""
    if isinstance(model, ClipClassifier):
        return {"logits": model(trial.clips)}
    assert isinstance(model, MaskedAutoencoder)
    predicted = model(trial.clips, trial.mask)
    tokens = model.encode(trial.clips)
    found = {"tokens": tokens, "hidden patches": predicted.content, "features": model.pool(tokens)}
    if predicted.difficulty is not None:
        found["difficulty"] = predicted.difficulty
    return found


# --- Models of libraries --------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Another implementation of a model."""

    name: str
    outputs: Callable[[Trial], Outputs]
    model: Any = None
    """The library's, with our eps in its layer norms."""
    notes: tuple[str, ...] = ()
    lacks: str = ""
    """What of ours it has not, and why."""

    @classmethod
    def of(cls, name: str, model: Any, outputs: Callable[[Any, Trial], Outputs]) -> "Peer":
        """Set the eps of all layer norms of a library's model, which no config may reach."""
        norms = {
            name: module
            for name, module in model.eval().named_modules()
            if isinstance(module, nn.LayerNorm) and module.eps != LAYER_NORM_EPS
        }
        usual = " and ".join(sorted({f"{norm.eps:g}" for norm in norms.values()}))
        for norm in norms.values():
            norm.eps = LAYER_NORM_EPS
        where = ", ".join(norms) if len(norms) < 4 else "its layer norms"
        note = f"{name} has eps {usual} in {where}; for equality set .eps = {LAYER_NORM_EPS:g}"
        return cls(name, partial(torch.no_grad()(outputs), model), model, (note,) if norms else ())

    def compare(self, model: TrainedModel, clips: int = 1, of: str = "{}") -> ParityReport:
        """Compare what both compute of clips of noise. ``of``: format of the outputs' names"""
        trial = trial_of(model, clips)
        ours, found = outputs_of(model.build(), trial), []
        for name, value in self.outputs(trial).items():
            if name in ours:
                largest = (ours[name] - value).abs().max().item()
                found.append(Difference(of.format(name), largest, value.abs().max().item()))
        return ParityReport(self.name, tuple(found), self.lacks, self.notes)


def is_installed(library: str) -> bool:
    """Whether a library can be imported."""
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

    logging: Any = transformers.utils.logging
    made: Any = getattr(transformers, kind)
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    if config is not None:
        options |= {"config": made.config_class.from_dict(dict(config)), "state_dict": tensors}
    logging.set_verbosity_error()  # without its advice
    logging.disable_progress_bar()
    options |= {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    model, found = made.from_pretrained(folder, **options)
    misfits = [
        f"{kind}: {wrong}"
        for kind, names in found.items()
        if (wrong := sorted(str(name) for name in names if not re.search(UNUSED, str(name))))
    ]
    if misfits:
        raise CheckpointError(f"transformers does not take these weights: {'; '.join(misfits)}")
    return Peer.of(
        f"transformers {transformers.__version__}: {kind}", model, outputs_of_transformers
    )


def outputs_of_transformers(model: Any, trial: Trial) -> Outputs:
    """Return the outputs of a model of transformers."""
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


def of_timm(name: str, arguments: Mapping[str, Any], tensors: Tensors, time: int = 1) -> Peer:
    """Return a vision transformer of timm. ``time``: frames of a patch, which are its channels.

    Raises:
        CheckpointError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):
        raise CheckpointError(
            f"its config.json must name a vision transformer of timm {timm.__version__}, got "
            f"architecture={name!r}; where it is right, import it with --no-parity"
        )
    made: Any = timm.create_model(name, pretrained=False, **arguments)
    made.load_state_dict({key: value.float() for key, value in tensors.items()})

    return Peer.of(f"timm {timm.__version__}: {name}", made, partial(outputs_of_timm, time=time))


def outputs_of_timm(model: Any, trial: Trial, time: int = 1) -> Outputs:
    """Return the outputs of a vision transformer of timm; time steps lie below each other."""
    images = rearrange(trial.clips, "b c (t p) h w -> b (c p) (t h) w", p=time)
    if model.num_classes:
        return {"logits": model(images)}
    return {"tokens": model.forward_features(images), "features": model(images)}


# --- Imported models ------------------------------------------------------------------------------


def compare(imported: Imported, tolerance: float = TOLERANCE) -> ParityReport:
    """Compare an imported model with a library's. A teacher beside a student is compared too.

    Raises:
        CheckpointError: they differ by more than the tolerance, or the library takes no such model.
    """
    model, recognised = imported.model, imported.recognised
    every = [("{}", model.tensors, recognised.tensors)]
    if imported.teacher is not None and recognised.teacher is not None:
        every.append((f"{OF_TEACHER}{{}}", imported.teacher, recognised.teacher))
    drawn = model.make().state_dict() if imported.fresh else {}
    left_out = ("hidden patches", "difficulty", "features") if imported.fresh else ("features",)
    differences: list[Difference] = []
    for who, held, stored in every:
        complete = replace(model, held=drawn | held)
        try:
            report = _peer_of(imported, complete, stored).compare(complete, of=who)
        except RuntimeError as error:
            raise CheckpointError(f"the library does not take these weights: {error}") from error
        differences += [each for each in report.differences if not each.of.endswith(left_out)]
    wrong = "the imported model computes something else than the original"
    return replace(report, differences=tuple(differences)).judged(wrong, tolerance)


def _peer_of(imported: Imported, model: TrainedModel, stored: Tensors) -> Peer:
    """Return the model of a library that equals ours.

    Where a folder has a config, that alone makes it: a mistake in reading it is then not one of
    both. Autoencoders are in transformers; encoders and classifiers in timm, of clips as well.
    """
    config, family, missing = imported.source.config, imported.family, ""
    complete, kind = "norm.weight" not in imported.fresh, family.transformers_class
    if complete and "architecture" in config:
        arguments: dict[str, Any] = dict(config.get("model_args") or {})
        if size := (config.get("pretrained_cfg") or {}).get("input_size"):
            arguments.setdefault("img_size", size[1:])
        arguments["num_classes"] = len(stored.get("head.weight", ()))
        return of_timm(config["architecture"], arguments, stored)
    if complete and config and kind and is_installed("transformers"):
        of_mae = kind == "ViTModel" and config.get("model_type") == "vit_mae"
        return of_transformers("ViTMAEModel" if of_mae else kind, imported.source.path)
    # Read once more, so that it does not go through the imported model.
    again = family.join(State(family, stored).tensors)
    names = (again.keys() & model.tensors.keys()) - {*TABLES, "cls_token"}
    model = replace(model, held=model.tensors | {name: again[name] for name in names})
    heads = "not verified: the number of heads, which weights do not show"
    if not imported.fresh and not model.is_classifier:
        wrong = express.obstacles(model, "transformers")
        if not wrong and is_installed("transformers"):
            peer = _autoencoder(model)
            return replace(peer, notes=(*peer.notes, heads))
        missing = wrong[0].partition(";")[0] if wrong else "transformers is not installed"
    time = model.config.model.patch_size[0]
    tensors = express.by_names_of(FAMILIES["vit"], model).tensors
    arguments = express.timm_arguments(model, time)
    peer = of_timm(express.timm_name(model), arguments, tensors, time)
    lacks = f"the decoder: {missing}" if missing else ""
    return replace(peer, lacks=lacks, notes=(*peer.notes, heads))


def _autoencoder(model: TrainedModel) -> Peer:
    """Return a model of transformers; HPM's loss predictor is the decoder of one more."""
    family, tensors = express.family_for(model, "transformers"), model.tensors

    kind = family.transformers_class
    config = express.transformers_config(model, kind)

    def made(tensors: Tensors) -> Peer:
        there = express.by_names_of(family, replace(model, held=tensors)).tensors
        return of_transformers(kind, None, config, there)

    first = made(tensors)
    if "difficulty_decoder.norm.weight" not in tensors or family.conventions != "mae":
        return first
    swapped = {}
    for name in tensors:
        if name.startswith("difficulty_decoder."):
            content = name.replace("difficulty_decoder", "reconstructor")
            swapped[content] = tensors[name].expand_as(tensors[content])
    second = made(tensors | swapped)

    def outputs(trial: Trial) -> Outputs:
        difficulty = second.outputs(trial)["hidden patches"].mean(dim=-1)
        return {**first.outputs(trial), "difficulty": difficulty}

    return replace(first, outputs=outputs)
