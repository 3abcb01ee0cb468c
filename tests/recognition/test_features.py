"""``tools/extract_features.py`` on small real videos, with encoders that were never trained."""

import csv
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.config.data import DataConfig, PretrainDataConfig
from hpm_video.config.loading import load_config, save_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data import reading
from hpm_video.data.clips import ValidationClips
from hpm_video.data.loader import stream_parts
from hpm_video.data.manifest import Manifest, read_manifest
from hpm_video.data.reading import Footage, Views
from hpm_video.data.transforms import centre_box, cut, resize
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import open_video
from hpm_video.files.failures import BadFilesError, Failure
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.preparation.encode import write_video
from hpm_video.recognition.features import FeatureFolder, GrowingFile, Layout, file_names
from hpm_video.recognition.inference import Inference
from hpm_video.recognition.trained_model import ClipChoice, TrainedModel, open_trained
from hpm_video.tokens.patches import normalise
from hpm_video.training.checkpoint import save_checkpoint
from hpm_video.training.optim import OptimizerState

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
AUTOENCODER = """
model:
  encoder: {dim: 16, depth: 1, num_heads: 2}
  decoder: {dim: 16, depth: 1, num_heads: 2}
  patch_size: [2, 8, 8]
data: {num_frames: 4, frame_stride: 1, max_frame_stride: 3, frame_size: [32, 32]}
recipe: {epochs: 1, batch_size: 2, warmup_epochs: 0}
"""
CLASSIFIER = """
model: {encoder: {dim: 16, depth: 1, num_heads: 2}, patch_size: [2, 8, 8], drop_path: 0}
data: {num_frames: 4, frame_stride: 2, frame_size: [32, 32]}
recipe: {epochs: 1, batch_size: 2, warmup_epochs: 0}
test: {clips_per_pass: 3}
"""
TOKENS, DIM = 2 * 4 * 4, 16


@pytest.fixture(scope="module")
def main():
    path = ROOT / "tools" / "extract_features.py"
    specification = importlib.util.spec_from_file_location("extract_features_tool", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def start(*arguments, workers=0):
        return module.main([*map(str, arguments), "--workers", str(workers), "--device", "cpu"])

    return start


def save(folder, schema, text, build, *, names=(), update=7, overrides=()):
    (folder / "given.yaml").write_text(text)
    config = load_config(schema, folder / "given.yaml", [*overrides])
    save_config(config, folder / "config.yaml")
    attached = [folder / "config.yaml"]
    if names:
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names))
        attached.append(folder / "labels.txt")
    checkpoint = folder / f"update-{update:08d}"
    weights = {name: module.state_dict() for name, module in build(config).items()}
    save_checkpoint(
        checkpoint,
        weights,
        optimizer=OptimizerState(0, {}),
        state={"update": update},
        attached=attached,
    )
    return checkpoint


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    def build(config):
        teacher = build_student(replace(config, seed=1))
        return {"model": build_student(config), "teacher": teacher}

    return save(tmp_path_factory.mktemp("run"), PretrainConfig, AUTOENCODER, build)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    def build(config):
        return {"model": build_classifier(config, 2)}

    folder = tmp_path_factory.mktemp("classifier")
    return save(folder, FinetuneConfig, CLASSIFIER, build, names=("still", "moving"))


