"""The commands of bench.py that measure updates: update, gpu, losses and flops."""

import argparse
import gc
import re
import shlex
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import softplus
from torch.profiler import profile

from hpm_video.config.loading import find_config, load_any_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.config.training import CompileMode
from hpm_video.files.wording import counted
from hpm_video.mining import objective as mining
from hpm_video.mining.losses import ranking_loss
from hpm_video.runs.autotune import TIMED_CLIPS, Trial, last_epoch, trial_update
from hpm_video.runs.console import add_config, add_options, positive
from hpm_video.runs.cost import cost_of_clips, count_gmac
from hpm_video.runs.finetuning import Finetuning, resolve
from hpm_video.runs.pretraining import Pretraining
from hpm_video.runs.task import Task
from hpm_video.training.device import (
    AUTOCAST,
    Precision,
    choose_device,
    peak_flops,
    time_updates,
    wait_for,
)
from hpm_video.training.fast import choose_compiling
from hpm_video.training.memory import measure_update

Rows = list[dict[str, Any]]
Name = TypeVar("Name")
TURNS = 3
KERNELS = {  # patterns of their names; the first kind that matches counts
    "attention": "attention|fmha|flash|sdp",
    "matrix products": "gemm|nvjet|cutlass|xmma|mm$|mkl|linear",
    "fused by the compiler": "triton|cpp_fused",
    "norms, GELU and softmax": "norm|gelu|softmax",
    "copies and casts": "copy|memcpy|memset|cat",
    "everything else": "",
}
PLAIN = ("mining.predictor=none", "masking.strategy=random")


