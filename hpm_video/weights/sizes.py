"""What a model is, as far as its weights and what lies beside them tell."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hpm_video.models.classifier import Pooling
from hpm_video.models.encoder import EncoderShape
from hpm_video.models.pos_embed import Positions
from hpm_video.models.vit import Conventions, TransformerSize
from hpm_video.targets import TargetKind
from hpm_video.token_grid import Size3, TokenGrid
from hpm_video.training.checkpoint import CheckpointError
from hpm_video.weights.families import Family
from hpm_video.weights.files import Source, Tensors
from hpm_video.weights.layouts import Cut

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
    replace_positions: bool = False
    """Put computed positions in the place of learned ones, which changes what the model does."""
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
    assumed: tuple[str, ...] = ()
    """What the file does not say, and was taken as usual."""

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


@dataclass
class _Settled:
    """Values, each from the first source that has it."""

    assumed: list[str] = field(default_factory=list)

    def choose(self, name: str, *found: Any, usual: Any) -> Any:
        for value in found:
            if value is not None:
                return value
        self.assumed.append(f"{name} {usual}")
        return usual


def facts_of(
    source: Source,
    family: Family,
    tensors: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    given: Given,
    cut: Cut,
) -> ModelFacts:
    """Everything that is to be known of a model, from its weights by our names and their tables.

    Raises:
        CheckpointError: something cannot be told from the file and must be given, or is of a kind
            that our model cannot be.
    """
    settled = _Settled()
    described = source.arguments | source.config.get("model_config", {}) | source.config
    classifies = family.holds == "classifier" and not given.encoder_only
    clip_size = _clip_size(family, described, tables, given, cut, settled)
    known = DECODER_HEADS[family.conventions]
    decoder: TransformerSize | None = None
    if not classifies:
        decoder = given.decoder or FRESH_DECODERS[family.conventions].get(
            len(tensors["patch_embed.bias"])
        )
    if "reconstructor.head.weight" in tensors:
        heads = given.decoder_heads or described.get("decoder_num_attention_heads")
        decoder = size_of(tensors, "reconstructor.transformer", "--decoder-heads", heads, known)
    mean, std = _mean_and_std(source, family)
    return ModelFacts(
        clip_size,
        _frame_stride(clip_size, described, given, settled),
        cut,
        size_of(
            tensors,
            "encoder",
            "--heads",
            given.heads or described.get("num_attention_heads") or described.get("num_heads"),
            ENCODER_HEADS,
        ),
        decoder,
        family.positions,
        "class_token" in tensors,
        family.conventions,
        any(name.startswith("difficulty_decoder.") for name in tensors),
        _target(family, described, given, settled, classifies=classifies),
        _pooling(source, tensors) if classifies else None,
        _label_names(source, tensors, given) if classifies else (),
        mean,
        std,
        tuple(settled.assumed),
    )


def size_of(
    tensors: Mapping[str, Tensor],
    part: str,
    option: str,
    heads: int | None,
    known: Mapping[int, int],
) -> TransformerSize:
    """Of the transformer ``part`` among our tensors. ``heads``: where they are known for sure.

    Raises:
        CheckpointError: blocks are missing, its MLP has another width than ours, or nothing says
            how many heads it has.
    """
    pattern = re.compile(re.escape(part) + r"\.blocks\.(\d+)\.")
    blocks = sorted({int(match[1]) for name in tensors if (match := pattern.match(name))})
    if not blocks or blocks != list(range(len(blocks))):
        raise CheckpointError(
            f"the blocks of the {part} must be numbered from 0 on without a gap, got {blocks}; "
            f"fetch the whole file"
        )
    first = f"{part}.blocks.0."
    dim = tensors[f"{first}norm1.weight"].shape[0]
    wide = tensors[f"{first}mlp.0.weight"].shape[0]
    if heads is None and dim not in known:
        raise CheckpointError(
            f"weights do not tell the number of heads, and the {part} of width {dim} is none of "
            f"the known ({', '.join(map(str, known))}); give {option}"
        )
    try:
        return TransformerSize(
            dim,
            len(blocks),
            known[dim] if heads is None else int(heads),
            None if wide == 4 * dim else wide,
        )
    except ValueError as error:
        raise CheckpointError(f"{option}: {error}") from error


def _clip_size(
    family: Family,
    described: Mapping[str, Any],
    tables: Mapping[str, Tensor],
    given: Given,
    cut: Cut,
    settled: _Settled,
) -> Size3:
    """Frames and pixels that the model was trained on.

    Raises:
        CheckpointError: its positions are of other clips than is said.
    """
    steps, tokens = _tokens_of(family, tables, given, cut)
    time, height, width = cut.patch_size
    frames: int | None = steps * time if steps else None
    if family.axes == 4:
        frames = 1
    side = math.isqrt(tokens) if tokens else 0
    square = (side * height, side * width) if tokens and side * side == tokens else None
    sizes = [described.get(name) for name in ("input_size", "image_size", "img_size")]
    size = settled.choose(
        "frame size", given.frame_size, square, *map(_two, sizes), usual=(224, 224)
    )
    num_frames = settled.choose(
        "number of frames", frames, given.num_frames, described.get("num_frames"), usual=16
    )
    clip_size: Size3 = (num_frames, *size)
    try:
        grid = TokenGrid.of_clip(clip_size, cut.patch_size)
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


def _tokens_of(
    family: Family, tables: Mapping[str, Tensor], given: Given, cut: Cut
) -> tuple[int, int]:
    """-> time steps, tokens of each, as tables of positions have them; 0 where there are none"""
    for table in family.layout.tables:
        parts = [tables[name] for name in table.theirs if name in tables]
        if table.of == "encoder" and len(parts) == len(table.theirs):
            if len(parts) == 2:
                return parts[1].shape[1], parts[0].shape[1]
            return 0, _without_first_row(parts[0].shape[1], given, cut)
    return 0, 0


def _without_first_row(rows: int, given: Given, cut: Cut) -> int:
    """Rows of a table but that of a class token, where it has one.

    It has one if the others fill the frames that are given, or else a square.
    """
    for tokens in (rows - 1, rows):
        if given.frame_size is None:
            if math.isqrt(tokens) ** 2 == tokens:
                return tokens
        elif tokens == math.prod(
            size // patch for size, patch in zip(given.frame_size, cut.patch_size[1:], strict=True)
        ):
            return tokens
    return rows


def _two(size: Any) -> tuple[int, int] | None:
    """Height and width of what may be given by one number."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _frame_stride(
    clip_size: Size3, described: Mapping[str, Any], given: Given, settled: _Settled
) -> int:
    if clip_size[0] == 1:
        return 1
    return int(
        settled.choose("frame stride", given.frame_stride, described.get("sampling_rate"), usual=4)
    )


