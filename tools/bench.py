"""Measure speed: python tools/bench.py update|loader|decoding|losses|fidelity [OPTIONS].

Alternatives take turns, and medians are shown: ratios hold on other machines, times do not.
"""

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from bench_fidelity import add_arguments, fidelity  # type: ignore[import-not-found]
from bench_ways import (  # type: ignore[import-not-found] # beside this file
    LOSSES,
    loss_step,
    ways_to_decode,
)
from tqdm import tqdm

from hpm_video.config.choices import DecoderChoice, DecoderName
from hpm_video.config.loading import load_any_config, load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.reading import Request, Views
from hpm_video.decoding.locations import is_image
from hpm_video.decoding.reader import DecoderError
from hpm_video.decoding.registry import available_decoders, open_video
from hpm_video.files.failures import TooManyBadFiles
from hpm_video.preparation.benchmark import (
    IN_WORKERS,
    Trial,
    Trials,
    fits_into_memory,
    reader_of,
)
from hpm_video.preparation.loader_advice import (
    choose_setting,
    past_speed,
    processes_here,
    recommend,
    verdict,
    workers_to_try,
)
from hpm_video.runs.autotune import TIMED_CLIPS, trial_update
from hpm_video.runs.console import above_zero, add_options, make_parser, positive, run
from hpm_video.runs.finetuning import Finetuning
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.device import (
    AUTOCAST,
    Precision,
    choose_device,
    choose_precision,
    time_updates,
)
from hpm_video.training.memory import measure_update
from hpm_video.workers.room import RoomError, usable_cores

TURNS = 3  # number of measurements of each precision
WHY = {
    "cuda": "bf16 where the GPU is made for it",
    "mps": "always on this kind of device",
    "cpu": "on a CPU bf16 only where it measures faster by a tenth (measured anew)",
}
Rows = list[dict[str, Any]]
Tables = Iterator[tuple[str, Rows]]  # titles and rows in the order of measurement


def main(command_line: Sequence[str] | None = None) -> int:
    """Measure, print tables, and write them where --output says. -> the exit code"""
    arguments = parse_arguments(command_line)
    tables: dict[str, Rows] = {}

    def measure() -> None:
        for title, rows in arguments.measure(arguments):
            print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format='%.2f')}")
            tables[title] = rows
        if arguments.output is not None:
            write(tables, arguments.output)

    return run(measure)