def update_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``update``."""
    add = parser.add_argument
    add_config(parser, "a file of configs/")
    add("--clips", type=positive, default=TIMED_CLIPS, help=f"per update (default {TIMED_CLIPS})")
    add("--repeats", type=positive, default=5, help="timed updates per turn (default 5)")
    words = "'section.key=value ...' or 'CONFIG section.key=value ...'"
    against = f"also time the config with other values, or another config: {words}"
    add("--against", action="append", default=[], metavar="WORDS", help=against)
    for name, known in (("--precision", [*AUTOCAST]), ("--compile", get_args(CompileMode))):
        add(name, action="append", choices=known, help="what to time; may be repeated")


def bench_update(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """Time whole updates by a config, and the parts of an update: bench.py update CONFIG ...

    An update is the student's forward and backward pass, the optimizer step and the teacher, on
    random pixels; no video is decoded. It belongs to the last epoch, in which the teacher scores if
    it ever does. Alternatives take turns, and medians are shown: ratios carry over to other
    machines, times do not. By default updates are timed in bf16 on a GPU, eager and compiled, and
    elsewhere eager in fp32 and bf16. A config with a teacher is compared with a plain masked
    autoencoder of the same shape; --against adds others.
    """
    tasks = tasks_to_compare(arguments)
    task, clips = next(iter(tasks.values())), arguments.clips
    how = task.config.engine
    device = choose_device(how.device)
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    is_gpu = device.type == "cuda"
    precisions = arguments.precision or (["bf16"] if is_gpu else [*AUTOCAST])
    modes = arguments.compile or (["off", "blocks"] if is_gpu else ["off"])
    modes = [mode for mode in modes if choose_compiling(replace(how, compile=mode), device) == mode]
    ways = {
        f"{name}, {precision}{'' if mode == 'off' else f', compiled ({mode})'}": Updates(
            tasks[name], device, precision, clips, mode
        )
        for name, precision, mode in product(tasks, precisions, modes)
    }
    measured = {name: partial(way.measure, arguments.repeats) for name, way in ways.items()}
    medians = medians_of_turns(measured, TURNS)
    where = torch.cuda.get_device_name(device) if is_gpu else device.type
    threads = "" if is_gpu else f" with {counted(torch.get_num_threads(), 'thread')}"
    yield f"updates of {counted(clips, 'clip')}, {where}{threads}", rows_of(ways, medians)
    for name, way in ways.items():
        if way.task is task:
            yield f"parts of an update, {name}", way.parts(arguments.repeats)
            yield f"kernels of an update, {name}", way.kernels()


def tasks_to_compare(arguments: argparse.Namespace) -> dict[str, Task]:
    """Open the tasks to compare, by name: the config, its plain counterpart, each --against."""
    name, given = arguments.config.stem, [str(arguments.config), *arguments.overrides]
    tasks = {name: open_task(given)}
    if tasks[name].ema == "teacher":
        tasks["plain"] = open_task([*given, *PLAIN])
    for words in map(shlex.split, arguments.against):
        is_config = words[:1] and "=" not in words[0]
        tasks[" ".join(words)] = open_task(words if is_config else [*given, *words])
    return tasks


def open_task(words: Sequence[str]) -> Task:
    """Open a config with overrides as a task that can train on random pixels."""
    config = load_any_config(Path(words[0]), words[1:])
    if isinstance(config, PretrainConfig):
        return Pretraining(config)
    return Finetuning(resolve(config, config.model.num_classes or 2))


def medians_of_turns(ways: Mapping[Name, Callable[[], float]], turns: int) -> dict[Name, float]:
    """Measure all ways in turns, so that what else the machine does meets all of them alike."""
    found = [{name: measure_once() for name, measure_once in ways.items()} for _ in range(turns)]
    return {name: statistics.median(turn[name] for turn in found) for name in ways}


def rows_of(ways: "dict[str, Updates]", medians: dict[str, float]) -> Rows:
    """Make a row for each way: its time, how many times as fast as the first it is, and speeds."""
    kinds = {way.precision: way.device for way in ways.values()}
    peaks = {precision: peak_flops(device, precision) for precision, device in kinds.items()}
    for precision, (peak, source) in peaks.items():
        print(f"100 % MFU in {precision}: {peak / 1e12:.3g} TFLOP/s, by {source}")
    rows: Rows = []
    for name, way in ways.items():
        per_second = way.clips / medians[name]
        flops = per_second * cost_of_clips(way.task.config)("", last_epoch(way.task))
        faster = next(iter(medians.values())) / medians[name]
        row = {"way": name, "ms": 1000 * medians[name], "times as fast": faster}
        row |= {"clips/s": per_second, "TFLOP/s": flops / 1e12}
        row["MFU, %"] = 100 * flops / peaks[way.precision][0]
        if way.memory:
            row["peak memory, GB"] = way.memory
        rows.append(row)
    return rows


@dataclass
class Updates:
    """Updates by a config, computed in one way."""

    task: Task
    device: torch.device
    precision: Precision
    clips: int
    compiled: CompileMode
    memory = 0.0
    """Peak memory of tensors in GB of 10^9 bytes; known only on a GPU."""

    def make(self) -> Trial:
        """Make a trial update."""
        return trial_update(
            self.task, self.device, self.precision, self.clips, compiled=self.compiled
        )

    def measure(self, repeats: int) -> float:
        """Return the median seconds of an update."""
        is_gpu = self.device.type == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        update = self.make()
        seconds = time_updates(update, self.device, warmup=2, repeats=repeats)
        if is_gpu:
            self.memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        del update
        gc.collect()  # an optimizer refers to itself and holds the model: keep one at a time
        return seconds

    def parts(self, repeats: int) -> Rows:
        """Time each part of an update by itself, and wait for the device between parts."""
        trial, seconds = self.make(), defaultdict[str, list[float]](list)
        engine, objective = trial.engine, trial.objective

        def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
            spent = seconds[part]  # in the order of the calls of this function

            def run(*inputs: Any, **options: Any) -> Any:
                wait_for(self.device)
                began = time.perf_counter()
                result = call(*inputs, **options)
                wait_for(self.device)
                spent.append(time.perf_counter() - began)
                return result

            return run

        with ExitStack() as stack:
            for owner, name, part in (
                (objective, "losses", "forward pass: all of it"),
                (objective, "normalised", "normalisation"),
                (objective, "run_teacher", "teacher: all of it"),
                (getattr(objective, "ema", None), "encode", "encoder"),
                (objective, "errors", "targets and errors"),
                (mining, "ranking_loss", "ranking loss"),
                (engine.model, "forward", "student"),
                (engine, "backward", "backward pass"),
                (engine, "step", "optimizer"),
                (objective, "after_update", "moving average"),
            ):
                if hasattr(owner, name):
                    new = timed(part, getattr(owner, name))
                    stack.enter_context(patch.object(owner, name, new))
            for _ in range(1 + repeats):
                trial()
        medians = {part: statistics.median(each[1:]) for part, each in seconds.items() if each}
        return [{"part": part, "ms": 1000 * median} for part, median in medians.items()]

    def kernels(self) -> Rows:
        """Sum up the time of the kernels of an update by kind."""
        trial, is_gpu = self.make(), self.device.type == "cuda"
        for _ in range(2):
            trial()
        wait_for(self.device)
        with profile(acc_events=True) as profiler:
            trial()
            wait_for(self.device)
        spent = Counter[str]()
        for event in profiler.key_averages():
            if event.device_type == (DeviceType.CUDA if is_gpu else DeviceType.CPU):
                key = event.key.lower()
                kind = next(kind for kind, names in KERNELS.items() if re.search(names, key))
                own = event.self_device_time_total if is_gpu else event.self_cpu_time_total
                spent[kind] += own / 1000
        return [
            {"kernels": kind, "ms": ms, "share, %": 100 * ms / spent.total()}
            for kind, ms in spent.most_common()
        ]


def gpu_options(parser: argparse.ArgumentParser) -> None:
    """Set what ``update`` can be told."""
    parser.set_defaults(overrides=[], against=[], precision=None, compile=None, repeats=5)


def bench_gpu(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """Measure the updates in docs/speed.md on a GPU, in about five minutes: bench.py gpu.

    That is `bench.py update` for ViT-B and ViT-L on video, and for ViT-B on images.
    """
    for name, clips in {"k400_hpm_b": 64, "k400_hpm_l": 32, "in1k_hpm_b": 256}.items():
        arguments.config, arguments.clips = find_config(name), clips
        for title, rows in bench_update(arguments):
            yield f"{name}: {title}", rows


def losses_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``losses``."""
    add = parser.add_argument
    add("--clips", type=positive, default=32, help="clips per call (default 32)")
    add("--tokens", type=positive, default=1412, help="hidden tokens per clip (default 1412)")
    add("--repeats", type=positive, default=6, help="timed calls of each (default 6)")
    add_options(parser, "device")


