import dataclasses
import struct
import subprocess
import sys

import av
import numpy as np
import pytest

from hpm_video.decoding import pyav
from hpm_video.decoding import registry as decode
from hpm_video.decoding.reader import DecodeError, DecoderError
from hpm_video.decoding.registry import (
    available_decoders,
    choose_decoder,
    decoder_versions,
    open_video,
)
from hpm_video.preparation.encode import write_video

DECODERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in available_decoders(), reason=f"{name} is not there, or does not work here"
        ),
    )
    for name in ("pyav", "torchcodec", "decord")
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


SKIPPING = {  # name -> options for writing it, and whether some of its frames can be skipped
    "pyramid.mp4": ({"max_b_frames": 5, "options": {"x264-params": "b-pyramid=normal"}}, True),
    "open.mp4": ({"max_b_frames": 3, "options": OPEN_GROUPS}, True),
    "interlaced.mp4": ({"options": {"x264-params": "tff=1"}}, True),
    "refs.mkv": ({"options": {"x264-params": "ref=6:bframes=8:b-adapt=2:weightp=2"}}, True),
    "mpeg4.mp4": ({"codec": "mpeg4", "max_b_frames": 3}, True),
    "hevc.mp4": (
        {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=4"}},
        True,
    ),
    "hevc_layers.mp4": (
        {
            "codec": "libx265",
            "options": {"x265-params": "log-level=none:bframes=4:temporal-layers=3"},
        },
        False,
    ),
    "vp9.webm": ({"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}, False),
    "av1.mp4": ({"codec": "libsvtav1", "options": {"preset": "10"}}, False),
}


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, write_painted):
    folder = tmp_path_factory.mktemp("skipping")
    found = {}
    for name, (options, skips) in SKIPPING.items():
        options = {"size": (128, 128), "gop_size": 20} | options
        found[name] = (write_painted(folder / name, **options), skips)
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_painted):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_painted(folder / name, **options) for name, options in VIDEOS.items()}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", VIDEOS)
def test_each_frame_asked_for_is_the_frame_that_comes(videos, numbers_of, name, decoder):
    draw = np.random.default_rng(1)
    if decoder == "torchcodec" and name.endswith(".avi"):
        with pytest.raises(DecodeError, match=r"torchcodec is not known to be exact .* use PyAV"):
            open_video(str(videos[name]), decoder)
        return
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


@pytest.mark.parametrize("decoder", DECODERS[1:])
@pytest.mark.parametrize("name", VIDEOS)
def test_decoders_agree_on_every_pixel(videos, name, decoder):
    """In frames of odd size the decoders enlarge half-resolution colours differently."""
    if decoder == "torchcodec" and name.endswith(".avi"):
        pytest.skip("torchcodec is kept away from it")
    with (
        open_video(str(videos[name]), "pyav") as video,
        open_video(str(videos[name]), decoder) as other,
    ):
        indices = range(0, video.num_frames, 3)
        difference = np.abs(video.read(indices).astype(int) - other.read(indices))
    if name == "odd_halved.avi":
        assert difference[:, 18:].max() <= 24  # below the squares with their sharp edges
        assert difference.mean() < 2
    else:
        assert difference.max() == 0


def test_mpeg_transport_streams(tmp_path, write_painted, numbers_of):
    """decord silently loses their first frames; torchcodec stops in the middle."""
    path = str(write_painted(tmp_path / "stream.ts"))
    with open_video(path, "pyav") as video:
        assert numbers_of(video.read([30, 2, 13])) == [30, 2, 13]
    for decoder in set(available_decoders()) - {"pyav"}:
        with pytest.raises(DecodeError, match=f"{decoder} is not known to be exact .* use PyAV"):
            open_video(path, decoder)


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
    place = data.index(b"tkhd") + 44  # the matrix, after the times, the track and its layer
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
        later = dataclasses.replace(video.index, times=video.index.times + 1)
        monkeypatch.setattr(video, "index", later)
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


@pytest.fixture
def counted(videos, monkeypatch):
    """An open video of 40 frames with a key frame every 12, and the times of decoded frames."""
    with open_video(str(videos["b_frames.mp4"]), "pyav") as video:
        decoded = []
        by_time = video._by_time

        def noted(packets):
            for time, frame in by_time(packets):
                decoded.append(video.index.times.tolist().index(time))
                yield time, frame

        monkeypatch.setattr(video, "_by_time", noted)
        video.read([39])  # now its size is known
        decoded.clear()
        yield video, decoded


