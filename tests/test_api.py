"""The package as used from Python and as an installed wheel."""

import base64
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import hpm_video
from hpm_video.api import to_pixels
from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import save_config
from hpm_video.data.batch import ClipBatch
from hpm_video.decoding.registry import open_video
from hpm_video.files.plugins import REGISTERED
from hpm_video.files.weights import CheckpointError
from hpm_video.tokens.masking import STRATEGIES

ROOT = Path(__file__).parents[1]
PARTS = ("encoder", "decoder")
CLIP = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)


def test_the_public_names_stay():
    names = ["Model", "build_model", "build_objective", "load", "load_config", "register", "train"]
    assert hpm_video.__all__ == names
    assert all(hasattr(hpm_video, name) for name in names)
    assert set(names) <= set(dir(hpm_video))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hpm_video.nothing  # noqa: B018


@pytest.mark.parametrize("given", [CLIP, torch.from_numpy(CLIP), CLIP / 255, CLIP[None]])
def test_pixels_are_the_same_in_every_form(given):
    expected = torch.from_numpy(CLIP).permute(3, 0, 1, 2)[None]
    assert torch.equal(to_pixels(given, 3, 4), expected)
    axes = (3, 0, 1, 2) if given.ndim == 4 else (0, 4, 1, 2, 3)
    first = given.permute(axes) if isinstance(given, torch.Tensor) else given.transpose(axes)
    assert torch.equal(to_pixels(first, 3, 4), expected)


def test_arrays_that_torch_refuses_are_copied():
    read_only = CLIP.copy()
    read_only.setflags(write=False)
    assert torch.equal(to_pixels(read_only, 3, 4), to_pixels(CLIP, 3, 4))
    assert torch.equal(to_pixels(CLIP[..., ::-1], 3, 4), to_pixels(CLIP, 3, 4).flip(1))
    assert torch.equal(to_pixels([*CLIP], 3, 4), to_pixels(CLIP, 3, 4))


def test_the_number_of_frames_tells_the_axes():
    square = np.zeros((3, 6, 8, 3), np.uint8)
    assert to_pixels(square, 3, 3).shape == (1, 3, 3, 6, 8)
    assert to_pixels(square, 3, 6).shape == (1, 3, 6, 8, 3)
    with pytest.raises(ValueError, match=r"with 3 frames and 3 channels, got \(1, 3, 3, 8, 3\)"):
        to_pixels(np.zeros((3, 3, 8, 3), np.uint8), 3, 3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (CLIP[..., :2], ValueError, r"4 frames and 3 channels, got \(1, 4, 6, 8, 2\)"),
        (CLIP[1:], ValueError, r"4 frames and 3 channels, got \(1, 3, 6, 8, 3\)"),
        (CLIP[0], ValueError, r"got \(6, 8, 3\); an image is a clip of one frame"),
        (CLIP.astype(np.int64), TypeError, "uint8 or floats, got torch.int64"),
        (CLIP / 2, ValueError, r"lie in \[0, 1\], got 0 to 127.5"),
        (np.full(CLIP.shape, np.nan), ValueError, "got nan"),
    ],
)
def test_other_pixels_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        to_pixels(given, 3, 4)


def test_configs_are_found_by_name():
    config = hpm_video.load_config("k400_hpm_b", "recipe.epochs=100", "data.train=my.csv")
    assert (config.recipe.epochs, config.data.train) == (100, "my.csv")
    assert hpm_video.load_config("finetune/demo").output_dir == "runs/demo_finetune"
    with pytest.raises(ConfigError, match="take finetune/demo or pretrain/demo"):
        hpm_video.load_config("demo")
    with pytest.raises(ConfigError, match="there is no config file nothing"):
        hpm_video.load_config("nothing")


@pytest.fixture
def untrained(tmp_path):
    """Make a checkpoint with random weights of a tiny model, and load it."""

    def make(*overrides, teacher=True):
        sizes = [f"model.{part}={{dim: 16, depth: 1, num_heads: 2}}" for part in PARTS]
        config = hpm_video.load_config("pretrain/demo", *sizes, *overrides)
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        save_config(config, folder / "config.yaml")
        (folder / "state.json").write_text('{"update": 0}')
        weights = hpm_video.build_model(config).state_dict()
        for name in ("model", "teacher")[: 1 + teacher]:
            save_file(weights, folder / f"{name}.safetensors")
        return hpm_video.load(folder, device="cpu")

    return make


