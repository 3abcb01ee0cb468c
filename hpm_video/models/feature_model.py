"""Frozen image models, whose features of each patch the student predicts instead of its pixels.

The paper's ablation with DINO and CLIP. The models are timm's, by name, and their weights come from
a file that the user gives: nothing is ever downloaded. timm is imported late: it takes seconds.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hpm_video.config.choices import DEFAULT_MODELS, FeatureKind
from hpm_video.files.weights import CheckpointError, load_weights
from hpm_video.randomness import global_generators
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.patches import normalise

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class FeatureModel(nn.Module):
    """A frozen image model that sees the first frame of each time step of a clip."""

    def __init__(self, model: "VisionTransformer", time_step: int) -> None:
        """``model`` has a head where features are projected; ``time_step``: frames of a patch."""
        super().__init__()
        settings: Any = model.pretrained_cfg
        self.width = _width(model)  # D of a feature
        self._time_step = time_step
        self._mean, self._std = tuple(settings["mean"]), tuple(settings["std"])
        self._model = model
        self.eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Features of all patches, in grid order: (B, C, T, H, W) uint8 -> (B, N, D) float32

        Pixels are normalised as in timm's config. Class and register tokens are left out.
        """
        frames = clips[:, :, :: self._time_step]
        images = normalise(rearrange(frames, "b c t h w -> (b t) c h w"), self._mean, self._std)
        tokens = self._model.forward_features(images)[:, self._model.num_prefix_tokens :]
        tokens = self._model.head(tokens)
        features: Tensor = rearrange(tokens, "(b t) n d -> b (t n) d", b=len(clips))
        return features.float()


@cache
def feature_width(kind: FeatureKind, name: str) -> int:
    """D of the features of a timm model, known without its weights. Raises as :func:`_make`."""
    return _width(_make(kind, name, depth=1))


def load_feature_model(
    kind: FeatureKind,
    name: str,
    weights: Mapping[str, Tensor],
    source: Path,
    *,
    frame_size: tuple[int, int],
    patch_size: Size3,
) -> FeatureModel:
    """The timm model ``name`` with the weights of the file ``source``, for the clips of a student.

    The weights have the names of timm, OpenAI or OpenCLIP. For frames of another size timm
    resamples the positions: bicubic, anti-aliased.

    Raises:
        ValueError: as :func:`_make`, or its patches are not the student's, or do not divide frames.
        CheckpointError: the weights do not fit the model.
    """
    from timm.models.vision_transformer import _convert_openai_clip

    model = _make(kind, name)
    own = tuple(model.patch_embed.patch_size)
    if own != patch_size[1:]:
        theirs, ours = (" x ".join(map(str, size)) for size in (own, patch_size[1:]))
        raise ValueError(
            f"the student's tokens must be the patches of {name!r}, got {ours} pixels and "
            f"{theirs}; give the student patches of {theirs}, or take a model with {ours}"
        )
    TokenGrid.of_clip((patch_size[0], *frame_size), patch_size)
    if "visual.class_embedding" in weights:
        weights = _convert_openai_clip(dict(weights), model)
    load_weights(model, weights, source, may_leave=("head.",) if kind == "dino" else ())
    if isinstance(model.head, nn.Linear) and model.head.bias.any():
        raise CheckpointError(
            f"head.bias of {source} must be 0, since CLIP's projection has no bias: this head was "
            f"trained to classify; give the weights before fine-tuning"
        )
    if tuple(model.patch_embed.img_size) != frame_size:
        model.set_input_size(img_size=frame_size)
    return FeatureModel(model, time_step=patch_size[0])


def _width(model: "VisionTransformer") -> int:
    return model.head.out_features if isinstance(model.head, nn.Linear) else model.embed_dim


def _make(kind: FeatureKind, name: str, **options: int) -> "VisionTransformer":
    """The model with initial weights. One of DINO gets no head, one of CLIP its projection.

    ``options`` replace timm's sizes. Names that make timm fetch something are refused, too.

    Raises:
        ValueError: timm has no such model, or one without features of this kind.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    module = "vision_transformer"
    known = timm.list_models(module=module) + timm.list_models(module=module, pretrained=True)
    if name not in known:
        raise ValueError(
            f"timm {timm.__version__} has no plain vision transformer {name!r}, with a token for "
            f"each patch; take {DEFAULT_MODELS[kind]} or another size of it"
        )
    sizes: dict[str, Any] = options | ({"num_classes": 0} if kind == "dino" else {})
    with global_generators(0):  # for initial weights, none of which stays
        model: Any = timm.create_model(name, pretrained=False, **sizes)
    is_normed = isinstance(model, VisionTransformer) and isinstance(model.norm, nn.LayerNorm)
    is_clip = isinstance(model.head, nn.Linear) and isinstance(model.norm_pre, nn.LayerNorm)
    if not is_normed or (kind == "clip" and not is_clip):
        raise ValueError(
            f"{name!r} has no features of kind {kind!r}: that takes a norm after the blocks, and "
            f"for clip also one before them and a projection; take {DEFAULT_MODELS[kind]!r} or "
            f"another size of it"
        )
    return model
