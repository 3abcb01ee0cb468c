"""Imported weights start training and work in every tool, like those of our own runs."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import TransformerSize
from hpm_video.config.loading import load_any_config, load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.files.weights import CheckpointError
from hpm_video.models.positions import position_table, resize_positions
from hpm_video.recognition.trained_model import ClipChoice, TrainedModel, open_trained
from hpm_video.runs.pretraining import pretrain
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.checkpoint import sha256_of
from hpm_video.weights.families import LICENCES
from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import describe, import_weights, write_folder
from hpm_video.weights.verify import NOT_ASKED, compare

pytestmark = pytest.mark.slow

ENCODER, DECODER, PATCH = (48, 2), (24, 2), (2, 8, 8)
OPTIONS = ("--heads", 4, "--decoder-heads", 2, "--num-frames", 4, "--frame-size", 32, 32)
GIVEN = Overrides(heads=4, decoder_heads=2, num_frames=4, frame_size=(32, 32))
PRETRAIN = """
init_weights: {folder}
model:
  encoder: {{dim: 48, depth: 2, num_heads: 4}}
  decoder: {{dim: 24, depth: 2, num_heads: 2}}
  patch_size: {patch}
  positions: {positions}
  class_token: {image}
  conventions: {conventions}
data:
  train: {videos}/train
  num_frames: {frames}
  frame_stride: 1
  frame_size: [32, 32]
  crop: random_resized
  workers: 0
