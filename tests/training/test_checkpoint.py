import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import flip_a_bit
from torch import nn

from hpm_video.files.weights import CheckpointError, load_weights
from hpm_video.training.checkpoint import (
    checkpoint_path,
    checkpoints_in,
    mend,
    point_to,
    read_optimizer,
    read_state,
    read_weights,
    remove_superseded,
    save_checkpoint,
)
from hpm_video.training.optim import OptimizerState

ROOT = Path(__file__).parent.parent.parent
PATCH = (1, 1, 1)
"""It affects none of these weights."""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 0\n")
    return path


def save(folder, update, config, module=None, **state):
    save_checkpoint(
        checkpoint_path(folder, update),
        {"model": (module or nn.Linear(3, 2)).state_dict()},
        optimizer=OptimizerState(1, {"exp_avg": {"weight": torch.ones(2, 3)}}),
        state={"update": update, **state},
        attached=[config],
    )


def test_a_checkpoint_is_read_back(tmp_path, config):
    module = nn.Linear(3, 2)
    save(tmp_path, 7, config, module)
    (checkpoint,) = checkpoints_in(tmp_path)
    assert checkpoint.name == "update-00000007"
    assert torch.equal(read_weights(checkpoint, PATCH)["weight"], module.weight)
    optimizer = read_optimizer(checkpoint, PATCH)
    assert optimizer.step == 1
    assert torch.equal(optimizer.moments["exp_avg"]["weight"], torch.ones(2, 3))
    assert (checkpoint / "config.yaml").read_text() == "seed: 0\n"
    modes = {path.stat().st_mode for path in checkpoint.iterdir()}
    assert modes == {config.stat().st_mode}, "as for a new file"


def test_attached_files_are_copied_and_one_that_is_not_there_leaves_nothing(tmp_path, config):
    names = tmp_path / "labels.txt"
    names.write_text("a\nb\n")
    folder = tmp_path / "checkpoints"
    options = {"optimizer": OptimizerState(0, {}), "state": {"update": 1}}
    save_checkpoint(folder / "update-00000001", {}, attached=[config, names], **options)
    (checkpoint,) = checkpoints_in(folder)
    assert (checkpoint / "labels.txt").read_text() == "a\nb\n"
    assert (checkpoint / "config.yaml").read_text() == "seed: 0\n"
    names.unlink()
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*labels.txt"):
        save_checkpoint(folder / "update-00000002", {}, attached=[config, names], **options)
    assert [path.name for path in folder.iterdir()] == ["update-00000001"]


def test_what_was_not_finished_is_never_picked_up(tmp_path, config):
    save(tmp_path, 7, config)
    (tmp_path / ".writing-update-00000009").mkdir()
    mend(tmp_path)
    assert not list(tmp_path.glob(".writing*"))
    checkpoint_path(tmp_path, 8).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["update-00000007"]
    with pytest.raises(CheckpointError, match="update-00000008 is not a complete .*delete it"):
        mend(tmp_path)


