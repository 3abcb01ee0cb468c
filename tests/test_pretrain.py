"""Runs in processes of their own: what they leave, and what becomes of them when disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpm_video.pretrain import load_run
from hpm_video.training.checkpoint import checkpoints_in, read_optimizer, read_state


def finish(process, code=0):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def lines_of(run_dir, kind="train"):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in parsed if line["kind"] == kind]


def wait_for_update(process, run_dir, update):
    deadline = time.monotonic() + 100
    while not any(line["update"] >= update for line in lines_of(run_dir)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_state(run, reference):
    ours, theirs = (checkpoints_in(folder / "checkpoints")[-1] for folder in (run, reference))
    assert ours.name == theirs.name
    for name in ("model", "teacher"):
        expected = load_file(theirs / f"{name}.safetensors")
        for key, tensor in load_file(ours / f"{name}.safetensors").items():
            assert torch.equal(tensor, expected[key]), f"{name} {key}"
    expected = read_optimizer(theirs)["state"]
    for index, values in read_optimizer(ours)["state"].items():
        assert torch.equal(values["exp_avg_sq"], expected[index]["exp_avg_sq"])


def test_a_run_leaves_everything(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {"checkpoints", "config.yaml", "metrics.jsonl", "curves.png", "pictures"}
    assert [line["update"] for line in lines_of(finished_run)] == list(range(1, 29))
    assert {"loss", "reconstruction", "prediction", "lr", "clips_per_second", "data_wait"} <= set(
        lines_of(finished_run)[0]
    )
    measures = lines_of(finished_run, "held_out")
    assert [line["update"] for line in measures] == [14, 28]
    assert {"relative_error", "student_ranking", "teacher_ranking", "ranking_by_variance"} <= set(
        measures[-1]
    )
    assert len(list((finished_run / "pictures").glob("*.png"))) == 1
    start = json.loads((finished_run / "starts.jsonl").read_text())
    assert {"hpm_video", "commit", "torch", "decoders", "device", "command"} <= set(start)
    output = (finished_run.parent / "output.txt").read_text()
    assert "tools/show_masks.py" in output
    assert str(finished_run / "curves.png") in output


def test_last_best_and_every_fourth_epoch_are_kept(finished_run):
    folder = finished_run / "checkpoints"
    scores = {line["update"]: line["relative_error"] for line in lines_of(finished_run, "held_out")}
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
    assert torch.equal(objective.teacher.mask_token, weights["mask_token"])
    assert not torch.equal(objective.teacher.mask_token, student.mask_token)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_started_again_ends_with_the_same_bits(
    pretrain, finished_run, tmp_path, workers
):
    run = tmp_path / "run"
    process = pretrain(run, f"data.workers={workers}")
    wait_for_update(process, run, 7)  # two updates after a checkpoint in the middle of an epoch
    process.kill()
    process.communicate()
    at = read_state(checkpoints_in(run / "checkpoints")[-1])["update"]
    assert 5 <= at < 28
    output = finish(pretrain(run, f"data.workers={workers}"))
    assert f"going on at update {at} of 28" in output
    assert [line["update"] for line in lines_of(run)] == list(range(1, 29))
    assert_same_state(run, finished_run)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_at_the_next_update_and_says_so_with_its_exit_code(
    pretrain, finished_run, tmp_path, workers
):
    """All processes of a job get the signal, as a scheduler sends it."""
    run = tmp_path / "run"
    process = pretrain(run, f"data.workers={workers}")
    wait_for_update(process, run, 3)
    os.killpg(process.pid, signal.SIGTERM)
    output = finish(process, code=75)
    at = read_state(checkpoints_in(run / "checkpoints")[-1])["update"]
    assert f"stopped by SIGTERM before update {at}" in output
    assert "Traceback" not in output
    finish(pretrain(run))
    assert_same_state(run, finished_run)


def test_accumulation_and_micro_batches_compute_the_same(pretrain, finished_run, tmp_path):
    finish(pretrain(tmp_path / "run", "engine.micro_batch=2"))
    ours, theirs = (
        load_file(folder / "checkpoints" / "last" / "model.safetensors")
        for folder in (tmp_path / "run", finished_run)
    )
    for key, tensor in ours.items():
        if key != "difficulty_decoder.head.bias":  # no true gradient: Adam amplifies rounding
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


def test_another_config_in_the_same_directory_is_refused_with_what_differs(pretrain, finished_run):
    output = finish(pretrain(finished_run, "recipe.base_lr=0.2", "logging.every_updates=7"), code=2)
    assert "recipe.base_lr: 0.1 -> 0.2" in output
    assert "logging" not in output


def test_a_complete_run_is_left_as_it_is(pretrain, finished_run):
    before = (finished_run / "metrics.jsonl").read_bytes()
    output = finish(pretrain(finished_run, "logging.every_updates=7", "data.workers=1"))
    assert "is complete" in output
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_no_number_names_update_and_files_and_keeps_the_last_good(
    pretrain, videos, tmp_path
):
    run = tmp_path / "run"
    output = finish(
        pretrain(
            run, "recipe.base_lr=1e12", "checkpoint.every_updates=1", "recipe.warmup_epochs=0"
        ),
        code=2,
    )
    assert "is not a finite number" in output
    assert str(videos / "train" / "texture ") in output
    for checkpoint in checkpoints_in(run / "checkpoints"):
        for tensor in load_file(checkpoint / "model.safetensors").values():
            assert tensor.isfinite().all()


def test_mining_starts_from_a_plain_autoencoder_and_from_an_earlier_run(
    pretrain, finished_run, tmp_path
):
    plain = tmp_path / "plain"
    finish(pretrain(plain, "mining.predictor=none", "masking.strategy=random", "recipe.epochs=2"))
    output = finish(
        pretrain(
            tmp_path / "mining",
            f"init_weights={plain / 'checkpoints' / 'last'}",
            "recipe.epochs=1",
            "recipe.warmup_epochs=1",
        )
    )
    assert "tensors start fresh" in output
    output = finish(
        pretrain(
            tmp_path / "again",
            f"init_weights={finished_run / 'checkpoints' / 'last'}",
            "recipe.epochs=1",
        )
    )
    assert "start from the weights of" in output
    assert "fresh" not in output


def test_weights_that_do_not_fit_name_every_tensor(pretrain, finished_run, tmp_path):
    weights = finished_run / "checkpoints" / "last" / "model.safetensors"
    output = finish(
        pretrain(
            tmp_path / "run",
            f"init_weights={weights}",
            "model.encoder={dim: 16, depth: 2, num_heads: 2}",
        ),
        code=2,
    )
    assert "missing encoder.blocks.1.norm1.weight" in output


def test_bad_files_are_named_counted_and_end_the_run_above_the_share(pretrain, videos, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for path in (videos / "train").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n")
    run = tmp_path / "run"
    finish(pretrain(run, f"data.train={folder}", "data.max_bad_share=0.2", "recipe.epochs=2"))
    rows = (run / "bad_files.csv").read_text().splitlines()
    assert rows[0] == "path,reason"
    assert {row.split(",")[0].rsplit("/")[-1] for row in rows[1:]} == {"empty.mp4", "text.mp4"}

    output = finish(pretrain(tmp_path / "strict", f"data.train={folder}"), code=2)
    assert "2 of 16 files do not decode" in output
    assert "data.max_bad_share" in output


def test_the_shell_script_runs_it_from_anywhere(config_file, tmp_path):
    """The command of the README, with an environment that is there already."""
    script = Path(__file__).parent.parent / "run_pretrain.sh"
    run = tmp_path / "run"
    output = subprocess.run(
        [script, config_file.name, f"output_dir={run}", "logging.tensorboard=true"],
        cwd=config_file.parent,
        env=os.environ | {"HPM_PYTHON": sys.executable},
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert output.returncode == 0, output.stdout + output.stderr
    assert list((run / "tensorboard").iterdir())
    assert (run / "curves.png").is_file()
    assert "held out: error" in output.stdout
    assert f"{run / 'checkpoints' / 'best'}" in output.stdout
