"""What the paper's Figure 2 draws, for video: where a clip is hard, and what is hidden of it.

A :class:`Study` holds everything about one clip; it is measured once and drawn as a sheet (PNG)
or as an animation (GIF, MP4).
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import matplotlib
import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hpm_video.data.dataset import ClipBatch
from hpm_video.losses import count_ordered_pairs, reconstruction_errors
from hpm_video.masking import Pick, TokenMask
from hpm_video.mining import HardPatchesMining, TargetRule
from hpm_video.pixels import normalise
from hpm_video.randomness import uniform
from hpm_video.targets import PatchStatistics, TargetKind, patchify, unpatchify
from hpm_video.token_grid import Size3, TokenGrid
from hpm_video.training.engine import Engine
from hpm_video.training.objective import Model

Frames = NDArray[np.uint8]
"""(T, H, W, 3)"""
Scores = NDArray[np.float32]
"""(N,)"""
Flags = NDArray[np.bool_]
"""(N,)"""
Colour = tuple[int, int, int]
Value = TypeVar("Value", bound=np.generic)
StatisticsSource = Literal["none", "input", "visible"]
"""Where mean and contrast of a reconstructed patch come from: raw pixels need none; the hidden
patch itself; or the visible patches around it, which gives nothing away."""

MAX_COLUMNS = 8
SMALLEST_CELL = 150
"""Frames narrower than this are enlarged by a whole factor."""
PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 28, 32)
FAINT_INK: Colour = (96, 96, 104)
HIDDEN: Colour = (196, 198, 203)
PICKED: Colour = (214, 116, 82)
UNKNOWN: Colour = (226, 228, 232)
"""Of tokens whose error is not known, because no mask hid them."""
COLOUR_MAP = "inferno"


@dataclass(frozen=True, eq=False)
class Study:
    """One clip: how hard its tokens are, how hard they seem, what is hidden and what is made up."""

    name: str
    grid: TokenGrid
    patch_size: Size3
    frames: Frames
    true_error: Scores
    """Mean over the masks in which the token was hidden; NaN where it never was."""
    difficulty: Scores | None
    """The teacher's scores, seeing the whole clip; none without a predictor."""
    masked: Flags
    picked: Flags
    """Which of the hidden tokens are hidden for their difficulty."""
    reconstruction: Frames
    """Made from that mask; visible patches are the input's."""
    pick: Pick
    num_masks: int
    """Random masks that the true error is averaged over."""
    target: TargetKind
    statistics: StatisticsSource

    @property
    def ranking_accuracy(self) -> float | None:
        """Share of pairs of tokens that the teacher puts in the order of their true error."""
        if self.difficulty is None:
            return None
        known = ~np.isnan(self.true_error)
        scores, errors = (
            torch.from_numpy(values[known])[None] for values in (self.difficulty, self.true_error)
        )
        pairs = count_ordered_pairs(scores, errors)
        return float(pairs.correct / pairs.total) if pairs.total else None


# Measuring -------------------------------------------------------------------------------------


