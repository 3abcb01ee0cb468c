"""The config of a model, inferred from its weights and the facts that stand beside them.

Facts are a run's options, config.json and preprocessor_config.json: one table has their names
there. A config that no model of this package can have is refused: the weights alone would fit all
the same, and compute something else.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpm_video.config.choices import Conventions, Interpolation, Pooling, TransformerSize
from hpm_video.config.data import DataConfig, PretrainDataConfig
from hpm_video.config.mining import MaskingConfig, MiningConfig
from hpm_video.config.model import ClassifierConfig, ModelConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.config.training import EvaluationConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.families import KERNEL, SUMMED, TABLES, State
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
FRESH_DECODERS: dict[Conventions, dict[int, TransformerSize]] = {
    "videomae": {
        384: TransformerSize(192, 4, 3),
        768: TransformerSize(384, 4, 6),
        1024: TransformerSize(512, 12, 8),
        1280: TransformerSize(640, 12, 8),
        1408: TransformerSize(512, 4, 8),
    },
    "mae": dict.fromkeys((768, 1024, 1280), TransformerSize(512, 8, 16)),
}
"""The papers' decoders for encoders of these widths."""


# --- Facts ----------------------------------------------------------------------------------------


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
    frame_stride: int | None = None
    target: TargetKind | None = None
    label_names: tuple[str, ...] | None = None


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("a whole number of at least 1")
    return value


def _size(value: Any) -> tuple[int, int]:
    """One number stands for height and width, which may follow the number of channels."""
    height, width = value[-2:] if isinstance(value, list | tuple) and value[1:] else (value, value)
    return _count(height), _count(width)


def _label_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        by_number = {str(key): name for key, name in value.items()}
        value = [by_number.get(str(i), "") for i in range(len(by_number))]
    names = tuple(map(str, value))
    if not all(name.isprintable() and name.strip() == name != "" for name in names):
        raise ValueError("names in one line for classes from 0 on")
    return names


FACTS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "heads": (("num_attention_heads", "num_heads"), _count),
    "decoder_heads": (("decoder_num_attention_heads",), _count),
    "num_frames": (("num_frames",), _count),
    "frame_size": (("img_size", "image_size", "input_size"), _size),
    "frame_stride": (("sampling_rate",), _count),
    "target": (("norm_pix_loss", "normlize_target"), bool),
    "label_names": (("id2label", "label_names"), _label_names),
    "mean": (("image_mean", "mean"), lambda value: tuple(map(float, value))),
    "std": (("image_std", "std"), lambda value: tuple(map(float, value))),
}
"""Names of each fact in other projects, and how it is read."""


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
        told = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise CheckpointError(
            f"its config.json has values that no model of this package can have: {told}"
        )
    facts: dict[str, Any] = {"pool": arguments.get("global_pool", config.get("global_pool"))}
    values = source.arguments | pretrained | more | config | arguments
    for fact, (names, read) in FACTS.items():
        name = next((name for name in names if values.get(name) is not None), "")
        try:
            facts[fact] = read(values[name]) if name else None
        except (AttributeError, TypeError, ValueError) as rule:
            raise CheckpointError(
                f"its {name} must be {rule}, got {reprlib.repr(values[name])}; give the right one "
                f"by an option"
            ) from rule
    facts |= {name: value for name, value in vars(given).items() if value is not None}
    return {name: value for name, value in facts.items() if value is not None}


