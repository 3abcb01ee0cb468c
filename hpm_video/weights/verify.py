"""Models of ours as those of libraries, and the comparison of what both compute."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from hpm_video.files.weights import CheckpointError, misfits
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.tokens.masking import TokenMask, choose_masked, count_masked
from hpm_video.weights import express
from hpm_video.weights.families import by_our_names, prefixes_of
from hpm_video.weights.files import FILES_OF_A_FOLDER, Tensors
from hpm_video.weights.importing import OF_TEACHER, Imported

TOLERANCE = 1e-4  # largest difference in single precision, as a share of the largest value
Outputs = dict[str, Tensor]
KIND = re.compile(r"\['((VideoMAE|ViT|ViTMAE)(Model|For\w+))'\]")
"""Architectures in a config.json of transformers that are compared."""
UNUSED = re.compile(r"pooler|embeddings\.mask_token|\.key\.bias$")
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

    def judged(self, tolerance: float) -> "ParityReport":
        """Return the report, if no difference is above the tolerance.

        Raises:
            CheckpointError: one is.
        """
        report = replace(self, tolerance=tolerance)
        if not report.holds:
            lines = "\n  ".join(report.lines())
            raise CheckpointError(
                f"its output differs from our model's:\n  {lines}\nthe tolerance is "
                f"{tolerance:g} of the largest value"
            )
        return report


NOT_ASKED = ParityReport(not_checked="it was not asked for")


def is_installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


# --- What models compute --------------------------------------------------------------------------


def trial_of(model: TrainedModel) -> Trial:
    """Return two clips of noise, and a mask of the share that a model was trained with."""
    tokens, size = model.grid.num_tokens, model.config.data.clip_size
    ratio = model.pretraining.masking.ratio if model.pretraining else 0.5
    count, draw = count_masked(tokens, ratio, "hpm"), torch.Generator().manual_seed(0)
    frames = torch.randn(2, model.config.model.channels, *size, generator=draw)
    noise = torch.rand(2, tokens, generator=draw)
    mask = TokenMask.from_masked(choose_masked(None, noise, count, 0), count)
    return Trial(frames, noise, mask)


@torch.no_grad()
def outputs_of(model: Any, trial: Trial) -> Outputs:
    """Return the outputs of a model of ours, of timm or of transformers, by what they are."""
    if isinstance(model, ClipClassifier):
        return {"logits": model(trial.clips)}
    if isinstance(model, MaskedAutoencoder):
        predicted, tokens = model(trial.clips, trial.mask), model.encode(trial.clips)
        scores = {} if predicted.difficulty is None else {"difficulty": predicted.difficulty}
        return {"tokens": tokens, "hidden patches": predicted.content, **scores}
    if hasattr(model, "forward_features"):  # of timm; time steps lie below each other
        time = model.patch_embed.proj.in_channels // trial.clips.shape[1]
        images = rearrange(trial.clips, "b c (t p) h w -> b (c p) (t h) w", p=time)
        if model.num_classes:
            return {"logits": model(images)}
        return {"tokens": model.forward_features(images)}
    return _outputs_of_transformers(model, trial)


def _outputs_of_transformers(model: Any, trial: Trial) -> Outputs:
    kind, encoder = type(model).__name__, getattr(model, model.base_model_prefix, model)
    frames, decodes = trial.clips.squeeze(2), kind.endswith("ForPreTraining")
    if kind.startswith("VideoMAE"):
        frames = trial.clips.transpose(1, 2)
    if kind.endswith("Classification"):
        return {"logits": model(frames).logits}
    found: Outputs = {}
    if kind.startswith("ViTMAE"):
        settings, (count, tokens) = encoder.embeddings.config, trial.noise.shape
        if decodes:
            hidden = trial.mask.masked_ids.shape[1]
            settings.mask_ratio = (hidden - 0.5) / tokens  # what stays is cut to whole
            logits = model(frames, noise=trial.noise).logits
            found["hidden patches"] = trial.mask.take_masked(logits)
        settings.mask_ratio = 0.0
        in_order = torch.linspace(0, 1, tokens).expand(count, -1)
        return found | {"tokens": encoder(frames, noise=in_order).last_hidden_state}
    if decodes:
        # Its loss, which is not asked for, takes three channels where it normalises.
        model.config.norm_pix_loss = False
        found["hidden patches"] = model(frames, bool_masked_pos=trial.mask.masked).logits
    return found | {"tokens": encoder(frames).last_hidden_state}


def differences(
    model: TrainedModel,
    theirs: Callable[[Trial], Outputs],
    of: str = "{}",
    *,
    encoder_alone: bool = False,
) -> tuple[Difference, ...]:
    """Compare what a model of ours and another compute of clips of noise.

    ``of``: format of the outputs' names.

    Raises:
        CheckpointError: the other one does not take the clips of ours.
    """
    trial = trial_of(model)
    ours, found = outputs_of(model.build(), trial), []
    try:
        others = theirs(trial)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"it does not take the same clips: {error}") from error
    if encoder_alone:
        ours.pop("hidden patches", None)
    for name in (name for name in ours if name in others):
        value = others[name]
        if value.shape != ours[name].shape:
            raise CheckpointError(f"its {name} have another shape: {tuple(value.shape)}")
        largest = (ours[name] - value).abs().max().item()
        found.append(Difference(of.format(name), largest, value.abs().max().item()))
    return tuple(found)


def against(
    peer: nn.Module, model: TrainedModel, of: str = "{}", *, encoder_alone: bool = False
) -> ParityReport:
    """Compare a model of a library, or one that came back here, and ours."""
    library = type(peer).__module__.partition(".")[0]
    version = importlib.import_module(library).__version__
    found = differences(
        model, lambda trial: outputs_of(peer.eval(), trial), of, encoder_alone=encoder_alone
    )
    return ParityReport(f"{library} {version}: {type(peer).__name__}", found)


# --- Models of libraries --------------------------------------------------------------------------


def filled(peer: nn.Module, tensors: Tensors) -> nn.Module:
    """Give a model of timm or transformers all of its weights. ``tensors``: by our names.

    Raises:
        CheckpointError: it has other tensors.
    """
    own = peer.state_dict()
    (prefix,) = prefixes_of(own)
    theirs, state = {ours: name for name, ours in by_our_names(own, prefix).items()}, Tensors()
    for ours, value in tensors.items():
        pieces = {ours: value}
        if ours not in theirs and ".attn.qkv." in ours:
            parts = (ours.replace(".qkv.", f".{part}.") for part in "qkv")
            pieces = dict(zip(parts, value.chunk(3), strict=True))
        for part, piece in pieces.items():
            name = theirs.get(part, part)
            if name in own and own[name].numel() == piece.numel():
                state[name] = piece.reshape(own[name].shape)  # frames of a patch are channels there
            elif not part.endswith(".attn.k.bias"):
                state[name] = piece
    if wrong := misfits(own, state):
        raise CheckpointError(f"its tensors are not those of {type(peer).__name__}: {wrong}")
    peer.load_state_dict(state)
    return peer.eval()


def as_transformers(model: TrainedModel, tensors: Tensors) -> Any:
    """Return a model of transformers with these weights, of the size of a model."""
    kind = "ViTForImageClassification" if model.is_classifier else "ViTMAEForPreTraining"
    if express.becomes_videomae(model, "transformers"):
        kind = f"VideoMAEFor{'VideoClassification' if model.is_classifier else 'PreTraining'}"
    made = getattr(_transformers(), kind)
    try:
        peer = made(made.config_class.from_dict(express.transformers_config(model)))
    except RuntimeError as error:
        raise CheckpointError(f"there is no {kind} of its sizes: {error}") from error
    return filled(peer, tensors)


def as_timm(model: TrainedModel, tensors: Tensors) -> Any:
    """Return a vision transformer of timm with these weights, of the size of a model."""
    import timm

    name, arguments = express.timm_arguments(model)
    return filled(timm.create_model(name, pretrained=False, **arguments), tensors)


def from_folder(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Return the model in a folder that transformers or timm saved. ``config``: its config.json

    Raises:
        CheckpointError: the library has no such model, or does not take these weights.
    """
    if "architecture" in config:
        import timm

        weights = next(folder / name for name in FILES_OF_A_FOLDER if (folder / name).is_file())
        try:
            return timm.create_model(f"local-dir:{folder}", checkpoint_path=weights)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"timm {timm.__version__} does not make the model of {folder}: {error}; where it "
                f"is right, import it with --no-parity"
            ) from error
    (kind,) = config["architectures"]
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    model, found = getattr(_transformers(), kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
    )
    names = [f"{key}: {name}" for key, names in found.items() for name in names]
    if wrong := [name for name in names if not UNUSED.search(name)]:
        raise CheckpointError(f"transformers does not take these weights: {'; '.join(wrong)}")
    assert isinstance(model, nn.Module)
    return model