@torch.no_grad()
def study_clips(
    objective: HardPatchesMining,
    student: Model,
    batch: ClipBatch,
    *,
    num_masks: int = 10,
    hard_fraction: float | None = None,
    ground_truth_statistics: bool = True,
) -> list[Study]:
    """Study each clip of a batch. Draws are keyed by the clip, so a picture can be made again.

    Args:
        objective: what was trained, with its teacher.
        student: the model, or an engine that runs it.
        batch: clips, where the models are.
        num_masks: random masks that the true error is averaged over.
        hard_fraction: share of the hidden units that is picked by difficulty; by default as at
            the end of training. Without a teacher masks are random.
        ground_truth_statistics: give each reconstructed patch the mean and the contrast of the
            hidden one; otherwise of the visible patches around it.

    Raises:
        ValueError: there is no mask to measure with, or the hard fraction is none.
    """
    rule, targets = objective.masks, objective.targets
    fraction = rule.strategy.last_fraction if hard_fraction is None else hard_fraction
    if num_masks < 1:
        raise ValueError(f"the true error needs at least 1 random mask, got {num_masks}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"the hard fraction must lie in [0, 1], got {fraction}")
    clips = normalise(batch.clips, targets.mean, targets.std)
    difficulty, mask, picked = _propose(objective, clips, batch.keys, fraction)
    reconstruction = reconstruct(
        student(clips, mask).pixels,
        batch.clips,
        mask,
        targets,
        ground_truth_statistics=ground_truth_statistics,
    )
    true_errors = _mean_errors(objective, student, batch, num_masks)
    source: StatisticsSource = "input" if ground_truth_statistics else "visible"
    return [
        Study(
            name=Path(batch.files[i]).stem,
            grid=rule.grid,
            patch_size=targets.patch_size,
            frames=_to_frames(batch.clips[i]),
            true_error=true_errors[i].cpu().numpy(),
            difficulty=None if difficulty is None else difficulty[i].cpu().numpy(),
            masked=mask.masked[i].cpu().numpy(),
            picked=picked[i].cpu().numpy(),
            reconstruction=_to_frames(reconstruction[i]),
            pick=rule.strategy.pick,
            num_masks=num_masks,
            target=targets.kind,
            statistics="none" if targets.kind == "raw" else source,
        )
        for i in range(len(batch.clips))
    ]


def reconstruct(
    predicted: Tensor,
    clips: Tensor,
    mask: TokenMask,
    targets: TargetRule,
    *,
    ground_truth_statistics: bool,
) -> Tensor:
    """Fill the hidden patches of clips with what was predicted for them.

    (B, M, P) predicted targets, (B, C, T, H, W) uint8 -> (B, C, T, H, W) uint8
    """
    grid = TokenGrid.of_clip((clips.shape[2], clips.shape[3], clips.shape[4]), targets.patch_size)
    patches = targets.patches(clips)
    if ground_truth_statistics:
        statistics = targets.statistics(mask.take_masked(patches))
    else:
        visible = targets.statistics(mask.take_visible(patches))
        with torch.autocast(clips.device.type, enabled=False):
            statistics = statistics_from_visible(visible, mask, grid)
    hidden = predicted.float() * statistics.scale + statistics.mean
    visible_pixels = mask.take_visible(patchify(clips, targets.patch_size))
    filled = mask.merge(visible_pixels, _to_uint8(hidden, targets))
    return unpatchify(filled, targets.patch_size, grid)


def statistics_from_visible(
    visible: PatchStatistics, mask: TokenMask, grid: TokenGrid
) -> PatchStatistics:
    """Estimate the statistics of hidden patches: 2 x (B, V, .) of the visible -> 2 x (B, M, .)

    A mean weighted by distance ** -4 in steps of the grid: with a power of at most 3, the many
    patches far away would outweigh the few near ones.
    """
    sizes = (grid.time, grid.height, grid.width)
    axes = [torch.arange(size, device=mask.masked.device) for size in sizes]
    places = torch.cartesian_prod(*axes).float()
    weights = torch.cdist(places[mask.masked_ids], places[mask.visible_ids]) ** -4
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return PatchStatistics(weights @ visible.mean, weights @ visible.scale)


class _Proposal(NamedTuple):
    difficulty: Tensor | None
    mask: TokenMask
    picked: Tensor
    """(B, N) bool, which tokens are hidden for their difficulty."""


def _propose(
    objective: HardPatchesMining, clips: Tensor, keys: Tensor, fraction: float
) -> _Proposal:
    """A mask of which the teacher, where there is one, picks a ``fraction``."""
    rule = objective.masks
    difficulty, num_picked = None, 0
    if objective.teacher is not None:
        difficulty = objective.teacher.score_all(clips).float()
        num_picked = int(rule.num_masked * fraction)
    priority = uniform(keys, rule.num_units, "picture")
    picked = replace(rule, num_masked=num_picked).draw(difficulty, priority, num_picked)
    return _Proposal(difficulty, rule.draw(difficulty, priority, num_picked), picked.masked)


def _mean_errors(
    objective: HardPatchesMining, student: Model, batch: ClipBatch, num_masks: int
) -> Tensor:
    """(B, N) error of each token, averaged over the masks that hide it; NaN where none does.

    ``HardPatchesMining.examine`` would ask the teacher again for every mask.
    """
    rule, targets = objective.masks, objective.targets
    clips = normalise(batch.clips, targets.mean, targets.std)
    shape = (len(clips), rule.grid.num_tokens)
    total = torch.zeros(shape, device=clips.device)
    count = torch.zeros(shape, device=clips.device)
    for index in range(num_masks):
        priority = uniform(batch.keys, rule.num_units, f"picture {index}")
        mask = rule.draw(None, priority, num_picked=0)
        predicted = student(clips, mask).pixels
        errors = reconstruction_errors(predicted, targets.of(batch.clips, mask))
        total.scatter_add_(1, mask.masked_ids, errors)
        count += mask.masked
    return total / count


def _to_uint8(patches: Tensor, targets: TargetRule) -> Tensor:
    """Undo ``TargetRule.patches``: (B, M, P) -> (B, M, P) uint8"""
    pixels = rearrange(patches, "b m (p c) -> b m p c", c=len(targets.mean))
    if targets.kind != "per_channel":
        pixels = pixels * pixels.new_tensor(targets.std) + pixels.new_tensor(targets.mean)
    pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "b m p c -> b m (p c)")


