"""Whether processes that decode grow: python tools/bench_worker_memory.py CONFIG OUT.png.

Reads many samples as a training run does, over all epochs that takes, and draws the memory that
each process has for itself.
"""

import argparse
import multiprocessing
import sys
from contextlib import closing
from pathlib import Path

import matplotlib as mpl
from tqdm import tqdm

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.loader import training_batches
from hpm_video.data.mixture import Places, deal_out
from hpm_video.runs.console import interpreter, positive, run
from hpm_video.runs.data import open_data, training_clips
from hpm_video.runs.pretraining import crops_of

MIB = 2**20
POINTS = 200
"""Of the curve."""


def main() -> int:
    """Read, measure, draw, and print how much was gained over the second half. -> exit code"""
    parser = argparse.ArgumentParser(
        prog=f"{interpreter()} tools/bench_worker_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="of pre-training")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--samples", type=positive, default=10_000, metavar="N", help="videos (10,000)"
    )
    parser.add_argument("--workers", type=positive, default=1, metavar="N")
    arguments = parser.parse_args()
    return run(lambda: bench(arguments))


def bench(arguments: argparse.Namespace) -> None:
    """Read, measure, draw and tell. What is raised, ``hpm_video.runs.console.run`` tells."""
    curve = measure(arguments)
    draw(curve, arguments.out)
    half = [most for samples, most in curve if samples >= arguments.samples / 2]
    print(
        f"{arguments.samples} samples: at most {max(most for _, most in curve) / MIB:.0f} MiB in "
        f"a process, {(half[-1] - half[0]) / MIB:+.1f} MiB over the second half; {arguments.out}"
    )


def measure(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Samples read so far, and bytes of the process that has most."""
    config = load_any_config(arguments.config, arguments.overrides)
    if not isinstance(config, PretrainConfig):
        raise ConfigError(f"{arguments.config} is not of pre-training")
    clips = training_clips(config, open_data(config), crops_of(config), same_frames=False)
    batch_size = min(config.recipe.batch_size, 16, arguments.samples)
    places = Places(deal_out(config.weights, arguments.samples // batch_size), batch_size)
    batches = training_batches(
        clips, places, batch_size=batch_size, workers=arguments.workers, pin=False
    )
    curve = []
    every = max(1, arguments.samples // batch_size // POINTS)
    with closing(batches):
        for number, _ in enumerate(tqdm(batches, total=arguments.samples // batch_size)):
            if number % every == 0:
                pids = [child.pid for child in multiprocessing.active_children()]
                curve.append(((number + 1) * batch_size, max(map(own_memory, filter(None, pids)))))
    return curve


def own_memory(pid: int) -> int:
    """Bytes in memory that a process shares with no file and no other process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def draw(curve: list[tuple[int, int]], path: Path) -> None:
    """The curve, from zero."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot([samples for samples, _ in curve], [most / MIB for _, most in curve])
    axes.set(
        xlabel="samples read",
        ylabel="memory of a process (MiB)",
        ylim=(0, 1.2 * max(most for _, most in curve) / MIB),
    )
    axes.set_xlim(0, None)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
