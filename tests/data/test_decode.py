import struct
import subprocess
import sys

import av
import numpy as np
import pytest

from hpm_video.data import decode
from hpm_video.data.decode import (
    DecodeError,
    DecoderError,
    available_decoders,
    choose_decoder,
    decoder_versions,
    open_video,
)

DECODERS = [
    "pyav",
    pytest.param(
        "decord",
        marks=pytest.mark.skipif(
            "decord" not in available_decoders(), reason="decord is not installed"
        ),
    ),
]
OPEN_GROUPS = {"x264-params": "open-gop=1:b-adapt=0"}
UNEVEN = np.cumsum(np.random.default_rng(0).integers(10, 200, 40)).tolist()
VIDEOS = {
    "b_frames.mp4": {},
    "b_frames.mkv": {},
    "variable_rate.mp4": {"times": UNEVEN},
    "variable_rate.mkv": {"times": UNEVEN},
    "late_start.mp4": {"times": [1000 + 40 * i for i in range(40)]},
    "odd_size.mp4": {"size": (63, 97), "pix_fmt": "yuv444p"},
    "odd_halved.avi": {"size": (63, 97), "codec": "mpeg4", "max_b_frames": 0},
    "long_group.mp4": {"frames": 120, "gop_size": 250},
    "short_groups.mp4": {"gop_size": 3},
    "one_frame.mp4": {"frames": 1},
    # decord's own seeks are wrong on these:
    "open_groups.mp4": {"gop_size": 8, "max_b_frames": 3, "options": OPEN_GROUPS},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "h264.avi": {},
    "mpeg4.avi": {"codec": "mpeg4"},
    "wmv2.wmv": {"codec": "wmv2", "max_b_frames": 0},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_painted):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_painted(folder / name, **how) for name, how in VIDEOS.items()}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", VIDEOS)
def test_each_frame_asked_for_is_the_frame_that_comes(videos, numbers_of, name, decoder):
    draw = np.random.default_rng(1)
    with open_video(str(videos[name]), decoder) as video:
        assert video.num_frames == VIDEOS[name].get("frames", 40)
        for _ in range(5):
            indices = draw.integers(0, video.num_frames, 4)
            frames = video.read(indices)
            assert frames.shape == (4, *VIDEOS[name].get("size", (64, 96)), 3)
            assert frames.dtype == np.uint8
            assert numbers_of(frames) == indices.tolist()
        last = video.num_frames - 1
        assert numbers_of(video.read([last, 0, last, 0, 0])) == [last, 0, last, 0, 0]


@pytest.mark.skipif("decord" not in available_decoders(), reason="decord is not installed")
@pytest.mark.parametrize("name", VIDEOS)
def test_decoders_agree_on_every_pixel(videos, name):
    """Colours that are stored at half size are enlarged otherwise in frames of odd size."""
    with (
        open_video(str(videos[name]), "pyav") as video,
        open_video(str(videos[name]), "decord") as other,
    ):
        indices = range(0, video.num_frames, 3)
        difference = np.abs(video.read(indices).astype(int) - other.read(indices))
    if name == "odd_halved.avi":
        assert difference[:, 18:].max() <= 24  # below the squares, whose edges are sharp
        assert difference.mean() < 2
    else:
        assert difference.max() == 0