def _to_frames(clip: Tensor) -> Frames:
    """(C, T, H, W) uint8 -> (T, H, W, 3); other than three channels are averaged to grey"""
    if len(clip) != 3:
        clip = repeat(clip.float().mean(dim=0).round().to(torch.uint8), "t h w -> c t h w", c=3)
    frames: Frames = rearrange(clip, "c t h w -> t h w c").cpu().numpy()
    return frames


# Panels ----------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One row of a sheet, one column of an animation."""

    title: str
    note: str
    frames: Frames


def make_panels(study: Study) -> list[Panel]:
    """The views of a study, each as large as the clip."""
    difficulty = study.difficulty
    source = {
        "none": "raw pixels",
        "input": "patch mean and contrast taken from the input",
        "visible": "patch mean and contrast estimated from visible patches",
    }[study.statistics]
    panels = [
        Panel("Input", "", study.frames),
        Panel("True error", _over_masks(study), _heat_map(study.true_error, study)),
        Panel("Mask", _origin_of_mask(study), _draw_mask(study)),
        Panel("Reconstruction", source, study.reconstruction),
    ]
    if difficulty is not None:
        note = "by the teacher, which sees the whole clip"
        panels.insert(2, Panel("Predicted difficulty", note, _heat_map(difficulty, study)))
    return panels


def to_ranks(scores: Scores) -> Scores:
    """Place of each score among all, from 0 (smallest) to 1: (N,) -> (N,)

    Equal scores share a place, NaN stays. Ranks, because errors and predicted difficulties have
    different scales, and training fits only the order of one to that of the other.
    """
    known = ~np.isnan(scores)
    _, place, counts = np.unique(scores[known], return_inverse=True, return_counts=True)
    middle = counts.cumsum() - (counts + 1) / 2
    ranks = np.full_like(scores, np.nan)
    ranks[known] = middle[place] / max(known.sum() - 1, 1)
    return ranks


def _heat_map(scores: Scores, study: Study) -> Frames:
    ranks = to_ranks(scores)
    colours = _colour_table()[(np.nan_to_num(ranks) * 255).round().astype(int)]
    colours[np.isnan(ranks)] = UNKNOWN
    return _spread(colours, study)


def _draw_mask(study: Study) -> Frames:
    colours = np.full((len(study.masked), 3), HIDDEN, dtype=np.uint8)
    colours[study.picked] = PICKED
    hidden = _spread(study.masked[:, None], study)
    return np.where(hidden, _spread(colours, study), study.frames)


