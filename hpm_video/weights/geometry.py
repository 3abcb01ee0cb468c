"""The config of a model, inferred from its weights and the facts that stand beside them.

Facts are a run's options, config.json and preprocessor_config.json: one table has their names
there. A config that no model of this package can have is refused: the weights alone would fit all
the same, and compute something else.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpm_video.config.choices import Conventions, Pooling, TransformerSize
from hpm_video.config.data import DataConfig, PretrainDataConfig
from hpm_video.config.mining import MaskingConfig, MiningConfig
from hpm_video.config.model import ClassifierConfig, ModelConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.config.training import EvaluationConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.weights.families import CONTENT, KERNEL, SCORE, SUMMED, TABLES, TARGETS, State
from hpm_video.weights.files import Source

ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("videomae", "vit", "vit_mae", None),
    "hidden_act": ("gelu",),
    "act_layer": ("gelu", None),
    "qkv_bias": (True,),
    "qv_bias": (True,),
}
"""Keys in a config.json of transformers or timm, and the values that they may have."""
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Heads of the known encoders by their width."""
DECODER_HEADS: dict[Conventions, dict[int, int]] = {
    "videomae": {192: 3, 384: 6, 512: 8, 640: 8},
    "mae": {512: 16},
}
"""The same of the known decoders."""


@dataclass(frozen=True)
class Overrides:
    """What a user says of a file; ``None`` where it is to be as it stands there."""

    entry: str | None = None  # key of the state dict in the file
    prefix: str | None = None  # how the names of the wanted tensors begin
    encoder_only: bool = False
    """Leave out a decoder or a head: what is imported is to be pre-trained."""
    decoder: TransformerSize | None = None  # size of a decoder that starts fresh
    heads: int | None = None
    decoder_heads: int | None = None
    num_frames: int | None = None
    frame_size: tuple[int, int] | None = None


FACTS: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "num_heads"),
    "decoder_heads": ("decoder_num_attention_heads",),
    "num_frames": ("num_frames",),
    "frame_size": ("img_size", "image_size", "input_size"),
    "frame_stride": ("sampling_rate",),
    "target": ("norm_pix_loss", "normlize_target"),
    "label_names": ("id2label", "label_names"),
    "mean": ("image_mean", "mean"),
    "std": ("image_std", "std"),
}
"""Names of each fact in other projects."""


def _checked(fact: str, value: Any) -> Any:
    """Return a fact as our configs have it, or raise an error of what it is not."""
    if fact in ("mean", "std"):
        return tuple(map(float, value))
    if fact == "target":
        return bool(value)
    if fact == "label_names":
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        by_number = {str(number): str(name) for number, name in pairs}
        names = tuple(by_number.get(str(i), "") for i in range(len(by_number)))
        if not all(name.isprintable() and name.strip() == name != "" for name in names):
            raise ValueError("names in one line for classes from 0 on")
        return names
    # Of a size, one number stands for height and width, which may follow the number of channels.
    numbers = value[-2:] if fact == "frame_size" and isinstance(value, list | tuple) else [value]
    if not numbers or any(type(each) is not int or each < 1 for each in numbers):
        raise ValueError("whole numbers of at least 1")
    return (numbers[0], numbers[-1]) if fact == "frame_size" else value


def read_facts(source: Source, given: Overrides) -> dict[str, Any]:
    """Return what a user says, and all other facts that lie beside the weights.

    Raises:
        CheckpointError: a config has values that no model of this package can have, or a fact is
            not of its kind.
    """
    config = source.config
    tables = (config.get(key) for key in ("pretrained_cfg", "model_config", "model_args"))
    pretrained, more, arguments = (table if isinstance(table, dict) else {} for table in tables)
    every = config | arguments
    wrong = {key: every[key] for key in ONLY if key in every and every[key] not in ONLY[key]}
    eps = config.get("layer_norm_eps", 1e-6)  # beyond 1e-5 it shows
    if not isinstance(eps, float) or not 0 < eps <= 1e-5:
        wrong["layer_norm_eps"] = eps
    if wrong:
        raise CheckpointError(f"its config.json has values that no model here supports: {wrong}")
    facts: dict[str, Any] = {"pool": every.get("global_pool")}
    values = source.arguments | pretrained | more | every
    for fact, names in FACTS.items():
        name = next((name for name in names if values.get(name) is not None), "")
        try:
            facts[fact] = _checked(fact, values[name]) if name else None
        except (TypeError, ValueError) as rule:
            raise CheckpointError(f"its {name} must be {rule}, got {values[name]!r:.80}") from rule
    facts |= {name: value for name, value in vars(given).items() if value is not None}
    return {name: value for name, value in facts.items() if value is not None}


