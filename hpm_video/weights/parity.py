"""Comparison of the outputs of our model and a library's for the same clips of noise."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hpm_video.files.weights import CheckpointError
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.tokens.masking import STRATEGIES, MaskRule, TokenMask, count_masked
from hpm_video.weights.files import Tensors

TOLERANCE = 1e-4
"""Largest difference in single precision, as a share of the largest value."""
SMALLEST = 1e-6
"""A largest value that is smaller than this counts as this."""
Outputs = Mapping[str, Tensor]
UNUSED = r"pooler|embeddings\.mask_token"
KEY_BIAS = r"\.key\.bias$"
"""Tensors of transformers that change nothing of what is compared; the second of VideoMAE alone."""


@dataclass(frozen=True)
class Trial:
    """Clips of noise, and a mask for masked autoencoders."""

    clips: Tensor
    """(B, C, T, H, W)"""
    noise: Tensor
    """(B, N) the lowest stay visible"""
    mask: TokenMask


@dataclass(frozen=True)
class Difference:
    """How far an output of two models for the same clips differs."""

    of: str
    largest: float
    largest_value: float
    """Of the other implementation."""

    @property
    def share(self) -> float:
        """The difference as a share of the largest value; scores may all be small."""
        return self.largest / max(SMALLEST, self.largest_value)


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

    def of(self, name: str) -> tuple[Difference, ...]:
        """Return the differences under other names; ``name`` is a format of the present one."""
        return tuple(replace(each, of=name.format(each.of)) for each in self.differences)

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        lines = [
            f"parity with {self.with_what}, {found.of}: largest difference {found.largest:.1e} of "
            f"values up to {found.largest_value:.2g}"
            for found in self.differences
        ]
        if self.not_checked:
            lines.append(f"parity not checked: {self.not_checked}")
        return lines + list(self.notes)

    def as_table(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {**asdict(self), "holds": self.holds}

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


def differences(ours: Outputs, theirs: Outputs) -> tuple[Difference, ...]:
    """Return the differences of all outputs that both have."""
    return tuple(
        Difference(name, (ours[name] - value).abs().max().item(), value.abs().max().item())
        for name, value in theirs.items()
        if name in ours
    )


# --- Models of libraries --------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A model of a library."""

    name: str
    models: tuple[Any, ...]
    outputs: Callable[[Trial], Outputs]

    def compare(self, model: TrainedModel, clips: int = 1) -> ParityReport:
        """Compare it with a model of ours on clips of noise."""
        trial = trial_of(model, clips)
        return self.report(outputs_of(model.build(), trial), trial)

    def report(self, ours: Outputs, trial: Trial) -> ParityReport:
        """Compare it with our outputs, with our eps in all its layer norms.

        Where a model has another eps, the difference as it is loaded is reported too.
        """
        norms = {
            name: module
            for model in self.models
            for name, module in model.named_modules()
            if isinstance(module, nn.LayerNorm) and module.eps != LAYER_NORM_EPS
        }
        if not norms:
            return ParityReport(self.name, differences(ours, self.outputs(trial)))
        usual = " and ".join(sorted({f"{norm.eps:g}" for norm in norms.values()}))
        where = ", ".join(norms) if len(norms) < 4 else "its layer norms"
        farthest = max(differences(ours, self.outputs(trial)), key=lambda each: each.share)
        note = (
            f"{self.name} has eps {usual} in {where}; as it is loaded, {farthest.of} differ by "
            f"{farthest.largest:.1e} of values up to {farthest.largest_value:.2g}. For equality "
            f"set {'model.' if len(norms) < 4 else ''}{where}.eps = {LAYER_NORM_EPS:g}"
        )
        for norm in norms.values():
            norm.eps = LAYER_NORM_EPS
        return ParityReport(self.name, differences(ours, self.outputs(trial)), notes=(note,))


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
        options["config"] = made.config_class.from_dict(dict(config))
    unused = f"{UNUSED}|{KEY_BIAS}" if kind.startswith("VideoMAE") else UNUSED
    if tensors is not None:
        options["state_dict"] = {k: tensors[k] for k in tensors if not re.search(unused, k)}
    logging.set_verbosity_error()  # without its advice
    logging.disable_progress_bar()
    options |= {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    try:
        model, found = made.from_pretrained(folder, **options)
    except RuntimeError as error:
        raise CheckpointError(
            f"its config.json has other sizes than its weights: {error}"
        ) from error
    misfits = [
        f"{key}: {wrong}"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if (wrong := sorted(str(n) for n in found.get(key) or () if not re.search(unused, str(n))))
    ]
    if misfits:
        raise CheckpointError(f"transformers does not take these weights: {'; '.join(misfits)}")
    model = model.eval()
    name = f"transformers {transformers.__version__}: {kind}"
    return Peer(name, (model,), lambda trial: outputs_of_transformers(model, trial))


@torch.no_grad()
def outputs_of_transformers(model: Any, trial: Trial) -> Outputs:
    """Return the outputs of a model of transformers."""
    kind, encoder = type(model).__name__, getattr(model, model.base_model_prefix, model)
    frames, decodes = trial.clips.squeeze(2), kind.endswith("ForPreTraining")
    if kind.startswith("VideoMAE"):
        frames = trial.clips.transpose(1, 2)
        found = {"tokens": encoder(frames).last_hidden_state}
        if decodes:
            # Its loss, which is not asked for, takes three channels where it normalises.
            model.config.norm_pix_loss = False
            found["hidden patches"] = model(frames, bool_masked_pos=trial.mask.masked).logits
    elif kind.startswith("ViTMAE"):
        settings, (count, tokens) = encoder.embeddings.config, trial.noise.shape
        in_order = torch.linspace(0, 1, tokens).expand(count, -1)
        settings.mask_ratio = 0.0
        found = {"tokens": encoder(frames, noise=in_order).last_hidden_state}
        if decodes:
            hidden = int(trial.mask.masked[0].sum())
            settings.mask_ratio = (hidden - 0.5) / tokens  # what stays is cut to whole
            predicted = model(frames, noise=trial.noise).logits
            found["hidden patches"] = trial.mask.take_masked(predicted)
    else:
        found = {"tokens": encoder(frames).last_hidden_state}
    if kind.endswith("Classification"):
        found["logits"] = model(frames).logits
    return found


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
    return peer_of_timm(f"timm {timm.__version__}: {name}", model, time)


def peer_of_timm(name: str, model: Any, time: int = 1) -> Peer:
    """Return a vision transformer of timm; time steps lie below each other in its images."""

    @torch.no_grad()
    def outputs(trial: Trial) -> Outputs:
        images = rearrange(trial.clips, "b c (t p) h w -> b (c p) (t h) w", p=time)
        if model.num_classes:
            return {"logits": model(images)}
        return {"tokens": model.forward_features(images), "features": model(images)}

    return Peer(name, (model,), outputs)
