"""Members of tar files, folders of frames, and how their locations are written."""

import io
import os
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from hpm_video.decoding.locations import TarMember, base_name, frames_in, is_image, natural_order
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import available_decoders, open_video

DECODERS = available_decoders()


@pytest.mark.parametrize(
    "member",
    [
        TarMember("/a/b.tar", "c.mp4", 512, 9),
        TarMember("/a b/c:d@e+1.tar", "f g/h@2+3:i.mp4", 1536, 10**12),
        TarMember("/a.tar", "b.tar::c@1+2", 512, 0),
        TarMember("/a.TAR", "new\nline.jpg", 512, 1),
    ],
)
def test_a_place_in_a_tar_comes_back(member):
    assert TarMember.parse(str(member)) == member


@pytest.mark.parametrize(
    "place",
    [
        "/a.tar",
        "/a.tar::b.mp4",
        "/a.tar::b@1",
        "/a.tar::@1+2",
        "/a::b@1+2",
        "/a.tar::b@-1+2",
        "/a/",
    ],
)
def test_other_places_name_no_member(place):
    assert TarMember.parse(place) is None


@pytest.mark.parametrize(
    ("place", "name", "image"),
    [
        ("/a/b.mp4", "b.mp4", False),
        ("/a/b.JPG", "b.JPG", True),
        ("/a/b.jpg/", "b.jpg", False),
        ("/a.tar::b/c.jpg@512+7", "c.jpg", True),
        ("/a.tar::c.mp4@512+7", "c.mp4", False),
        ("/a.jpg.tar::c.mp4@512+7", "c.mp4", False),
    ],
)
def test_the_name_tells_an_image(place, name, image):
    assert base_name(place) == name
    assert is_image(place) is image


def packed(path, files, *, kind=tarfile.PAX_FORMAT):
    """Pack files into a tar. -> the location of each"""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {
            one.name: str(TarMember(str(path), one.name, one.offset_data, one.size)) for one in tar
        }


NAMES = ("a.mp4", "a video@1+2: two.mp4", f"{'long/' * 40}name.mp4", "größe.mp4")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_video_in_a_tar(tmp_path, write_painted, numbers_of, kind, decoder):
    path = write_painted(tmp_path / "a.mp4")
    places = packed(tmp_path / "shard 0.tar", dict.fromkeys(NAMES, path.read_bytes()), kind=kind)
    with open_video(str(path), decoder) as video:
        expected = video.read([30, 3, 4])
    for name in NAMES:
        with open_video(places[name], decoder) as video:
            assert video.num_frames == 40
            assert video.frame_size == (64, 96)
            assert np.array_equal(video.read([30, 3, 4]), expected)
            assert numbers_of(video.read([3])) == [3]


def test_tars_of_other_programs(tmp_path, write_painted):
    path = write_painted(tmp_path / "a.mp4", frames=3)
    for kind in ("ustar", "gnu", "posix", "v7"):
        tar = tmp_path / f"{kind}.tar"
        subprocess.run(
            ["tar", f"--format={kind}", "-cf", tar, "-C", tmp_path, path.name], check=True
        )
        with tarfile.open(tar) as read:
            (one,) = read
        with open_video(str(TarMember(str(tar), one.name, one.offset_data, one.size))) as video:
            assert video.num_frames == 3


def test_an_image_in_a_tar(tmp_path):
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    (place,) = packed(tmp_path / "a.tar", {"x/b.png": buffer.getvalue()}).values()
    with open_video(place) as image:
        assert np.array_equal(image.read([0])[0], picture)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 7}, "that file does not lie there: the tar file has changed"),
        ({"name": "b.mp4"}, "that file does not lie there"),
        ({"offset": 513}, "that file does not lie there"),
        ({"offset": 0}, "that file does not lie there"),
        ({"offset": 10**9}, "that file does not lie there"),
        ({"size": 10**9}, "that file does not lie there"),
        ({"tar": "/nowhere.tar"}, "there is no such file"),
    ],
)
def test_a_tar_that_changed(tmp_path, change, reason):
    (place,) = packed(tmp_path / "a.tar", {"a.mp4": b"x" * 600}).values()
    member = TarMember.parse(place)
    wrong = str(TarMember(**{**member.__dict__, **change}))
    with pytest.raises(DecodeError, match=reason) as caught:
        open_video(wrong)
    assert caught.value.path == wrong


def test_a_link_in_a_tar_is_no_file(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("b.mp4"))
    with pytest.raises(DecodeError, match="does not lie there"):
        open_video(str(TarMember(str(path), "a.mp4", 512, 0)))
    with pytest.raises(DecodeError, match="the file is empty"):
        open_video(str(TarMember(str(path), "b.mp4", 1024, 0)))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(DecodeError, match="it is no file, but a pipe"):
        open_video(str(tmp_path / "a.mp4"))


def test_natural_order():
    names = ["img_10.png", "img_2.png", "b1", "img_02.png", "a", "10", "9", "img_2"]
    expected = ["9", "10", "a", "b1", "img_02.png", "img_2", "img_2.png", "img_10.png"]
    assert sorted(names, key=natural_order) == expected


@pytest.fixture
def folder(tmp_path):
    """Eleven frames, each of one colour, and files that are not frames."""
    place = tmp_path / "a video.mp4"
    place.mkdir()
    for number in range(11):
        picture = np.full((6, 8, 3), 10 * number, np.uint8)
        Image.fromarray(picture).save(place / f"img_{number}.{'png' if number % 2 else 'BMP'}")
    Image.new("RGB", (2, 2)).save(place / ".hidden.png")
    (place / "notes.txt").write_text("of no account")
    return place


def test_a_folder_of_frames(folder):
    assert [path.stem for path in frames_in(f"{folder}/")] == [f"img_{i}" for i in range(11)]
    with open_video(f"{folder}/") as video:
        assert video.num_frames == 11
        assert video.frame_size == (6, 8)
        assert video.read([10, 2, 2])[:, 0, 0, 0].tolist() == [100, 20, 20]
        with pytest.raises(IndexError, match=r"0\.\.10"):
            video.read([11])


def test_only_wanted_frames_of_a_folder_are_decoded(folder):
    (folder / "img_5.png").write_bytes(b"no image")
    with open_video(f"{folder}/") as video:
        assert video.read([4, 6])[:, 0, 0, 0].tolist() == [40, 60]
        with pytest.raises(DecodeError, match=r"img_5\.png: it is no image"):
            video.read([4, 5])


def test_frames_of_a_folder_are_of_one_size(folder):
    Image.new("RGB", (9, 6)).save(folder / "img_7.png")
    with open_video(f"{folder}/") as video:
        assert video.read([0, 6]).shape == (2, 6, 8, 3)
        with pytest.raises(DecodeError, match=r"its frames change size, from 8x6 to 9x6\. Encode"):
            video.read([6, 7])


def test_folders_without_frames(tmp_path):
    with pytest.raises(DecodeError, match="there are no images in the folder"):
        open_video(f"{tmp_path}/")
    with pytest.raises(DecodeError, match="there is no such file"):
        open_video(f"{tmp_path}/nowhere/")
