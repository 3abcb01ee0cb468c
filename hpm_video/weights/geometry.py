"""The config of a model, as far as its weights and what lies beside them tell."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hpm_video.config.choices import Conventions, Pooling, TransformerSize
from hpm_video.config.data import DataConfig, PretrainDataConfig
from hpm_video.config.mining import MaskingConfig, MiningConfig
from hpm_video.config.model import ClassifierConfig, ModelConfig
from hpm_video.config.recognition import EvaluationConfig
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.families import Family
from hpm_video.weights.files import Source, Tensors
from hpm_video.weights.layouts import KERNEL, POSITIONS, SPACE, Renamed
from hpm_video.weights.notes import Notes

T = TypeVar("T")
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Heads of the known encoders by their width."""
DECODER_HEADS: dict[Conventions, dict[int, int]] = {
    "videomae": {192: 3, 384: 6, 512: 8, 640: 8},
    "mae": {512: 16},
}
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
HEAD, DECODER = "what the head stands on", "decoder"
"""What may be unknown, beside numbers of heads."""


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
    unknown: tuple[str, ...]
    """What neither the file nor anything usual says, where that is only looked at."""


def infer(
    source: Source, family: Family, renamed: Renamed, overrides: Overrides, *, look: bool = False
) -> Inferred:
    """Return the config whose model the tensors of a file are.

    ``look``: what cannot be known is left open instead of refused.

    Raises:
        ConfigError, CheckpointError: something cannot be known and must be given, or is of a kind
            that our model cannot be.
    """
    return _Inference(Notes(source), family, renamed, overrides, look).all()


