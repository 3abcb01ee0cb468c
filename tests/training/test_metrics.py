import pytest
import torch

from hpm_video.training.metrics import Meter
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
