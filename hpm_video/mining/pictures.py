"""The paper's Figure 2, for clips too: error, difficulty, mask and reconstruction.

A study of a clip is drawn as a sheet (PNG) or as an animation (GIF, MP4).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from hpm_video.data.batch import ClipBatch
from hpm_video.files.atomic import written_beside
from hpm_video.files.wording import counted
from hpm_video.mining.objective import HardPatchesMining
from hpm_video.mining.study import Frames, Scores, Study, study_clips
from hpm_video.mining.typesetting import (
    PAPER,
    Colour,
    beside,
    draw_text,
    font_of,
    pad,
    shorten,
    stack,
)
from hpm_video.training.engine import Runner

Value = TypeVar("Value", bound=np.generic)

MAX_COLUMNS = 8
WIDTH = 1200
"""Of all frames of a line in pixels, at least, ..."""
LARGEST_CELL = 280
"""... unless a frame became larger than this by it. Frames are enlarged by a whole factor."""
TINT = 0.75
"""Weight of the colour of a hidden patch; the rest is the patch itself."""
FAINT_INK: Colour = (96, 96, 104)
HIDDEN: Colour = (196, 198, 203)
PICKED: Colour = (214, 116, 82)
UNKNOWN: Colour = (226, 228, 232)
"""The colour of tokens whose error is not known, because no mask hid them."""
COLOURS = matplotlib.colormaps["inferno"].with_extremes(bad=f"#{bytes(UNKNOWN).hex()}")
"""The colours of ranks from 0 to 1."""


class Panel(NamedTuple):
    """One row of a sheet."""

    title: str
    note: str
    frames: Frames


def make_panels(study: Study) -> list[Panel]:
    """The views of a study, each as large as the clip."""
    over = f"mean over {counted(study.num_masks, 'random mask')}"
    panels = [
        Panel("Input", "", study.frames),
        Panel("True error", over, _heat_map(study.true_error, study)),
    ]
    if study.difficulty is not None:
        part = "the whole" if study.teacher_sees == "all" else "a part of the"
        note = f"by the teacher, which sees {part} {_kind(study)}"
        panels.append(Panel("Predicted difficulty", note, _heat_map(study.difficulty, study)))
    origin = "drawn from the prediction" if study.picked.any() else "random"
    panels.append(Panel("Mask", origin, _draw_mask(study)))
    if study.reconstruction is not None:
        source = {
            "none": "raw pixels",
            "input": "patch mean and contrast taken from the input",
            "visible": "patch mean and contrast estimated from visible patches",
        }[study.statistics]
        panels.append(Panel("Reconstruction", source, study.reconstruction))
    return panels


def to_ranks(scores: Scores) -> Scores:
    """Place of each score among all, from 0 (smallest) to 1: (N,) -> (N,)

    Equal scores share a place, NaN stays. Ranks, because errors and predicted difficulties have
    different scales, and training fits only the order of one to that of the other.
    """
    ranks = pd.Series(scores).rank() - 1
    return (ranks / max(ranks.count() - 1, 1)).to_numpy(scores.dtype)


def _heat_map(scores: Scores, study: Study) -> Frames:
    ranks = np.ma.masked_invalid(to_ranks(scores))
    return _upsample(COLOURS(ranks, bytes=True)[:, :3], study)


def _draw_mask(study: Study) -> Frames:
    colours = np.full((len(study.masked), 3), HIDDEN, dtype=np.uint8)
    colours[study.picked] = PICKED
    hidden = _upsample(study.masked[:, None], study)
    tinted = TINT * _upsample(colours, study) + (1 - TINT) * study.frames
    return np.where(hidden, tinted.round().astype(np.uint8), study.frames)


def _upsample(values: NDArray[Value], study: Study) -> NDArray[Value]:
    """Give every pixel its token's value: (N, K) -> (T, H, W, K)"""
    lattice = values.reshape(*study.grid.shape, -1)
    for axis, size in enumerate(study.patch_size):
        lattice = lattice.repeat(size, axis=axis)
    return lattice


