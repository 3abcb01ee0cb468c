"""Fine-tuning, testing and probing on real small videos."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import finish, lines_of

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.manifest import ManifestError, read_manifest
from hpm_video.files.failures import BadFilesError
from hpm_video.recognition.inference import Inference
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.runs.finetuning import evaluate_run
from hpm_video.runs.finetuning import finetune as run_finetuning
from hpm_video.runs.pretraining import pretrain as run_pretraining
from hpm_video.training.checkpoint import checkpoints_in, read_optimizer, read_state

pytestmark = pytest.mark.slow


@pytest.fixture
def config_of(finetune_config):
    return lambda run, *overrides: load_config(
        FinetuneConfig, finetune_config, [f"output_dir={run}", *map(str, overrides)]
    )


@pytest.fixture
def start(config_of, without_curves):
    """Start or continue fine-tuning in this process, without the final test."""
    return lambda run, *overrides: run_finetuning(config_of(run, *overrides))


def folder_tested(run):
    """The folder of a run's only test."""
    (folder,) = (run / "test").iterdir()
    return folder


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def rows_of(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_script_fine_tunes_and_tests(finetuned_run):
    result = result_of(folder_tested(finetuned_run))
    assert result["top1"] >= 5 / 6, "three tints are easy"
    assert result["chance"] == pytest.approx(1 / 3)
    assert result["videos"] == 6
    assert result["excluded"] == 0
    test = result["test"]
    assert (test["checkpoint"].rsplit("/")[-1], test["chosen_as"]) == ("update-00000030", "last")
    assert (test["weights"], test["clips"], test["crops"]) == ("average", 2, 2)
    losses = [line["loss"] for line in lines_of(finetuned_run, "train")]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    measures = lines_of(finetuned_run, "validation")
    assert [line["update"] for line in measures] == [0, 15, 30]
    assert {"top1", "cross_entropy"} <= set(measures[-1])
    assert "top5" not in measures[-1], "there are only three classes"


def test_predictions_are_those_of_every_video_once(finetuned_run, labelled_videos):
    rows = rows_of(folder_tested(finetuned_run))
    manifest = read_manifest(labelled_videos / "validation")
    assert [row["path"] for row in rows] == list(manifest.files)
    assert [int(row["label"]) for row in rows] == list(manifest.labels)
    for row in rows:
        shares = [float(row[f"probability of {name}"]) for name in ("blue", "green", "red")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert int(row["prediction"]) == int(np.argmax(shares))
        assert row["prediction_name"] == ("blue", "green", "red")[int(row["prediction"])]
        assert int(row["correct"]) == (row["prediction"] == row["label"])
    correct = sum(int(row["correct"]) for row in rows)
    assert result_of(folder_tested(finetuned_run))["top1"] == pytest.approx(correct / 6)


def test_what_the_script_says(finetuned_run):
    output = (finetuned_run.parent / "output.txt").read_text()
    for line in (
        "start from weights of",
        "start fresh: fc_norm.weight, fc_norm.bias, head.weight, head.bias",
        "the last checkpoint (average of update 30), 2 x 2 views of each video",
        "top-1 ",
        "(chance 0.333) on 6 videos",
        "green ",
        f"confusion.png are in {folder_tested(finetuned_run)}",
        str(finetuned_run / "report.html"),
        "tools/predict.py",
    ):
        assert line in output, line
    assert (folder_tested(finetuned_run) / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert (finetuned_run / "curves.png").exists()


def test_a_checkpoint_stands_alone(finetuned_run):
    checkpoint = finetuned_run / "checkpoints" / "last"
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors",
        "average.safetensors",
        "optimizer.safetensors",
        "state.json",
        "config.yaml",
        "labels.txt",
    }
    assert (checkpoint / "labels.txt").read_text() == "blue\ngreen\nred\n"
    model, average = (
        load_file(checkpoint / f"{name}.safetensors") for name in ("model", "average")
    )
    assert model.keys() == average.keys()
    assert not torch.equal(model["head.weight"], average["head.weight"])


def test_the_best_is_the_highest_accuracy(finetuned_run):
    _, *measured = lines_of(finetuned_run, "validation")
    scores = {line["update"]: line["top1"] for line in measured}
    best = max(scores, key=scores.__getitem__)
    assert (finetuned_run / "checkpoints" / "best").resolve().name == f"update-{best:08d}"


def test_a_second_start_neither_trains_nor_tests_again(finetuned_run, finetune):
    before = (folder_tested(finetuned_run) / "result.json").stat().st_mtime_ns
    output = finish(finetune(finetuned_run))
    assert "is complete, with 30 updates" in output
    assert "testing the" not in output
    assert "top-1 " in output
    assert (folder_tested(finetuned_run) / "result.json").stat().st_mtime_ns == before


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(finetune, finetuned_run, tmp_path):
    run = tmp_path / "run"
    finish(finetune(run, place="update"), -9)
    finish(finetune(run))
    ours, theirs = (checkpoints_in(folder / "checkpoints")[-1] for folder in (run, finetuned_run))
    for name in ("model", "average"):
        expected = load_file(theirs / f"{name}.safetensors")
        for key, tensor in load_file(ours / f"{name}.safetensors").items():
            assert torch.equal(tensor, expected[key]), f"{name} {key}"
    ours_state, theirs_state = (read_optimizer(path, (2, 8, 8)) for path in (ours, theirs))
    assert ours_state.step == theirs_state.step > 0
    for name, value in theirs_state.moments["exp_avg"].items():
        assert torch.equal(ours_state.moments["exp_avg"][name], value)
    assert result_of(folder_tested(run))["top1"] == result_of(folder_tested(finetuned_run))["top1"]
    assert read_state(ours)["best"] == read_state(theirs)["best"]


def test_other_classes_or_another_config_are_refused(finetuned_run, start, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe\.layer_decay: 0\.9 -> 0\.5"):
        start(finetuned_run, "recipe.layer_decay=0.5")
    names = tmp_path / "names.txt"
    names.write_text("blue\ngreen\nred\nyellow\n")
    with pytest.raises(ConfigError, match=r"model\.num_classes: 3 -> 4"):
        start(finetuned_run, f"data.label_names={names}")
    names.write_text("red\ngreen\nblue\n")
    with pytest.raises(ManifestError, match="class 0 is 'red' for training and 'blue' in the"):
        start(finetuned_run, f"data.label_names={names}")


def test_an_encoder_of_another_size_is_refused_before_anything_is_written(start, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"differs \(its value -> here\)") as refusal:
        start(run, "model.encoder.dim=32", "model.patch_size=[1,8,8]")
    assert "  model.encoder.dim: 16 -> 32\n" in str(refusal.value)
    assert "  model.patch_size: (2, 8, 8) -> (1, 8, 8)\n" in str(refusal.value)
    assert not run.exists()


def test_evaluate_agrees_with_the_run_on_any_number_of_processes(
    finetuned_run, labelled_videos, run_tool, tmp_path
):
    checkpoint = finetuned_run / "checkpoints" / "last"
    arguments = [checkpoint, labelled_videos / "validation", "--weights", "average"]
    arguments += ["--views", "2x2", "--device", "cpu", "--workers", "0"]
    arguments += ["--output", tmp_path / "output"]
    code, text = run_tool("evaluate", *arguments, processes=4)
    assert code == 0, text
    assert text.count("top-1 ") == 1, "only the first process reports"
    expected, result = result_of(folder_tested(finetuned_run)), result_of(tmp_path / "output")
    for key in expected.keys() - {"test", "folder"}:
        assert result[key] == expected[key]
    assert rows_of(tmp_path / "output") == rows_of(folder_tested(finetuned_run))
    code, text = run_tool("evaluate", *arguments)
    assert code == 2
    assert "holds a result already; take another --output, or --overwrite" in text


def test_bad_videos_stop_a_test_with_their_list_or_count_as_wrong(
    finetuned_run, labelled_videos, call_tool, tmp_path
):
    videos = tmp_path / "videos"
    shutil.copytree(labelled_videos / "validation", videos)
    (videos / "red" / "a.mp4").write_text("no video")
    (videos / "blue" / "z.mp4").write_bytes(b"")
    checkpoint = finetuned_run / "checkpoints" / "last"
    output = tmp_path / "output"
    options = ["--weights", "average", "--views", "1x1", "--device", "cpu", "--output", output]
    code, text = call_tool("evaluate", checkpoint, videos, *options)
    assert code == 2
    assert "2 of 8 videos do not decode" in text
    assert f"{videos}/red/a.mp4: " in text
    assert f"{videos}/blue/z.mp4: the file is empty" in text
    assert not output.exists()

    code, text = call_tool("evaluate", checkpoint, videos, *options, "--exclude-bad-files")
    assert code == 0, text
    assert "2 of them do not decode: excluded, and counted as wrong" in text
    result = result_of(output)
    assert (result["videos"], result["excluded"]) == (8, 2)
    assert result["top1"] <= 6 / 8
    of_bad = [row for row in rows_of(output) if Path(row["path"]).name in ("a.mp4", "z.mp4")]
    assert [(row["prediction"], row["correct"]) for row in of_bad] == [("", "0"), ("", "0")]


def test_bad_validation_videos_stop_a_run_before_it_begins_or_are_excluded(
    start, config_of, labelled_videos, tmp_path
):
    run, videos = tmp_path / "run", tmp_path / "videos"
    shutil.copytree(labelled_videos / "validation", videos)
    (videos / "red" / "a.mp4").write_text("no video")
    (videos / "blue" / "z.mp4").write_bytes(b"")
    with pytest.raises(BadFilesError, match="2 of 8 videos do not decode"):
        start(run, f"data.validation={videos}")
    assert not (run / "metrics.jsonl").exists()
    options = [f"data.validation={videos}", "test.exclude_bad_files=true", "recipe.epochs=2"]
    evaluate_run(config_of(run, *options), start(run, *options))
    assert result_of(folder_tested(run))["excluded"] == 2
    measures = lines_of(run, "validation")[-1]
    assert measures["top1"] <= 6 / 8
    assert np.isfinite(measures["cross_entropy"])


def test_other_weights_under_the_same_name_are_refused(start, finished_run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree((finished_run / "checkpoints" / "last").resolve(), source)
    options = [tmp_path / "run", f"init_weights={source}", "recipe.epochs=2"]
    start(*options, "data.validation=null")
    shutil.copy(source / "teacher.safetensors", source / "model.safetensors")
    with pytest.raises(ConfigError, match="began with other weights than init_weights="):
        start(*options, "data.validation=null")


def test_a_classifier_may_start_another_and_keeps_its_head_for_the_same_classes(
    start, finetuned_run, labelled_videos, tmp_path, caplog
):
    caplog.set_level("INFO")
    options = [f"init_weights={finetuned_run / 'checkpoints' / 'last'}", "recipe.epochs=2"]
    start(tmp_path / "same", *options, "init_from=average")
    assert "start from the average's weights of" in caplog.text
    assert "start fresh: none" in caplog.text
    for other in ("train", "validation"):
        shutil.copytree(labelled_videos / other, tmp_path / other)
        (tmp_path / other / "red").rename(tmp_path / other / "a red one")
    options += [f"data.{split}={tmp_path / split}" for split in ("train", "validation")]
    start(tmp_path / "other", *options)
    assert "start fresh: head.weight, head.bias" in caplog.text
    assert "left out: head.bias, head.weight" in caplog.text


def test_probes_of_a_pretrained_encoder(finished_run, labelled_videos, call_tool, capsys, tmp_path):
    arguments = ["probe", finished_run / "checkpoints" / "last", "--device", "cpu"]
    arguments += ["--train", labelled_videos / "train", "--workers", "0"]
    arguments += ["--validation", labelled_videos / "validation"]
    with pytest.raises(SystemExit, match="2"):
        call_tool(*arguments, "--probes", "knn", "linear")
    assert "--probes linear trains, and leaves a run: say where" in capsys.readouterr().err
    code, text = call_tool(*arguments, "--probes", "knn")
    assert code == 2
    assert not (finished_run / "probes").exists()
    assert "--neighbours must be at most the number of training videos, 9, got 200" in text

    output = tmp_path / "probes"
    code, text = call_tool(
        *arguments,
        "--probes",
        "knn",
        "logistic",
        "linear",
        "attentive",
        "--neighbours",
        "3",
        "5",
        "--output",
        output,
        "--set",
        "recipe.batch_size=6",
        "recipe.epochs=12",
        "recipe.warmup_epochs=1",
        "engine.micro_batch=6",
        "engine.threads=1",
        "test.clips=1",
        "recipe.base_lr=1",
        "logging.trackers=[jsonl]",
    )
    assert code == 0, text
    found = json.loads((output / "probe.json").read_text())["probes"]
    names = ["3 nearest neighbours", "5 nearest neighbours", "logistic regression"]
    assert list(found) == [*names, "linear", "attentive"]
    assert all(result["videos"] == 6 for result in found.values())
    assert max(result["top1"] for result in found.values()) > 0.5
    for name, result in found.items():
        assert f"{name:28} {result['top1']:.3f}" in text
    kept = load_file(finished_run / "checkpoints/last/model.safetensors")
    for kind in ("linear", "attentive"):
        probed = load_file(output / kind / "checkpoints/last/model.safetensors")
        for key, tensor in probed.items():
            assert not key.startswith(("blocks.", "norm.", "patch_embed.")) or torch.equal(
                tensor, kept[key]
            )


def test_an_untrained_encoder_to_compare_with(finished_run):
    clips = torch.randint(256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    checkpoint, device = finished_run / "checkpoints" / "last", torch.device("cpu")
    features = {}
    for weights in ("student", "teacher", "untrained"):
        both = [
            Inference.load(open_trained(checkpoint, TrainedModel, weights), device, "fp32").pooled(
                clips
            )
            for _ in range(2)
        ]
        assert torch.equal(*both)
        features[weights] = both[0]
    assert not torch.allclose(features["student"], features["untrained"], atol=1e-3)
    assert not torch.allclose(features["student"], features["teacher"], atol=1e-3)


def test_a_comparison_of_starts(finetune_config, run_tool, tmp_path):
    output = tmp_path / "comparison"
    arguments = ["compare_pretraining", finetune_config, "recipe.epochs=2"]
    arguments += ["recipe.warmup_epochs=0.5", "--base-lrs", "0.1", "0.2", "--seeds", "0"]
    code, text = run_tool(*arguments, "--output", output)
    assert code == 0, text
    trials = json.loads((output / "comparison.json").read_text())
    assert [(trial["start"], trial["base_lr"]) for trial in trials] == [
        ("pretrained", 0.1),
        ("scratch", 0.1),
        ("pretrained", 0.2),
        ("scratch", 0.2),
    ]
    for trial in trials:
        run = output / f"{trial['start']}-lr{trial['base_lr']:g}-seed0"
        assert result_of(folder_tested(run))["top1"] == trial["top1"]
    assert text.count("<- best") == 2
    assert text.count("start from weights of") == 2
    assert text.count("the model starts from scratch") == 2
    again = run_tool(*arguments, "--output", output)[1]
    assert again.count("is complete, with 3 updates") == 4
    assert again[again.index("top-1 of each seed") :] == text[text.index("top-1 of each seed") :]


def test_a_run_goes_on_where_its_first_weights_are_gone(
    finetune, finetuned_run, finished_run, tmp_path
):
    run, source = tmp_path / "run", tmp_path / "source"
    shutil.copytree((finished_run / "checkpoints" / "last").resolve(), source)
    options = [f"init_weights={source}", "data.num_frames=6"]  # which resizes positions
    finish(finetune(run, *options, place="update", number="SIGTERM"), code=75)
    shutil.rmtree(source)
    output = finish(finetune(run, *options))
    assert "resuming at update" in output
    stored = (run / "checkpoints" / "last" / "config.yaml").read_text()
    assert "pretrained_grid:\n  - 2\n  - 4\n  - 4\n" in stored


def test_another_manifest_under_the_same_name_is_tested_anew(
    finetuned_run, config_of, labelled_videos, tmp_path, caplog
):
    run, videos = tmp_path / "run", tmp_path / "videos"
    shutil.copytree(finetuned_run, run, symlinks=True)
    shutil.copytree(labelled_videos / "validation", videos)
    shutil.rmtree(run / "test")
    config = config_of(run, f"test.manifest={videos}")
    evaluate_run(config, run)
    assert result_of(folder_tested(run))["videos"] == 6
    (videos / "red" / "100.mp4").unlink()
    with caplog.at_level("INFO"):
        evaluate_run(config, run)
    assert "testing the last checkpoint" in caplog.text
    assert result_of(folder_tested(run))["videos"] == 5


def test_nearest_neighbours_during_pretraining_are_reported_and_change_nothing(
    config_file, finished_run, labelled_videos, without_curves, tmp_path, caplog
):
    run = tmp_path / "run"
    given = [
        f"output_dir={run}",
        "data.validation=null",
        f"knn.train={labelled_videos / 'train'}",
        f"knn.validation={labelled_videos / 'validation'}",
        "knn.every_epochs=4",
        "knn.k=3",
    ]
    with caplog.at_level("INFO"):
        run_pretraining(load_config(PretrainConfig, config_file, given))
    probes = lines_of(run, "probe")
    assert [line["update"] for line in probes] == [14, 28]
    assert all(0 <= line["knn_top1"] <= 1 for line in probes)
    assert "frozen features: knn_top1 " in caplog.text
    ours, theirs = (
        load_file(folder / "checkpoints/last/model.safetensors") for folder in (run, finished_run)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
