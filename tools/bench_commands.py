"""The commands of tools/bench.py: all options, and measurements of loader, decoding and losses."""

import argparse
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import bench_fidelity  # type: ignore[import-not-found]
import pandas as pd
import torch
from bench_fidelity import fidelity  # type: ignore[import-not-found]
from bench_updates import (  # type: ignore[import-not-found] # beside this file
    Rows,
    Tables,
    Updates,
    add_arguments,
    compare,
    describe,
    gpu,
    update,
)
from bench_ways import CLIP, LOSSES, loss_step, ways_to_decode  # type: ignore[import-not-found]
from tqdm import tqdm

from hpm_video.config.choices import DecoderChoice, DecoderName
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.clips import check_pace, request_of
from hpm_video.data.manifest import read_manifest
from hpm_video.data.reading import Request, Views
from hpm_video.decoding.locations import Section, is_image
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
    explain,
    past_speed,
    processes_here,
    recommend,
    verdict,
    workers_to_try,
)
from hpm_video.runs.console import above_zero, add_options, make_parser, positive, run
from hpm_video.runs.finetuning import Finetuning
from hpm_video.runs.pretraining import Pretraining
from hpm_video.runs.task import Task
from hpm_video.training.device import choose_device, inference_precision, time_updates
from hpm_video.training.fast import choose_compiling
from hpm_video.training.memory import measure_update
from hpm_video.workers.room import RoomError, usable_cores


def run_command(words: Sequence[str]) -> int:
    """Measure, print tables, and write them to --output if it is given. -> the exit code"""
    arguments = parse_arguments(words)
    tables: dict[str, Rows] = {}

    def command() -> None:
        for title, rows in arguments.measure(arguments):
            print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False, float_format='%.2f')}")
            tables[title] = rows
        if arguments.output is not None:
            write(tables, arguments.output)

    return run(command)


def write(tables: Mapping[str, Rows], path: Path) -> None:
    """Write tables as JSON by their titles, or as one CSV file with a column of titles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    else:
        rows = [{"table": title, **row} for title, found in tables.items() for row in found]
        pd.DataFrame(rows).to_csv(path, index=False)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, None)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add: dict[str, Callable[..., object]] = {}
    for measure in (update, gpu, loader, decoding, losses, fidelity):
        command = commands.add_parser(
            measure.__name__,
            description=inspect.getdoc(measure),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(measure=measure)
        add_options(command, output={"metavar": "FILE.csv|FILE.json", "help": "write tables to it"})
        add[measure.__name__] = command.add_argument
    add_arguments(commands.choices["update"], commands.choices["gpu"])
    add["loader"]("config", type=Path, metavar="CONFIG", help="a config, or RUN/config.yaml")
    add["loader"]("overrides", nargs="*", metavar="section.key=value")
    for name in ("loader", "decoding"):
        add[name]("--decoders", metavar="NAME,NAME", help="default: all that work")
    tried = "numbers of decoding processes to try, for all --processes together"
    add["loader"]("--workers", type=several, metavar="N,N", help=tried)
    processes = (
        "training processes on this machine, one per GPU, which share its cores; default: the "
        "number of GPUs, or of processes of the run if that is less"
    )
    add["loader"]("--processes", type=positive, metavar="N", help=processes)
    needs = "clips per second that all GPUs here together would train"
    add["loader"]("--needs", type=above_zero, metavar="CLIPS", help=needs)
    measured = "videos whose phases are timed (48)"
    add["loader"]("--clips", type=positive, default=48, help=measured)
    add["loader"]("--seconds", type=above_zero, default=8.0, metavar="S", help="per trial (8)")
    add_options(commands.choices["decoding"], views={"default": (5, 3)})
    videos = "a video, a folder of frames (ends in /), or a manifest: its first file is taken"
    add["decoding"]("videos", nargs="+", metavar="VIDEO", help=videos)
    add["decoding"]("--repeats", type=positive, default=15, help="measurements per way (15)")
    add_options(commands.choices["losses"], "device")
    add["losses"]("--clips", type=positive, default=32, help="clips per call (32)")
    add["losses"]("--tokens", type=positive, default=1412, help="hidden tokens per clip (1412)")
    add["losses"]("--turns", type=positive, default=2, help="turns in which each is timed (2)")
    add["losses"]("--repeats", type=positive, default=3, help="timed calls per turn (3)")
    add["losses"]("--threads", type=positive, help="CPU threads; default: torch's choice")
    bench_fidelity.add_arguments(commands.choices["fidelity"])
    return commands.choices[words[0]].parse_intermixed_args(words[1:])


def losses(arguments: argparse.Namespace) -> Tables:
    """Measure time and memory of the ranking loss, forward and backward.

    The package computes it in blocks of rows of token pairs; the plain form holds tensors of
    B x M x M. Memory is the peak of the tensors that exist at the same time.
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
    """Time how videos become clips, compared with the straightforward way.

    Makes a training clip and all views of a test with each decoder (see tools/bench_ways.py), and
    with the first one 4 training clips out of one pass (data.repeats) and one by one. All in one
    process and one thread. After the first turn, which does not count, the files are cached.
    Several files show what preparing one is worth: "as the first" says how many times as fast as
    the first of them each is, read in the same way.
    """
    torch.set_num_threads(1)
    decoders = choose_decoders(arguments.decoders)
    requests = [(name, first_request(name)) for name in arguments.videos]
    for _, request in requests:
        with open_video(request.path):  # says clearly what is wrong with it
            pass
    if "decord" not in available_decoders():
        print("decord is not installed: the straightforward way uses PyAV, with whole frames")

    def measure(way: Callable[[Request], object], request: Request, turn: int) -> float:
        request, began = replace(request, keys=((turn,),)), time.perf_counter()
        way(request)
        return time.perf_counter() - began

    for task, made in ways_to_decode(decoders, Views(*arguments.views)).items():
        pairs = list(product(requests, made.items()))
        timed = {
            str(number): partial(measure, way, request)
            for number, ((_, request), (_, way)) in enumerate(pairs)
        }
        rows = compare(timed, arguments.repeats, warmup=1)
        for number, (row, ((file, _), (way, _))) in enumerate(zip(rows, pairs, strict=True)):
            row["way"] = way
            if len(requests) > 1:
                row["as the first"] = rows[number % len(made)]["ms"] / row["ms"]
                row["file"] = file
        yield task, rows


