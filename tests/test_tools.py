"""The measuring tools, started as a user starts them, at tiny sizes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = """
model:
  encoder: {dim: 32, depth: 2, num_heads: 2}
  decoder: {dim: 16, depth: 1, num_heads: 2}
  patch_size: [2, 8, 8]
data: {num_frames: 4, frame_size: [16, 16]}
masking: {ratio: 0.75, strategy: random}
mining: {predictor: none}
recipe: {epochs: 2, batch_size: 4, warmup_epochs: 0}
engine: {device: cpu, threads: 1}
"""
TOKENS, VISIBLE, MASKED, VALUES = 8, 2, 6, 3 * 2 * 8 * 8
HPM = ("masking.strategy=easy_to_hard", "mining.predictor=relative")


@pytest.fixture(scope="session")
def tool(tmp_path_factory):
    """Start ``tools/NAME.py``. -> its output"""
    place = tmp_path_factory.mktemp("import")  # the package, and not the folder `datasets`
    (place / "hpm_video").symlink_to(ROOT / "hpm_video")

    def start(name, *arguments, code=0):
        process = subprocess.run(
            [sys.executable, f"tools/{name}.py", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert process.returncode == code, process.stderr
        return process.stderr if code else process.stdout

    return start


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


def row(output, name):
    """The numbers of the line that begins with ``name``."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"{name} ")]
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def block(tokens, dim):
    """Multiply-adds of a transformer block: qkv, scores and values, projection, MLP."""
    return tokens * dim * dim * (3 + 1 + 4 + 4) + 2 * tokens * tokens * dim


def test_ranking_loss_blockwise_is_the_same_and_takes_less_memory(tool):
    sizes = ("--clips", 8, "--tokens", 600, "--turns", 1, "--repeats", 1, "--device", "cpu")
    output = tool("bench_ranking_loss", *sizes, "--threads", 1)
    plain, blockwise, ratio = (row(output, name) for name in ("plain", "blockwise", "ratio"))
    assert plain[2] == pytest.approx(blockwise[2], rel=1e-5)
    tensor = 8 * 600 * 600 * 4 / 1e6  # B x M x M in float32, of which the plain form holds some
    assert plain[1] > 2 * tensor
    assert blockwise[1] < 2 * tensor
    assert ratio[1] > 2
    assert ratio[1] == pytest.approx(plain[1] / blockwise[1], rel=0.05)
    assert ratio[0] == pytest.approx(plain[0] / blockwise[0], rel=0.05, abs=0.1)


def test_ranking_loss_says_what_it_cannot_measure(tool):
    message = tool("bench_ranking_loss", "--clips", 0, code=2)
    assert message == "error: --clips, --turns and --repeats must be at least 1, --tokens 2\n"


def test_updates_are_timed_in_both_precisions(tool, tiny):
    output = tool("bench_update", tiny, *HPM, "--clips", 2, "--repeats", 1)
    assert output.startswith("updates of 2 clip(s), cpu with 1 thread(s)")
    full, half = row(output, "fp32"), row(output, "bf16")
    for clips_per_second, milliseconds in (full, half):
        assert clips_per_second == pytest.approx(2 / (milliseconds / 1e3), rel=0.1)
    (ratio,) = row(output, "bf16 / fp32")
    assert ratio == pytest.approx(half[0] / full[0], rel=0.05, abs=0.02)
    assert re.search(r"^largest size of this process: \d+\.\d\d GB$", output, re.M)
    assert re.search(r"^engine.precision=auto takes (fp32|bf16) here: ", output, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.yaml"], "there is no config file configs/none.yaml"),
        (["configs/pretrain/demo.yaml", "recipe.epoch=3"], "'epoch' not in 'RecipeConfig'"),
        (["configs/pretrain/demo.yaml", "--clips", "0"], "--clips and --repeats must be"),
    ],
)
def test_mistaken_argument_is_one_line(tool, arguments, message):
    error = tool("bench_update", *arguments, code=2)
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_count_of_multiply_adds_is_that_of_the_shapes(tool, tiny):
    """At a size where the table shows enough digits: 1000 times as many values in a patch."""
    side = 1600
    override = f"data.frame_size=[{2 * side},{2 * side}]"
    patch = f"model.patch_size=[2,{side},{side}]"
    values = 3 * 2 * side * side
    embed = VISIBLE * values * 32
    head = MASKED * values * 16
    encoder = 2 * block(VISIBLE, 32) + VISIBLE * 32 * 16
    decoder = block(TOKENS, 16)
    # Backward, each product costs two of its size; but pixels need no gradient.
    expected = (2 * embed + 3 * (encoder + decoder + head)) / 1e9
    output = tool("count_flops", tiny, "--set", override, patch)
    assert row(output, "tiny") == pytest.approx([expected, 0.0], abs=0.06)
    assert expected > 10


def test_count_with_a_predictor_and_a_teacher(tool, tiny):
    wide = ("model.encoder.dim=1024", "model.decoder.dim=512", "model.encoder.depth=12")
    clip = ("data.frame_size=[64,64]",)
    plain, without_teacher = row(tool("count_flops", tiny, "--set", *wide, *clip), "tiny")
    student, teacher = row(tool("count_flops", tiny, "--set", *wide, *clip, *HPM), "tiny")
    tokens = 2 * 8 * 8
    predictor = block(tokens, 512) + tokens * 3 // 4 * 512
    assert without_teacher == 0
    assert student - plain == pytest.approx(3 * predictor / 1e9, abs=0.11)
    scores = tokens * (VALUES * 1024 + 1024 * 512 + 512) + 12 * block(tokens, 1024)
    assert teacher == pytest.approx((scores + block(tokens, 512)) / 1e9, abs=0.06)
