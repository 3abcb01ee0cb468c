import pytest
import torch

from hpm_video.training import device
from hpm_video.training.device import choose_device, choose_precision, time_updates


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
    runs = []
    seconds = time_updates(lambda: runs.append(1), torch.device("cpu"), warmup=2, repeats=3)
    assert len(runs) == 5
    assert 0 <= seconds < 1


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ValueError, match="engine.device=warp cannot be used here"):
        choose_device("warp")
    assert choose_device("cpu") == torch.device("cpu")