def _spread(values: NDArray[Value], study: Study) -> NDArray[Value]:
    """Give every pixel its token's value: (N, K) -> (T, H, W, K)"""
    grid, patch = study.grid, study.patch_size
    lattice = values.reshape(grid.time, grid.height, grid.width, -1)
    for axis in range(3):
        lattice = lattice.repeat(patch[axis], axis=axis)
    return lattice


@lru_cache(maxsize=1)
def _colour_table() -> NDArray[np.uint8]:
    """(256, 3)"""
    table = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, 256))[:, :3]
    return (table * 255).round().astype(np.uint8)


def _over_masks(study: Study) -> str:
    return f"mean over {study.num_masks} random mask{'s' if study.num_masks > 1 else ''}"


def _origin_of_mask(study: Study) -> str:
    return "drawn from the prediction" if study.picked.any() else "random"


# Drawing ---------------------------------------------------------------------------------------


class Style(NamedTuple):
    """Measures of a picture, in pixels."""

    cell: tuple[int, int]
    """Width and height of an enlarged frame."""
    text: int
    gap: int = 6
    """Between neighbouring frames."""
    margin: int = 24

    @classmethod
    def of(cls, study: Study) -> "Style":
        """Measures that suit the clip's frames: small ones are enlarged by a whole factor."""
        height, width = study.frames.shape[1:3]
        factor = math.ceil(SMALLEST_CELL / width)
        return cls((width * factor, height * factor), text=15 if width * factor < 200 else 19)

    @property
    def bold(self) -> ImageFont.FreeTypeFont:
        """Of titles."""
        return _font("DejaVuSans-Bold.ttf", self.text)

    @property
    def regular(self) -> ImageFont.FreeTypeFont:
        """Of facts."""
        return _font("DejaVuSans.ttf", self.text)

    @property
    def small(self) -> ImageFont.FreeTypeFont:
        """Of labels and notes."""
        return _font("DejaVuSans.ttf", self.text - 2)

    def enlarge(self, frame: NDArray[np.uint8]) -> Image.Image:
        """Make each pixel a square: (H, W, 3) -> an image as large as a cell"""
        return Image.fromarray(frame).resize(self.cell, Image.Resampling.NEAREST)


def draw_sheet(studies: Study | Sequence[Study]) -> Image.Image:
    """Views as rows and time steps as columns, for one clip or several of one model.

    Short clips stand side by side, as long as their columns fit.
    """
    studies = [studies] if isinstance(studies, Study) else list(studies)
    style = Style.of(studies[0])
    lines: list[list[Study]] = []
    free = 0
    for study in studies:
        columns = len(_shown_frames(study))
        if columns > free:
            lines.append([])
            free = MAX_COLUMNS
        lines[-1].append(study)
        free -= columns
    body = stack([_draw_line(line, style) for line in lines], 2 * style.margin)
    width = max(body.width, 44 * style.text)
    parts = [_draw_caption(studies, width, style), body, _draw_footer(studies, width, style)]
    return pad(stack(parts, style.margin), style.margin)


