from pathlib import Path

import pytest
import torch

from hpm_video.config.training import LoggingConfig
from hpm_video.training.metrics import Meter, MetricsLog, WaitingWarning, read_lines
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


def test_a_run_that_begins_anew_keeps_no_line_of_before(tmp_path):
    """It measures before its first update, and has one such line then."""
    how = LoggingConfig(tensorboard=False)
    for first, updates in ((0, (0, 1, 2)), (0, (0, 1)), (1, (2,))):
        metrics = MetricsLog(tmp_path, how, first_update=first)
        for update in updates:
            metrics.write("validation", update, update / 10, {"loss": 1.0})
    assert [line["update"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_lines_of_validation_are_read_by_their_kind_of_one_version_ago(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "held_out", "update": 3}\n')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"kind": "validation", "update": 3}]
