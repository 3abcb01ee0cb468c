"""Odd videos, damaged ones, and files that are no videos, under every decoder."""

import json
import os
import struct
import subprocess
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest

from hpm_video.decoding import pyav as decode_pyav
from hpm_video.decoding.others import check_exact
from hpm_video.decoding.reader import DecodeError, as_decode_error
from hpm_video.decoding.registry import available_decoders, open_video

pytestmark = pytest.mark.slow

DECODERS = available_decoders()
ODD_FRAMES = 30
UNEVEN = np.cumsum(np.random.default_rng(0).integers(10, 200, ODD_FRAMES)).tolist()
QUIET = {"x265-params": "log-level=none"}
ODD = {
    "plain.mp4": {},
    "one_frame.mp4": {"frames": 1},
    "tiny.mp4": {"size": (8, 8)},
    "odd_size.mp4": {"size": (63, 97), "pix_fmt": "yuv444p"},
    "odd_halved.avi": {"size": (63, 97), "codec": "mpeg4", "max_b_frames": 0},
    "variable_rate.mp4": {"times": UNEVEN},
    "variable_rate.mkv": {"times": UNEVEN},
    "late_start.mp4": {"times": [1000 + 40 * i for i in range(ODD_FRAMES)]},
    "ten_bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": QUIET},
    "full_colour.mp4": {"pix_fmt": "yuv444p"},
    "half_colour.mp4": {"pix_fmt": "yuv422p"},
    "full_range.mp4": {"pix_fmt": "yuvj420p"},
    "alpha_vp9.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "options": {"cpu-used": "8"}},
    "alpha_prores.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le", "max_b_frames": 0},
    "alpha_png.mov": {"codec": "png", "pix_fmt": "rgba", "max_b_frames": 0},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "hevc.mp4": {"codec": "libx265", "options": QUIET},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "10"}},
    "stream.ts": {},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8", "max_b_frames": 0},
}
"""Good videos unlike most."""
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
"""Odd files that a decoder would read wrongly, so that its reader refuses them."""
TOLERANCE = {"odd_halved.avi": 24, "ten_bit.mp4": 12, "alpha_prores.mov": 1}
"""The largest difference between two decoders, away from edges. Their colour conversions differ for
colours at half resolution in frames of odd size, and from 10 bits to 8; otherwise there is none."""
GROWING = ("growing.mp4", "growing.mkv", "growing.ts")
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


def patch(path: Path, source: Path, kind: bytes, place: int, values: bytes) -> Path:
    """Copy an MP4 file, with other values in a box of that kind."""
    data = bytearray(source.read_bytes())
    start = data.index(kind) + 4 + place
    data[start : start + len(values)] = values
    path.write_bytes(data)
    return path


def trim(path: Path, source: Path, skipped: int, shown: int | None) -> Path:
    """Copy an MP4 file, with an edit list that hides frames of 40 ms at the start and the end."""
    data = source.read_bytes()
    _, count, duration, start, _ = struct.unpack_from(">IIIiI", data, data.index(b"elst") + 4)
    assert count == 1
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd") + 4 + 12)[0]
    start += skipped * timescale * 40 // 1000
    duration = duration if shown is None else 40 * shown  # in milliseconds
    return patch(path, source, b"elst", 8, struct.pack(">Ii", duration, start))


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory, write_painted) -> dict[str, Path]:
    """Good videos unlike most: many codecs and containers, trimmed, turned, of odd sizes."""
    folder = tmp_path_factory.mktemp("odd")
    files = {
        name: write_painted(folder / name, **{"frames": ODD_FRAMES} | options)
        for name, options in ODD.items()
    }
    plain = files["plain.mp4"]
    for turn, (a, b, c, d) in {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}.items():
        numbers = (value << 16 for value in (a, b, 0, c, d, 0, 0, 0, 1 << 14))
        matrix = struct.pack(">9i", *numbers)
        name = f"turned_{turn}.mp4"
        files[name] = patch(folder / name, plain, b"tkhd", 40, matrix)
    for side, cut in {"start": (5, None), "end": (0, 20), "both": (12, 10)}.items():
        name = f"{side}_trimmed.mp4"
        files[name] = trim(folder / name, plain, *cut)
    return files


def write_growing(path: Path, parts: list[Path]) -> Path:
    """Put raw H.264 streams one after the other: the size of the frames changes between them."""
    raw = BytesIO(b"".join(part.read_bytes() for part in parts))
    with av.open(raw, format="h264") as source, av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=25, width=64, height=64, max_b_frames=0)
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = Fraction(1, 25), stream
                target.mux(packet)
    return path


@pytest.fixture(scope="module")
def list_files(tmp_path_factory, write_painted) -> dict[str, Path]:
    """Playlists and the like under the name of a video, and a real video beside them."""
    folder = tmp_path_factory.mktemp("lists")
    name = write_painted(folder / "real.mp4", frames=5).name
    texts = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {name}\n",
        "sdp.mp4": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\n"
        "t=0 0\r\nm=video 5004 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n",
        "dash.mp4": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
        'profiles="urn:mpeg:dash:profile:isoff-main:2011" type="static"><Period>'
        f"<BaseURL>{name}</BaseURL></Period></MPD>\n",
    }
    return write_files(folder, {file: text.encode() for file, text in texts.items()})


