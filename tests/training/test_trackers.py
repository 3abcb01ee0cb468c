"""Trackers, to which a run writes metrics and pictures; each library without a server."""

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.config.training import LoggingConfig
from hpm_video.training import trackers
from hpm_video.training.metrics import read_lines
from hpm_video.training.trackers import PACKAGES, TRACKERS, MetricsLog, check_trackers


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The directory of a run that is starting."""
    folder = tmp_path / "run"
    (folder / "pictures" / "images").mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: {epochs: 3}\n")
    for name in ("update-00000002", "images/update-00000002", "update-00000001"):
        Image.new("RGB", (8, 6), (9, 9, 9)).save(folder / "pictures" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return folder


def write(run, name, first, updates):
    log = MetricsLog(run, [name], first_update=first)
    for update in updates:
        log.write("train", update, update / 10, {"loss": 1.0 / update})
    log.pictures(run / "pictures", 2)
    log.close()


WANDB = pytest.param("wandb", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["jsonl", "tensorboard", WANDB, "mlflow"])
def test_a_tracker_has_metrics_pictures_and_config_also_of_a_run_that_goes_on(
    run, name, monkeypatch
):
    if name in PACKAGES:
        pytest.importorskip(name, reason=f"{name} is an optional extra: trackers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{run}/mlruns")
    write(run, name, 0, (1, 2, 3))
    write(run, name, 2, (3, 4))
    globals()[f"check_{name}"](run)


def check_jsonl(run):
    lines = read_lines(run / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert lines[0] == {"kind": "train", "update": 1, "epoch": 0.1, "loss": 1.0}


def check_tensorboard(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert sorted(events.Tags()["images"]) == ["pictures", "pictures/images"]
    assert events.Tags()["tensors"] == ["config/text_summary"]


def check_wandb(run):
    folders = [*run.glob("wandb/offline-run-*")]
    names = {folder.name.rpartition("-")[2] for folder in folders}
    assert names == {(run / "wandb.id").read_text()}, "both starts belong to one run"
    assert len([*run.glob("wandb/*/files/media/images/pictures*.png")]) >= 1
    assert all(b"epochs" in file.read_bytes() for file in run.glob("wandb/*/*.wandb"))


def check_mlflow(run):
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("hpm_video").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted({each.step for each in history}) == [1, 2, 3, 4]
    assert found.info.status == "FINISHED"
    artifacts = {each.path for each in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"config.yaml", "pictures"}


class Broken:
    def __init__(self, folder, first_update):
        self.calls = 0

    def write(self, kind, update, values):
        raise OSError("the server is gone")

    def picture(self, name, update, path):
        raise AssertionError("it is left out")

    close = picture


def test_a_tracker_that_fails_is_left_out_with_one_warning(run, monkeypatch, caplog):
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    monkeypatch.setitem(TRACKERS, "dead", lambda folder, first: 1 // 0)
    log = MetricsLog(run, ["dead", "broken", "jsonl"], first_update=0)
    for update in (1, 2):
        log.write("train", update, 0.0, {"loss": 1.0})
    log.pictures(run / "pictures", 2)
    log.close()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "the tracker dead failed",
        "the tracker broken failed",
    ]
    assert "OSError: the server is gone" in caplog.text
    assert len(read_lines(run / "metrics.jsonl")) == 2


def test_a_library_that_is_missing_is_found_before_a_run(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_trackers(LoggingConfig())
    with pytest.raises(ConfigError, match="has mlflow: pip install mlflow-skinny"):
        check_trackers(LoggingConfig(trackers=("jsonl", "mlflow")))


@pytest.mark.parametrize(("switch", "expected"), [("true", 2), ("false", 1)])
def test_the_switch_of_earlier_runs_is_read(tmp_path, switch, expected):
    file = tmp_path / "old.yaml"
    file.write_text(f"masking: {{ratio: 0.9}}\nlogging: {{tensorboard: {switch}}}\n")
    config = load_config(PretrainConfig, file, [])
    assert config.logging.trackers == ("jsonl", "tensorboard")[:expected]
    given = load_config(PretrainConfig, file, ["logging.tensorboard=false"])
    assert given.logging.trackers == ("jsonl",)
