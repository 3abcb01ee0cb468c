"""What an update costs, from the shapes: python tools/count_flops.py CONFIG ...

With --scaling: what an update of pre-training computes, keeps in memory and sends, on many GPUs and
in each stage of ZeRO. Nothing is measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hpm_video.config.batch_plan import BatchPlan, micro_batches
from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_any_config, load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.console import run
from hpm_video.runs.pretraining import Pretraining, mask_rule
from hpm_video.tokens.masking import TokenMask
from hpm_video.training.deepspeed_settings import USUAL, buckets_of
from hpm_video.training.memory import (
    ActivationBytes,
    Buckets,
    Sharding,
    StateBytes,
    simulate_update,
    training_memory,
)

ROOT = Path(__file__).parent.parent
SCALED = [ROOT / "configs" / "pretrain" / f"k400_hpm_{size}.yaml" for size in "blh"]
STAGES: tuple[int | None, ...] = (None, 0, 1, 2, 3)
SIMULATED_CLIPS = (8, 16)
BUCKETS = buckets_of(USUAL)
FULL = 0.9
"""Share of a device's memory that is planned with; the rest is for fragments and libraries."""


def main() -> int:
    """Print the costs of configs, or the tables of --scaling. -> the exit code"""
    arguments = parse_arguments()
    if not arguments.scaling:
        return run(lambda: print_costs(arguments.config, arguments.set))
    return run(lambda: write_scaling(arguments))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=Path, nargs="*", help="default of --scaling: ViT-B, L and H")
    add("--set", nargs="*", default=[], metavar="section.key=value")
    add("--scaling", action="store_true", help="plan past one machine, see docs/scaling.md")
    add = parser.add_argument_group("with --scaling, assumed of every GPU").add_argument
    add("--gpus", type=int, nargs="+", default=(8, 64, 512), help="numbers of GPUs (8 64 512)")
    add("--flops", type=float, default=300e12, help="of bfloat16 products per second (300e12)")
    add("--utilisation", type=float, default=0.3, help="share of them that is reached (0.3)")
    add("--bandwidth", type=float, default=25e9, help="bytes sent per second (25e9)")
    add("--memory", type=float, default=80e9, help="bytes (80e9)")
    add("--write", type=Path, help="a page with markers, instead of printing")
    arguments = parser.parse_args()
    if not arguments.config and not arguments.scaling:
        parser.error("name a config, such as configs/pretrain/demo.yaml, or take --scaling")
    return arguments


# --- Multiply-adds ------------------------------------------------------------------------------


def print_costs(paths: Sequence[Path], overrides: Sequence[str]) -> None:
    """Print the multiply-adds of one clip's update by each config."""
    print(f"{'config':24}{'student':>10}{'teacher':>10}   GMAC per clip and update")
    for path in paths:
        config = load_any_config(path, overrides)
        if isinstance(config, PretrainConfig):
            costs = count(config)
        else:
            costs = count_classifier(config), 0.0
        shown = [f"{cost:.1f}" if cost >= 10 or not cost else f"{cost:.2f}" for cost in costs]
        print(f"{path.stem:24}{shown[0]:>10}{shown[1]:>10}")


def count(config: PretrainConfig) -> tuple[float, float]:
    """Count GMAC of a clip: forward and backward of the student, and the teacher.

    Averaged over the sources by their weights. A model whose features are the target is not
    counted.
    """
    with torch.device("meta"):
        model = build_student(config)
        costs = [count_source(config, model, source) for source in config.sources]
    shares = [weight / sum(config.weights) for weight in config.weights]
    student, teacher = (
        sum(share * cost for share, cost in zip(shares, part, strict=True))
        for part in zip(*costs, strict=True)
    )
    return student, teacher


