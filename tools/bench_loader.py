"""Whether data keep up with a GPU: python tools/bench_loader.py CONFIG [section.key=value ...].

Takes the reading of training clips apart (reading, decoding, augmenting, collating, copying), tries
numbers of processes and decoders, names the bottleneck and recommends settings. CONFIG may be that
of a run, RUN/config.yaml: then it is known how many clips per second its GPUs could train.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hpm_video.config.choices import DecoderName
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.mixture import MixedClips, Places, deal_out
from hpm_video.decoding.locations import is_image
from hpm_video.decoding.registry import DecodeError, DecoderError, available_decoders
from hpm_video.files.failures import Failure, tolerated
from hpm_video.preparation.benchmark import (
    IN_THE_RUN,
    IN_WORKERS,
    Phases,
    RefusedFiles,
    Storage,
    Trial,
    reader_of,
    storage_of,
    time_phases,
    try_reading,
)
from hpm_video.runs.console import above_zero, interpreter, positive, run
from hpm_video.runs.finetuning import augmentation
from hpm_video.runs.pretraining import crops_of
from hpm_video.runs.run import open_data, training_clips
from hpm_video.training.device import choose_device
from hpm_video.workers.room import RoomError

REMEDIES = {
    "reading": "the disk or the network is slow: copy the data to a local disk, or pack it with "
    "tools/transcode.py --to shards",
    "decoding": "tools/transcode.py makes videos small and quick to seek in; more data.repeats "
    "take more clips of each decoded video; more cores decode more",
    "augmenting": "RandAugment and large crops take their time: transcode to a smaller short side, "
    "or take more data.workers",
    "collating": "batches are put together in one thread of the run: more processes (GPUs) with a "
    "smaller micro-batch each, or smaller clips",
    "copying": "the way to the GPU is slow: more GPUs with a smaller micro-batch each",
}
ENOUGH = 0.95
"""Of the best rate: fewer processes that reach so much are preferred."""
LINES = 20
"""Of a run's metrics that tell its speed."""
BUSY = 0.5
"""Of the one thread that puts batches together in a trial: from here on it may hold up the trial,
where several processes that train have a thread each."""
NUM_PLACES = 4 * 10**6
"""Videos that trials may read, one after the other."""

Setting = tuple[DecoderName | None, int]
"""A decoder, none for images, and the number of processes that decode."""


def main() -> int:
    """Measure, print tables and a verdict. -> the exit code"""
    arguments = parse_arguments()
    return run(lambda: bench(arguments))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=f"{interpreter()} tools/bench_loader.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG")
    add("overrides", nargs="*", metavar="section.key=value")
    add(
        "--workers",
        type=_numbers,
        metavar="N,N",
        help="numbers of processes that decode, of all --processes together, that are tried",
    )
    add("--decoders", metavar="NAME,NAME", help="by default all that load")
    add(
        "--processes",
        type=positive,
        metavar="N",
        help="that train on this machine, one for each GPU, and share its cores. By default as "
        "many as there are GPUs, or as the run of CONFIG had if those are fewer",
    )
    add(
        "--needs",
        type=above_zero,
        metavar="CLIPS",
        help="per second, of this machine's GPUs together",
    )
    add(
        "--clips",
        type=positive,
        default=48,
        metavar="N",
        help="videos taken apart into phases (48)",
    )
    add("--seconds", type=above_zero, default=8.0, metavar="S", help="of each trial (8)")
    return parser.parse_args()


def bench(arguments: argparse.Namespace) -> None:
    """Measure and tell. What is raised, ``hpm_video.runs.console.run`` tells."""
    config = load_any_config(arguments.config, arguments.overrides)
    data = open_data(config)
    if isinstance(config, PretrainConfig):
        clips = training_clips(config, data, crops_of(config), same_frames=False)
    else:
        clips = training_clips(config, data, {"": augmentation(config)}, same_frames=True)
    decoders = _decoders(arguments.decoders, clips)
    device = choose_device(config.engine.device)
    past = PastRun.read(arguments.config.parent)
    processes = arguments.processes or processes_here(device, past)
    trials = Trials(
        clips,
        config.weights,
        storage_of(clips),
        min(config.engine.micro_batch or config.recipe.batch_size, 32),
        arguments.seconds,
    )
    print(f"{_count(cores(), 'core')} for {_count(processes, 'process', 'es')} that train")
    print(f"{trials.storage}\n")
    phases, decoder = measure_phases(trials, arguments.clips, device, decoders)
    print_phases(phases, device, decoder, config.data.repeats)
    rates = try_all(trials, decoders, _tried(arguments.workers, processes))
    taken = recommend(rates, phases, processes)
    needs = arguments.needs or past.needs(processes)
    if needs is not None:
        if arguments.needs is None:
            print(past.told(processes))
        print(verdict(rates[taken], needs))


