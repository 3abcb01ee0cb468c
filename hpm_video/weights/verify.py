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

from hpm_video.files.weights import CheckpointError
from hpm_video.models.classifier import ClipClassifier
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.tokens.masking import TokenMask, choose_masked, count_masked
from hpm_video.weights import express
from hpm_video.weights.families import by_our_names, prefixes_of
from hpm_video.weights.files import FILES_OF_A_FOLDER, Tensors
from hpm_video.weights.importing import OF_TEACHER, Imported

TOLERANCE = 1e-4  # largest difference in single precision, as a share of the largest value
Outputs = dict[str, Tensor]
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


def is_installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


# --- What models compute --------------------------------------------------------------------------


def trial_of(model: TrainedModel, clips: int = 1) -> Trial:
    """Return clips of noise, and a mask of the share that a model was trained with."""
    tokens, size = model.grid.num_tokens, model.config.data.clip_size
    ratio = model.pretraining.masking.ratio if model.pretraining else 0.5
    count, draw = count_masked(tokens, ratio, "hpm"), torch.Generator().manual_seed(0)
    frames = torch.randn(clips, model.config.model.channels, *size, generator=draw)
    noise = torch.rand(clips, tokens, generator=draw)
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
    model: TrainedModel, theirs: Callable[[Trial], Outputs], of: str = "{}", *, clips: int = 1
) -> tuple[Difference, ...]:
    """Compare what a model of ours and another compute of clips of noise.

    ``of``: format of the outputs' names.
    """
    trial = trial_of(model, clips)
    ours, found = outputs_of(model.build(), trial), []
    for name, value in theirs(trial).items():
        largest = (ours[name] - value).abs().max().item()
        found.append(Difference(of.format(name), largest, value.abs().max().item()))
    return tuple(found)


def against(peer: nn.Module, model: TrainedModel, of: str = "{}") -> ParityReport:
    """Compare a model of a library and ours.

    The eps of its layer norms is set to ours, as no config reaches them all.
    """
    library = type(peer).__module__.partition(".")[0]
    version = importlib.import_module(library).__version__
    title, notes, norms = f"{library} {version}: {type(peer).__name__}", tuple[str, ...](), set()
    for module in peer.modules():
        if isinstance(module, nn.LayerNorm):
            norms.add(module.eps)
            module.eps = LAYER_NORM_EPS
    if others := norms - {LAYER_NORM_EPS}:
        usual, eps = " and ".join(f"{eps:g}" for eps in sorted(others)), LAYER_NORM_EPS
        notes = (f"{title} has eps {usual} in layer norms; for equality set .eps = {eps:g}",)
    found = differences(model, lambda trial: outputs_of(peer.eval(), trial), of)
    return ParityReport(title, found, notes=notes)


# --- Models of libraries --------------------------------------------------------------------------


def filled(peer: nn.Module, tensors: Tensors) -> nn.Module:
    """Give a model of timm or transformers all of its weights. ``tensors``: by our names."""
    own = peer.state_dict()
    (prefix,) = prefixes_of(own)
    state: Tensors = {}
    for theirs, ours in by_our_names(own, prefix).items():
        if part := re.fullmatch(r"(.+\.attn\.)([qkv])(\..+)", ours):
            pieces = tensors[f"{part[1]}qkv{part[3]}"].chunk(3)
            state[theirs] = pieces["qkv".index(part[2])]
        else:  # frames of a patch are channels of an image
            state[theirs] = tensors[ours].reshape(own[theirs].shape)
    peer.load_state_dict(state)
    return peer.eval()


def as_transformers(model: TrainedModel, tensors: Tensors) -> Any:
    """Return a model of transformers with these weights, of the size of a model."""
    made = getattr(_transformers(), express.transformers_class(model))
    config = made.config_class.from_dict(express.transformers_config(model))
    return filled(made(config), tensors)


def as_timm(model: TrainedModel, tensors: Tensors) -> Any:
    """Return a vision transformer of timm with these weights, of the size of a model."""
    import timm

    name, arguments = express.timm_arguments(model)
    return filled(timm.create_model(name, pretrained=False, **arguments), tensors)


def from_folder(folder: Path, kind: str = "", **options: Any) -> nn.Module:
    """Return the model in a folder that transformers saved, or timm where it has no ``kind``.

    Raises:
        CheckpointError: the library has no such model, or does not take these weights.
    """
    if not kind:
        import timm

        weights = next(folder / name for name in FILES_OF_A_FOLDER if (folder / name).is_file())
        try:
            return timm.create_model(f"local-dir:{folder}", checkpoint_path=weights, **options)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"timm {timm.__version__} does not make the model of {folder}: {error}; where it "
                f"is right, import it with --no-parity"
            ) from error
    if kind == "ViTModel":
        options["add_pooling_layer"] = False
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
    model, source, lacks = imported.model, imported.source, ""
    drawn = model.make().state_dict() if imported.fresh else {}
    complete = replace(model, held=drawn | model.tensors)
    config = {} if "norm.weight" in imported.fresh else source.config
    kind = imported.family.transformers_class if config else ""
    if kind == "ViTModel" and config.get("model_type") == "vit_mae":
        kind = "ViTMAEModel"
    if "architecture" in config or (kind and is_installed("transformers")):
        reports = [against(from_folder(source.path, kind), complete)]
    else:
        encoder = bool(imported.fresh or model.is_classifier)
        missing = [] if is_installed("transformers") else ["transformers is not installed"]
        if not encoder and (wrong := missing or express.obstacles(model, "transformers")):
            encoder, lacks = True, f"the decoder: {wrong[0]}"
        reports = [_made_anew(complete, "{}", encoder=encoder)]
        if imported.teacher is not None:
            teacher = replace(model, held=drawn | imported.teacher)
            reports.append(_made_anew(teacher, f"{OF_TEACHER}{{}}", encoder=encoder))
    every = [found for report in reports for found in report.differences]
    found = tuple(each for each in every if not (imported.fresh and each.of == "hidden patches"))
    told = "the imported model computes something else than the original"
    return replace(reports[0], differences=found, not_checked=lacks).judged(told, tolerance)


def _made_anew(model: TrainedModel, of: str, *, encoder: bool) -> ParityReport:
    """Compare a model with one of a library that gets its weights, or those of its encoder."""
    if encoder:
        report = against(as_timm(model, express.with_tables(model)), model, of)
    else:
        tensors, _ = express.express(model, "transformers")
        peer = as_transformers(model, tensors)
        report = against(peer, model, of)
        own = {name for name in model.tensors if name.startswith("difficulty_decoder.")}
        # HPM's loss predictor becomes the decoder of the other model.
        for name in own:
            content = name.replace("difficulty_decoder.", "reconstructor.")
            tensors[content] = model.tensors[name].expand_as(tensors[content])
        if own:
            filled(peer, tensors)
            scores = differences(
                model,
                lambda trial: {
                    "difficulty": outputs_of(peer, trial)["hidden patches"].mean(dim=-1)
                },
                of,
            )
            report = replace(report, differences=(*report.differences, *scores))
    heads = "not verified: the number of heads, which weights do not show"
    return replace(report, notes=(*report.notes, heads))
