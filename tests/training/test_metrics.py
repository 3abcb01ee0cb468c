from pathlib import Path

import pytest
import torch

from hpm_video.training.metrics import Meter, WaitingWarning
from hpm_video.training.objective import Losses


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


def test_a_run_that_waits_for_its_data_says_so_once(caplog):
    def warnings_of(*shares):
        caplog.clear()
        waiting = WaitingWarning(Path("runs/mine/config.yaml"))
        for share in shares:
            waiting.look(share)
        return [record.getMessage() for record in caplog.records]

    assert warnings_of(0.9, 0.1, 0.1, 0.1) == [], "workers begin"
    assert warnings_of(0.9, 0.5, 0.5, 0.2, 0.5, 0.5) == [], "it goes by"
    (said,) = warnings_of(0.0, 0.5, 0.5, 0.42, 0.5, 0.5, 0.5, 0.5)
    assert said.startswith("42% of the time goes into waiting for data.")
    assert "tools/bench.py loader runs/mine/config.yaml" in said
