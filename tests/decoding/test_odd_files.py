"""Odd files as found in the wild: cut streams, wrong times, several tracks, palettes, mirroring.

Each frame shows its number in black and white, so that it can be read back.
"""

import random
import re
import shlex
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from hpm_video.data.manifest import read_manifest
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import available_decoders, open_video
from hpm_video.preparation.check import examine
from hpm_video.preparation.encode import write_video
from hpm_video.preparation.jobs import paced
from hpm_video.preparation.transcode import Job, Output, Recipe, Transcoder

COUNT = 40
GROUP = 12
HEIGHT, WIDTH = 96, 128
RECIPE = Recipe("files", HEIGHT, None, 5, 12, 95, 10**9, copy=False)
OPTIONS = {
    "libx264": {"x264-params": f"bframes=3:b-adapt=0:scenecut=0:keyint={GROUP}"},
    "libx265": {"x265-params": f"log-level=none:bframes=3:keyint={GROUP}"},
    "mpeg1video": {"bf": "2", "g": str(GROUP)},
    "mpeg2video": {"bf": "2", "g": str(GROUP)},
}


def painted(number: int) -> np.ndarray:
    frame = np.full((HEIGHT, WIDTH, 3), (40 + 3 * number, 120, 60), np.uint8)
    frame[:8] = np.repeat([255 * (number >> bit & 1) for bit in range(8)], WIDTH // 8)[:, None]
    return frame


def numbers_of(frames: np.ndarray) -> list[int]:
    bits = frames[:, 4, 4 :: WIDTH // 8].mean(axis=-1) > 128
    return (bits @ 2 ** np.arange(8)).tolist()


def add_track(
    container, codec, pixel_format="yuv420p", count=COUNT, first=0, numbers=None, **disposition
):
    track = container.add_stream(codec, rate=25, options=OPTIONS.get(codec, {}))
    track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, pixel_format
    for flag in disposition:
        track.disposition = Disposition[flag]

    def packets():
        for number, shown in enumerate(numbers or range(first, first + count)):
            frame = av.VideoFrame.from_ndarray(painted(shown), format="rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            yield from track.encode(frame)
        yield from track.encode()

    return packets()


def write(
    path: Path, codec: str, pixel_format: str = "yuv420p", container: str | None = None
) -> Path:
    with av.open(str(path), "w", format=container) as output:
        for packet in add_track(output, codec, pixel_format):
            output.mux(packet)
    return path


def copy(source: Path, target: Path, change=lambda packet: packet, skip: int = 0) -> Path:
    """Copy as ``ffmpeg -c copy`` does, but change each packet and skip the first ones."""
    with av.open(str(source)) as given, av.open(str(target), "w") as output:
        track = given.streams.video[0]
        copied = output.add_stream_from_template(track)
        for number, packet in enumerate(given.demux(track)):
            if packet.size and number >= skip:
                packet = change(packet)
                packet.stream = copied
                output.mux(packet)
    return target


def read_all(path: Path, decoder: str = "pyav") -> np.ndarray:
    """Read all frames in order, and check that random access gives the same ones."""
    with open_video(str(path), decoder) as video:
        frames = video.read(range(video.num_frames))
    draw = random.Random(0)
    for _ in range(8):
        indices = sorted(draw.sample(range(len(frames)), 3))
        with open_video(str(path), decoder) as video:
            np.testing.assert_array_equal(video.read(indices), frames[indices])
            np.testing.assert_array_equal(video.read(indices[:1]), frames[indices[:1]])
    return frames


def with_times_of_decoding(packet):
    packet.pts = packet.dts
    return packet


@pytest.mark.parametrize("suffix", ["mkv", "ts", "flv"])
def test_times_that_are_those_of_decoding_do_not_change_the_order(tmp_path, suffix):
    source = write(tmp_path / "source.mp4", "libx264")
    copy(source, path := tmp_path / f"lying.{suffix}", with_times_of_decoding)
    assert numbers_of(read_all(path)) == [*range(COUNT)]


def write_lying_later(folder: Path) -> Path:
    source = write(folder / "source.mp4", "libx264")
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    late = [packet.pts for packet in packets if packet.dts >= packets[26].dts]
    times = dict(zip(late, sorted(late), strict=True))

    def change(packet):
        packet.pts = times.get(packet.pts, packet.pts)
        return packet

    assert late != sorted(late)
    return copy(source, folder / "lying.mkv", change)


def test_times_that_begin_to_lie_later_are_an_error(tmp_path):
    """Two joined files have such times. No frame may be read in the wrong order."""
    path = write_lying_later(tmp_path)
    with open_video(str(path), "pyav") as video, pytest.raises(DecodeError) as error:
        video.read(range(video.num_frames))
    assert "the times of its frames contradict their order" in str(error.value)


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("libx264", "mkv"), ("libx264", "ts"), ("libx264", "flv"), ("libx264", "mp4")]
    + [("mpeg2video", "mkv"), ("libx265", "mkv")],
)
def test_a_stream_that_begins_inside_a_group_begins_with_what_can_be_decoded(
    tmp_path, codec, suffix
):
    source = write(tmp_path / "source.mkv", codec)
    path = copy(source, tmp_path / f"cut.{suffix}", skip=5)
    frames = numbers_of(read_all(path))
    assert frames == [*range(frames[0], COUNT)]
    assert 0 < frames[0] <= 2 * GROUP


def test_an_elementary_stream_is_read_from_its_first_frame_on(tmp_path):
    path = write(tmp_path / "stream.mpg", "mpeg1video", container="mpeg1video")
    assert numbers_of(read_all(path)) == [*range(COUNT)]


@pytest.mark.parametrize(
    ("codec", "pixel_format", "suffix"),
    [
        ("qtrle", "gray", "mov"),  # a palette, which only the first packet holds
        ("qtrle", "rgb24", "mov"),
        ("cinepak", "rgb24", "mov"),
        ("rawvideo", "rgb24", "mov"),
        ("rawvideo", "rgb555le", "avi"),
        ("msvideo1", "rgb555le", "avi"),
        ("ffv1", "yuv444p16le", "mkv"),
        ("mjpeg", "yuvj420p", "avi"),
    ],
)
def test_unusual_pixels_are_read_as_the_library_reads_them(tmp_path, codec, pixel_format, suffix):
    path = write(tmp_path / f"video.{suffix}", codec, pixel_format)
    frames = read_all(path)
    assert numbers_of(frames) == [*range(COUNT)]
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(frames, expected)


UNCHANGED = {5, 6, 7, 20, COUNT - 1}
"""Frames that repeat the one before: their packets give no frame."""
SHOWN = [max(n for n in range(number + 1) if n not in UNCHANGED) for number in range(COUNT)]


def write_unchanged(path: Path) -> Path:
    """Write MPEG-4 with packets that say "not coded", as a recording of a screen has."""
    with av.open(str(path.with_name("coded.mkv")), "w") as output:
        for packet in add_track(output, "mpeg4", numbers=SHOWN):
            output.mux(packet)
    with av.open(str(path.with_name("coded.mkv"))) as given, av.open(str(path), "w") as output:
        copied = output.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(video=0)):
            if packet.size and number in UNCHANGED:
                bits = "010" + f"1{number % 25:05b}" + "10" + "0111"
                data = b"\0\0\1\xb6" + int(bits.ljust(16, "1"), 2).to_bytes(2, "big")
                empty = av.Packet(data)
                empty.pts, empty.dts = packet.pts, packet.dts
                empty.time_base, packet = packet.time_base, empty
            if packet.size:
                packet.stream = copied
                output.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_packet_without_a_frame_shows_the_one_before_again(tmp_path, suffix):
    path = write_unchanged(tmp_path / f"screen.{suffix}")
    assert numbers_of(read_all(path)) == SHOWN
    finding = found_by_check(path)
    assert (finding.verdict, finding.num_frames, finding.reasons) == ("fine", COUNT, ())