def bench_losses(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """Measure time and memory of the ranking loss, forward and backward: bench.py losses.

    The package computes it in blocks of rows of token pairs; the plain form, as the loss is
    defined, holds tensors of B x M x M. They take turns, and medians are shown. Memory is the peak
    of the tensors that exist at the same time.
    """
    forms = {"plain": plain_ranking_loss, "blockwise": ranking_loss}
    device, size = choose_device(arguments.device), (arguments.clips, arguments.tokens)
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(size, generator=draw).to(device).requires_grad_()
    errors = torch.rand(size, generator=draw).to(device)

    def step(name: str) -> float:
        scores.grad = None
        value = forms[name](scores, errors)
        torch.autograd.backward(value)
        return float(value.detach())  # waits for the device

    def row_of(name: str) -> dict[str, Any]:
        memory = measure_update(lambda: partial(step, name)).activations / 1e6
        ms = 1000 * medians[name]
        return {"form": name, "ms": ms, "peak memory, MB": memory, "loss": step(name)}

    ways = {
        name: partial(time_updates, partial(step, name), device, warmup=1, repeats=1)
        for name in forms
    }
    medians = medians_of_turns(ways, arguments.repeats)
    rows = [row_of(name) for name in forms]
    yield f"ranking loss of {size[0]} clips x {size[1]} tokens, {device.type}", rows


def plain_ranking_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """Compute the same loss as it is defined: (B, M), (B, M) -> ()

    -log sigmoid(s_i - s_j), which is softplus(s_j - s_i), averaged over ordered pairs e_i > e_j.
    """
    counted = errors[:, :, None] > errors[:, None, :]
    wrong_by = scores[:, None, :] - scores[:, :, None]
    return (softplus(wrong_by) * counted).sum() / counted.sum().clamp(min=1)


def flops_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flops``."""
    add = parser.add_argument
    add("config", type=Path, nargs="+", metavar="CONFIG", help="a config or several")
    changes = "overrides for all configs, such as data.num_frames=8"
    add("--set", nargs="+", default=[], metavar="section.key=value", help=changes)


def bench_flops(arguments: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """Count the multiply-adds of one clip's update from the shapes: bench.py flops CONFIG ...

    Forward and backward pass of the student, and the teacher, in an epoch in which it scores.
    """
    rows: Rows = []
    for path in arguments.config:
        student, teacher = count_gmac(load_any_config(path, arguments.set))
        rows.append({"config": path.stem, "student": student, "teacher": teacher})
    yield "GMAC per clip and update", rows
