"""Odd videos, damaged ones, and files that are none, under every decoder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from hpm_video.decoding import pyav as decode_pyav
from hpm_video.decoding.exact import check_exact
from hpm_video.decoding.reader import DecodeError, as_decode_error
from hpm_video.decoding.registry import available_decoders, open_video

pytestmark = pytest.mark.slow

DECODERS = available_decoders()
REFUSED = {
    "pyav": set(),
    "torchcodec": {"odd_halved.avi", "mpeg4.avi", "stream.ts"},
    "decord": {
        "tiny.mp4",
        "av1.mp4",
        "stream.ts",
        "animation.gif",
        "start_trimmed.mp4",
        "end_trimmed.mp4",
        "both_trimmed.mp4",
    },
}
"""Odd files that a decoder would get wrong, and that its reader leaves alone."""
TOLERANCE = {"odd_halved.avi": 24, "ten_bit.mp4": 12, "alpha_prores.mov": 1}
"""Largest difference between two decoders, away from edges, where their colour conversions differ:
colours at half size in frames of odd size, and 10 bits to 8. Elsewhere none."""
TRIMMED = {"start_trimmed.mp4", "end_trimmed.mp4", "both_trimmed.mp4"}
SURVIVE = """
import json, sys, traceback
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import open_video
for path in sys.argv[2:]:
    try:
        with open_video(path, sys.argv[1]) as video:
            found = video.read(sorted({0, video.num_frames // 2, video.num_frames - 1}))
            size = [*video.frame_size]
        outcome = "frames" if [*found.shape[1:]] == [*size, 3] else f"{found.shape} {size}"
    except DecodeError as error:
        outcome = "refused" if error.path == path and len(error.reason) > 9 else repr(error)
    except BaseException:
        outcome = traceback.format_exc()
    print(json.dumps([path, outcome]), flush=True)
"""


def reference(path: Path) -> np.ndarray:
    """All frames one after the other, as PyAV's documentation shows it."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack(
            [
                np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                for frame in container.decode(video=0)
            ]
        )


@pytest.mark.parametrize("decoder", DECODERS)
def test_odd_videos_have_the_same_frames_under_all_decoders(odd_files, decoder):
    draw = np.random.default_rng(0)
    for name, path in odd_files.items():
        if name in REFUSED[decoder]:
            with pytest.raises(DecodeError):
                open_video(str(path), decoder).read([0])
            continue
        expected = reference(path)
        with open_video(str(path), decoder) as video:
            assert video.num_frames == len(expected), name
            assert video.frame_size == expected.shape[1:3], name
            order = draw.permutation(len(expected))
            for indices in (*np.array_split(order, 5), order):
                if not len(indices):
                    continue
                found = video.read(indices).astype(int)
                apart = np.abs(found[:, None] - expected[None]).mean(axis=(2, 3, 4))
                assert np.all(apart[range(len(found)), indices] == apart.min(axis=1)), name
                difference = np.abs(found - expected[indices])[:, 18:]
                allowed = 0 if decoder == "pyav" else TOLERANCE.get(name, 0)
                assert difference.max(initial=0) <= allowed, name


@pytest.mark.parametrize("decoder", DECODERS)
def test_sizes_are_those_of_the_frames_upright(odd_files, decoder):
    with open_video(str(odd_files["turned_90.mp4"]), decoder) as video:
        assert video.frame_size == (96, 64)
        assert video.read([20, 3, 20]).shape == (3, 96, 64, 3)


def refusal_of(path):
    try:
        check_exact(str(path), "any", ["mov"], shows_all=True)
    except DecodeError as error:
        return error.reason
    return ""


def test_edit_lists_that_leave_out_frames_are_seen(odd_files):
    mp4 = {name for name in odd_files if name.endswith((".mp4", ".mov"))}
    found = {name for name in mp4 if "not to be shown" in refusal_of(odd_files[name])}
    assert found == TRIMMED


@pytest.mark.parametrize(
    "what", [b"<MPD", b"\n<SmoothStreamingMedia ", b"<?xml?><compositionPlaylist"]
)
def test_a_video_that_begins_like_a_list_is_left_to_pyav(odd_files, tmp_path, what):
    """Another FFmpeg may take it for one."""
    (tmp_path / "a.mp4").write_bytes(b"AAAAfree" + what + odd_files["plain.mp4"].read_bytes())
    assert refusal_of(tmp_path / "a.mp4")


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "decord"])
@pytest.mark.parametrize("indices", [[3, 25], range(40)])
def test_frames_that_change_size(hostile_files, decoder, indices):
    """decord scales them to the size of the first, and does not say so."""
    with (
        open_video(str(hostile_files["growing.mp4"]), decoder) as video,
        pytest.raises(DecodeError, match=r"change size, from 64x64 to 96x96\. Encode it anew: too"),
    ):
        video.read(indices)


def test_files_that_name_others_are_refused(list_files, monkeypatch):
    """Whatever the first bytes look like: FFmpeg is told to leave other files alone."""
    monkeypatch.chdir(list_files["concat.mp4"].parent)
    with av.open("concat.mp4") as container:  # it would follow
        assert sum(1 for _ in container.decode(video=0)) == 5
    for path in list_files.values():
        for decoder in DECODERS:
            with pytest.raises(DecodeError, match="it is no video"):
                open_video(str(path), decoder)
    with pytest.raises(DecodeError, match="there is no such file"):
        open_video(f"concat:{list_files['concat.mp4'].parent / 'real.mp4'}", "pyav")


@pytest.mark.parametrize("error", [MemoryError, av.error.MemoryError])
def test_a_lack_of_memory_says_nothing_about_a_file(error):
    arguments = () if error is MemoryError else (12, "Cannot allocate memory")
    with pytest.raises(MemoryError), as_decode_error("a.mp4"):
        raise error(*arguments)


def test_frames_are_counted_only_when_they_must_be(odd_files, monkeypatch, numbers_of):
    """To count those of AVI files means to decode them all."""
    counted = []
    count = decode_pyav.PyavReader._count
    monkeypatch.setattr(
        decode_pyav.PyavReader, "_count", lambda self: counted.append(1) or count(self)
    )
    with open_video(str(odd_files["mpeg4.avi"]), "pyav") as video:
        assert numbers_of(video.read([7, 3])) == [7, 3]
        assert numbers_of(video.read([9])) == [9]
        assert numbers_of(video.read([2])) == [2]
        assert video.frames_stated(30) == 30
        assert not counted
        with pytest.raises(
            DecodeError, match="it has 30 frames, and number 30 was asked"
        ) as caught:
            video.read([3, 30])
        assert isinstance(caught.value, IndexError)
        assert caught.value.path == video.path
        assert counted == [1]
        assert numbers_of(video.read([29])) == [29]
        with pytest.raises(IndexError, match=r"0\.\.29"):
            video.read([31])
        assert video.frames_stated(99) == 30
    with open_video(str(odd_files["plain.mp4"]), "pyav") as video:
        assert (video.frames_stated(99), video.frames_stated(9)) == (30, 9)


@pytest.mark.parametrize("decoder", DECODERS)
def test_hostile_files_give_frames_or_an_error_that_names_them(hostile_files, decoder):
    paths = [str(path) for path in hostile_files.values()]
    done = subprocess.run(
        [sys.executable, "-c", SURVIVE, decoder, *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    outcomes = dict(map(json.loads, lines))
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert [*outcomes] == paths
    other = {path: what for path, what in outcomes.items() if what not in ("frames", "refused")}
    assert not other
    assert {"frames", "refused"} == set(outcomes.values())
