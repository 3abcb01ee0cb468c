"""The commands of bench.py that measure data: loader and decoding."""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, product
from typing import Any

import torch
from bench_update import medians_of_turns  # type: ignore[import-not-found] # beside this file
from tqdm import tqdm

from hpm_video.config.choices import DecoderName
from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.clips import check_pace, request_of
from hpm_video.data.manifest import read_manifest
from hpm_video.data.reading import ClipReader, EvalReader, Request, TrainReader, Views
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.decoding.locations import Section, is_image
from hpm_video.decoding.registry import available_decoders, choose_decoder
from hpm_video.files.failures import TooManyBadFiles
from hpm_video.preparation.benchmark import Trial, Trials, choose_setting, explain
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.console import above_zero, add_config, add_options, positive
from hpm_video.runs.finetuning import Finetuning
from hpm_video.runs.pretraining import Pretraining
from hpm_video.runs.task import Task
from hpm_video.training.device import choose_device, inference_precision, time_updates
from hpm_video.training.fast import choose_compiling
from hpm_video.workers.room import RoomError, usable_cores

Rows = list[dict[str, Any]]
CLIP = DataConfig(num_frames=16, frame_stride=4, frame_size=(224, 224))


def loader_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``loader``."""
    add = parser.add_argument
    add_config(parser, "a config, or RUN/config.yaml")
    tried = "decoding processes to try, of all --processes together; may be repeated"
    add("--workers", type=positive, action="append", metavar="N", help=tried)
    processes = "training processes that share this machine; default: one per GPU, or 1"
    add("--processes", type=positive, metavar="N", help=processes)
    needs = "clips/s that the updates of all GPUs here consume; default: measured, on a GPU"
    add("--needs", type=above_zero, metavar="CLIPS", help=needs)
    add("--clips", type=positive, default=48, help="videos whose phases are timed (default 48)")
    add("--seconds", type=above_zero, default=8.0, metavar="S", help="of a trial (default 8)")


def bench_loader(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """Test whether data loading keeps up with the GPUs: bench.py loader CONFIG ...

    Tries numbers of decoding processes, each time on other videos, with all decoders that work
    unless data.decoder names one, and times the phases of a training clip by the best one: reading,
    decoding and augmenting by one process alone, assembling in the run, and copying to a GPU. Says
    which phase limits the rate, and how many clips/s updates take in comparison; on a GPU that is
    measured.
    """
    config = load_any_config(arguments.config, arguments.overrides)
    task = Pretraining(config) if isinstance(config, PretrainConfig) else Finetuning(config)
    clips = task.training_clips()
    device = choose_device(config.engine.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    processes = arguments.processes or gpus
    batch_size = min(config.engine.micro_batch or config.recipe.batch_size, 32)
    trials = Trials(clips, config.weights, device, batch_size=batch_size, seconds=arguments.seconds)
    decoders: Sequence[DecoderName | None] = available_decoders()
    if all(is_image(path) for stream in clips for path in stream.manifest.files):
        decoders = [None]
    elif config.data.decoder != "auto":
        decoders = [choose_decoder(config.data.decoder)]
    tried = [Trial(decoder) for decoder in decoders]
    numbers = workers_to_try(arguments.workers, processes)
    torch.set_num_threads(1)  # as in a process that decodes
    for trial, workers in tqdm([*product(tried, numbers)], "trials", leave=False, disable=None):
        if not isinstance(trial.error, TooManyBadFiles):
            trials.read(trial, workers)
    yield "clips/s by the number of workers", [row_of(trial, numbers) for trial in tried]
    trial, workers = choose_setting(tried, config.data.max_bad_share)
    decoder, rate = trial.decoder, trial.rates[workers]
    phases = trials.phases(arguments.clips, decoder)
    phases["assembling"] = trial.assembling[workers]
    rows = [{"phase": name, "ms": 1000 * seconds} for name, seconds in phases.items()]
    yield f"one clip, by {decoder}" if decoder else "one clip", rows
    named = f"data.decoder={decoder} " if decoder else ""
    each = f" for each of {processes} processes" if processes > 1 else ""
    print(f"\ntake {named}data.workers={max(1, workers // processes)}{each}: {rate:.1f} clips/s")
    print(explain(rate, phases, workers, usable_cores()))
    needs = arguments.needs
    if needs is None and device.type == "cuda":
        needs = processes * rate_of_updates(task, device, batch_size * config.data.repeats)
    print(verdict(rate, needs) if needs else "--needs=CLIPS says whether that is enough")


def rate_of_updates(task: Task, device: torch.device, clips: int) -> float:
    """Measure the clips per second of updates on random pixels by one process."""
    task.resolve()
    precision = task.config.engine.precision
    precision = inference_precision(device) if precision == "auto" else precision
    compiled = choose_compiling(task.config.engine, device)
    update = trial_update(task, device, precision, clips, compiled=compiled)
    return clips / time_updates(update, device, repeats=3)


def verdict(rate: float, needs: float) -> str:
    """Say whether GPUs would wait for data."""
    given = f"the loader gives {rate:.1f} clips/s, the update takes {needs:.1f}: "
    if rate >= needs:
        return f"{given}{rate / needs:.1f} times what is needed"
    return f"{given}it would wait for data {1 - rate / needs:.0%} of the time"


def workers_to_try(given: Sequence[int] | None, processes: int) -> list[int]:
    """Return numbers of decoding processes to share evenly: 1, 2, 4 ... each, up to the cores."""
    most = max(1, usable_cores() // processes)
    usual = [*(2**power for power in range(20) if 2**power < most), most]
    each = usual if given is None else [max(1, count // processes) for count in given]
    return sorted({count * processes for count in each})


def row_of(trial: Trial, numbers: Sequence[int]) -> dict[str, Any]:
    """Make the row of a decoder: its rates and refused files."""
    row: dict[str, Any] = {"decoder": trial.decoder or "images"}
    row |= {str(workers): trial.rates.get(workers) for workers in numbers}
    if isinstance(trial.error, RoomError):
        row["remark"] = "no memory for some"
    if trial.refused:
        count, first = len(trial.files | trial.refused.keys()), next(iter(trial.refused.values()))
        refuses = f"refuses {len(trial.refused)} of {count} files"
        row["remark"] = f"{refuses}, such as {first.path}: {first.reason}"
    return row


def decoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``decoding``."""
    videos = "a video, a folder of frames (ends in /), or a manifest: its first file is taken"
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help=videos)
    add = parser.add_argument
    add("--clips", type=positive, default=4, help="clips of one pass (default 4)")
    add("--repeats", type=positive, default=15, help="measurements of each (default 15)")
    add_options(parser, views={"default": (5, 3)})


def bench_decoding(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """Time how files become clips: bench.py decoding VIDEO ...

    With each decoder that works, makes a training clip, several out of one pass (data.repeats) and
    one by one, and the views of a test. All in one process and one thread, in turns; medians are
    shown. After the first turn, which does not count, the files are in memory. The first row of
    each kind is what the others are compared with: put the untouched video before a prepared one.
    """
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
