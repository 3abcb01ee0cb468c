"""``tools/check_videos.py`` on small real files of every kind, whole and broken."""

import csv
import importlib.util
import json
import os
import re
import signal
import sys
import tarfile
import textwrap
import time
from contextlib import closing, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hpm_video.data.manifest import Listing, read_listing, read_manifest
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import open_video
from hpm_video.decoding.video_stream import VideoStream
from hpm_video.preparation import jobs
from hpm_video.preparation.check import (
    MORE,
    Checker,
    check_files,
    doubts_of_gaps,
    doubts_of_length,
)
from hpm_video.preparation.encode import write_video
from hpm_video.preparation.findings import (
    COLUMNS,
    Finding,
    find_rows,
    findings_in,
    read_findings,
    stamp_of,
    summary,
    unchanged,
)
from hpm_video.preparation.jobs import Journal
from hpm_video.workers import progress_bar
from hpm_video.workers.pool import GIB, Limits, Pool
from hpm_video.workers.progress_bar import ProgressBar

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 48, 64
SIZE = f"{WIDTH}x{HEIGHT}"


def pictures(
    count: int, seed: int = 0, height: int = HEIGHT, width: int = WIDTH
) -> list[np.ndarray]:
    """A moving texture: count x (H, W, 3)"""
    coarse = np.random.default_rng(seed).integers(0, 256, (30, 40, 3))
    big = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    return [big[i % 50 :, 2 * (i % 50) :][:height, :width] for i in range(count)]


