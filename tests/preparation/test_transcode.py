"""``tools/transcode.py`` on small real videos whose frames carry their number."""

import contextlib
import csv
import hashlib
import importlib.util
import os
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from hpm_video.config.data import DataConfig
from hpm_video.data.clips import ValidationClips, VideoClips
from hpm_video.data.loader import stream_parts
from hpm_video.data.manifest import ManifestError, read_manifest
from hpm_video.data.reading import Views
from hpm_video.data.transforms import Box, ClipTransform, MultiScaleCrop
from hpm_video.decoding.locations import TarMember
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import open_video
from hpm_video.decoding.video_stream import Timed, VideoStream
from hpm_video.files.failures import Failure
from hpm_video.preparation import encode, findings, jobs, prepared_folder
from hpm_video.preparation.encode import fitted_size, write_video
from hpm_video.preparation.findings import stamp_of
from hpm_video.preparation.jobs import DiskFailure, remove
from hpm_video.preparation.output_names import output_names
from hpm_video.preparation.prepared_folder import PreparedFolder
from hpm_video.preparation.transcode import Job, Output, Recipe, Transcoder, at_rate
from hpm_video.workers.pool import Answer, Limits

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BITS = 8
RECIPE = Recipe(
    "files",
    short_side=40,
    fps=None,
    key_frames=5,
    crf=12,
    quality=95,
    shard_bytes=10**9,
    copy=False,
)


def painted(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth colours, and the number as black and white fields in the upper third."""
    y, x = np.mgrid[:height, :width]
    waves = (np.sin((x + 3 * number) / 17), np.sin((y + x) / 23), np.cos((y - 2 * number) / 19))
    frame = (128 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)
    for bit in range(BITS):
        columns = slice(bit * width // BITS, (bit + 1) * width // BITS)
        frame[: height // 3, columns] = 255 * (number >> bit & 1)
    return frame


def numbers_of(frames: np.ndarray) -> list[int]:
    """(K, H, W, 3) -> the number in each frame"""
    _, height, width, _ = frames.shape
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    row = frames[:, height // 6, middles].mean(axis=-1) > 127
    return (row * 2 ** np.arange(BITS)).sum(axis=1).tolist()


def write_source(
    path, frames=20, size=(64, 96), *, codec="libx264", times=None, audio=False, clock=1000
):
    """``times`` are in milliseconds, by default 25 per second. Key frames are far apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25)
        video.height, video.width = size
        video.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        video.codec_context.gop_size = 250
        video.codec_context.time_base = Fraction(1, clock)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(painted(number, *size), format="rgb24")
            frame.pts = 40 * number if times is None else times[number]
            frame.time_base = Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path