def count_source(
    config: PretrainConfig, model: MaskedAutoencoder, source: str
) -> tuple[float, float]:
    """Count the same for a clip of one source."""
    rule = mask_rule(config, source)
    clip = torch.empty(1, config.model.channels, *config.sources[source].clip_size)
    num_masked = rule.num_masked * rule.grid.num_tokens // rule.num_units
    mask = TokenMask.from_masked(torch.ones(1, rule.grid.num_tokens).bool(), num_masked)
    with FlopCounterMode(display=False) as student:
        prediction = model(clip, mask)
        total = prediction.content.sum()
        if prediction.difficulty is not None:
            total = total + prediction.difficulty.sum()
        total.backward()
    with FlopCounterMode(display=False) as teacher, torch.no_grad():
        if rule.strategy.picks:
            model.score_all(clip)
        elif config.mining.target == "ema":
            model.encode(clip)
    return student.get_total_flops() / 2e9, teacher.get_total_flops() / 2e9


def count_classifier(config: FinetuneConfig) -> float:
    """Count GMAC of a clip: forward and backward."""
    with torch.device("meta"):
        model = build_classifier(config, config.model.num_classes or 2)
        clips = torch.empty(2, config.model.channels, *config.data.clip_size)  # for a batch norm
        with FlopCounterMode(display=False) as counter:
            model(clips).sum().backward()
    flops: int = counter.get_total_flops()
    return flops / len(clips) / 2e9


# --- Scaling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An update on so many GPUs, in one of the stages."""

    plan: BatchPlan
    stage: int | None
    device: StateBytes
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
        return self.device.total + self.activations


def write_scaling(arguments: argparse.Namespace) -> None:
    """Print the tables of each config, or write them into a page between its markers."""
    configs = {path.stem: path for path in arguments.config or SCALED}
    if arguments.write is not None:  # before anything is worked out
        for name in ("state", *configs):
            put_into(arguments.write.read_text(encoding="utf-8"), name, "")
    for name in ("state", *configs):
        if name == "state":
            table = "\n".join(describe_state(arguments))
        else:
            table = "\n".join(describe(configs[name], arguments))
        if arguments.write is None:
            print(f"{table}\n")
        else:
            page = put_into(arguments.write.read_text(encoding="utf-8"), name, table)
            arguments.write.write_text(page, encoding="utf-8")


def put_into(page: str, name: str, table: str) -> str:
    """Return the page with a table between the markers of that name."""
    begin, end = f"<!-- scaling {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ConfigError(f"the page has no lines {begin.strip()} and {end}; add them")
    return f"{before}{begin}{table}\n{end}{after}"


def name_of(stage: int | None) -> str:
    """Name a stage as the tables do."""
    return "DDP" if stage is None else f"ZeRO {stage}"


def describe_state(machine: argparse.Namespace) -> Iterator[str]:
    """Yield a table of bytes of each parameter, and how many parameters that makes at the most."""
    yield "| | " + " | ".join(f"{number} GPUs" for number in machine.gpus) + " |"
    yield "|:--|" + "--:|" * len(machine.gpus)
    for stage in STAGES:
        shown = []
        for number in machine.gpus:
            sharding = Sharding(number, stage, buckets=Buckets(0, 0, 0))
            needed = training_memory(10**9, 10**9, sharding).device
            each = (needed.total - needed.buffers) / 1e9
            most = FULL * machine.memory / each / 1e9
            shown.append(f"{each:.1f} B, {most:.0f} x 10^9")
        yield f"| {name_of(stage)} | " + " | ".join(shown) + " |"