class Inference:
    """The config whose model the tensors of a file are."""

    def __init__(self, source: Source, state: State, given: Overrides) -> None:
        """Infer it.

        Raises:
            ValueError, CheckpointError: a fact is missing, or it is a model that ours is not.
        """
        self.state, self.family, self.tensors = state, state.family, state.tensors
        self.facts = read_facts(source, given)
        self.assumed: list[str] = []  # defaults for facts that are not in the file
        self.label_names: tuple[str, ...] = ()
        self.config = self._config()

    def _config(self) -> PretrainConfig | FinetuneConfig:
        family, mines = self.family, f"{SCORE}weight" in self.tensors
        dim, channels, *patch = self.shape_of(KERNEL, 5)
        patch_size: Size3 = (patch[0], patch[1], patch[2])
        model: dict[str, Any] = {
            "encoder": self.size_of("heads", "", dim, ENCODER_HEADS),
            "patch_size": patch_size,
            "channels": channels,
            "positions": "space_time" if family.conventions == "mae" else "sequence",
            "class_token": "cls_token" in self.tensors,
            "conventions": family.conventions,
        }
        classifies = family.holds == "classifier" and not self.facts["encoder_only"]
        if not classifies:
            model["decoder"] = self.decoder(model["encoder"])
        size = self.clip_size(patch_size)
        grid, data = TokenGrid.of_clip(size, patch_size), self.data(size)
        if classifies:
            (count,) = self.shape_of("head.bias", 1)
            self.label_names = self.facts.get("label_names") or tuple(map(str, range(count)))
            model |= {"num_classes": len(self.label_names), "pooling": self.pooling()}
            model["pretrained_grid"] = (grid.time, grid.height, grid.width)
            return FinetuneConfig(
                data=DataConfig(**data),
                model=ClassifierConfig(**model),
                test=EvaluationConfig() if grid.time > 1 else EvaluationConfig(clips=1, crops=1),
            )
        says = {True: TARGETS[family.conventions], False: "raw"}
        target = self.choose("target", "target", says[family.normalises])
        masking = MaskingConfig(ratio=0.9 if grid.time > 1 else 0.75)
        data["crop"] = "multi_scale" if grid.time > 1 else "random_resized"
        return PretrainConfig(
            data=PretrainDataConfig(**data),
            model=ModelConfig(**model),
            masking=masking if mines else replace(masking, strategy="random"),
            mining=MiningConfig(
                target=says.get(target, target), predictor="relative" if mines else "none"
            ),
        )

    def choose(self, name: str, fact: str, default: Any) -> Any:
        """Return a fact where it is known, or else the default, which is reported."""
        if fact in self.facts:
            return self.facts[fact]
        self.assumed.append(f"{name} {default}")
        return default

    def shape_of(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor that a family must have, with so many axes."""
        shape = tuple(self.tensors[name].shape) if name in self.tensors else None
        if shape is None or len(shape) != axes:
            called = self.state.called(name)
            raise CheckpointError(f"missing {called}, or not of {axes} axes, got {shape}")
        return shape

    def size_of(self, fact: str, begins: str, dim: int, known: dict[int, int]) -> TransformerSize:
        """Return the size of the encoder or decoder whose names begin so."""
        if fact not in self.facts and dim not in known:
            raise CheckpointError(
                f"weights do not show the number of heads, and the width {dim} is none of the "
                f"known ({', '.join(map(str, known))}); give --{fact.replace('_', '-')}"
            )
        found = (re.match(rf"{re.escape(begins)}blocks\.(\d+)\.", each) for each in self.tensors)
        depth = max((int(match[1]) + 1 for match in found if match), default=0)
        wide = self.shape_of(f"{begins}blocks.0.mlp.fc1.weight", 2)[0]
        heads = self.choose(fact.replace("_", " "), fact, known.get(dim))
        return TransformerSize(dim, depth, heads, None if wide == 4 * dim else wide)

    def decoder(self, encoder: TransformerSize) -> TransformerSize:
        """Return the size of the decoder, or of one that starts fresh, as the papers choose it."""
        conventions = self.family.conventions
        if self.family.holds == "autoencoder" and not self.facts["encoder_only"]:
            known, width = DECODER_HEADS[conventions], self.shape_of(CONTENT, 2)[-1]
            return self.size_of("decoder_heads", "reconstructor.", width, known)
        usual = TransformerSize(512, 8, 16)
        if conventions == "videomae":
            depth = 4 if encoder.depth <= 12 else 12
            usual = TransformerSize(encoder.dim // 2, depth, max(1, encoder.num_heads // 2))
        return self.facts.get("decoder") or usual

    def clip_size(self, patch_size: Size3) -> Size3:
        """Return frames and pixels of the clips that the model was trained on."""
        time, height, width = patch_size
        given, steps, tokens = self.facts.get("frame_size"), 0, 0
        if SUMMED[0] in self.tensors:
            tokens, steps = (self.shape_of(name, 3)[1] for name in SUMMED[:2])
        elif self.family.conventions == "mae":
            rows = self.shape_of(TABLES[0], 3)[1]
            # timm's models may have no row for a class token: the others then fill the square.
            counts = [rows - int("cls_token" in self.tensors), rows]
            tokens = next((n for n in counts if math.isqrt(n) ** 2 == n), 0)
        side = math.isqrt(tokens)
        square = side and side * side == tokens
        usual = (side * height, side * width) if square else (224, 224)
        size = usual if square and given is None else self.choose("frame size", "frame_size", usual)
        frames = 1 if self.family.conventions == "mae" and not steps else steps * time
        return (frames or self.choose("number of frames", "num_frames", 16), size[0], size[1])

    def pooling(self) -> Pooling:
        """Return how a classifier pools its tokens, by its norms and its config."""
        parts = {name.partition(".")[0] for name in self.tensors}
        norms, first = parts & {"fc_norm", "norm"}, "cls_token" in parts
        pool = self.facts.get("pool")
        if norms == {"fc_norm"} and pool in (None, "avg"):
            return "mean_norm"
        if norms == {"norm"} and first and pool in (None, "token"):
            if pool is None:
                self.assumed.append("head on the class token")
            return "class_token"
        raise CheckpointError(
            f"a head here stands on the normed mean of the tokens (fc_norm, global_pool=avg) or on "
            f"the class token (norm, global_pool=token); this has {sorted(norms)} and "
            f"global_pool={pool!r}. Take its encoder alone: --encoder-only"
        )

    def data(self, clip_size: Size3) -> dict[str, Any]:
        """Return what clips are, and how frames become clips in validation and tests."""
        image, mean, std = clip_size[0] == 1, self.family.mean, self.family.std
        if not {"mean", "std"} <= self.facts.keys():
            self.assumed.append(f"mean {mean} and standard deviation {std} of the pixels")
        usual = "bicubic" if image else "bilinear"
        short_side = round(max(clip_size) * 256 / 224) if image else None
        self.assumed.append(f"resizing {usual}, of a short side of {short_side or 'the clip'}")
        return {
            "num_frames": clip_size[0],
            "frame_size": clip_size[1:],
            "frame_stride": 1 if image else self.choose("frame stride", "frame_stride", 4),
            "interpolation": usual,
            "validation_short_side": short_side,
            "mean": self.facts.get("mean", mean),
            "std": self.facts.get("std", std),
        }
