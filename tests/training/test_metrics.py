from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.autotune import trial_update
from hpm_video.runs.pretraining import Pretraining
from hpm_video.training.memory import without_data
from hpm_video.training.metrics import Meter, read_lines
from hpm_video.training.objective import Losses
from hpm_video.training.trackers import MetricsLog

DEMO = Path(__file__).parents[2] / "configs" / "pretrain" / "demo.yaml"


def losses(total, **parts):
    parts = {name.replace("__", "/"): torch.tensor(value) for name, value in parts.items()}
    return Losses(torch.tensor(total), parts)


def test_a_loss_is_averaged_over_the_batches_that_have_it():
    meter = Meter(torch.device("cpu"))
    meter.add(0, losses(4.0, reconstruction=1.0, prediction=3.0), ("a",))
    meter.add(1, losses(8.0, images__reconstruction=8.0), ("b",))
    meter.add(2, losses(6.0, reconstruction=2.0, prediction=4.0), ("c",))
    means = meter.read()
    assert means["loss"] == pytest.approx(6)
    assert means["reconstruction"] == pytest.approx(1.5)
    assert means["prediction"] == pytest.approx(3.5)
    assert means["images/reconstruction"] == pytest.approx(8)


def test_a_reading_starts_anew():
    meter = Meter(torch.device("cpu"))
    meter.add(0, losses(4.0, images__reconstruction=4.0), ("a",))
    meter.read()
    meter.add(1, losses(2.0, reconstruction=2.0), ("a",))
    means = meter.read()
    assert "images/reconstruction" not in means
    assert (means["loss"], means["reconstruction"]) == (2, 2)


class Clock:
    """A clock that tests set, in place of the module ``time``."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("hpm_video.training.metrics.time", clock)
    return clock


def test_speed_and_use_of_the_device_are_those_of_the_time_that_updates_took(clock):
    costs = {("", 0): 2e12, ("images", 0): 1e12, ("", 1): 3e12}
    meter = Meter(torch.device("cpu"), cost=lambda *key: costs[key], peak=100e12)
    meter.add(0, losses(1.0), ("a", "a"))
    meter.add(0, losses(1.0), ("b",), "images")
    meter.add(1, losses(1.0), ("c",))
    clock.now += 0.5
    with meter.waiting():
        clock.now += 1.0
    with meter.paused():
        clock.now += 7.0
    clock.now += 3.5
    meter.left_out += 3.0  # the time that compiling took
    values = meter.read()
    assert values["clips_per_second"] == pytest.approx(4 / 2)
    assert values["data_wait"] == pytest.approx(1.0 / 2)
    assert values["tflops_per_gpu"] == pytest.approx((2 * 2 + 1 + 3) / 2)
    assert values["mfu"] == pytest.approx(0.04)
    assert values["peak_memory_gb"] == 0
    meter.add(0, losses(1.0), ("a",))
    clock.now += 1.0
    assert meter.read()["tflops_per_gpu"] == pytest.approx(2), "each reading starts anew"
    assert "mfu" not in Meter(torch.device("cpu")).read()


def test_waiting_is_what_the_device_waits_for(clock):
    """The host waits for 1 s. The device has work for 0.75 s of that, and waits for the rest."""

    class Event:
        """The device reaches it when its work is done, or at once."""

        busy_until = 0.0

        def record(self):
            self.at = max(clock.now, Event.busy_until)

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)

    meter = Meter(torch.device("cpu"))
    meter._event = Event
    for busy in (0.75, 2.0):
        Event.busy_until = clock.now + busy
        with meter.waiting():
            clock.now += 1.0
    clock.now += 0.5
    assert meter.read()["data_wait"] == pytest.approx(0.25 / 2.5)


def test_nothing_is_read_from_the_device_but_once_for_a_line(monkeypatch):
    """Tensors without data raise an error when they are read."""
    reads = []
    with without_data():
        config = load_config(PretrainConfig, DEMO, ["model.drop_path=0.1", "recipe.clip_grad=1"])
        update = trial_update(Pretraining(config), torch.device("cpu"), "bf16", clips=2)
        meter = Meter(torch.device("cpu"))
        for number in range(3):
            loss = update()
            meter.add(number, loss, ("a", "b"))
            meter.add_update(number, update.engine.gradient_norm)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(loss.total.detach())
        monkeypatch.setattr(
            FakeTensor, "tolist", lambda self: reads.append(1) or [-1.0] * len(self)
        )
        assert meter.read()["reconstruction"] == pytest.approx(-1 / 3)
    assert len(reads) == 1


def test_a_run_that_begins_anew_keeps_no_line_of_before(tmp_path):
    """It measures before its first update, so it has one such line."""
    for first, updates in ((0, (0, 1, 2)), (0, (0, 1)), (1, (2,))):
        metrics = MetricsLog(tmp_path, ["jsonl"], first_update=first)
        for update in updates:
            metrics.write("validation", update, update / 10, {"loss": 1.0})
    assert [line["update"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
