"""The config of a model, inferred from its weights and the facts that stand beside them.

Facts are a run's options, config.json and preprocessor_config.json: one table has their names
there. A config that no model of this package can have is refused: the weights alone would fit all
the same, and compute something else.
"""

import inspect
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
from hpm_video.weights.families import KERNEL, SUMMED, TABLES, Family
from hpm_video.weights.files import Source, Tensors

RESAMPLE: dict[Interpolation, int] = {"bilinear": 2, "bicubic": 3}
"""Numbers that PIL and transformers have for these."""
OF_TRANSFORMERS: dict[str, tuple[Any, ...]] = {
    "model_type": ("videomae", "vit", "vit_mae", None),
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "qv_bias": (True,),
}
"""Keys in a config.json of transformers, and the values that they may have."""
OF_TIMM = re.compile(
    r"img_size|patch_size|in_chans|num_classes|embed_dim|depth|num_heads|mlp_ratio|class_token|"
    r"no_embed_class|global_pool|fc_norm|dynamic_img_(size|pad)|weight_init|fix_init|"
    r"(pos_|patch_|proj_|attn_)?drop_rate|drop_path_rate"
)
"""Keys of timm's model_args that may have any value: they are read, the weights say the same, or
they only matter in training. All others must have timm's default value."""
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


class MissingOptionError(CheckpointError):
    """A fact that neither the file nor any default gives, so that an option must."""


# --- Facts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overrides:
    """What a user says of a file; ``None`` where it is to be as it stands there."""

    entry: str | None = None
    """Key of the state dict in the file."""
    prefix: str | None = None
    """How the names of the model's tensors begin; by default as those of the one that fits."""
    encoder_only: bool = False
    """Leave out a decoder or a head: what is imported is to be pre-trained."""
    decoder: TransformerSize | None = None
    """Size of a decoder that starts fresh."""
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
    """One number stands for height and width."""
    height, width = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    return _count(height), _count(width)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(x, int | float) for x in value):
        raise ValueError("a list of numbers")
    return tuple(map(float, value))


def _label_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        by_number = {str(key): name for key, name in value.items()}
        value = [by_number.get(str(i), "") for i in range(len(by_number))]
    for i, name in enumerate(map(str, value)):
        if not name.isprintable() or name.strip() != name or not name:
            raise ValueError(f"names in one line for classes from 0 on (class {i} has {name!r})")
    return tuple(map(str, value))


FACTS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "heads": (("num_attention_heads", "num_heads"), _count),
    "decoder_heads": (("decoder_num_attention_heads",), _count),
    "num_frames": (("num_frames",), _count),
    "frame_size": (("input_size", "image_size", "img_size"), _size),
    "frame_stride": (("sampling_rate",), _count),
    "target": (("norm_pix_loss", "normlize_target"), bool),
    "label_names": (("id2label", "label_names"), _label_names),
    "mean": (("image_mean",), _numbers),
    "std": (("image_std",), _numbers),
    "interpolation": (
        ("interpolation",),
        {key: name for name, number in RESAMPLE.items() for key in (name, number)}.get,
    ),
    "short_side": (("short_side",), int),
    "pool": (("global_pool",), str),
}
"""Names of each fact in other projects, and how it is read."""


def _read(fact: str, values: Mapping[str, Any]) -> Any:
    """Return a fact from the first of its names that has a value; None where there is none."""
    names, read = FACTS[fact]
    for name in names:
        if (value := values.get(name)) is not None:
            try:
                return read(value)
            except (TypeError, ValueError) as rule:
                raise CheckpointError(
                    f"its {name} must be {rule}, got {reprlib.repr(value)}; give the right one by "
                    f"an option"
                ) from rule
    return None


def read_facts(source: Source, family: Family, given: Overrides) -> dict[str, Any]:
    """Return what a user says, and all other facts that lie beside the weights.

    Raises:
        CheckpointError: a config has values that no model of this package can have, or a fact is
            not of its kind.
    """
    config, run = source.config, dict(source.arguments)
    tables = (config.get(key) for key in ("model_config", "model_args", "pretrained_cfg"))
    model_config, arguments, pretrained = (t if isinstance(t, dict) else {} for t in tables)
    _refuse_others(config, arguments)
    run.pop("global_pool", None)  # MAE's option, of another meaning
    if "short_side" in run:
        run["short_side"] = run["short_side"] or 0
    names = {"label_names": pretrained.get("label_names")}
    values = run | model_config | names | config | arguments
    facts = {name: value for name, value in vars(given).items() if value is not None}
    usual = _size((pretrained.get("input_size") or (3, 224, 224))[-2:])
    longer_side = max(given.frame_size or _read("frame_size", values) or usual)
    values |= _pixels_of(source.preprocessor, pretrained, longer_side)
    found = {name: _read(name, values) for name in FACTS if name not in facts}
    if (standardised := found.get("target")) is not None:
        target = "joint" if family.conventions == "mae" else "per_channel"
        found["target"] = target if standardised else "raw"
    return facts | {name: value for name, value in found.items() if value is not None}


