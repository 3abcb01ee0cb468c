"""Plan past one machine: python tools/scaling.py [CONFIG ...] [--write docs/scaling.md].

From the shapes of a model: what an update computes, keeps in memory and sends, on many GPUs and in
each stage of ZeRO. Nothing is measured. How fast a GPU computes and sends is assumed, see --help.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from count_flops import count  # type: ignore[import-not-found]

from hpm_video.config.batch_plan import BatchPlan, micro_batches
from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.models.from_config import build_student
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.console import run
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.deepspeed_settings import USUAL, buckets_of
from hpm_video.training.memory import (
    FP32,
    ActivationBytes,
    Buckets,
    Sharding,
    TrainingMemory,
    simulate_update,
    training_memory,
)

ROOT = Path(__file__).parent.parent
CONFIGS = [ROOT / "configs" / "pretrain" / f"k400_hpm_{size}.yaml" for size in "blh"]
GPUS = (8, 64, 512)
STAGES: tuple[int | None, ...] = (None, 0, 1, 2, 3)
SIMULATED_CLIPS = (8, 16)
BUCKETS = buckets_of(USUAL)
"""Sizes of DeepSpeed's buffers, where the user's file does not say otherwise."""
FULL = 0.9
"""Share of a device's memory that is planned with; the rest is for fragments and libraries."""


@dataclass(frozen=True)
class Machine:
    """What a GPU is assumed to do. None of this is measured."""

    flops: float
    """Of its matrix products in bfloat16, per second."""
    utilisation: float
    """Share of them that an update reaches."""
    bandwidth: float
    """Bytes that each GPU sends per second, while it receives as many."""
    memory: float
    """Bytes of its memory."""


@dataclass(frozen=True)
class Model:
    """What is known of a model from its shapes."""

    name: str
    parameters: int
    batch_size: int
    repeats: int
    """Clips of each video."""
    student: float
    """Thousands of millions of multiply-adds of a clip, forward and backward."""
    teacher: float
    activations: ActivationBytes


@dataclass(frozen=True)
class Row:
    """An update on so many GPUs, in one of the stages."""

    plan: BatchPlan
    stage: int | None
    memory: TrainingMemory
    activations: float
    computing: float
    """Seconds."""
    sent: float
    """Bytes that each GPU sends."""
    sending: float
    """Seconds."""

    @property
    def needed(self) -> float:
        """Bytes on the device."""
        return self.memory.device.total + self.activations


def main() -> int:
    """Print the tables, or write them into a page between its markers."""
    return run(lambda: plan(parse_arguments()))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="*", default=CONFIGS)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    assumed = parser.add_argument_group("assumed of every GPU, not measured")
    assumed.add_argument("--flops", type=float, default=300e12, help="per second")
    assumed.add_argument("--utilisation", type=float, default=0.3, help="share of them reached")
    assumed.add_argument("--bandwidth", type=float, default=25e9, help="bytes sent per second")
    assumed.add_argument("--memory", type=float, default=80e9, help="bytes")
    parser.add_argument("--write", type=Path, help="a page with markers, instead of printing")
    return parser.parse_args()


def plan(arguments: argparse.Namespace) -> None:
    """Make the tables of each config."""
    machine = Machine(arguments.flops, arguments.utilisation, arguments.bandwidth, arguments.memory)
    if arguments.write is not None:  # before anything is worked out
        for name in ("state", *(path.stem for path in arguments.config)):
            put_into(arguments.write.read_text(encoding="utf-8"), name, "")
    show("state", describe_state(arguments.gpus, machine), arguments.write)
    for path in arguments.config:
        model = look_at(path)
        show(model.name, describe(model, arguments.gpus, machine), arguments.write)


def show(name: str, lines: Iterator[str], page: Path | None) -> None:
    """Print a table, or write it into a page."""
    table = "\n".join(lines)
    if page is None:
        print(f"{table}\n")
        return
    text = page.read_text(encoding="utf-8")
    page.write_text(put_into(text, name, table), encoding="utf-8")


def put_into(page: str, name: str, table: str) -> str:
    """The page with a table between the markers of that name."""
    begin, end = f"<!-- scaling {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ConfigError(f"the page has no lines {begin.strip()} and {end}; add them")
    return f"{before}{begin}{table}\n{end}{after}"


def describe_state(gpus: Sequence[int], machine: Machine) -> Iterator[str]:
    """Bytes of each parameter and its teacher's, and how many parameters that makes at the most."""
    yield "| | " + " | ".join(f"{number} GPUs" for number in gpus) + " |"
    yield "|:--|" + "--:|" * len(gpus)
    for stage in STAGES:
        shown = []
        for number in gpus:
            sharding = Sharding(number, stage, buckets=Buckets(0, 0, 0))
            needed = training_memory(10**9, 10**9, sharding).device
            each = (needed.total - needed.buffers) / 1e9
            most = FULL * machine.memory / each / 1e9
            shown.append(f"{each:.1f} B, {most:.0f} x 10^9")
        yield f"| {name_of(stage)} | " + " | ".join(shown) + " |"


def name_of(stage: int | None) -> str:
    """As the tables have it."""
    return "DDP" if stage is None else f"ZeRO {stage}"


