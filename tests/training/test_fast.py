"""Compiled code: what is compiled, that it computes the same, and that nothing depends on it."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import TRACED
from torch.utils._python_dispatch import TorchDispatchMode

from hpm_video.config.choices import TransformerSize
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.config.training import EngineConfig
from hpm_video.models.vit import Block
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training import fast
from hpm_video.training.fast import as_written, choose_compiling
from hpm_video.training.memory import simulate_update

pytestmark = pytest.mark.filterwarnings("default")  # torch itself warns while it traces
DEMO = Path(__file__).parents[2] / "configs" / "pretrain" / "demo.yaml"
CPU = torch.device("cpu")
SMALL = (
    "model.encoder={dim: 32, depth: 2, num_heads: 2}",
    "model.decoder={dim: 16, depth: 1, num_heads: 2}",
    "model.drop_path=0.2",
)


def trial(*overrides, clips=2, precision="fp32", compiled="off"):
    torch.manual_seed(0)
    config = load_config(PretrainConfig, DEMO, [*SMALL, *overrides])
    return trial_update(Pretraining(config), CPU, precision, clips, compiled=compiled)


def losses_and_gradients(update):
    with update.engine.autocast():
        losses = update.objective.losses(update.engine, update.batch, update.progress)
    update.engine.backward(losses.total)
    named = update.engine.model.named_parameters()
    return losses, {name: value.grad for name, value in named if value.grad is not None}


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def traced(monkeypatch):
    """Models are traced as if they were to be compiled, but run on torch's own kernels."""
    monkeypatch.setattr(fast, "HOW", TRACED)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("device", "how", "expected"),
    [
        ("cpu", {}, "off"),
        ("mps", {}, "off"),
        ("cuda", {}, "blocks"),
        ("cuda", {"compile": "model"}, "model"),
        ("cuda", {"compile": "off"}, "off"),
        ("cpu", {"compile": "blocks"}, "blocks"),
        *(("cuda", {"name": "deepspeed", "zero_stage": n}, "blocks") for n in (0, 1, 2)),
        ("cuda", {"name": "deepspeed", "zero_stage": 3}, "off"),
    ],
)
def test_blocks_are_compiled_on_a_gpu_unless_weights_are_sharded(
    monkeypatch, device, how, expected
):
    monkeypatch.setattr(fast, "_compile_something", lambda device: None)
    assert choose_compiling(EngineConfig(**how), torch.device(device)) == expected


def test_sharded_weights_are_not_compiled():
    with pytest.raises(ValueError, match="engine.compile=model .* take engine.compile=auto"):
        EngineConfig(name="deepspeed", zero_stage=3, compile="model")


def test_the_word_off_is_no_boolean(tmp_path):
    """YAML reads a bare ``off`` as a boolean."""
    path = tmp_path / "config.yaml"
    path.write_text("engine: {compile: off}\n")
    assert load_config(PretrainConfig, path, []).engine.compile == "off"
    assert load_config(PretrainConfig, DEMO, ["engine.compile=off"]).engine.compile == "off"
    with pytest.raises(ValueError, match="compile"):
        load_config(PretrainConfig, DEMO, ["engine.compile=yes"])


