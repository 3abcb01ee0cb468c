"""Whether data keep up with a GPU: python tools/bench_loader.py CONFIG [section.key=value ...].

Takes the reading of training clips apart (reading, decoding, augmenting, collating, copying), tries
numbers of processes and decoders, names the bottleneck and recommends settings. CONFIG may be that
of a run, RUN/config.yaml: then it is known how many clips per second its GPUs could train.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hpm_video.config import ConfigError, PretrainConfig, load_any_config
from hpm_video.console import above_zero, interpreter, positive
from hpm_video.data.benchmark import (
    IN_THE_RUN,
    IN_WORKERS,
    Phases,
    clips_per_second,
    time_phases,
)
from hpm_video.data.decode import DecodeError, DecoderError, available_decoders
from hpm_video.data.loader import default_workers
from hpm_video.data.manifest import ManifestError
from hpm_video.data.mixture import MixedClips, Place, Places, deal_out
from hpm_video.data.room import RoomError
from hpm_video.data.sources import is_image
from hpm_video.experiment import open_data, training_clips
from hpm_video.finetune import augmentation
from hpm_video.pretrain import crops_of
from hpm_video.training.device import choose_device

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


def main() -> int:
    """Measure, print tables and a verdict."""
    arguments = parse_arguments()
    try:
        return bench(arguments)
    except (ConfigError, ManifestError, DecodeError, DecoderError, RoomError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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
    add("--workers", type=_numbers, metavar="N,N", help="numbers of processes that are tried")
    add("--decoders", metavar="NAME,NAME", help="by default all that load")
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


def bench(arguments: argparse.Namespace) -> int:
    """Measure and tell, see ``main`` for what is raised."""
    config = load_any_config(arguments.config, arguments.overrides)
    data = open_data(config)
    if isinstance(config, PretrainConfig):
        clips = training_clips(config, data, crops_of(config), same_frames=False)
    else:
        clips = training_clips(config, data, {"": augmentation(config)}, same_frames=True)
    batch_size = min(config.engine.micro_batch or config.recipe.batch_size, 32)
    places = Places(deal_out(config.weights, 10**5), batch_size)
    device = choose_device(config.engine.device)
    phases = time_phases(
        clips, [places[i] for i in range(arguments.clips)], batch_size=batch_size, device=device
    )
    print_phases(phases, device, config.data.repeats)
    decoders = _decoders(arguments.decoders, clips)
    workers = arguments.workers or _usual_workers()
    rates = try_all(clips, places, decoders, workers, batch_size, arguments.seconds)
    taken = recommend(rates, phases)
    needs = arguments.needs or needs_of_run(arguments.config.parent)
    if needs is not None:
        print(verdict(rates[taken], needs))
    return 0


def print_phases(phases: Phases, device: torch.device, repeats: int) -> None:
    """The table of phases."""
    total = phases.seconds((*IN_WORKERS, *IN_THE_RUN))
    shared = f", {repeats} of each decoded video" if repeats > 1 else ""
    print(f"{'a clip, by itself' + shared:40}{'ms':>8}{'share':>8}")
    for name in (*IN_WORKERS, *IN_THE_RUN):
        if name == "copying" and device.type == "cpu":
            print(f"  {'copying':38}{'-':>8}   (there is no GPU)")
            continue
        seconds = phases.seconds([name])
        where = "in a worker" if name in IN_WORKERS else "in the run"
        print(f"  {name + ', ' + where:38}{1000 * seconds:8.1f}{seconds / total:8.0%}")


def try_all(
    clips: MixedClips,
    places: Sequence[Place],
    decoders: Sequence[str | None],
    workers: Sequence[int],
    batch_size: int,
    seconds: float,
) -> dict[tuple[str | None, int], float]:
    """Clips per second by decoder and number of workers; printed as they are measured."""
    rates = {}
    print(f"\n{'clips/s':20}" + "".join(f"{f'{n} worker' + 's' * (n > 1):>12}" for n in workers))
    for decoder in decoders:
        print(f"  {decoder or 'images':18}", end="", flush=True)
        for count in workers:
            rates[decoder, count] = clips_per_second(
                *(clips, places),
                batch_size=batch_size,
                workers=count,
                seconds=seconds,
                decoder=decoder,
            )
            print(f"{rates[decoder, count]:12.1f}", end="", flush=True)
        print()
    return rates


def recommend(rates: dict[tuple[str | None, int], float], phases: Phases) -> tuple[str | None, int]:
    """Print the settings to take, and what holds them up. -> decoder and number of workers"""
    best = max(rates.values())
    decoder, workers = min(
        (key for key, rate in rates.items() if rate >= ENOUGH * best),
        key=lambda key: (key[1], -rates[key]),
    )
    named = f"data.decoder={decoder} " if decoder else ""
    print(f"\ntake {named}data.workers={workers}: {rates[decoder, workers]:.1f} clips/s")
    phase = phases.bottleneck(workers)
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


def needs_of_run(folder: Path) -> float | None:
    """Clips per second that a run would train if it never waited; none where there is no run."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    speeds = [
        line["clips_per_second"] / max(1 - line["data_wait"], 1e-3)
        for line in lines
        if line.get("kind") == "train"
    ][-LINES:]
    return sorted(speeds)[len(speeds) // 2] if speeds else None


def _decoders(names: str | None, clips: MixedClips) -> list[str | None]:
    if all(is_image(path) for stream in clips.streams for path in stream.manifest.files):
        return [None]
    there = available_decoders()
    chosen = [*there] if names is None else names.split(",")
    for name in chosen:
        if name not in there:
            raise DecoderError(f"--decoders: {name} is not there, only {', '.join(there)}")
    return [*chosen]


def _usual_workers() -> list[int]:
    """1, 2, 4 ... and one process more than a run takes by itself."""
    most = default_workers() + 1
    return sorted({*(2**power for power in range(10) if 2**power < most), most})


def _numbers(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