class Style:
    """Sizes in pixels and fonts of a picture with so many frames in a row."""

    gap = 6
    """Between neighbouring frames."""
    margin = 24

    def __init__(self, study: Study, columns: int) -> None:
        height, width = study.frames.shape[1:3]
        factor = math.ceil(min(WIDTH / columns, LARGEST_CELL) / width)
        self.cell = (width * factor, height * factor)
        self.text = 15 if self.cell[0] < 200 else 19
        self.bold = font_of("DejaVuSans-Bold.ttf", self.text)
        self.regular = font_of("DejaVuSans.ttf", self.text)
        self.small = font_of("DejaVuSans.ttf", self.text - 2)

    def enlarge(self, frame: NDArray[np.uint8]) -> Image.Image:
        """Make each pixel a square: (H, W, 3) -> an image as large as a cell"""
        return Image.fromarray(frame).resize(self.cell, Image.Resampling.NEAREST)


def draw_sheet(
    studies: Study | Sequence[Study],
    times: Sequence[int] = (),
    *,
    title: str = "",
    moments: Sequence[str] = (),
) -> Image.Image:
    """Views as rows and time steps as columns, for one clip or several of one model.

    Short clips stand side by side, as long as their columns fit.

    Args:
        studies: what is drawn.
        times: the frames that are shown; by default the first ones of time steps spread evenly
            over all.
        title: what was studied, say checkpoint and video.
        moments: the name of each frame of a clip; by default "frame 1" and so on.
    """
    studies = [studies] if isinstance(studies, Study) else list(studies)
    lines: list[list[tuple[Study, Sequence[int]]]] = []
    free = 0
    for study in studies:
        steps = study.grid.time
        columns = np.linspace(0, steps - 1, min(steps, MAX_COLUMNS))
        shown = times or [round(column) * study.patch_size[0] for column in columns]
        if len(shown) > free:
            lines.append([])
            free = MAX_COLUMNS
        lines[-1].append((study, shown))
        free -= len(shown)
    style = Style(studies[0], max(sum(len(shown) for _, shown in line) for line in lines))
    side = 14 * style.text
    titles = [
        stack([draw_text(panel.title, style.bold, width=side), note], 3)
        for panel in make_panels(studies[0])
        for note in [draw_text(panel.note, style.small, FAINT_INK, width=side)]
    ]
    drawn = [[_draw_block(*block, moments, style) for block in line] for line in lines]
    body = stack([_draw_line(line, titles, style) for line in drawn], 2 * style.margin)
    legend = _draw_legend(studies, style)
    width = max(body.width, legend.width)
    head = [draw_text(title, style.bold, width=width), _draw_caption(studies, width, style)]
    notes = [draw_text(note, style.small, FAINT_INK, width=width) for note in _footnotes(studies)]
    parts = [stack(head, style.gap), body, stack([legend, *notes], style.gap)]
    return pad(stack(parts, style.margin), style.margin)


