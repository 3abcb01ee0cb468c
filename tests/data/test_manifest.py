import os
import re
from pathlib import Path

import pandas as pd
import pytest

from hpm_video.data.manifest import (
    Manifest,
    ManifestError,
    read_listing,
    read_manifest,
    write_manifest,
)
from hpm_video.data.places import files_below


def listed(folder: Path, text: str, name: str = "list.csv", **options) -> Manifest:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_manifest(path, **options)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_table_with_all_columns(tmp_path):
    text = (
        "label,path,extra,num_frames,label_name\n"
        "1,a b.mp4,x,30,run\n"
        '0,"c, d.mp4",y,,walk fast\n'
        "\n"
        ",/abs/e.webm,z,7,\n"
    )
    assert listed(tmp_path, text) == Manifest(
        (f"{tmp_path}/a b.mp4", f"{tmp_path}/c, d.mp4", "/abs/e.webm"),
        (1, 0, -1),
        (30, -1, 7),
        ("walk fast", "run"),
    )


def test_a_table_of_paths_alone_any_suffix(tmp_path):
    manifest = listed(tmp_path, "\ufeffpath\r\nclips/a\r\nb.dat\r\n", root="/videos")
    assert manifest == Manifest(("/videos/clips/a", "/videos/b.dat"), (-1, -1), (-1, -1))
    assert len(manifest) == 2


def test_labels_without_a_name_are_named_by_their_number(tmp_path):
    assert listed(tmp_path, "path,label,label_name\na,3,jump\nb,1,\n").label_names == (
        "0",
        "1",
        "2",
        "jump",
    )


@pytest.mark.parametrize(
    ("text", "labels", "num_frames"),
    [
        ("x y/a.mp4 3\nb 7.MP4\t0\n", (3, 0), (-1, -1)),
        ("x y/a.mp4  3\n\nb 7.MP4 0", (3, 0), (-1, -1)),
        ("x y/a.mp4,3\nb 7.MP4, 0\n", (3, 0), (-1, -1)),
        ("x y/a.mp4 0 -1\nb 7.MP4 0 -1\n", (-1, -1), (-1, -1)),
        ("x y/a.mp4 300 2\nb 7.MP4 1 0\n", (2, 0), (300, 1)),
        ("x y/a.mp4\nb 7.MP4\n", (-1, -1), (-1, -1)),
        ("x y/a.mp4 -1\nb 7.MP4 5\n", (-1, 5), (-1, -1)),
    ],
)
def test_lists_of_videomae_and_its_descendants(tmp_path, text, labels, num_frames):
    files = (f"{tmp_path}/x y/a.mp4", f"{tmp_path}/b 7.MP4")
    assert listed(tmp_path, text, "train.txt") == Manifest(files, labels, num_frames)


def test_lists_of_imagenet(tmp_path):
    text = "n01440764/n01440764_10026.JPEG 0\nn15075141/n15075141_9993.JPEG 999\n"
    train = listed(tmp_path, text, "train.txt", root="/imagenet/train")
    assert train.files == (
        "/imagenet/train/n01440764/n01440764_10026.JPEG",
        "/imagenet/train/n15075141/n15075141_9993.JPEG",
    )
    assert train.labels == (0, 999)
    names = ("a b.jpg", "c.png", "d.mp4.tiff", "e.webp", "f.bmp", "g.jpg.mp4")
    mixed = listed(tmp_path, "".join(f"{name} 3\n" for name in names), "val.txt")
    assert mixed.files == tuple(f"{tmp_path}/{name}" for name in names)
    assert mixed.labels == (3,) * 6


