"""Tests that need an accelerator, under ``-m gpu``, which lets tests see it. Without one they are
skipped, or fail if HPM_REQUIRE_GPU=1."""

import os
from pathlib import Path

import pytest
import torch

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.mining.losses import ranking_loss
from hpm_video.randomness import uniform
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.metrics import Meter

DEMO = Path(__file__).parents[2] / "configs" / "pretrain" / "demo.yaml"
REQUIRED = os.environ.get("HPM_REQUIRE_GPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device, or no -m gpu"
    ),
    pytest.mark.filterwarnings("default"),  # torch itself warns while it traces
]


def test_draws_are_those_of_the_cpu():
    keys = torch.arange(-50, 50)
    assert torch.equal(uniform(keys.cuda(), 1568, "mask").cpu(), uniform(keys, 1568, "mask"))


def test_ranking_loss_is_that_of_the_cpu():
    scores, errors = torch.randn(4, 1412), torch.rand(4, 1412)
    expected = ranking_loss(scores, errors)
    torch.testing.assert_close(ranking_loss(scores.cuda(), errors.cuda()).cpu(), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(
    ("precision", "compiled"), [("fp32", "off"), ("bf16", "off"), ("bf16", "blocks")]
)
def test_an_update_does_not_wait_for_the_device(precision, compiled):
    config = load_config(PretrainConfig, DEMO, ["model.drop_path=0.1", "recipe.clip_grad=1"])
    device = torch.device("cuda")
    update = trial_update(Pretraining(config), device, precision, clips=4, compiled=compiled)
    update()  # the first one may set things up
    meter = Meter(device, cost=lambda *_: 1e9, peak=1e12)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            with meter.waiting():
                pass
            meter.add(number, update(), update.batch.files)
            meter.add_update(number, update.engine.gradient_norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = meter.read()
    assert values["data_wait"] < 0.5
    assert 0 < values["mfu"] < 1
    assert values["peak_memory_gb"] > 0.01


def test_compiled_kernels_compute_the_same():
    losses = {}
    for compiled in ("off", "blocks", "model"):
        torch.manual_seed(0)
        config = load_config(PretrainConfig, DEMO, [])
        update = trial_update(
            Pretraining(config), torch.device("cuda"), "fp32", clips=4, compiled=compiled
        )
        losses[compiled] = [update().total.item() for _ in range(3)]
    assert losses["blocks"] == pytest.approx(losses["off"], rel=1e-4)
    assert losses["model"] == pytest.approx(losses["off"], rel=1e-4)