def describe(path: Path, machine: argparse.Namespace) -> Iterator[str]:
    """Yield lines of markdown. Nothing is allocated."""
    config = load_config(PretrainConfig, path, machine.set)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_student(config).parameters())
    cpu = torch.device("cpu")
    simulated = {
        clips: simulate_update(partial(trial_update, Pretraining(config), cpu, "bf16", clips))
        for clips in SIMULATED_CLIPS
    }
    activations = ActivationBytes.through(simulated)
    student, teacher = count(config)
    yield (
        f"{parameters / 1e6:.0f} M parameters, a batch of {config.recipe.batch_size}; "
        f"{student:.0f} GMAC per clip for the student and {teacher:.0f} for the "
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
    for number in machine.gpus:
        if config.recipe.batch_size % number:
            yield f"| {number} | does not divide the batch of {config.recipe.batch_size} |"
            continue
        flops = 2e9 * (student + teacher) * config.recipe.batch_size / number * config.data.repeats
        rows = [
            row_of(config, parameters, activations, sharding, machine, flops)
            for sharding in (Sharding(number, stage, buckets=BUCKETS) for stage in STAGES)
        ]
        yield from (line_of(row, FULL * machine.memory) for row in rows)
        taken.append(recommend(rows, machine.memory))
    yield ""
    yield from taken


def row_of(
    config: PretrainConfig,
    parameters: int,
    activations: ActivationBytes,
    sharding: Sharding,
    machine: argparse.Namespace,
    flops: float,
) -> Row:
    """Plan the update with the largest micro-batch that fits, the smallest where none does."""
    device = training_memory(parameters, parameters, sharding).device
    free = FULL * machine.memory - device.total
    possible = micro_batches(config.recipe.batch_size, sharding.processes)
    fitting = [n for n in possible if activations.of(n * config.data.repeats) <= free]
    largest = max(fitting, default=possible[0])
    plan = BatchPlan(config.recipe.batch_size, sharding.processes, largest)
    sent = bytes_sent(parameters, plan, sharding.zero_stage)
    return Row(
        plan,
        sharding.zero_stage,
        device,
        activations.of(largest * config.data.repeats),
        computing=flops / (machine.flops * machine.utilisation),
        sent=sent,
        sending=sent / machine.bandwidth,
    )


def bytes_sent(parameters: int, plan: BatchPlan, stage: int | None) -> float:
    """Count what each GPU sends in an update, everything in float32, by ring algorithms.

    A reduce-scatter or an all-gather of S bytes sends S (n - 1) / n, an all-reduce twice that.
    DeepSpeed reduces the gradients of stages 1 and 2 by all-reduce, not by reduce-scatter
    (``use_multi_rank_bucket_allreduce``), and keeps a model that is smaller than
    ``stage3_max_live_parameters`` gathered from its forward to its backward pass.
    """
    once = 4 * parameters * (plan.processes - 1) / plan.processes
    passes = plan.accumulate
    gathers = 1 if parameters <= BUCKETS.live else 2
    teacher, reduce_scatter = 1, 1
    times = {1: 2 + 1, 2: 2 * passes + 1, 3: passes * (gathers + teacher + reduce_scatter)}
    return times.get(stage or 0, 2) * once


def line_of(row: Row, free: float) -> str:
    """Write a line of the table."""
    device = row.device
    optimizer = device.master + device.moments
    sizes = (device.weights, optimizer, device.gradients, device.teacher, device.buffers)
    shown = " | ".join(f"{size / 1e9:.1f}" for size in (*sizes, row.activations))
    fits = "" if row.needed <= free else " (does not fit)"
    return (
        f"| {row.plan.processes} | {name_of(row.stage)} "
        f"| {row.plan.accumulate} x {row.plan.micro_batch} | {shown} "
        f"| {row.needed / 1e9:.1f}{fits} | {row.sent / 1e9:.1f} | {row.computing:.2f} "
        f"| {row.sending:.2f} | {row.computing / row.sending:.1f} |"
    )


def recommend(rows: Sequence[Row], memory: float) -> str:
    """Take the row with the least time, if nothing is sent while computing, and say why."""
    fitting = [row for row in rows if row.needed <= FULL * memory]
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
        f"{memory / 1e9:.0f} GB) and sends least; computing takes "
        f"{best.computing / best.sending:.1f} times as long as sending.{few}"
    )


if __name__ == "__main__":
    sys.exit(main())
