"""What only an accelerator can show, under ``-m gpu``, which lets tests see it. Without one these
skip, or fail where HPM_REQUIRE_GPU=1."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.mining.losses import ranking_loss
from hpm_video.randomness import uniform
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.pretraining import Pretraining

DEMO = Path(__file__).parents[2] / "configs" / "pretrain" / "demo.yaml"
REQUIRED = os.environ.get("HPM_REQUIRE_GPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device, or no -m gpu"
    ),
]


def test_draws_are_those_of_the_cpu():
    keys = torch.arange(-50, 50)
    assert torch.equal(uniform(keys.cuda(), 1568, "mask").cpu(), uniform(keys, 1568, "mask"))


def test_ranking_loss_is_that_of_the_cpu():
    scores, errors = torch.randn(4, 1412), torch.rand(4, 1412)
    expected = ranking_loss(scores, errors)
    torch.testing.assert_close(ranking_loss(scores.cuda(), errors.cuda()).cpu(), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_does_not_wait_for_the_device(precision):
    config = load_config(PretrainConfig, DEMO, [])
    config = replace(config, model=replace(config.model, drop_path=0.1))
    update = trial_update(Pretraining(config), torch.device("cuda"), precision, clips=4)
    update()  # the first one may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
