"""Videos whose frames carry their number, so that a test can tell which frame it got."""

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BITS, SQUARE = 8, 8


def _paint(number: int, height: int, width: int) -> np.ndarray:
    """Smooth colours that move, and the number as a row of black and white squares."""
    y, x = np.mgrid[:height, :width]
    waves = (np.sin((x + 3 * number) / 17), np.sin((y + x) / 23), np.cos((y - 2 * number) / 19))
    frame = (128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
    for bit in range(BITS):
        frame[: 2 * SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 255 * (number >> bit & 1)
    return frame


def _numbers_of(frames: np.ndarray) -> list[int]:
    """(K, H, W, 3) -> the number painted into each frame"""
    row = frames[:, SQUARE, SQUARE // 2 : BITS * SQUARE : SQUARE].mean(axis=-1) > 127
    return (row * 2 ** np.arange(BITS)).sum(axis=1).tolist()


def _write_painted(
    path: Path,
    *,
    frames: int = 40,
    size: tuple[int, int] = (64, 96),
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    **stream: Any,
) -> Path:
    """``times`` are milliseconds. B-frames are on, key frames 12 apart, unless told otherwise."""
    settings = {"pix_fmt": "yuv420p", "gop_size": 12, "max_b_frames": 2, "options": {}} | stream
    with av.open(str(path), "w", options=settings.get("container_options", {})) as container:
        video = container.add_stream(codec, rate=25)
        video.height, video.width = size
        video.pix_fmt, video.options = settings["pix_fmt"], settings["options"]
        video.codec_context.gop_size = settings["gop_size"]
        video.codec_context.max_b_frames = settings["max_b_frames"]
        video.codec_context.time_base = Fraction(1, 1000)
        container.start_encoding()
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(_paint(number, *size), format="rgb24")
            frame.pts = times[number] if times is not None else 40 * number
            frame.time_base = Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


@pytest.fixture(scope="session")
def write_painted() -> Callable[..., Path]:
    return _write_painted


@pytest.fixture(scope="session")
def numbers_of() -> Callable[[np.ndarray], list[int]]:
    return _numbers_of


@pytest.fixture(scope="session")
def bad_videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind that does not decode."""
    folder = tmp_path_factory.mktemp("bad")
    whole = _write_painted(folder / "whole.mp4").read_bytes()
    bad = {
        name: folder / f"{name}.mp4" for name in ("missing", "empty", "text", "audio", "cut", "dir")
    }
    bad["empty"].touch()
    bad["text"].write_text("I am not a video\n" * 50)
    bad["cut"].write_bytes(whole[: len(whole) // 2])
    bad["dir"].mkdir()
    with av.open(str(bad["audio"]), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 8192), np.float32), format="fltp", layout="mono"
        )
        silence.rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    return bad


# --- Hostile files ---------------------------------------------------------------------------

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
"""Videos that are good, and unlike most."""


def _patched(path: Path, kind: bytes, place: int, values: bytes, source: Path) -> Path:
    """A copy of an MP4 file in which a box of that kind holds other values."""
    data = bytearray(source.read_bytes())
    start = data.index(kind) + 4 + place
    data[start : start + len(values)] = values
    path.write_bytes(data)
    return path


def _trimmed(path: Path, source: Path, *, skipped: int, shown: int | None) -> Path:
    """With an edit list: so many frames of 40 ms are not shown at the start, and at the end."""
    data = source.read_bytes()
    _, count, duration, start, _ = struct.unpack_from(">IIIiI", data, data.index(b"elst") + 4)
    assert count == 1
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd") + 4 + 12)[0]
    start += skipped * timescale * 40 // 1000
    duration = duration if shown is None else 40 * shown  # in milliseconds
    return _patched(path, b"elst", 8, struct.pack(">Ii", duration, start), source)


@pytest.fixture(scope="session")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good videos unlike most: many codecs and containers, trimmed, turned, of odd sizes."""
    folder = tmp_path_factory.mktemp("odd")
    files = {
        name: _write_painted(folder / name, **{"frames": ODD_FRAMES} | how)
        for name, how in ODD.items()
    }
    plain = files["plain.mp4"]
    one = 1 << 16
    for name, (a, b, c, d) in {
        "turned_90.mp4": (0, one, -one, 0),
        "turned_180.mp4": (-one, 0, 0, -one),
        "turned_270.mp4": (0, -one, one, 0),
    }.items():
        matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        files[name] = _patched(folder / name, b"tkhd", 40, matrix, plain)
    for name, skipped, shown in (
        ("start_trimmed.mp4", 5, None),
        ("end_trimmed.mp4", 0, 20),
        ("both_trimmed.mp4", 12, 10),
    ):
        files[name] = _trimmed(folder / name, plain, skipped=skipped, shown=shown)
    return files


def _write_growing(path: Path) -> Path:
    """Its frames change from 64x64 to 96x96 in the middle."""
    with av.open(str(path), "w") as container:
        stream = None
        for start, side in ((0, 64), (20, 96)):
            options = {"x264-params": "repeat-headers=1:bframes=0:keyint=10", "preset": "ultrafast"}
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width = encoder.height = side
            encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 25)
            encoder.options = options
            if stream is None:
                stream = container.add_stream("libx264", rate=25)
                stream.width = stream.height = side
                stream.pix_fmt = "yuv420p"
                stream.options = {"x264-params": "repeat-headers=1:bframes=0"}
            for number in range(start, start + 20):
                frame = av.VideoFrame.from_ndarray(_paint(number, side, side), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
            for packet in encoder.encode(None):
                packet.stream = stream
                container.mux(packet)
    return path


def _flipped(data: bytes, seed: int, count: int) -> bytes:
    draw = np.random.default_rng(seed)
    values = np.frombuffer(data, np.uint8).copy()
    values[draw.integers(0, len(values), count)] ^= draw.integers(1, 256, count, np.uint8)
    return values.tobytes()


def _lists(folder: Path, video: Path) -> dict[str, bytes]:
    """Files that are no videos and name one that lies beside them."""
    name = video.name
    return {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n".encode(),
        "concat.mp4": f"ffconcat version 1.0\nfile {name}\n".encode(),
        "sdp.mp4": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\n"
        b"t=0 0\r\nm=video 5004 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n",
        "dash.mp4": b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
        b'profiles="urn:mpeg:dash:profile:isoff-main:2011" type="static"><Period>'
        + f"<BaseURL>{name}</BaseURL></Period></MPD>\n".encode(),
    }


@pytest.fixture(scope="session")
def list_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Playlists and the like under the name of a video, and a real video beside them."""
    folder = tmp_path_factory.mktemp("lists")
    video = _write_painted(folder / "real.mp4", frames=5)
    found = {}
    for name, data in _lists(folder, video).items():
        found[name] = folder / name
        found[name].write_bytes(data)
    return found


@pytest.fixture(scope="session")
def hostile_files(
    tmp_path_factory: pytest.TempPathFactory,
    odd_files: dict[str, Path],
    list_files: dict[str, Path],
    bad_videos: dict[str, Path],
) -> dict[str, Path]:
    """Files to survive, by name: odd ones that decode, damaged ones, and what is no video."""
    folder = tmp_path_factory.mktemp("hostile")
    files = {**odd_files, **list_files, **{f"{name}.mp4": bad_videos[name] for name in bad_videos}}
    made: dict[str, bytes] = {}
    fast = {"container_options": {"movflags": "faststart"}}
    whole = _write_painted(folder / "whole.mp4", frames=ODD_FRAMES, **fast).read_bytes()
    for twentieth in range(1, 20):
        cut = len(whole) * twentieth // 20
        made[f"cut_{twentieth:02d}.mp4"] = whole[:cut]
    for name in ("plain.mp4", "mpeg4.avi", "vp9.webm", "hevc.mp4", "stream.ts"):
        data = odd_files[name].read_bytes()
        stem, _, ending = name.partition(".")
        for seed in range(4):
            made[f"flipped_{stem}_{seed}.{ending}"] = _flipped(data, seed, 1 + len(data) // 200)
    avi = bytearray(odd_files["mpeg4.avi"].read_bytes())
    struct.pack_into("<I", avi, avi.index(b"avih") + 8 + 16, 10 * ODD_FRAMES)
    struct.pack_into("<I", avi, avi.index(b"strh") + 8 + 32, 10 * ODD_FRAMES)
    made["overstated.avi"] = bytes(avi)
    noise = np.random.default_rng(0).bytes(20000)
    made["random.mp4"] = noise
    made["random.avi"] = noise
    start = whole.index(b"mdat") + 4
    made["scrambled.mp4"] = whole[:start] + noise[: len(whole) - start].ljust(len(whole) - start)
    made["name_only.mp4"] = whole[:24]
    for name, data in made.items():
        files[name] = folder / name
        files[name].write_bytes(data)
    for name in ("growing.mp4", "growing.mkv", "growing.ts"):
        files[name] = _write_growing(folder / name)
    files["no_frames.mp4"] = _write_painted(folder / "no_frames.mp4", frames=0)
    files["no_frames.avi"] = _write_painted(folder / "no_frames.avi", frames=0, codec="mpeg4")
    return files