def test_packets_without_a_frame_are_no_damage_where_frames_are_counted(tmp_path):
    path = write_unchanged(tmp_path / "screen.avi")
    finding = found_by_check(path)
    expected = [number for number in range(COUNT) if number not in UNCHANGED]
    expected += expected[-1:]  # the decoder shows the last one again
    assert numbers_of(read_all(path)) == expected
    assert (finding.verdict, finding.num_frames, finding.reasons) == ("fine", len(expected), ())


@pytest.mark.parametrize("decoder", available_decoders())
def test_the_best_of_several_streams_is_read_by_all(tmp_path, decoder):
    """A cover picture does not count, and a default track is better than the first one."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as output:
        tracks = [
            add_track(output, "mpeg4", first=100, original=True),
            add_track(output, "mpeg4", default=True),
        ]
        for packets in zip(*tracks, strict=True):
            for packet in packets:
                output.mux(packet)
    if decoder == "decord":
        with pytest.raises(
            DecodeError, match="2 video streams, and the one to read is not the first, which"
        ):
            open_video(str(path), decoder)
    else:
        assert numbers_of(read_all(path, decoder)) == [*range(COUNT)]


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as output:
        sound = output.add_stream("aac", rate=16000)
        cover = add_track(output, "mjpeg", "yuvj420p", count=1, attached_pic=True)
        for packet in cover:
            output.mux(packet)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        for packet in [*sound.encode(frame), *sound.encode()]:
            output.mux(packet)
    with pytest.raises(DecodeError, match="no video stream, but a cover picture"):
        open_video(str(path), "pyav")


MATRICES = {  # (a, b, c, d): the column (x, y) becomes (a x + c y, b x + d y)
    (1, 0, 0, 1): lambda frame: frame,
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (-1, 0, 0, -1): lambda frame: frame[::-1, ::-1],
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (0, -1, 1, 0): np.rot90,
    (0, 1, 1, 0): lambda frame: frame.swapaxes(0, 1),
    (0, -1, -1, 0): lambda frame: np.rot90(frame, 2).swapaxes(0, 1),
}


def set_matrix(path: Path, matrix) -> None:
    """Write the display matrix into the header of the track."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_frame_is_turned_and_mirrored_as_its_display_matrix_says(tmp_path, matrix):
    path = write(tmp_path / "video.mp4", "mpeg4")
    with open_video(str(path), "pyav") as video:
        stored = video.read([7])[0]
    set_matrix(path, matrix)
    with open_video(str(path), "pyav") as video:
        np.testing.assert_array_equal(video.read([7])[0], MATRICES[matrix](stored))
        assert video.frame_size == MATRICES[matrix](stored).shape[:2]


