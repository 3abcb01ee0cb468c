"""Runs that the first house began go on, and compute what it computed.

The stored numbers are in float32 from a CPU with one thread. Losses, gradients and one step use a
stored batch, so that only rounding may differ. Later updates decode the videos again, where
another decoder may give other pixels; for images there is no such excuse.
"""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.runs import run as experiment
from hpm_video.runs.finetuning import Finetuning, finetune
from hpm_video.runs.pretraining import Pretraining, pretrain

pytestmark = pytest.mark.slow

PROGRAMS = {"pretrain": (PretrainConfig, pretrain), "finetune": (FinetuneConfig, finetune)}
RUNS = {"video": "pretrain", "images": "pretrain", "zero3": "pretrain", "classes": "finetune"}
STOPPED, UPDATES = 20, 40
PLAIN = ("engine.name=torch", "engine.zero_stage=null", "engine.deepspeed=null")
ROUNDING = 1e-5
"""Relative to a tensor's norm. Sums of n float32 values in another order differ by about
sqrt(n) 6e-8 of their terms' norm. A backward pass is a chain of a few such sums with at most 1e4
terms: 6e-6 each if terms hardly cancel."""
FLOOR = 1e-7
"""Relative to the norm of all gradients, for tensors whose terms cancel."""
STANDARDISED = 20
"""An absolute loss predictor learns standardised errors, whose rounding is multiplied by mean /
standard deviation. Processors that round otherwise gave up to 4e-5 of a gradient."""
LATER = 1e-4
"""Relative to a loss, 20 updates later; another order of sums alone changes it by 1e-5."""
NO_TRUE_GRADIENT = (
    "k_bias",
    "difficulty_decoder.head.bias",
    "difficulty_decoder.transformer.norm.bias",
)
"""Softmax and ranking ignore them. Their gradients are rounding errors, which Adam scales up to a
step of at most the learning rate."""
TIMES = {"kind", "clips_per_second", "data_wait"}
FEW = 10
"""Updates under ZeRO 3: each of them gathers every parameter, so errors show at once."""
A_FEW_UPDATES = """
import os, sys
sys.path.insert(0, os.path.abspath("tools"))
os.chdir({folder!r})
import pretrain
from hpm_video.training.run import Run

def after_update(self, progress, settings, original=Run.after_update):
    original(self, progress, settings)
    if progress.update + 1 == {end}:
        sys.exit()

Run.after_update = after_update
sys.exit(pretrain.main(["runs/zero3/config.yaml"]))
"""


class MeasuredError(Exception):
    """Raised to end a run after the measured update."""


def measure(run, batch_of=lambda batch: batch):
    """Go on for one update with a run in the working directory.

    ``batch_of`` may replace its next batch. -> the original batch, the learning rate, the losses,
    and the tensors ``gradient.NAME``, ``stepped.NAME`` and ``average.NAME`` of every parameter
    """
    found = []

    def one_update(engine, objective, batches, schedule, run, *, start):
        progress = run.timeline.at(start)
        lr = schedule.at(progress)
        for group in engine.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batch = next(batches)
        losses = objective.losses(engine, batch_of(batch), progress)
        engine.backward(losses.total)
        gradients = {name: p.grad.clone() for name, p in engine.model.named_parameters()}
        engine.step()
        objective.after_update(engine.model, progress)
        (average,) = objective.auxiliary_modules.values()
        values = {name: value.item() for name, value in losses.parts.items()}
        values |= {"total": losses.total.item(), "gradient_norm": engine.gradient_norm.item()}
        parts = {
            "gradient": gradients,
            "stepped": dict(engine.model.named_parameters()),
            "average": dict(average.named_parameters()),
        }
        found.extend([batch, lr, values, parts])
        raise MeasuredError

    schema, program = PROGRAMS[RUNS[run]]
    config = load_config(schema, Path("runs", run, "config.yaml"), PLAIN)
    with mock.patch.object(experiment, "fit", one_update), pytest.raises(MeasuredError):
        program(config)
    return found