def draw_strip(study: Study) -> Image.Image:
    """Draw the views of a clip side by side, at its first, middle and last time step."""
    steps = sorted({0, study.grid.time // 2, study.grid.time - 1})
    panels = make_panels(study)
    style = Style(study, len(panels) * len(steps))
    times = [step * study.patch_size[0] for step in steps]
    views = []
    for panel in panels:
        row = beside([style.enlarge(panel.frames[time]) for time in times], 1)
        views.append(stack([draw_text(panel.title, style.bold), row], style.gap))
    return pad(beside(views, 2 * style.gap), style.gap)


def draw_animation(
    study: Study, *, title: str = "", moments: Sequence[str] = ()
) -> list[Image.Image]:
    """Draw a sheet for each frame of a clip."""
    return [
        draw_sheet(study, [time], title=title, moments=moments) for time in range(len(study.frames))
    ]


def _draw_line(
    blocks: Sequence[Image.Image], titles: Sequence[Image.Image], style: Style
) -> Image.Image:
    """Studies side by side, with the titles of their rows at the left."""
    line = beside(blocks, 3 * style.gap)
    row = style.cell[1] + style.gap
    first = line.height + style.gap - len(titles) * row
    column = Image.new("RGB", (titles[0].width, line.height), PAPER)
    for index, title in enumerate(titles):
        column.paste(title, (0, first + index * row + (style.cell[1] - title.height) // 2))
    return beside([column, line], style.margin)


def _draw_block(
    study: Study, shown: Sequence[int], moments: Sequence[str], style: Style
) -> Image.Image:
    rows = [
        beside([style.enlarge(panel.frames[time]) for time in shown], style.gap)
        for panel in make_panels(study)
    ]
    width = rows[0].width
    head = [draw_text(shorten(study.name, width, style.bold), style.bold, width=width)]
    if study.ranking_accuracy is not None:
        head.append(draw_text(f"ranking {study.ranking_accuracy:.2f}", style.regular, width=width))
    if study.grid.time > 1:
        names = moments or [f"frame {time + 1}" for time in range(len(study.frames))]
        labels = [
            draw_text(names[time], style.small, FAINT_INK, width=style.cell[0]) for time in shown
        ]
        rows = [beside(labels, style.gap), *rows]
    return stack([stack(head, 2), *rows], style.gap)


def _draw_caption(studies: Sequence[Study], width: int, style: Style) -> Image.Image:
    facts = []
    for study in studies:
        masked, picked, total = study.masked.sum(), study.picked.sum(), len(study.masked)
        why = f"{picked} of them because the teacher finds them {study.pick}"
        facts.append(
            f"{masked} of {total} patches hidden ({masked / total:.0%}), "
            f"{why if picked else 'at random'}"
        )
    return draw_text("\n".join(dict.fromkeys(facts)), style.regular, width=width)


def _kind(study: Study) -> str:
    return "clip" if len(study.frames) > 1 else "image"


def _draw_legend(studies: Sequence[Study], style: Style) -> Image.Image:
    scale = COLOURS(np.linspace(0, 1, 256), bytes=True)[None, :, :3]
    bar = Image.fromarray(scale).resize((9 * style.text, style.text))
    low, high = (
        draw_text(words, style.small)
        for words in ("easiest", f"hardest patch of the {_kind(studies[0])}")
    )
    keys = [beside([low, bar, high], style.gap)]
    swatches = [(HIDDEN, "hidden at random")]
    if any(study.picked.any() for study in studies):
        swatches.append((PICKED, f"hidden for being {studies[0].pick}"))
    if any(np.isnan(study.true_error).any() for study in studies):
        swatches.append((UNKNOWN, "error unknown: no random mask hid it"))
    for colour, words in swatches:
        square = Image.new("RGB", (style.text, style.text), colour)
        keys.append(beside([square, draw_text(words, style.small)], style.gap))
    return beside(keys, style.margin)


def _footnotes(studies: Sequence[Study]) -> list[str]:
    errors = np.concatenate([study.true_error for study in studies])
    measure = {
        "raw": "mean squared error of normalised pixels",
        "joint": "mean squared error of pixels standardised within each patch",
        "per_channel": "mean squared error of pixels standardised within each patch and channel",
        None: "2 - 2 cos of predicted and true features",
    }[studies[0].target]
    notes = [
        f"Error: {measure}, here {np.nanmin(errors):.2g} to "
        f"{np.nanmax(errors):.2g}. Colours are ranks among the patches of "
        f"one {_kind(studies[0])}, because difficulty is predicted as an order, without a unit."
    ]
    if studies[0].difficulty is not None:
        notes.append(
            "Ranking: share of pairs of patches that the prediction puts in the order of their "
            "true error; guessing gives 0.50."
        )
    return notes


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG."""
    with written_beside(path) as file:
        sheet.save(file)


def save_animation(images: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write an animation as MP4 where ``path`` ends so, otherwise as GIF."""
    if path.suffix == ".mp4":
        from hpm_video.preparation.encode import write_video  # which loads av

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
    folder: Path, name: str, objective: HardPatchesMining, student: Runner, batch: ClipBatch
) -> Path:
    """Draw the sheet of a batch, say of the first validation clips, into ``folder``. -> its path"""
    with student.autocast():
        studies = study_clips(objective, student, batch.to(student.device))
    path = folder / f"{name}.png"
    save_sheet(draw_sheet(studies, title=str(path.with_suffix(""))), path)
    return path