@pytest.fixture
def source(videos, tmp_path) -> Path:
    """A labelled manifest of 5 videos with 12 frames each."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i, video in enumerate(sorted((videos / "train").iterdir())[:5]):
        (folder / f"part_{i % 2}").mkdir(exist_ok=True)
        shutil.copy(video, folder / f"part_{i % 2}" / f"v_{i}.mp4")
    rows = [f"part_{i % 2}/v_{i}.mp4,{i % 2},class {i % 2}" for i in range(5)]
    (folder / "list.csv").write_text("path,label,label_name\n" + "\n".join(rows) + "\n")
    return folder / "list.csv"


def load(checkpoint, weights=None, clips=ClipChoice()):  # noqa: B008 - it is frozen
    return Inference.load(open_trained(checkpoint, TrainedModel, weights, clips=clips), CPU, "fp32")


def index_of(output):
    with (output / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(output):
    """All computed arrays, by name."""
    files = [path for path in output.rglob("*") if path.suffix in {".npy", ".csv"}]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def clip_of(video, indices, size=(32, 32)):
    with open_video(str(video)) as reader:
        frames = reader.read(indices)
    return resize(cut(frames, centre_box(*frames.shape[1:3], size)), size, "bilinear")


# --- Which windows ------------------------------------------------------------------------------


def windows_of(frames, num_frames, stride, every):
    return Footage(0, frames, stride).views(DataConfig(num_frames=num_frames), Views(every=every))


@pytest.mark.parametrize(
    ("frames", "every", "starts"),
    [
        (20, 4, [0, 4, 8, 12]),  # 12 + 4 * 2 == 20: the last one ends with the video
        (21, 4, [0, 4, 8, 12, 13]),
        (20, 5, [0, 5, 10, 12]),
        (20, 100, [0, 12]),
        (8, 1, [0]),
        (9, 1, [0, 1]),
        (3, 1, [0]),
        (1, 7, [0]),
    ],
)
def test_windows_of_4_frames_at_stride_2(frames, every, starts):
    windows = windows_of(frames, 4, 2, every)
    assert windows[:, 0].tolist() == starts
    last = frames - 1
    assert windows.tolist() == [
        [min(start + 2 * i, last - (last - start) % 2) for i in range(4)] for start in starts
    ]


@given(
    frames=st.integers(1, 400),
    num_frames=st.integers(1, 20),
    stride=st.integers(1, 8),
    every=st.integers(1, 60),
)
def test_windows_cover_the_video(frames, num_frames, stride, every):
    windows = windows_of(frames, num_frames, stride, every)
    span = num_frames * stride
    starts = windows[:, 0]
    assert windows.dtype == np.int64
    assert windows.shape[1] == num_frames
    assert windows.min() == 0
    assert windows.max() < frames
    assert starts[0] == 0
    assert starts[-1] + span >= frames, "the last frame is in the last window"
    assert frames < span or starts[-1] + span == frames, "which ends with the video"
    assert (starts[:-1] == every * np.arange(len(starts) - 1)).all()
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= every).all()


# --- Reading ------------------------------------------------------------------------------------


def parts_of(manifest, spec, chosen, clips_per_part=3):
    places = range(len(manifest))
    return list(stream_parts(manifest, places, spec, chosen, clips_per_part=clips_per_part))


@pytest.mark.parametrize("sampling", ["dense", "segments"])
@pytest.mark.parametrize(("first_run", "run_bytes"), [(32, 2**27), (2, 1), (3, 3 * 40 * 40 * 3)])
def test_views_are_those_of_a_test_however_few_frames_are_read_at_once(
    videos, monkeypatch, sampling, first_run, run_bytes
):
    monkeypatch.setattr(reading, "FIRST_RUN", first_run)
    monkeypatch.setattr(reading, "RUN_BYTES", run_bytes)
    manifest = read_manifest(videos / "validation").spread(2)
    spec = DataConfig(num_frames=4, frame_stride=2, frame_size=(24, 16), sampling=sampling)
    expected = ValidationClips(manifest, spec, views=Views(3, 2), seed=0)
    found = parts_of(manifest, spec, Views(3, 2))
    for place in range(2):
        own = [part for at, part in found if at == place]
        assert [len(part.clips) for part in own] == [2, 2, 2], "whole clips, at most 3 views"
        assert torch.equal(torch.cat([part.clips for part in own]), expected[place].clips)
        assert {(part.num_views, part.num_frames) for part in own} == {(6, 12)}


class LongVideo:
    """A thousand grey frames that show their number. From frame 800 on it may be broken."""

    num_frames = 1000
    height = width = 8
    reads: list[list[int]] = []  # noqa: RUF012

    def __init__(self, path, decoder):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def frames_stated(self, stated):
        return min(stated, self.num_frames) if stated > 0 else self.num_frames

    def read(self, indices):
        self.reads.append([*indices])
        if "broken" in self.path and max(indices) >= 800:
            raise DecodeError("broken from here on", self.path)
        frames = np.zeros((len(indices), 8, 8, 3), np.uint8)
        frames[...] = (np.asarray(indices) % 251)[:, None, None, None]
        return frames


def test_a_long_video_is_read_in_runs_and_each_frame_once(monkeypatch):
    monkeypatch.setattr(reading, "open_video", LongVideo)
    monkeypatch.setattr(reading, "FIRST_RUN", 5)
    monkeypatch.setattr(reading, "RUN_BYTES", 20 * 8 * 8 * 3)
    LongVideo.reads.clear()
    manifest = Manifest(("/long.mp4",), (-1,), (900,))
    data = DataConfig(num_frames=4, frame_stride=2, frame_size=(8, 8))
    found = [part for _, part in parts_of(manifest, data, Views(every=3), clips_per_part=7)]
    assert [len(run) for run in LongVideo.reads[:-1]] == [5] + [20] * (len(LongVideo.reads) - 2)
    read = [frame for run in LongVideo.reads for frame in run]
    windows = windows_of(900, 4, 2, 3)
    assert read == np.unique(windows).tolist(), "the manifest knows how many frames there are"
    clips = torch.cat([part.clips for part in found])
    assert clips[:, 0, :, 0, 0].tolist() == (windows % 251).tolist()
    assert np.concatenate([part.frames[:, 0] for part in found]).tolist() == windows[:, 0].tolist()
    assert {len(part.clips) for part in found[:-1]} == {7}


# --- Outputs ----------------------------------------------------------------------------


def test_by_default_a_vector_for_the_middle_clip(main, pretrained, source, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(pretrained, source, output) == 0
    encoder = load(pretrained)
    rows = index_of(output)
    assert [list(row.values())[1:] for row in rows] == [
        [f"features/part_{i % 2}+v_{i}.mp4.npy", f"{i % 2}", f"class {i % 2}", "12", "1"]
        for i in range(5)
    ]
    for row in rows:
        features = np.load(output / row["file"])
        assert features.dtype == np.float32
        clip = clip_of(row["path"], range(4, 8))
        assert np.array_equal(features, encoder.pooled(clip[None]).numpy())
    settings = json.loads((output / "settings.json").read_text())
    origin = {name: settings[name] for name in ("update", "weights", "clips", "crops", "dtype")}
    assert origin == {"update": 7, "weights": "student", "clips": 1, "crops": 1, "dtype": "float32"}
    assert not (output / "bad_files.csv").exists()
    assert read_manifest(output / "index.csv") == replace(
        read_manifest(source), num_frames=(12,) * 5
    )
    assert "features of 5 videos, 5 of them new" in capsys.readouterr().out


def test_sections_of_a_video_have_features_of_their_own(main, pretrained, source, tmp_path):
    rows, output = "part_0/v_0.mp4,0.2,\npart_0/v_0.mp4,,0.4\n", tmp_path / "out"
    source.write_text(f"path,start,end\n{rows}")
    assert main(pretrained, source, output, "--window-stride", 2, "--frame-stride", 1) == 0
    found = index_of(output)
    assert [Path(row["path"]).name for row in found] == ["v_0.mp4#t=0.2", "v_0.mp4#t=,0.4"]
    assert len({row["file"] for row in found}) == 2
    assert [row["num_frames"] for row in found] == ["12", "12"], "those of the file"
    with open_video(found[0]["path"].partition("#")[0]) as video:
        first, end = np.searchsorted(video.seconds(12), (0.2, 0.4)).tolist()
    starts = [np.load(output / row["starts"]).tolist() for row in found]
    assert starts == [
        [*range(first, 8, 2), *([8] if (8 - first) % 2 else [])] or [first],
        [*range(0, end - 4, 2), end - 4],
    ]
    assert read_manifest(output / "index.csv").files == read_manifest(source).files


def test_one_file_has_the_mean_of_the_views_with_labels_and_names(
    main, pretrained, source, tmp_path
):
    output = tmp_path / "out"
    assert main(pretrained, source, output, "--clips", 2, "--npz") == 0
    with np.load(output / "features.npz") as table:
        assert table["y"].tolist() == [0, 1, 0, 1, 0]
        assert table["names"].tolist() == ["class 0", "class 1"]
        assert table["files"].tolist() == [*read_manifest(source).files]
        for row, features in zip(index_of(output), table["X"], strict=True):
            assert np.allclose(np.load(output / row["file"]).mean(axis=0), features, atol=1e-6)


def test_views_and_tokens(main, pretrained, source, tmp_path):
    size = ("--clips", 2, "--crops", 3)
    assert main(pretrained, source, tmp_path / "pooled", *size) == 0
    assert main(pretrained, source, tmp_path / "tokens", *size, "--tokens") == 0
    for row in index_of(tmp_path / "tokens"):
        assert row["views"] == "6"
        tokens = np.load(tmp_path / "tokens" / row["file"])
        assert tokens.shape == (6, TOKENS, DIM)
        pooled = np.load(tmp_path / "pooled" / row["file"])
        assert np.allclose(tokens.mean(axis=1), pooled, atol=1e-6)


def test_tokens_are_those_of_the_clip_and_the_class_token_stands_for_it(tmp_path):
    overrides = ["model.class_token=true", "model.conventions=mae"]
    checkpoint = save(
        tmp_path,
        PretrainConfig,
        AUTOENCODER,
        lambda config: {"model": build_student(config)},
        overrides=overrides,
    )
    encoder = load(checkpoint)
    clips = torch.randint(256, (3, 3, 4, 32, 32), dtype=torch.uint8)
    pixels = normalise(clips, encoder.data.mean, encoder.data.std)
    encoded = encoder.model.encode(pixels)
    assert encoded.shape == (3, 1 + TOKENS, DIM)
    torch.testing.assert_close(encoder.tokens(clips), encoded[:, 1:])
    torch.testing.assert_close(encoder.pooled(clips), encoded[:, 0])


def test_validation_crops_of_another_size_keep_their_share_of_the_frame():
    data = PretrainDataConfig(num_frames=2, frame_size=(224, 224), validation_short_side=256)
    clips = ClipChoice(frame_size=(112, 112)).of(data)
    assert (clips.validation_short_side, clips.frame_size) == (128, (112, 112))
    assert ClipChoice(num_frames=4).of(data).validation_short_side == 256
    plain = PretrainDataConfig(num_frames=2, frame_size=(224, 224))
    assert ClipChoice(frame_size=(112, 112)).of(plain).validation_short_side is None


@pytest.mark.parametrize("tokens", [False, True])
def test_windows_are_the_clips_that_they_say(main, pretrained, source, tmp_path, tokens):
    output = tmp_path / "out"
    options = ("--window-stride", 3, "--frame-stride", 2, *(["--tokens"] if tokens else []))
    assert main(pretrained, source, output, *options) == 0
    encoder = load(pretrained, clips=ClipChoice(frame_stride=2))
    for row in index_of(output):
        features = np.load(output / row["file"])
        starts = np.load(output / row["starts"])
        assert starts.tolist() == [0, 3, 4]
        assert row["starts"] == row["file"].replace("features/", "starts/")
        assert features.shape == ((3, TOKENS, DIM) if tokens else (3, DIM))
        for of_window, start in zip(features, starts, strict=True):
            clip = clip_of(row["path"], range(start, start + 8, 2))[None]
            expected = encoder.tokens(clip) if tokens else encoder.pooled(clip)
            assert np.allclose(of_window, expected[0].numpy(), atol=1e-6)


def test_a_video_shorter_than_the_window_is_one_window(main, pretrained, tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
    write_video(tmp_path / "short" / "video.mp4", frames)
    options = ("--window-stride", 2, "--frame-stride", 3)
    assert main(pretrained, tmp_path / "short", tmp_path / "out", *options) == 0
    (row,) = index_of(tmp_path / "out")
    assert np.load(tmp_path / "out" / row["starts"]).tolist() == [0]
    encoder = load(pretrained)
    clip = clip_of(tmp_path / "short" / "video.mp4", [0, 3, 3, 3])
    expected = encoder.pooled(clip[None]).numpy()
    assert np.array_equal(np.load(tmp_path / "out" / row["file"]), expected)


def test_of_a_classifier_what_its_head_sees(main, classifier, source, tmp_path):
    assert main(classifier, source, tmp_path / "out", "--clips", 2) == 0
    encoder = load(classifier)
    clips = ValidationClips(read_manifest(source), encoder.data, views=Views(2, 1), seed=0)
    for row, sample in zip(index_of(tmp_path / "out"), clips, strict=True):
        features = torch.from_numpy(np.load(tmp_path / "out" / row["file"]))
        with torch.no_grad():
            found = encoder.model.head(features).softmax(dim=-1)
        assert torch.allclose(found, encoder.probabilities(sample.clips), atol=1e-6)


def test_teacher_other_clips_and_half_precision(main, pretrained, source, tmp_path):
    options = ("--weights", "teacher", "--num-frames", 6, "--frame-size", 24, 40)
    assert main(pretrained, source, tmp_path / "out", *options, "--dtype", "float16") == 0
    choice = ClipChoice(num_frames=6, frame_size=(24, 40))
    encoder = load(pretrained, weights="teacher", clips=choice)
    row = index_of(tmp_path / "out")[0]
    features = np.load(tmp_path / "out" / row["file"])
    assert features.dtype == np.float16
    clip = clip_of(row["path"], range(3, 9), (24, 40))[None]
    assert np.array_equal(features, encoder.pooled(clip).half().numpy())


def test_workers_and_passes_change_no_bit(main, pretrained, videos, tmp_path):
    for workers in (0, 2):
        output = tmp_path / str(workers)
        assert main(pretrained, videos, output, "--window-stride", 1, workers=workers) == 0
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "0")) == 2 * 18 + 1
    assert "features/train+texture_1.mp4-" in "".join(contents(tmp_path / "0")), "spaces are marked"


# --- Going on -----------------------------------------------------------------------------------


def test_after_a_kill_only_what_is_missing_is_computed_to_the_same_bits(
    main, pretrained, source, tmp_path, capsys
):
    output = tmp_path / "out"
    command = (pretrained, source, output, "--window-stride", 4)
    assert main(*command) == 0
    before = contents(output)
    deleted, cut, no_starts, unlisted, kept = (output / row["file"] for row in index_of(output))
    deleted.unlink()
    cut.write_bytes(cut.read_bytes()[:-5])
    (output / "starts" / no_starts.name).unlink()
    unfinished = output / "features" / f".part_0+v_0.{2**22 + 1}.part.npy"
    unfinished.write_bytes(b"half")
    journal = output / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:3], lines[4], lines[3][:-9]]))
    times = {path: path.stat().st_mtime_ns for path in (unlisted, kept)}
    capsys.readouterr()
    assert main(*command) == 0
    assert contents(output) == before
    assert not unfinished.exists()
    assert kept.stat().st_mtime_ns == times[kept]
    assert unlisted.stat().st_mtime_ns > times[unlisted]
    assert (
        "1 of 5 videos are there already\n4 videos, a clip every 4 frames"
        in capsys.readouterr().out
    )
    assert main(*command) == 0
    assert capsys.readouterr().out.startswith("5 of 5 videos are there already\n")


def test_what_does_not_fit_the_index_is_computed_again(main, pretrained, source, tmp_path):
    output = tmp_path / "out"
    assert main(pretrained, source, output, "--clips", 2) == 0
    before = contents(output)
    wrong_shape, wrong_dtype, *_ = (output / row["file"] for row in index_of(output))
    np.save(wrong_shape, np.zeros((1, DIM), np.float32))
    np.save(wrong_dtype, np.zeros((2, DIM)))
    assert main(pretrained, source, output, "--clips", 2) == 0
    assert contents(output) == before


def test_a_line_of_something_else_is_passed_over(main, pretrained, source, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(pretrained, source, output) == 0
    journal = output / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"x": 1}\n')
    capsys.readouterr()
    assert main(pretrained, source, output) == 0
    assert capsys.readouterr().out.startswith("5 of 5 videos are there already\n")


def test_half_a_line_spoils_nothing(tmp_path):
    manifest = Manifest(("/v/a.mp4", "/v/b.mp4"), (0, 1), (-1, -1))

    def claimed():
        layout = Layout(Views(), False, "float32", (2,))
        folder = FeatureFolder(tmp_path, manifest, Path("/v"), layout)
        folder.claim({})
        return folder

    folder = claimed()
    with pytest.raises(BlockingIOError, match="another program writes"):
        claimed()
    folder.close()
    index, journal = tmp_path / "index.csv", tmp_path / "journal.jsonl"
    header = index.read_text()
    index.write_text(header + "/v/a.mp4,features/a.m")
    journal.write_text('{"path": "/v/a.mp4", "num_fr')
    folder = claimed()
    assert index.read_text() == header
    growing = GrowingFile(folder.features_of("/v/b.mp4"), 1, folder.layout)
    growing.add(np.ones((1, 2), np.float32), np.zeros(1, np.int64))
    folder.finish(1, growing, num_frames=9)
    folder.close()
    folder = claimed()
    row = "/v/b.mp4,features/b.mp4.npy,1,,9,1\n"
    assert index.read_text() == header + row
    assert folder.missing() == [0]
    folder.close()


def test_a_stop_in_the_middle_leaves_whole_files_only(
    main, pretrained, source, tmp_path, monkeypatch
):
    """Ctrl-C comes while the second video's windows are computed one at a time."""
    output = tmp_path / "out"
    command = (pretrained, source, output, "--window-stride", 2, "--clips-per-pass", 1)
    assert main(*command) == 0
    before = contents(output)
    shutil.rmtree(output)
    calls = []

    original = Inference.pooled

    def pooled(self, clips):
        calls.append(len(clips))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(self, clips)

    monkeypatch.setattr(Inference, "pooled", pooled)
    assert main(*command) == 130
    assert set(calls) == {1}
    assert [path.name for path in (output / "features").iterdir()] == ["part_0+v_0.mp4.npy"]
    monkeypatch.undo()
    assert main(*command) == 0
    assert contents(output) == before


