import time

import pytest
import torch

from hpm_video.training import device
from hpm_video.training.device import EngineError, choose_device, choose_precision, time_updates
from hpm_video.training.engine import TorchEngine


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"), [(1.0, 0.5, "bf16"), (1.0, 0.95, "fp32"), (1.0, 8.0, "fp32")]
)
def test_bf16_on_a_cpu_only_where_whole_updates_are_faster(monkeypatch, fp32, bf16, expected):
    seconds = {"fp32": fp32, "bf16": bf16}
    calls = []

    def timed(update, where, **_):
        calls.append(update)
        return seconds[update]

    monkeypatch.setattr(device, "time_updates", timed)
    assert choose_precision(torch.device("cpu"), lambda name: name) == expected
    assert calls[:2] == ["fp32", "bf16"]


def test_updates_are_really_run():
    runs, began = [], time.perf_counter()
    seconds = time_updates(lambda: runs.append(1), torch.device("cpu"), warmup=2, repeats=3)
    assert len(runs) == 5
    assert 0 <= seconds <= time.perf_counter() - began


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(EngineError, match="engine.device=warp cannot be used here"):
        choose_device("warp")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("largest", [None, 0.5, 100.0])
def test_gradients_are_clipped_at_the_norm_and_their_norm_is_returned(largest):
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = TorchEngine(model, optimizer, device=torch.device("cpu"), clip_grad=largest)
    engine.backward(engine(torch.tensor([[3.0, 4.0]])).sum())
    assert engine.step()
    assert engine.gradient_norm.item() == pytest.approx(5)
    expected = 0.5 if largest == 0.5 else 5.0
    assert model.weight.norm().item() == pytest.approx(expected, rel=1e-4)
