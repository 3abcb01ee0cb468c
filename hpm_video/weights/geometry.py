"""The config of a model, inferred from its weights and the facts beside them."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hpm_video.config.choices import Conventions, Crop, Interpolation, Pooling, TransformerSize
from hpm_video.config.data import DataConfig, PretrainDataConfig
from hpm_video.config.mining import MaskingConfig, MiningConfig
from hpm_video.config.model import ClassifierConfig, ModelConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.config.training import EvaluationConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.weights.facts import LABELS, Overrides, read_facts
from hpm_video.weights.families import KERNEL, POSITIONS, Family, Renamed
from hpm_video.weights.files import Source, Tensors

T = TypeVar("T")
SQUEEZED = (
    "frames that are not of this shape were squeezed into it, and here the largest box of the "
    "shape is cut out"
)
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


@dataclass(frozen=True)
class Inferred:
    """The config whose model some weights are."""

    config: PretrainConfig | FinetuneConfig
    label_names: tuple[str, ...]
    assumed: tuple[str, ...]
    """Defaults for facts that are not in the file."""


def infer(source: Source, family: Family, renamed: Renamed, overrides: Overrides) -> Inferred:
    """Return the config whose model the tensors of a file are.

    Raises:
        MissingOptionError: a fact cannot be known and must be given.
        ConfigError, CheckpointError: it would be a model that this package does not have.
    """
    facts = read_facts(source, family, overrides)
    return _Inference(family, renamed, facts, has_config=bool(source.config)).all()


@dataclass
class _Inference:
    family: Family
    renamed: Renamed
    facts: Overrides
    has_config: bool
    assumed: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Tensors:
        return self.renamed.tensors

    def all(self) -> Inferred:
        family, first = self.family, "cls_token" in self.tensors
        if not first and family.name.startswith(("hpm", "mae")):
            raise CheckpointError("missing cls_token")
        dim, channels, *patch = self.shape_of(KERNEL)
        patch_size = (patch[0], patch[1], patch[2])
        model: dict[str, Any] = {
            "encoder": self.size_of("", dim, self.facts.heads),
            "patch_size": patch_size,
            "channels": channels,
            "positions": "space_time" if family.conventions == "mae" else "sequence",
            "class_token": first,
            "conventions": family.conventions,
        }
        classifies = family.holds == "classifier" and not self.facts.encoder_only
        if not classifies:
            model["decoder"] = self.decoder(model["encoder"])
        size = self.clip_size(patch_size)
        data: dict[str, Any] = {"num_frames": size[0], "frame_size": size[1:], "frame_stride": 1}
        if size[0] > 1:
            data["frame_stride"] = self.choose("frame stride", self.facts.frame_stride, 4)
        grid = TokenGrid.of_clip(size, patch_size)
        config: PretrainConfig | FinetuneConfig
        if classifies:
            pooling, names = self.pooling(), self.label_names()
            model |= {"num_classes": len(names), "pooling": pooling}
            model["pretrained_grid"] = (grid.time, grid.height, grid.width)
            config = FinetuneConfig(
                data=DataConfig(**data, **self.pixels(size)),
                model=ClassifierConfig(**model),
                test=EvaluationConfig() if grid.time > 1 else EvaluationConfig(clips=1, crops=1),
            )
            return Inferred(config, names, tuple(self.assumed))
        mines, ratio = "difficulty_decoder.head.weight" in self.tensors, 0.75
        target = self.choose("target", self.facts.target, self.family.target)
        crop: Crop = "random_resized"
        if grid.time > 1:
            crop, ratio = "multi_scale", 0.9
        masking = MaskingConfig(ratio=ratio)
        config = PretrainConfig(
            data=PretrainDataConfig(**data, **self.pixels(size), crop=crop),
            model=ModelConfig(**model),
            masking=masking if mines else MaskingConfig(ratio=ratio, strategy="random"),
            mining=MiningConfig(target=target, predictor="relative" if mines else "none"),
        )
        return Inferred(config, (), tuple(self.assumed))

    def choose(self, name: str, value: T | None, default: T) -> T:
        """Return a value where it is known, or else the default, which is reported."""
        if value is None:
            self.assumed.append(f"{name} {default}")
            return default
        return value

    def shape_of(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"missing {self.family.theirs(name)}")
        return tuple(self.tensors[name].shape)

    def decoder(self, encoder: TransformerSize) -> TransformerSize:
        """Return the size of the decoder, or of one that starts fresh."""
        if self.family.holds == "autoencoder" and not self.facts.encoder_only:
            dim = self.shape_of("reconstructor.head.weight")[-1]
            return self.size_of("reconstructor.", dim, self.facts.decoder_heads)
        usual = FRESH_DECODERS[self.family.conventions].get(encoder.dim)
        if self.facts.decoder is None and usual is None:
            raise MissingOptionError(
                f"it has no decoder, and none is known for an encoder of width {encoder.dim}; "
                f"give the size of one that starts fresh: --decoder WIDTH DEPTH HEADS"
            )
        return self.facts.decoder or usual or encoder

    def size_of(self, part: str, dim: int, heads: int | None) -> TransformerSize:
        """Return the size of a transformer, whose names begin with ``part``."""
        name, option = ("decoder", "--decoder-heads") if part else ("encoder", "--heads")
        found = (re.match(rf"{re.escape(part)}blocks\.(\d+)\.", each) for each in self.tensors)
        blocks = sorted({int(match[1]) for match in found if match})
        if not blocks or blocks != list(range(len(blocks))):
            raise CheckpointError(
                f"the blocks of the {name} must be numbered from 0 on without a gap, got {blocks}; "
                f"fetch the whole file"
            )
        decoders = FRESH_DECODERS[self.family.conventions].values()
        known = {each.dim: each.num_heads for each in decoders} if part else ENCODER_HEADS
        if heads is None and dim not in known:
            raise MissingOptionError(
                f"weights do not show the number of heads, and the {name} of width {dim} is "
                f"none of the known ({', '.join(map(str, known))}); give {option}"
            )
        wide = self.shape_of(f"{part}blocks.0.mlp.fc1.weight")[0]
        try:
            chosen = self.choose(f"heads of the {name}", heads, known.get(dim, 1))
            return TransformerSize(dim, len(blocks), chosen, None if wide == 4 * dim else wide)
        except ValueError as error:
            raise CheckpointError(f"{option}: {error}") from error

    def clip_size(self, patch_size: Size3) -> Size3:
        """Return frames and pixels of the clips that the model was trained on."""
        time, height, width = patch_size
        tokens = self.tokens(height, width)
        side = math.isqrt(tokens)
        square = (side * height, side * width) if tokens and side * side == tokens else None
        size = self.choose("frame size", self.facts.frame_size or square, (224, 224))
        frames = 1 if self.family.axes == 4 else self.renamed.steps * time
        frames = frames or self.choose("number of frames", self.facts.num_frames, 16)
        try:
            grid = TokenGrid.of_clip((frames, *size), patch_size)
        except ValueError as error:
            raise CheckpointError(f"these clips do not fit the model's patches: {error}") from error
        if tokens and grid.tokens_per_step != tokens:
            raise CheckpointError(
                f"its positions are of {tokens} tokens of a time step, and frames of {size} have "
                f"{grid.tokens_per_step}; give the frame size of its training: --frame-size"
            )
        return (frames, *size)

    def tokens(self, height: int, width: int) -> int:
        """Return the tokens of a time step that positions are of; 0 where a file has none.

        A table has a row for a class token if the others fill the frames, or where their size is
        not known a square.
        """
        if self.family.conventions == "videomae":
            return 0
        shape = self.shape_of(POSITIONS)
        if self.renamed.steps:
            return (shape[1] - 1) // self.renamed.steps
        size = self.facts.frame_size
        for tokens in (shape[1] - 1, shape[1]):
            square = size is None and math.isqrt(tokens) ** 2 == tokens
            if square or (size and tokens == (size[0] // height) * (size[1] // width)):
                return tokens
        return shape[1] - int("cls_token" in self.tensors)

    def pooling(self) -> Pooling:
        """Return how a classifier pools its tokens, by its norms and its config."""
        if self.family.name == "mae_st_classifier":
            raise MissingOptionError(
                "the file does not say whether its head stands on the mean before or behind its "
                "norm. Take its encoder alone: --encoder-only"
            )
        parts = {name.partition(".")[0] for name in self.tensors}
        norms = tuple(name for name in ("fc_norm", "norm") if name in parts)
        first, pool = "cls_token" in self.tensors, self.facts.pool
        if norms == ("fc_norm",) and pool in (None, "avg"):
            return "mean_norm"
        if norms == ("norm",) and first and pool in (None, "token"):
            if pool is None and not self.has_config:
                self.assumed.append("head on the class token")
            return "class_token"
        raise MissingOptionError(
            f"a head here stands on the normed mean of the tokens (a norm behind the mean alone), "
            f"or on the class token (a norm before it), and this has "
            f"{' and '.join(norms) or 'no norm'}, {'a' if first else 'no'} class token"
            + ("" if pool is None else f" and global_pool={pool!r}")
            + ": its head looks at something else. Take its encoder alone: --encoder-only"
        )

    def label_names(self) -> tuple[str, ...]:
        """Return the names of the classes where they are known, or else their numbers."""
        count = self.shape_of("head.bias")[0]
        names = self.facts.label_names
        if names is not None and len(names) != count:
            raise CheckpointError(
                f"the head has {count} classes, and there are {len(names)} names; give a name for "
                f"each: {LABELS}"
            )
        return names or tuple(map(str, range(count)))

    def pixels(self, clip_size: Size3) -> dict[str, Any]:
        """Return how frames become clips in validation and tests."""
        image, facts = clip_size[0] == 1, self.facts
        usual: Interpolation = "bicubic" if image else "bilinear"
        interpolation = self.choose("interpolation", facts.interpolation, usual)
        short_side = facts.short_side
        if facts.squeezed:
            self.assumed.append(SQUEEZED)
        elif short_side is None and image:
            short_side = round(max(clip_size) * 256 / 224)
            self.assumed.append(f"short side in validation {short_side}")
        mean, std = facts.mean, facts.std
        if mean is None or std is None:
            mean, std = self.family.pixels
            self.assumed.append(f"mean {mean} and standard deviation {std} of the pixels")
        return {
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "held_out_short_side": short_side or None,
        }