def test_other_settings_are_refused_with_what_differs(
    main, pretrained, classifier, source, tmp_path, capsys
):
    output = tmp_path / "out"
    assert main(pretrained, source, output) == 0
    before = contents(output)
    wrong = {
        ("dtype: float32 -> float16",): (pretrained, source, output, "--dtype", "float16"),
        ("clips: 1 -> 2",): (pretrained, source, output, "--clips", 2),
        ("clips: 1 -> None", "window_stride: None -> 2"): (
            pretrained,
            source,
            output,
            "--window-stride",
            2,
        ),
        ("features: pooled -> tokens",): (pretrained, source, output, "--tokens"),
        ("weights: student -> teacher", "weights_sha256: "): (
            pretrained,
            source,
            output,
            "--weights",
            "teacher",
        ),
        ("weights: student -> model", "frame_stride: 1 -> 2"): (classifier, source, output),
        (f"source: {source} -> {source.parent}",): (pretrained, source.parent, output),
    }
    capsys.readouterr()
    for differences, command in wrong.items():
        assert main(*command) == 2
        error = capsys.readouterr().err
        assert "holds features made with other settings:\n" in error
        assert all(f"\n  {difference}" in error for difference in differences)
    assert contents(output) == before
    moved = tmp_path / "moved"
    shutil.copytree(pretrained, moved)
    assert main(moved, source, output) == 0, "the same weights in another place"