def first_request(name: str) -> Request:
    """Return the request for a whole file, or for the first one of a manifest."""
    request = Request(name, -1, -1, ())
    if name.endswith(".csv"):
        check_pace(CLIP, manifest := read_manifest(name).of([0]))
        request = request_of(manifest, 0)
    return replace(request, path=Section.parse(request.path).file)


def choose_decoders(names: str | None, first: Sequence[DecoderChoice] = ()) -> list[DecoderName]:
    """Return the named decoders, by default all available ones, beginning with ``first``."""
    there = available_decoders()
    if names is None:
        return sorted(there, key=lambda name: name not in first)
    for word in names.split(","):
        if word not in there:
            names_there = ", ".join(there) or "none"
            raise DecoderError(f"--decoders: {word!r} is not one of those that work: {names_there}")
    return [name for word in names.split(",") for name in there if name == word]


def loader(arguments: argparse.Namespace) -> Tables:
    """Test whether data loading keeps up with the GPUs.

    Tries decoders and numbers of processes, measures the phases of a training clip (reading,
    decoding, augmenting, assembling, copying), names the bottleneck and recommends settings. How
    many clips/s the GPUs could train is known from the log of a run, with its RUN/config.yaml, or
    measured on random pixels.
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
    torch.set_num_threads(1)  # as in a process that decodes
    limits = {"batch_size": batch_size, "seconds": arguments.seconds}
    trials = Trials(clips, config.weights, device, in_memory=in_memory, **limits)
    tried = [Trial(decoder) for decoder in decoders]
    numbers = workers_to_try(arguments.workers, processes)
    for trial, workers in tqdm([*product(tried, numbers)], "trials", leave=False, disable=None):
        if not isinstance(trial.error, TooManyBadFiles):
            trials.read(trial, workers)
    yield "clips/s by the number of workers", [row_of(trial, numbers) for trial in tried]
    taken, rate = choose_setting(tried, max(stream.reader.data.max_bad_share for stream in clips))
    decoder, workers = taken
    trial = tried[decoders.index(decoder)]
    phases = trials.phases(arguments.clips, decoder)
    phases["assembling"] = trial.assembling[workers]
    by = f", by {decoder}" if decoder else ""
    shared = f" ({config.data.repeats} of each video)" if config.data.repeats > 1 else ""
    where = dict.fromkeys(IN_WORKERS, "in a worker")
    where |= {"assembling": "in the run", "copying": "to the GPU"}
    rows = [{"phase": name, "where": where[name], "ms": 1000 * phases[name]} for name in where]
    yield f"one clip{by}{shared}", rows
    print(f"\n{recommend(taken, rate, phases, processes)}")
    beside = trial.worker_seconds[workers]
    print("\n".join(explain(rate, phases, workers, beside, usable_cores())))
    needs = arguments.needs
    if needs is None and past is not None:
        needs = past[1] * processes
        print(
            f"processes of the run: {past[0]}; by its log {processes} of them would train up to "
            f"{needs:.1f} clips/s without waiting for data"
        )
    elif needs is None and device.type != "cpu":
        needs = processes * rate_of_updates(task, device, batch_size * config.data.repeats)
        print(f"on random pixels updates take {needs:.1f} clips/s")
    if needs is None:
        print("--needs=CLIPS says whether that is enough, as does the log of a run on GPUs")
    else:
        print(verdict(rate, needs))


def rate_of_updates(task: Task, device: torch.device, clips: int) -> float:
    """Measure the clips per second of updates on random pixels by one process."""
    task.resolve()
    precision = task.config.engine.precision
    precision = inference_precision(device) if precision == "auto" else precision
    compiled = choose_compiling(task.config.engine, device)
    return clips / float(Updates(task, device, precision, clips, compiled).measure(3, 0))


def row_of(trial: Trial, numbers: Sequence[int]) -> dict[str, Any]:
    """Make the row of a decoder: its rates and refused files."""
    row: dict[str, Any] = {"decoder": trial.decoder or "images"}
    row |= {str(workers): trial.rates.get(workers) for workers in numbers}
    if isinstance(trial.error, RoomError):
        row["remark"] = "no memory for some"
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