def write(tables: Mapping[str, Rows], path: Path) -> None:
    """Write tables as JSON by their titles, or as one CSV file with a column of titles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    else:
        rows = [{"table": title, **row} for title, found in tables.items() for row in found]
        pd.DataFrame(rows).to_csv(path, index=False)


def parse_arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, None)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add: dict[str, Callable[..., object]] = {}
    for measure in (update, loader, decoding, losses, fidelity):
        command = commands.add_parser(
            measure.__name__,
            help=str(measure.__doc__).splitlines()[0],
            description=inspect.getdoc(measure),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(measure=measure)
        add_options(command, output={"metavar": "FILE.csv|FILE.json", "help": "write tables there"})
        add[measure.__name__] = command.add_argument
    configs = {"update": "a file of configs/pretrain", "loader": "a config, or RUN/config.yaml"}
    for name, which in configs.items():
        add[name]("config", type=Path, metavar="CONFIG", help=which)
        add[name]("overrides", nargs="*", metavar="section.key=value")
    of_update = f"clips per update; default: at most {TIMED_CLIPS}"
    add["update"]("--clips", type=positive, help=of_update)
    add["update"]("--repeats", type=positive, default=5, help="timed updates per turn (5)")
    for name in ("loader", "decoding"):
        add[name]("--decoders", metavar="NAME,NAME", help="by default all that load")
    tried = "numbers of decoding processes to try, for all --processes together"
    add["loader"]("--workers", type=several, metavar="N,N", help=tried)
    processes = (
        "training processes on this machine, one per GPU, which share its cores; default: the "
        "number of GPUs, or of processes of the run if that is less"
    )
    add["loader"]("--processes", type=positive, metavar="N", help=processes)
    needs = "per second, for all GPUs here together"
    add["loader"]("--needs", type=above_zero, metavar="CLIPS", help=needs)
    measured = "videos whose phases are measured (48)"
    add["loader"]("--clips", type=positive, default=48, help=measured)
    add["loader"]("--seconds", type=above_zero, default=8.0, metavar="S", help="per trial (8)")
    add_options(commands.choices["decoding"], views={"default": Views(5, 3)})
    add["decoding"]("video", metavar="VIDEO")
    add["decoding"]("--repeats", type=positive, default=15, help="measurements per way (15)")
    add_options(commands.choices["losses"], "device")
    add["losses"]("--clips", type=positive, default=32)
    add["losses"]("--tokens", type=positive, default=1412, help="hidden tokens per clip (1412)")
    add["losses"]("--turns", type=positive, default=2, help="turns in which each is timed (2)")
    add["losses"]("--repeats", type=positive, default=3, help="timed calls per turn (3)")
    add["losses"]("--threads", type=positive, help="CPU threads; default: torch's choice")
    add_arguments(commands.choices["fidelity"])
    words = sys.argv[1:] if command_line is None else command_line
    chosen = commands.choices.get(words[0] if words else "")
    return chosen.parse_intermixed_args(words[1:]) if chosen else parser.parse_args(words)


def compare(ways: Mapping[str, Callable[[int], float]], turns: int, *, warmup: int = 0) -> Rows:
    """Make a row of each way: its median time, and how many times faster than the first it is.

    Each is timed once in a turn. Those of the ``warmup`` do not count.
    """
    seconds = [{name: way(turn) for name, way in ways.items()} for turn in range(warmup + turns)]
    medians = {name: statistics.median(turn[name] for turn in seconds[warmup:]) for name in ways}
    first = next(iter(medians.values()))
    return [
        {"way": name, "ms": 1000 * median, "times as fast": first / median}
        for name, median in medians.items()
    ]


def update(arguments: argparse.Namespace) -> Tables:
    """Time whole updates of pre-training, in fp32 and in bf16 autocast.

    Student forward and backward, optimizer step and teacher, on random pixels; no video is decoded.
    It uses the last epoch, in which the teacher scores if it ever does.
    """
    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    device = choose_device(config.engine.device)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    clips = arguments.clips or min(config.recipe.batch_size * config.data.repeats, TIMED_CLIPS)
    peaks = dict.fromkeys(AUTOCAST, 0)

    def measure(precision: Precision, _turn: int) -> float:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        made = trial_update(Pretraining(config), device, precision, clips)
        seconds = time_updates(made, device, warmup=1, repeats=arguments.repeats)
        if device.type == "cuda":
            peaks[precision] = max(peaks[precision], torch.cuda.max_memory_allocated(device))
        del made
        gc.collect()  # an optimizer holds itself, and with it the model: one is held at a time
        return seconds

    rows = compare({name: partial(measure, name) for name in AUTOCAST}, TURNS)
    for row in rows:
        row["clips/s"] = 1000 * clips / row["ms"]
        if device.type == "cuda":
            row["peak memory, GB"] = peaks[row["way"]] / 1e9
    yield f"updates of {clips} clip{'s' * (clips != 1)}, {describe(device)}", rows
    taken = choose_precision(
        device, lambda name: trial_update(Pretraining(config), device, name, clips)
    )
    print(f"engine.precision=auto takes {taken} here: {WHY.get(device.type, WHY['cpu'])}")


def describe(device: torch.device) -> str:
    """Name a device and its number of threads."""
    count = torch.get_num_threads()
    return f"{device.type} with {count} thread{'s' * (count != 1)}"


def losses(arguments: argparse.Namespace) -> Tables:
    """Measure time and memory of the ranking loss, forward and backward.

    The package computes it in blocks of rows of token pairs; the plain form holds B x M x M
    tensors. Memory is the peak of the tensors alive at one time.
    """
    device = choose_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    make_step = partial(loss_step, clips=arguments.clips, tokens=arguments.tokens, device=device)

    def measure(form: str, _turn: int) -> float:
        return time_updates(make_step(form), device, warmup=1, repeats=arguments.repeats)

    rows = compare({form: partial(measure, form) for form in LOSSES}, arguments.turns)
    for row in rows:
        held = measure_update(partial(make_step, row["way"]))
        row["peak memory, MB"] = held.activations / 1e6
        row["loss"] = make_step(row["way"])()
    size = f"{arguments.clips} clips x {arguments.tokens} tokens"
    yield f"ranking loss of {size}, {describe(device)}", rows


def decoding(arguments: argparse.Namespace) -> Tables:
    """Time how a video becomes clips, compared with the straightforward way.

    A training clip and all views of a test, with each decoder (see tools/bench_ways.py). One
    process, one thread; the file is in memory after the first turn, which does not count.
    """
    torch.set_num_threads(1)
    decoders = choose_decoders(arguments.decoders)
    with open_video(arguments.video):  # says clearly what is wrong with it
        pass
    if "decord" not in available_decoders():
        print("decord is not installed: the straightforward way takes whole frames of PyAV")

    def measure(way: Callable[[Request], object], turn: int) -> float:
        request, began = Request(arguments.video, -1, -1, ((turn,),)), time.perf_counter()
        way(request)
        return time.perf_counter() - began

    for task, made in ways_to_decode(decoders, arguments.views).items():
        timed = {name: partial(measure, way) for name, way in made.items()}
        yield task, compare(timed, arguments.repeats, warmup=1)


def choose_decoders(names: str | None, first: Sequence[DecoderChoice] = ()) -> list[DecoderName]:
    """Return the named decoders, by default all available ones, beginning with ``first``."""
    there = available_decoders()
    if names is None:
        return sorted(there, key=lambda name: name not in first)
    for word in names.split(","):
        if word not in there:
            raise DecoderError(f"--decoders: {word} is not there, only {', '.join(there)}")
    return [name for word in names.split(",") for name in there if name == word]


def loader(arguments: argparse.Namespace) -> Tables:
    """Test whether data loading keeps up with the GPUs.

    Measures the phases of a training clip (reading, decoding, augmenting, collating, copying),
    tries decoders and numbers of processes, names the bottleneck and recommends settings. With the
    config of a run, RUN/config.yaml, its log shows how many clips per second its GPUs could train.
    """
    config = load_any_config(arguments.config, arguments.overrides)
    task = Pretraining(config) if isinstance(config, PretrainConfig) else Finetuning(config)
    clips = task.training_clips()
    if all(is_image(path) for stream in clips for path in stream.manifest.files):
        decoders: list[DecoderName | None] = [None]
    else:
        own = [reader_of(stream).decoder for stream in clips]
        decoders = [*choose_decoders(arguments.decoders, own)]
    device = choose_device(config.engine.device)
    past = past_speed(arguments.config.parent)
    processes = arguments.processes or processes_here(device, past[0] if past else None)
    batch_size = min(config.engine.micro_batch or config.recipe.batch_size, 32)
    in_memory, files = fits_into_memory(clips)
    print(f"training processes: {processes}, cores: {usable_cores()}\n{files}")
    limits = {"batch_size": batch_size, "seconds": arguments.seconds}
    trials = Trials(clips, config.weights, in_memory=in_memory, **limits)
    phases, decoder = trials.phases(arguments.clips, device, decoders)
    total = sum(phases.values())
    by = f", by {decoder}" if decoder else ""
    shared = f" ({config.data.repeats} of each video)" if config.data.repeats > 1 else ""
    rows: Rows = []
    for name, seconds in phases.items():
        where = "in a worker" if name in IN_WORKERS else "in the run"
        share = f"{seconds / total:.0%}"
        rows.append({"phase": name, "where": where, "ms": 1000 * seconds, "share": share})
    yield f"one clip{by}{shared}", rows
    tried = [Trial(decoder) for decoder in decoders]
    numbers = workers_to_try(arguments.workers, processes)
    for trial, workers in tqdm([*product(tried, numbers)], "trials", leave=False, disable=None):
        if not isinstance(trial.error, TooManyBadFiles):
            trials.read(trial, workers)
    yield "clips/s by the number of workers", [row_of(trial, numbers) for trial in tried]
    taken, rate = choose_setting(tried, max(stream.reader.data.max_bad_share for stream in clips))
    print(f"\n{recommend(taken, rate, phases, processes)}")
    needs = arguments.needs
    if needs is None and past is not None:
        needs = past[1] * processes
        print(
            f"processes of the run: {past[0]}; {processes} of them train up to {needs:.1f} clips/s "
            "by its log, without waiting for data"
        )
    if needs is not None:
        print(verdict(rate, needs))


def row_of(trial: Trial, numbers: Sequence[int]) -> dict[str, Any]:
    """Make a row of a decoder: its rates and refused files."""
    row: dict[str, Any] = {"decoder": trial.decoder or "images"}
    row |= {str(workers): trial.rates.get(workers) for workers in numbers}
    if isinstance(trial.error, RoomError):
        row["remark"] = "no room for some"
    if trial.refused:
        tried = len(trial.files | trial.refused.keys())
        first = next(iter(trial.refused.values()))
        row["remark"] = (
            f"refuses {len(trial.refused)} of {tried} files, such as {first.path}: {first.reason}"
        )
    return row


def several(text: str) -> list[int]:
    """Parse numbers such as 1,2,4."""
    return [positive(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