def test_newest_marked_and_best_survive(tmp_path, config):
    for update in range(6):
        save(tmp_path, update, config, keep=update == 1, best={"update": 2, "score": 0})
    remove_superseded(tmp_path, 2)
    assert [int(path.name[-1]) for path in checkpoints_in(tmp_path)] == [1, 2, 4, 5]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, config):
    module = nn.Linear(3, 2)
    nn.init.constant_(module.bias, float("nan"))
    with pytest.raises(CheckpointError, match="not finite, such as bias"):
        save(tmp_path, 1, config, module)
    assert checkpoints_in(tmp_path) == []


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, config):
    save(tmp_path, 1, config)
    before = (checkpoint_path(tmp_path, 1) / "model.safetensors").read_bytes()
    code = f"""
import resource
from pathlib import Path
import torch
from hpm_video.training.checkpoint import checkpoint_path, save_checkpoint
from hpm_video.files.weights import CheckpointError
from hpm_video.training.optim import OptimizerState
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path({str(tmp_path)!r})
for big in ("model", "optimizer"):
    module = torch.nn.Linear(300, 300) if big == "model" else torch.nn.Linear(1, 1)
    moment = torch.zeros(100_000 if big == "optimizer" else 1)
    optimizer = OptimizerState(1, {{"exp_avg": {{"weight": moment}}}})
    weights = {{"model": module.state_dict()}}
    try:
        save_checkpoint(checkpoint_path(folder, 2), weights, optimizer=optimizer,
                        state={{"update": 2}}, attached=[folder / "config.yaml"])
    except CheckpointError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.count("cannot write the checkpoint") == 2, run.stdout
    assert "Earlier checkpoints are untouched" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "update-00000001"]
    assert (checkpoint_path(tmp_path, 1) / "model.safetensors").read_bytes() == before


def test_a_pickle_that_would_run_code_is_refused(tmp_path, config):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    save(tmp_path, 1, config)
    (checkpoint,) = checkpoints_in(tmp_path)
    (checkpoint / "state.json").unlink()  # its checksum would not match
    (checkpoint / "optimizer.safetensors").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match="optimizer.safetensors is not complete"):
        read_optimizer(checkpoint, PATCH)
    assert not (tmp_path / "pwned").exists()


def test_weights_fit_or_every_difference_is_named(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    weights = {
        "0.weight": torch.zeros(2, 3),
        "0.bias": torch.zeros(5),
        "9.weight": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as error:
        load_weights(module, weights, tmp_path)
    for words in (
        "missing 1.weight",
        "missing 1.bias",
        "left over 9.weight",
        "0.bias has shape (5,)",
    ):
        assert words in str(error.value)
    del weights["9.weight"]
    weights["0.bias"] = torch.zeros(2)
    assert load_weights(module, weights, tmp_path, may_lack=("1.",)) == ["1.weight", "1.bias"]
    assert not module[0].weight.any()


def test_only_names_with_given_prefixes_may_be_missing_or_left(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    weights = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2), "head.bias": torch.ones(1)}
    fresh = load_weights(module, weights, tmp_path, may_lack=("1.",), may_leave=("head.",))
    assert fresh == ["1.weight", "1.bias"]
    assert (module[0].weight == 1).all()
    with pytest.raises(CheckpointError, match=r"missing 1.bias$"):
        load_weights(module, weights, tmp_path, may_lack=("1.w",), may_leave=("head.",))
    with pytest.raises(CheckpointError, match=r"left over head.bias$"):
        load_weights(module, weights, tmp_path, may_lack=("1.",), may_leave=("bias",))


def test_weights_that_are_not_there_or_cut_short(tmp_path):
    with pytest.raises(CheckpointError, match="none.safetensors does not exist"):
        read_weights(tmp_path / "none.safetensors", PATCH)
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_weights(path, PATCH)


def test_a_name_points_elsewhere_at_once(tmp_path, config):
    for update in (1, 2):
        save(tmp_path, update, config)
        point_to(tmp_path / "last", checkpoint_path(tmp_path, update))
    assert json.loads((tmp_path / "last" / "state.json").read_text())["update"] == 2
    assert load_file(tmp_path / "last" / "model.safetensors")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link", "checkpoint"])
def test_what_stands_in_the_way_is_not_overwritten(tmp_path, config, kind):
    obstacle = checkpoint_path(tmp_path, 7)
    if kind == "folder":
        obstacle.mkdir()
        (obstacle / "model.safetensors").write_text("a part")
    elif kind == "file":
        obstacle.write_text("mine")
    elif kind == "dangling link":
        obstacle.symlink_to("nowhere")
    else:
        save(tmp_path, 7, config, run=1)
    before = obstacle.lstat()
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(tmp_path, 7, config, run=2)
    assert obstacle.lstat() == before
    assert kind != "checkpoint" or read_state(obstacle)["run"] == 1


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_folder_named_last_or_best_is_refused(tmp_path, config, name):
    """A copy without symbolic links has such folders."""
    save(tmp_path, 1, config, best={"update": 1, "score": 0})
    shutil.copytree(checkpoint_path(tmp_path, 1), tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} must be a link .*delete it"):
        mend(tmp_path)
    shutil.rmtree(tmp_path / name)
    mend(tmp_path)
    assert (tmp_path / name).readlink() == Path("update-00000001")


def test_other_names_are_no_checkpoints_and_stay(tmp_path, config):
    save(tmp_path, 1, config)
    for name in ("update-00000001 copy", "update-2", "update-000000003"):
        shutil.copytree(checkpoint_path(tmp_path, 1), tmp_path / name)
    (tmp_path / "update-3").touch()
    before = sorted(tmp_path.iterdir())
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, 1)]
    mend(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "last"])


def test_checkpoints_elsewhere_are_unlinked_but_not_deleted(tmp_path, config):
    save(tmp_path / "other disk", 1, config)
    kept = checkpoint_path(tmp_path / "other disk", 1)
    checkpoint_path(tmp_path, 1).symlink_to(kept)
    save(tmp_path, 2, config)
    remove_superseded(tmp_path, 1)
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, 2)]
    assert (kept / "state.json").is_file()


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"\xff{}",
        b"{}",
        b"[]",
        b'{"update": 7}',
        b'{"update": "7", "facts": {}, "data": "", "best": {}}',
        b'{"update": 7, "facts": {}, "data": "", "best": {}}',
        b'{"update": 7, "facts": {"precision": ""}, "data": "", "best": {"score": 1}}',
    ],
)
def test_a_state_that_says_too_little_is_no_state_of_a_run(tmp_path, text):
    checkpoint = checkpoint_path(tmp_path, 7)
    checkpoint.mkdir()
    (checkpoint / "state.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"state.json cannot be read, or lacks .*delete it"):
        read_state(checkpoint, of_run=True)


def test_a_flipped_bit_is_an_error_in_the_first_process_of_a_machine(tmp_path, config, monkeypatch):
    save(tmp_path, 1, config)
    (checkpoint,) = checkpoints_in(tmp_path)
    file = checkpoint / "model.safetensors"
    flip_a_bit(file)
    for path in (checkpoint, file):
        with pytest.raises(CheckpointError, match=r"model.safetensors has the SHA-256 .*delete it"):
            read_weights(path, PATCH)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_weights(checkpoint, PATCH)
    monkeypatch.setenv("LOCAL_RANK", "0")
    file.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors does not exist"):
        read_weights(checkpoint, PATCH)


def test_a_file_that_was_changed_on_purpose_is_read_without_its_checksum(tmp_path, config):
    save(tmp_path, 1, config)
    (checkpoint,) = checkpoints_in(tmp_path)
    save_file({"weight": torch.ones(1)}, checkpoint / "model.safetensors")
    state = read_state(checkpoint)
    del state["sha256"]["model.safetensors"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert read_weights(checkpoint, PATCH)["weight"] == 1
    assert read_optimizer(checkpoint, PATCH).step == 1