@pytest.mark.parametrize("decoder", [name for name in available_decoders() if name != "pyav"])
def test_other_decoders_turn_videos_alike_and_mirror_none(tmp_path, decoder):
    path = write(tmp_path / "video.mp4", "mpeg4")
    stored = read_all(path)[7]
    for matrix, change in MATRICES.items():
        set_matrix(path, matrix)
        if np.linalg.det(np.array(matrix).reshape(2, 2)) < 0:
            with pytest.raises(DecodeError, match="it is mirrored, which"):
                open_video(str(path), decoder)
        else:
            with open_video(str(path), decoder) as video:
                found = video.read([7])[0].astype(int)
            assert np.abs(found - change(stored)).mean() < 2


@pytest.mark.parametrize(
    ("suffix", "codec"), [("ivf", "libvpx"), ("h264", "libx264"), ("mxf", "mpeg2video")]
)
def test_a_container_that_is_not_read_is_refused_with_what_helps(tmp_path, suffix, codec):
    path = write(tmp_path / f"video.{suffix}", codec)
    for decoder in available_decoders():
        with pytest.raises(
            DecodeError, match="container is none of those.* ffmpeg -i FILE NEW.mp4"
        ):
            open_video(str(path), decoder)


# What tools/check_videos.py says about such files, and what tools/transcode.py makes of them