def _target(
    family: Family,
    described: Mapping[str, Any],
    given: Given,
    settled: _Settled,
    *,
    classifies: bool,
) -> TargetKind:
    if classifies:
        return family.target
    standardised: TargetKind = "joint" if family.conventions == "mae" else "per_channel"
    flags = [described.get(name) for name in ("norm_pix_loss", "normlize_target")]
    said = [standardised if flag else "raw" for flag in flags if isinstance(flag, bool)]
    chosen: TargetKind = settled.choose("target", given.target, *said, usual=family.target)
    return chosen


def _pooling(source: Source, tensors: Mapping[str, Tensor]) -> Pooling:
    """How a classifier pools its tokens, as the norms that it has tell.

    Raises:
        CheckpointError: in a way that ours cannot.
    """
    has = {name: f"{name}.weight" in tensors for name in ("pooling.norm", "encoder.norm")}
    if has["pooling.norm"] and not has["encoder.norm"]:
        return "mean_norm"
    if has["encoder.norm"] and not has["pooling.norm"] and "class_token" in tensors:
        return "class_token"
    present = [name for name, there in has.items() if there]
    raise CheckpointError(
        f"a head here stands on the normed mean of the tokens (a norm behind the mean alone), or "
        f"on the class token (a norm before it), and {source.path} has "
        f"{' and '.join(present) or 'no norm'} and "
        f"{'a' if 'class_token' in tensors else 'no'} class token: its head looks at something "
        f"else. Take its encoder alone: --encoder-only"
    )


def _label_names(source: Source, tensors: Mapping[str, Tensor], given: Given) -> tuple[str, ...]:
    """The names of the classes: given, of the model's config, or their numbers.

    Raises:
        CheckpointError: there are more or fewer than the head has classes.
    """
    count = len(tensors["head.bias"])
    stored = source.config.get("id2label")
    names = given.label_names
    if names is None and isinstance(stored, dict):
        names = tuple(str(stored[key]) for key in sorted(stored, key=int))
    if names is not None and len(names) != count:
        raise CheckpointError(
            f"the head has {count} classes, and there are {len(names)} names; give a name for "
            f"each: --labels FILE, with that of class i in line i"
        )
    return names or tuple(map(str, range(count)))


def _mean_and_std(source: Source, family: Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the pixels, as the folder of the model or the family has them."""
    before = source.preprocessor
    timm = source.config.get("pretrained_cfg", {})
    for mean, std in (
        (before.get("image_mean"), before.get("image_std")),
        (timm.get("mean"), timm.get("std")),
    ):
        if mean and std:
            return tuple(map(float, mean)), tuple(map(float, std))
    return family.mean_and_std or IMAGENET


def parameters_of(tensors: Iterable[Tensor]) -> int:
    """How many numbers they are."""
    return sum(tensor.numel() for tensor in tensors)


def in_float32(tensors: Tensors) -> Tensors:
    """The same in single precision, where they were saved in half."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