def turn(path: Path) -> None:
    """Mark an MP4 file as recorded with a camera turned by 90 degrees."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    upright = b"".join(n.to_bytes(4, "big") for n in (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30))
    turned = (0, 65536, 0, 2**32 - 65536, 0, 0, 0, 0, 2**30)
    place = data.index(upright, header)
    data[place : place + 36] = b"".join(n.to_bytes(4, "big") for n in turned)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "transcode.py"
    specification = importlib.util.spec_from_file_location("transcode_tool", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def start(tool):
    def start(*arguments, code=0):
        small = ["--short-side", "40", "--key-frames", "5", "--crf", "12", "--workers", "1"]
        assert tool.main([*map(str, arguments), *small]) == code

    return start


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A manifest of several kinds of videos; one has two rows, one is bad."""
    folder = tmp_path_factory.mktemp("source")
    write_source(folder / "a" / "plain.one.mp4", audio=True)
    write_source(folder / "a" / "turned.mp4")
    turn(folder / "a" / "turned.mp4")
    write_source(folder / "b" / "odd.mkv", size=(35, 33), codec="ffv1")
    times = [40 * i if i < 10 else 400 + 120 * (i - 10) for i in range(20)]
    write_source(folder / "b" / "uneven.mkv", times=times)
    write_source(folder / "b" / "small.mp4", frames=1, size=(16, 24))
    (folder / "b" / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom, and no more" * 9)
    (folder / "list.csv").write_text(
        "path,label,label_name,num_frames,speaker,codec\n"
        "a/plain.one.mp4,0,to stand,20,Ann,vp9\n"
        "a/turned.mp4,0,to stand,,Bob,vp9\n"
        "b/broken.mp4,1,to go,,Bob,vp9\n"
        "b/odd.mkv,1,to go,18,Ann,vp9\n"
        'b/uneven.mkv,,,,"Cyd, née D.",vp9\n'
        "b/small.mp4,1,to go,,,vp9\n"
        "a/plain.one.mp4,1,to go,20,Dan,vp9\n"
    )
    return folder / "list.csv"


def rows_of(output):
    with (output / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def failed_in(output):
    with (output / "failed.csv").open(newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


def contents(folder):
    """Digests of everything in a folder except notes of times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("journal.jsonl", "settings.json")
    }


def read_all(place):
    with open_video(str(place)) as video:
        return video.read(range(video.num_frames))


@pytest.fixture(scope="module")
def outputs(tool, source, tmp_path_factory):
    """The source in all three forms."""
    folder = tmp_path_factory.mktemp("outputs")
    for form in ("files", "frames", "shards"):
        arguments = [str(source), str(folder / form), "--to", form, "--short-side", "40"]
        arguments += ["--key-frames", "5", "--crf", "12", "--workers", "1", "--quality", "95"]
        assert tool.main(arguments) == 2  # one file is broken
    return folder


# --- Outputs ----------------------------------------------------------------------------

FILES = {
    "plain.one": ("a/plain.one", 20, (40, 60), 25.0),
    "turned": ("a/turned", 20, (60, 40), 25.0),
    "odd": ("b/odd", 18, (34, 32), 25.0),
    "uneven": ("b/uneven", 20, (40, 60), 19 / 1.48),
    "small": ("b/small", 1, (16, 24), 25.0),
}
ORDER = ["plain.one", "turned", "odd", "uneven", "small", "plain.one"]


@pytest.mark.parametrize("form", ["files", "frames", "shards"])
def test_manifest_says_what_is_there(outputs, form):
    rows = rows_of(outputs / form)
    manifest = read_manifest(outputs / form / "manifest.csv")
    assert manifest.labels == (0, 0, 1, -1, 1, 1)
    assert manifest.label_names == ("to stand", "to go")
    for name, row, place in zip(ORDER, rows, manifest.files, strict=True):
        path, num_frames, (height, width), fps = FILES[name]
        assert path.replace(".", "_") in row["path"].replace(".", "_")
        assert int(row["num_frames"]) == num_frames
        assert (int(row["height"]), int(row["width"])) == (height, width)
        assert float(row["fps"]) == pytest.approx(fps, rel=1e-3)
        with open_video(place) as video:
            assert video.num_frames == num_frames
            frames = video.read(range(num_frames))
            assert frames.shape[1:3] == (height, width)
        assert 1 <= int(row["key_frame_distance"]) <= (1 if form == "frames" else 5)
    assert [row["speaker"] for row in rows] == ["Ann", "Bob", "Ann", "Cyd, née D.", "", "Dan"]
    assert "codec" not in rows[0]  # no longer true


@pytest.mark.parametrize("form", ["files", "frames", "shards"])
def test_frames_are_those_of_the_source_one_to_one(outputs, source, form):
    before = read_manifest(source)
    before = {Path(file).stem: file for file in before.files}
    places = read_manifest(outputs / form / "manifest.csv").files
    for name, place in zip(ORDER, places, strict=True):
        frames, originals = read_all(place), read_all(before[name])[: FILES[name][1]]
        if name != "turned":
            assert numbers_of(frames) == list(range(len(frames)))
        height, width = frames.shape[1:3]
        wanted = np.stack(
            [np.array(Image.fromarray(f).resize((width, height), 3)) for f in originals]
        )
        assert np.abs(frames.astype(int) - wanted).mean() < 6


def test_files_have_no_sound_no_rotation_and_even_times(outputs):
    for path in (outputs / "files" / "videos").rglob("*.mp4"):
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        with av.open(str(path)) as container:
            assert [stream.type for stream in container.streams] == ["video"]
            video = container.streams.video[0]
            assert video.codec_context.name == "h264"
            assert video.codec_context.pix_fmt == "yuv420p"
            frames = list(container.decode(video))
            assert {frame.rotation for frame in frames} == {0}
            times = [frame.pts * frame.time_base for frame in frames]
        steps = {later - time for time, later in pairwise(times)}
        assert times[0] == 0
        assert len(steps) <= 1


def test_what_fails_is_listed_and_left_out(outputs):
    for form in ("files", "frames", "shards"):
        assert list(failed_in(outputs / form)) == ["broken.mp4"]
        left = {path.name for path in (outputs / form).iterdir() if path.name[0] == "."}
        assert not left


def test_frame_folders_hold_numbered_jpegs(outputs):
    folder = outputs / "frames" / "frames" / "b" / "odd"
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06d}.jpg" for i in range(18)]
    row = next(row for row in rows_of(outputs / "frames") if "odd" in row["path"])
    assert row["path"] == "frames/b/odd/"
    with Image.open(folder / "000000.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (32, 34))


def test_shards_have_the_layout_of_webdataset(outputs):
    with tarfile.open(outputs / "shards" / "shard-000000.tar") as tar:
        members = tar.getmembers()
        data = {member.name: tar.extractfile(member).read() for member in members}
    assert [member.name for member in members] == [
        "a/plain_one.cls",
        "a/plain_one.mp4",
        "a/turned.cls",
        "a/turned.mp4",
        "b/odd.cls",
        "b/odd.mp4",
        "b/uneven.mp4",
        "b/small.cls",
        "b/small.mp4",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert data["b/odd.cls"] == b"1"
    files = outputs / "files" / "videos"
    assert data["b/odd.mp4"] == (files / "b" / "odd.mp4").read_bytes()
    for place in read_manifest(outputs / "shards" / "manifest.csv").files:
        member = TarMember.parse(place)
        assert member.read() == data[member.name]


def test_colours_keep_their_meaning(tmp_path):
    """Full range, another matrix or none: red stays red."""
    red = np.zeros((32, 48, 3), np.uint8)
    red[:] = 220, 40, 60
    for name, form, matrix, value_range in [
        ("rgb", "rgb24", 0, 2),
        ("hd", "yuv420p", 1, 1),
        ("full", "yuvj420p", 5, 2),
    ]:
        path = tmp_path / f"{name}.mkv"
        with av.open(str(path), "w") as container:
            codec = {"rgb": "libx264rgb", "hd": "ffv1", "full": "mjpeg"}[name]
            video = container.add_stream(codec, rate=25)
            video.height, video.width, video.pix_fmt = 32, 48, form
            video.codec_context.color_range = value_range
            video.codec_context.colorspace = matrix
            frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(
                format=form, dst_colorspace=matrix or None, dst_color_range=value_range
            )
            container.mux(video.encode(frame))
            container.mux(video.encode(None))
        target = tmp_path / f"{name}.mp4"
        job = Job(str(path), str(tmp_path / "beside.mp4"), str(target))
        assert isinstance([*Transcoder(RECIPE)(job)][-1], Output)
        before, after = read_all(path)[0].astype(int), read_all(target)[0].astype(int)
        assert np.abs(after - before).max() <= 6, name
        assert np.abs(after - red).max() <= 8, name


def test_images_stay_images(start, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.fromarray(painted(number)).save(tmp_path / "in" / f"{number}.png")
    for form in ("files", "frames", "shards"):
        start(tmp_path / "in", tmp_path / form, "--to", form)
        places = read_manifest(tmp_path / form / "manifest.csv").files
        assert [numbers_of(read_all(place)) for place in places] == [[0], [1], [2]]
        assert [place.split("@")[0][-4:] for place in places] == [".jpg"] * 3
        assert [row["fps"] for row in rows_of(tmp_path / form)] == [""] * 3


def test_outputs_are_inputs_again(start, outputs, tmp_path):
    """This holds for folders of frames and members of tars."""
    for form in ("frames", "shards"):
        start(outputs / form / "manifest.csv", tmp_path / form, "--to", "files")
        before, after = rows_of(outputs / form), rows_of(tmp_path / form)
        same = ("label", "label_name", "num_frames", "width", "height", "fps", "speaker")
        assert [[row[name] for name in same] for row in before] == [
            [row[name] for name in same] for row in after
        ]
    assert after[0]["path"] == "videos/shard-000000/a/plain_one.mp4"


# --- Which frames -------------------------------------------------------------------------------


def stream_of(times):
    return iter([Timed(Fraction(time), name) for name, time in enumerate(times)])


@pytest.mark.parametrize(
    ("times", "rate", "fps", "wanted"),
    [
        ([0, 1, 2, 3], 1, 1, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 1, 2, [0, 0, 1, 1, 2, 2, 3, 3]),
        ([0, 1, 2, 3], 1, Fraction(1, 2), [0, 2]),
        ([5, 6, 7, 8], 1, 1, [0, 1, 2, 3]),  # it starts later
        ([0, 1, 5, 6], Fraction(1, 2), 1, [0, 1, 1, 1, 1, 2, 3, 3]),  # a still part in the middle
        ([0, Fraction("0.1"), Fraction("0.2"), 1], 3, 1, [0, 3]),
        ([0, Fraction("0.033"), Fraction("0.067"), Fraction("0.1")], 30, 30, [0, 1, 2, 3]),  # ms
        ([0], 25, 10, [0]),
        ([], 25, 10, []),
    ],
)
def test_frames_are_chosen_by_time(times, rate, fps, wanted):
    assert [*at_rate(stream_of(times), Fraction(fps), Fraction(rate))] == wanted


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=40),
    st.fractions(Fraction(1, 2), 90, max_denominator=1001),
)
def test_each_output_time_shows_the_last_frame_before_it(gaps, fps):
    times = [Fraction(sum(gaps[:i]), 1000) for i in range(len(gaps) + 1)]
    rate = Fraction(len(gaps)) / times[-1]
    for number, chosen in enumerate(at_rate(stream_of(times), fps, rate)):
        due = number / fps + Fraction(1, 1000)
        assert chosen == max(i for i, time in enumerate(times) if time <= due)
    assert number + 1 == pytest.approx(float((times[-1] + 1 / rate) * fps), abs=1.5)


def test_a_frame_shown_for_days_is_refused():
    with pytest.raises(DecodeError, match="shown for 864000 s"):
        list(at_rate(stream_of([0, 1, 864001]), Fraction(25), Fraction(25)))


def test_fps_takes_frames_by_time_also_of_uneven_ones(start, source, tmp_path):
    (tmp_path / "list.csv").write_text("path\nb/uneven.mkv\n")
    start(tmp_path / "list.csv", tmp_path / "out", "--fps", "10", "--root", source.parent)
    frames = read_all(tmp_path / "out" / "videos" / "b" / "uneven.mp4")
    shown = [40 * i if i < 10 else 400 + 120 * (i - 10) for i in range(20)]
    due = range(0, shown[-1] + 80, 100)
    wanted = [max(i for i, time in enumerate(shown) if time <= moment) for moment in due]
    assert numbers_of(frames) == wanted
    assert rows_of(tmp_path / "out")[0]["fps"] == "10"


def test_clips_of_every_second_frame_span_the_same_time(start, tmp_path):
    write_source(tmp_path / "a.mp4", frames=41)
    (tmp_path / "list.csv").write_text("path,kept_every,fps\na.mp4,,25\n")
    frames = [*range(0, 41, 2)]
    for form in ("files", "frames", "shards"):
        start(tmp_path / "list.csv", tmp_path / form, "--to", form, "--keep-every", "2")
        (row,) = rows_of(tmp_path / form)
        (place,) = read_manifest(tmp_path / form / "manifest.csv").files
        assert numbers_of(read_all(place)) == frames
        assert (row["kept_every"], row["fps"], row["num_frames"]) == ("2", "12.5", "21")
    start(tmp_path / "files" / "manifest.csv", tmp_path / "again", "--keep-every", "3")
    assert [row["kept_every"] for row in rows_of(tmp_path / "again")] == ["6"]
    start(tmp_path / "files" / "manifest.csv", tmp_path / "by_time", "--fps", "5")
    assert "kept_every" not in rows_of(tmp_path / "by_time")[0]

    for stride, longest, apart in [(4, None, {4}), (2, 6, {2, 4, 6})]:
        data = DataConfig(num_frames=4, frame_size=(64, 96), repeats=30, decoder="pyav")
        data = replace(data, frame_stride=stride, max_frame_stride=longest)
        manifest = read_manifest(tmp_path / "files" / "manifest.csv")
        clips = VideoClips(manifest, data, WholeFrame(), seed=3)[0].clips
        numbers = [numbers_of(clip.permute(1, 2, 3, 0).numpy()) for clip in clips]
        assert {b - a for clip in numbers for a, b in pairwise(clip)} == apart
        views = ValidationClips(manifest, data, seed=3)[0].clips
        assert numbers_of(views[0].permute(1, 2, 3, 0).numpy())[1] % stride == 0
        ((_, part),) = stream_parts(manifest, [0], data, Views(first=1), clips_per_part=1)
        shown = numbers_of(part.clips[0].permute(1, 2, 3, 0).numpy())
        assert shown == [*range(2, 2 + 4 * stride, stride)]
    data = replace(data, frame_stride=6, max_frame_stride=9)
    wanted = r"a\.mp4 holds one of every 2 frames .* data.max_frame_stride is 9. Make it a multiple"
    for refused in (
        lambda: VideoClips(manifest, data, WholeFrame(), seed=3),
        lambda: next(stream_parts(manifest, [0], data, Views(), clips_per_part=1)),
    ):
        with pytest.raises(ManifestError, match=wanted):
            refused()


class WholeFrame(ClipTransform):
    def draw(self, size, frame_size, draw):
        return Box(0, 0, *size), lambda frames: torch.from_numpy(frames).permute(3, 0, 1, 2)


def test_stream_and_reader_agree(tmp_path):
    """Frame i of a stream is frame i of the reader used in training."""
    path = write_source(tmp_path / "a.avi", codec="mpeg4", clock=25)
    stream = VideoStream(str(path))
    list(stream.survey())
    assert (stream.rate, stream.num_frames) == (25, 20)
    frames = [timed.frame.to_ndarray(format="rgb24") for timed in stream.frames()]
    stream.close()
    assert numbers_of(np.stack(frames)) == numbers_of(read_all(path)) == [*range(20)]


@pytest.mark.parametrize(
    ("size", "short_side", "fitted"),
    [
        ((720, 1280), 320, (320, 568)),
        ((1280, 720), 320, (568, 320)),
        ((240, 320), 320, (240, 320)),
        ((241, 321), 320, (240, 320)),
        ((720, 1280), 321, (320, 570)),
        ((1, 7), 320, (2, 6)),
        ((480, 640), 480, (480, 640)),
        ((2, 9000), 320, (2, 9000)),
    ],
)
def test_size_is_even_and_never_larger(size, short_side, fitted):
    assert fitted_size(size, short_side) == fitted


def test_of_sections_the_whole_file_is_prepared_once(start, source, tmp_path):
    listed = tmp_path / "sections.csv"
    rows = "".join(f"{source.parent}/b/uneven.mkv,{ends}\n" for ends in ("0,0.5", "0.5,", ","))
    listed.write_text(f"path,start,end\n{rows}")
    start(listed, tmp_path / "out", "--to", "frames")
    found = rows_of(tmp_path / "out")
    assert len({row["path"] for row in found}) == 1
    assert [(row["start"], row["end"]) for row in found] == [("0", "0.5"), ("0.5", ""), ("", "")]
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    data = DataConfig(num_frames=4, fps=8, frame_size=(32, 32))
    clips = ValidationClips(manifest, data, seed=0)
    assert len({clips[row].clips.numpy().tobytes() for row in range(3)}) == 3


# --- The same samples from all forms ------------------------------------------------------------


def clips_of(manifest):
    data = DataConfig(
        num_frames=4,
        frame_stride=1,
        max_frame_stride=3,
        frame_size=(32, 32),
        repeats=2,
        decoder="pyav",
        max_bad_share=0.0,
    )
    return VideoClips(read_manifest(manifest), data, MultiScaleCrop(flip=True), seed=3)


def test_samples_are_the_same_in_every_form(start, outputs, tmp_path):
    start(outputs / "files" / "manifest.csv", tmp_path / "copy", "--to", "shards", "--copy")
    files, frames, packed, copied = (
        clips_of(folder / "manifest.csv")
        for folder in (
            *(outputs / form for form in ("files", "frames", "shards")),
            tmp_path / "copy",
        )
    )
    for position in range(3 * len(files)):
        sample = files[position]
        for same in (packed[position], copied[position]):
            assert same.clips.equal(sample.clips)
            assert (same.keys, same.label) == (sample.keys, sample.label)
        similar = frames[position]
        assert (similar.keys, similar.label) == (sample.keys, sample.label)
        difference = (similar.clips.int() - sample.clips.int()).abs().float()
        assert difference.mean() < 6


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/data/a/b.mp4", "a/b"),
        ("/data/a/b.MP4", "a/b"),
        ("/data/a/b.c.webm", "a/b.c"),
        ("/elsewhere/b.mp4", "elsewhere/b"),
        ("/data/../../etc/b.mp4", "etc/b"),
        ("/data/a/../b.mp4", "b"),
        ("/data/a.mp4/", "a.mp4"),
        ("/data/s.tar::a/b.mp4@512+9", "s/a/b"),
        ("/data/s.tar::../../b.mp4@512+9", "s/b"),
        ("/data/s.tar::/etc/b.mp4@512+9", "s/etc/b"),
        ("/data/a\nb.mp4", "a_b-a457cf8888"),
        ("/data/a\x1b[2Jb.mp4", "a_[2Jb-373e7767f1"),
        ("/data/a\0.mp4", "a_-74d4d125ae"),
    ],
)
def test_name_of_an_output(place, name):
    assert output_names([place], "/data") == {place: name}


def test_names_differ_and_the_first_keeps_its_own():
    places = [f"/d/{name}" for name in ("a.mp4", "a.avi", "A.mkv", "b.mp4", "a.mp4")]
    names = output_names(places, "/d")
    assert list(names) == places[:4]
    assert names[places[0]] == "a"
    assert names[places[1]].startswith("a-")
    assert names[places[2]].startswith("A-")
    assert names.items() <= output_names([*places, "/d/a.wmv"], "/d").items()
    folders = output_names(["/d/a.mp4", "/d/a/b.mp4", "/d/c/d.mp4", "/d/c.mp4"], "/d")
    assert [name.partition("-")[0] for name in folders.values()] == ["a", "a+b", "c/d", "c"]
    assert output_names(["/d/v.1/a.b.c.mp4"], "/d", dots=False) == {"/d/v.1/a.b.c.mp4": "v.1/a_b_c"}


@given(
    st.lists(st.text("aAé./\\ \udc80-", max_size=6).map(lambda text: f"/d/{text}.mp4"), max_size=8),
    st.booleans(),
)
@example(["/d/a.mp4", "/d/" + "é" * 300 + ".mp4", "/d/..mp4", "/d/...mp4"], True)
def test_no_name_leaves_the_folder(places, dots):
    names = output_names(places, "/d", dots=dots)
    assert set(names) == set(places)
    for name in names.values():
        parts = name.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert all(len(part.encode()) < 250 for part in parts)
        assert dots or "." not in parts[-1]
    folded = [name.casefold() for name in names.values()]
    assert len({*folded}) == len(folded)
    assert not any(a.startswith(b + "/") for a in folded for b in folded)


def test_a_playlist_does_not_open_other_files(tmp_path):
    write_source(tmp_path / "secret.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    job = Job(str(tmp_path / "list.mp4"), str(tmp_path / "beside.mp4"), str(tmp_path / "out.mp4"))
    (failed,) = Transcoder(RECIPE)(job)
    assert isinstance(failed, Failure)


# --- Shards -------------------------------------------------------------------------------------


def test_shards_are_split_by_size_and_always_the_same(start, source, tmp_path):
    for name in ("one", "two"):
        start(source, tmp_path / name, "--to", "shards", "--shard-size", "0.00002", code=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    tars = sorted((tmp_path / "one").glob("*.tar"))
    assert [tar.name for tar in tars] == [f"shard-{i:06d}.tar" for i in range(len(tars))]
    assert len(tars) > 2
    assert all(tar.stat().st_size < 20_000 + 20_480 for tar in tars)  # a tar ends in zeros
    for place in read_manifest(tmp_path / "one" / "manifest.csv").files:
        assert TarMember.parse(place).read()


def test_long_and_foreign_names_are_readable(tmp_path):
    keys = ["x" * 140 + "/" + "y" * 140, "Straße/été", "a b/c@d+e::f"]
    for key in keys:
        (tmp_path / key).parent.mkdir(parents=True)
        (tmp_path / f"{key}.mp4").write_bytes(b"0123456789")
    copy = replace(RECIPE, form="shards", copy=True)
    with folder_of(tmp_path, [f"{key}.mp4" for key in keys], copy) as folder:
        folder.claim()
        for place in folder.missing():
            folder.note(place, Output(1, 2, 2, 25.0, 1, 10))
        folder.pack()
        folder.write_lists()
    for key, row in zip(keys, rows_of(tmp_path / "out"), strict=True):
        member = TarMember.parse(f"{tmp_path}/out/{row['path']}")
        assert member.name == f"{key}.mp4"
        assert member.read() == b"0123456789"


def test_copies_are_the_files_as_they_are(start, source, tmp_path):
    start(source, tmp_path / "out", "--to", "shards", "--copy", code=2)
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    before = [file for file in read_manifest(source).files if "broken" not in file]
    for place, file in zip(manifest.files, before, strict=True):
        assert TarMember.parse(place).read() == Path(file).read_bytes()
    assert manifest.num_frames == (20, 20, 18, 20, 1, 20)
    assert TarMember.parse(manifest.files[2]).name == "b/odd.mkv"
    assert list(failed_in(tmp_path / "out")) == ["broken.mp4"]


def test_folders_of_frames_are_not_copied(start, outputs, tmp_path):
    source = outputs / "frames" / "manifest.csv"
    start(source, tmp_path / "out", "--to", "shards", "--copy", code=2)
    assert set(failed_in(tmp_path / "out").values()) == {
        "a folder of frames cannot be packed as it is; leave out --copy"
    }


# --- Going on -----------------------------------------------------------------------------------


def test_a_second_start_does_nothing_again(start, source, tmp_path, capsys):
    for form in ("files", "frames", "shards"):
        output = tmp_path / form
        start(source, output, "--to", form, code=2)
        before = contents(output)
        times = {
            path: path.stat().st_mtime_ns for path in output.rglob("*.[mjt]*") if path.is_file()
        }
        start(source, output, "--to", form, code=2)
        assert "0 of them new" in capsys.readouterr().out
        assert contents(output) == before
        times.pop(output / "journal.jsonl")
        times.pop(output / "settings.json")
        assert times == {path: path.stat().st_mtime_ns for path in times}


def test_what_is_repaired_is_added(start, source, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "list.csv").write_text("path\na.mp4\nb.mp4\n")
    write_source(tmp_path / "a.mp4")
    start(tmp_path / "list.csv", output, "--to", "shards", code=2)
    assert failed_in(output) == {"b.mp4": "there is no such file"}
    first = (output / "shard-000000.tar").read_bytes()
    write_source(tmp_path / "b.mp4", frames=9)
    start(tmp_path / "list.csv", output, "--to", "shards")
    assert (output / "shard-000000.tar").read_bytes() == first
    assert [row["num_frames"] for row in rows_of(output)] == ["20", "9"]
    assert [row["path"][:17] for row in rows_of(output)] == [
        "shard-000000.tar:",
        "shard-000001.tar:",
    ]
    assert not (output / "failed.csv").exists()


def later(path):
    """Let a file look as if it was written a minute later."""
    moment = path.stat().st_mtime_ns + 60 * 10**9
    os.utime(path, ns=(moment, moment))


@pytest.mark.parametrize("options", [("--to", "files"), ("--to", "frames")])
def test_outputs_of_sources_that_changed_are_made_again(start, tmp_path, capsys, options):
    output = tmp_path / "out"
    (tmp_path / "list.csv").write_text("path,label\na.mp4,0\nb.mp4,1\n")
    for name in "ab":
        write_source(tmp_path / f"{name}.mp4")
    start(tmp_path / "list.csv", output, *options)
    before = {row["label"]: read_all(place) for row, place in labelled(output)}
    write_source(tmp_path / "a.mp4", frames=9)
    later(tmp_path / "a.mp4")
    capsys.readouterr()
    start(tmp_path / "list.csv", output, *options)
    assert "Done: 2 files, 1 of them new" in capsys.readouterr().out
    assert [row["num_frames"] for row in rows_of(output)] == ["9", "20"]
    after = {row["label"]: read_all(place) for row, place in labelled(output)}
    assert numbers_of(after["0"]) == list(range(9))
    assert (after["1"] == before["1"]).all()
    (tmp_path / "b.mp4").unlink()  # its outputs stay
    written = contents(output)
    start(tmp_path / "list.csv", output, *options)
    assert "0 of them new" in capsys.readouterr().out
    assert contents(output) == written


@pytest.mark.parametrize("options", [(), ("--copy",)])
def test_shards_of_which_something_changed_are_refused(start, tmp_path, capsys, options):
    output, (listed, again) = tmp_path / "out", ("path,label\na.mp4,0\n", "path,label\na.mp4,7\n")
    (tmp_path / "list.csv").write_text(listed)
    source = write_source(tmp_path / "a.mp4")
    arguments = (tmp_path / "list.csv", output, "--to", "shards", *options)
    start(*arguments)
    written = contents(output)
    (tmp_path / "list.csv").write_text(again)
    start(*arguments, code=2)
    assert f"content or label has changed, such as {source}. " in capsys.readouterr().err
    # This is what the message advises.
    manifest = output / "manifest.csv"
    (output / "new.csv").write_text(manifest.read_text().replace(",0,,20", ",7,,20"))
    start(output / "new.csv", tmp_path / "new", "--to", "shards", "--copy")
    assert read_manifest(tmp_path / "new" / "manifest.csv").labels == (7,)
    (row,) = labelled(output)
    (now,) = labelled(tmp_path / "new")
    assert TarMember.parse(row[1]).read() == TarMember.parse(now[1]).read()
    (output / "new.csv").unlink()

    (tmp_path / "list.csv").write_text(listed)
    start(*arguments)
    later(source)
    start(*arguments, code=2)
    assert "hold 1 file whose content or label" in capsys.readouterr().err
    source.unlink()  # its outputs stay
    start(*arguments)
    assert "0 of them new" in capsys.readouterr().out
    assert contents(output) == written


def labelled(output):
    return zip(rows_of(output), read_manifest(output / "manifest.csv").files, strict=True)


def test_going_on_with_folders_of_frames_looks_at_no_single_frame(
    start, tmp_path, monkeypatch, capsys
):
    write_source(tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text("path\na.mp4\n")
    arguments = [tmp_path / "list.csv", tmp_path / "out", "--to", "frames"]
    start(*arguments)
    monkeypatch.setattr(findings, "frames_in", None)
    start(*arguments)
    assert "0 of them new" in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / "out" / "frames" / "a" / "000003.jpg").unlink()
    start(*arguments)
    assert "1 of them new" in capsys.readouterr().out


def test_memory_is_in_the_same_unit_in_both_programs(tool, tmp_path, monkeypatch):
    limits = []

    class NoPool:
        def __init__(self, work, workers, limit, **_):
            limits.append(limit)
            raise BlockingIOError

    monkeypatch.setattr(jobs, "Pool", NoPool)
    write_source(tmp_path / "in" / "a.mp4")
    assert tool.main([str(tmp_path / "in"), str(tmp_path / "out"), "--memory", "2"]) == 2
    assert limits[0].memory == 2 * 2**30


def test_lost_outputs_are_made_again(start, source, tmp_path):
    output = tmp_path / "out"
    start(source, output, code=2)
    before = contents(output)
    (output / "videos" / "a" / "turned.mp4").write_bytes(b"cut off")
    (output / "videos" / "b" / "odd.mp4").unlink()
    with (output / "journal.jsonl").open("a") as file:
        file.write('{"place": "half a li')
    start(source, output, code=2)
    assert contents(output) == before


@pytest.mark.parametrize("form", ["files", "frames", "shards"])
def test_going_on_needs_no_encoder_that_gives_the_same_bytes(start, tmp_path, capsys, form):
    """Outputs that were lost, or not noted because of a kill, are made again, with other bytes."""
    now = replace(RECIPE, form=form, quality=90)
    before = replace(now, crf=40, quality=20)  # in place of another version of the encoders
    write_source(tmp_path / "a.mp4")
    write_source(tmp_path / "b.mp4", frames=9)
    (tmp_path / "list.csv").write_text("path\na.mp4\nb.mp4\n")
    start(tmp_path / "list.csv", tmp_path / "out", "--to", form)
    shutil.rmtree(tmp_path / "out")
    with folder_of(tmp_path, ["a.mp4", "b.mp4"], now) as folder:
        folder.claim()
        jobs = [folder.job(place) for place in folder.missing()]
        old = [last_of(job, before) for job in jobs]
        folder.note(jobs[0].place, old[0])  # and the second one exists without a note
        lost = folder.unpacked() if form == "shards" else {}
        for name, places in lost.items():  # nor is there a note of the first one's shard
            folder._write_shard(folder.path / name, places)
    remove(jobs[0].target)
    capsys.readouterr()
    start(tmp_path / "list.csv", tmp_path / "out", "--to", form)
    assert "2 files, 2 of them new" in capsys.readouterr().out
    places = read_manifest(tmp_path / "out" / "manifest.csv").files
    assert [numbers_of(read_all(place)) for place in places] == [[*range(20)], [*range(9)]]
    assert all(stamp_of(p).bytes > made.bytes for p, made in zip(places, old, strict=True))
    start(tmp_path / "list.csv", tmp_path / "out", "--to", form)
    assert "0 of them new" in capsys.readouterr().out


def test_other_settings_are_refused_by_name(tool, source, tmp_path, capsys):
    output = tmp_path / "out"
    small = [str(source), str(output), "--short-side", "40", "--workers", "1"]
    assert tool.main(small) == 2
    before = contents(output)
    capsys.readouterr()
    assert tool.main([*small[:-4], "--short-side", "20", "--crf", "30", "--workers", "1"]) == 2
    message = capsys.readouterr().err
    assert "  short_side: 40 -> 20" in message
    assert "  crf: 20 -> 30" in message
    assert contents(output) == before


def test_a_folder_of_something_else_is_left_alone(start, source, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("important")
    start(source, tmp_path, code=2)
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def folder_of(path, files, recipe=RECIPE):
    (path / "list.csv").write_text("path\n" + "".join(f"{name}\n" for name in files))
    return contextlib.closing(PreparedFolder(path / "out", recipe, path / "list.csv", None))


def test_two_programs_do_not_write_to_one_folder(tmp_path):
    with folder_of(tmp_path, ["a.mp4"]) as first, folder_of(tmp_path, ["a.mp4"]) as second:
        first.claim()
        with pytest.raises(BlockingIOError, match="another program"):
            second.claim()


HOSTILE = """
import ctypes, os, time
from pathlib import Path
from hpm_video.preparation.transcode import Transcoder

class Waiting(Transcoder):
    def __call__(self, job):
        while not Path(job.place).with_suffix(".open").exists():
            time.sleep(0.01)
        yield from super().__call__(job)

class Hostile(Transcoder):
    def __call__(self, job):
        name = os.path.basename(job.place)  # the test chooses the folder's name
        if "hangs" in name:
            open(job.temporary, "wb").write(b"half a file")
            Path(job.place).with_name(f"{os.getpid()}.hangs").touch()
            ctypes.PyDLL(None).sleep(10**6)  # with the interpreter's lock
        if "crashes" in name:
            os.abort()
        if "eats" in name:
            bytearray(2**40)
        yield from super().__call__(job)
"""


def test_a_file_that_hangs_or_crashes_is_listed_and_the_others_are_done(
    tmp_path, monkeypatch, pool_clock
):
    pool_clock.run_while_one_hangs(tmp_path)
    (tmp_path / "hostile_work.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("hostile_work").Hostile(RECIPE)
    names = [f"{name}.mp4" for name in ("a", "hangs", "crashes", "eats", "b")]
    for name in names:
        write_source(tmp_path / name)
    monkeypatch.setattr(prepared_folder, "Transcoder", lambda recipe: work)
    with folder_of(tmp_path, names) as folder:
        folder.claim()
        folder.make(1, Limits(seconds=3))
        folder.write_lists()
    failed = failed_in(tmp_path / "out")
    assert failed["hangs.mp4"] == "it took longer than 3 s"
    assert "SIGABRT" in failed["crashes.mp4"]
    assert "memory" in failed["eats.mp4"]
    assert [row["path"] for row in rows_of(tmp_path / "out")] == ["videos/a.mp4", "videos/b.mp4"]
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_what_a_lost_process_left_does_not_disturb_the_next_attempt(tmp_path):
    path = write_source(tmp_path / "a.mp4")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "000099.jpg").touch()
    job = Job(str(path), f"{tmp_path}/beside/", f"{tmp_path}/out/")
    assert isinstance(last_of(job, replace(RECIPE, form="frames")), Output)
    assert len([*(tmp_path / "out").iterdir()]) == 20


WAITING = """
import sys
sys.path.insert(0, "tools")
import transcode, waiting_work
from hpm_video.preparation import prepared_folder
prepared_folder.Transcoder = waiting_work.Waiting
sys.exit(transcode.main(sys.argv[1:]))
"""


@pytest.fixture
def launch(start_program, tmp_path):
    """Each file waits for one with the suffix ``.open``, except in trial encodings."""
    place = tmp_path / "import"  # holds the package, but not the folder `datasets`
    place.mkdir()
    (place / "hpm_video").symlink_to(ROOT / "hpm_video")
    (place / "waiting_work.py").write_text(HOSTILE)

    def start(*arguments):
        command = ("-c", WAITING, *arguments, "--workers=1", "--seconds=1e6")
        return start_program(*command, PYTHONPATH=str(place), OWN_SERVER="yes")

    return start


def wait_for(what):
    while not what():
        time.sleep(0.02)


def journal_lines(output):
    path = output / "journal.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def processes_of(group):
    """The processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_a_stopped_run_goes_on_and_ends_alike(launch, tool, tmp_path, capsys):
    """The first run is stopped by Ctrl-C, the second by kill -9; the third ends."""
    names = [f"{i}.mp4" for i in range(12)]
    for i, name in enumerate(names):
        write_source(tmp_path / name, frames=40 + i, size=(180, 240))
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    settings = ["--to", "shards", "--short-side", "100", "--shard-size", "0.0001"]
    output = tmp_path / "out"
    for done, number, code in [(3, signal.SIGINT, 130), (6, signal.SIGKILL, -9)]:
        for name in names[:done]:
            (tmp_path / name).with_suffix(".open").touch()
        process = launch(tmp_path / "list.csv", output, *settings)
        wait_for(lambda expected=done: journal_lines(output) >= expected)
        os.kill(process.pid, number)
        message, _ = process.communicate()
        assert process.returncode == code, message
        wait_for(lambda group=process.pid: not processes_of(group))
        assert journal_lines(output) == done
    arguments = [str(tmp_path / "list.csv"), "--workers", "1", *settings]
    assert tool.main([*arguments, str(output)]) == 0
    assert f"Done: 12 files, {12 - done} of them new" in capsys.readouterr().out
    assert tool.main([*arguments, str(tmp_path / "whole")]) == 0
    assert contents(output) == contents(tmp_path / "whole")


# --- Estimates, and what goes wrong -------------------------------------------------------------


def last_of(job, recipe=RECIPE):
    return [*Transcoder(recipe)(job)][-1]


@pytest.mark.parametrize("form", ["files", "frames"])
def test_a_full_disk_ends_the_run(tmp_path, monkeypatch, form):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode.VideoWriter, "write", full)
    monkeypatch.setattr(Image.Image, "save", full)
    path = write_source(tmp_path / "a.mp4")
    end = ".mp4" if form == "files" else "/"
    job = Job(str(path), f"{tmp_path}/beside{end}", f"{tmp_path}/out{end}")
    assert isinstance(last_of(job), DiskFailure)
    assert not (tmp_path / f"out{end}").exists()

    broken = Answer(str(path), DiskFailure("", "No space left on device"), is_last=True)
    pool = SimpleNamespace(submit=lambda *_: None, next=lambda: broken)
    monkeypatch.setattr(jobs, "Pool", lambda *_, **__: contextlib.nullcontext(pool))
    with folder_of(tmp_path, ["a.mp4"]) as folder:
        folder.claim()
        with pytest.raises(OSError, match="No space left on device. What is done is kept"):
            folder.make(1, Limits())


def test_an_output_that_is_not_what_it_should_be_is_no_row(tmp_path, monkeypatch):
    original = encode.VideoWriter.write

    def drops_one(self, frame):
        if self.count != 3 or hasattr(self, "dropped"):
            original(self, frame)
        else:
            self.dropped = True
            self.count += 1

    monkeypatch.setattr(encode.VideoWriter, "write", drops_one)
    path = write_source(tmp_path / "a.mp4")
    failed = last_of(Job(str(path), f"{tmp_path}/beside.mp4", f"{tmp_path}/out.mp4"))
    assert isinstance(failed, Failure)
    assert "instead of" in failed.reason
    assert not (tmp_path / "out.mp4").exists()


def test_a_file_that_is_cut_off_is_reported(tmp_path):
    path = write_source(tmp_path / "a.mp4", frames=60)
    write_video(path, [painted(i) for i in range(60)], quick=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    made = last_of(Job(str(path), f"{tmp_path}/beside.mp4", f"{tmp_path}/out.mp4"))
    if isinstance(made, Output):
        assert 0 < made.num_frames < 60
        assert made.note.startswith(f"{60 - made.num_frames} of 60 frames are lost (")
    else:
        assert isinstance(made, Failure)


def test_long_work_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_STEPS", 0.0)
    path = write_source(tmp_path / "a.mp4")
    steps = [*Transcoder(RECIPE)(Job(str(path), f"{tmp_path}/b.mp4", f"{tmp_path}/out.mp4"))]
    assert set(steps[:-1]) == {None}
    assert len(steps) > 40  # scanned, encoded, and scanned again


def test_write_video_takes_a_fraction_and_puts_the_index_in_front(tmp_path):
    frames = [painted(i, 32, 48) for i in range(4)]
    write_video(tmp_path / "a.mp4", frames, fps=Fraction(30000, 1001), quick=True)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
    write_video(tmp_path / "b.mp4", frames)
    data = (tmp_path / "b.mp4").read_bytes()
    assert data.index(b"mdat") < data.index(b"moov")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--short-side", "0"),
        ("--fps", "0"),
        ("--fps", "1/0"),
        ("--fps", "0.0004"),  # no fraction with a denominator of a frame rate
        ("--fps", "1e9"),
        ("--crf", "52"),
        ("--quality", "0"),
        ("--shard-size", "inf"),
        ("--copy",),
        ("--keep-every", "2", "--fps", "5"),
        ("--keep-every", "2", "--to", "shards", "--copy"),
    ],
)
def test_wrong_arguments_are_refused(tool, wrong):
    with pytest.raises(SystemExit) as stop:
        tool.parse_arguments(["list.csv", "out", *wrong])
    assert stop.value.code == 2