def test_pyav_decodes_only_from_the_key_frame_to_the_last_wanted_frame(counted):
    video, decoded = counted
    video.read([29, 26, 29])
    assert decoded[0] == 24  # the key frame
    assert decoded[-1] == 29
    decoded.clear()
    video.read([3])
    assert {0, 3} <= set(decoded) <= {0, 1, 2, 3}
    decoded.clear()
    video.read([1, 38])
    assert not set(decoded) & {*range(6, 35)}


def test_pyav_goes_on_where_it_stopped(counted, numbers_of):
    video, decoded = counted
    for number in range(40):
        assert numbers_of(video.read([number])) == [number]
    assert sorted(decoded) == [*range(40)]
    decoded.clear()
    assert numbers_of(video.read([2, 11])) == [2, 11]
    assert numbers_of(video.read([14])) == [14]
    assert numbers_of(video.read([10, 13])) == [10, 13]  # backwards
    assert numbers_of(video.read([15, 39])) == [15, 39]


@pytest.mark.parametrize("name", SKIPPING)
def test_frames_that_no_other_refers_to_are_not_decoded(skipping, name):
    """The other frames are the same to the last bit."""
    path, skips = skipping[name]
    draw = np.random.default_rng(2)
    with open_video(str(path), "pyav") as video:
        every = video.read(range(video.num_frames))
        for _ in range(25):
            count = int(draw.integers(1, 5))
            indices = np.sort(draw.choice(video.num_frames, count, replace=False))
            assert np.array_equal(video.read(indices), every[indices])
        with open_video(str(path), "pyav") as other:
            assert np.array_equal(other.read([video.num_frames - 1]), every[-1:])
            assert bool(other._skipped) is skips


@pytest.mark.parametrize("goes_on", [False, True])
def test_frames_that_skipping_loses_are_decoded_with_all_others(counted, numbers_of, goes_on):
    video, decoded = counted
    if goes_on:
        video.read([13])
    by_time = video._by_time

    def losing(packets):
        for time, frame in by_time(packets):
            if not video._skips or video.index.times.tolist().index(time) != 16:
                yield time, frame

    video._by_time = losing
    video._frames = losing(video._container.demux(video._stream)) if goes_on else video._frames
    assert numbers_of(video.read([14, 16, 18])) == [14, 16, 18]
    assert not video._skipped


