"""Clips by time: ``data.fps``, sections of files, and samples in proportion to a video's length."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpm_video.config.data import DataConfig
from hpm_video.data.clips import ValidationClips, VideoClips
from hpm_video.data.loader import stream_parts
from hpm_video.data.manifest import Manifest, ManifestError, read_manifest
from hpm_video.data.reading import Footage, Request, Views
from hpm_video.data.transforms import Box, ClipTransform, MultiScaleCrop, resize
from hpm_video.decoding import pyav
from hpm_video.decoding.locations import Section, base_name
from hpm_video.decoding.pyav import PyavReader
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import available_decoders, open_video
from hpm_video.randomness import generator
from hpm_video.runs.data import SourceData

STRIDE = DataConfig(num_frames=4, frame_stride=2, frame_size=(64, 96))
TIMED = replace(STRIDE, frame_stride=None, fps=12.5)
RNG = np.random.default_rng(3)
UNEVEN = np.cumsum(RNG.integers(10, 120, 60)).tolist()
"""The times of the frames of a video without a steady rate, in milliseconds."""


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_painted):
    folder = tmp_path_factory.mktemp("timed")
    write_painted(folder / "steady.mp4", frames=50)
    write_painted(folder / "uneven.mp4", frames=60, times=UNEVEN)
    write_painted(folder / "uneven.mkv", frames=60, times=UNEVEN)
    write_painted(folder / "untimed.avi", frames=50, codec="mpeg4", max_b_frames=0)
    (folder / "frames").mkdir()
    for number in range(20):
        Image.new("RGB", (96, 64), (12 * number,) * 3).save(folder / "frames" / f"{number}.png")
    return folder


class Uncropped(ClipTransform):
    def draw(self, size, frame_size, draw):
        return Box(0, 0, *size), partial(resize, frame_size=frame_size, interpolation="bilinear")


def footage(path, data, stated=-1, fps=0.0, decoder="auto"):
    with open_video(Section.parse(str(path)).file, decoder) as video:
        return Footage.of(data, video, Request(str(path), 0, stated, (), fps))


def training(manifest, data, seed=0, **options):
    return VideoClips(manifest, data, Uncropped(), seed=seed, **options)


def listed(folder, text):
    (folder / "list.csv").write_text(text)
    return read_manifest(folder / "list.csv")


# --- The pace of a clip ---------------------------------------------------------------------------


@pytest.mark.parametrize("views", [Views(), Views(5), Views(every=3), Views(first=7)])
@pytest.mark.parametrize("name", ["steady.mp4", "untimed.avi"])
@pytest.mark.parametrize("stated", [-1, 23])
def test_frames_per_second_are_a_stride_where_the_rate_is_steady(files, name, views, stated):
    by_time, by_stride = (footage(files / name, data, stated) for data in (TIMED, STRIDE))
    expected = by_stride.views(STRIDE, views)
    assert by_time.views(TIMED, views).tolist() == expected.tolist()
    assert expected.dtype == by_time.views(TIMED, views).dtype == np.int64


def test_the_decoders_agree_on_the_times_of_frames(files):
    for name in available_decoders():
        found = [
            footage(files / file, TIMED, decoder=name) for file in ("steady.mp4", "uneven.mp4")
        ]
        assert found[0].seconds == pytest.approx(np.arange(50) / 25)
        assert found[1].seconds == pytest.approx((np.asarray(UNEVEN) - UNEVEN[0]) / 1000)


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_frames_of_a_variable_rate_are_those_nearest_in_time(files, name):
    data, times = replace(TIMED, fps=8.0), (np.asarray(UNEVEN) - UNEVEN[0]) / 1000
    found = footage(files / name, data)
    for key in range(40):
        draw, again = generator("clip", key), generator("clip", key)
        clip = found.draw(data, draw)
        # The clip begins anywhere, and each further frame is an eighth of a second later.
        begin = times[-1] / 59 * int(again.random() * (int(60 - 4 * found.stride) + 1))
        wanted = begin + np.arange(4) / 8
        distances = np.abs(times[:, None] - wanted)
        assert (np.abs(times[clip] - wanted) <= distances.min(axis=0) + 1e-9).all()
        assert clip.tolist() == sorted(clip.tolist())


def test_more_frames_per_second_than_the_file_has_repeat_its_frames(files):
    data = replace(TIMED, fps=100.0, num_frames=8)
    assert footage(files / "steady.mp4", data).views(data, Views(first=3)).tolist() == [
        [3, 3, 3, 4, 4, 4, 4, 5]
    ]


def test_a_clip_longer_than_its_video_repeats_the_last_frame_that_it_reaches(files):
    data = replace(TIMED, fps=1.0)
    assert footage(files / "steady.mp4", data).views(data, Views()).tolist() == [[0, 25, 25, 25]]


def test_a_single_frame_is_a_clip_at_any_rate(files, write_painted, tmp_path):
    write_painted(tmp_path / "one.mp4", frames=1)
    assert footage(tmp_path / "one.mp4", TIMED).views(TIMED, Views(2)).tolist() == [[0] * 4] * 2


def test_images_and_folders_without_a_rate_are_refused_before_anything_is_read(files):
    folder = f"{files}/frames/"
    for file in (folder, f"{files}/frames/3.png"):
        manifest = Manifest((f"{files}/steady.mp4", file), (0, 0), (-1, -1))
        assert len(training(manifest, STRIDE)) == 2
        with pytest.raises(ManifestError, match="has no frame rate.* column fps; take images out"):
            training(manifest, TIMED)
        with pytest.raises(ManifestError, match="has no frame rate"):
            next(stream_parts(manifest, [0], TIMED, Views(), clips_per_part=1))
        sections = replace(manifest, files=(manifest.files[0], f"{file}#t=1"))
        with pytest.raises(ManifestError, match="has no frame rate"):
            ValidationClips(sections, STRIDE, seed=0)


def test_a_folder_of_frames_has_the_rate_that_the_list_states(files):
    manifest = listed(files, "path,start,fps\nframes/,0.4,10\nsteady.mp4,,n/a\n")
    assert manifest.fps == {f"{files}/frames/#t=0.4": 10.0}
    data = replace(TIMED, fps=5.0, interpolation="bilinear")
    clip = ValidationClips(manifest, data, views=Views(2), seed=0)[0].clips
    assert clip[:, 0, :, 0, 0].div(12).tolist() == [[4, 6, 8, 10], [12, 14, 16, 18]]


# --- Sections -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "file", "start", "end", "name"),
    [
        ("/v/a.mp4", "/v/a.mp4", 0, np.inf, "a.mp4"),
        ("/v/a.mp4#t=5,12.5", "/v/a.mp4", 5, 12.5, "a.mp4#t=5,12.5"),
        ("/v/a.mp4#t=,3", "/v/a.mp4", 0, 3, "a.mp4#t=,3"),
        ("/s.tar::c/a.mp4@512+9#t=0.25", "/s.tar::c/a.mp4@512+9", 0.25, np.inf, "a.mp4#t=0.25"),
        ("/v/f/#t=1,2", "/v/f/", 1, 2, "f#t=1,2"),
        ("/v/a#t=.mp4", "/v/a#t=.mp4", 0, np.inf, "a#t=.mp4"),
        ("/v/a.mp4#t=", "/v/a.mp4#t=", 0, np.inf, "a.mp4#t="),
    ],
)
def test_places_of_sections(place, file, start, end, name):
    section = Section.parse(place)
    assert (section.file, section.start, section.end) == (file, start, end)
    assert base_name(place) == name


def test_rows_of_one_file_are_told_apart_by_their_seconds(files):
    text = "path,label,start,end\nsteady.mp4,0,,\nsteady.mp4,1,0.50,1.0\nsteady.mp4,2,1.2,\n"
    manifest = listed(files, text + "steady.mp4,3,,0.4\n")
    names = ["", "#t=0.5,1", "#t=1.2", "#t=,0.4"]
    assert manifest.files == tuple(f"{files}/steady.mp4{name}" for name in names)
    assert manifest.num_files == 4
    whole = listed(files, "path,label\nsteady.mp4,0\nsteady.mp4,1\nsteady.mp4,2\nsteady.mp4,3\n")
    assert manifest.digest != whole.digest
    assert SourceData(manifest, None).fingerprint != SourceData(whole, None).fingerprint
    empty = "".join(f"steady.mp4,{label},,\n" for label in range(4))
    assert listed(files, "path,label,start,end\n" + empty) == whole


@pytest.mark.parametrize("cells", ["2,1", "1,1", "-1,", "x,", ",0", "nan,", "inf,", ",0:10"])
def test_seconds_that_are_none_are_named_with_their_line(files, cells):
    with pytest.raises(ManifestError, match="line 3: start and end must be seconds, the end after"):
        listed(files, f"path,start,end\nsteady.mp4,0,1\nsteady.mp4,{cells}\n")


@pytest.mark.parametrize("data", [STRIDE, TIMED, replace(STRIDE, sampling="segments")])
def test_clips_of_a_section_are_of_its_frames_alone(files, data, numbers_of):
    manifest = Manifest((f"{files}/steady.mp4#t=0.4,1.2",), (0,), (-1,))
    clips, seen = training(manifest, data), set()
    for position in range(80):
        seen |= {*shown_in(clips[position].clips, numbers_of)}
    assert min(seen) == 10
    assert max(seen) in (28, 29)
    assert seen <= {*range(10, 30)}
    views = ValidationClips(manifest, data, views=Views(3, 1), seed=0)[0].clips
    shown = [shown_in(view[None], numbers_of) for view in views]
    assert shown[0][0] == 10
    assert {*np.ravel(shown)} <= {*range(10, 30)}


def shown_in(clips, numbers_of):
    """(R, C, T, H, W) -> the number painted into each frame"""
    return numbers_of(clips.permute(0, 2, 3, 4, 1).flatten(0, 1).numpy())


def test_sections_that_meet_share_no_frame_and_leave_none_out(files):
    ends = [0, 0.31, 0.7, 1.0, 1.32, 2.0]
    found = [
        footage(f"{files}/uneven.mkv#t={start},{end}", STRIDE)
        for start, end in zip(ends[:-1], ends[1:], strict=True)
    ]
    frames = [number for each in found for number in range(each.first, each.first + each.count)]
    assert frames == [*range(len(frames))]
    assert len(frames) == sum(time - UNEVEN[0] < 2000 for time in UNEVEN)


def test_a_section_outside_of_its_video_is_an_error_of_its_row_alone(files):
    sections = ("#t=0,1", "#t=5,6", "#t=1,9", "#t=2.5", "#t=0.5,0.51", "#t=1,2.4")
    manifest = Manifest(
        tuple(f"{files}/steady.mp4{each}" for each in sections), (0,) * 6, (-1,) * 6
    )
    clips = ValidationClips(manifest, STRIDE, seed=0, report_failures=True)
    samples = [clips[row] for row in range(6)]
    assert [len(sample.clips) for sample in samples] == [1, 0, 0, 0, 0, 1]
    (failure,) = samples[1].failures
    assert failure.path == manifest.files[1]
    assert failure.reason == "it lasts 2.00 s, so it has no section from 5 s to 6 s"
    assert samples[3].failures[0].reason.endswith("from 2.5 s to its end")
    parts = dict(stream_parts(manifest, range(3), STRIDE, Views(), clips_per_part=4))
    assert parts[1].path == manifest.files[1]
    assert parts[0].num_frames == 50, "of the file"
    with pytest.raises(DecodeError, match=r"steady.mp4#t=5,6: it lasts 2.00 s"):
        ValidationClips(manifest, STRIDE, seed=0)[1]


def test_windows_slide_over_a_section_and_know_their_frames_in_the_file(files):
    manifest = Manifest((f"{files}/steady.mp4#t=0.4,1.2",), (0,), (-1,))
    parts = [p for _, p in stream_parts(manifest, [0], STRIDE, Views(every=5), clips_per_part=2)]
    assert np.concatenate([part.frames[:, 0] for part in parts]).tolist() == [10, 15, 20, 22]


# --- Length ---------------------------------------------------------------------------------------


def test_samples_of_a_video_are_in_proportion_to_its_length(files):
    text = "path,num_frames,fps,start,end\n"
    rows = ["a.mp4,1500,25,,", "b.mp4,10,25,,", "c.mp4,,,60,180", "d.mp4,9000,30,240,"]
    manifest = listed(files, text + "\n".join(rows) + "\n").by_length(4)
    counts = [manifest.files.count(file) for file in dict.fromkeys(manifest.files)]
    assert counts == [4, 1, 8, 4]
    assert manifest.num_files == 4
    assert len(manifest.num_frames) == 17
    for row in ("a.mp4,1500,,,", "a.mp4,,25,,", "a.mp4,,,5,", "a.mp4,1500,n/a,,"):
        with pytest.raises(ManifestError, match="num_frames and fps of .*a.mp4.*check_videos.py"):
            listed(files, f"{text}{row}\n").by_length(4)


def test_repeated_rows_are_other_clips_and_one_file(files):
    manifest = Manifest((f"{files}/steady.mp4",), (0,), (50,), fps={f"{files}/steady.mp4": 25.0})
    clips = training(manifest.by_length(240), replace(STRIDE, max_bad_share=0.0))
    assert len(clips) == 8
    samples = [clips[position] for position in range(8)]
    assert len({sample.keys for sample in samples}) == 8
    assert len({sample.clips.numpy().tobytes() for sample in samples}) > 4


# --- Repeats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [STRIDE, TIMED, replace(STRIDE, sampling="segments")])
@pytest.mark.parametrize("name", ["steady.mp4", "uneven.mkv", "untimed.avi"])
def test_clips_out_of_one_pass_have_the_pixels_of_clips_read_one_by_one(files, data, name):
    manifest = Manifest((f"{files}/{name}",), (0,), (-1,))
    crops = MultiScaleCrop(flip=True)
    together = VideoClips(manifest, replace(data, repeats=5), crops, seed=0)
    reader = together.reader
    for position in range(3):
        request = together.request(position)
        alone = [reader(replace(request, keys=(key,))).clips for key in request.keys]
        assert torch.equal(reader(request).clips, torch.cat(alone))


# --- Long files -----------------------------------------------------------------------------------


def test_the_packets_of_a_file_are_gone_through_once(monkeypatch, tmp_path, write_painted):
    indexed, index = [], PyavReader._find_index
    monkeypatch.setattr(
        PyavReader, "_find_index", lambda self: indexed.append(self.path) or index(self)
    )
    monkeypatch.setattr(pyav, "INDICES_HELD", 2)
    monkeypatch.setattr(pyav, "_INDICES", {})
    paths = [write_painted(tmp_path / f"{n}.mkv", frames=60) for n in range(3)]
    manifest = Manifest(tuple(f"{path}" for path in paths[:2]), (0, 0), (-1, -1))
    clips, data = training(manifest, STRIDE), replace(TIMED, repeats=3)
    first = [clips[position].clips for position in range(12)]
    assert sorted(Path(path).name for path in indexed) == ["0.mkv", "1.mkv"]
    pyav._INDICES.clear()
    assert all(torch.equal(training(manifest, STRIDE)[n].clips, first[n]) for n in range(12))
    timed, whole = training(manifest, data), Views(every=1)
    assert torch.equal(timed[0].clips, training(manifest, data)[0].clips)
    expected = footage(paths[2], STRIDE).views(STRIDE, whole)
    assert len(pyav._INDICES) == 2, "only the last ones are kept"
    write_painted(paths[2], frames=40)
    assert len(footage(paths[2], STRIDE).views(STRIDE, whole)) == len(expected) - 20, (
        "it has changed"
    )


@pytest.mark.parametrize("name", ["steady.mp4", "uneven.mp4", "uneven.mkv"])
def test_a_clip_late_in_a_file_is_read_from_the_key_frame_before_it(
    monkeypatch, files, name, numbers_of
):
    packets, demux = [], PyavReader._demux
    monkeypatch.setattr(
        PyavReader, "_demux", lambda self: (packets.append(each) or each for each in demux(self))
    )
    with PyavReader(f"{files}/{name}", f"{files}/{name}") as video:
        packets.clear()
        assert numbers_of(video.read([42, 40, 44])) == [42, 40, 44]
    assert len(packets) < 20, "key frames are 12 apart"
