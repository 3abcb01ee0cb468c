"""The paper's Figure 2, for clips too: error, difficulty, mask and reconstruction.

A study of a clip is drawn as a sheet (PNG) or as an animation (GIF, MP4).
"""

import math
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from hpm_video.data.batch import ClipBatch
from hpm_video.files.atomic import written_beside
from hpm_video.files.wording import counted
from hpm_video.mining.objective import HardPatchesMining
from hpm_video.mining.study import Frames, Scores, Study, study_clips
from hpm_video.training.engine import Runner

Value = TypeVar("Value", bound=np.generic)
Colour = tuple[int, int, int]

MAX_COLUMNS = 8
WIDTH = 1200
"""Of all frames of a line in pixels, at least, ..."""
LARGEST_CELL = 280
"""... unless a frame became larger than this by it. Frames are enlarged by a whole factor."""
TINT = 0.75
"""Weight of the colour of a hidden patch; the rest is the patch itself."""
GAP, MARGIN, SIDE = 6, 24, 220
"""Pixels between frames, around a sheet, and for the titles of its rows."""
LINE, LETTER = 20, 9
"""Pixels of a line of text, and of a letter in it."""
PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 28, 32)
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
    steps, step = studies[0].grid.time, studies[0].patch_size[0]
    spread = np.linspace(0, steps - 1, min(steps, MAX_COLUMNS))
    times = times or [round(column) * step for column in spread]
    in_a_line = min(max(1, MAX_COLUMNS // len(times)), len(studies))
    cell = _cell_of(studies[0], in_a_line * len(times))
    lines = []
    for first in range(0, len(studies), in_a_line):
        panels = make_panels(studies[first])
        titles = [draw_text(f"{panel.title}\n{panel.note}", SIDE, cell[1]) for panel in panels]
        of_line = studies[first : first + in_a_line]
        blocks = [_draw_block(study, times, moments, cell) for study in of_line]
        lines.append(beside([stack(titles, GAP), *blocks], MARGIN))
    body, legend = stack(lines, 2 * MARGIN), _draw_legend(studies)
    width = max(body.width, legend.width)
    head = draw_text("\n".join([title, *_captions(studies)]), width)
    notes = draw_text("\n".join(_footnotes(studies)), width)
    return pad(stack([head, body, legend, notes], MARGIN), MARGIN)


def _draw_block(
    study: Study, times: Sequence[int], moments: Sequence[str], cell: tuple[int, int]
) -> Image.Image:
    """Draw the name of a study, the names of its frames, and its views."""
    views = [
        beside([_enlarged(panel.frames[time], cell) for time in times], GAP)
        for panel in make_panels(study)
    ]
    accuracy = study.ranking_accuracy
    ranking = "" if accuracy is None else f"\nranking {accuracy:.2f}"
    head = [draw_text(study.name[: views[0].width // LETTER] + ranking, views[0].width)]
    if study.grid.time > 1:
        names = [moments[time] if moments else f"frame {time + 1}" for time in times]
        head.append(beside([draw_text(name, cell[0]) for name in names], GAP))
    return stack([*head, *views], GAP)


def draw_strip(study: Study) -> Image.Image:
    """Draw the views of a clip side by side, at its first, middle and last time step."""
    steps = sorted({0, study.grid.time // 2, study.grid.time - 1})
    panels = make_panels(study)
    cell = _cell_of(study, len(panels) * len(steps))
    views = []
    for panel in panels:
        frames = [panel.frames[step * study.patch_size[0]] for step in steps]
        row = beside([_enlarged(frame, cell) for frame in frames], 1)
        views.append(stack([draw_text(panel.title), row], GAP))
    return pad(beside(views, 2 * GAP), GAP)


def draw_animation(
    study: Study, *, title: str = "", moments: Sequence[str] = ()
) -> list[Image.Image]:
    """Draw a sheet for each frame of a clip."""
    return [
        draw_sheet(study, [time], title=title, moments=moments) for time in range(len(study.frames))
    ]


def _cell_of(study: Study, columns: int) -> tuple[int, int]:
    """Choose the size of a frame among so many in a row: -> width, height"""
    height, width = study.frames.shape[1:3]
    factor = math.ceil(min(WIDTH / columns, LARGEST_CELL) / width)
    return width * factor, height * factor


def _enlarged(frame: NDArray[np.uint8], cell: tuple[int, int]) -> Image.Image:
    """Make each pixel a square: (H, W, 3) -> an image as large as a cell"""
    return Image.fromarray(frame).resize(cell, Image.Resampling.NEAREST)


def _captions(studies: Sequence[Study]) -> list[str]:
    facts = []
    for study in studies:
        masked, picked, total = study.masked.sum(), study.picked.sum(), len(study.masked)
        why = f"{picked} of them because the teacher finds them {study.pick}"
        why = why if picked else "at random"
        facts.append(f"{masked} of {total} patches hidden ({masked / total:.0%}), {why}")
    return list(dict.fromkeys(facts))


def _kind(study: Study) -> str:
    return "clip" if len(study.frames) > 1 else "image"


def _draw_legend(studies: Sequence[Study]) -> Image.Image:
    scale = COLOURS(np.linspace(0, 1, 128), bytes=True)[None, :, :3]
    bar = Image.fromarray(scale).resize((128, 16))
    low, high = draw_text("easiest"), draw_text(f"hardest patch of the {_kind(studies[0])}")
    swatches = [(HIDDEN, "hidden at random")]
    if any(study.picked.any() for study in studies):
        swatches.append((PICKED, f"hidden for being {studies[0].pick}"))
    if any(np.isnan(study.true_error).any() for study in studies):
        swatches.append((UNKNOWN, "error unknown: no random mask hid it"))
    keys = [[Image.new("RGB", (16, 16), colour), draw_text(words)] for colour, words in swatches]
    return beside([beside(key, GAP) for key in ([low, bar, high], *keys)], MARGIN)


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


def draw_text(text: str, width: int | None = None, height: int | None = None) -> Image.Image:
    """Draw text on white: as large as it comes, or wrapped and cut to a size in pixels."""
    font = _font()
    lines = text.split("\n")
    if width is not None:
        lines = [part for line in lines for part in textwrap.wrap(line, width // LETTER)]
    size = (
        width or math.ceil(max(font.getlength(line) for line in lines)),
        height or LINE * len(lines),
    )
    image = Image.new("RGB", size, PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, LINE * number), line, font=font, fill=INK)
    return image


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, 15)


def stack(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Put images one below the other, at the left edge."""
    height = sum(image.height + gap for image in images) - gap
    canvas, top = Image.new("RGB", (max(image.width for image in images), height), PAPER), 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + gap
    return canvas


def beside(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Put images one beside the other, at the lower edge."""
    width, height = sum(image.width + gap for image in images) - gap, max(i.height for i in images)
    canvas, left = Image.new("RGB", (width, height), PAPER), 0
    for image in images:
        canvas.paste(image, (left, height - image.height))
        left += image.width + gap
    return canvas


def pad(image: Image.Image, margin: int) -> Image.Image:
    """Add a white margin, and make the sides even, as H.264 wants them."""
    border = (margin, margin, margin + image.width % 2, margin + image.height % 2)
    return ImageOps.expand(image, border, PAPER)


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