def clips_of(model):
    size = (model.config.data.num_frames, *model.config.data.frame_size, 3)
    return np.random.default_rng(0).integers(0, 256, (2, *size), dtype=np.uint8)


@pytest.mark.parametrize("view", ["all", "checkerboard"])
def test_a_teacher_sees_of_clips_what_it_saw_in_training(untrained, view):
    model = untrained(f"mining.teacher_sees={view}")
    clips = clips_of(model)
    teacher = hpm_video.load(model.trained.path, "teacher", device="cpu").trained.build()
    objective = hpm_video.build_objective(model.config, teacher)
    batch = ClipBatch(
        to_pixels(clips, 3, clips.shape[1]), torch.zeros(2), torch.zeros(2), ("",) * 2, ()
    )
    expected = objective.difficulty(batch).unflatten(1, model.grid.shape)
    assert torch.allclose(model.difficulty(clips), expected, atol=1e-6)


def test_without_a_teacher_nothing_is_hard(untrained):
    model = untrained(teacher=False)
    clips = clips_of(model)
    with pytest.raises(CheckpointError, match="has no weights of 'teacher'"):
        model.difficulty(clips)
    assert model.mask(clips, hard_fraction=0).shape == (2, *model.grid.shape)


def test_files_are_one_or_several_of_any_kind(untrained, tmp_path):
    model, file = untrained("data.num_frames=1", "model.patch_size=[1,8,8]"), tmp_path / "image.png"
    Image.fromarray(clips_of(model)[0, 0]).save(file)
    found = model.features_of([file])
    for given in (file, str(file), tmp_path.glob("*.png")):
        assert np.array_equal(model.features_of(given), found)
    with pytest.raises(ValueError, match="no files are given"):
        model.features_of(tmp_path.glob("*.mp4"))
    with pytest.raises(ValueError, match="with 1 frame and"):
        model.features(clips_of(model)[:, 0])


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="precision must be auto, fp32 or bf16, got 'fp16'"):
        hpm_video.load(tmp_path, precision="fp16")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="there is no folder .*checkpoints/last"):
        hpm_video.load(tmp_path / "run")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("my runs/demo", "/nothing"):
        with pytest.raises(CheckpointError, match=f"there is no {name} here"):
            hpm_video.load(name)


def test_a_saved_model_is_loaded_with_its_teacher_and_describes_itself(untrained, tmp_path):
    model = untrained()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run = model.trained.path.rename(tmp_path / "run" / "checkpoints" / "update-00000000")
    model = hpm_video.load(run, device="cpu")
    line = {"relative_error": 0.7, "student_ranking": 0.66, "student_ranking_by_motion": 0.57}
    line = {"kind": "validation", "update": 0, "epoch": 0.0, **line}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "run" / "curves.png").write_bytes(b"picture")
    saved = model.save_pretrained(tmp_path / "mine")
    clips, again = clips_of(model), hpm_video.Model.from_pretrained(saved, device="cpu")
    assert torch.equal(again.features(clips), model.features(clips))
    assert torch.equal(again.difficulty(clips), model.difficulty(clips))
    assert again.config == model.config
    card = (saved / "README.md").read_text()
    assert "| relative_error |  | 0.7 | 1 |" in card
    assert "| student_ranking |  | 0.66 | 0.57 |" in card
    assert 'hpm_video.load("mine")' in card
    assert "![Curves of the run](curves.png)" in card
    assert "this project's code is Apache-2.0" in card
    assert "masking:\n" in card
    with pytest.raises(CheckpointError, match="mine is a file or has files already"):
        model.save_pretrained(saved)
    with pytest.raises(CheckpointError, match="README.md is a file"):
        model.save_pretrained(saved / "README.md")


def test_the_card_has_the_licence_of_imported_weights_that_a_run_began_with(untrained, tmp_path):
    (tmp_path / "origin.json").write_text('{"licence": "CC-BY-NC 4.0"}')
    model = untrained(f"init_weights={tmp_path}")
    card = (model.save_pretrained(tmp_path / "mine") / "README.md").read_text()
    assert "CC-BY-NC 4.0" in card


