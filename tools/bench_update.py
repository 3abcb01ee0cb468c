"""How fast whole updates are: python tools/bench_update.py CONFIG [section.key=value ...].

Student forward and backward, optimizer step and teacher, on random pixels, in fp32 and in bf16
autocast; no video is decoded. It takes the last epoch, where a teacher scores if it ever does.
"""

import argparse
import gc
import resource
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.autotune import TIMED_CLIPS, trial_update
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.device import (
    AUTOCAST,
    Precision,
    choose_device,
    choose_precision,
    time_updates,
)

TURNS = 3
"""Times that each precision is measured; in between, the other one is."""


@dataclass
class Measurement:
    """What the turns of one precision took."""

    seconds: list[float] = field(default_factory=list)
    """Median seconds of an update, in each turn."""
    gpu_bytes: int = 0
    """Most memory that tensors held on a GPU."""

    @property
    def median(self) -> float:
        """Seconds of an update."""
        return statistics.median(self.seconds)


def main() -> int:
    """Measure, and print a table and a verdict."""
    arguments = parse_arguments()
    try:
        config = load_config(PretrainConfig, arguments.config, arguments.overrides)
        device = choose_device(config.engine.device)
        clips = arguments.clips
        if clips is None:
            clips = min(config.recipe.batch_size * config.data.repeats, TIMED_CLIPS)
        if min(clips, arguments.repeats) < 1:
            raise ConfigError("--clips and --repeats must be at least 1")
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    found = measure_in_turns(config, device, clips, arguments.repeats)
    print_table(found, device, clips)
    taken = choose_precision(
        device, lambda name: trial_update(Pretraining(config), device, name, clips)
    )
    print(f"engine.precision=auto takes {taken} here: {reason(device)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time whole updates, in fp32 and in bf16.")
    parser.add_argument("config", type=Path, help="a file of configs/pretrain")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--clips", type=int, help="of an update; default: at most 8")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of a turn")
    return parser.parse_intermixed_args()


def measure_in_turns(
    config: PretrainConfig, device: torch.device, clips: int, repeats: int
) -> dict[Precision, Measurement]:
    """Time both precisions. The model is made anew each turn: only one is held at a time."""
    found = {name: Measurement() for name in AUTOCAST}
    for _ in range(TURNS):
        for name, measurement in found.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            update = trial_update(Pretraining(config), device, name, clips)
            measurement.seconds.append(time_updates(update, device, warmup=1, repeats=repeats))
            del update
            gc.collect()  # an optimizer holds itself, and with it the model
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device)
                measurement.gpu_bytes = max(measurement.gpu_bytes, peak)
    return found


def print_table(found: dict[Precision, Measurement], device: torch.device, clips: int) -> None:
    """Speed of both, their ratio, and the memory: of each on a GPU, of the process elsewhere."""
    print(
        f"updates of {clips} clip(s), {device.type} with {torch.get_num_threads()} thread(s), "
        f"medians of {TURNS} turns"
    )
    on_gpu = device.type == "cuda"
    print(f"{'precision':14}{'clips/s':>10}{'ms/update':>12}{'peak memory' if on_gpu else '':>16}")
    for name, one in found.items():
        memory = f"{one.gpu_bytes / 1e9:13.2f} GB" if on_gpu else ""
        print(f"{name:14}{clips / one.median:10.1f}{one.median * 1e3:12.1f}{memory}")
    print(f"{'bf16 / fp32':14}{found['fp32'].median / found['bf16'].median:10.2f} x")
    if not on_gpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gigabytes = peak / (1e9 if sys.platform == "darwin" else 1e6)
        print(f"largest size of this process: {gigabytes:.2f} GB")


def reason(device: torch.device) -> str:
    """Why a precision is taken on this kind of device."""
    if device.type == "cuda":
        return "bf16 where the GPU is made for it"
    if device.type == "mps":
        return "always on this kind of device"
    return "on a CPU bf16 only where it measures faster by a tenth (measured anew)"


if __name__ == "__main__":
    sys.exit(main())