def test_paths_are_spelled_as_pathlib_does(tmp_path):
    paths = ["./a.mp4", "b//c.mp4", "d/./e.mp4", "f/../f.mp4", ".g/h.mp4", "/i/j.mp4", "/k.mp4"]
    paths += ["/l//m.mp4", "n/.o.mp4", "p/../q.mp4", "r..mp4"]
    text = "".join(f"{path}\n" for path in paths)
    assert listed(tmp_path, text).files == tuple(str(tmp_path / path) for path in paths)
    assert listed(tmp_path, text, root="/").files == tuple(str(Path("/", path)) for path in paths)


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("a/", "{root}/a/"),
        ("./a//b/", "{root}/a/b/"),
        ("/c/d//", "/c/d/"),
        ("//c/d.mp4", "/c/d.mp4"),
        ("a/./", "{root}/a/"),
        ("s.tar::a/b.mp4@512+20", "{root}/s.tar::a/b.mp4@512+20"),
        ("./x//s.tar::./a/../b.mp4@512+20", "{root}/x/s.tar::./a/../b.mp4@512+20"),
        ("/x/s.TAR::b.mp4@512+20", "/x/s.TAR::b.mp4@512+20"),
        ("s.tar::b.mp4", "{root}/s.tar::b.mp4"),
        ("..a/b../...", "{root}/..a/b../..."),
    ],
)
def test_folders_of_frames_and_members_of_tars(tmp_path, written, place):
    assert listed(tmp_path, f"path\n{written}\n").files == (place.format(root=tmp_path),)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../f.mp4", "must not climb out of its root"),
        ("a/../../f.mp4", "must not climb out of its root"),
        ("a/./../../{name}/f.mp4", "must not climb out of its root"),
        ("..", "must not climb out of its root"),
        ("../frames/", "must not climb out of its root"),
        ("../s.tar::a.mp4@512+20", "must not climb out of its root"),
        ("s.tar::../a.mp4@512+20", "must not lead out of its tar file"),
        ("s.tar::/etc/passwd@512+20", "must not lead out of its tar file"),
        ("a\0.mp4", "the path holds a line break or a null character; rename"),
        ('"a\nb.mp4"', "the path holds a line break or a null character; rename"),
        ('"a\rb.mp4"', "the path holds a line break or a null character; rename"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_no_path_leads_out_of_the_root(tmp_path, path, reason, given):
    options = {"root": tmp_path} if given else {}
    text = f"path,label\nfirst.mp4,1\n{path.format(name=tmp_path.name)},0\n"
    with pytest.raises(ManifestError, match=reason) as caught:
        listed(tmp_path, text, **options)
    assert re.search(r"list\.csv, line [34]: ", str(caught.value))


@pytest.mark.parametrize(
    "path",
    [
        "/other/f.mp4",
        "{root}/../f.mp4",
        "{root}more/f.mp4",
        "{root}/../{name}s/",
        "/other/s.tar::a.mp4@512+20",
    ],
)
def test_absolute_paths_lie_in_a_root_that_is_given(tmp_path, path):
    path = path.format(root=tmp_path, name=tmp_path.name)
    text = f"path\n{path}\n"
    assert listed(tmp_path, text).files == (path,)
    with pytest.raises(ManifestError, match="line 2: the path lies outside the given root"):
        listed(tmp_path, text, root=tmp_path)
    with pytest.raises(ManifestError, match="line 1: the path lies outside the given root"):
        listed(tmp_path, "/other/f.mp4 1\n", root=tmp_path)
    inside = ("a.mp4", f"{tmp_path}/b.mp4", f"{tmp_path}/c/../d/", f"{tmp_path}/s.tar::a@512+9")
    files = listed(tmp_path, "path\n" + "\n".join(inside) + "\n", root=tmp_path).files
    assert files == (f"{tmp_path}/a.mp4", *inside[1:])


def test_links_are_the_business_of_whoever_owns_the_disk(tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "link").symlink_to(tmp_path)
    file = f"{tmp_path}/list/link/a.mp4"
    text = f"path\n{file}\n"
    assert listed(tmp_path / "list", text, root=tmp_path / "list").files == (file,)


def test_bad_files_are_left_out_and_counted(tmp_path, caplog):
    text = (
        "path,label,label_name,num_frames,verdict,reason\n"
        "a.mp4,0,run,30,fine,\n"
        "b.mp4,2,jump,,bad,empty\n"
        "c.mp4,1,walk,12, suspicious ,short\n"
        "d.mp4,0,run,,,\n"
    )
    with caplog.at_level("INFO"):
        manifest = listed(tmp_path, text)
        assert listed(tmp_path, text) == manifest
    assert manifest == Manifest(
        tuple(f"{tmp_path}/{name}.mp4" for name in "acd"),
        (0, 1, 0),
        (30, 12, -1),
        ("run", "walk", "jump"),
    )
    assert caplog.messages == [
        f"1 of 4 files of {tmp_path}/list.csv are left out, since their verdict is bad"
    ]
    listing = read_listing(tmp_path / "list.csv")
    assert len(listing) == 4
    assert listing.column("verdict") == ["fine", "bad", "suspicious", ""]
    assert listing.column("nothing") == [""] * 4


def test_verdicts_that_cannot_be_used(tmp_path):
    with pytest.raises(ManifestError, match=r"line 3: verdict must be one of fine, suspicious, ba"):
        listed(tmp_path, "path,verdict\na,fine\nb,Bad\n")
    with pytest.raises(ManifestError, match=r"all 2 files of .*list\.csv have .*check_videos"):
        listed(tmp_path, "path,verdict\na,bad\nb,bad\n")


def test_cells_are_text_and_nothing_else(tmp_path):
    names = [
        "=1+1.mp4",
        "$(touch x).mp4",
        "`id`.mp4",
        "%s{0}.mp4",
        "!!python/object.mp4",
        "~/a.mp4",
    ]
    manifest = listed(tmp_path, "path,=x\n" + "".join(f"{name},=1+1\n" for name in names))
    assert manifest.files == tuple(f"{tmp_path}/{name}" for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["list.csv"]


def test_a_listing_is_written_with_further_columns(tmp_path):
    listed(tmp_path, 'label,path,extra\n1,"a,b.mp4",x\n,c.mp4,\n')
    listing = read_listing(tmp_path / "list.csv")
    columns = {"label": ["7", ""], "verdict": ["fine", "bad"]}
    write_manifest(listing.table.assign(**columns), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == (
        'label,path,extra,verdict\n7,"a,b.mp4",x,fine\n,c.mp4,,bad\n'
    )


def test_a_folder_as_a_listing(tmp_path):
    touch(tmp_path, "run/a.mp4", "walk/b.mp4")
    listing = read_listing(tmp_path)
    assert listing.files == (f"{tmp_path}/run/a.mp4", f"{tmp_path}/walk/b.mp4")
    assert listing.column("path") == ["run/a.mp4", "walk/b.mp4"]
    assert listing.column("label") == ["0", "1"]
    assert listing.column("label_name") == ["run", "walk"]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("path,label\na,0\nb,one\n", 3, "label must be a whole number"),
        ("path,label\na,-2\n", 2, "label must be a whole number"),
        ("path,label\na,1.5\n", 2, "label must be a whole number"),
        ("path,label\na,1e300\n", 2, "label must be a whole number"),
        ("path,label\na,99999999999999999999\n", 2, "label must be a whole number"),
        ("path,start,end\na,1,inf\n", 2, "start and end must be seconds"),
        ("path,num_frames\na,0\n", 2, "num_frames must be a whole number of at least 1"),
        ("path,label\na,0\n\nb\n", 4, "need 2 columns as in the first line"),
        ("path,label\na,0,1\n", 2, "need 2 columns as in the first line"),
        ("path,label\na,0\n ,1\n", 3, "the path is empty"),
        ("path,label,path\na,0,b\n", 1, "a column appears more than once"),
        ("path,label,label_name\na,0,run\nb,0,walk\n", 3, "another label_name"),
        ("a.mp4 1\nb.mp4 one\n", 2, "need the path of a video or an image, then whole numbers"),
        ("a.mp4 1\nframes/b 30 1\n", 2, "folders of frames are not read"),
        ("clip,label\na.mp4,1\n", 1, "a first line that names the columns, one of them path"),
        ("video,file,label\na.mp4,b.mp4,1\n", 1, "the columns, one of them path"),
        ("a.mp4 1\nb.mp4 0 -1\n", 2, "need 2 columns as in the lines before"),
        ("a.mp4 0 300\n", 1, "cannot tell what these numbers mean"),
        ("a.mp4 5 -1\n", 1, "cannot tell what these numbers mean"),
        ("a.mp4 7 30 1\n", 1, "cannot tell what these numbers mean"),
    ],
)
def test_a_malformed_row_names_the_line_the_row_and_the_remedy(tmp_path, text, line, reason):
    with pytest.raises(ManifestError) as caught:
        listed(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/list.csv, line {line}: ")
    assert reason in message
    assert repr(text.split("\n")[line - 1]) in message
    assert "Expected: a CSV file whose first line names its columns" in message


@pytest.mark.parametrize("text", ["", "\n\n", "path,label\n"])
def test_a_manifest_without_videos(tmp_path, text):
    with pytest.raises(ManifestError, match=r"list\.csv lists no videos"):
        listed(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "path;label\na b.mp4;1\nc.mp4;0\n",
        "path\tlabel\na b.mp4\t1\nc.mp4\t0\n",
        "Path,Label\na b.mp4,1\nc.mp4,0\n",
        "video_path,label\na b.mp4,1\nc.mp4,0\n",
        "label,file_name\n1,a b.mp4\n0,c.mp4\n",
        '"a b.mp4",1\n"c.mp4",0\n',
        "a b.mp4 1.0\nc.mp4 0.0\n",
        "# made by hand\na b.mp4 1\n# more\nc.mp4 0\n",
        "path, label\na b.mp4,1.0\nc.mp4,0\n",
        '"path","label"\n"a b.mp4","1"\n"c.mp4","0"\n',
        "a b.mp4;1\nc.mp4;0\n",
        "\ufeffpath,label\r\na b.mp4,1\r\nc.mp4,0\r\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_as_others_write_them(tmp_path, text, encoding):
    path = tmp_path / "list.csv"
    text = text.lstrip("\ufeff") if encoding == "utf-16" else text
    path.write_bytes(text.encode(encoding))
    found = read_manifest(path)
    assert found.files == (f"{tmp_path}/a b.mp4", f"{tmp_path}/c.mp4")
    assert found.labels == (1, 0)


def test_a_path_keeps_what_looks_like_syntax(tmp_path):
    listed_files = listed(tmp_path, '#1.mp4 0\n"a ""b"" .mp4" 1\nc;d.mp4 0\n').files
    assert [Path(file).name for file in listed_files] == ["#1.mp4", 'a "b" .mp4', "c;d.mp4"]
    table = listed(tmp_path, "path,file\na.mp4,b.mp4\n")
    assert table.files == (f"{tmp_path}/a.mp4",)


def test_names_without_labels(tmp_path):
    with pytest.raises(ManifestError, match="no column label"):
        listed(tmp_path, "path,label_name\na,run\n")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ManifestError, match=r"there is no manifest or folder .*nowhere\.csv"):
        read_manifest(tmp_path / "nowhere.csv")
    (tmp_path / "video.mp4").write_bytes(b"\x00\xff\xfe\x80")
    with pytest.raises(ManifestError, match="not text in UTF-8"):
        read_manifest(tmp_path / "video.mp4")


def test_a_folder_of_classes(tmp_path):
    touch(tmp_path, "walk/2.mp4", "run/b c.avi", "walk/1.WEBM", "walk/notes.txt", ".git/x.mp4")
    assert read_manifest(tmp_path) == Manifest(
        tuple(f"{tmp_path}/{name}" for name in ("run/b c.avi", "walk/1.WEBM", "walk/2.mp4")),
        (0, 1, 1),
        (-1, -1, -1),
        ("run", "walk"),
    )


@pytest.mark.parametrize("other", ["c.mp4", "run/deep/c.mp4"])
def test_any_other_folder_is_unlabelled(tmp_path, other):
    touch(tmp_path, "run/a.mp4", "walk/b.mp4", "walk/._b.mp4", other)
    manifest = read_manifest(tmp_path)
    assert sorted(manifest.files) == sorted(
        f"{tmp_path}/{name}" for name in ("run/a.mp4", "walk/b.mp4", other)
    )
    assert manifest.labels == (-1, -1, -1)
    assert manifest.label_names is None


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "disk/a.mp4", "disk/b.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/again").symlink_to(tmp_path / "disk")
    manifest = read_manifest(tmp_path / "data")
    assert manifest.files == (f"{tmp_path}/data/run/a.mp4", f"{tmp_path}/data/run/b.mp4")
    assert manifest.label_names == ("run",)


def test_a_folder_without_videos(tmp_path):
    touch(tmp_path, "readme.txt")
    with pytest.raises(ManifestError, match="there are no videos in"):
        read_manifest(tmp_path)


def test_a_folder_of_classes_of_images(tmp_path):
    touch(tmp_path, "n2/b.JPEG", "n1/a.png", "n1/.hidden.png", "n10/c.jpg", "n1/notes.txt")
    assert read_manifest(tmp_path) == Manifest(
        tuple(f"{tmp_path}/{name}" for name in ("n1/a.png", "n10/c.jpg", "n2/b.JPEG")),
        (0, 1, 2),
        (-1, -1, -1),
        ("n1", "n10", "n2"),
    )
    touch(tmp_path, "n2/deep/d.webp")
    assert read_manifest(tmp_path).labels == (-1,) * 4


def test_files_of_a_folder_are_sorted_folder_by_folder(tmp_path):
    names = ["a/z.jpg", "a b/c.jpg", "a-b/c.jpg", "a/b/c.jpg", "b.jpg"]
    touch(tmp_path, *names)
    expected = sorted(tmp_path / name for name in names)
    assert read_manifest(tmp_path).files == tuple(str(path) for path in expected)


def test_a_folder_of_videos_and_images(tmp_path):
    touch(tmp_path, "run/a.mp4", "run/a.jpg", "walk/b.avi", "walk/c.avi")
    with pytest.raises(ManifestError, match=r"3 videos and 1 image.*or write a manifest"):
        read_manifest(tmp_path)
    assert files_below(tmp_path) == ["run/a.jpg", "run/a.mp4", "walk/b.avi", "walk/c.avi"]
    (tmp_path / "run/a.jpg").unlink()
    assert read_manifest(tmp_path).labels == (0, 1, 1)


def test_a_written_manifest_is_read_back(tmp_path):
    table = pd.DataFrame({"path": ["a b.mp4", 'c,"d".mp4'], "label": [1.0, None]})
    write_manifest(table, tmp_path / "out.csv")
    manifest = read_manifest(tmp_path / "out.csv", root="/v")
    assert manifest == Manifest(("/v/a b.mp4", '/v/c,"d".mp4'), (1, -1), (-1, -1))
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_failed_write_leaves_the_old_manifest(tmp_path, monkeypatch):
    write_manifest(pd.DataFrame({"path": ["a"]}), tmp_path / "out.csv")

    def fail(self, path, **_):
        path.write_text("pa")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(pd.DataFrame({"path": ["b"]}), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "path\na\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_names_that_no_manifest_can_hold_are_left_out_and_named(tmp_path, caplog):
    touch(tmp_path, "run/a.mp4", "run/b\nc.mp4", "walk/caf\udce9.mp4", "od\rd/d.mp4", "walk/e.mp4")
    manifest = read_manifest(tmp_path)
    assert [Path(file).name for file in manifest.files] == ["a.mp4", "e.mp4"]
    assert manifest.label_names == ("run", "walk")
    (message,) = caplog.messages
    assert "3 of 5 files" in message
    assert "'od\\rd/d.mp4' holds a line break" in message
    write_manifest(read_listing(tmp_path).table, tmp_path / "list.csv")
    assert read_manifest(tmp_path / "list.csv").files == manifest.files


def test_a_folder_whose_own_name_no_manifest_can_hold(tmp_path):
    touch(tmp_path, "caf\udce9/a.mp4")
    with pytest.raises(ManifestError, match="is not text in UTF-8; rename it"):
        read_manifest(tmp_path / "caf\udce9")


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_pipe_or_a_device_is_no_manifest(tmp_path, what):
    path = tmp_path / "list.csv"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ManifestError, match="is no file, but a folder, a pipe or a device"):
        read_manifest(path)
