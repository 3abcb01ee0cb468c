"""What a model is, as far as its weights and what lies beside them tell."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpm_video.config.choices import Conventions, Interpolation, Pooling, Positions, TransformerSize
from hpm_video.files.weights import CheckpointError
from hpm_video.models.encoder_shape import EncoderShape
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.patches import TargetKind
from hpm_video.weights.families import Family
from hpm_video.weights.files import Source, Tensors
from hpm_video.weights.layouts import Cut, Renamed
from hpm_video.weights.notes import Told

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
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


@dataclass(frozen=True)
class Given:
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
    looks: bool = False
    """Only look: what cannot be told is left open instead of refused."""


@dataclass(frozen=True)
class ModelFacts:
    """What a model is, and what clips it takes."""

    clip_size: Size3
    frame_stride: int
    cut: Cut
    encoder: TransformerSize
    decoder: TransformerSize | None
    positions: Positions
    class_token: bool
    conventions: Conventions
    predictor: bool
    target: TargetKind
    pooling: Pooling | None
    label_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    short_side: int | None
    """Of held-out frames before crops are cut out; none: a crop is as large as fits."""
    assumed: tuple[str, ...] = ()
    """What the file does not say, and was taken as usual."""
    unknown: tuple[str, ...] = ()
    """What neither the file nor anything usual says, where that is only looked at."""

    @property
    def grid(self) -> TokenGrid:
        """Tokens of a clip."""
        return TokenGrid.of_clip(self.clip_size, self.cut.patch_size)

    @property
    def shape(self) -> EncoderShape:
        """The encoder."""
        return EncoderShape(
            self.grid,
            self.cut.patch_size,
            self.encoder,
            self.positions,
            channels=self.cut.channels,
            class_token=self.class_token,
            conventions=self.conventions,
        )


def cut_of(kernel: Tensor) -> Cut:
    """How a patch embedding cuts clips: (D, C, height, width), or (D, C, time, height, width)"""
    _, channels, *size = kernel.shape
    time, height, width = (1, *size) if len(size) == 2 else size
    return Cut((time, height, width), channels)


def facts_of(
    source: Source, family: Family, renamed: Renamed, given: Given, cut: Cut
) -> ModelFacts:
    """Everything that is to be known of a model, from its weights by our names and their tables.

    Raises:
        CheckpointError: something cannot be told from the file and must be given, or is of a kind
            that our model cannot be.
    """
    return _Facts(source, family, renamed, given, cut).all()


class _Facts:
    """Values, each from the first source that has it."""

    def __init__(
        self, source: Source, family: Family, renamed: Renamed, given: Given, cut: Cut
    ) -> None:
        self.source, self.family, self.given, self.cut = source, family, given, cut
        self.renamed, self.tensors, self.tables = renamed, renamed.tensors, renamed.tables
        self.told = Told(source)
        self.classifies = family.holds == "classifier" and not given.encoder_only
        self.assumed: list[str] = []
        self.unknown: list[str] = []

    def all(self) -> ModelFacts:
        if self.family.class_token and "class_token" not in self.tensors:
            raise CheckpointError(f"missing {self.renamed.layout.theirs_of('class_token')}")
        known = DECODER_HEADS[self.family.conventions]
        heads = self.given.heads or self.told.whole("num_attention_heads", "num_heads")
        (dim, *_) = self.shape_of("patch_embed.weight")
        encoder = self.size_of("encoder", dim, heads, ENCODER_HEADS)
        decoder: TransformerSize | None = None
        if not self.classifies:
            usual = FRESH_DECODERS[self.family.conventions].get(encoder.dim)
            decoder = self.given.decoder or usual
        if self.family.holds == "autoencoder" and not self.given.encoder_only:
            heads = self.given.decoder_heads or self.told.whole("decoder_num_attention_heads")
            (*_, dim) = self.shape_of("reconstructor.head.weight")
            decoder = self.size_of("reconstructor.transformer", dim, heads, known)
        clip_size = self.clip_size()
        facts = ModelFacts(
            clip_size,
            self.frame_stride(clip_size),
            self.cut,
            encoder,
            decoder,
            self.family.positions,
            "class_token" in self.tensors,
            self.family.conventions,
            any(name.startswith("difficulty_decoder.") for name in self.tensors),
            self.target(),
            self.pooling() if self.classifies else None,
            self.label_names() if self.classifies else (),
            *IMAGENET,
            "bilinear",
            None,
        )
        facts = self.with_pixels(facts)
        return replace(facts, assumed=tuple(self.assumed), unknown=tuple(self.unknown))

    def choose(self, name: str, *found: Any, usual: Any) -> Any:
        for value in found:
            if value is not None:
                return value
        self.assumed.append(f"{name} {usual}")
        return usual

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of one of our tensors.

        Raises:
            CheckpointError: it is missing, or a single number.
        """
        theirs = self.renamed.layout.theirs_of(name)
        if name not in self.tensors:
            raise CheckpointError(f"missing {theirs}")
        shape = tuple(self.tensors[name].shape)
        if not shape:
            raise CheckpointError(f"{theirs} must have axes, got a single number")
        return shape

    def size_of(
        self, part: str, dim: int, heads: int | None, known: Mapping[int, int]
    ) -> TransformerSize:
        """Of the transformer ``part``, ``dim`` wide. ``heads``: where they are told.

        Raises:
            CheckpointError: blocks are missing, or nothing says how many heads it has.
        """
        pattern = re.compile(re.escape(part) + r"\.blocks\.(\d+)\.")
        blocks = sorted({int(match[1]) for name in self.tensors if (match := pattern.match(name))})
        if not blocks or blocks != list(range(len(blocks))):
            raise CheckpointError(
                f"the blocks of the {part} must be numbered from 0 on without a gap, got {blocks}; "
                f"fetch the whole file"
            )
        (wide, *_) = self.shape_of(f"{part}.blocks.0.mlp.0.weight")
        option = "--heads" if part == "encoder" else "--decoder-heads"
        what = f"heads of the {part.partition('.')[0]}"
        if heads is None and dim not in known:
            if not self.given.looks:
                raise CheckpointError(
                    f"weights do not tell the number of heads, and the {part} of width {dim} is "
                    f"none of the known ({', '.join(map(str, known))}); give {option}"
                )
            self.unknown.append(what)
            heads = 1
        try:
            chosen = self.choose(what, heads, usual=known.get(dim))
            return TransformerSize(dim, len(blocks), chosen, None if wide == 4 * dim else wide)
        except ValueError as error:
            raise CheckpointError(f"{option}: {error}") from error

    def clip_size(self) -> Size3:
        """Frames and pixels that the model was trained on.

        Raises:
            CheckpointError: its positions are of other clips than is said.
        """
        given = self.given
        steps, tokens = self._tokens()
        time, height, width = self.cut.patch_size
        frames: int | None = steps * time if steps else None
        if self.family.axes == 4:
            frames = 1
        side = math.isqrt(tokens) if tokens else 0
        square = (side * height, side * width) if tokens and side * side == tokens else None
        size = given.frame_size or square or self.told.size("input_size", "image_size", "img_size")
        size = self.choose("frame size", size, usual=(224, 224))
        frames = frames or given.num_frames or self.told.whole("num_frames")
        clip_size: Size3 = (self.choose("number of frames", frames, usual=16), *size)
        try:
            grid = TokenGrid.of_clip(clip_size, self.cut.patch_size)
        except ValueError as error:
            raise CheckpointError(
                f"these clips do not fit the patches of the model: {error}"
            ) from error
        if tokens and grid.tokens_per_step != tokens:
            raise CheckpointError(
                f"its positions are of {tokens} tokens of a time step, and frames of {size} have "
                f"{grid.tokens_per_step}; give the frame size of its training: --frame-size"
            )
        return clip_size

    def _tokens(self) -> tuple[int, int]:
        """-> time steps, tokens of each, as tables of positions have them; 0 where there are none

        Raises:
            CheckpointError: a table is missing, or none.
        """
        for table in self.family.layout.tables:
            if table.of != "encoder":
                continue
            rows = []
            for name in table.theirs:
                if name not in self.tables:
                    raise CheckpointError(f"missing {name}")
                shape = tuple(self.tables[name].shape)
                if len(shape) != 3:
                    raise CheckpointError(f"{name} must be a table of three axes, got {shape}")
                rows.append(shape[1])
            return (rows[1], rows[0]) if rows[1:] else (0, self._without_first_row(rows[0]))
        return 0, 0

    def _without_first_row(self, rows: int) -> int:
        """Rows of a table but that of a class token, where it has one.

        It has one if the others fill the frames that are given or told, or else a square.
        """
        size = self.given.frame_size or self.told.size("input_size", "image_size", "img_size")
        for tokens in (rows - 1, rows):
            if size is None and math.isqrt(tokens) ** 2 == tokens:
                return tokens
            if size is not None and tokens == math.prod(
                length // patch for length, patch in zip(size, self.cut.patch_size[1:], strict=True)
            ):
                return tokens
        return rows - int("class_token" in self.tensors)

    def frame_stride(self, clip_size: Size3) -> int:
        if clip_size[0] == 1:
            return 1
        told = self.given.frame_stride or self.told.whole("sampling_rate")
        return int(self.choose("frame stride", told, usual=4))

    def target(self) -> TargetKind:
        if self.classifies:
            return self.family.target
        of_family: TargetKind = "joint" if self.family.conventions == "mae" else "per_channel"
        flag = self.told.flag("norm_pix_loss", "normlize_target")
        said = None if flag is None else of_family if flag else "raw"
        chosen: TargetKind = self.choose(
            "target", self.given.target, said, usual=self.family.target
        )
        return chosen

    def pooling(self) -> Pooling | None:
        """How a classifier pools its tokens, as the norms that it has and its config tell.

        Raises:
            CheckpointError: in a way that ours cannot, or it is not told.
        """
        behind, before = (
            any(name.startswith(norm) for name in self.tensors) for norm in ("pooling.", ENCODERS)
        )
        first = "class_token" in self.tensors
        pool = self.told.timm.get("global_pool", self.source.config.get("global_pool"))
        if not self.family.head_is_told:
            reason = "the file does not say whether it stands on the mean before or behind its norm"
        elif behind and not before and pool in (None, "avg"):
            return "mean_norm"
        elif before and not behind and first and pool in (None, "token"):
            if pool is None and not self.source.config:
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
        if self.given.looks:
            self.unknown.append(ON_WHAT)
            return "mean_norm"
        raise CheckpointError(f"{reason}. Take its encoder alone: --encoder-only")

    def label_names(self) -> tuple[str, ...]:
        """The names of the classes: given, of the model's config, or their numbers.

        Raises:
            CheckpointError: there are more or fewer than the head has classes.
        """
        (count, *_) = self.shape_of("head.bias")
        names = self.given.label_names or self.told.label_names()
        if names is not None and len(names) != count:
            raise CheckpointError(
                f"the head has {count} classes, and there are {len(names)} names; give a name for "
                f"each: --labels FILE, with that of class i in line i"
            )
        return names or tuple(map(str, range(count)))

    def with_pixels(self, facts: ModelFacts) -> ModelFacts:
        """Mean, deviation and size of the frames that it is tested on, as told or usual."""
        images, size = facts.clip_size[0] == 1, facts.clip_size[1:]
        told = self.told.pixels(size)
        mean, std = self.family.mean_and_std or IMAGENET
        interpolation = self.choose(
            "interpolation", told.interpolation, usual="bicubic" if images else "bilinear"
        )
        short_side = told.short_side
        if told.otherwise:
            self.assumed.append(told.otherwise)
        elif not told.resize and images:
            short_side = round(max(size) * 256 / 224)
            self.assumed.append(f"held-out short side {short_side}")
        if told.mean is None or told.std is None:
            self.assumed.append(f"mean {mean} and deviation {std} of the pixels")
        else:
            mean, std = told.mean, told.std
        return replace(
            facts, mean=mean, std=std, interpolation=interpolation, short_side=short_side
        )


ENCODERS = "encoder.norm"
ON_WHAT = "what the head stands on"


def parameters_of(tensors: Iterable[Tensor]) -> int:
    """How many numbers they are."""
    return sum(tensor.numel() for tensor in tensors)


def in_float32(tensors: Tensors) -> Tensors:
    """The same in single precision, each with a place in memory of its own.

    Raises:
        CheckpointError: one is no plain tensor of real numbers, or one of them is not finite.
    """
    found = {}
    for name, value in tensors.items():
        dense = value.layout == torch.strided and not value.is_quantized
        if value.is_meta or not value.numel() or not dense:
            raise CheckpointError(f"{name} must be a plain tensor with data, got {_kind(value)}")
        if not value.is_floating_point():
            raise CheckpointError(
                f"{name} must hold real floating-point numbers, got {value.dtype}"
            )
        found[name] = value.float().clone()
        if not found[name].isfinite().all():
            raise CheckpointError(f"{name} has numbers that are not finite; it is of no use")
    return found


def _kind(value: Tensor) -> str:
    empty = "" if value.numel() else "an empty one of "
    return f"{empty}{value.dtype} on {value.device}, {value.layout}"