def found_by_check(path: Path):
    """The check's findings, with which training would read the file."""
    (*_, finding) = paced(examine(str(path), "pyav"))
    return finding


def numbers_of_copy(path: Path, folder: Path, run_tool) -> list[int]:
    listing = folder / "list.csv"
    listing.write_text(f"path\n{path}\n")
    code, output = run_tool("transcode", listing, folder / "copies", "--short-side", HEIGHT)
    assert code == 0, output
    manifest = read_manifest(folder / "copies" / "manifest.csv")
    return numbers_of(read_all(Path(manifest.files[0])))


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_the_check_counts_what_training_reads_of_a_stream_that_was_cut(tmp_path, suffix):
    source = write(tmp_path / "source.mkv", "libx264")
    path = copy(source, tmp_path / f"cut.{suffix}", skip=5)
    finding = found_by_check(path)
    assert finding.verdict == "suspicious"
    assert any(re.search("first (frame|. frames) cannot be decoded", r) for r in finding.reasons)
    assert finding.num_frames == len(read_all(path))


def test_the_check_says_that_times_lie_and_counts_all_frames(tmp_path):
    source = write(tmp_path / "source.mp4", "libx264")
    copy(source, path := tmp_path / "lying.mkv", with_times_of_decoding)
    finding = found_by_check(path)
    assert (finding.verdict, finding.num_frames) == ("suspicious", COUNT)
    assert "its times do not tell the order of its frames" in finding.reasons[0]


def test_a_stream_whose_times_lie_later_is_good_up_to_there(tmp_path):
    path = write_lying_later(tmp_path)
    finding = found_by_check(path)
    assert finding.verdict == "suspicious"
    assert "the times of its frames contradict their order)" in finding.reasons[0]
    with open_video(str(path), "pyav") as video:
        frames = video.read(range(finding.num_frames))
    assert numbers_of(frames) == [*range(finding.num_frames)]


def test_a_cut_off_file_without_a_count_of_frames_is_seen_by_its_length(tmp_path):
    path = tmp_path / "cut.mkv"
    with av.open(str(path), "w") as output:
        for packet in add_track(output, "mjpeg", "yuvj420p", count=200):
            output.mux(packet)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    reasons = found_by_check(path).reasons
    assert any("its header promises 8 s, and it holds " in reason for reason in reasons)