def write_files(folder: Path, contents: dict[str, bytes]) -> dict[str, Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


def flip_bits(data: bytes, seed: int) -> bytes:
    """Change every two-hundredth byte or so."""
    count = 1 + len(data) // 200
    draw = np.random.default_rng(seed)
    values = np.frombuffer(data, np.uint8).copy()
    values[draw.integers(0, len(values), count)] ^= draw.integers(1, 256, count, np.uint8)
    return values.tobytes()


@pytest.fixture(scope="module")
def hostile_files(
    tmp_path_factory, odd_files, list_files, bad_videos, write_painted
) -> dict[str, Path]:
    """By name: odd videos that decode, damaged ones, and files that are no video."""
    folder = tmp_path_factory.mktemp("hostile")
    fast = {"movflags": "faststart"}
    whole = write_painted(folder / "whole.mp4", frames=ODD_FRAMES, container_options=fast)
    whole = whole.read_bytes()
    contents = {f"cut_{i:02d}.mp4": whole[: len(whole) * i // 20] for i in range(1, 20)}
    for name in ("plain.mp4", "mpeg4.avi", "vp9.webm", "hevc.mp4", "stream.ts"):
        data = odd_files[name].read_bytes()
        stem, _, ending = name.partition(".")
        for seed in range(4):
            contents[f"flipped_{stem}_{seed}.{ending}"] = flip_bits(data, seed)
    avi = bytearray(odd_files["mpeg4.avi"].read_bytes())
    struct.pack_into("<I", avi, avi.index(b"avih") + 8 + 16, 10 * ODD_FRAMES)
    struct.pack_into("<I", avi, avi.index(b"strh") + 8 + 32, 10 * ODD_FRAMES)
    noise = np.random.default_rng(0).bytes(20000)
    start = whole.index(b"mdat") + 4
    contents |= {
        "overstated.avi": bytes(avi),
        "random.mp4": noise,
        "random.avi": noise,
        "scrambled.mp4": whole[:start] + noise[: len(whole) - start].ljust(len(whole) - start),
        "name_only.mp4": whole[:24],
    }
    parts = [
        write_painted(folder / f"{side}.h264", frames=20, size=(side, side), max_b_frames=0)
        for side in (64, 96)
    ]
    return {
        **odd_files,
        **list_files,
        **{f"{name}.mp4": path for name, path in bad_videos.items()},
        **write_files(folder, contents),
        **{name: write_growing(folder / name, parts) for name in GROWING},
        "no_frames.mp4": write_painted(folder / "no_frames.mp4", frames=0),
        "no_frames.avi": write_painted(folder / "no_frames.avi", frames=0, codec="mpeg4"),
    }


def reference(path: Path) -> np.ndarray:
    """All frames in order, read as PyAV's documentation shows."""
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
    """Another version of FFmpeg might take it for a list."""
    (tmp_path / "a.mp4").write_bytes(b"AAAAfree" + what + odd_files["plain.mp4"].read_bytes())
    assert refusal_of(tmp_path / "a.mp4")


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "decord"])
@pytest.mark.parametrize("indices", [[3, 25], range(40)])
def test_frames_that_change_size(hostile_files, decoder, indices):
    """decord is left out: it silently scales all frames to the size of the first."""
    with (
        open_video(str(hostile_files["growing.mp4"]), decoder) as video,
        pytest.raises(DecodeError, match=r"change size, from 64x64 to 96x96\. Encode it anew: too"),
    ):
        video.read(indices)


def test_files_that_name_others_are_refused(list_files, monkeypatch):
    """Whatever the first bytes look like, FFmpeg must not open other files."""
    monkeypatch.chdir(list_files["concat.mp4"].parent)
    with av.open("concat.mp4") as container:  # FFmpeg by itself follows the list
        assert sum(1 for _ in container.decode(video=0)) == 5
    for path in list_files.values():
        for decoder in DECODERS:
            with pytest.raises(DecodeError, match="its container is none of those"):
                open_video(str(path), decoder)
    with pytest.raises(DecodeError, match="there is no such file"):
        open_video(f"concat:{list_files['concat.mp4'].parent / 'real.mp4'}", "pyav")


@pytest.mark.parametrize("error", [MemoryError, av.error.MemoryError])
def test_a_lack_of_memory_says_nothing_about_a_file(error):
    arguments = () if error is MemoryError else (12, "Cannot allocate memory")
    with pytest.raises(MemoryError), as_decode_error("a.mp4"):
        raise error(*arguments)


def test_frames_are_counted_only_when_they_must_be(odd_files, monkeypatch, numbers_of):
    """Counting the frames of an AVI file means decoding all of them."""
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