def test_a_folder_of_something_else_is_left_alone(main, pretrained, source, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "index.csv").write_text("mine")
    assert main(pretrained, source, tmp_path / "thesis") == 2
    assert "is not empty, and holds no features" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["index.csv"]


# --- Bad files ----------------------------------------------------------------------------------


def test_bad_files_are_noted_and_tried_again(main, pretrained, source, tmp_path, capsys):
    output = tmp_path / "out"
    good = source.parent / "part_1" / "v_1.mp4"
    whole = good.read_bytes()
    good.write_bytes(b"no video at all")
    (source.parent / "part_0" / "v_2.mp4").unlink()
    assert main(pretrained, source, output) == 2
    captured = capsys.readouterr()
    assert "features of 3 videos, 3 of them new" in captured.out
    assert "\nerror: 2 of 5 videos do not decode:\n  " in captured.err
    with (output / "bad_files.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == ["v_1.mp4", "v_2.mp4"]
    assert rows[1]["reason"] == "there is no such file"
    assert [Path(row["path"]).name for row in index_of(output)] == [f"v_{i}.mp4" for i in (0, 3, 4)]
    good.write_bytes(whole)
    assert main(pretrained, source, output) == 2
    captured = capsys.readouterr()
    assert "3 of 5 videos are there already\n2 videos, 1 x 1 view of each" in captured.out
    assert "error: 1 of 5 videos" in captured.err
    assert [Path(row["path"]).name for row in index_of(output)] == [
        f"v_{i}.mp4" for i in (0, 1, 3, 4)
    ]
    rows = (output / "bad_files.csv").read_text().splitlines()
    assert len(rows) == 2
    assert "v_2.mp4" in rows[1]


def test_no_video_decodes(main, pretrained, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"")
    assert main(pretrained, tmp_path / "in", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "the file is empty" in captured.err
    assert "np.load" not in captured.out


def test_a_video_that_breaks_in_its_middle_leaves_nothing(
    main, pretrained, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, "open_video", LongVideo)
    (tmp_path / "list.csv").write_text("path\nwhole.mp4\nbroken.mp4\n")
    output = tmp_path / "out"
    assert main(pretrained, tmp_path / "list.csv", output, "--window-stride", 40) == 2
    assert [path.name for path in (output / "features").iterdir()] == ["whole.mp4.npy"]
    assert [path.name for path in (output / "starts").iterdir()] == ["whole.mp4.npy"]
    assert np.load(output / "features" / "whole.mp4.npy").shape == (26, DIM)


def test_of_very_many_bad_files_a_hundred_are_named():
    failures = [Failure(f"/v/{i}.mp4", "odd") for i in range(120)]
    lines = str(BadFilesError(failures, 500, "Repair them.")).splitlines()
    assert lines[0] == "120 of 500 videos do not decode:"
    assert len(lines) == 103
    assert lines[-2:] == ["  and 20 more", "Repair them."]


def test_values_that_half_precision_does_not_hold(main, source, tmp_path, capsys):
    def build(config):
        model = build_classifier(config, 2)
        with torch.no_grad():
            model.fc_norm.weight.fill_(1e6)
        return {"model": model}

    checkpoint = save(tmp_path, FinetuneConfig, CLASSIFIER, build, names=("a", "b"))
    assert main(checkpoint, source, tmp_path / "out", "--dtype", "float16") == 2
    error = capsys.readouterr().err
    assert "float16 ends at 65504" in error
    assert "take --dtype float32" in error
    assert not list((tmp_path / "out").rglob("*.npy"))


# --- Names --------------------------------------------------------------------------------------


def test_names_say_which_video():
    files = ("/d/a.mp4", "/d/b/a.mp4", "/d/b/a.avi", "/elsewhere/a.mp4", "/d/b/a.mp4")
    assert file_names(files, Path("/d")) == {
        "/d/a.mp4": "a.mp4",
        "/d/b/a.mp4": "b+a.mp4",
        "/d/b/a.avi": "b+a.avi",
        "/elsewhere/a.mp4": "+elsewhere+a.mp4",
    }


PARTS = st.text(st.sampled_from("aA_+é."), min_size=1, max_size=3).filter(
    lambda part: part not in {".", ".."}
)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), max_size=12))
def test_names_are_unique_and_stable(paths):
    files = [f"/d/{path}.mp4" for path in paths]
    names = file_names(files, Path("/d"))
    assert set(names) == set(files)
    folded = [name.casefold() for name in names.values()]
    assert len(set(folded)) == len(folded), "also on a disk that ignores capitals"
    assert all(set(name) <= set("+-._abcdefghijklmnopqrstuvwxyz0123456789") for name in folded)
    assert file_names(files[::-1], Path("/d")) == names, "whatever the order"


