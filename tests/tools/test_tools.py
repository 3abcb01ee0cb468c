"""The measuring tool, at tiny sizes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.cost import cost_of_clips, count_gmac
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.progress import Progress

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = """
model:
  encoder: {{dim: {dim}, depth: {depth}, num_heads: 2}}
  decoder: {{dim: {decoder_dim}, depth: 1, num_heads: 2}}
  patch_size: [2, 8, 8]
data: {{num_frames: 4, frame_size: [{side}, {side}]}}
masking: {{ratio: 0.75, strategy: {strategy}}}
mining: {{predictor: {predictor}}}
recipe: {{epochs: 2, batch_size: 4, warmup_epochs: 0}}
engine: {{device: cpu, threads: 1}}
"""
TINY = {"dim": 32, "depth": 2, "decoder_dim": 16, "side": 16}
WIDE = {"dim": 1024, "depth": 12, "decoder_dim": 512, "side": 64}
PLAIN = {"strategy": "random", "predictor": "none"}
HPM = {"strategy": "easy_to_hard", "predictor": "relative"}


@pytest.fixture
def bench(call_tool):
    """Run ``tools/bench.py``. -> its output"""

    def start(*arguments, code=0):
        ended, output = call_tool("bench", *arguments)
        assert ended == code, output
        return output

    return start


@pytest.fixture
def write_config(tmp_path):
    def write(name, **values):
        path = tmp_path / f"{name}.yaml"
        path.write_text(CONFIG.format(**values))
        return path

    return write


def row(output, name):
    """The numbers in the line ``name``."""
    (line,) = re.findall(rf"^ *{re.escape(name)} +(\d.*)$", output, re.M)
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def assert_quotient(found, above, below):
    """``found`` has two digits, and so have the two numbers of which it is the quotient."""
    least, most = (above - 0.005) / (below + 0.005), (above + 0.005) / max(below - 0.005, 1e-9)
    assert least - 0.006 <= found <= most + 0.006


def test_updates_are_timed_in_both_precisions(bench, write_config, tmp_path):
    path, table = write_config("tiny", **TINY, **HPM), tmp_path / "table.json"
    arguments = ("--clips", 2, "--repeats", 1, "--output", table)
    output = bench("update", path, *arguments, "--against", "masking.ratio=0.5", "seed=1")
    assert "\nupdates of 2 clips, cpu with 1 thread\n" in output
    full, half = row(output, "tiny, fp32"), row(output, "tiny, bf16")
    for milliseconds, _, clips_per_second, *_ in (full, half):
        assert_quotient(clips_per_second, 2000, milliseconds)
    assert_quotient(half[1], full[0], half[0])
    assert re.search(r"^100 % MFU in bf16: .* TFLOP/s, by a product of two large", output, re.M)
    tables = json.loads(table.read_text())
    rows = tables["updates of 2 clips, cpu with 1 thread"]
    assert [line["way"] for line in rows] == [
        f"{name}, {precision}"
        for name in ("tiny", "plain", "masking.ratio=0.5")
        for precision in ("fp32", "bf16")
    ]
    assert [round(line["ms"], 2) for line in rows[:2]] == [full[0], half[0]]
    flop = [line["TFLOP/s"] / line["clips/s"] for line in rows]
    assert flop[0] == pytest.approx(flop[1])
    assert flop[2] < flop[0] < flop[4], "a plain update costs less, more visible tokens more"
    parts = {line["part"].strip(): line["ms"] for line in tables["parts of an update, tiny, fp32"]}
    assert parts["forward pass: all of it"] > parts["student"] > 0
    assert parts["teacher: all of it"] > parts["encoder"] > 0
    assert {"backward pass", "optimizer", "moving average", "ranking loss"} < parts.keys()
    kernels = tables["kernels of an update, tiny, fp32"]
    assert sum(line["share, %"] for line in kernels) == pytest.approx(100)
    assert {"matrix products", "attention"} < {line["kernels"] for line in kernels}


def test_the_cost_of_a_clip_is_that_of_the_shapes(write_config):
    """A real update of two clips multiplies and adds as often."""
    path = write_config("tiny", **TINY, **HPM)
    plain = ["masking.strategy=random", "mining.predictor=none"]
    again = "model.checkpoint_activations=true"  # recomputation does not count
    first, last = Progress(0, 0.0, 2), Progress(9, 1.5, 2)
    for overrides in ([], plain, ["mining.target=ema"]):
        config = load_config(PretrainConfig, path, overrides)
        student, teacher = count_gmac(config)
        cost = cost_of_clips(load_config(PretrainConfig, path, [*overrides, again]))
        assert cost("", last) / 2e9 == pytest.approx(student + teacher)
        update = trial_update(Pretraining(config), torch.device("cpu"), "fp32", 2)
        for progress in (first, last):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                replace(update, progress=progress)()
            assert counter.get_total_flops() / 2 == pytest.approx(cost("", progress))


def test_levers_are_compared_on_a_checkpoint(bench, finished_run, videos, tmp_path):
    data, table = videos / "validation", tmp_path / "table.json"
    options = ("--clips", 3, "--seeds", 2, "--device", "cpu", "--output", table)
    output = bench("fidelity", finished_run, data, *options)
    assert "3 clips, 2 sets of masks" in output
    (rows,) = json.loads(table.read_text()).values()
    exact, *others = rows
    assert (exact["teacher sees"], exact["decoded share"], exact["of exact"]) == ("all", 1, 1)
    assert exact["overlap"] == "1.000 +- 0.000"
    assert len(others) == 10
    for line in others:
        assert line["of exact"] == line["GMAC"] / exact["GMAC"] < 1


def test_a_checkpoint_that_picks_nothing_has_no_levers(bench, finished_run, videos, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree((finished_run / "checkpoints" / "last").resolve(), checkpoint)
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("easy_to_hard", "random"))
    error = bench("fidelity", checkpoint, videos / "validation", code=2)
    assert "masking.strategy=random, so its teacher picks nothing" in error


def test_costs_without_levers_are_refused_before_anything_is_measured(
    bench, finished_run, videos, write_config
):
    costs = write_config("ema", **TINY, **HPM)
    costs.write_text(costs.read_text().replace("mining: {", "mining: {target: ema, "))
    options = ("--costs", costs, "--device", "cpu")
    error = bench("fidelity", finished_run, videos / "validation", *options, code=2)
    assert "mining.target=ema with mining.predictor=relative" in error


def test_a_misspelt_key_is_one_line(bench):
    error = bench("update", "configs/pretrain/demo.yaml", "recipe.epoch=3", code=2)
    assert error.strip().startswith("error: ")
    assert "recipe.epoch" in error
    assert error.strip().count("\n") == 0


def test_multiply_adds_of_several_sources_are_averaged_by_their_weights(write_config):
    path = write_config("tiny", **TINY, **HPM)
    mixed = load_config(
        PretrainConfig,
        path,
        [
            "mix.images.weight=0.25",
            "mix.images.masking.ratio=0.5",
            "mix.images.data.num_frames=2",
            "mix.images.data.frame_size=[32,32]",
        ],
    )
    images = ["data.num_frames=2", "data.frame_size=[32,32]", "masking.ratio=0.5"]
    clips, of_images = (load_config(PretrainConfig, path, extra) for extra in ([], images))
    expected = [
        0.8 * of_clip + 0.2 * of_image
        for of_clip, of_image in zip(count_gmac(clips), count_gmac(of_images), strict=True)
    ]
    assert count_gmac(mixed) == pytest.approx(expected)
    assert count_gmac(of_images)[0] > 1.1 * count_gmac(clips)[0]


def test_a_teacher_that_is_the_target_is_counted_without_its_decoder(write_config):
    path = write_config("tiny", **TINY, **HPM)
    scores = count_gmac(load_config(PretrainConfig, path, []))[1]
    features = ["masking.strategy=random", "mining.predictor=none", "mining.target=ema"]
    encodes = count_gmac(load_config(PretrainConfig, path, features))[1]
    pixels = [*features[:2], "mining.target=raw"]
    assert count_gmac(load_config(PretrainConfig, path, pixels))[1] == 0
    assert 0 < encodes < scores


def test_multiply_adds_of_the_page_on_scaling_are_those_of_its_config():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    stated = re.search(r"(\d+) GMAC per clip for the student and (\d+)", page).groups()
    config = load_config(PretrainConfig, ROOT / "configs" / "pretrain" / "k400_hpm_b.yaml", [])
    assert [int(number) for number in stated] == pytest.approx(count_gmac(config), abs=0.51)


def test_multiply_adds_are_those_of_the_shapes(bench, write_config):
    paths = [write_config("plain", **WIDE, **PLAIN), write_config("hpm", **WIDE, **HPM)]
    output = bench("flops", *paths)
    tokens, visible, masked, values = 128, 32, 96, 3 * 2 * 8 * 8

    def blocks(num_tokens, dim):
        products = 3 + 1 + 4 + 4  # queries, keys and values; projection; two layers of the MLP
        return products * num_tokens * dim**2 + 2 * num_tokens**2 * dim

    embed = visible * values * 1024
    encoder = 12 * blocks(visible, 1024) + visible * 1024 * 512
    decoder = blocks(tokens, 512) + masked * 512 * values
    predictor = blocks(tokens, 512) + masked * 512
    scoring = blocks(tokens, 512) + tokens * 512

    def teacher(seen):
        return seen * (values + 512) * 1024 + 12 * blocks(seen, 1024) + scoring

    # A product costs two in the backward pass; that with the pixels one: they get no gradient.
    plain = 2 * embed + 3 * (encoder + decoder)
    assert row(output, "plain") == pytest.approx([plain / 1e9, 0], abs=0.051)
    hpm = plain + 3 * predictor
    assert row(output, "hpm") == pytest.approx([hpm / 1e9, teacher(tokens) / 1e9], abs=0.051)
    levers = ("mining.teacher_sees=checkerboard", "mining.decoded_share=0.5")
    output = bench("flops", paths[1], "--set", *levers)
    decoders = 2 * blocks(visible + masked // 2, 512) + masked // 2 * 512 * (values + 1)
    fast = 2 * embed + 3 * (encoder + decoders)
    assert row(output, "hpm") == pytest.approx([fast / 1e9, teacher(tokens // 2) / 1e9], abs=0.051)
    assert plain > 10e9