def test_the_check_says_that_there_are_several_streams(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as output:
        tracks = [add_track(output, "mpeg4"), add_track(output, "mpeg4")]
        for packets in zip(*tracks, strict=True):
            for packet in packets:
                output.mux(packet)
    assert "it has 2 video streams" in found_by_check(path).reasons[0]


def damage(path: Path, number: int, count: int = 1) -> Path:
    """Overwrite the data of packets."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for packet in packets[number : number + count]:
        place = data.index(packet)
        data[place : place + len(packet)] = b"\xff" * len(packet)
    path.write_bytes(data)
    return path


def last_of(path: Path, target: Path):
    """Transcode. -> the result, and the frames of the output"""
    job = Job(str(path), f"{target.parent}/beside{target.suffix}", str(target))
    (*_, output) = Transcoder(RECIPE)(job)
    assert isinstance(output, Output), output
    frames = read_all(target)
    numbers = numbers_of(frames)
    for frame, number in zip(frames, numbers, strict=True):
        assert np.abs(frame.astype(int) - painted(number)).mean() < 9, "garbage"
    return output, numbers


@pytest.mark.parametrize(
    ("codec", "suffix", "at"),
    [("libx264", "mp4", 26), ("mjpeg", "avi", 26), ("libx264", "mkv", 37), ("mpeg4", "mkv", 30)],
)
def test_a_damaged_file_keeps_its_frames_up_to_the_damage(tmp_path, codec, suffix, at):
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = damage(write(tmp_path / f"a.{suffix}", codec, form), at)
    output, numbers = last_of(path, tmp_path / "out.mp4")
    assert 0 < output.num_frames <= at
    assert numbers == [*range(output.num_frames)]
    lost = COUNT - output.num_frames
    assert output.note.startswith(f"{lost} of {COUNT} frames are lost (frame {output.num_frames}")
    finding = found_by_check(path)
    assert finding.num_frames <= output.num_frames
    assert "download it again, or encode it anew" in finding.reasons[0]


def test_what_comes_behind_a_gap_in_a_transport_stream_is_not_taken_for_sound(tmp_path):
    path = write(tmp_path / "a.ts", "mpeg2video")
    data, size = path.read_bytes(), 188
    cut = len(data) // size // 2
    path.write_bytes(data[: cut * size] + data[(cut + 5) * size :])
    output, numbers = last_of(path, tmp_path / "out.mp4")
    assert 0 < output.num_frames < COUNT - 5
    assert numbers == [*range(output.num_frames)]
    assert "frames are lost" in output.note


def test_an_avi_of_few_frames_keeps_their_rate(tmp_path):
    """All other packets hold no data; without them the rate would be 2.27 and not 15."""
    path = tmp_path / "few.avi"
    with av.open(str(path), "w") as container:
        track = container.add_stream("mpeg4", rate=15)
        track.width, track.height = WIDTH, HEIGHT
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24")
            frame.pts, frame.time_base = number * 33 // 5, Fraction(1, 15)
            container.mux(track.encode(frame))
        container.mux(track.encode())
    finding = found_by_check(path)
    output, numbers = last_of(path, tmp_path / "out.mp4")
    assert finding.fps == output.fps == pytest.approx(19 / (19 * 33 // 5 / 15), rel=1e-3)
    assert (finding.verdict, numbers, output.note) == ("fine", [*range(20)], "")


def test_a_folder_of_frames_keeps_those_before_the_damaged_one_and_all_of_another_size(tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(20):
        image = Image.fromarray(painted(number))
        image.resize((WIDTH * 2, HEIGHT * 2) if number > 9 else (WIDTH, HEIGHT)).save(
            tmp_path / "frames" / f"{number}.png"
        )
    folder = Path(f"{tmp_path}/frames")
    job = Job(f"{folder}/", f"{tmp_path}/beside.mp4", f"{tmp_path}/out.mp4")
    (*_, output) = Transcoder(RECIPE)(job)
    assert (output.num_frames, output.note) == (20, "")
    assert numbers_of(read_all(tmp_path / "out.mp4")) == [*range(20)]
    (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:-9])
    (*_, output) = Transcoder(RECIPE)(job)
    assert output.num_frames == 17
    assert output.note.startswith("3 of 20 frames are lost (17.png: it is cut off")


@pytest.mark.slow
def test_the_command_that_a_check_prints_mends_the_files(tmp_path, run_tool):
    folder = tmp_path / "my films"
    folder.mkdir()
    damage(write(folder / "end.mp4", "libx264"), COUNT - 3)
    damage(write(folder / "middle.mp4", "libx264"), 26)
    write_lying_later(folder).rename(folder / "lying.mkv")
    (folder / "source.mp4").unlink()
    for name, side in (("one", 1), ("two", 2)):
        with av.open(str(folder / f"{name}.ts"), "w") as output:
            track = output.add_stream("libx264", rate=25)
            track.width, track.height = WIDTH * side, HEIGHT * side
            for number in range(8):
                frame = painted(number).repeat(side, axis=0).repeat(side, axis=1)
                output.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(track.encode())
    two = folder / "two.ts"
    (folder / "sizes.ts").write_bytes((folder / "one.ts").read_bytes() + two.read_bytes())
    (folder / "one.ts").unlink()
    two.unlink()
    code, printed = run_tool("check_videos", folder)
    assert code == 3, printed
    (command,) = re.findall("python tools/transcode.py (.*)", printed)
    arguments = [f"{tmp_path}/out" if it == "OUT" else it for it in shlex.split(command)]
    code, printed = run_tool("transcode", *arguments, "--short-side", HEIGHT)
    assert code == 0, printed
    assert "frames are lost" in printed
    counts = {
        Path(file).stem: len(read_all(Path(file)))
        for file in read_manifest(tmp_path / "out" / "manifest.csv").files
    }
    assert (counts["sizes"], counts["lying"]) == (16, COUNT)
    assert 26 >= counts["middle"] > 16
    assert COUNT > counts["end"] > 26
    # Also from the checked list, which leaves out the bad files.
    code, printed = run_tool(
        "transcode", f"{folder}.checked.csv", tmp_path / "again", "--short-side", HEIGHT
    )
    assert code == 0, printed
    again = {
        Path(file).stem: len(read_all(Path(file)))
        for file in read_manifest(tmp_path / "again" / "manifest.csv").files
    }
    assert again == {name: count for name, count in counts.items() if name != "sizes"}


@pytest.mark.slow
def test_copies_of_odd_files_have_their_frames_in_order(tmp_path, run_tool):
    source = write(tmp_path / "source.mp4", "libx264")
    cut = copy(source, tmp_path / "cut.mkv", skip=5)
    first = numbers_of(read_all(cut))[0]
    (tmp_path / "a").mkdir()
    assert numbers_of_copy(cut, tmp_path / "a", run_tool) == [*range(first, COUNT)]
    lying = copy(source, tmp_path / "lying.mkv", with_times_of_decoding)
    (tmp_path / "b").mkdir()
    assert numbers_of_copy(lying, tmp_path / "b", run_tool) == [*range(COUNT)]


@pytest.mark.slow
@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (0, 1, 1, 0), (0, 1, -1, 0)])
def test_a_copy_stands_upright_as_its_source_does(tmp_path, matrix, run_tool):
    path = write(tmp_path / "video.mp4", "mpeg4")
    set_matrix(path, matrix)
    expected = read_all(path)[7].astype(int)
    listing = tmp_path / "list.csv"
    listing.write_text(f"path\n{path}\n")
    code, output = run_tool("transcode", listing, tmp_path / "copies", "--short-side", HEIGHT)
    assert code == 0, output
    (copied,) = read_manifest(tmp_path / "copies" / "manifest.csv").files
    found = read_all(Path(copied))[7]
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 6


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("clips/a.mp4", "clips\\a.mp4"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}.mp4", "cafe\N{COMBINING ACUTE ACCENT}.mp4"),
        ("cafe\N{COMBINING ACUTE ACCENT}.mp4", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.mp4"),
    ],
)
def test_a_file_of_another_spelling_is_pointed_out(tmp_path, name, asked):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(DecodeError, match="no such file, but there is .*Unicode"):
        open_video(f"{tmp_path}/{asked}")


def test_frames_behind_a_damaged_beginning_are_read(tmp_path):
    path = tmp_path / "video.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (36, 32, 32, 3), dtype=np.uint8)
    write_video(path, noise, gop=12)  # without B-frames, so the order is in doubt
    expected = read_all(path)
    with av.open(str(path)) as container:
        packets = [(each.pos, each.size) for each in container.demux(video=0) if each.size]
    content = bytearray(path.read_bytes())
    for start, size in packets[:12]:
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    with open_video(str(path), "pyav") as video:
        assert video.num_frames == 36
        assert np.array_equal(video.read([24, 30]), expected[[24, 30]])