def look_at(path: Path) -> Model:
    """Count a config's multiply-adds, parameters and activations. Nothing is allocated."""
    config = load_config(PretrainConfig, path, [])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_student(config).parameters())
    student, teacher = count(config)
    simulated = {
        clips: simulate_update(
            partial(trial_update, Pretraining(config), torch.device("cpu"), "bf16", clips)
        )
        for clips in SIMULATED_CLIPS
    }
    return Model(
        path.stem,
        parameters,
        config.recipe.batch_size,
        config.data.repeats,
        student,
        teacher,
        ActivationBytes.through(simulated),
    )


def row_of(model: Model, gpus: int, stage: int | None, machine: Machine) -> Row:
    """The update with the largest micro-batch that fits; with the smallest where none does."""
    sharding = Sharding(gpus, stage, buckets=BUCKETS)
    memory = training_memory(model.parameters, model.parameters, sharding)
    free = FULL * machine.memory - memory.device.total
    possible = micro_batches(model.batch_size, gpus)
    fitting = [n for n in possible if model.activations.of(n * model.repeats) <= free]
    planned = BatchPlan(model.batch_size, gpus, max(fitting, default=possible[0]))
    clips = planned.share * model.repeats
    flops = 2e9 * (model.student + model.teacher) * clips
    sent = bytes_sent(model.parameters, planned, stage)
    return Row(
        planned,
        stage,
        memory,
        model.activations.of(planned.micro_batch * model.repeats),
        computing=flops / (machine.flops * machine.utilisation),
        sent=sent,
        sending=sent / machine.bandwidth,
    )


def bytes_sent(parameters: int, planned: BatchPlan, stage: int | None) -> float:
    """Bytes that each GPU sends in an update, everything in float32, by ring algorithms.

    A reduce-scatter or an all-gather of S bytes sends S (n - 1) / n, an all-reduce twice that.
    DeepSpeed reduces the gradients of stages 1 and 2 by all-reduce, not by reduce-scatter
    (``use_multi_rank_bucket_allreduce``), and keeps a model that is smaller than
    ``stage3_max_live_parameters`` gathered from its forward to its backward pass.
    """
    once = FP32.weights * parameters * (planned.processes - 1) / planned.processes
    passes = planned.accumulate
    if stage is None or stage == 0:
        return 2 * once
    if stage == 1:
        return (2 + 1) * once
    if stage == 2:
        return (2 * passes + 1) * once
    gathers = 1 if parameters <= BUCKETS.live else 2
    teacher, reduce_scatter = 1, 1
    return passes * (gathers + teacher + reduce_scatter) * once


def describe(model: Model, gpus: Sequence[int], machine: Machine) -> Iterator[str]:
    """Lines of markdown."""
    activations = model.activations
    yield (
        f"{model.parameters / 1e6:.0f} M parameters, a batch of {model.batch_size}; "
        f"{model.student:.0f} GMAC per clip for the student and {model.teacher:.0f} for the "
        f"teacher; activations of {activations.per_clip / 1e9:.2f} GB per clip and "
        f"{activations.fixed / 1e9:.2f} GB per pass."
    )
    yield ""
    yield (
        "| GPUs | | passes x videos | weights | optimizer | gradients | teacher | buffers "
        "| activations | together, GB | sent, GB | computing, s | sending, s | ratio |"
    )
    yield "|--:|:--|--:" + "|--:" * 11 + "|"
    taken = []
    for number in gpus:
        if model.batch_size % number:
            yield f"| {number} | does not divide the batch of {model.batch_size} |"
            continue
        rows = [row_of(model, number, stage, machine) for stage in STAGES]
        yield from (cells(row, machine) for row in rows)
        taken.append(recommend(rows, machine))
    yield ""
    yield from taken


def cells(row: Row, machine: Machine) -> str:
    """A line of the table."""
    device = row.memory.device
    sizes = (
        device.weights,
        device.master + device.moments,
        device.gradients,
        device.teacher,
        device.buffers,
        row.activations,
    )
    shown = " | ".join(f"{size / 1e9:.1f}" for size in sizes)
    fits = "" if row.needed <= FULL * machine.memory else " (does not fit)"
    return (
        f"| {row.plan.processes} | {name_of(row.stage)} "
        f"| {row.plan.accumulate} x {row.plan.micro_batch} | {shown} "
        f"| {row.needed / 1e9:.1f}{fits} | {row.sent / 1e9:.1f} | {row.computing:.2f} "
        f"| {row.sending:.2f} | {row.computing / row.sending:.1f} |"
    )


def recommend(rows: Sequence[Row], machine: Machine) -> str:
    """The row that takes the least time, if nothing is sent while computing, and why."""
    fitting = [row for row in rows if row.needed <= FULL * machine.memory]
    if not fitting:
        return f"- {rows[0].plan.processes} GPUs: nothing fits; offload, or take smaller clips."
    best = min(fitting, key=lambda row: (row.computing + row.sending, STAGES.index(row.stage)))
    share = best.plan.share
    few = ""
    if share <= 2:
        few = (
            f" With {share} video(s) per GPU there is nothing left to spread: more GPUs need a "
            f"larger batch, and with it another learning rate."
        )
    return (
        f"- {best.plan.processes} GPUs: {name_of(best.stage)}. It fits ({best.needed / 1e9:.0f} of "
        f"{machine.memory / 1e9:.0f} GB) and sends least; computing takes "
        f"{best.computing / best.sending:.1f} times as long as sending.{few}"
    )


if __name__ == "__main__":
    sys.exit(main())