def test_without_a_compiler_a_run_goes_on_and_says_so_once(monkeypatch, caplog):
    def fail(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(fast, "_compile_something", fail)
    assert choose_compiling(EngineConfig(compile="blocks"), CPU) == "off"
    (record,) = caplog.records
    assert "no working compiler here (Failed to find C compiler.)" in record.getMessage()


EMA = ("mining.target=ema", "mining.predictor=absolute")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "precision", "overrides"),
    [
        ("blocks", "fp32", ("model.checkpoint_activations=true",)),
        ("blocks", "bf16", ()),
        ("model", "fp32", EMA),
        ("model", "bf16", ("model.checkpoint_activations=true",)),
    ],
)
def test_what_is_traced_computes_the_same(traced, mode, precision, overrides):
    plain = losses_and_gradients(trial(*overrides, precision=precision))
    assert graphs() == 0
    compiled = losses_and_gradients(trial(*overrides, precision=precision, compiled=mode))
    assert graphs() > 0
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-6)
    assert compiled[1].keys() == plain[1].keys()
    tolerance = 2**-7 if precision == "bf16" else 1e-5
    for name, gradient in plain[1].items():
        error = (compiled[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < tolerance or gradient.norm() < 1e-5, name


@pytest.mark.parametrize(
    ("precision", "residual", "expected"),
    [
        ("bf16", "bf16", torch.bfloat16),
        ("bf16", "fp32", torch.float32),
        ("fp32", "fp32", torch.float32),
    ],
)
def test_what_flows_between_blocks_has_the_precision_of_the_config(precision, residual, expected):
    overrides = ["engine.precision=auto", f"engine.residual={residual}"]
    update, seen = trial(*overrides, precision=precision), []
    for model in (update.engine.model, update.objective.ema):
        for module in model.modules():
            if isinstance(module, Block):
                module.register_forward_hook(lambda _, inputs, out: seen.extend((*inputs, out)))
    losses, gradients = losses_and_gradients(update)
    assert {tensor.dtype for tensor in seen if tensor is not None and tensor.ndim == 3} == {
        expected
    }
    assert {losses.total.dtype, *(grad.dtype for grad in gradients.values())} == {torch.float32}
    full = losses_and_gradients(trial())[0].total
    assert losses.total.item() == pytest.approx(full.item(), rel=0.01)


def test_a_bf16_residual_stream_needs_mixed_precision():
    with pytest.raises(ValueError, match="engine.residual=bf16 needs engine.precision"):
        EngineConfig(precision="fp32", residual="bf16")


@pytest.mark.slow
def test_blocks_that_are_alike_are_traced_once(traced):
    update = trial(compiled="blocks")
    update()
    first = graphs()
    # Student: encoder, two decoders; teacher: encoder, decoder; pixels; targets and errors.
    assert first == 6
    for _ in range(2):
        update()
    assert graphs() == first
    trial(compiled="blocks")()
    assert graphs() == first, "other models of the same shape"


@pytest.mark.slow
def test_another_shape_is_traced_apart_and_seldom_ones_not_at_all(traced):
    update = trial(compiled="blocks")
    update()
    first = graphs()
    other = trial(clips=3)
    with as_written("blocks"):
        update.objective.losses(update.engine, other.batch, other.progress)
    assert graphs() == first
    update.objective.losses(update.engine, other.batch, other.progress)
    assert graphs() > first
    again = graphs()
    update()
    assert graphs() == again


def test_checkpoints_know_nothing_of_it_and_copies_are_not_compiled():
    plain, compiled = (trial(compiled=mode).engine.model for mode in ("off", "blocks"))
    assert [*compiled.state_dict()] == [*plain.state_dict()]
    assert compiled.blocks[0]._compiled_call_impl is not None
    assert copy.deepcopy(compiled).blocks[0]._compiled_call_impl is None


@pytest.mark.slow
def test_a_simulation_sees_no_compiled_module(traced):
    """Whatever the config says: calling one without data would crash the process."""
    sizes = [
        simulate_update(lambda mode=mode: trial(f"engine.compile={mode}"))
        for mode in ("off", "blocks")
    ]
    assert sizes[0] == sizes[1]
    assert graphs() == 0


class Casts(TorchDispatchMode):
    """Records which tensors are cast to bfloat16."""

    def __init__(self):
        super().__init__()
        self.of = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.of.append(args[0].data_ptr())
        return out


def test_autocast_casts_each_weight_once_for_a_pass():
    """For the student, forward and backward, and the teacher: no cast could be saved."""
    update = trial(precision="bf16")
    update()
    with Casts() as casts:
        update()
    models = update.engine.model, update.objective.ema
    for weights in ([p.data_ptr() for p in model.parameters() if p.ndim > 1] for model in models):
        times = [casts.of.count(weight) for weight in weights]
        assert max(times) == 1
        assert sum(times) > len(weights) / 3


needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


@pytest.mark.slow
@needs_a_compiler
def test_compiled_kernels_compute_the_same():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Block(TransformerSize(32, 1, 2))
    compiled = copy.deepcopy(plain)
    fast.make_fast("blocks", compiled)
    found = {}
    for block in (plain, compiled):
        tokens = torch.linspace(-2, 2, 2 * 5 * 32).view(2, 5, 32).requires_grad_()
        output = block(tokens)
        output.square().sum().backward()
        gradients = [tokens.grad, *(parameter.grad for parameter in block.parameters())]
        found[block is compiled] = [output, *gradients]
    for ours, expected in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