def _transformers() -> Any:
    """Return the library, which says nothing but errors."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def compare(imported: Imported, tolerance: float = TOLERANCE) -> ParityReport:
    """Compare an imported model with a library's. A teacher beside a student is compared too.

    Where a folder has a config, that alone makes the library's: a mistake in reading it is then not
    one of both. Otherwise, autoencoders are made with transformers, encoders and classifiers with
    timm, of clips as well.

    Raises:
        CheckpointError: they differ by more than the tolerance, or the library takes no such model.
    """
    model, source, alone = imported.model, imported.source, bool(imported.fresh)
    config = {} if "norm.weight" in imported.fresh else source.config
    known = KIND.fullmatch(str(config.get("architectures"))) and is_installed("transformers")
    if known or "architecture" in config:
        peer = from_folder(source.path, config)
        return against(peer, imported.complete, encoder_alone=alone).judged(tolerance)
    alone = alone or model.is_classifier
    report = _made_anew(imported.complete, "{}", encoder_alone=alone)
    if imported.teacher is not None:
        teacher = replace(model, held=imported.teacher)
        more = _made_anew(teacher, f"{OF_TEACHER}{{}}", encoder_alone=alone).differences
        report = replace(report, differences=(*report.differences, *more))
    return report.judged(tolerance)


def _made_anew(model: TrainedModel, of: str, *, encoder_alone: bool) -> ParityReport:
    """Compare a model with one of a library that gets its weights, or those of its encoder."""
    heads, lacks = ("not verified: the number of heads, which weights do not show",), ""
    if not encoder_alone:
        try:
            return replace(_with_decoder(model, of), notes=heads)
        except (CheckpointError, ImportError) as error:
            lacks = f"the decoder ({error})"
    peer = as_timm(model, express.express(model, "timm")[0])
    return replace(against(peer, model, of), notes=heads, not_checked=lacks)


def _with_decoder(model: TrainedModel, of: str) -> ParityReport:
    tensors, _ = express.express(model, "transformers")
    peer = as_transformers(model, tensors)
    report = against(peer, model, of)
    own = {name for name in model.tensors if name.startswith("difficulty_decoder.")}
    if not own:
        return report
    # HPM's loss predictor becomes the decoder of the other model.
    for name in own:
        content = name.replace("difficulty_decoder.", "reconstructor.")
        tensors[content] = model.tensors[name].expand_as(tensors[content])
    filled(peer, tensors)

    def scores(trial: Trial) -> Outputs:
        return {"difficulty": outputs_of(peer, trial)["hidden patches"].mean(dim=-1)}

    return replace(report, differences=(*report.differences, *differences(model, scores, of)))