def later_losses(folder):
    """Everything that ``metrics.jsonl`` says about the later updates, except their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in rows
        if row["kind"] == "train" and row["update"] > STOPPED
    ]


def assert_same_later(run, end=UPDATES):
    found = later_losses(Path("runs", run))
    expected = json.loads(Path("numbers", f"{run}.json").read_text())["later"]
    assert [row["update"] for row in expected] == [*range(STOPPED + 1, UPDATES + 1)]
    expected = expected[: end - STOPPED]
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=LATER), f"update {before['update']}"


@pytest.mark.parametrize("run", RUNS)
def test_an_update_is_that_of_the_first_house(run, first_house, first_names):
    stored = load_file(Path("numbers", f"{run}.safetensors"))
    numbers = json.loads(Path("numbers", f"{run}.json").read_text())
    clips = stored.pop("clips")
    batch, lr, losses, parts = measure(run, lambda batch: replace(batch, clips=clips))

    # The batch is the same: files, crops and keys. Pixels may differ: decoders round differently.
    assert [Path(file).name for file in batch.files] == numbers["files"]
    assert batch.keys.tolist() == numbers["keys"]
    assert (batch.clips.float() - clips.float()).abs().mean() < (
        0 if run == "images" else 0.5
    ) + 1e-9

    assert lr == pytest.approx(numbers["lr"], rel=1e-12)
    assert losses == pytest.approx(numbers["losses"], rel=ROUNDING)
    key_biases = any(name.endswith("k_bias") for name in stored)
    found = {
        f"{part}.{name}": value.detach()
        for part, values in parts.items()
        for name, value in first_names(values, key_biases=key_biases).items()
    }
    assert found.keys() == stored.keys()
    for name, value in found.items():
        allowed = ROUNDING * stored[name].norm()
        if run == "zero3" and "difficulty_decoder" in name:
            allowed *= STANDARDISED
        if name.startswith("gradient"):
            allowed += FLOOR * numbers["losses"]["gradient_norm"]
        elif name.endswith(NO_TRUE_GRADIENT):
            allowed += lr * np.sqrt(value.numel())
        assert (value - stored[name]).norm() <= allowed, name


def test_runs_start_from_the_weights_of_the_first_house(first_house, first_names):
    """As student and teacher, and as the encoder of a classifier."""
    checkpoint = Path("runs/video/checkpoints/last")
    began_with = [f"init_weights={checkpoint}"]
    started = {}
    for task in (
        Pretraining(load_config(PretrainConfig, Path("runs/video/config.yaml"), began_with)),
        Finetuning(load_config(FinetuneConfig, Path("runs/classes/config.yaml"), began_with)),
    ):
        task.resolve()
        model = task.model()
        started[task.ema] = task.initialise(model), dict(model.named_parameters())
    teacher, student = started["teacher"]
    _, classifier = started["average"]
    student, teacher, classifier = (
        first_names(weights, key_biases=False) for weights in (student, teacher, classifier)
    )
    for found, file in (student, "model"), (teacher, "teacher"):
        stored = load_file(checkpoint / f"{file}.safetensors")
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], value) for name, value in stored.items())
    encoder = [name for name in classifier if not name.startswith(("pooling.", "head."))]
    assert len(encoder) > 10
    assert all(torch.equal(classifier[name], student[name]) for name in encoder)


@pytest.mark.parametrize("run", RUNS)
def test_the_run_goes_on(run, first_house):
    schema, program = PROGRAMS[RUNS[run]]
    program(load_config(schema, Path("runs", run, "config.yaml"), PLAIN))
    assert_same_later(run)


def test_the_run_of_two_processes_under_zero_3_goes_on(first_house, start_job):
    pytest.importorskip("deepspeed")
    code = A_FEW_UPDATES.format(folder=str(first_house), end=STOPPED + FEW)
    programs = start_job(2, "-c", code)
    outputs = [program.communicate()[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], outputs
    assert_same_later("zero3", STOPPED + FEW)
