"""What a config may choose by name, and the sizes that it names."""

from dataclasses import dataclass
from typing import Literal

Conventions = Literal["videomae", "mae"]


@dataclass(frozen=True)
class TransformerSize:
    """Width, number of blocks and heads of a transformer."""

    dim: int
    depth: int
    num_heads: int
    mlp_dim: int | None = None
    """Width within the MLPs; by default four times ``dim``."""

    def __post_init__(self) -> None:
        if self.mlp_dim is not None and self.mlp_dim < 1:
            raise ValueError(f"mlp_dim must be at least 1, or null for 4 dim, got {self.mlp_dim}")
        if min(self.dim, self.depth, self.num_heads) < 1 or self.dim % (2 * self.num_heads):
            raise ValueError(
                f"a transformer needs a positive depth and an even number of values per head, got "
                f"dim {self.dim}, depth {self.depth}, num_heads {self.num_heads}"
            )


Init = Literal["truncated_normal", "xavier"]
Pooling = Literal["mean_norm", "class_token", "batch_norm", "attentive"]
Positions = Literal["sequence", "space_time", "given"]
FeatureKind = Literal["dino", "clip"]
"""Which tokens are the features. ``dino``: those after the final norm. ``clip``: those after the
final norm and the projection into the space that images share with texts."""
DEFAULT_MODELS: dict[FeatureKind, str] = {
    "dino": "vit_base_patch16_224.dino",
    "clip": "vit_base_patch16_clip_quickgelu_224.openai",  # what OpenAI trained has QuickGELU
}
DecoderName = str
"""Name of an entry in ``hpm_video.decoding.registry.DECODERS``."""
DecoderChoice = str
"""A name, or ``auto`` for the first that can be used."""
Interpolation = Literal["bilinear", "bicubic"]
PredictorObjective = Literal["relative", "absolute", "none"]
WeightsOf = Literal["student", "teacher", "model", "average", "untrained"]
"""Student or teacher of pre-training; a classifier (``model``) or the average of its weights; or
those that pre-training began with, to compare with."""
OF_PRETRAINING: tuple[WeightsOf, ...] = ("student", "teacher")
OF_CLASSIFIER: tuple[WeightsOf, ...] = ("model", "average")
MomentumKind = Literal["paper", "warmup"]
Precision = Literal["auto", "fp32", "bf16"]
Target = Literal["raw", "joint", "per_channel", "ema", "dino", "clip"]
Crop = Literal["multi_scale", "random_resized"]
