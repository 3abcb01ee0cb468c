"""Advice from the speed of reading: which settings to take, and whether GPUs would starve."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpm_video.config.choices import DecoderName
from hpm_video.files.failures import tolerated
from hpm_video.preparation.benchmark import IN_THE_RUN, IN_WORKERS, Phases, Trial
from hpm_video.workers.room import usable_cores

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
ENOUGH = 0.95  # share of the best rate at which fewer processes are preferred
RECENT_LINES = 20  # number of lines of a run's metrics from which its speed is taken
BUSY = 0.5  # load of the one thread that collates above which it may limit a trial
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


def bottleneck(phases: Phases, workers: int) -> str:
    """Return the phase that holds up the others when so many processes decode."""
    in_workers, in_the_run = (sum(phases[name] for name in of) for of in (IN_WORKERS, IN_THE_RUN))
    slower = IN_THE_RUN if in_the_run > in_workers / workers else IN_WORKERS
    return max(slower, key=lambda name: phases[name])


def recommend(setting: Setting, rate: float, phases: Phases, processes: int) -> str:
    """Describe the recommended setting and its bottleneck."""
    decoder, workers = setting
    each = max(1, workers // processes)
    named = f"data.decoder={decoder} " if decoder else ""
    shared = f" for each of {processes} processes, {workers} in all" if processes > 1 else ""
    lines = [f"take {named}data.workers={each}{shared}: {rate:.1f} clips/s"]
    if processes > 1 and rate * phases["collating"] > BUSY:
        lines.append(
            "(one thread collated these batches; each process has its own: the rate may be higher)"
        )
    phase = bottleneck(phases, each)
    return "\n".join([*lines, f"the bottleneck is {phase}: {REMEDIES[phase]}"])


def verdict(rate: float, needs: float) -> str:
    """Say whether GPUs would wait for data."""
    if rate >= needs:
        return f"enough for GPUs that train {needs:.1f} clips/s: {rate / needs:.1f} times as much"
    return (
        f"GPUs that could train {needs:.1f} clips/s would starve: they would wait for data "
        f"{1 - rate / needs:.0%} of the time"
    )