def encode(path: Path, frames, *, times=None, options=None, container=None, **settings) -> Path:
    """``times`` are milliseconds; key frames are 12 apart."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(
            settings.get("codec", "libx264"), rate=25, options={"threads": "1"} | (options or {})
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = settings.get("gop", 12)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, 1000 if times else 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_videos(folder: Path) -> None:
    write_video(folder / "good.mp4", pictures(40))
    (folder / "copy.mp4").write_bytes((folder / "good.mp4").read_bytes())
    write_video(folder / "one.mp4", pictures(1, 1))
    write_video(folder / "short.mp4", pictures(9, 2))
    flat = [picture // 64 for picture in pictures(20, 5)]
    encode(folder / "far.mkv", flat * 13, gop=999, options={"sc_threshold": "0"})
    uneven = [sum(33 + 120 * (i % 3 == 0) for i in range(k)) for k in range(30)]
    encode(folder / "uneven.mp4", pictures(30, 6), times=uneven)
    sixty = [round(i * 1000 / 60) for i in range(30)]
    encode(folder / "sixty.mkv", pictures(30, 7), times=sixty)
    encode(folder / "counted.avi", pictures(30, 8), codec="mpeg4")
    for name, height in {"one.ts": HEIGHT, "two.ts": HEIGHT // 2}.items():
        encode(folder / name, pictures(24, 9, height=height))
    (folder / "sizes.ts").write_bytes(
        b"".join((folder / name).read_bytes() for name in ("one.ts", "two.ts"))
    )


def write_broken(folder: Path) -> None:
    whole = encode(
        folder / "front.mp4", pictures(60, 10), container={"movflags": "faststart"}
    ).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "cut early.mp4").write_bytes(whole[: len(whole) // 3])
    flipped = bytearray(whole)
    for place in range(len(whole) * 3 // 4, len(whole) - 8, 40):
        flipped[place] ^= 255
    (folder / "flipped.mp4").write_bytes(flipped)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("I am not a video\n" * 50)
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    turned = (folder / "good.mp4").read_bytes()
    matrix = b"".join(n.to_bytes(4, "big", signed=True) for n in (65536, 0, 0, 0, 65536, 0))
    quarter = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 65536, 0, -65536, 0, 0))
    last = turned.rindex(matrix)  # the track's matrix, after the movie's
    (folder / "turned.mp4").write_bytes(turned[:last] + quarter + turned[last + len(matrix) :])
    with av.open(str(folder / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 8192), np.float32), format="fltp", layout="mono"
        )
        silence.rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))


def write_pictures(folder: Path) -> None:
    for name, seed in {"frames": 11, "cut frames": 12, "no frames": 0}.items():
        (folder / name).mkdir()
        for i, pixels in enumerate(pictures(20, seed) if seed else []):
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")
    broken = folder / "cut frames" / "17.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pictures(1, 13)[0]).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pictures(1, 14)[0]).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:-20])


EXPECTED = {
    # name: verdict, num_frames, part of the reason
    "good.mp4": ("suspicious", 40, "the manifest said 50 frames, there are 40"),
    "copy.mp4": ("suspicious", 40, "the manifest has the same content as good.mp4 with label 1 in"),
    "one.mp4": ("suspicious", 1, "1 frame, fewer than a clip of 16"),
    "short.mp4": ("suspicious", 9, "9 frames, fewer than a clip of 16"),
    "far.mkv": ("suspicious", 260, "260 frames from one key frame to the next"),
    "uneven.mp4": ("suspicious", 30, "a varying frame rate, 33 to 153 ms from frame to frame"),
    "sixty.mkv": ("fine", 30, ""),
    "counted.avi": ("fine", 30, ""),
    "one.ts": ("fine", 24, ""),
    "sizes.ts": ("suspicious", 24, "differs in size from those before: 64 x 48, then 64 x 24"),
    "front.mp4": ("fine", 60, ""),
    "cut.mp4": ("suspicious", None, "its header promises 60 frames in 2.4 s, and it holds "),
    "cut early.mp4": ("bad", None, " frames can be read (frame "),
    "flipped.mp4": ("suspicious", None, " of 60 frames can be read "),
    "turned.mp4": ("fine", 40, ""),
    "empty.mp4": ("bad", None, "the file is empty"),
    "text.mp4": ("bad", None, "Invalid data found"),
    "list.mp4": ("bad", None, "its container is none of those supported"),
    "sound.mp4": ("bad", None, "it has no video stream"),
    "missing.mp4": ("bad", None, "there is no such file"),
    "frames/": ("fine", 20, ""),
    "cut frames/": ("suspicious", 17, "only the first 17 of 20 frames can be read (17.jpg: "),
    "no frames/": ("bad", None, "there are no images in the folder"),
    "turned.jpg": ("fine", 1, ""),
    "whole.png": ("fine", 1, ""),
    "cut.png": ("bad", None, "cut off or damaged"),
    "{member}": ("suspicious", 40, "the manifest has the same content as good.mp4"),
    "shard.tar::x.mp4@512+999": ("bad", None, "the tar file has changed"),
}


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "check_videos.py"
    specification = importlib.util.spec_from_file_location("check_videos_tool", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check(tool):
    def start(*arguments):
        return tool.main([*map(str, arguments), "--workers", "1"])

    return start


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files of every kind")
    write_videos(folder)
    write_broken(folder)
    write_pictures(folder)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "good.mp4", "class/a.mp4")
    with tarfile.open(folder / "shard.tar") as tar:
        (member,) = tar.getmembers()
    names = [
        name.format(member=f"shard.tar::class/a.mp4@{member.offset_data}+{member.size}")
        for name in EXPECTED
    ]
    counts = {"good.mp4": 50, "short.mp4": 9}
    labels = ["1" if name == "good.mp4" else "0" for name in names]
    rows = zip(names, labels, (counts.get(name, "") for name in names), strict=True)
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "num_frames", "=note")])
        csv.writer(file).writerows((*row, f"=1+{i}") for i, row in enumerate(rows))
    return folder


@pytest.fixture(scope="module")
def checked(check, folder):
    """The rows of the checked manifest, by the names in ``EXPECTED``, and the output."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert check(folder / "list.csv") == 3
    with (folder / "list.checked.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return dict(zip(EXPECTED, rows, strict=True)), output.getvalue()


@pytest.mark.parametrize("name", EXPECTED)
def test_each_kind_of_file_gets_its_verdict(checked, name):
    row = checked[0][name]
    verdict, num_frames, reason = EXPECTED[name]
    assert (row["verdict"], reason in row["reason"]) == (verdict, True), row["reason"]
    assert bool(row["reason"]) == (verdict != "fine")
    if num_frames is not None:
        assert row["num_frames"] == str(num_frames)


def test_all_columns_are_kept_in_the_order_of_the_manifest(checked, folder):
    rows, _ = checked
    assert list(rows["good.mp4"]) == ["path", "label", "num_frames", "=note", *COLUMNS[1:]]
    assert [row["=note"] for row in rows.values()] == [f"=1+{i}" for i in range(len(rows))]
    before = read_listing(folder / "list.csv")
    for name in ("path", "label"):
        assert [row[name] for row in rows.values()] == before.column(name)
    assert not list(folder.glob("*.partial"))
    assert not list(folder.glob(".*"))


def test_what_is_measured(checked):
    rows, _ = checked
    good = rows["good.mp4"]
    assert {name: good[name] for name in COLUMNS[1:9]} == {
        "duration": "1.600",
        "fps": "25.0000",
        "width": "64",
        "height": "48",
        "codec": "h264",
        "pixel_format": "yuv420p",
        "key_frame_distance": "12",
        "rotation": "0",
    }
    assert float(rows["sixty.mkv"]["fps"]) == pytest.approx(60, rel=0.01)
    assert float(rows["counted.avi"]["fps"]) == pytest.approx(25)
    assert rows["far.mkv"]["key_frame_distance"] == "260"
    turned = rows["turned.mp4"]
    assert (turned["width"], turned["height"]) == ("48", "64")
    assert turned["rotation"] in ("90", "270")
    image = rows["turned.jpg"]
    assert (image["width"], image["height"], image["fps"]) == ("48", "64", "")
    assert good["content"] == rows["copy.mp4"]["content"] == rows["{member}"]["content"]


def test_only_frames_that_training_can_read_are_counted(checked, folder):
    for name in ("cut.mp4", "flipped.mp4", "sizes.ts", "cut frames/", "counted.avi"):
        count = int(checked[0][name]["num_frames"])
        assert 16 <= count < 60
        for first in range(0, count - 3, 4):
            with open_video(str(folder / name) + "/" * name.endswith("/")) as video:
                assert len(video.read([first, first + 1, count - 1])) == 3


def test_the_summary_counts_verdicts_reasons_and_what_is_usable(checked):
    _, output = checked
    verdicts = [verdict for verdict, _, _ in EXPECTED.values()]
    counts = [f"{verdicts.count(kind)} {kind}" for kind in ("fine", "suspicious", "bad")]
    assert "\n" + ", ".join(counts) + "\n" in output
    assert "2 suspicious: the manifest has the same content as good.mp4" in output
    assert f"  usable: {len(verdicts) - verdicts.count('bad')} files, " in output
    assert "data.train=" in output
    findings = [
        Finding("bad", ("it took longer than 60 s: x",)),
        Finding("suspicious", ("9 frames, fewer than a clip of 16: y", "260 frames from: z")),
        Finding("suspicious", ("12 frames, fewer than a clip of 16: y",)),
    ]
    findings = [replace(finding, num_frames=9, duration=636.8) for finding in findings]
    lines = summary(["/a", "/b", "/c"], findings).splitlines()
    assert lines[0] == "0 fine, 2 suspicious, 1 bad"
    assert lines[1:3] == [
        "       2 suspicious: 9 frames, fewer than a clip of 16: y",
        "         /b and 1 more (column reason)",
    ]
    assert lines[-1] == "  usable: 2 files, 0.35 hours, 18 frames"
    assert summary(["/a"], [Finding("bad", ("why",))]).endswith("0 files, 0.00 hours, 0 frames")


def test_training_leaves_out_what_is_bad_and_gets_the_true_counts(checked, folder):
    manifest = read_manifest(folder / "list.checked.csv")
    bad = sum(verdict == "bad" for verdict, _, _ in EXPECTED.values())
    assert len(manifest) == len(EXPECTED) - bad
    counts = dict(zip(manifest.files, manifest.num_frames, strict=True))
    assert counts[f"{folder}/good.mp4"] == 40
    assert counts[f"{folder}/cut frames/"] == 17


def test_a_second_check_looks_at_what_changed_or_was_bad(check, folder, tmp_path, capsys):
    for name in ("front.mp4", "short.mp4", "text.mp4"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "list.txt").write_text("front.mp4 3\nshort.mp4 1\ntext.mp4 0\n")
    out = tmp_path / "list.checked.csv"
    assert check(tmp_path / "list.txt") == 3
    first = out.read_text()
    assert check(tmp_path / "list.txt") == 3
    assert ", 2 of which have not changed since their check; " in capsys.readouterr().out
    assert out.read_text() == first
    (tmp_path / "short.mp4").write_bytes((folder / "one.ts").read_bytes())
    (tmp_path / "text.mp4").write_bytes((folder / "good.mp4").read_bytes())
    assert check(tmp_path / "list.txt") == 0
    assert ", 1 of which have not changed" in capsys.readouterr().out
    assert list(pd.read_csv(out)["num_frames"]) == [60, 24, 40]
    assert list(pd.read_csv(out)["label"]) == [3, 1, 0]


def test_paths_lead_to_the_files_wherever_the_result_lies(check, folder, tmp_path):
    for name in ("sub/a.png", "sub/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pictures(1, len(name))[0]).save(tmp_path / name)
    files = {str(tmp_path / name) for name in ("sub/a.png", "sub/b.png", "c.png")}
    (tmp_path / "list.csv").write_text("path\nsub/a.png\nsub/b.png\nc.png\n")
    for out in (tmp_path / "elsewhere" / "out.csv", tmp_path / "sub" / "out.csv"):
        assert check(tmp_path / "list.csv", "--out", out) == 0
        assert set(read_manifest(out).files) == files
    paths = read_listing(tmp_path / "sub" / "out.csv").column("path")
    assert paths == ["a.png", "b.png", str(tmp_path / "c.png")]
    out = tmp_path / "lists" / "out.csv"
    assert check(tmp_path / "list.csv", "--out", out, "--root", tmp_path) == 0
    assert set(read_manifest(out, tmp_path).files) == files
    assert check(tmp_path / "sub") == 0
    assert set(read_manifest(tmp_path / "sub.checked.csv").files) == files - {
        str(tmp_path / "c.png")
    }


def test_what_is_refused(check, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("path\na.png\n")
    (tmp_path / "other.csv").write_text("path\nmine.png\n")
    for options, message in {
        ("--out", tmp_path / "list.csv"): "be another file than the manifest that is read",
        ("--out", tmp_path / "out.txt"): "must end in .csv",
        ("--out", tmp_path / "other.csv"): "no manifest that this program wrote",
        ("--root", tmp_path / "nowhere", "--out", tmp_path / "o.csv"): "",
    }.items():
        code = check(tmp_path / "list.csv", *options)
        assert code == (2 if message else 3)
        assert message in capsys.readouterr().err
    assert (tmp_path / "other.csv").read_text() == "path\nmine.png\n"
    assert not [*tmp_path.glob("*.partial")]
    (tmp_path / "list.csv").write_text("path\n../../etc/passwd\n")
    assert check(tmp_path / "list.csv") == 2
    assert "must not climb out" in capsys.readouterr().err


WORK = """
    import ctypes, os, time
    from pathlib import Path

    import numpy as np

    from hpm_video.preparation.check import Checker
    from hpm_video.preparation.findings import Finding, stamp_of

    class Looking(Checker):
        def __call__(self, file):
            return look(file)

    def look(path):
        kind = Path(path).stem
        stamp = stamp_of(path)
        with Path(path).with_name("looked.txt").open("a") as file:
            file.write(kind + "\\n")
        if kind == "hang":
            Path(path).with_name(f"{os.getpid()}.hangs").touch()
            ctypes.PyDLL(None).sleep(10**6)
        if kind == "abort":
            os.abort()
        if kind == "eat":
            eaten = []
            while True:
                eaten.append(np.ones(2**22, np.uint8))
        looked = Path(path).with_name("looked.txt").read_text().split()
        if kind == "once" and looked.count("once") < 2:
            os.kill(os.getpid(), 9)
        if kind == "long":
            return long(stamp)
        if kind.startswith("waits"):
            while not Path(path).with_suffix(".open").exists():
                time.sleep(0.01)
        return Finding("fine", num_frames=7, bytes=stamp.bytes, modified=stamp.modified,
                       content=f"{kind:_<32}")

    def long(stamp):
        for _ in range(15):
            yield None
        yield Finding("fine", num_frames=15, bytes=stamp.bytes, modified=stamp.modified)
"""
SCRIPT = """
import sys
sys.path[:0] = ["tools", {folder!r}]
import check_videos, work_of_a_check
check_videos.Checker = work_of_a_check.Looking
sys.exit(check_videos.main({argv!r}))
"""


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder / "work_of_a_check.py").write_text(textwrap.dedent(WORK))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def findings_of(checker, files, folder, limits):
    """Check files. -> findings by the names of the files"""
    with closing(Journal(folder / "journal")) as journal:
        found = check_files(files, {}, journal, checker, 1, limits)
    ended = {file: finding for file, finding in found.items() if finding.verdict != "bad"}
    with closing(Journal(folder / "journal")) as journal:
        assert findings_in(journal.read()) == ended, "what exceeded the limits is tried again"
    return {Path(file).stem: finding for file, finding in found.items()}


def test_a_file_that_hangs_crashes_or_eats_memory_is_bad_and_the_rest_is_checked(
    work_folder, tmp_path, pool_clock
):
    import work_of_a_check

    names = ["a", "hang", "b", "abort", "c", "eat", "d", "e"]
    for name in names:
        (tmp_path / f"{name}.mp4").write_text(name)
    files = [str(tmp_path / f"{name}.mp4") for name in names]
    pool_clock.run_while_one_hangs(tmp_path)
    found = findings_of(work_of_a_check.Looking(), files, tmp_path, Limits(2.0, GIB // 4))
    assert set(found) == set(names)
    bad = {name: finding.reasons for name, finding in found.items() if finding.verdict == "bad"}
    assert bad == {
        "hang": (f"it took longer than 2 s: {MORE}",),
        "abort": (f"the process that decoded it ended by SIGABRT: {MORE}",),
        "eat": (f"it needs more memory than a process that decodes may have: {MORE}",),
    }
    stamps = {name: stamp_of(str(tmp_path / f"{name}.mp4")) for name in bad}
    assert {name: (found[name].bytes, found[name].modified) for name in bad} == stamps


def test_a_long_file_that_gets_on_is_fine(work_folder, tmp_path, pool_clock, monkeypatch):
    """It takes half a second between beats, and more than a second in all."""
    import work_of_a_check

    def next_beat(pool, original=Pool.next):
        pool_clock.steps = iter([0.0, 0.5])
        return original(pool)

    monkeypatch.setattr(Pool, "next", next_beat)
    (tmp_path / "long.mp4").write_text("long")
    files, limits = [str(tmp_path / "long.mp4")], Limits(1.0, GIB)
    (finding,) = findings_of(work_of_a_check.Looking(), files, tmp_path, limits).values()
    assert (finding.verdict, finding.num_frames) == ("fine", 15)
    assert (tmp_path / "looked.txt").read_text() == "long\n"


def test_a_file_whose_process_was_killed_once_is_tried_again_at_the_end(work_folder, tmp_path):
    import work_of_a_check

    names = ["once", "a", "b", "abort"]
    for name in names:
        (tmp_path / f"{name}.mp4").write_text(name)
    files = [str(tmp_path / f"{name}.mp4") for name in names]
    found = findings_of(work_of_a_check.Looking(), files, tmp_path, Limits(memory=GIB))
    assert {name: finding.verdict for name, finding in found.items()} == {
        **dict.fromkeys(["once", "a", "b"], "fine"),
        "abort": "bad",
    }
    looked = (tmp_path / "looked.txt").read_text().split()
    assert sorted(looked[-2:]) == ["abort", "once"]
    assert len(looked) == 6


@pytest.mark.parametrize("name", ["good.mp4", "frames/"])
def test_frames_are_beats(folder, monkeypatch, name):
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_STEPS", 0.0)
    results = [*Checker()(f"{folder}/{name}")]
    assert len(results) > (40 if name == "good.mp4" else 2)
    assert set(results[:-1]) == {None}


def test_nothing_but_known_containers_is_opened(tmp_path):
    """Neither by the check nor by training: FFmpeg knows containers that name other files."""
    path = str(encode(tmp_path / "raw.h264", pictures(20)))
    for opened in (
        lambda: VideoStream(path),
        lambda: open_video(path, "pyav"),
    ):
        with pytest.raises(DecodeError, match="its container is none of those supported"):
            opened()


def test_only_what_the_same_decoder_found_is_taken_over(check, tool, folder, tmp_path, capsys):
    """Findings on images from another decoder are taken over too: it does not read them."""
    (tmp_path / "a.mp4").write_bytes((folder / "front.mp4").read_bytes())
    (tmp_path / "b.png").write_bytes((folder / "whole.png").read_bytes())
    (tmp_path / "list.csv").write_text("path\na.mp4\nb.png\n")
    out = tmp_path / "list.checked.csv"
    assert check(tmp_path / "list.csv", "--decoder", "pyav") == 0
    assert list(pd.read_csv(out)["decoder"]) == ["pyav", "pillow"]
    known = read_findings(out)
    taken = {
        decoder: [Path(file).name for file in unchanged(known, known, decoder)]
        for decoder in ("pyav", "decord")
    }
    assert taken == {"pyav": ["a.mp4", "b.png"], "decord": ["b.png"]}
    table = pd.read_csv(out, dtype=str).assign(decoder="decord")
    table.to_csv(out, index=False)
    capsys.readouterr()
    assert check(tmp_path / "list.csv") == 0
    assert "have not changed" not in capsys.readouterr().out


def test_one_odd_name_in_a_folder_does_not_stop_a_check(check, folder, tmp_path, caplog, capsys):
    films = tmp_path / "films"
    films.mkdir()
    for name in ("a.mp4", "b\nc.mp4", "caf\udce9.mp4"):
        (films / name).write_bytes((folder / "front.mp4").read_bytes())
    assert check(films) == 0
    assert "2 of 3 files" in caplog.text
    assert "; 1 process\n" in capsys.readouterr().out
    out = tmp_path / "films.checked.csv"
    assert read_manifest(out).files == (str(films / "a.mp4"),)
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    (odd / "a.mp4").write_bytes((folder / "front.mp4").read_bytes())
    (odd / "list.csv").write_text("path\na.mp4\n")
    assert check(odd / "list.csv") == 2
    assert "is not text in UTF-8" in capsys.readouterr().err
    assert check(odd) == 2
    assert "is not text in UTF-8; rename it" in capsys.readouterr().err


@pytest.fixture
def waiting_check(work_folder, start_program, tmp_path):
    """Start a check of 12 files in its own session. It waits with each file until a file with
    the suffix ``.open`` lies beside it."""
    for i in range(12):
        (tmp_path / f"waits {i}.mp4").write_text(str(i))
    names = "".join(f"waits {i}.mp4\n" for i in range(12))
    (tmp_path / "list.csv").write_text(f"path\n{names}")

    def start():
        argv = [str(tmp_path / "list.csv"), "--workers=2", "--seconds=1e6"]
        code = SCRIPT.format(folder=str(work_folder), argv=argv)
        return start_program("-c", code, OWN_SERVER="yes")

    return start


def wait_for_lines(path: Path, count: int) -> None:
    while not path.exists() or path.read_text().count("}\n") < count:  # complete lines
        time.sleep(0.02)


def wait_until_nobody_is_left(group: int) -> None:
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            time.sleep(0.05)


def stop(process, number: int, journal: Path, after: int) -> str:
    """Let ``after`` files be checked, then send a signal. -> the output"""
    for i in range(after):
        (journal.parent / f"waits {i}.open").touch()
    wait_for_lines(journal, after)
    os.kill(process.pid, number)
    output, _ = process.communicate()
    wait_until_nobody_is_left(process.pid)
    return output


def test_a_check_that_was_stopped_goes_on(
    waiting_check, tmp_path, tool, check, monkeypatch, capsys
):
    import work_of_a_check

    out = tmp_path / "list.checked.csv"
    journal = tmp_path / "list.checked.csv.partial"
    killed = waiting_check()
    stop(killed, signal.SIGKILL, journal, after=3)
    assert killed.returncode == -signal.SIGKILL
    with journal.open("a") as file:
        file.write('{"file": "half of a li')
    interrupted = waiting_check()
    output = stop(interrupted, signal.SIGINT, journal, after=7)
    assert interrupted.returncode == 130, output
    assert not out.exists()

    lines = [line for line in journal.read_text().splitlines() if line.endswith("}")]
    noted = {json.loads(line)["file"] for line in lines}
    assert len(noted) == 7
    for i in range(12):
        (tmp_path / f"waits {i}.open").touch()
    changed = min(noted)
    Path(changed).write_text("another content")
    (tmp_path / "looked.txt").unlink()
    monkeypatch.setattr(tool, "Checker", work_of_a_check.Looking)
    assert check(tmp_path / "list.csv") == 0
    output = capsys.readouterr().out
    assert f"{len(noted) - 1} of which have not changed" in output
    files = {f"{tmp_path}/waits {i}.mp4" for i in range(12)}
    looked = (tmp_path / "looked.txt").read_text().splitlines()
    assert sorted(looked) == sorted(Path(file).stem for file in files - noted | {changed})
    assert not journal.exists()
    assert read_manifest(out).files == read_manifest(tmp_path / "list.csv").files


FULL = Finding(
    "suspicious",
    ("one", "two, three"),
    30,
    1.2,
    25.0,
    64,
    48,
    "h264",
    "yuv420p",
    12,
    90,
    1234,
    "2026-01-01",
    "abc",
)


def columns_of(findings):
    return {name: [finding.cells()[name] for finding in findings] for name in COLUMNS}


def test_findings_survive_a_journal_and_a_manifest(tmp_path):
    bad = replace(FULL, verdict="bad")
    with closing(Journal(tmp_path / "j")) as journal:
        journal.append({"file": "/a", **FULL.cells()})
        journal.append({"file": "/é\udce9", **bad.cells()})
        with pytest.raises(BlockingIOError, match="another program writes"):
            Journal(tmp_path / "j")
    with (tmp_path / "j").open("a") as file:
        file.write('[1]\n{"file": "/older", "verdict": "fine", "reasons": []}\n')
        file.write('{"file": "/c", "verdict"')
    with closing(Journal(tmp_path / "j")) as journal:
        assert findings_in(journal.read()) == {"/a": FULL, "/é\udce9": bad}
        journal.append({"file": "/d", **FULL.cells()})
    with closing(Journal(tmp_path / "j")) as journal:
        assert findings_in(journal.read())["/d"] == FULL
    of_a_row = replace(FULL, reasons=("one", "the manifest said 7 frames, there are 30: corrected"))
    findings = [FULL, of_a_row, Finding("fine"), Finding("bad", ("why",))]
    only = replace(FULL, reasons=("the manifest said 7 frames, there are 30: corrected",))
    rows = {"path": ["/a", "/b", "/c", "/d", "/e"]} | columns_of([*findings, only])
    pd.DataFrame(rows, dtype=str).to_csv(tmp_path / "list.csv", index=False)
    assert read_findings(tmp_path / "list.csv") == {
        "/a": FULL,
        "/b": replace(FULL, reasons=("one",)),
        "/c": Finding("fine"),
        "/e": replace(FULL, verdict="fine", reasons=()),
    }


@pytest.mark.parametrize(
    ("gaps", "tick", "doubted"),
    [
        ([40] * 30, 0.001, False),
        ([16, 17, 17] * 10, 0.001, False),  # 60 per second, in milliseconds
        ([40] * 29 + [400], 0.001, False),
        ([40] * 25 + [80] * 5, 0.001, True),
        ([33, 40, 40] * 10, 0.00001, True),
        ([33, 34, 33] * 10, 0.00001, False),
        ([40], 0.001, False),
    ],
)
def test_a_varying_frame_rate(gaps, tick, doubted):
    assert bool(list(doubts_of_gaps(np.array(gaps) / 1000, tick))) == doubted
    assert [len(list(doubts_of_length(count))) for count in (1, 15, 16)] == [1, 1, 0]


def test_a_file_that_has_not_changed_is_not_decoded(folder, monkeypatch, tmp_path):
    file, gone = str(folder / "good.mp4"), str(folder / "gone.mp4")
    (missing,) = Checker()(gone)
    known = {
        file: Finding("fine", decoder="pyav", **stamp_of(file)._asdict()),
        gone: replace(missing, decoder="pyav"),
    }
    assert known[gone].reasons == ("there is no such file",)
    monkeypatch.setattr(jobs, "Pool", None)
    with closing(Journal(tmp_path / "journal")) as journal:
        same = unchanged([file, gone, f"{tmp_path}/new.mp4"], known, "pyav")
        assert same == known
        assert check_files([file, gone], same, journal, Checker("pyav"), 1, Limits()) == known
    assert not (tmp_path / "journal").read_text()


def test_rows_are_judged_one_by_one(tmp_path):
    columns = {
        "path": ["a", "b", "a", "c"],
        "label": ["0", "0", "1", ""],
        "num_frames": ["30.0", "", "29", "x"],
    }
    listing = Listing(tmp_path, pd.DataFrame(columns, dtype=str), ("/a", "/b", "/a", "/c"))
    fine = Finding("fine", num_frames=30, content="1")
    found = {"/a": fine, "/b": replace(fine, content="2"), "/c": Finding("bad", ("why",))}
    rows = list(find_rows(listing, found))
    assert [row.verdict for row in rows] == ["fine", "fine", "suspicious", "bad"]
    assert rows[2].reasons == (
        "the manifest said 29 frames, there are 30: corrected",
        "the manifest has the same content as a with label 0 instead of 1: leave one of them out",
    )


def test_sections_of_a_file_are_no_copies_of_each_other(tmp_path):
    columns = {"path": ["a"] * 4, "start": ["", "5", "9.5", "5"], "end": ["", "9.5", "", "9.5"]}
    listing = Listing(tmp_path, pd.DataFrame(columns, dtype=str), ("/a",) * 4)
    rows = list(find_rows(listing, {"/a": Finding("fine", num_frames=300, content="1")}))
    assert [row.verdict for row in rows] == ["fine", "fine", "fine", "suspicious"]


def test_a_run_over_a_checked_manifest_leaves_out_the_bad(check, videos, pretrain, tmp_path):
    for video in sorted((videos / "train").iterdir())[:8]:
        (tmp_path / video.name).write_bytes(video.read_bytes())
    whole = (tmp_path / "texture 1.mp4").read_bytes()
    (tmp_path / "texture 1.mp4").write_bytes(whole[:600])
    names = sorted(path.name for path in tmp_path.glob("*.mp4"))
    (tmp_path / "list.csv").write_text(
        "path,num_frames\n" + "".join(f"{name},500\n" for name in [*names, "missing.mp4"])
    )
    assert check(tmp_path / "list.csv") == 3
    checked = tmp_path / "list.checked.csv"
    run = tmp_path / "run"
    overrides = ("recipe.epochs=2", "recipe.warmup_epochs=0", "logging.validate_every_epochs=1")
    process = pretrain(run, f"data.train={checked}", *overrides)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count(f"2 of 9 files of {checked} are left out") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "train"]
    assert len(updates) == 3
    assert not (run / "bad_files.csv").exists()
    assert {finding.num_frames for finding in read_findings(checked).values()} == {12}


def test_without_a_terminal_a_line_is_logged_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO"), closing(ProgressBar(4, "files")) as bar:
        bar.advance(note="0 bad")
        bar.advance(note="1 bad")
    assert re.fullmatch(r"2/4 files, [\d.e+]+ files/s, 1 bad, 00:00 left", caplog.messages[-1])
    with caplog.at_level("INFO"), closing(ProgressBar(2, "shards", "MB/s")) as bar:
        bar.advance(12.5, is_last=False)
    assert re.fullmatch(r"0/2 shards, [\d.e+]+ MB/s, \? left", caplog.messages[-1])