class LoopbackHub(BaseHTTPRequestHandler):
    """The parts of the Hub that an upload and a download need."""

    stored: ClassVar[dict[str, bytes]] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            names = [each["path"] for each in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **mode} for name in names]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.stored[line["value"]["path"]] = content
                elif line["key"] == "deletedFile":
                    del self.stored[line["value"]["path"]]
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/mine", "commitOid": "0" * 40}
            )
        else:
            self.answer({"url": f"http://{self.headers['Host']}/me/mine"})

    def do_GET(self):
        _, found, name = self.path.partition("/resolve/" + "0" * 40 + "/")
        if found:
            self.answer(self.stored[name])
        elif "/tree/" in self.path:
            sizes = {name: len(content) for name, content in self.stored.items()}
            file = {"type": "file", "oid": "0" * 40}
            self.answer([{"path": name, "size": size, **file} for name, size in sizes.items()])
        else:
            files = [{"rfilename": name} for name in self.stored]
            self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": files})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", hashlib.sha256(data).hexdigest())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_a_model_goes_to_the_hub_and_comes_back(untrained, tmp_path, monkeypatch):
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = untrained()
    with HTTPServer(("127.0.0.1", 0), LoopbackHub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "of nobody")
        with pytest.raises(
            CheckpointError, match=r"cannot be uploaded to the Hub .*: hf auth login"
        ):
            model.push_to_hub("me/mine")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        LoopbackHub.stored.update(
            {"average.safetensors": b"of another model", "notes.txt": b"mine"}
        )
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert model.push_to_hub("me/mine").startswith(address)
            again = hpm_video.load("me/mine", device="cpu")
        finally:
            server.shutdown()
            thread.join()
    clips = clips_of(model)
    assert torch.equal(again.features(clips), model.features(clips))
    assert 'hpm_video.load("me/mine")' in LoopbackHub.stored["README.md"].decode()
    assert "average.safetensors" not in LoopbackHub.stored
    assert LoopbackHub.stored["notes.txt"] == b"mine"


def test_the_card_has_measures_of_the_own_run_alone(untrained, tmp_path):
    saved = untrained().save_pretrained(tmp_path / "models" / 'my "best"')
    line = {"kind": "validation", "update": 0, "epoch": 0.0, "relative_error": 0.7}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    again = hpm_video.load(saved, device="cpu").save_pretrained(tmp_path / "again")
    assert r'hpm_video.load("my \"best\"")' in (saved / "README.md").read_text()
    card = (again / "README.md").read_text()
    assert "No validation was recorded." in card
    assert "relative_error" not in card


@pytest.fixture(scope="module")
def model(finished_run):
    return hpm_video.load(finished_run, device="cpu")


@pytest.fixture(scope="module")
def frames(videos, model):
    with open_video(str(videos / "validation" / "texture 100.mp4")) as video:
        return video.read(range(4))


