"""Time how files become clips: bench.py decoding VIDEO ...

With each decoder that works, makes a training clip, several out of one pass (data.repeats) and one
by one, and the views of a test. All in one process and one thread, in turns; medians are shown.
After the first turn, which does not count, the files are in memory. The first row of each kind is
what the others are compared with: put the untouched video before a prepared one.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, product
from typing import Any

import torch
from bench_update import medians_of_turns  # type: ignore[import-not-found] # beside this file

from hpm_video.config.data import DataConfig
from hpm_video.data.clips import check_pace, request_of
from hpm_video.data.manifest import read_manifest
from hpm_video.data.reading import ClipReader, EvalReader, Request, TrainReader, Views
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.decoding.locations import Section
from hpm_video.decoding.registry import available_decoders
from hpm_video.runs.console import add_options, positive

CLIP = DataConfig(num_frames=16, frame_stride=4, frame_size=(224, 224))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    videos = "a video, a folder of frames (ends in /), or a manifest: its first file is taken"
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help=videos)
    add = parser.add_argument
    add("--clips", type=positive, default=4, help="clips out of one pass (4)")
    add("--repeats", type=positive, default=15, help="measurements of each (15)")
    add_options(parser, views={"default": (5, 3)})


def measure(arguments: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Make a table for each kind of clips."""
    torch.set_num_threads(1)
    clips, test_views = arguments.clips, Views(*arguments.views)
    kinds: dict[str, dict[tuple[str, str], Callable[[], float]]] = defaultdict(dict)
    ones, several = kinds["a training clip"], kinds[f"{clips} training clips"]
    tests = kinds[f"a test of {test_views.clips} x {test_views.crops} views"]
    for video, decoder in product(arguments.videos, available_decoders()):
        request = first_request(video)
        train = TrainReader(CLIP, decoder, "", MultiScaleCrop(flip=False), same_frames=False)
        test = EvalReader(CLIP, decoder, "", test_views)
        ones[video, decoder] = partial(read, train, request, 1, count())
        one_by_one = partial(read, train, request, 1, count(), times=clips)
        several[video, f"{decoder}, one by one"] = one_by_one
        several[video, f"{decoder}, in one pass"] = partial(read, train, request, clips, count())
        tests[video, decoder] = partial(read, test, request, 1, count())
    for kind, ways in kinds.items():
        medians_of_turns(ways, 1)
        medians = medians_of_turns(ways, arguments.repeats)
        first = next(iter(medians.values()))
        rows = [
            {"file": file, "way": way, "ms": 1000 * median, "times as fast": first / median}
            for (file, way), median in medians.items()
        ]
        yield kind, rows


def first_request(name: str) -> Request:
    """Return the request for a whole file, or for the first one of a manifest.

    Raises:
        ConfigError: the file holds too few frames of its video for the stride of a clip.
    """
    request = Request(name, -1, -1, ())
    if name.endswith(".csv"):
        check_pace(CLIP, manifest := read_manifest(name).of([0]))
        request = request_of(manifest, 0)
    return replace(request, path=Section.parse(request.path).file)


def read(
    reader: ClipReader, request: Request, clips: int, turns: Iterator[int], *, times: int = 1
) -> float:
    """Read clips out of one pass, and that several times; each of the ``turns`` draws others.

    Returns the seconds of the processor, which other programs disturb less.
    """
    turn, began = next(turns), time.process_time()
    for again in range(times):
        keys = tuple((turn, again, number) for number in range(clips))
        reader(replace(request, keys=keys))
    return time.process_time() - began