@dataclass
class Trials:
    """Reads the clips of a training run for some seconds, again and again."""

    clips: MixedClips
    weights: Sequence[float]
    """Of its sources."""
    storage: Storage
    batch_size: int
    seconds: float
    _start: int = field(default=0, init=False)
    """The update that comes next."""

    def __post_init__(self) -> None:
        self._sources = deal_out(self.weights, NUM_PLACES // self.batch_size)

    def places(self) -> Places:
        """What is read next."""
        return Places(self._sources, self.batch_size, self._start)

    def go_on(self, count: int) -> None:
        """After so many places were read: what comes from the disk must not be read again."""
        if not self.storage.is_memory:
            self._start += -(-count // self.batch_size)
            if self._start > 0.9 * len(self._sources):
                self._start = 0

    def measure(self, decoder: DecoderName | None, workers: int) -> Trial:
        """Read from where the trial before ended. Raises as ``try_reading`` does."""
        places = self.places()
        self.storage.prepare_all(self.clips, places)
        trial = try_reading(
            self.clips,
            places,
            batch_size=self.batch_size,
            workers=workers,
            seconds=self.seconds,
            decoder=decoder,
        )
        self.go_on(trial.reached)
        return trial


def measure_phases(
    trials: Trials,
    count: int,
    device: torch.device,
    decoders: Sequence[DecoderName | None],
) -> tuple[Phases, DecoderName | None]:
    """The phases with the first decoder that decodes any of the files. -> those, and which it is

    Raises:
        DecodeError: none does.
    """
    places = list(islice(trials.places(), count))

    def measured(decoder: DecoderName | None) -> Phases | DecodeError:
        try:
            return time_phases(
                trials.clips,
                places,
                batch_size=trials.batch_size,
                device=device,
                storage=trials.storage,
                decoder=decoder,
            )
        except DecodeError as error:
            return error

    error = DecodeError("there is no decoder")
    for decoder in decoders:
        phases = measured(decoder)
        if isinstance(phases, Phases):
            trials.go_on(count)
            return phases, decoder
        error = phases
    raise error


def print_phases(
    phases: Phases, device: torch.device, decoder: DecoderName | None, repeats: int
) -> None:
    """The table of phases."""
    total = phases.seconds((*IN_WORKERS, *IN_THE_RUN))
    by = f", by {decoder}" if decoder else ""
    shared = f" ({repeats} of each video)" if repeats > 1 else ""
    print(f"{'one clip' + by + shared:40}{'ms':>8}{'share':>8}")
    for name in (*IN_WORKERS, *IN_THE_RUN):
        where = "in a worker" if name in IN_WORKERS else "in the run"
        print(f"  {name + ', ' + where:38}", end="")
        if name == "copying" and device.type == "cpu":
            print(f"{'-':>8}   (there is no GPU)")
            continue
        seconds = phases.seconds([name])
        print(f"{1000 * seconds:8.2f}{seconds / total:8.0%}")


def try_all(
    trials: Trials, decoders: Sequence[DecoderName | None], workers: Sequence[int]
) -> dict[Setting, float]:
    """Clips per second by decoder and number of processes; printed as they are measured.

    Decoders that refuse more files than the data allow are left out, unless all do.

    Raises:
        RefusedFiles: all refuse so many that nothing could be measured.
        RoomError: the machine has room for none of those numbers.
    """
    rows: list[Row] = []
    print(f"\n{'clips/s':20}" + "".join(f"{_count(count, 'worker'):>12}" for count in workers))
    for decoder in decoders:
        print(f"  {decoder or 'images':18}", end="", flush=True)
        row = Row()
        for count in workers:
            if not isinstance(row.problem, RefusedFiles):
                told = row.measure(trials, decoder, count)
                print(f"{told:>12}" if told else "", end="", flush=True)
        print(row.remark())
        rows.append(row)
    measured = [row for row in rows if row.rates]
    if not measured:
        raise next(row.problem for row in rows if row.problem)
    allowed = max(stream.max_bad_share for stream in trials.clips.streams)
    usable = [row for row in measured if not row.refuses_more_than(allowed)]
    return {key: rate for row in usable or measured for key, rate in row.rates.items()}


@dataclass
class Row:
    """The trials of one decoder."""

    rates: dict[Setting, float] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    """Files."""
    refused: dict[str, Failure] = field(default_factory=dict)
    """By path."""
    problem: RefusedFiles | RoomError | None = None
    """The last one."""

    def measure(self, trials: Trials, decoder: DecoderName | None, workers: int) -> str:
        """Make a trial. -> what the table tells of it"""
        try:
            trial = trials.measure(decoder, workers)
        except RoomError as error:
            self.problem = error
            return "no room"
        except RefusedFiles as error:
            self.problem = error
            self.rates.clear()
            return ""
        self.rates[decoder, workers] = trial.rate
        self.read |= trial.read
        self.refused |= trial.refused
        return f"{trial.rate:.1f}"

    def refuses_more_than(self, share: float) -> bool:
        """Of the files that it tried."""
        return len(self.refused) > tolerated(len(self.read) + len(self.refused), share)

    def remark(self) -> str:
        """What stands behind the numbers."""
        if isinstance(self.problem, RefusedFiles):
            first = self.problem.first
            return f"  refuses these files, such as {first.path}: {first.reason}"
        if not self.refused:
            return ""
        tried = len(self.read) + len(self.refused)
        return f"  refuses {len(self.refused)} of {tried} files, such as {next(iter(self.refused))}"


def recommend(rates: dict[Setting, float], phases: Phases, processes: int) -> Setting:
    """Print the settings to take, and what holds them up. -> which of ``rates`` it is"""
    best = max(rates.values())
    decoder, workers = min(
        (key for key, rate in rates.items() if rate >= ENOUGH * best),
        key=lambda key: (key[1], -rates[key]),
    )
    rate = rates[decoder, workers]
    each = max(1, workers // processes)
    named = f"data.decoder={decoder} " if decoder else ""
    shared = f" for each of {processes} processes, {workers} in all" if processes > 1 else ""
    print(f"\ntake {named}data.workers={each}{shared}: {rate:.1f} clips/s")
    if processes > 1 and rate * phases.collating > BUSY:
        print("(one thread put these batches together; each of them has its own: more may come)")
    phase = phases.bottleneck(each)
    print(f"the bottleneck is {phase}: {REMEDIES[phase]}")
    return decoder, workers


def verdict(rate: float, needs: float) -> str:
    """Whether GPUs would wait."""
    if rate >= needs:
        return f"enough for GPUs that train {needs:.1f} clips/s: {rate / needs:.1f} times as much"
    return (
        f"GPUs that could train {needs:.1f} clips/s would starve: they would wait for data "
        f"{1 - rate / needs:.0%} of the time"
    )


@dataclass(frozen=True)
class PastRun:
    """What a run tells about its speed; nothing where there is none."""

    processes: int | None = None
    """That it had when it was started last, on all its machines; none if it does not say."""
    speeds: tuple[float, ...] = ()
    """Clips per second that one of its processes would have trained if it had never waited; that
    all of them would where it does not say how many they were."""

    @classmethod
    def read(cls, folder: Path) -> "PastRun":
        """That of a run's directory."""
        starts = [
            (line["first_update"], line.get("processes"))
            for line in _json_lines(folder / "starts.jsonl")
        ]
        speeds = [
            line["clips_per_second"]
            / max(1 - line["data_wait"], 1e-3)
            / (_last(count for first, count in starts if first < line["update"]) or 1)
            for line in _json_lines(folder / "metrics.jsonl")
            if line["kind"] == "train"
        ]
        return cls(_last(count for _, count in starts), tuple(speeds[-LINES:]))

    def needs(self, processes: int) -> float | None:
        """Clips per second that so many processes would train; none if it is not known."""
        if not self.speeds:
            return None
        middle = sorted(self.speeds)[len(self.speeds) // 2]
        return middle * (1 if self.processes is None else processes)

    def told(self, processes: int) -> str:
        """What the needs are taken from."""
        needs = f"up to {self.needs(processes) or 0:.1f} clips/s by its log"
        if self.processes in (None, processes):
            return f"the run trained {needs}, if it never waited for data"
        had = f"the run had {_count(self.processes or 1, 'process', 'es')}"
        return f"{had}; {processes} such train {needs}, if they never wait for data"


def processes_here(device: torch.device, past: PastRun) -> int:
    """Processes that train on this machine: one for each GPU, but no more than the run had."""
    if device.type != "cuda":
        return past.processes or 1
    gpus = torch.cuda.device_count()
    return min(past.processes or gpus, gpus)


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that a run may be writing to; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _last(values: Iterable[int | None]) -> int | None:
    return ([None, *values])[-1]


def _decoders(names: str | None, clips: MixedClips) -> Sequence[DecoderName | None]:
    """Those to try, that of the configuration first."""
    if all(is_image(path) for stream in clips.streams for path in stream.manifest.files):
        return [None]
    there = available_decoders()
    if names is None:
        own = {reader_of(stream).decoder for stream in clips.streams}
        return sorted(there, key=lambda name: name not in own)
    chosen = [name for word in names.split(",") for name in there if name == word]
    for word in names.split(","):
        if word not in there:
            raise DecoderError(f"--decoders: {word} is not there, only {', '.join(there)}")
    return chosen


def _tried(given: Sequence[int] | None, processes: int) -> list[int]:
    """Numbers of processes that decode, the same number for each process that trains.

    By default 1, 2, 4 ... for each, up to one for every core of the machine.
    """
    most = max(1, cores() // processes)
    usual = [*(2**power for power in range(20) if 2**power < most), most]
    each = usual if given is None else [max(1, count // processes) for count in given]
    return sorted({count * processes for count in each})


def _count(count: int, thing: str, ending: str = "s") -> str:
    return f"{count} {thing}{ending if count != 1 else ''}"


def _numbers(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