@pytest.mark.slow
def test_features_difficulty_and_masks_of_clips(model, frames):
    assert model.features(frames).shape == (1, 16)
    last, first = model.features(np.stack([frames, frames]), layers=(-1, 0))
    assert last.shape == first.shape == (2, 32, 16)
    assert torch.equal(last, first)  # the encoder has only one block
    normed = model._inference.model.norm(last[:1])
    assert torch.allclose(normed.mean(dim=1), model.features(frames), atol=1e-5)
    with pytest.raises(ValueError, match="has the blocks 0 to 0, got 1"):
        model.features(frames, layers=(1,))
    difficulty = model.difficulty(frames)
    assert difficulty.shape == (1, 2, 4, 4)
    hardest = model.mask(frames, hard_fraction=1)
    assert hardest.shape == difficulty.shape
    assert hardest.float().mean() == 0.75
    assert difficulty[hardest].min() >= difficulty[~hardest].max()
    drawn = [model.mask(frames, hard_fraction=0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="with 4 frames and 3 channels"):
        model.features(frames[:2])
    with pytest.raises(CheckpointError, match="given by a classifier"):
        model.probabilities(frames)


@pytest.mark.slow
def test_files_have_the_features_of_their_middle_clip(model, videos, frames):
    file = videos / "validation" / "texture 100.mp4"
    with open_video(str(file)) as video:
        middle = video.read(range(4, 8))
    found = model.features_of([file, file])
    assert found.shape == (2, 16)
    assert found[0] == pytest.approx(model.features(middle)[0].numpy(), abs=1e-5)
    assert found[0] != pytest.approx(model.features(frames)[0].numpy(), abs=1e-5)


@pytest.mark.slow
def test_a_classifier_names_what_it_sees(finetuned_run, labelled_videos, finished_run):
    classifier = hpm_video.load(finetuned_run, device="cpu")
    assert classifier.classes == ("blue", "green", "red")
    files = sorted((labelled_videos / "validation").rglob("*.mp4"))
    found = classifier.probabilities_of(files)
    assert found.shape == (6, 3)
    assert found.sum(axis=1) == pytest.approx(1)
    assert (found.argmax(axis=1) == [0, 0, 1, 1, 2, 2]).mean() >= 0.5
    with pytest.raises(CheckpointError, match="given by a masked autoencoder"):
        classifier.difficulty(CLIP)


@pytest.mark.slow
def test_a_run_from_python_is_the_run_of_the_command(config_file, finished_run, tmp_path):
    config = hpm_video.load_config(config_file, f"output_dir={tmp_path / 'run'}")
    run = hpm_video.train(config)
    ours, theirs = (path / "checkpoints/last/model.safetensors" for path in (run, finished_run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_models_and_objectives_are_built_of_configs():
    config = hpm_video.load_config("pretrain/demo")
    student = hpm_video.build_model(config)
    objective = hpm_video.build_objective(config, student)
    assert torch.equal(objective.ema.mask_token, student.mask_token)
    with pytest.raises(ConfigError, match="needs num_classes"):
        hpm_video.build_model(hpm_video.load_config("finetune/demo"))
    assert hpm_video.build_model(hpm_video.load_config("finetune/demo"), 5).head.out_features == 5


@pytest.mark.slow
def test_the_page_on_python_runs(finished_run, finetuned_run, videos, config_file, tmp_path):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names = {
        "runs/demo_finetune": str(finetuned_run),
        "runs/demo": str(finished_run),
        "my_video.mp4": str(videos / "validation" / "texture 100.mp4"),
        "pretrain/demo": str(config_file),
        "runs/mine": str(tmp_path / "run"),
    }
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    program = "\n".join(blocks)
    for name, stands_for in names.items():
        program = program.replace(name, stands_for)
    exec(compile(program, "docs/python.md", "exec"), {"__name__": "__main__"})  # noqa: S102
    del REGISTERED["mask_strategy", "sampled"], STRATEGIES["sampled"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_curves")
def test_the_notebook_runs(finished_run, labelled_videos, config_file, tmp_path, monkeypatch):
    """Each cell runs in turn on a tiny model and videos, without Jupyter's magic commands."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {
        "runs/demo": str(finished_run),
        "datasets/demo/{name}.csv": f"{labelled_videos}/{{name}}",
        '("train_images", "validation_images")': '("train", "validation")',
        "datasets/demo/validation.csv": str(labelled_videos / "validation"),
        "pretrain/demo": str(config_file),
        "runs/notebook": str(tmp_path / "run"),
        "batch_size: 24": "batch_size: 4",
        'plt.imread(run / "curves.png")': "[[0]]",
    }
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    space = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = re.sub(r"^%.*$", "", cell["source"], flags=re.MULTILINE)
            for name, stands_for in names.items():
                source = source.replace(name, stands_for)
            exec(compile(source, cell["id"], "exec"), space)  # noqa: S102
    del REGISTERED["mask_strategy", "sampled"], STRATEGIES["sampled"]
    with np.load(tmp_path / "run" / "features.npz") as table:
        assert table["X"].shape == (9, 16)
        assert table["names"].tolist() == ["blue", "green", "red"]
    assert space["accuracy"] >= 0.5


@pytest.mark.slow
def test_a_wheel_has_commands_and_configs(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path / "source"  # a copy: setuptools leaves folders beside its source
    source.mkdir()
    for name in ("hpm_video", "tools", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # this is how pip installs a wheel without scripts
        archive.extractall(site)
    libraries = Path(torch.__file__).parents[1]
    (site / "libraries.pth").write_text(f"{libraries}\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command) -> str:
        done = subprocess.run(
            [tmp_path / "env" / "bin" / "python", "-m", "hpm_video", *command],
            cwd=tmp_path / "env",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "extract-features" in run()
    plan = run("pretrain", "pretrain/demo", "--help")
    assert "usage: hpm-video pretrain" in plan
    report = run("doctor")
    assert f"hpm_video {hpm_video.__version__}" in report
    assert re.search(r"pyav +works", report)
    where = run_python(tmp_path / "env" / "bin" / "python", environment, tmp_path)
    assert where == f"{site}/hpm_video\nPretrainConfig\n"


def run_python(python, environment, folder) -> str:
    """Where an installed package lies, and the kind of a config found by its name."""
    code = (
        "import hpm_video; print(hpm_video.__path__[0]); "
        "print(type(hpm_video.load_config('k400_hpm_b')).__name__)"
    )
    return subprocess.run(
        [python, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
