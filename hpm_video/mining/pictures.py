"""The paper's Figure 2, for clips too: error, difficulty, mask and reconstruction.

A study of a clip is drawn as a sheet (PNG) or as an animation (MP4).
"""

import math
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from hpm_video.data.batch import ClipBatch
from hpm_video.files.atomic import written_beside
from hpm_video.files.printing import printable
from hpm_video.files.wording import counted
from hpm_video.mining.objective import HardPatchesMining
from hpm_video.mining.study import Frames, Scores, Study, study_clips
from hpm_video.training.engine import Runner

Value = TypeVar("Value", bound=np.generic)

MAX_COLUMNS = 8
WIDTH, LARGEST_CELL = 12.0, 2.6
"""Inches of all frames of a line, and at most of one frame."""
ACROSS, DOWN = 0.3, 0.75
"""Inches from one clip to the next; the names of a clip and its frames stand above it."""
LETTERS, LETTERS_BESIDE = 10, 24
"""Letters in an inch of text, and in a line beside a view."""
TINT = 0.75  # weight of the colour of a hidden patch; the rest is the patch itself
HIDDEN = (196, 198, 203)
PICKED = (214, 116, 82)
UNKNOWN = (226, 228, 232)  # of tokens whose error is not known, because no mask hid them
COLOURS = matplotlib.colormaps["inferno"].with_extremes(bad=f"#{bytes(UNKNOWN).hex()}")  # of ranks


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

    Equal scores share a place, NaN stays. Only the order of predicted difficulties means anything.
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
) -> Figure:
    """Views as rows and time steps as columns, for one clip or several of one model.

    Short clips stand side by side, as long as their columns fit. ``times``: the frames that are
    shown; by default the first ones of time steps spread evenly over all. ``title``: what was
    studied. ``moments``: the name of each frame of a clip; by default "frame 1" and so on.
    """
    studies = [studies] if isinstance(studies, Study) else list(studies)
    steps, step = studies[0].grid.time, studies[0].patch_size[0]
    spread = np.linspace(0, steps - 1, min(steps, MAX_COLUMNS))
    times = times or [round(column) * step for column in spread]
    names = [moments[time] if moments else f"frame {time + 1}" for time in times]
    in_a_line = min(max(1, MAX_COLUMNS // len(times)), len(studies))
    lines = math.ceil(len(studies) / in_a_line)
    clip_width = min(WIDTH / in_a_line, LARGEST_CELL * len(times))
    height, width = _views_of(studies[0], times).shape[:2]
    clip_height = clip_width * height / width
    sheet_width = (clip_width + ACROSS) * in_a_line - ACROSS
    sheet_height = (clip_height + DOWN) * lines - DOWN
    figure = Figure((sheet_width, sheet_height), dpi=144)
    figure.subplots_adjust(0, 0, 1, 1, wspace=ACROSS / clip_width, hspace=DOWN / clip_height)
    for place, study in enumerate(studies):
        axes = figure.add_subplot(lines, in_a_line, place + 1, frame_on=False)
        axes.imshow(_views_of(study, times))
        _write_names(axes, study, names, beside=place % in_a_line == 0)
    head = printable(f"{title}\n{_caption(studies[0])}")
    figure.text(0, 1 + DOWN / sheet_height, head, parse_math=False)
    keys = [Patch(color=f"#{bytes(colour).hex()}", label=words) for colour, words in _keys(studies)]
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0, 0), ncols=6, frameon=False)
    letters = round(max(sheet_width, 8) * LETTERS)
    notes = "\n".join(textwrap.fill(note, letters) for note in _footnotes(studies))
    figure.text(0, -0.5 / sheet_height, notes, va="top")
    return figure


def _views_of(study: Study, times: Sequence[int]) -> Frames:
    """Some frames of a clip side by side, one row for each view: -> (H', W', 3)"""
    views = np.stack([panel.frames[[*times]] for panel in make_panels(study)])
    gap = math.ceil(views.shape[2] / 32)
    spaced = np.pad(views, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    rows: Frames = rearrange(spaced, "v t h w c -> (v h) (t w) c")
    return rows[:-gap, :-gap]


def _write_names(axes: Axes, study: Study, names: Sequence[str], *, beside: bool) -> None:
    """Name a clip and its frames above it, and where asked to its views beside it."""
    height, width = axes.images[0].get_size()
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    lefts = np.arange(len(names)) * width / len(names)
    axes.set_xticks(lefts, names if study.grid.time > 1 else [""], ha="left")
    titles = [
        f"{panel.title}\n{textwrap.fill(panel.note, LETTERS_BESIDE)}"
        for panel in make_panels(study)
    ]
    middles = (np.arange(len(titles)) + 0.5) * height / len(titles)
    axes.set_yticks(middles, titles if beside else [""] * len(titles))
    accuracy = study.ranking_accuracy
    ranking = "" if accuracy is None else f"\nranking {accuracy:.2f}"
    name = printable(study.name)[: len(names) * LETTERS_BESIDE]
    axes.set_title(name + ranking, loc="left", fontsize="medium", parse_math=False)


def draw_animation(
    study: Study, *, title: str = "", moments: Sequence[str] = ()
) -> list[NDArray[np.uint8]]:
    """Draw a sheet for each frame of a clip: (H, W, 3) each, H and W even"""
    images = []
    for time in range(len(study.frames)):
        file = BytesIO()
        _save(draw_sheet(study, [time], title=title, moments=moments), file)
        image = np.asarray(Image.open(file).convert("RGB"))
        images.append(image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2])  # for H.264
    return images


def _caption(study: Study) -> str:
    masked, picked, total = study.masked.sum(), study.picked.sum(), len(study.masked)
    why = f"{picked} of them because the teacher finds them {study.pick}" if picked else "at random"
    return f"{masked} of {total} patches hidden ({masked / total:.0%}), {why}"


def _kind(study: Study) -> str:
    return "clip" if len(study.frames) > 1 else "image"


def _keys(studies: Sequence[Study]) -> list[tuple[Sequence[int], str]]:
    """The colours, from 0 to 255, and what they mean."""
    ranks = COLOURS([0.0, 0.5, 1.0], bytes=True)
    hardest = f"hardest patch of the {_kind(studies[0])}"
    keys = [
        *zip(ranks, ("easiest", "middling", hardest), strict=True),
        (HIDDEN, "hidden at random"),
    ]
    if any(study.picked.any() for study in studies):
        keys.append((PICKED, f"hidden for being {studies[0].pick}"))
    if any(np.isnan(study.true_error).any() for study in studies):
        keys.append((UNKNOWN, "error unknown: no random mask hid it"))
    return keys


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


def save_sheet(sheet: Figure, path: Path) -> None:
    """Write a sheet as PNG."""
    with written_beside(path) as file:
        _save(sheet, file)


def _save(sheet: Figure, file: Path | BytesIO) -> None:
    sheet.savefig(file, format="png", bbox_inches="tight", pad_inches=0.2)


def write_pictures(
    folder: Path, name: str, objective: HardPatchesMining, student: Runner, batch: ClipBatch
) -> Path:
    """Draw the sheet of a batch, say of the first validation clips, into ``folder``. -> its path"""
    with student.autocast():
        studies = study_clips(objective, student, batch.to(student.device))
    path = folder / f"{name}.png"
    save_sheet(draw_sheet(studies, title=f"{folder / name}"), path)
    return path