masking: {{ratio: 0.75}}
mining: {{momentum: warmup, last_momentum: 0.9}}
recipe: {{epochs: 2, batch_size: 7, base_lr: 0.01, min_lr: 0, warmup_epochs: 1}}
engine: {{precision: fp32, threads: 1, device: cpu}}
logging: {{trackers: [jsonl]}}
"""


@pytest.fixture
def files(layouts_of, tmp_path):
    """Files of the official projects."""
    of, fill = layouts_of, layouts_of.fill
    videomae = fill(of.videomae(ENCODER, DECODER, PATCH))
    hpm = of.hpm(ENCODER, DECODER, 8, 16)
    contents = {
        "videomae": {"model": videomae, "epoch": 799, "optimizer": {"state": {}}},
        "videomae_classifier": {"module": fill(of.videomae_classifier(ENCODER, PATCH, 3))},
        "hpm": {
            "state_dict": {f"module.{k}": v for k, v in fill(hpm).items()},
            "ema_state_dict": fill(hpm, seed=1),
            "epoch": 199,
            "model": "mae_vit_base_patch16",
        },
        "mae": {"model": fill(of.mae(ENCODER, DECODER, 8, 16))},
        "vit": {"model": fill(of.vit(ENCODER, 8, 16))},
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = tmp_path / f"{name}.pth"
        torch.save(content, paths[name])
    return paths


def config_for(folder, videos, *, image=False, path=None):
    text = PRETRAIN.format(
        folder=folder,
        videos=videos,
        patch=[1, 8, 8] if image else list(PATCH),
        positions="space_time" if image else "sequence",
        conventions="mae" if image else "videomae",
        frames=1 if image else 4,
        image=str(image).lower(),
    )
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["videomae", "hpm", "mae", "vit"])
def test_pretraining_begins_with_an_imported_folder(files, videos, run_tool, tmp_path, name):
    folder = tmp_path / "imported"
    image = name != "videomae"
    more = ("--decoder", 24, 2, 2) if name == "vit" else ()
    code, output = run_tool(
        "weights", "import", files[name], folder, "--no-parity", *OPTIONS, *more
    )
    assert code == 0, output
    assert "licence: " in output
    assert "CC-BY-NC 4.0" in output
    assert f"init_weights={folder}" in output
    assert (folder / "teacher.safetensors").is_file() == (name == "hpm")
    config = config_for(folder, videos, image=image, path=tmp_path / "config.yaml")
    run = tmp_path / "run"
    code, printed = run_tool("pretrain", config, f"output_dir={run}", "checkpoint.every_updates=1")
    assert code == 0, printed
    assert f"start from the weights of {folder}" in printed
    assert ("lack a loss predictor" in printed) == (name != "hpm")
    assert ("the teacher is of there too" in printed) == (name == "hpm")
    assert ("the teacher is a copy of the student" in printed) == (name != "hpm")
    assert len(list((run / "checkpoints").glob("update-*"))) >= 1
    sheet = run_tool(
        "show_masks", folder, next((videos / "train").iterdir()), "--output", tmp_path / "sheets"
    )
    assert sheet[0] == 0, sheet[1]
    labelled = run_tool(
        "extract_features", folder, videos / "validation", tmp_path / "features", "--workers", 0
    )
    assert labelled[0] == 0, labelled[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.num_heads=6", "model.encoder.num_heads: 4 -> 6"),
        ("model.decoder.num_heads=6", "model.decoder.num_heads: 2 -> 6"),
        ("model.positions=space_time", "model.positions: sequence -> space_time"),
    ],
)
def test_pretraining_of_another_model_than_the_imported_one_is_refused(
    files, videos, tmp_path, override, message
):
    folder = tmp_path / "imported"
    imported = import_weights(files["videomae"], GIVEN)
    write_folder(imported, folder, NOT_ASKED.as_table())
    path = config_for(folder, videos, path=tmp_path / "config.yaml")
    config = load_config(PretrainConfig, path, [override, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=message):
        pretrain(config)


def test_files_of_other_projects_are_to_be_imported_first(files, videos, run_tool, tmp_path):
    path = config_for(files["videomae"], videos, path=tmp_path / "config.yaml")
    config = load_config(PretrainConfig, path, [f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(CheckpointError, match="not a safetensors file.*weights.py import FILE"):
        pretrain(config)
    code, output = run_tool("weights", "export", files["mae"], tmp_path / "x", "--to", "timm")
    assert code == 2
    assert "weights.py import FILE FOLDER" in output


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_fine_tuning_from_learned_positions(
    files, labelled_videos, finetune_config, run_tool, tmp_path, size
):
    """They are taken over, and resized for frames of another size."""
    content = torch.load(files["vit"])
    content["model"]["pos_embed"] = torch.randn(1, 17, 48)
    torch.save(content, files["vit"])
    imported = import_weights(files["vit"], Overrides(heads=4, decoder=TransformerSize(24, 2, 2)))
    folder = tmp_path / "imported"
    write_folder(imported, folder, compare(imported, 1e-5).as_table())
    encoder = open_trained(folder, TrainedModel, clips=ClipChoice(frame_size=size)).encoder()
    grid = TokenGrid(1, size[0] // 8, 4)
    table = content["model"]["pos_embed"][0, 1:]
    found = encoder.positions("pos_embed", grid)
    assert torch.equal(found, resize_positions(table, TokenGrid(1, 4, 4), grid))
    config = yaml.safe_load(finetune_config.read_text())
    config["init_weights"] = str(folder)
    config["model"] |= {"encoder": {"dim": 48, "depth": 2, "num_heads": 4}, "patch_size": [1, 8, 8]}
    config["model"] |= {"positions": "given", "class_token": True, "conventions": "mae"}
    config["data"] |= {"num_frames": 1, "frame_stride": 1, "frame_size": list(size)}
    config["recipe"] |= {"epochs": 1, "warmup_epochs": 0}
    config["test"] = {"clips": 1, "crops": 1}
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(config))
    code, output = run_tool("finetune", path, f"output_dir={tmp_path / 'run'}")
    assert code == 0, output
    stored = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert torch.equal(stored["pos_embed"][0], table)


def test_the_folder_tells_everything(files, run_tool, tmp_path):
    folder = tmp_path / "imported"
    code, output = run_tool("weights", "import", files["videomae"], folder, *OPTIONS)
    assert code == 0, output
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["family"] == "videomae"
    assert origin["epoch"] == 799
    assert origin["left_out"] == {"optimizer": "no weights", "epoch": "no weights"}
    assert list(origin["sha256"]) == ["videomae.pth"]
    written = json.loads((folder / "state.json").read_text())["sha256"]
    assert written == {"model.safetensors": sha256_of(folder / "model.safetensors")}
    parity = json.loads((folder / "parity.json").read_text())
    if parity["not_checked"]:
        assert "transformers is not installed" in parity["not_checked"]
    else:
        assert parity["holds"]
        assert "VideoMAEForPreTraining" in parity["with_what"]
        assert "parity with transformers" in output
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["mining"]["predictor"] == "none"
    assert config["mining"]["target"] == "per_channel"


def test_fine_tuning_and_test_of_an_imported_classifier(
    files, labelled_videos, finetune_config, run_tool, tmp_path
):
    folder = tmp_path / "imported"
    source = files["videomae_classifier"]
    code, output = run_tool("weights", "import", source, folder, "--no-parity", *OPTIONS)
    assert code == 0, output
    assert "num_classes=3" in output
    assert (folder / "labels.txt").read_text() == "0\n1\n2\n"
    (folder / "labels.txt").write_text("blue\ngreen\nred\n")
    code, output = run_tool(
        "evaluate",
        folder,
        labelled_videos / "validation",
        "--workers",
        0,
        "--views",
        "1x1",
        "--frame-stride",
        1,
        "--output",
        tmp_path / "result",
    )
    assert code == 0, output
    config = yaml.safe_load(finetune_config.read_text())
    config["init_weights"] = str(folder)
    config["model"]["encoder"] = {"dim": 48, "depth": 2, "num_heads": 4}
    config["recipe"] |= {"epochs": 1, "warmup_epochs": 0}
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(config))
    code, text = run_tool("finetune", path, f"output_dir={tmp_path / 'run'}")
    assert code == 0, text
    assert "start fresh: none" in text


def test_probe_of_an_imported_encoder(files, labelled_videos, run_tool, tmp_path):
    folder = tmp_path / "imported"
    imported = import_weights(files["videomae"], GIVEN)
    write_folder(imported, folder, NOT_ASKED.as_table())
    code, output = run_tool(
        "probe",
        folder,
        "--train",
        labelled_videos / "train",
        "--probes",
        "knn",
        "--validation",
        labelled_videos / "validation",
        "--neighbours",
        1,
        "--workers",
        0,
        "--frame-stride",
        1,
        "--output",
        tmp_path / "probes",
    )
    assert code == 0, output


def test_weights_written_are_those_of_the_file(files, tmp_path):
    imported = import_weights(files["hpm"], GIVEN)
    write_folder(imported, tmp_path / "folder", NOT_ASKED.as_table())
    for name, expected in (("model", imported.model.tensors), ("teacher", imported.teacher)):
        stored = load_file(tmp_path / "folder" / f"{name}.safetensors")
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[key], expected[key]) for key in stored)
    with pytest.raises(CheckpointError, match="exists already"):
        write_folder(imported, tmp_path / "folder", NOT_ASKED.as_table())


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_folder_that_is_not_written(files, tmp_path, monkeypatch, error):
    imported = import_weights(files["mae"], GIVEN)

    def fail(*_):
        raise error

    monkeypatch.setattr("hpm_video.weights.importing.flush", fail)
    expected = error if error is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected):
        write_folder(imported, tmp_path / "new" / "folder", NOT_ASKED.as_table())
    assert list((tmp_path / "new").iterdir()) == []


def test_weights_that_are_not_finite_are_refused(files, tmp_path):
    content = torch.load(files["hpm"])
    content["ema_state_dict"]["mask_token"] *= torch.nan
    torch.save(content, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"nan\.pth: mask_token has numbers that are not f"):
        import_weights(tmp_path / "nan.pth", GIVEN)


def test_positions_at_another_number_of_frames(files, tmp_path):
    """Fixed codes come from the stated grid, in which other clips are placed."""
    imported = import_weights(files["videomae"], GIVEN)
    write_folder(imported, tmp_path / "folder", NOT_ASKED.as_table())
    config = load_any_config(tmp_path / "folder" / "config.yaml")
    assert config.data.clip_size == (4, 32, 32)
    source, grid = TokenGrid(2, 4, 4), TokenGrid(4, 6, 4)
    clips = ClipChoice(num_frames=8, frame_size=(48, 32))
    longer = open_trained(tmp_path / "folder", TrainedModel, clips=clips).encoder()
    table = longer.positions("pos_embed", grid)
    assert torch.equal(table, position_table(grid, 48, "sequence", source))
    assert not torch.equal(table, position_table(grid, 48, "sequence"))


def test_inspect(files, finished_run, run_tool, tmp_path):
    code, output = run_tool("weights", "inspect", files["videomae"], *OPTIONS)
    assert code == 0, output
    lines = describe(import_weights(files["videomae"], GIVEN))
    assert output.splitlines() == lines
    assert "encoder=TransformerSize(dim=48, depth=2, num_heads=4" in lines[0]
    assert "patch_size=(2, 8, 8)" in lines[0]
    assert "family: videomae" in lines
    assert "epoch: 799" in lines
    assert "4 frames of (32, 32)" in lines
    assert any(re.fullmatch(r"0\.\d M parameters", line) for line in lines)
    assert "left out: epoch, optimizer: no weights" in lines
    assert f"licence: {LICENCES['videomae']}" in lines
    lines = describe(import_weights(files["hpm"], GIVEN))
    assert {"prefix: module.", "teacher: True"} <= {*lines}
    folder, single = finished_run / "checkpoints" / "last", tmp_path / "one.safetensors"
    assert run_tool("weights", "export", folder, single, "--to", "file")[0] == 0
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    for ours in (folder, folder / "model.safetensors", single, tmp_path / "alone.safetensors"):
        code, output = run_tool("weights", "inspect", ours)
        assert code == 2, ours
        assert "of this package already" in output
    with pytest.raises(CheckpointError, match="videomae.pth: .* width 48 .* give --heads"):
        import_weights(files["videomae"])


def test_errors_of_a_layout_name_the_file(files, tmp_path):
    content = torch.load(files["mae"])
    content["model"]["novelty"] = torch.ones(2)
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth: .* of mae .*\n  left over novelty"):
        import_weights(tmp_path / "odd.pth", GIVEN)


def test_a_model_that_no_config_can_have_is_refused_before_it_is_compared(
    files, run_tool, tmp_path
):
    """Of its eight tokens none would stay visible."""
    options = ("--heads", 4, "--decoder-heads", 2, "--num-frames", 4, "--frame-size", 16, 16)
    code, output = run_tool("weights", "import", files["videomae"], tmp_path / "x", *options)
    assert code == 2, output
    assert "masking.ratio" in output
    assert "parity" not in output


def test_import_refuses_our_own(finished_run, run_tool, tmp_path):
    folder = finished_run / "checkpoints" / "last"
    code, output = run_tool("weights", "import", folder, tmp_path / "x")
    assert code == 2
    assert "give it as init_weights" in output


def test_errors_have_no_traceback(files, run_tool, tmp_path):
    code, output = run_tool("weights", "import", tmp_path / "none.pth", tmp_path / "x")
    assert code == 2
    assert "does not exist" in output
    assert "Traceback" not in output
    (tmp_path / "there").mkdir()
    code, output = run_tool("weights", "import", files["mae"], tmp_path / "there")
    assert code == 2
    assert "exists already" in output
    code, output = run_tool("weights", "import", files["mae"], tmp_path / "x", "--decoder", 7, 1, 3)
    assert code == 2
    assert "--decoder" in output