# --- The config -----------------------------------------------------------------------------------


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
        family, first = self.family, "cls_token" in self.tensors
        if not first and family.name.startswith(("hpm", "mae")):
            raise CheckpointError("missing cls_token")
        dim, channels, *patch = self.shape_of(KERNEL, 5)
        patch_size: Size3 = (patch[0], patch[1], patch[2])
        model: dict[str, Any] = {
            "encoder": self.size_of("encoder", dim),
            "patch_size": patch_size,
            "channels": channels,
            "positions": "space_time" if family.conventions == "mae" else "sequence",
            "class_token": first,
            "conventions": family.conventions,
        }
        classifies = family.holds == "classifier" and not self.facts["encoder_only"]
        if not classifies:
            model["decoder"] = self.decoder(dim)
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
        mines = "difficulty_decoder.head.weight" in self.tensors
        target = self.choose("target", "target", family.target)
        if target is True:
            target = "joint" if family.conventions == "mae" else "per_channel"
        masking = MaskingConfig(ratio=0.9 if grid.time > 1 else 0.75)
        data["crop"] = "multi_scale" if grid.time > 1 else "random_resized"
        return PretrainConfig(
            data=PretrainDataConfig(**data),
            model=ModelConfig(**model),
            masking=masking if mines else replace(masking, strategy="random"),
            mining=MiningConfig(target=target or "raw", predictor="relative" if mines else "none"),
        )

    def choose(self, name: str, fact: str, default: Any) -> Any:
        """Return a fact where it is known, or else the default, which is reported."""
        if fact in self.facts:
            return self.facts[fact]
        self.assumed.append(f"{name} {default}")
        return default

    def shape_of(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor that a family must have, with so many axes."""
        if name not in self.tensors or self.tensors[name].ndim != axes:
            shape = [tuple(each.shape) for key, each in self.tensors.items() if key == name]
            raise CheckpointError(
                f"missing {self.state.called(name)}, or not of {axes} axes, got {shape or 'none'}"
            )
        return tuple(self.tensors[name].shape)

    def decoder(self, dim: int) -> TransformerSize:
        """Return the size of the decoder, or of one that starts fresh."""
        if self.family.holds == "autoencoder" and not self.facts["encoder_only"]:
            return self.size_of("decoder", self.shape_of("reconstructor.head.weight", 2)[-1])
        usual = FRESH_DECODERS[self.family.conventions].get(dim)
        found: TransformerSize | None = self.facts.get("decoder", usual)
        if found is None:
            raise CheckpointError(
                f"it has no decoder, and none is known for an encoder of width {dim}; give the "
                f"size of one that starts fresh: --decoder WIDTH DEPTH HEADS"
            )
        return found

    def size_of(self, part: str, dim: int) -> TransformerSize:
        """Return the size of the encoder, or of the decoder."""
        begins, fact, known = "", "heads", ENCODER_HEADS
        if part == "decoder":
            begins, fact = "reconstructor.", "decoder_heads"
            decoders = FRESH_DECODERS[self.family.conventions].values()
            known = {each.dim: each.num_heads for each in decoders}
        if fact not in self.facts and dim not in known:
            raise CheckpointError(
                f"weights do not show the number of heads, and the {part} of width {dim} is none "
                f"of the known ({', '.join(map(str, known))}); give --{fact.replace('_', '-')}"
            )
        found = (re.match(rf"{re.escape(begins)}blocks\.(\d+)\.", each) for each in self.tensors)
        depth = max((int(match[1]) + 1 for match in found if match), default=0)
        wide = self.shape_of(f"{begins}blocks.0.mlp.fc1.weight", 2)[0]
        heads = self.choose(f"heads of the {part}", fact, known.get(dim))
        return TransformerSize(dim, depth, heads, None if wide == 4 * dim else wide)

    def clip_size(self, patch_size: Size3) -> Size3:
        """Return frames and pixels of the clips that the model was trained on."""
        time, height, width = patch_size
        given, steps, tokens = self.facts.get("frame_size"), 0, 0
        if set(SUMMED) & self.tensors.keys():
            _, steps, tokens = (self.shape_of(name, 3)[1] for name in reversed(SUMMED))
        elif self.family.conventions == "mae":
            rows = self.shape_of(TABLES[0], 3)[1]
            # timm's models may have no row for a class token: the others then fill the square.
            counts = [rows - int("cls_token" in self.tensors), rows]
            tokens = next((n for n in counts if math.isqrt(n) ** 2 == n), 0)
        side = math.isqrt(tokens)
        square = side and side * side == tokens
        usual = (side * height, side * width) if square else (224, 224)
        size = usual if square and given is None else self.choose("frame size", "frame_size", usual)
        frames = 1 if self.family.axes == 4 else steps * time
        return (frames or self.choose("number of frames", "num_frames", 16), size[0], size[1])

    def pooling(self) -> Pooling:
        """Return how a classifier pools its tokens, by its norms and its config."""
        parts = {name.partition(".")[0] for name in self.tensors}
        norms, first = parts & {"fc_norm", "norm"}, "cls_token" in parts
        pool = self.facts.get("pool")
        if norms == {"fc_norm"} and pool in (None, "avg"):
            return "mean_norm"
        if norms == {"norm"} and first and pool in (None, "token"):
            if pool is None and not self.family.transformers_class:
                self.assumed.append("head on the class token")
            return "class_token"
        raise CheckpointError(
            f"a head here stands on the normed mean of the tokens (fc_norm alone), or on the class "
            f"token (norm alone), and this has {' and '.join(sorted(norms)) or 'no norm'}, "
            f"{'a' if first else 'no'} class token and global_pool={pool!r}: its head looks at "
            f"something else. Take its encoder alone: --encoder-only"
        )

    def data(self, clip_size: Size3) -> dict[str, Any]:
        """Return what clips are, and how frames become clips in validation and tests."""
        image, facts, (mean, std) = clip_size[0] == 1, self.facts, self.family.pixels
        if not {"mean", "std"} <= facts.keys():
            self.assumed.append(f"mean {mean} and standard deviation {std} of the pixels")
        usual: Interpolation = "bicubic" if image else "bilinear"
        short_side = round(max(clip_size) * 256 / 224) if image else None
        self.assumed.append(f"resizing {usual}, of a short side of {short_side or 'the clip'}")
        return {
            "num_frames": clip_size[0],
            "frame_size": clip_size[1:],
            "frame_stride": 1 if image else self.choose("frame stride", "frame_stride", 4),
            "interpolation": usual,
            "validation_short_side": short_side,
            "mean": facts.get("mean", mean),
            "std": facts.get("std", std),
        }
