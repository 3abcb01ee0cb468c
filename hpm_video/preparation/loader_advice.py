"""Advice from the speed of reading: which settings to take, and whether GPUs would starve."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpm_video.config.choices import DecoderName
from hpm_video.files.failures import tolerated
from hpm_video.files.wording import counted
from hpm_video.preparation.benchmark import IN_WORKERS, Phases, Trial
from hpm_video.workers.room import usable_cores

REMEDIES = {
    "reading": "the disk or the network is slow: copy the data to a local disk, or pack it with "
    "tools/transcode.py --to shards",
    "decoding": "tools/transcode.py makes videos small and quick to seek in; more data.repeats "
    "take more clips of each decoded video; more cores decode more",
    "augmenting": "RandAugment and large crops take their time: transcode to a smaller short side, "
    "or take more data.workers",
    "assembling": "one thread of the run hands out files and puts batches together: more processes "
    "(GPUs), or more data.repeats",
    "copying": "the way to the GPU is slow, which smaller clips use less",
}
ENOUGH = 0.95  # share of the best rate at which fewer processes are preferred
RECENT_LINES = 20  # number of lines of a run's metrics from which its speed is taken
BUSY = 0.5  # load of the one thread that assembles above which it may limit a trial
UNEXPLAINED = 0.25  # share by which a measured rate may differ from the expected one
Setting = tuple[DecoderName | None, int]
"""A decoder (none for images) and the number of decoding processes."""


def past_speed(run: Path) -> tuple[int, float] | None:
    """Read the speed of a run from its log, if there is one.

    -> its processes at the last start, and the clips per second that each would have trained
    without waiting for data
    """
    starts, logged = (_json_lines(run / f"{name}.jsonl") for name in ("starts", "metrics"))
    trained = [line for line in logged if line["kind"] == "train"]
    if not starts or not trained:
        return None
    rates = []
    for line in trained[-RECENT_LINES:]:
        processes = [s["processes"] for s in starts if s["first_update"] < line["update"]][-1]
        rates.append(line["clips_per_second"] / max(1 - line["data_wait"], 1e-3) / processes)
    return starts[-1]["processes"], statistics.median_high(rates)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file that a run may be writing to; nothing where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def processes_here(device: torch.device, in_the_past: int | None) -> int:
    """Return the number of training processes here: one per GPU, but no more than the run had."""
    gpus = torch.cuda.device_count()
    return min(in_the_past or gpus, gpus) if device.type == "cuda" else in_the_past or 1


def workers_to_try(given: Sequence[int] | None, processes: int) -> list[int]:
    """Return numbers of decoding processes to share evenly: 1, 2, 4 ... each, up to the cores."""
    most = max(1, usable_cores() // processes)
    usual = [*(2**power for power in range(20) if 2**power < most), most]
    each = usual if given is None else [max(1, count // processes) for count in given]
    return sorted({count * processes for count in each})


def choose_setting(trials: Sequence[Trial], max_bad_share: float) -> tuple[Setting, float]:
    """Return the setting with the fewest processes that is nearly as fast as the best; its rate.

    Decoders that refuse more files than training tolerates are left out, unless all do. Raises the
    error of a trial where none has a rate.
    """
    measured = [trial for trial in trials if trial.rates]
    if not measured:
        raise next(trial.error for trial in trials if trial.error)
    usable = [
        trial
        for trial in measured
        if len(trial.refused) <= tolerated(len(trial.files | trial.refused.keys()), max_bad_share)
    ]
    taken = usable or measured
    rates = {(trial.decoder, n): rate for trial in taken for n, rate in trial.rates.items()}
    enough = [it for it, rate in rates.items() if rate >= ENOUGH * max(rates.values())]
    chosen = min(enough, key=lambda setting: (setting[1], -rates[setting]))
    return chosen, rates[chosen]


def seconds_per_clip(phases: Phases, workers: int) -> dict[str, float]:
    """Return how long a clip keeps what works at the same time busy, by its longest phase."""
    longest = max(IN_WORKERS, key=lambda name: phases[name])
    decoding = sum(phases[name] for name in IN_WORKERS) / workers
    return {longest: decoding, "assembling": phases["assembling"], "copying": phases["copying"]}


def bottleneck(phases: Phases, workers: int) -> str:
    """Return the phase that holds up the others when so many processes decode."""
    seconds = seconds_per_clip(phases, workers)
    return max(seconds, key=lambda name: seconds[name])


def recommend(setting: Setting, rate: float, phases: Phases, processes: int) -> str:
    """Describe the recommended setting and its bottleneck."""
    decoder, workers = setting
    each = max(1, workers // processes)
    named = f"data.decoder={decoder} " if decoder else ""
    shared = f" for each of {processes} processes, {workers} in all" if processes > 1 else ""
    lines = [f"take {named}data.workers={each}{shared}: {rate:.1f} clips/s"]
    if processes > 1 and rate * phases["assembling"] > BUSY:
        lines.append(
            "(one thread assembled these batches; each process has its own: the rate may be higher)"
        )
    phase = bottleneck(phases, each)
    return "\n".join([*lines, f"the bottleneck is {phase}: {REMEDIES[phase]}"])


def explain(
    rate: float, phases: Phases, workers: int, worker_seconds: float, cores: int
) -> list[str]:
    """Compare a measured rate with the one that the phases allow, and explain the difference.

    ``worker_seconds``: of a process's core per clip, 0 if unknown.
    """
    expected = 1 / max(seconds_per_clip(phases, workers).values())
    lines = [f"by the phases, each timed alone, {expected:.1f} clips/s; measured: {rate:.1f}"]
    if rate > (1 + UNEXPLAINED) * expected:
        return [
            *lines,
            "the files that were timed alone take longer than most: time more (--clips)",
        ]
    if rate >= (1 - UNEXPLAINED) * expected:
        return lines
    alone, idle = sum(phases[name] for name in IN_WORKERS), 1 - rate * worker_seconds / workers
    if workers >= cores:
        lines.append(f"{counted(workers, 'process')} and the run share {counted(cores, 'core')}")
    if worker_seconds > (1 + UNEXPLAINED) * alone:
        lines.append(
            f"side by side a clip takes {1000 * worker_seconds:.1f} ms of a core, alone "
            f"{1000 * alone:.1f}: two threads share a core, or memory is the limit"
        )
    if worker_seconds and idle > UNEXPLAINED:
        lines.append(
            f"the processes stand still {idle:.0%} of the time: they wait for a core, the disk or "
            "the run"
        )
    return lines


def verdict(rate: float, needs: float) -> str:
    """Say whether GPUs would wait for data."""
    given = f"the loader gives {rate:.1f} clips/s, the update takes {needs:.1f}: "
    if rate >= needs:
        return f"{given}{rate / needs:.1f} times what is needed"
    return f"{given}it would wait for data {1 - rate / needs:.0%} of the time"
