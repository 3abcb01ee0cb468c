"""Runs: what they leave, and how they go on after being interrupted in their own processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import finish, lines_of

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.files.errors import ExpectedError
from hpm_video.files.failures import TooManyBadFiles
from hpm_video.files.weights import CheckpointError
from hpm_video.runs.pretraining import load_run
from hpm_video.runs.pretraining import pretrain as run_pretraining
from hpm_video.training.checkpoint import checkpoints_in, read_optimizer, read_state

pytestmark = pytest.mark.slow
BLIND = "data.validation=null"
"""No measures, no pictures. Weights must equal those of the finished run, which has both."""


@pytest.fixture
def start(config_file, without_curves):
    """Start or continue pre-training in this process."""

    def run(folder, *overrides):
        options = [f"output_dir={folder}", *overrides]
        return run_pretraining(load_config(PretrainConfig, config_file, options))

    return run


def assert_same_state(run, reference):
    ours, theirs = (checkpoints_in(folder / "checkpoints")[-1] for folder in (run, reference))
    assert ours.name == theirs.name
    for name in ("model", "teacher"):
        expected = load_file(theirs / f"{name}.safetensors")
        assert expected.keys() == load_file(ours / f"{name}.safetensors").keys()
        for key, tensor in load_file(ours / f"{name}.safetensors").items():
            assert torch.equal(tensor, expected[key]), f"{name} {key}"
    ours, theirs = (read_optimizer(path, (2, 8, 8)) for path in (ours, theirs))
    assert ours.step == theirs.step > 0
    assert ours.moments.keys() == theirs.moments.keys() == {"exp_avg", "exp_avg_sq"}
    for kind, of_parameters in theirs.moments.items():
        assert ours.moments[kind].keys() == of_parameters.keys()
        for name, value in of_parameters.items():
            assert torch.equal(ours.moments[kind][name], value)


def test_a_run_leaves_everything(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "curves.png",
        "pictures",
        "report.html",
    }
    assert [line["update"] for line in lines_of(finished_run, "train")] == list(range(1, 29))
    assert {"loss", "reconstruction", "prediction", "lr", "clips_per_second", "data_wait"} <= set(
        lines_of(finished_run, "train")[0]
    )
    measures = lines_of(finished_run, "validation")
    assert [line["update"] for line in measures] == [0, 14, 28]
    assert {"relative_error", "student_ranking", "teacher_ranking", "ranking_by_variance"} <= set(
        measures[-1]
    )
    assert len(list((finished_run / "pictures").glob("*.png"))) == 1
    start = json.loads((finished_run / "starts.jsonl").read_text())
    assert {"hpm_video", "commit", "torch", "decoders", "device", "command"} <= set(start)
    output = (finished_run.parent / "output.txt").read_text()
    assert "tools/show_masks.py" in output
    assert str(finished_run / "report.html") in output


def test_last_best_and_every_fourth_epoch_are_kept(finished_run):
    folder = finished_run / "checkpoints"
    _, *measured = lines_of(finished_run, "validation")
    scores = {line["update"]: line["relative_error"] for line in measured}
    best = min(scores, key=scores.__getitem__)
    assert (folder / "best").resolve().name == f"update-{best:08d}"
    assert (folder / "last").resolve().name == "update-00000028"
    kept = {path.name for path in checkpoints_in(folder)}
    assert kept == {"update-00000014", "update-00000028", f"update-{best:08d}"}
    assert read_state(folder / "last")["best"]["update"] == best


def test_a_checkpoint_speaks_for_itself(finished_run):
    checkpoint = finished_run / "checkpoints" / "last"
    config, student, objective = load_run(checkpoint, torch.device("cpu"))
    assert config.data.num_frames == 4
    weights = load_file(checkpoint / "teacher.safetensors")
    assert torch.equal(objective.ema.mask_token, weights["mask_token"])
    assert not torch.equal(objective.ema.mask_token, student.mask_token)


@pytest.mark.parametrize(
    ("place", "workers", "at"),
    [
        ("update", 0, 5),  # in the middle of an epoch
        ("update", 2, 5),
        ("writing", 0, 10),  # the third checkpoint, after update 14, half written
        ("linking", 0, 14),  # the third checkpoint, before it is named
    ],
)
def test_killed_and_started_again_ends_with_the_same_bits(
    pretrain, finished_run, tmp_path, place, workers, at
):
    run = tmp_path / "run"
    process = pretrain(run, f"data.workers={workers}", BLIND, place=place)
    finish(process, code=-signal.SIGKILL)
    assert read_state(checkpoints_in(run / "checkpoints")[-1])["update"] == at
    output = finish(pretrain(run, f"data.workers={workers}", BLIND))
    assert f"resuming at update {at} of 28" in output
    assert "may differ" not in output
    assert [line["update"] for line in lines_of(run, "train")] == list(range(1, 29))
    assert_same_state(run, finished_run)
    assert not list((run / "checkpoints").glob(".writing*"))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++"))), reason="no C++ compiler")
def test_compiled_and_killed_among_batches_of_two_shapes_it_ends_with_the_same_bits(
    pretrain, finished_run, videos, tmp_path
):
    compiled = ["engine.compile=blocks", "mining.predictor=none", "masking.strategy=random"]
    compiled += [f"mix.short.data.train={videos / 'train'}", "mix.short.data.num_frames=2"]
    compiled += ["mix.short.weight=0.5", "mix.short.masking.strategy=random", "recipe.epochs=4"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    output = finish(pretrain(whole, *compiled))
    assert "compiling (engine.compile=blocks)" in output
    assert re.search(r"compiling took \d+\.\d s", output)
    finish(pretrain(run, *compiled, place="update"), code=-signal.SIGKILL)
    assert read_state(checkpoints_in(run / "checkpoints")[-1])["update"] == 5
    assert "may differ" not in finish(pretrain(run, *compiled))
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (folder / "checkpoints" / "last" / name for folder in (run, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    eager = load_file(finished_run / "checkpoints" / "last" / "model.safetensors")
    assert set(load_file(ours.with_name("model.safetensors"))) < set(eager)


def test_killed_at_the_very_end_names_its_checkpoints_at_the_next_start(
    pretrain, finished_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, symlinks=True)
    for name in ("last", "best"):
        (run / "checkpoints" / name).unlink()
    (run / "curves.png").unlink()
    assert "is complete" in finish(pretrain(run, curves=True))
    assert (run / "checkpoints" / "last").resolve().name == "update-00000028"
    assert (run / "checkpoints" / "best").exists()
    assert (run / "curves.png").is_file()


def test_sigterm_saves_at_the_next_update_and_says_so_with_its_exit_code(
    pretrain, start, finished_run, tmp_path
):
    """All processes of a job get the signal, as from a scheduler."""
    run = tmp_path / "run"
    output = finish(
        pretrain(run, "data.workers=2", BLIND, place="update", number="SIGTERM"), code=75
    )
    assert read_state(checkpoints_in(run / "checkpoints")[-1])["update"] == 7
    assert "stopped by SIGTERM before update 7" in output
    assert "Traceback" not in output
    start(run, BLIND)
    assert_same_state(run, finished_run)


def test_a_run_that_never_began_does_not_bind(start, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors does not exist"):
        start(run, "init_weights=nothing.safetensors")
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()  # as if it was killed while writing this
    start(run, "recipe.epochs=1", BLIND)


def test_other_videos_under_the_same_name_are_noticed(start, videos, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(videos / "train", folder)
    options = (tmp_path / "run", f"data.train={folder}", "recipe.epochs=1", BLIND)
    start(*options)
    shutil.copy(folder / "texture 1.mp4", folder / "texture 99.mp4")
    with pytest.raises(ConfigError, match=r"the files of data\.train: 14 files"):
        start(*options)


def test_accumulation_and_micro_batches_compute_the_same(start, finished_run, tmp_path):
    start(tmp_path / "run", "engine.micro_batch=2", BLIND)
    ours, theirs = (
        load_file(folder / "checkpoints" / "last" / "model.safetensors")
        for folder in (tmp_path / "run", finished_run)
    )
    for key, tensor in ours.items():
        if key != "difficulty_decoder.head.bias":  # its true gradient is 0: Adam amplifies rounding
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


def test_another_config_in_the_same_directory_is_refused_with_what_differs(start, finished_run):
    with pytest.raises(ConfigError, match=r"recipe\.base_lr: 0\.1 -> 0\.2") as refusal:
        start(finished_run, "recipe.base_lr=0.2", "logging.every_updates=7")
    assert "logging" not in str(refusal.value)


def test_a_complete_run_is_left_as_it_is(start, finished_run, caplog):
    before = (finished_run / "metrics.jsonl").read_bytes()
    with caplog.at_level("INFO"):
        start(finished_run, "logging.every_updates=7", "data.workers=1")
    assert "is complete" in caplog.text
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_no_number_names_update_and_files_and_keeps_the_last_good(
    start, videos, tmp_path
):
    run = tmp_path / "run"
    options = ("recipe.base_lr=1e12", "checkpoint.every_updates=1", "recipe.warmup_epochs=0", BLIND)
    with pytest.raises(ExpectedError, match="is not a finite number") as error:
        start(run, *options)
    assert "of update " in str(error.value)
    assert str(videos / "train" / "texture ") in str(error.value)
    saved = checkpoints_in(run / "checkpoints")
    assert saved
    for checkpoint in saved:
        for tensor in load_file(checkpoint / "model.safetensors").values():
            assert tensor.isfinite().all()


def test_mining_starts_from_a_plain_autoencoder_and_from_an_earlier_run(
    start, finished_run, tmp_path, caplog
):
    caplog.set_level("INFO")
    short = ("recipe.epochs=1", BLIND)
    plain = start(tmp_path / "plain", "mining.predictor=none", "masking.strategy=random", *short)
    start(tmp_path / "mining", f"init_weights={plain / 'checkpoints' / 'last'}", *short)
    assert "tensors start fresh" in caplog.text
    caplog.clear()
    start(tmp_path / "again", f"init_weights={finished_run / 'checkpoints' / 'last'}", *short)
    assert "start from the weights of" in caplog.text
    assert "fresh" not in caplog.text


def test_weights_that_do_not_fit_name_every_tensor(start, finished_run, tmp_path):
    weights = finished_run / "checkpoints" / "last" / "model.safetensors"
    alone = shutil.copy(weights, tmp_path / "alone.safetensors")
    deeper = "model.encoder={dim: 16, depth: 2, num_heads: 2}"
    with pytest.raises(ConfigError, match=r"model\.encoder\.depth: 1 -> 2"):
        start(tmp_path / "run", f"init_weights={weights}", deeper)
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.norm1\.weight"):
        start(tmp_path / "run", f"init_weights={alone}", deeper)


def test_bad_files_are_named_counted_and_end_the_run_above_the_share(
    start, pretrain, videos, tmp_path
):
    folder = tmp_path / "train"
    folder.mkdir()
    for path in (videos / "train").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n")
    run = tmp_path / "run"
    start(run, f"data.train={folder}", "data.max_bad_share=0.2", "recipe.epochs=2", BLIND)
    rows = (run / "bad_files.csv").read_text().splitlines()
    assert rows[0] == "path,reason"
    assert {row.split(",")[0].rsplit("/")[-1] for row in rows[1:]} == {"empty.mp4", "text.mp4"}

    strict = (f"data.train={folder}", BLIND)
    output = finish(pretrain(tmp_path / "strict", *strict, "data.workers=1"), code=2)
    assert "Traceback" not in output
    assert "2 of 16 files do not decode" in output
    assert "data.max_bad_share" in output
    with pytest.raises(TooManyBadFiles, match="2 of 16 files do not decode"):
        start(tmp_path / "strict", *strict)


def test_the_shell_script_runs_it_from_anywhere(config_file, tmp_path):
    """This is the command of the README, with an existing environment."""
    script = Path(__file__).parents[2] / "run_pretrain.sh"
    run = tmp_path / "run"
    output = subprocess.run(
        [script, config_file.name, f"output_dir={run}", "logging.trackers=[jsonl,tensorboard]"],
        cwd=config_file.parent,
        env=os.environ | {"HPM_PYTHON": sys.executable},
        text=True,
        capture_output=True,
    )
    assert output.returncode == 0, output.stdout + output.stderr
    assert list((run / "tensorboard").iterdir())
    assert (run / "curves.png").is_file()
    assert "validation: error" in output.stdout
    assert f"{run / 'checkpoints' / 'best'}" in output.stdout