def test_names_that_differ_in_capitals_alone_differ_on_every_disk():
    names = file_names(["/d/a.mp4", "/d/A.mp4", "/d/b.mp4"], Path("/d"))
    assert names["/d/b.mp4"] == "b.mp4"
    assert names["/d/a.mp4"].casefold() != names["/d/A.mp4"].casefold()


def test_a_long_name_fits_a_file_system():
    files = ["/d/" + "/".join(["folder" * 10] * 20) + f"/{i}.mp4" for i in range(2)]
    first, second = file_names(files, Path("/d")).values()
    assert first != second
    assert len(first) < 200


# --- Wrong inputs -------------------------------------------------------------------------------


def test_weights_are_those_of_the_kind(main, pretrained, classifier, source, tmp_path, capsys):
    wrong = {
        (pretrained, "average"): "has no weights of 'average'; take --weights student or teacher",
        (classifier, "student"): "has no weights of 'student'; take --weights model",
        (classifier, "average"): "take --weights model",
    }
    for (checkpoint, weights), message in wrong.items():
        assert main(checkpoint, source, tmp_path / "out", "--weights", weights) == 2
        assert message in capsys.readouterr().err
    assert main(pretrained, source, tmp_path / "out", "--num-frames", 5) == 2
    assert "frames of a clip must be a multiple of its patch size, got 5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_clips_that_span_the_video_have_no_stride(main, source, tmp_path, capsys):
    def build(config):
        return {"model": build_classifier(config, 2)}

    checkpoint = save(
        tmp_path,
        FinetuneConfig,
        CLASSIFIER,
        build,
        names=("a", "b"),
        overrides=["data.sampling=segments"],
    )
    output = tmp_path / "out"
    assert main(checkpoint, source, output, "--frame-stride", 2) == 2
    assert (
        "data.sampling=segments, which has no stride; leave out --frame-stride"
        in capsys.readouterr().err
    )
    assert main(checkpoint, source, output, "--window-stride", 2) == 2
    assert "give --frame-stride" in capsys.readouterr().err
    assert main(checkpoint, source, output, "--window-stride", 2, "--frame-stride", 1) == 0


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--window-stride", "2", "--clips", "3"), "leave out --clips, --crops"),
        (("--window-stride", "2", "--crops", "3"), "leave out --clips, --crops"),
        (("--window-stride", "2", "--npz"), "--npz has one vector for each video"),
        (("--tokens", "--npz"), "leave out --window-stride, --tokens"),
        (("--clips", "0"), "at least 1, got '0'"),
        (("--num-frames", "x"), "at least 1, got 'x'"),
        (("--dtype", "float64"), "invalid choice"),
    ],
)
def test_wrong_options(main, pretrained, source, tmp_path, capsys, options, rule):
    with pytest.raises(SystemExit) as stop:
        main(pretrained, source, tmp_path / "out", *options)
    assert stop.value.code == 2
    assert rule in capsys.readouterr().err
