"""Parts that users register by name, from Python and for the commands."""

from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np
import pytest
import torch
from painted_decoder import TwoColours

import hpm_video
from hpm_video.config.checks import ConfigError
from hpm_video.data.manifest import Manifest
from hpm_video.decoding.registry import Decoder
from hpm_video.files import plugins
from hpm_video.mining.objective import HardPatchesMining
from hpm_video.mining.targets import PixelTarget
from hpm_video.preparation.encode import write_video
from hpm_video.recognition.inference import Reading
from hpm_video.tokens.masking import MaskStrategy
from hpm_video.training.trackers import TRACKERS, check_trackers


@pytest.fixture(autouse=True)
def unplugged(monkeypatch):
    """Undo all registrations of a test."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    plugins.load_plugins.cache_clear()
    before = set(plugins.REGISTERED)
    yield
    plugins.load_plugins.cache_clear()
    for kind, name in set(plugins.REGISTERED) - before:
        module, table = plugins.TABLES[kind]
        del plugins.REGISTERED[kind, name]
        getattr(plugins.import_module(f"hpm_video.{module}"), table).pop(name)


@dataclass(frozen=True)
class Sampled(MaskStrategy):
    """Hides the units with the lowest draws, whatever their difficulty."""

    def choose(self, difficulty, priority, num_masked, num_picked):
        lowest = priority.argsort(dim=1)[:, :num_masked]
        return torch.zeros_like(priority, dtype=torch.bool).scatter_(1, lowest, value=True)


@dataclass(frozen=True)
class FirstValues(PixelTarget):
    kind: str = "raw"
    width: ClassVar[int] = 5

    def of(self, clips, mask, features=None):
        return super().of(clips, mask)[..., :5]


class Halved(HardPatchesMining):
    def losses(self, student, batch, progress):
        losses = super().losses(student, batch, progress)
        return replace(losses, total=losses.total / 2)


CHOICES = [
    ("mask_strategy", "masking.strategy", Sampled("hardest", 0.0, 1.0)),
    ("target", "mining.target", FirstValues),
    ("objective", "mining.objective", Halved),
    ("optimizer", "recipe.optimizer", lambda groups, betas: torch.optim.Adamax(groups, 0, betas)),
]


@pytest.mark.parametrize(("kind", "key", "thing"), CHOICES)
def test_a_config_takes_registered_names_alone(kind, key, thing):
    override = f"{key}=mine"
    with pytest.raises(ConfigError, match=rf"{key} must be one of [\w, ]+, got mine; hpm_video.re"):
        hpm_video.load_config("pretrain/demo", override)
    hpm_video.register(kind, "mine", thing)
    hpm_video.load_config("pretrain/demo", override)
    with pytest.raises(ConfigError, match=rf"{key} must be one of [\w, ]+, mine, got other;"):
        hpm_video.load_config("pretrain/demo", override.replace("mine", "other"))
    with pytest.raises(ValueError, match=r"that is not taken \([\w, ]+\), got 'mine'"):
        hpm_video.register(kind, "mine", thing)


def test_a_run_needs_its_trackers_and_its_config_is_read_without_them(tmp_path, call_tool):
    override = "logging.trackers=[mine]"
    config = hpm_video.load_config("pretrain/demo", override)
    message = r"logging.trackers must be one of jsonl, tensorboard, wandb, mlflow, got mine; hpm_v"
    with pytest.raises(ConfigError, match=message):
        check_trackers(config.logging)
    code, output = call_tool("pretrain", "pretrain/demo", override, "--dry-run", "--files", 24)
    assert code == 2
    assert "got mine; hpm_video.register('tracker', ...) adds others" in output
    hpm_video.register("tracker", "mine", TRACKERS["jsonl"])
    check_trackers(config.logging)


def test_strategy_target_and_objective_are_those_that_train():
    for (kind, _, thing), name in zip(CHOICES[:3], ("sampled", "first", "halved"), strict=True):
        hpm_video.register(kind, name, thing)
    chosen = ["masking.strategy=sampled", "mining.target=first", "mining.objective=halved"]
    config = hpm_video.load_config("pretrain/demo", *chosen, "masking.last_fraction=0")
    rule = config.mask_rule("")
    priority = torch.rand(2, rule.num_units)
    masked = rule.draw(None, priority, 0).masked
    assert all(p[m].max() <= p[~m].min() for p, m in zip(priority, masked, strict=True))
    assert rule.strategy.last_fraction == 0, "the config still changes parts of a strategy"
    student = hpm_video.build_model(config)
    assert student.reconstructor.head.out_features == 5
    assert type(hpm_video.build_objective(config, student)) is Halved


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("loss", "mine", "kind must be one of mask_strategy, .*, got 'loss'"),
        ("optimizer", "adamw", r"not taken \(adamw, sgd\), got 'adamw'"),
        ("optimizer", "my opt", "letters, digits and _"),
        ("decoder", "auto", "got 'auto'"),
    ],
)
def test_what_cannot_be_registered(kind, name, message):
    with pytest.raises(ValueError, match=message):
        hpm_video.register(kind, name, None)


def test_a_reader_of_a_notebook_is_refused_for_workers_cannot_import_it(monkeypatch):
    monkeypatch.setattr(TwoColours, "__module__", "__main__")
    with pytest.raises(
        ValueError, match="cannot import TwoColours from a notebook or script; define it"
    ):
        hpm_video.register("decoder", "mine", Decoder(TwoColours, "av", "pip install av"))


def entry_point(*values):
    return lambda group: [EntryPoint("mine", value, group) for value in values]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_decoder_of_a_plugin_decodes_in_every_process(workers, monkeypatch, tmp_path):
    monkeypatch.setattr(plugins, "entry_points", entry_point("painted_decoder:plug_in"))
    config = hpm_video.load_config("pretrain/demo", "data.frame_size=[40,40]")
    video = tmp_path / "a.mp4"
    write_video(video, np.full((8, 40, 40, 3), 50, np.uint8))
    manifest = Manifest((str(video),), (-1,), (-1,))
    reading = Reading("grey", workers)
    (batch,) = reading.batches(reading.clips(manifest, config.data), [0])
    assert not batch.failures
    assert np.unique(batch.clips).tolist() == [11]


def test_a_command_knows_what_plugins_register(monkeypatch, call_tool):
    monkeypatch.setattr(plugins, "entry_points", entry_point("painted_decoder:plug_in"))
    with pytest.raises(SystemExit):
        call_tool("predict", "a", "b", "--decoder", "none")
    assert ("decoder", "grey") in plugins.REGISTERED


def test_a_plugin_that_fails_is_named(monkeypatch, call_tool, capsys):
    monkeypatch.setattr(plugins, "entry_points", entry_point("painted_decoder:nothing"))
    with pytest.raises(SystemExit, match="2"):
        call_tool("bench", "flops", "demo")
    assert "the plugin mine (painted_decoder:nothing) cannot be loaded" in capsys.readouterr().err
    with pytest.raises(plugins.PluginError, match="AttributeError: .*nothing"):
        hpm_video.load_config("pretrain/demo")