def test_mpeg_transport_streams(tmp_path, write_painted, numbers_of):
    """decord loses their first frames, and says nothing."""
    path = str(write_painted(tmp_path / "stream.ts"))
    with open_video(path, "pyav") as video:
        assert numbers_of(video.read([30, 2, 13])) == [30, 2, 13]
    if "decord" in available_decoders():
        with pytest.raises(DecodeError, match=r"decord is not known to be exact .* PyAV is"):
            open_video(path, "decord")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("matrix", "quarter_turns"),
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_videos_are_turned_upright(tmp_path, write_painted, matrix, quarter_turns, decoder):
    path = write_painted(tmp_path / "held.mp4", frames=2)
    with open_video(str(path), decoder) as video:
        lying = video.read([0, 1])
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # of the matrix behind the times, the track and its layer
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with open_video(str(path), decoder) as video:
        assert np.array_equal(video.read([0, 1]), np.rot90(lying, quarter_turns, axes=(1, 2)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "there is no such file"),
        ("empty", "the file is empty"),
        ("text", ""),
        ("audio", "video stream"),
        ("cut", ""),
        ("dir", ""),
    ],
)
def test_a_file_that_does_not_decode_names_itself(bad_videos, kind, reason, decoder):
    path = str(bad_videos[kind])
    with pytest.raises(DecodeError) as caught:
        open_video(path, decoder)
    assert str(caught.value).startswith(f"cannot decode {path}: ")
    assert caught.value.path == path
    assert caught.value.reason
    assert reason in caught.value.reason


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_broken_in_the_middle(tmp_path, write_painted, decoder):
    path = write_painted(tmp_path / "broken.mp4")
    data = bytearray(path.read_bytes())
    start, stop = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start + (stop - start) // 2 : stop] = b"\xff" * (stop - start - (stop - start) // 2)
    path.write_bytes(data)
    with open_video(str(path), decoder) as video:
        assert video.num_frames == 40
        with pytest.raises(DecodeError, match=r"broken\.mp4"):
            video.read([39])


def test_a_frame_that_never_comes_out(videos, monkeypatch):
    with open_video(str(videos["b_frames.mp4"]), "pyav") as video:
        monkeypatch.setattr(video, "_times", [time + 1 for time in video._times])
        with pytest.raises(DecodeError, match="only 0 of 2 frames came out"):
            video.read([3, 20])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("indices", [[], [-1], [0, 40]])
def test_frames_that_are_not_there(videos, indices, decoder):
    with (
        open_video(str(videos["b_frames.mp4"]), decoder) as video,
        pytest.raises(IndexError, match=r"must lie in 0\.\.39"),
    ):
        video.read(indices)


def test_pyav_decodes_only_from_the_key_frame_to_the_last_wanted_frame(videos, monkeypatch):
    decoded = []
    with open_video(str(videos["b_frames.mp4"]), "pyav") as video:
        take = video._take

        def counted(frames, wanted):
            def passed():
                for number, frame in frames:
                    decoded.append(number)
                    yield number, frame

            return take(passed(), wanted)

        monkeypatch.setattr(video, "_take", counted)
        video.read([29, 26, 29])
        assert 4 <= len(decoded) <= 6  # the key frame is number 24
        decoded.clear()
        video.read([3])
        assert len(decoded) == 4


def test_a_seek_that_lands_elsewhere_is_noticed(videos, numbers_of, monkeypatch):
    with open_video(str(videos["b_frames.mp4"]), "pyav") as video:
        late = [key._replace(pts=key.pts - 3000, dts=key.dts - 1) for key in video._keys]
        monkeypatch.setattr(video, "_keys", late)
        assert numbers_of(video.read([2, 14, 25])) == [2, 14, 25]


def test_auto_prefers_pyav_and_takes_what_there_is(monkeypatch):
    assert choose_decoder("auto") == "pyav"
    broken = {"pyav": "No module named 'av'"}
    monkeypatch.setattr(decode, "_what_is_wrong", lambda name: broken.get(name, ""))
    assert choose_decoder("auto") == "decord"
    assert available_decoders() == ("decord",)
    with pytest.raises(DecoderError, match=r"pyav cannot be used: No module.*pip install av"):
        choose_decoder("pyav")
    broken["decord"] = "OSError: libavcodec"
    with pytest.raises(DecoderError, match=r"pip install av\. decord cannot be used: OSError"):
        choose_decoder("auto")


def test_a_decoder_that_decodes_wrongly_is_not_available(monkeypatch):
    decode._what_is_wrong.cache_clear()
    black = lambda self, indices: np.zeros((len(indices), 4, 4, 3), np.uint8)  # noqa: E731
    monkeypatch.setattr(decode._PyavReader, "_decode", black)
    try:
        with pytest.raises(DecoderError, match="wrong pixels"):
            choose_decoder("pyav")
    finally:
        decode._what_is_wrong.cache_clear()


def test_versions_name_the_decoders_that_can_be_used():
    assert decoder_versions()["pyav"] == av.__version__
    assert tuple(decoder_versions()) == available_decoders()


def test_decoders_are_imported_when_they_are_used():
    code = "import sys, hpm_video.data.loader; print({'av', 'decord'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
