"""``tools/predict.py`` on small real videos, with classifiers that were never trained."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_config, save_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data import loader
from hpm_video.data.reading import Footage, Views
from hpm_video.data.transforms import cut, resize, view_boxes
from hpm_video.decoding.registry import open_video
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.recognition.inference import Inference
from hpm_video.recognition.trained_model import TrainedClassifier, open_trained
from hpm_video.training.checkpoint import save_checkpoint
from hpm_video.training.optim import OptimizerState
from hpm_video.workers.pool import USUAL

ROOT = Path(__file__).parents[2]
NAMES = ("still", "moves left", "moves right")
CLASSIFIER = """
model: {encoder: {dim: 16, depth: 1, num_heads: 2}, patch_size: [2, 8, 8], drop_path: 0}
data: {num_frames: 4, frame_stride: 1, frame_size: [32, 24]}
recipe: {epochs: 1, batch_size: 2, warmup_epochs: 0, average_momentum: 0.9}
test: {clips: 2, crops: 1, clips_per_pass: 4}
"""
AUTOENCODER = """
model:
  encoder: {dim: 16, depth: 1, num_heads: 2}
  decoder: {dim: 16, depth: 1, num_heads: 2}
  patch_size: [2, 8, 8]
data: {num_frames: 4, frame_stride: 1, frame_size: [32, 32]}
recipe: {epochs: 1, batch_size: 2, warmup_epochs: 0}
"""


@pytest.fixture(scope="module")
def main():
    path = ROOT / "tools" / "predict.py"
    module = importlib.util.module_from_spec(
        specification := importlib.util.spec_from_file_location("predict_tool", path)
    )
    specification.loader.exec_module(module)
    return lambda *arguments: module.main([*map(str, arguments)])


def with_random_head(config, seed):
    classifier = build_classifier(config, len(NAMES))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.nn.init.normal_(classifier.head.weight)
    return classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "given.yaml").write_text(CLASSIFIER)
    config = load_config(FinetuneConfig, folder / "given.yaml", [])
    save_config(config, folder / "config.yaml")
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    save_checkpoint(
        folder / "update-00000007",
        {
            "model": with_random_head(config, 1).state_dict(),
            "average": with_random_head(config, 2).state_dict(),
        },
        optimizer=OptimizerState(0, {}),
        state={"update": 7},
        attached=[folder / "config.yaml", folder / "labels.txt"],
    )
    return folder / "update-00000007"


@pytest.fixture
def validation(videos):
    return sorted((videos / "validation").iterdir())


def by_hand(checkpoint, video, clips, crops, weights="model"):
    """The mean of the softmax over the views, with one pass for each."""
    trained = open_trained(checkpoint, TrainedClassifier, weights)
    classifier = Inference.load(trained, torch.device("cpu"), "fp32")
    sums = np.zeros(len(NAMES))
    with open_video(str(video)) as reader:
        footage = Footage(0, reader.num_frames, 1)
        for indices in footage.views(DataConfig(num_frames=4), Views(clips)):
            frames = reader.read(indices)
            for box in view_boxes(frames.shape[1], frames.shape[2], (32, 24), crops):
                clip = resize(cut(frames, box), (32, 24), "bilinear")
                sums += classifier.probabilities(clip[None])[0].double().numpy()
    return sums / (clips * crops)


def written(path):
    found = json.loads(path.read_text())
    return {video["path"]: video["top"] for video in found["videos"]}, found


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ((), {"clips": 2, "crops": 1}),  # as the config's test says
        (("--views", "3x2"), {"clips": 3, "crops": 2}),
        (("--weights", "average"), {"clips": 2, "crops": 1, "weights": "average"}),
    ],
)
def test_probabilities_are_the_mean_over_the_views(
    main, classifier, validation, tmp_path, options, how
):
    assert main(classifier, *validation, "--json", tmp_path / "a" / "b.json", *options) == 0
    of_video, found = written(tmp_path / "a" / "b.json")
    assert list(of_video) == [*map(str, validation)]
    for video, top in of_video.items():
        expected = by_hand(classifier, video, **how)
        assert len({round(value, 4) for value in expected}) == 3, "the classes differ"
        order = np.argsort(-expected)
        assert [row["label"] for row in top] == order.tolist()
        assert [row["name"] for row in top] == [NAMES[i] for i in order]
        assert [row["probability"] for row in top] == pytest.approx(expected[order], abs=1e-6)
    assert (found["clips"], found["crops"]) == (how["clips"], how["crops"])
    assert (found["update"], found["precision"], found["bad_files"]) == (7, "fp32", [])
    assert found["weights"] == how.get("weights", "model")


def test_each_video_has_a_block_with_the_most_probable_first(main, classifier, validation, capsys):
    assert main(classifier, *validation[:2], "--top", 2, "--device", "cpu") == 0
    header, *blocks = capsys.readouterr().out.rstrip("\n").split("\n\n")
    clips = "2 x 1 views of each: 4 frames of 32 x 24 at stride 1"
    assert header == f"2 videos, {clips}; model of update 7; cpu, fp32"
    assert [block.splitlines()[0] for block in blocks] == [*map(str, validation[:2])]
    for block, video in zip(blocks, validation, strict=False):
        expected = np.sort(by_hand(classifier, video, 2, 1))[::-1]
        rows = block.splitlines()[1:]
        assert [float(row.split()[-1].rstrip("%")) for row in rows] == pytest.approx(
            100 * expected[:2], abs=0.051
        )
        assert all(re.fullmatch(r"  (still|moves left|moves right) +\d+\.\d%", row) for row in rows)
        assert len({len(row) for row in rows}) == 1, "columns line up"


def test_with_one_class_each_a_video_is_a_line(main, classifier, videos, capsys):
    assert main(classifier, videos / "train", "--top", 1, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 14
    assert all(re.match(r" +\d+\.\d%  (still|moves left|moves right) +/", line) for line in lines)


def test_folders_are_looked_through_and_no_video_is_named_twice(
    main, classifier, videos, validation, tmp_path
):
    out = tmp_path / "out.json"
    assert main(classifier, validation[2], videos, "--json", out, "--views", "1x1") == 0
    of_video, _ = written(out)
    train = sorted((videos / "train").iterdir())
    rest = [video for video in validation if video != validation[2]]
    assert list(of_video) == [*map(str, [validation[2], *train, *rest])]


def test_the_videos_of_a_manifest(main, classifier, validation, tmp_path):
    listed, out = tmp_path / "list.csv", tmp_path / "out.json"
    listed.write_text(f"path,label\n{validation[1]},7\n{validation[0]},\n")
    assert main(classifier, listed, validation[0], "--json", out, "--views", "1x1") == 0
    of_video, _ = written(out)
    assert list(of_video) == [str(validation[1]), str(validation[0])]


def test_sections_of_one_video_have_predictions_of_their_own(
    main, classifier, validation, tmp_path, capsys, monkeypatch
):
    with open_video(str(validation[0])) as video:
        half, length = video.seconds(video.num_frames)[[6, 11]]
    listed, out = tmp_path / "list.csv", tmp_path / "out.json"
    video = validation[0]
    listed.write_text(f"path,start,end\n{video},,\n{video},,{half}\n{video},{half},\n{video},99,\n")
    inputs = (listed, f"{video}#t=0,{half}")
    assert main(classifier, *inputs, "--json", out, "--views", "1x1", "--workers", 1) == 2
    of_video, found = written(out)
    names = [str(video), f"{video}#t=,{half:g}", f"{video}#t={half:g}", f"{video}#t=0,{half:g}"]
    assert list(of_video) == names
    tops = [tuple(row["probability"] for row in top) for top in of_video.values()]
    assert len({*tops}) == 3
    assert tops[1] == tops[3]
    assert [bad["path"] for bad in found["bad_files"]] == [f"{video}#t=99"]
    assert f"it lasts {length * 12 / 11:.2f} s, so it has no section from 99 s" in (
        capsys.readouterr().err
    )


def test_files_of_a_manifest_keep_their_rate_their_pace_and_their_slash(main, tmp_path):
    module = main.__closure__[0].cell_contents
    (tmp_path / "list.csv").write_text("path,fps,kept_every\na/,12.5,1\nb/,,4\n")
    manifest = module.find_videos([str(tmp_path / "list.csv")])
    a, b = f"{tmp_path}/a/", f"{tmp_path}/b/"
    assert manifest.files == (a, b)
    assert manifest.fps == {a: 12.5}
    assert manifest.kept_every == {b: 4}


def test_workers_change_nothing(main, classifier, videos, tmp_path):
    for workers in (0, 2):
        out = tmp_path / f"{workers}.json"
        assert main(classifier, videos, "--json", out, "--workers", workers) == 0
    assert (tmp_path / "0.json").read_text() == (tmp_path / "2.json").read_text()


def test_videos_that_do_not_decode_are_listed_and_the_others_are_predicted(
    main, classifier, validation, tmp_path, capsys
):
    bad = tmp_path / "broken.mp4"
    bad.write_bytes(validation[0].read_bytes()[:500])
    out = tmp_path / "out.json"
    command = (classifier, bad, validation[0], tmp_path / "nowhere.mp4", validation[1])
    assert main(*command, "--json", out) == 2
    of_video, found = written(out)
    assert list(of_video) == [str(validation[0]), str(validation[1])]
    assert [entry["path"] for entry in found["bad_files"]] == [
        str(bad),
        str(tmp_path / "nowhere.mp4"),
    ]
    output = capsys.readouterr()
    assert output.out.count("moves left") == 2
    first, *rows, _ = output.err.strip().splitlines()
    assert first == "error: 2 of 4 videos do not decode:"
    assert rows[0].startswith(f"  {bad}: ")
    assert rows[1] == f"  {tmp_path / 'nowhere.mp4'}: there is no such file"


def test_a_checkpoint_of_pretraining_is_refused_with_the_remedy(main, validation, tmp_path, capsys):
    (tmp_path / "given.yaml").write_text(AUTOENCODER)
    config = load_config(PretrainConfig, tmp_path / "given.yaml", [])
    save_config(config, tmp_path / "config.yaml")
    checkpoint = tmp_path / "update-00000003"
    save_checkpoint(
        checkpoint,
        {"model": build_student(config).state_dict()},
        optimizer=OptimizerState(0, {}),
        state={"update": 3},
        attached=[tmp_path / "config.yaml"],
    )
    assert main(checkpoint, validation[0]) == 2
    error = capsys.readouterr().err
    assert "is from pre-training, but a classifier is needed" in error
    assert f"./run_finetune.sh CONFIG init_weights={checkpoint}" in error


def test_no_average_was_kept(main, classifier, validation, tmp_path, capsys):
    without = tmp_path / "without"
    shutil.copytree(classifier, without)
    text = (without / "config.yaml").read_text()
    assert "average_momentum: 0.9" in text
    (without / "config.yaml").write_text(
        text.replace("average_momentum: 0.9", "average_momentum: null")
    )
    (without / "average.safetensors").unlink()
    assert main(without, validation[0], "--weights", "average") == 2
    assert "take --weights model" in capsys.readouterr().err


def test_wrong_inputs_are_reported_before_anything_is_computed(
    main, classifier, validation, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    wrong = {
        "give a config, or a checkpoint folder of a run": (tmp_path, validation[0]),
        "there are no videos in": (classifier, validation[0], tmp_path / "empty"),
        "there is no manifest or folder": (classifier, tmp_path / "none.csv"),
        "is a folder; give a file in it": (classifier, validation[0], "--json", tmp_path),
        "cannot be used here": (classifier, validation[0], "--device", "quantum"),
    }
    for message, command in wrong.items():
        assert main(*command) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.err.startswith("\nerror: ")
        assert not output.out


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--views", "5by3", "views are clips x crops, at least 1x1, such as 5x3"),
        ("--views", "0x3", "views are clips x crops"),
        ("--top", "0", "at least 1, got '0'"),
        ("--workers", "-1", "expected one argument|at least 0"),
        ("--precision", "fp8", "invalid choice"),
    ],
)
def test_wrong_options(main, classifier, validation, capsys, option, value, rule):
    with pytest.raises(SystemExit) as stop:
        main(classifier, validation[0], option, value)
    assert stop.value.code == 2
    assert re.search(rule, capsys.readouterr().err)


def test_one_video_too_is_decoded_within_limits(main, classifier, validation, monkeypatch):
    made = []

    class Noted(loader.Pool):
        def __init__(self, work, workers, limits, **options):
            made.append((workers, limits))
            super().__init__(work, workers, limits, **options)

    monkeypatch.setattr(loader, "Pool", Noted)
    assert main(classifier, validation[0], "--workers", "2") == 0
    assert made == [(1, USUAL)]
