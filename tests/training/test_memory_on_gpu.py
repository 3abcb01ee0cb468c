"""Simulated memory against a GPU's, under ``-m gpu``. Without a GPU these tests are skipped, or
fail if HPM_REQUIRE_GPU=1."""

import gc
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.memory import SimulatedMemory, activation_bytes, simulate_update

CONFIG = Path(__file__).parent.parent.parent / "configs" / "pretrain" / "k400_hpm_b.yaml"
REQUIRED = os.environ.get("HPM_REQUIRE_GPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device, or no -m gpu"
    ),
]


def measured(config, clips, precision) -> SimulatedMemory:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    update = trial_update(Pretraining(config), torch.device("cuda"), precision, clips)
    update()
    torch.cuda.synchronize()
    gc.collect()
    resident = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    update()
    torch.cuda.synchronize()
    return SimulatedMemory(resident, torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_simulated_memory_is_that_of_a_gpu(precision):
    """To within 10 %: kernels need working space, and attention keeps other statistics."""
    config = load_config(PretrainConfig, CONFIG, [])
    real, simulated = {}, {}
    for clips in (2, 6):
        make = partial(trial_update, Pretraining(config), torch.device("cpu"), precision, clips)
        simulated[clips] = simulate_update(make)
        real[clips] = measured(config, clips, precision)
        assert simulated[clips].resident == pytest.approx(real[clips].resident, rel=0.05)
        assert simulated[clips].peak == pytest.approx(real[clips].peak, rel=0.1)
    expected, _ = activation_bytes(simulated)
    assert activation_bytes(real)[0] == pytest.approx(expected, rel=0.1)