def draw_animation(study: Study) -> list[Image.Image]:
    """Views side by side, one image per frame of the clip."""
    style = Style.of(study)
    panels = make_panels(study)
    titles = [_draw_title(panel, style.cell[0], style) for panel in panels]
    gap = 2 * style.gap
    head = beside(titles, gap)
    caption = [_draw_caption([study], head.width, style), _draw_name(study, head.width, style)]
    head = stack([*caption, head], style.margin // 2)
    footer = _draw_footer([study], head.width, style)
    images = []
    for time in range(len(study.frames)):
        views = beside([style.enlarge(panel.frames[time]) for panel in panels], gap)
        label = draw_text(f"frame {time + 1} of {len(study.frames)}", style.small, FAINT_INK)
        body = stack([head, views, label], style.gap)
        images.append(pad(stack([body, footer], style.margin), style.margin))
    return images


def _shown_frames(study: Study) -> list[int]:
    """First frames of the time steps that a sheet shows, spread evenly over all."""
    steps = study.grid.time
    columns = np.linspace(0, steps - 1, min(steps, MAX_COLUMNS))
    return [round(column) * study.patch_size[0] for column in columns]


def _draw_line(studies: list[Study], style: Style) -> Image.Image:
    """Studies side by side, with the titles of their rows at the left."""
    blocks = beside([_draw_block(study, style) for study in studies], 3 * style.gap)
    width = 14 * style.text
    titles = [_draw_title(panel, width, style) for panel in make_panels(studies[0])]
    row = style.cell[1] + style.gap
    first = blocks.height + style.gap - len(titles) * row
    column = Image.new("RGB", (width, blocks.height), PAPER)
    for index, title in enumerate(titles):
        column.paste(title, (0, first + index * row + (style.cell[1] - title.height) // 2))
    return beside([column, blocks], style.margin)


def _draw_block(study: Study, style: Style) -> Image.Image:
    """Name, frame numbers and views of one study."""
    shown = _shown_frames(study)
    labels = [
        draw_text(f"frame {time + 1}", style.small, FAINT_INK, width=style.cell[0])
        for time in shown
    ]
    rows = [
        beside([style.enlarge(panel.frames[time]) for time in shown], style.gap)
        for panel in make_panels(study)
    ]
    name = _draw_name(study, rows[0].width, style)
    return stack([name, beside(labels, style.gap), *rows], style.gap)


def _draw_name(study: Study, width: int, style: Style) -> Image.Image:
    """Name and ranking accuracy of a study."""
    lines = [draw_text(shorten(study.name, width, style.bold), style.bold, width=width)]
    if study.ranking_accuracy is not None:
        lines.append(draw_text(f"ranking {study.ranking_accuracy:.2f}", style.regular, width=width))
    return stack(lines, 2)


def _draw_title(panel: Panel, width: int, style: Style) -> Image.Image:
    title = draw_text(panel.title, style.bold, width=width)
    note = draw_text(panel.note, style.small, FAINT_INK, width=width)
    return stack([title, note], 3)


def _draw_caption(studies: Sequence[Study], width: int, style: Style) -> Image.Image:
    """How much is hidden and why; each fact once."""
    facts = dict.fromkeys(_describe_mask(study) for study in studies)
    return draw_text("\n".join(facts), style.regular, width=width)


def _describe_mask(study: Study) -> str:
    masked, picked, total = study.masked.sum(), study.picked.sum(), len(study.masked)
    words = f"{masked} of {total} patches hidden ({masked / total:.0%})"
    if not picked:
        return f"{words}, at random"
    return f"{words}, {picked} of them because the teacher finds them {study.pick}"


def _draw_footer(studies: Sequence[Study], width: int, style: Style) -> Image.Image:
    """Legend and footnotes."""
    keys = [_draw_colour_bar(style)]
    swatches = [(HIDDEN, "hidden at random")]
    if any(study.picked.any() for study in studies):
        swatches.append((PICKED, f"hidden for being {studies[0].pick}"))
    if any(np.isnan(study.true_error).any() for study in studies):
        swatches.append((UNKNOWN, "error unknown: no random mask hid it"))
    for colour, words in swatches:
        square = Image.new("RGB", (style.text, style.text), colour)
        keys.append(beside([square, draw_text(words, style.small)], style.gap))
    notes = [draw_text(note, style.small, FAINT_INK, width=width) for note in _footnotes(studies)]
    return stack([flow(keys, width, style.margin), *notes], style.gap)


def _draw_colour_bar(style: Style) -> Image.Image:
    bar = Image.fromarray(_colour_table()[None]).resize((9 * style.text, style.text))
    low, high = (
        draw_text(words, style.small) for words in ("easiest", "hardest patch of the clip")
    )
    return beside([low, bar, high], style.gap)


def _footnotes(studies: Sequence[Study]) -> list[str]:
    errors = np.concatenate([study.true_error for study in studies])
    target = {
        "raw": "normalised pixels",
        "joint": "pixels standardised within each patch",
        "per_channel": "pixels standardised within each patch and channel",
    }[studies[0].target]
    notes = [
        f"Error: mean squared error of {target}, here {np.nanmin(errors):.2g} to "
        f"{np.nanmax(errors):.2g}. Colours are ranks among the patches of a clip, because "
        "difficulty is predicted as an order, without a unit."
    ]
    if studies[0].difficulty is not None:
        notes.append(
            "Ranking: share of pairs of patches that the prediction puts in the order of their "
            "true error; guessing gives 0.50."
        )
    return notes


# Setting type and images -----------------------------------------------------------------------


@lru_cache(maxsize=16)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", file), size)


def draw_text(
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: Colour = INK,
    *,
    width: int | None = None,
) -> Image.Image:
    """Text on white: wrapped to ``width``, which the image then has, or as wide as it comes."""
    lines = text.split("\n")
    if width is None:
        width = math.ceil(max(font.getlength(line) for line in lines))
    else:
        lines = [part for line in lines for part in _wrap(line, width, font)]
    leading = sum(font.getmetrics())
    image = Image.new("RGB", (max(width, 1), leading * len(lines)), PAPER)
    for index, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, index * leading), line, font=font, fill=colour)
    return image


def shorten(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Cut text that is wider than ``width``, and show that it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break text between words into lines of at most ``width``."""
    if not text:
        return []
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def stack(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """One below the other, at the left edge."""
    images = [image for image in images if image.height]
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + gap
    return canvas


def beside(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """One beside the other, at the upper edge."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + gap
    return canvas


def flow(images: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
    """One beside the other as long as ``width`` holds them, then on the next line."""
    lines: list[list[Image.Image]] = [[]]
    for image in images:
        used = sum(other.width + gap for other in lines[-1])
        if lines[-1] and used + image.width > width:
            lines.append([])
        lines[-1].append(image)
    return stack([beside(line, gap) for line in lines], gap // 3)


def pad(image: Image.Image, margin: int) -> Image.Image:
    """A white margin, and even sides, as H.264 wants them."""
    width, height = (side + 2 * margin + side % 2 for side in image.size)
    canvas = Image.new("RGB", (width, height), PAPER)
    canvas.paste(image, (margin, margin))
    return canvas


# Writing ---------------------------------------------------------------------------------------


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, renamed at the end: what lies there is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside_path = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield beside_path
        beside_path.replace(path)
    finally:
        beside_path.unlink(missing_ok=True)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG.

    Raises:
        ValueError: ``path`` has another ending.
    """
    _check_ending(path, (".png",))
    with written_beside(path) as file:
        sheet.save(file, optimize=True)


def save_animation(images: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write an animation as GIF or MP4.

    Raises:
        ValueError: ``path`` has another ending.
    """
    _check_ending(path, (".gif", ".mp4"))
    if path.suffix == ".mp4":
        from hpm_video.data.encode import write_video  # only where a video is written: loads av

        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, (np.asarray(image) for image in images), fps=max(1, round(fps)))
        return
    # One palette for all images: with one each, colours that stay would flicker.
    palette = stack(images, 0).quantize(256, dither=Image.Dither.NONE)
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    with written_beside(path) as file:
        first.save(
            file,
            save_all=True,
            append_images=others,
            duration=max(20, round(100 / fps) * 10),  # in ms; viewers slow down below 20
            loop=0,
        )


def write_pictures(
    folder: Path, name: str, objective: HardPatchesMining, engine: Engine, batch: ClipBatch
) -> Path:
    """Draw the sheet of a batch, say of the first held-out clips, into ``folder``. -> its path"""
    with engine.autocast():
        studies = study_clips(objective, engine, batch.to(engine.device))
    path = folder / f"{name}.png"
    save_sheet(draw_sheet(studies), path)
    return path


def _check_ending(path: Path, known: tuple[str, ...]) -> None:
    if path.suffix not in known:
        raise ValueError(
            f"cannot write a picture as {path.name!r}: the name must end in {' or '.join(known)}"
        )