def _pixels_of(
    preprocessor: Mapping[str, Any], pretrained: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """Return how frames become clips, by the names of :data:`FACTS`; ``size``: longer side."""
    side, share = preprocessor.get("size"), pretrained.get("crop_pct")
    if isinstance(side, dict):  # by height and width frames are squeezed, which is not done here
        side = side.get("shortest_edge", 0)
    elif isinstance(share, int | float) and share > 0:
        side = math.floor(size / share) if pretrained.get("crop_mode", "center") == "center" else 0
    found = {
        "image_mean": preprocessor.get("image_mean", pretrained.get("mean")),
        "image_std": preprocessor.get("image_std", pretrained.get("std")),
        "interpolation": preprocessor.get("resample", pretrained.get("interpolation")),
        "short_side": side if not isinstance(side, int) or side > size else 0,
    }
    return {name: value for name, value in found.items() if value is not None}


def _refuse_others(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Make sure that a config has no values that no model of this package can have."""
    wrong: dict[str, Any] = {}
    if "architecture" in config:
        from timm.models.vision_transformer import VisionTransformer

        parameters = inspect.signature(VisionTransformer).parameters.items()
        usual: dict[str, tuple[Any, ...]] = {
            key: (parameter.default,) for key, parameter in parameters
        }
        usual["act_layer"] = (None, "gelu")
        unread = {key: value for key, value in arguments.items() if not OF_TIMM.fullmatch(key)}
        wrong = {key: value for key, value in unread.items() if value not in usual.get(key, ())}
    elif "model_config" not in config:
        read = {key: config[key] for key in OF_TRANSFORMERS if key in config}
        wrong = {key: value for key, value in read.items() if value not in OF_TRANSFORMERS[key]}
    eps = config.get("layer_norm_eps", 1e-6)  # beyond 1e-5 it shows
    if not isinstance(eps, float) or not 0 < eps <= 1e-5:
        wrong["layer_norm_eps"] = eps
    if wrong:
        values = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise CheckpointError(
            f"its config.json has values that no model of this package can have: {values}"
        )


# --- The config -----------------------------------------------------------------------------------


class Inference:
    """The config whose model the tensors of a file are."""

    def __init__(
        self, source: Source, family: Family, tensors: Tensors, overrides: Overrides
    ) -> None:
        """Infer it. ``tensors``: of the file by our names

        Raises:
            MissingOptionError: a fact cannot be known and must be given.
            ValueError, CheckpointError: it would be a model that this package does not have.
        """
        self.family, self.tensors, self.has_config = family, tensors, bool(source.config)
        self.facts = read_facts(source, family, overrides)
        self.assumed: list[str] = []
        """Defaults for facts that are not in the file."""
        self.label_names: tuple[str, ...] = ()
        self.config = self._config()

    def _config(self) -> PretrainConfig | FinetuneConfig:
        family, first = self.family, "cls_token" in self.tensors
        if not first and family.name.startswith(("hpm", "mae")):
            raise CheckpointError("missing cls_token")
        dim, channels, *patch = self.shape_of(KERNEL, family.axes)
        patch_size: Size3 = (patch[0] if family.axes == 5 else 1, patch[-2], patch[-1])
        model: dict[str, Any] = {
            "encoder": self.size_of("", dim),
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
        masking = MaskingConfig(ratio=0.9 if grid.time > 1 else 0.75)
        data["crop"] = "multi_scale" if grid.time > 1 else "random_resized"
        return PretrainConfig(
            data=PretrainDataConfig(**data),
            model=ModelConfig(**model),
            masking=masking if mines else replace(masking, strategy="random"),
            mining=MiningConfig(target=target, predictor="relative" if mines else "none"),
        )

    def choose(self, name: str, fact: str, default: Any) -> Any:
        """Return a fact where it is known, or else the default, which is reported."""
        if fact in self.facts:
            return self.facts[fact]
        self.assumed.append(f"{name} {default}")
        return default

    def shape_of(self, name: str, axes: int) -> tuple[int, ...]:
        there = self.family.theirs(name)
        if name not in self.tensors:
            raise CheckpointError(f"missing {there}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes:
            raise CheckpointError(f"{there} must have {axes} axes, got the shape {shape}")
        return shape

    def decoder(self, dim: int) -> TransformerSize:
        """Return the size of the decoder, or of one that starts fresh."""
        if self.family.holds == "autoencoder" and not self.facts["encoder_only"]:
            return self.size_of("decoder", self.shape_of("reconstructor.head.weight", 2)[-1])
        usual = FRESH_DECODERS[self.family.conventions].get(dim)
        found: TransformerSize | None = self.facts.get("decoder", usual)
        if found is None:
            raise MissingOptionError(
                f"it has no decoder, and none is known for an encoder of width {dim}; give the "
                f"size of one that starts fresh: --decoder WIDTH DEPTH HEADS"
            )
        return found

    def size_of(self, part: str, dim: int) -> TransformerSize:
        """Return the size of the encoder, or of the decoder."""
        name = part or "encoder"
        begins, fact = ("reconstructor.", "decoder_heads") if part else ("", "heads")
        found = (re.match(rf"{re.escape(begins)}blocks\.(\d+)\.", each) for each in self.tensors)
        depth = max((int(match[1]) + 1 for match in found if match), default=0)
        decoders = FRESH_DECODERS[self.family.conventions].values()
        known = {each.dim: each.num_heads for each in decoders} if part else ENCODER_HEADS
        if fact not in self.facts and dim not in known:
            raise MissingOptionError(
                f"weights do not show the number of heads, and the {name} of width {dim} is none "
                f"of the known ({', '.join(map(str, known))}); give --{fact.replace('_', '-')}"
            )
        wide = self.shape_of(f"{begins}blocks.0.mlp.fc1.weight", 2)[0]
        heads = self.choose(f"heads of the {name}", fact, known.get(dim))
        return TransformerSize(dim, depth, heads, None if wide == 4 * dim else wide)

    def clip_size(self, patch_size: Size3) -> Size3:
        """Return frames and pixels of the clips that the model was trained on."""
        time, height, width = patch_size
        given, steps, tokens = self.facts.get("frame_size"), 0, 0
        if set(SUMMED) & self.tensors.keys():
            _, steps, tokens = (self.shape_of(name, 3)[1] for name in reversed(SUMMED))
        elif self.family.conventions == "mae":
            rows = self.shape_of(TABLES[0], 3)[1]
            tokens = rows - int("cls_token" in self.tensors)
            # A row for a class token is there if the others fill the frames, or else a square.
            for count in (rows, rows - 1):
                filled = math.isqrt(count) ** 2
                if given is not None:
                    filled = (given[0] // height) * (given[1] // width)
                tokens = count if count == filled else tokens
        side = math.isqrt(tokens)
        square = side and side * side == tokens
        usual = (side * height, side * width) if square else (224, 224)
        size = usual if square and given is None else self.choose("frame size", "frame_size", usual)
        frames = 1 if self.family.axes == 4 else steps * time
        frames = frames or self.choose("number of frames", "num_frames", 16)
        return (frames, size[0], size[1])

    def pooling(self) -> Pooling:
        """Return how a classifier pools its tokens, by its norms and its config."""
        parts = {name.partition(".")[0] for name in self.tensors}
        norms = [name for name in ("fc_norm", "norm") if name in parts]
        first, pool = "cls_token" in self.tensors, self.facts.get("pool")
        if self.family.name == "mae_st_classifier":
            raise MissingOptionError(
                "the file does not say whether its head stands on the mean before or behind its "
                "norm. Take its encoder alone: --encoder-only"
            )
        if norms == ["fc_norm"] and pool in (None, "avg"):
            return "mean_norm"
        if norms == ["norm"] and first and pool in (None, "token"):
            if pool is None and not self.has_config:
                self.assumed.append("head on the class token")
            return "class_token"
        raise MissingOptionError(
            f"a head here stands on the normed mean of the tokens (fc_norm alone), or on the class "
            f"token (norm alone), and this has {' and '.join(norms) or 'no norm'}, "
            f"{'a' if first else 'no'} class token and global_pool={pool!r}: its head looks at "
            f"something else. Take its encoder alone: --encoder-only"
        )

    def data(self, clip_size: Size3) -> dict[str, Any]:
        """Return what clips are, and how frames become clips in validation and tests."""
        image, facts, (mean, std) = clip_size[0] == 1, self.facts, self.family.pixels
        usual: Interpolation = "bicubic" if image else "bilinear"
        found = {
            "num_frames": clip_size[0],
            "frame_size": clip_size[1:],
            "frame_stride": 1 if image else self.choose("frame stride", "frame_stride", 4),
            "interpolation": self.choose("interpolation", "interpolation", usual),
            "validation_short_side": facts.get("short_side") or None,
            "mean": facts.get("mean", mean),
            "std": facts.get("std", std),
        }
        if image and "short_side" not in facts:
            found["validation_short_side"] = side = round(max(clip_size) * 256 / 224)
            self.assumed.append(f"short side in validation {side}")
        if not {"mean", "std"} <= facts.keys():
            self.assumed.append(f"mean {mean} and standard deviation {std} of the pixels")
        return found