@dataclass
class _Inference:
    """Values, each from the first place that has it."""

    notes: Notes
    family: Family
    renamed: Renamed
    given: Overrides
    look: bool
    assumed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Tensors:
        return self.renamed.tensors

    @property
    def classifies(self) -> bool:
        return self.family.holds == "classifier" and not self.given.encoder_only

    def all(self) -> Inferred:
        if self.family.needs_class_token and "cls_token" not in self.tensors:
            raise CheckpointError(f"missing {self.renamed.named('cls_token')}")
        dim, channels, *patch_size = self.shape_of(KERNEL)
        model: dict[str, Any] = {
            "encoder": self.size_of("", dim, self.given.heads, "num_attention_heads"),
            "patch_size": tuple(patch_size),
            "channels": channels,
            "positions": "space_time" if self.family.conventions == "mae" else "sequence",
            "class_token": "cls_token" in self.tensors,
            "conventions": self.family.conventions,
        }
        if not self.classifies:
            model["decoder"] = self.decoder(model["encoder"])
        clip_size = self.clip_size((patch_size[0], patch_size[1], patch_size[2]))
        data: dict[str, Any] = {
            "num_frames": clip_size[0],
            "frame_size": clip_size[1:],
            "frame_stride": self.frame_stride(clip_size),
        }
        grid = TokenGrid.of_clip(clip_size, model["patch_size"])
        config: PretrainConfig | FinetuneConfig
        names: tuple[str, ...] = ()
        if self.classifies:
            pooling, names = self.pooling(), self.label_names()
            config = FinetuneConfig(
                data=DataConfig(**data, **self.pixels(clip_size)),
                model=ClassifierConfig(
                    **model,
                    num_classes=len(names),
                    pretrained_grid=(grid.time, grid.height, grid.width),
                    pooling=pooling,
                ),
                test=EvaluationConfig() if grid.time > 1 else EvaluationConfig(clips=1, crops=1),
            )
        else:
            config = self.pretrain_config(model, data, clip_size, video=grid.time > 1)
        return Inferred(config, names, tuple(self.assumed), tuple(self.unknown))

    def pretrain_config(
        self, model: dict[str, Any], data: dict[str, Any], clip_size: Size3, *, video: bool
    ) -> PretrainConfig:
        target = self.target()
        predicts = "difficulty_decoder.head.weight" in self.tensors
        hides = MaskingConfig(ratio=0.9 if video else 0.75)
        crop: Any = "multi_scale" if video else "random_resized"
        return PretrainConfig(
            data=PretrainDataConfig(**data, **self.pixels(clip_size), crop=crop),
            model=ModelConfig(**model),
            masking=hides if predicts else MaskingConfig(ratio=hides.ratio, strategy="random"),
            mining=MiningConfig(target=target, predictor="relative" if predicts else "none"),
        )

    def choose(self, name: str, *found: T | None, usual: T) -> T:
        for value in found:
            if value is not None:
                return value
        self.assumed.append(f"{name} {usual}")
        return usual

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"missing {self.renamed.named(name)}")
        shape = tuple(self.tensors[name].shape)
        if not shape:
            raise CheckpointError(f"{self.renamed.named(name)} must have axes, got a single number")
        return shape

    def decoder(self, encoder: TransformerSize) -> TransformerSize:
        """Return the size of the decoder, or of one that starts fresh."""
        if self.family.holds == "autoencoder" and not self.given.encoder_only:
            dim = self.shape_of("reconstructor.head.weight")[-1]
            key = "decoder_num_attention_heads"
            return self.size_of("reconstructor.", dim, self.given.decoder_heads, key)
        usual = FRESH_DECODERS[self.family.conventions].get(encoder.dim)
        chosen = self.given.decoder or usual
        if chosen is None and not self.look:
            raise CheckpointError(
                f"it has no decoder, and none is known for an encoder of width {encoder.dim}; "
                f"give the size of one that starts fresh: --decoder WIDTH DEPTH HEADS"
            )
        if chosen is None:
            self.unknown.append(DECODER)
        return chosen or encoder

    def size_of(self, part: str, dim: int, heads: int | None, key: str) -> TransformerSize:
        """Return the size of a transformer. ``heads``: where they are given; ``key``: or noted."""
        name, option = ("decoder", "--decoder-heads") if part else ("encoder", "--heads")
        found = (re.match(rf"{re.escape(part)}blocks\.(\d+)\.", each) for each in self.tensors)
        blocks = sorted({int(match[1]) for match in found if match})
        if not blocks or blocks != list(range(len(blocks))):
            raise CheckpointError(
                f"the blocks of the {name} must be numbered from 0 on without a gap, got {blocks}; "
                f"fetch the whole file"
            )
        known: Mapping[int, int] = ENCODER_HEADS
        if part:
            known = DECODER_HEADS[self.family.conventions]
        heads = heads or self.notes.whole(key) or (None if part else self.notes.whole("num_heads"))
        if heads is None and dim not in known:
            if not self.look:
                raise CheckpointError(
                    f"weights do not tell the number of heads, and the {name} of width {dim} is "
                    f"none of the known ({', '.join(map(str, known))}); give {option}"
                )
            self.unknown.append(f"heads of the {name}")
            heads = 1
        wide = self.shape_of(f"{part}blocks.0.mlp.fc1.weight")[0]
        try:
            chosen = self.choose(f"heads of the {name}", heads, usual=known.get(dim, 1))
            return TransformerSize(dim, len(blocks), chosen, None if wide == 4 * dim else wide)
        except ValueError as error:
            raise CheckpointError(f"{option}: {error}") from error

    def clip_size(self, patch_size: Size3) -> Size3:
        """Return frames and pixels that the model was trained on."""
        given, (time, height, width) = self.given, patch_size
        tokens = self.tokens(height, width)
        side = math.isqrt(tokens)
        square = (side * height, side * width) if tokens and side * side == tokens else None
        size = self.choose(
            "frame size", given.frame_size, square, self.notes.size(), usual=(224, 224)
        )
        frames: int | None = self.renamed.steps * time or None
        if self.family.layout.kernel_axes == 4:
            frames = 1
        noted = self.notes.whole("num_frames")
        frames = self.choose("number of frames", frames, given.num_frames, noted, usual=16)
        try:
            grid = TokenGrid.of_clip((frames, *size), patch_size)
        except ValueError as error:
            raise CheckpointError(
                f"these clips do not fit the patches of the model: {error}"
            ) from error
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
        if not any(map(self.family.layout.theirs, (POSITIONS, SPACE))):
            return 0
        shape = self.shape_of(POSITIONS)
        if len(shape) != 3:
            raise CheckpointError(
                f"{self.renamed.named(POSITIONS)} must be a table of three axes, got {shape}"
            )
        if self.renamed.steps:
            return (shape[1] - 1) // self.renamed.steps
        size = self.given.frame_size or self.notes.size()
        for tokens in (shape[1] - 1, shape[1]):
            square = size is None and math.isqrt(tokens) ** 2 == tokens
            if square or (size and tokens == (size[0] // height) * (size[1] // width)):
                return tokens
        return shape[1] - int("cls_token" in self.tensors)

    def frame_stride(self, clip_size: Size3) -> int:
        if clip_size[0] == 1:
            return 1
        noted = self.notes.whole("sampling_rate")
        return self.choose("frame stride", self.given.frame_stride, noted, usual=4)

    def target(self) -> TargetKind:
        flag = self.notes.flag("norm_pix_loss", "normlize_target")
        standardised: TargetKind = "joint" if self.family.conventions == "mae" else "per_channel"
        noted: TargetKind | None = None if flag is None else standardised if flag else "raw"
        return self.choose("target", self.given.target, noted, usual=self.family.target)

    def pooling(self) -> Pooling:
        """Return how a classifier pools its tokens, as its norms and its config tell."""
        behind, before = (
            any(name.startswith(norm) for name in self.tensors) for norm in ("fc_norm.", "norm.")
        )
        first, pool = "cls_token" in self.tensors, self.notes.pool
        if self.family.name == "mae_st_classifier":
            reason = "the file does not say whether it stands on the mean before or behind its norm"
        elif behind and not before and pool in (None, "avg"):
            return "mean_norm"
        elif before and not behind and first and pool in (None, "token"):
            if pool is None and not self.notes.config:
                self.assumed.append("head on the class token")
            return "class_token"
        else:
            norms = [name for name, has in (("fc_norm", behind), ("norm", before)) if has]
            reason = (
                f"a head here stands on the normed mean of the tokens (a norm behind the mean "
                f"alone), or on the class token (a norm before it), and this has "
                f"{' and '.join(norms) or 'no norm'}, {'a' if first else 'no'} class token"
                + ("" if pool is None else f" and global_pool={pool!r}")
                + ": its head looks at something else"
            )
        if self.look:
            self.unknown.append(HEAD)
            return "mean_norm"
        raise CheckpointError(f"{reason}. Take its encoder alone: --encoder-only")

    def label_names(self) -> tuple[str, ...]:
        """Return the names of the classes: given, of the model's config, or their numbers."""
        count = self.shape_of("head.bias")[0]
        names = self.given.label_names or self.notes.label_names()
        if names is not None and len(names) != count:
            raise CheckpointError(
                f"the head has {count} classes, and there are {len(names)} names; give a name for "
                f"each: --labels FILE, with that of class i in line i"
            )
        return names or tuple(map(str, range(count)))

    def pixels(self, clip_size: Size3) -> dict[str, Any]:
        """Return how frames become what it takes in tests, as noted or usual."""
        image, size = clip_size[0] == 1, clip_size[1:]
        noted = self.notes.pixels(size)
        interpolation = self.choose(
            "interpolation", noted.interpolation, usual="bicubic" if image else "bilinear"
        )
        short_side = noted.short_side
        if noted.otherwise:
            self.assumed.append(noted.otherwise)
        elif not noted.resize and image:
            short_side = round(max(size) * 256 / 224)
            self.assumed.append(f"held-out short side {short_side}")
        mean, std = noted.mean, noted.std
        if mean is None or std is None:
            mean, std = self.family.mean_and_std
            self.assumed.append(f"mean {mean} and deviation {std} of the pixels")
        return {
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "held_out_short_side": short_side,
        }