def test_reading_goes_on_after_damage(tmp_path, write_painted, numbers_of):
    path = write_painted(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data[packets[20].pos : packets[20].pos + packets[20].size] = b"\xff" * packets[20].size
    path.write_bytes(data)
    with open_video(str(path), "pyav") as video:
        for _ in range(2):
            with pytest.raises(DecodeError, match="it is damaged: .* Download it again"):
                video.read(range(40))
            assert numbers_of(video.read([3, 26, 39])) == [3, 26, 39]


def test_a_seek_that_lands_elsewhere_is_noticed(videos, numbers_of, monkeypatch):
    with open_video(str(videos["b_frames.mp4"]), "pyav") as video:
        late = [(pts - 3000, dts - 1) for pts, dts in video.index.keys]
        monkeypatch.setattr(video, "index", dataclasses.replace(video.index, keys=late))
        assert numbers_of(video.read([2, 14, 25])) == [2, 14, 25]


def test_auto_prefers_pyav_and_takes_what_there_is(monkeypatch):
    assert choose_decoder("auto") == "pyav"
    broken = {"pyav": "No module named 'av'"}
    monkeypatch.setattr(decode, "what_is_wrong", lambda name: broken.get(name, ""))
    assert choose_decoder("auto") == "torchcodec"
    broken["torchcodec"] = "RuntimeError: no FFmpeg"
    assert choose_decoder("auto") == "decord"
    assert available_decoders() == ("decord",)
    with pytest.raises(DecoderError, match=r"pyav cannot be used: No module.*pip install av"):
        choose_decoder("pyav")
    broken["decord"] = "OSError: libavcodec"
    with pytest.raises(
        DecoderError, match=r"pip install av\. torchcodec .* decord cannot be used: OSError"
    ):
        choose_decoder("auto")


def test_a_decoder_that_decodes_wrongly_is_not_available(monkeypatch):
    decode.what_is_wrong.cache_clear()
    black = lambda self, indices: np.zeros((len(indices), 4, 4, 3), np.uint8)  # noqa: E731
    monkeypatch.setattr(decode.PyavReader, "_decode", black)
    try:
        with pytest.raises(DecoderError, match="wrong pixels"):
            choose_decoder("pyav")
    finally:
        decode.what_is_wrong.cache_clear()


def test_a_reader_may_give_further_channels(monkeypatch):
    class WithDepth(decode.PyavReader):
        def _decode(self, indices):
            frames = super()._decode(indices)
            return np.concatenate([frames, np.zeros_like(frames[..., :1])], axis=-1)

    monkeypatch.setitem(decode.DECODERS, "depth", decode.Decoder(WithDepth, "av", "pip install av"))
    assert choose_decoder("depth") == "depth"


def test_versions_name_the_decoders_that_can_be_used():
    assert decoder_versions()["pyav"] == av.__version__
    assert tuple(decoder_versions()) == available_decoders()


@pytest.mark.slow
def test_decoders_are_imported_when_they_are_used():
    code = "import sys, hpm_video.data.loader; "
    code += "print({'av', 'decord', 'torchcodec'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def read_twice(path):
    """Check that the index of a file and its packets say the same.

    -> number of frames, and whether the index was used
    """
    found = []
    for reads in (pyav.read_listing, lambda source: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pyav, "read_listing", reads)
            patch.setattr(pyav, "_INDICES", {})
            video = pyav.PyavReader(str(path), str(path))
        with video:
            frames = video.read(range(0, video.num_frames, 3))
            times, repeats = video.index.times.tolist(), video.index.repeats
            found.append((times, repeats, frames, video._listing is not None))
    (times, repeats, frames, is_used), (*same, as_packets, _) = found
    assert (times, repeats) == (*same,)
    assert np.array_equal(frames, as_packets)
    return len(times), is_used


@pytest.mark.parametrize("name", VIDEOS)
def test_the_index_of_a_file_says_what_its_packets_do(videos, name):
    """Frames in order are an exception: the decoder might still hold some of them back."""
    usable = {"b_frames", "variable_rate", "late_start", "long_group", "short_groups"}
    usable |= {"open_groups", "odd_size"}
    assert read_twice(videos[name])[1] is (
        name.endswith(".mp4") and name.removesuffix(".mp4") in usable
    )


def test_an_index_is_used_if_all_packets_are_there(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    frames = [np.roll(noise, number, axis=1) for number in range(36)]
    write_video(tmp_path / "a.mp4", frames, quick=True)
    assert read_twice(tmp_path / "a.mp4") == (36, True)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 2 // 3])
    with open_video(str(tmp_path / "a.mp4"), "pyav") as video:
        assert video._listing is None
        assert 0 < video.num_frames < 36


def test_an_index_of_edits_is_not_used(tmp_path, write_painted):
    path = write_painted(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12  # the first time, after version, count and duration
    began = int.from_bytes(data[place + 4 : place + 8], "big")
    data[place + 4 : place + 8] = (began + 6400).to_bytes(4, "big")  # this skips some frames
    path.write_bytes(data)
    count, is_used = read_twice(path)
    assert count < 40
    assert not is_used


def test_entries_of_an_index_beyond_their_stated_number_are_not_believed(tmp_path, videos):
    data = bytearray(videos["b_frames.mp4"].read_bytes())
    place = data.index(b"ctts") + 8
    data[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") - 3).to_bytes(
        4, "big"
    )
    (tmp_path / "a.mp4").write_bytes(data)
    assert not read_twice(tmp_path / "a.mp4")[1]


def test_key_frames_that_only_packets_know_are_not_sought(tmp_path, videos):
    """The list of key frames lacks the first ones, so FFmpeg would refuse to seek there."""
    data = bytearray(videos["short_groups.mp4"].read_bytes())
    place = data.index(b"stss") + 8
    count = int.from_bytes(data[place : place + 4], "big")
    data[place + 4 : place + 8 + 4 * (count - 1)] = b"".join(
        (36 + n // count).to_bytes(4, "big") for n in range(count)
    )
    (tmp_path / "a.mp4").write_bytes(data)
    read_twice(tmp_path / "a.mp4")
