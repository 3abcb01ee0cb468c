"""The config of a model, as far as its weights and what lies beside them tell."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hpm_video.config.choices import Conventions, Crop, Pooling, TransformerSize
from hpm_video.config.data import DataConfig, PretrainDataConfig
from hpm_video.config.mining import MaskingConfig, MiningConfig
from hpm_video.config.model import ClassifierConfig, ModelConfig
from hpm_video.config.recognition import EvaluationConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.families import KERNEL, POSITIONS, Family, Renamed
from hpm_video.weights.files import Source, Tensors
from hpm_video.weights.notes import LABELS, SQUEEZED, Notes

T = TypeVar("T")
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
"""Decoders that the papers have with encoders of these widths."""


class UntoldError(CheckpointError):
    """What neither a file nor anything usual says, and an option must."""


@dataclass(frozen=True)
class Overrides:
    """What a user says of a file, where it says nothing itself or something else is wanted."""

    entry: str | None = None
    """Key of the state dict in the file."""
    encoder_only: bool = False
    """Leave out a decoder or a head: what is imported is to be pre-trained."""
    heads: int | None = None
    decoder: TransformerSize | None = None
    """Size of a decoder that starts fresh."""
    decoder_heads: int | None = None
    num_frames: int | None = None
    frame_size: tuple[int, int] | None = None
    frame_stride: int | None = None
    target: TargetKind | None = None
    label_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Inferred:
    """What a model is."""

    config: PretrainConfig | FinetuneConfig
    label_names: tuple[str, ...]
    assumed: tuple[str, ...]
    """What the file does not say, and was taken as usual."""


def infer(source: Source, family: Family, renamed: Renamed, overrides: Overrides) -> Inferred:
    """Return the config whose model the tensors of a file are.

    Raises:
        UntoldError: something cannot be known and must be given.
        ConfigError, CheckpointError: something is of a kind that our model cannot be.
    """
    return _Inference(Notes(source), family, renamed, overrides).all()


@dataclass
class _Inference:
    """Values, each from the first place that has it."""

    notes: Notes
    family: Family
    renamed: Renamed
    given: Overrides
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
            "encoder": self.size_of("", dim, self.given.heads, "num_attention_heads", "num_heads"),
            "patch_size": patch_size,
            "channels": channels,
            "positions": "space_time" if family.conventions == "mae" else "sequence",
            "class_token": first,
            "conventions": family.conventions,
        }
        classifies = family.holds == "classifier" and not self.given.encoder_only
        if not classifies:
            model["decoder"] = self.decoder(model["encoder"])
        size = self.clip_size(patch_size)
        data: dict[str, Any] = {"num_frames": size[0], "frame_size": size[1:], "frame_stride": 1}
        if size[0] > 1:
            noted = self.notes.whole("sampling_rate")
            stride = self.choose("frame stride", self.given.frame_stride, noted, usual=4)
            data["frame_stride"] = stride
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
        target = self.target()
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

    def choose(self, name: str, *found: T | None, usual: T) -> T:
        """Return the first value that there is, or the usual one, of which it is told."""
        for value in found:
            if value is not None:
                return value
        self.assumed.append(f"{name} {usual}")
        return usual

    def shape_of(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"missing {self.family.theirs(name)}")
        return tuple(self.tensors[name].shape)

    def decoder(self, encoder: TransformerSize) -> TransformerSize:
        """Return the size of the decoder, or of one that starts fresh."""
        if self.family.holds == "autoencoder" and not self.given.encoder_only:
            dim, key = self.shape_of("reconstructor.head.weight")[-1], "decoder_num_attention_heads"
            return self.size_of("reconstructor.", dim, self.given.decoder_heads, key)
        usual = FRESH_DECODERS[self.family.conventions].get(encoder.dim)
        if self.given.decoder is None and usual is None:
            raise UntoldError(
                f"it has no decoder, and none is known for an encoder of width {encoder.dim}; "
                f"give the size of one that starts fresh: --decoder WIDTH DEPTH HEADS"
            )
        return self.given.decoder or usual or encoder

    def size_of(self, part: str, dim: int, heads: int | None, *keys: str) -> TransformerSize:
        """Return the size of a transformer. ``heads``: where they are given; ``keys``: or noted."""
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
        heads = heads or self.notes.whole(*keys)
        if heads is None and dim not in known:
            raise UntoldError(
                f"weights do not tell the number of heads, and the {name} of width {dim} is "
                f"none of the known ({', '.join(map(str, known))}); give {option}"
            )
        wide = self.shape_of(f"{part}blocks.0.mlp.fc1.weight")[0]
        try:
            chosen = self.choose(f"heads of the {name}", heads, usual=known.get(dim, 1))
            return TransformerSize(dim, len(blocks), chosen, None if wide == 4 * dim else wide)
        except ValueError as error:
            raise CheckpointError(f"{option}: {error}") from error

    def clip_size(self, patch_size: Size3) -> Size3:
        """Return frames and pixels that the model was trained on."""
        (time, height, width), given = patch_size, self.given
        tokens = self.tokens(height, width)
        side = math.isqrt(tokens)
        square = (side * height, side * width) if tokens and side * side == tokens else None
        noted = self.notes.size()
        size = self.choose("frame size", given.frame_size, square, noted, usual=(224, 224))
        told = 1 if self.family.axes == 4 else self.renamed.steps * time or None
        noted_frames = self.notes.whole("num_frames")
        frames = self.choose("number of frames", told, given.num_frames, noted_frames, usual=16)
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

        A table has a row for a class token if the others fill the frames that are given or noted,
        or else a square.
        """
        if self.family.conventions == "videomae":
            return 0
        shape = self.shape_of(POSITIONS)
        if self.renamed.steps:
            return (shape[1] - 1) // self.renamed.steps
        size = self.given.frame_size or self.notes.size()
        for tokens in (shape[1] - 1, shape[1]):
            square = size is None and math.isqrt(tokens) ** 2 == tokens
            if square or (size and tokens == (size[0] // height) * (size[1] // width)):
                return tokens
        return shape[1] - int("cls_token" in self.tensors)

    def target(self) -> TargetKind:
        flag = self.notes.flag("norm_pix_loss", "normlize_target")
        standardised: TargetKind = "joint" if self.family.conventions == "mae" else "per_channel"
        noted: TargetKind | None = None if flag is None else standardised if flag else "raw"
        return self.choose("target", self.given.target, noted, usual=self.family.target)

    def pooling(self) -> Pooling:
        """Return how a classifier pools its tokens, as its norms and its config tell."""
        if self.family.name == "mae_st_classifier":
            raise UntoldError(
                "the file does not say whether its head stands on the mean before or behind its "
                "norm. Take its encoder alone: --encoder-only"
            )
        parts = {name.partition(".")[0] for name in self.tensors}
        norms = tuple(name for name in ("fc_norm", "norm") if name in parts)
        first, pool = "cls_token" in self.tensors, self.notes.pool
        if norms == ("fc_norm",) and pool in (None, "avg"):
            return "mean_norm"
        if norms == ("norm",) and first and pool in (None, "token"):
            if pool is None and not self.notes.config:
                self.assumed.append("head on the class token")
            return "class_token"
        raise UntoldError(
            f"a head here stands on the normed mean of the tokens (a norm behind the mean alone), "
            f"or on the class token (a norm before it), and this has "
            f"{' and '.join(norms) or 'no norm'}, {'a' if first else 'no'} class token"
            + ("" if pool is None else f" and global_pool={pool!r}")
            + ": its head looks at something else. Take its encoder alone: --encoder-only"
        )

    def label_names(self) -> tuple[str, ...]:
        """Return the names of the classes: given, of the model's config, or their numbers."""
        count = self.shape_of("head.bias")[0]
        names = self.given.label_names or self.notes.label_names()
        if names is not None and len(names) != count:
            raise CheckpointError(
                f"the head has {count} classes, and there are {len(names)} names; give a name for "
                f"each: {LABELS}"
            )
        return names or tuple(map(str, range(count)))

    def pixels(self, clip_size: Size3) -> dict[str, Any]:
        """Return how frames become what it takes in tests, as noted or usual."""
        image, noted = clip_size[0] == 1, self.notes.pixels(clip_size[1:])
        usual = "bicubic" if image else "bilinear"
        interpolation = self.choose("interpolation", noted.interpolation, usual=usual)
        short_side, mean, std = noted.short_side, noted.mean, noted.std
        if noted.squeezed:
            self.assumed.append(SQUEEZED)
        elif not noted.resize and image:
            short_side = round(max(clip_size) * 256 / 224)
            self.assumed.append(f"held-out short side {short_side}")
        if mean is None or std is None:
            mean, std = self.family.pixels
            self.assumed.append(f"mean {mean} and deviation {std} of the pixels")
        return {
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "held_out_short_side": short_side,
        }
