"""The recipes of the data sets, on small trees with exactly the layouts of the downloads.

The scripts open no video or image, so that empty files suffice here, except for CIFAR-10, whose
archives they turn into images.
"""

import hashlib
import importlib.util
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from hpm_video.data.manifest import read_manifest
from hpm_video.files.wording import counted

ROOT = Path(__file__).parents[2]
HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def load(name: str) -> ModuleType:
    """Load a script by its path, since it is no module of the package."""
    path = ROOT / "datasets" / name / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> Run:
    """Run the command line of a script in this process; paths are relative to ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def start(name: str, *arguments: str, output: str = "out") -> Outcome:
        code = load(name).main([*arguments, "--output", output])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return start


@pytest.fixture(autouse=True)
def at_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def text(name: str, content: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(content, encoding="utf-8")
    return name


def listed(manifest: str) -> dict[str, int]:
    """{file: label}, with relative paths for files in the working directory."""
    read = read_manifest(manifest)
    here = Path.cwd()
    return {
        str(Path(file).relative_to(here)): label
        for file, label in zip(read.files, read.labels, strict=True)
    }


def refused(outcome: Outcome, *parts: str) -> None:
    """Check that there was one clear error, and no output."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err
    assert not Path("out").exists()


def test_as_a_user_starts_them() -> None:
    """They run in a process of their own, from the root, without loading torch."""
    place = Path("import")
    place.mkdir()
    (place / "hpm_video").symlink_to(ROOT / "hpm_video")
    manifests = {"kinetics400": 2, "ssv2": 3, "ucf101": 6, "hmdb51": 6, "imagenet1k": 2}
    starts = {
        "kinetics400": kinetics_arguments(),
        "ssv2": ssv2_arguments(),
        "ucf101": ucf_arguments(),
        "hmdb51": hmdb_arguments(),
        "imagenet1k": imagenet_arguments(),
    }
    commands = []
    for name, arguments in starts.items():
        absolute = [str(Path(a).absolute()) if Path(a).exists() else a for a in arguments]
        output = ["--output", str(Path("out", name).absolute())]
        commands.append([f"datasets/{name}/prepare.py", *absolute, *output])
    code = (
        "import json, runpy, sys; del sys.path[0]\n"
        "for sys.argv in json.loads(sys.argv[1]):\n"
        "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(place.absolute())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nFalse\n")
    for name in starts:
        names = Path("out", name, "labels.txt").read_text().splitlines()
        assert len(names) >= 2
        written = sorted(Path("out", name).glob("*.csv"))
        assert len(written) == manifests[name]
        for path in written:
            manifest = read_manifest(path)
            kind = "image" if name == "imagenet1k" else "video"
            assert all(Path(file).is_file() for file in manifest.files)
            listed = counted(len(manifest), kind)
            found = f"{path.stem}: {listed} listed, {len(manifest)} found, 0 missing"
            assert f"{found}: {path.absolute()}" in done.stdout
            for label, file_name in enumerate(manifest.label_names or ()):
                assert file_name in (names[label], str(label))


# --- Kinetics -------------------------------------------------------------------------------------


def kinetics_arguments() -> list[str]:
    """Class folders, one with underscores, in another order than in the CSV."""
    touch(
        "k/train/zumba/zzzzzzzzzz1_000010_000020.mp4",
        "k/train/abseiling/-aaaaaaaaa1_000003_000013.mkv",
        "k/train/abseiling/_aaaaaaaaa2_000100_000110.MP4",
        "k/train/riding_or_walking_with_horse/rrrrrrrrrr1_000000_000010.webm",
        "k/val/zumba/zzzzzzzzzz9_000001_000011.mp4",
        "k/val/riding or walking with horse/rrrrrrrrrr9_000007_000017.mp4",
    )
    text(
        "lists/train.csv",
        HEADER + "zumba,zzzzzzzzzz1,10,20,train,0\n"
        "abseiling,-aaaaaaaaa1,3,13,train,1\n"
        '"riding or walking with horse",rrrrrrrrrr1,0,10,train,0\n'
        "abseiling,_aaaaaaaaa2,100,110,train,0\n",
    )
    text(
        "lists/val.csv",
        HEADER + "zumba,zzzzzzzzzz9,1,11,val,0\n"
        "riding or walking with horse,rrrrrrrrrr9,7,17,val,0\n",
    )
    return ["--videos", "k", "--lists", "lists"]


def test_kinetics_class_folders_with_lists(run: Run) -> None:
    outcome = run("kinetics400", *kinetics_arguments())
    assert outcome.code == 0, outcome.err
    assert Path("out/labels.txt").read_text() == "abseiling\nriding or walking with horse\nzumba\n"
    assert listed("out/train.csv") == {
        "k/train/zumba/zzzzzzzzzz1_000010_000020.mp4": 2,
        "k/train/abseiling/-aaaaaaaaa1_000003_000013.mkv": 0,
        "k/train/riding_or_walking_with_horse/rrrrrrrrrr1_000000_000010.webm": 1,
        "k/train/abseiling/_aaaaaaaaa2_000100_000110.MP4": 0,
    }
    assert listed("out/validation.csv") == {
        "k/val/zumba/zzzzzzzzzz9_000001_000011.mp4": 2,
        "k/val/riding or walking with horse/rrrrrrrrrr9_000007_000017.mp4": 1,
    }
    assert read_manifest("out/validation.csv").label_names == (
        "0",
        "riding or walking with horse",
        "zumba",
    )
    assert Path("out/train.csv").read_text().startswith("path,label,label_name\n/")
    assert "validation: 2 videos listed, 2 found, 0 missing" in outcome.out
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "labels.txt",
        "train.csv",
        "validation.csv",
    ]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("massaging_person-s_head", "massaging person's head"),
        ("passing_American_football_(in_game)", "passing American football (in game)"),
        ("Riding Or Walking With Horse", "riding or walking with horse"),
    ],
)
def test_kinetics_folders_are_known_by_letters_and_digits(run: Run, folder: str, name: str) -> None:
    touch(f"v/{folder}/aaaaaaaaaaa.mp4")
    text("lists/train.csv", HEADER + f"abseiling,bbbbbbbbbbb,0,10,train,0\n{name},c,0,10,train,0\n")
    val = HEADER + "abseiling,aaaaaaaaaaa,0,10,val,0\n"
    arguments = ["--videos", "v", "--lists", "lists"]
    text("lists/validate.csv", val)
    wrong = ("the folder of another class", f"v/{folder}/aaaaaaaaaaa.mp4", "'abseiling'")
    refused(run("kinetics400", *arguments), "validate.csv, line 2", *wrong)
    text("lists/validate.csv", val.replace("abseiling", name))
    outcome = run("kinetics400", *arguments)
    assert outcome.code == 0, outcome.err
    assert listed("out/validation.csv") == {f"v/{folder}/aaaaaaaaaaa.mp4": 1}
    assert read_manifest("out/validation.csv").label_names == ("0", name)
    assert "train: 2 videos listed, 0 found, 2 missing\n" in outcome.out
    assert not Path("out/train.csv").exists()


def test_kinetics_flat_as_mirrored_with_missing_ones(run: Run) -> None:
    ids = [f"abcdefghij{i}" for i in range(9)]
    touch(
        f"k400/train/{ids[0]}_000010_000020.mp4",
        f"k400/train/{ids[1]}.mp4",  # only the id, of which there is one clip
        f"k400/train/{ids[2]}.mp4",  # only the id, of which there are two clips
        "k400/train/unknown-one_000000_000010.mp4",
    )
    rows = [f"juggling,{ids[0]},10,20,train,0", f"juggling,{ids[1]},5.0,15.0,train,0"]
    rows += [f"juggling,{ids[2]},{start},{start + 10},train,0" for start in (0, 50)]
    rows += [f"bowling,{one},1,11,train,0" for one in ids[3:]]
    text("lists/train.csv", HEADER + "\n".join(rows) + "\n")
    arguments = ["--videos", "k400", "--lists", "lists"]
    outcome = run("kinetics400", *arguments)
    assert outcome.code == 0, outcome.err
    assert listed("out/train.csv") == {
        f"k400/train/{ids[0]}_000010_000020.mp4": 1,
        f"k400/train/{ids[1]}.mp4": 1,
    }
    missing = [f"juggling/{ids[2]}_000000_000010", f"juggling/{ids[2]}_000050_000060"]
    missing += [f"bowling/{one}_000001_000011" for one in ids[3:]]
    assert Path("out/missing_train.txt").read_text().splitlines() == missing
    assert "train: 10 videos listed, 2 found, 8 missing" in outcome.out
    assert f"such as {', '.join(missing[:5])}; all in " in outcome.out
    assert run("kinetics400", *arguments, "--strict").code == 2
    for one in missing:
        touch(f"k400/train/{one.split('/')[1]}.mp4")
    assert run("kinetics400", *arguments, "--strict").code == 0
    assert len(read_manifest("out/train.csv")) == 10
    assert not Path("out/missing_train.txt").exists()  # it would be from the run before


def test_kinetics_test_list_without_labels_and_ids_of_two_splits(run: Run) -> None:
    # The folder of all videos is no class, whatever its name.
    touch("zumba/aaaaaaaaaaa_000000_000010.mp4", "zumba/bbbbbbbbbbb.mp4", "zumba/ccccccccccc.mp4")
    train = "dodgeball,aaaaaaaaaaa,0,10,train,0\nzumba,bbbbbbbbbbb,0,10,train,0\n"
    text("lists/train.csv", HEADER + train)
    touch("zumba/aaaaaaaaaaa.mp4")  # another file matches better
    # This is also the id of a training clip: zumba/bbbbbbbbbbb.mp4 could be either.
    text(
        "lists/test.csv",
        "youtube_id,time_start,time_end,split\nccccccccccc,3,13,test\nbbbbbbbbbbb,90,99,test\n",
    )
    outcome = run("kinetics400", "--videos", "zumba", "--lists", "lists")
    assert outcome.code == 0, outcome.err
    assert listed("out/test.csv") == {"zumba/ccccccccccc.mp4": -1}
    assert listed("out/train.csv") == {"zumba/aaaaaaaaaaa_000000_000010.mp4": 0}


def test_kinetics_paths_are_relative_below_the_output(run: Run) -> None:
    touch("out/videos/a b/x.mp4", "out/videos/c/y, z.mp4")
    text("lists/train.csv", HEADER + 'a b,x,0,10,train,0\nc,"y, z",0,10,train,0\n')
    assert run("kinetics400", "--videos", "out/videos", "--lists", "lists").code == 0
    assert Path("out/train.csv").read_text() == (
        'path,label,label_name\nvideos/a b/x.mp4,0,a b\n"videos/c/y, z.mp4",1,c\n'
    )
    assert listed("out/train.csv") == {"out/videos/a b/x.mp4": 0, "out/videos/c/y, z.mp4": 1}


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("label,id,time_start,time_end\nzumba,aaaaaaaaaaa,0,10\n", 1, "need label,youtube_id,"),
        ("youtube_id,time_start,time_end\naaaaaaaaaaa,0,10\n", 1, "got 'youtube_id,time_start,"),
        ("", 1, "youtube_id,time_start,time_end"),
        (HEADER + "zumba,aaaaaaaaaaa\n", 2, "got 'zumba,aaaaaaaaaaa,,'"),
        (
            HEADER + "zumba,aaaaaaaaaaa,zero,10,train,0\n",
            2,
            "the times in seconds, got 'zumba,aaaaaaaaaaa,zero,10'",
        ),
        (HEADER + "\n,aaaaaaaaaaa,0,10,train,0\n", 3, "got ',aaaaaaaaaaa,0,10'"),
        (HEADER + "zumba,,0,10,train,0\n", 2, "got 'zumba,,0,10'"),
        (
            HEADER + "zumba,aaaaaaaaaaa,0,10,train,0\nbowling,aaaaaaaaaaa,0,10,train,0\n",
            3,
            "listed already in lists/train.csv, line 2",
        ),
    ],
)
def test_kinetics_a_malformed_list_names_file_and_line(
    run: Run, content: str, line: int, reason: str
) -> None:
    touch("train/aaaaaaaaaaa_000000_000010.mp4")
    text("lists/train.csv", content)
    outcome = run("kinetics400", "--videos", "train", "--lists", "lists")
    refused(outcome, f"error: lists/train.csv, line {line}: ", reason)


def test_kinetics_what_does_not_fit_is_refused(run: Run) -> None:
    arguments = kinetics_arguments()
    touch("k/train/zumba/zzzzzzzzzz1_000010_000020.webm")
    two = ("2 files for zumba/zzzzzzzzzz1_000010_000020", "000020.mp4", "000020.webm", "--suffix")
    refused(run("kinetics400", *arguments), "lists/train.csv, line 2", *two)
    Path("k/train/zumba/zzzzzzzzzz1_000010_000020.webm").unlink()
    text("lists/val.csv", HEADER + "bowling,zzzzzzzzzz9,1,11,val,0\n")
    refused(run("kinetics400", *arguments), "lists/val.csv, line 2", "'bowling'", "of lists.")
    rows = "tap_dancing,aaaaaaaaaaa,0,10,train,0\ntap dancing,bbbbbbbbbbb,0,10,train,0\n"
    text("lists/train.csv", HEADER + rows)
    refused(run("kinetics400", *arguments), "lists: ", "'tap dancing' and 'tap_dancing'")
    text("lists/train.csv", HEADER)
    refused(run("kinetics400", *arguments), "the list of train is empty")


def test_kinetics_nothing_found_says_what_was_looked_for(run: Run) -> None:
    arguments = kinetics_arguments()
    touch("other/a.mp4")
    refused(
        run("kinetics400", "--videos", "other", *arguments[2:]),
        "none of the 6 videos was found, such as zumba/zzzzzzzzzz1_000010_000020",
        "<youtube_id>_<time_start>_<time_end>",
        "by --videos",
    )
    for folder in ("nowhere", "lists"):
        outcome = run("kinetics400", "--videos", folder, *arguments[2:])
        refused(outcome, "there are no videos (", folder)
    refused(run("kinetics400", *arguments[:2], "--lists", "k"), "no train.csv", "by --lists")


def test_kinetics_thumbnails_beside_the_videos_are_left_out(run: Run) -> None:
    arguments = kinetics_arguments()
    assert run("kinetics400", *arguments).code == 0
    before = listed("out/train.csv")
    touch("k/train/zumba/zzzzzzzzzz1_000010_000020.jpg", "k/train/zumba/other.webp")
    for chosen in ((), ("--suffix", ".MP4")):
        outcome = run("kinetics400", *arguments, *chosen)
        assert outcome.code == 0, outcome.err
        kept = [file for file in before if not chosen or file.lower().endswith(".mp4")]
        assert listed("out/train.csv") == {file: before[file] for file in kept}


def test_kinetics_existing_files_are_not_spoiled(run: Run) -> None:
    touch("a/run/1.mp4", "a/walk/2.mp4", "b/jump/3.mp4", "b/run/4.mp4")
    text("a/train.csv", HEADER + "run,1,0,10,train,0\nwalk,2,0,10,train,0\n")
    jump = HEADER + "jump,3,0,10,train,0\n"
    text("b/train.csv", jump)
    text("b/val.csv", HEADER + "jump,4,0,10,val,0\n")
    assert run("kinetics400", "--videos", "a", "--lists", "a").code == 0
    Path("out/train.csv").rename("out/mine.csv")
    before = {path.name: path.read_text() for path in Path("out").iterdir()}
    Path("b/val.csv").unlink()
    outcome = run("kinetics400", "--videos", "b", "--lists", "b")
    assert outcome.code == 2
    assert "out/mine.csv has the numbers of" in outcome.err
    assert {path.name: path.read_text() for path in Path("out").iterdir()} == before
    Path("out/mine.csv").unlink()
    assert run("kinetics400", "--videos", "b", "--lists", "b").code == 0
    assert Path("out/labels.txt").read_text() == "jump\n"

    outcome = run("kinetics400", "--videos", "b", "--lists", "b", output="b")
    assert outcome.code == 2
    assert "b/train.csv is no manifest of a data set and would be overwritten" in outcome.err
    assert Path("b/train.csv").read_text() == jump


def test_a_name_that_is_not_text_is_refused(run: Run) -> None:
    try:
        touch("a/" + os.fsdecode(b"caf\xe9") + "/1.mp4")
    except OSError:
        pytest.skip("this file system knows no such names")
    text("list/train.csv", HEADER + "run,1,0,10,train,0\n")
    outcome = run("kinetics400", "--videos", "a", "--lists", "list")
    refused(outcome, "caf\\udce9", "not text in UTF-8", "Rename it")


# --- Something-Something V2 -----------------------------------------------------------------------

SSV2_LABELS = {
    "Holding something next to something": "1",
    "Approaching something with your camera": "0",
    "Pretending to take something from somewhere": "2",
}


def ssv2_entry(number: int, template: str) -> dict[str, object]:
    return {
        "id": str(number),
        "label": "holding potato next to [vicks] vaporub bottle",
        "template": template,
        "placeholders": ["potato", "[vicks] vaporub bottle"],
    }


def ssv2_arguments(prefix: str = "") -> list[str]:
    train = [
        ssv2_entry(78687, "Holding [something] next to [something]"),
        ssv2_entry(42, "Pretending to take [something] from [somewhere]"),
        ssv2_entry(7, "Approaching [something] with your camera"),
    ]
    validation = [ssv2_entry(100, "Holding [something] next to [something]")]
    text(f"labels/{prefix}labels.json", json.dumps(SSV2_LABELS))
    text(f"labels/{prefix}train.json", json.dumps(train))
    text(f"labels/{prefix}validation.json", json.dumps(validation, indent=1))
    text(f"labels/{prefix}test.json", '[{"id":"1420"},\n{"id":"3"}]')
    touch(*(f"20bn-something-something-v2/{one}.webm" for one in (78687, 42, 7, 100, 1420, 3)))
    return ["--videos", "20bn-something-something-v2", "--lists", "labels"]


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2_as_downloaded(run: Run, prefix: str) -> None:
    arguments = ssv2_arguments(prefix)
    Path("20bn-something-something-v2/42.webm").unlink()
    touch("20bn-something-something-v2/999.webm")  # not in any list
    outcome = run("ssv2", *arguments)
    assert outcome.code == 0, outcome.err
    folder = "20bn-something-something-v2"
    assert Path("out/labels.txt").read_text().splitlines() == sorted(SSV2_LABELS)
    assert listed("out/train.csv") == {f"{folder}/78687.webm": 1, f"{folder}/7.webm": 0}
    assert listed("out/validation.csv") == {f"{folder}/100.webm": 1}
    assert listed("out/test.csv") == {f"{folder}/1420.webm": -1, f"{folder}/3.webm": -1}
    assert read_manifest("out/train.csv").label_names == (
        "Approaching something with your camera",
        "Holding something next to something",
    )
    assert Path("out/missing_train.txt").read_text() == "42\n"
    assert "train: 3 videos listed, 2 found, 1 missing" in outcome.out
    assert run("ssv2", *arguments, "--strict").code == 2


def test_ssv2_transcoded_and_only_some_splits(run: Run) -> None:
    arguments = ssv2_arguments()
    touch("20bn-something-something-v2/mp4/7.mp4", "20bn-something-something-v2/mp4/78687.MP4")
    refused(run("ssv2", *arguments), "labels/train.json, entry 1", "2 files for 78687", "--suffix")
    refused(run("ssv2", *arguments, "--suffix", ".avi"), "there are no videos (.avi) in ")
    for name in ("validation", "test"):
        Path(f"labels/{name}.json").rename(f"{name}.json")
    outcome = run("ssv2", *arguments, "--suffix", ".mp4")
    assert outcome.code == 0, outcome.err
    folder = "20bn-something-something-v2/mp4"
    assert listed("out/train.csv") == {f"{folder}/78687.MP4": 1, f"{folder}/7.mp4": 0}
    assert sorted(path.name for path in Path("out").glob("*.csv")) == ["train.csv"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "train",
            json.dumps([ssv2_entry(7, "Holding [something]")]),
            ("train.json, entry 1 (id 7)", "'Holding something'", "labels.json"),
        ),
        ("train", '[{"id": "7"}]', ("train.json, entry 1", "'template'")),
        ("train", '[\n{"id": "7",}\n]', ("train.json, line 2", "not JSON")),
        ("train", '{"id": "7"}', ("train.json: need a list",)),
        ("test", '[{"id": "3"}, {"id": "3"}]', ("test.json, entry 2", "test.json, entry 1")),
        ("test", '[{"ID": "3"}]', ("test.json, entry 1", "'id'")),
        ("labels", '{"a": "0", "b": "2"}', ("labels.json", "0 to 1", "missing: 1, 2")),
        ("labels", '{"a": "0", "b": "0"}', ("labels.json", "0 to 1", "missing: 1")),
        ("labels", '["a"]', ("labels.json", "need")),
    ],
)
def test_ssv2_a_malformed_list_names_file_and_entry(
    run: Run, name: str, content: str, parts: tuple[str, ...]
) -> None:
    arguments = ssv2_arguments()
    text(f"labels/{name}.json", content)
    refused(run("ssv2", *arguments), *parts)


def test_ssv2_nothing_found(run: Run) -> None:
    arguments = ssv2_arguments()
    touch("elsewhere/a.webm")
    refused(
        run("ssv2", "--videos", "elsewhere", "--lists", "labels"),
        "none of the 6 videos was found, such as 78687",
        "<id>.webm",
        "--videos",
    )
    refused(run("ssv2", *arguments[:2], "--lists", "elsewhere"), "labels.json", "--lists")


# --- UCF101 ---------------------------------------------------------------------------------------


def ucf_arguments() -> list[str]:
    """Three groups of two classes; each group is the test set of one split."""
    classes = {"ApplyEyeMakeup": "ApplyEyeMakeup", "HandstandPushups": "HandStandPushups"}
    text("lists/classInd.txt", "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n")
    names = {
        (folder, group): f"{folder}/v_{stem}_g0{group}_c01.avi"
        for folder, stem in classes.items()
        for group in (1, 2, 3)
    }
    touch(*(f"UCF-101/{name}" for name in names.values()))
    for split in (1, 2, 3):
        test = [name for (_, group), name in names.items() if group == split]
        train = [
            f"{name} {1 + list(classes).index(folder)}"
            for (folder, group), name in names.items()
            if group != split
        ]
        text(f"lists/testlist0{split}.txt", "\r\n".join(test) + "\r\n")
        text(f"lists/trainlist0{split}.txt", "\r\n".join(train) + "\r\n")
    return ["--videos", "UCF-101", "--lists", "lists"]


def test_ucf_three_splits(run: Run) -> None:
    outcome = run("ucf101", *ucf_arguments(), "--strict")
    assert outcome.code == 0, outcome.err
    assert Path("out/labels.txt").read_text() == "ApplyEyeMakeup\nHandstandPushups\n"
    eyes, hands = "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup", "UCF-101/HandstandPushups/v_HandStand"
    for split, others in {1: (2, 3), 2: (1, 3), 3: (1, 2)}.items():
        assert listed(f"out/test_split{split}.csv") == {
            f"{eyes}_g0{split}_c01.avi": 0,
            f"{hands}Pushups_g0{split}_c01.avi": 1,
        }
        assert listed(f"out/train_split{split}.csv") == {
            **{f"{eyes}_g0{group}_c01.avi": 0 for group in others},
            **{f"{hands}Pushups_g0{group}_c01.avi": 1 for group in others},
        }
    assert read_manifest("out/test_split2.csv").label_names == (
        "ApplyEyeMakeup",
        "HandstandPushups",
    )


def test_ucf_case_does_not_matter_and_what_is_missing_is_named(run: Run) -> None:
    arguments = ucf_arguments()
    Path("UCF-101/HandstandPushups").rename("UCF-101/HandStandPushups")
    folder = Path("UCF-101/HandStandPushups")
    (folder / "v_HandStandPushups_g01_c01.avi").rename(folder / "v_HandstandPushups_g01_c01.mp4")
    (folder / "v_HandStandPushups_g02_c01.avi").unlink()
    touch("UCF-101/extra/v_Extra_g01_c01.avi")
    outcome = run("ucf101", *arguments)
    assert outcome.code == 0, outcome.err
    assert listed("out/test_split1.csv") == {
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": 0,
        "UCF-101/HandStandPushups/v_HandstandPushups_g01_c01.mp4": 1,
    }
    name = "HandstandPushups/v_HandStandPushups_g02_c01.avi\n"
    assert Path("out/missing_test_split2.txt").read_text() == name
    assert Path("out/missing_train_split1.txt").read_text() == name
    assert not Path("out/missing_test_split1.txt").exists()
    assert "test_split2: 2 videos listed, 1 found, 1 missing" in outcome.out
    assert run("ucf101", *arguments, "--strict").code == 2


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("trainlist02", "\nWalking/v_a.avi 1\n", ("line 2", "'Walking'", "2 classes")),
        ("testlist03", "v_ApplyEyeMakeup_g03_c01.avi\n", ("line 1", "<class>/<video>.avi")),
        (
            "testlist01",
            "ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01.avi\n",
            ("line 1", "listed already in lists/trainlist01.txt, line 1"),
        ),
        ("testlist01", "", ("the list of test_split1 is empty",)),
        ("classInd", "0 ApplyEyeMakeup\n", ("line 1", "need '1 <name of the class>'")),
        ("classInd", "1 A\n3 B\n", ("line 2", "need '2 <name of the class>'")),
    ],
)
def test_ucf_a_malformed_list_names_file_and_line(
    run: Run, name: str, content: str, parts: tuple[str, ...]
) -> None:
    arguments = ucf_arguments()
    text(f"lists/{name}.txt", content)
    where = () if not content else (f"lists/{name}.txt",)
    refused(run("ucf101", *arguments), *where, *parts)


def test_ucf_nothing_found_no_list_and_two_files(run: Run) -> None:
    arguments = ucf_arguments()
    touch("elsewhere/a.avi")
    refused(
        run("ucf101", "--videos", "elsewhere", "--lists", "lists"),
        "none of the 6 videos was found",
        "UCF101.rar",
    )
    touch("UCF-101/copy/v_applyeyemakeup_g01_c01.avi")
    refused(run("ucf101", *arguments), "2 files for ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi")
    Path("lists/testlist03.txt").unlink()
    Path("UCF-101/copy/v_applyeyemakeup_g01_c01.avi").unlink()
    refused(run("ucf101", *arguments), "lists/testlist03.txt cannot be read")


# --- HMDB51 ---------------------------------------------------------------------------------------

HMDB_NAMES = {
    "swing_baseball": ["#20_a&b_[cut]_swing_u_0.avi", "Who's!_that;_np1_0.avi", "x (1)_0.avi"],
    "brush_hair": ["April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "b_0.avi", "x (1)_0.avi"],
}


def hmdb_arguments() -> list[str]:
    """In each split three videos of a class swap roles; one video is never used."""
    for name, videos in HMDB_NAMES.items():
        videos = [*videos, "never used_0.avi"]
        touch(*(f"hmdb51_org/{name}/{video}" for video in videos))
        for split, uses in {1: "1200", 2: "0120", 3: "2010"}.items():
            lines = [f"{video} {use} \n" for video, use in zip(videos, uses, strict=True)]
            text(f"lists/{name}_test_split{split}.txt", "".join(lines))
    return ["--videos", "hmdb51_org", "--lists", "lists"]


def test_hmdb_three_splits_and_odd_names(run: Run) -> None:
    outcome = run("hmdb51", *hmdb_arguments(), "--strict")
    assert outcome.code == 0, outcome.err
    assert Path("out/labels.txt").read_text() == "brush_hair\nswing_baseball\n"
    places = {"train_split1": 0, "test_split1": 1, "train_split2": 1}
    places |= {"test_split2": 2, "train_split3": 2, "test_split3": 0}
    for name, place in places.items():
        assert listed(f"out/{name}.csv") == {
            f"hmdb51_org/brush_hair/{HMDB_NAMES['brush_hair'][place]}": 0,
            f"hmdb51_org/swing_baseball/{HMDB_NAMES['swing_baseball'][place]}": 1,
        }
    assert "train_split1: 2 videos listed, 2 found, 0 missing" in outcome.out


def test_hmdb_other_spellings_and_missing_videos(run: Run) -> None:
    arguments = hmdb_arguments()
    Path("hmdb51_org/brush_hair").rename("away")
    Path("hmdb51_org/Brush Hair").mkdir()
    Path("away").rename("hmdb51_org/Brush Hair/brush hair")  # extracted into a folder of the class
    Path("hmdb51_org/swing_baseball/Who's!_that;_np1_0.avi").unlink()
    touch("hmdb51_org/swing_baseball/b_0.avi")  # listed, but under the other class
    outcome = run("hmdb51", *arguments)
    assert outcome.code == 0, outcome.err
    folder = "hmdb51_org/Brush Hair/brush hair"
    assert listed("out/test_split1.csv") == {f"{folder}/b_0.avi": 0}
    assert Path("out/missing_test_split1.txt").read_text() == (
        "swing_baseball/Who's!_that;_np1_0.avi\n"
    )
    assert Path("out/missing_train_split2.txt").exists()
    assert not Path("out/missing_train_split1.txt").exists()
    assert run("hmdb51", *arguments, "--strict").code == 2


def test_hmdb_what_does_not_fit_is_refused(run: Run) -> None:
    arguments = hmdb_arguments()
    touch("hmdb51_org/brush_hair/b_0.mp4")
    refused(run("hmdb51", *arguments), "2 files for brush_hair/b_0.avi", "--suffix")
    Path("hmdb51_org/brush_hair/b_0.mp4").unlink()
    path = Path("lists/brush_hair_test_split2.txt")
    good = path.read_text()
    for bad, part in {
        "b_0.avi 3\n": "0 (unused), 1 (training) or 2 (testing)",
        "b_0.avi\n": "need the name of a video",
        good.splitlines()[1] + "\n": f"listed already in {path}, line 2",
    }.items():
        path.write_text(good + bad)
        refused(run("hmdb51", *arguments), f"{path}, line 5", part)
    path.unlink()
    refused(run("hmdb51", *arguments), f"{path} cannot be read")
    refused(run("hmdb51", *arguments[:3], "hmdb51_org"), "brush_hair_test_split1.txt", "--lists")
    path.write_text(good)
    touch("elsewhere/b_0.avi")
    refused(
        run("hmdb51", "--videos", "elsewhere", *arguments[2:]),
        "none of the 4 videos was found",
        "<class>/<name of the video>",
        "hmdb51_org.rar",
    )


# --- ImageNet-1k ----------------------------------------------------------------------------------

WNIDS = ("n01440764", "n01443537", "n15075141")
NAMES = "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn15075141 toilet tissue\n"
VALIDATION = {f"ILSVRC2012_val_0000000{i}": label for i, label in enumerate((2, 0, 1, 2), start=1)}
FLAT = {f"in/val/{name}.JPEG": label for name, label in VALIDATION.items()}


def imagenet_arguments() -> list[str]:
    """Images in class folders."""
    touch(*(f"in/train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in (7, 10026)))
    touch(*(f"in/val/{WNIDS[label]}/{name}.JPEG" for name, label in VALIDATION.items()))
    return ["--train", "in/train", "--validation", "in/val"]


def flat_arguments() -> list[str]:
    imagenet_arguments()
    for name, label in VALIDATION.items():
        Path(f"in/val/{WNIDS[label]}/{name}.JPEG").rename(f"in/val/{name}.JPEG")
    return ["--train", "in/train", "--validation", "in/val"]


def test_imagenet_class_folders(run: Run) -> None:
    outcome = run("imagenet1k", *imagenet_arguments(), "--strict")
    assert outcome.code == 0, outcome.err
    assert Path("out/labels.txt").read_text().split() == list(WNIDS)
    assert listed("out/train.csv") == {
        f"in/train/{wnid}/{wnid}_{i}.JPEG": label
        for label, wnid in enumerate(WNIDS)
        for i in (7, 10026)
    }
    assert listed("out/validation.csv") == {
        f"in/val/{WNIDS[label]}/{name}.JPEG": label for name, label in VALIDATION.items()
    }
    assert read_manifest("out/train.csv").label_names == WNIDS
    assert "train: 6 images listed, 6 found, 0 missing" in outcome.out
    assert "video" not in outcome.out.replace(str(Path.cwd()), "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val.txt", "".join(f"val/{n}.JPEG\t{WNIDS[i]}\n" for n, i in VALIDATION.items())),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\n"
            + "".join(f"{n},{WNIDS[i]} 85 1 499 272 n99999999 3\n" for n, i in VALIDATION.items()),
        ),
    ],
)
def test_imagenet_a_flat_validation_folder(run: Run, name: str, content: str) -> None:
    arguments = [*flat_arguments(), "--validation-labels", text(name, content)]
    outcome = run("imagenet1k", *arguments, "--names", text("LOC_synset_mapping.txt", NAMES))
    assert outcome.code == 0, outcome.err
    assert listed("out/validation.csv") == FLAT
    assert Path("out/labels.txt").read_text() == NAMES
    assert read_manifest("out/train.csv").label_names == tuple(NAMES.splitlines())
    Path("in/val/ILSVRC2012_val_00000002.JPEG").unlink()
    outcome = run("imagenet1k", *arguments, "--strict", "--names", "out/labels.txt")
    assert outcome.code == 2
    assert "validation: 4 images listed, 3 found, 1 missing" in outcome.out
    assert Path("out/missing_validation.txt").read_text().startswith("ILSVRC2012_val_00000002")


@pytest.mark.parametrize(
    ("option", "content", "parts"),
    [
        ("--validation-labels", "a.JPEG 3\n", ("line 1", "'<image>.JPEG <wnid>'", "'a.JPEG 3'")),
        ("--validation-labels", "a.JPEG n00000001\n", ("line 1", "'n00000001'", "3 classes of")),
        ("--validation-labels", "a.JPEG n01440764\n", ("none of the 1 image was", "in/val")),
        ("--validation-labels", "\n", ("the list of validation is empty",)),
        (
            "--validation-labels",
            "a.JPEG n01440764\nb/a.JPEG n01440764\n",
            ("line 2", "listed already in"),
        ),
        ("--names", "tench\n", ("line 1", "LOC_synset_mapping.txt", "'tench'")),
    ],
)
def test_imagenet_what_does_not_fit_names_file_and_line(
    run: Run, option: str, content: str, parts: tuple[str, ...]
) -> None:
    arguments = [*flat_arguments(), option, text("list.txt", content)]
    refused(run("imagenet1k", *arguments), *parts)


def test_imagenet_what_cannot_be_known_is_refused(run: Run) -> None:
    arguments = flat_arguments()
    refused(run("imagenet1k", *arguments), "outside of class folders", "the list of validation")
    refused(run("imagenet1k"), "name the folder of --train, of --validation")
    val = text("val.txt", f"{next(iter(VALIDATION))}.JPEG {WNIDS[2]}\n")
    flat = ["--validation", "in/val", "--validation-labels", val]
    refused(run("imagenet1k", *flat), "the numbers of the classes come from", "--names")
    refused(run("imagenet1k", "--train", "in/train", *flat[2:]), "needs --validation")
    outcome = run("imagenet1k", *flat, "--names", text("names.txt", NAMES))
    assert outcome.code == 0, outcome.err
    assert listed("out/validation.csv") == {"in/val/ILSVRC2012_val_00000001.JPEG": 2}


def test_imagenet_class_folders_must_say_what_a_list_says(run: Run) -> None:
    arguments = imagenet_arguments()
    val = text("val.txt", f"{next(iter(VALIDATION))}.JPEG {WNIDS[1]}\n")
    refused(
        run("imagenet1k", *arguments, "--validation-labels", val),
        "val.txt, line 1",
        "class 'n01443537'",
        "in/val/n15075141",
        "the folder of another class",
    )
    touch("in/train/others/a.JPEG")
    refused(run("imagenet1k", *arguments), "in/train/others", "the class 'others' is not one of")


def test_imagenet_videos_in_the_place_of_images(run: Run) -> None:
    arguments = imagenet_arguments()
    touch("clips/n01440764/a.mp4", "tars/n01440764.tar")
    for folder in ("clips", "nowhere", "tars"):
        refused(
            run("imagenet1k", "--train", folder), "there are no images (", "with archives unpacked"
        )
    touch("in/train/n01440764/a.mp4")
    outcome = run("imagenet1k", *arguments)
    assert outcome.code == 0, outcome.err
    assert len(listed("out/train.csv")) == 6


def test_imagenet_names_that_repeat_between_classes(run: Run) -> None:
    """Names repeat like this in ImageNet-Sketch."""
    files = [f"in/{wnid}/sketch_{i}.JPEG" for wnid in WNIDS for i in (0, 1)]
    touch(*files, f"in/{WNIDS[0]}/sketch_0.png")
    outcome = run("imagenet1k", "--train", "in")
    assert outcome.code == 0, outcome.err
    expected = {file: WNIDS.index(Path(file).parent.name) for file in files}
    assert listed("out/train.csv") == expected | {f"in/{WNIDS[0]}/sketch_0.png": 0}
    rows = text("list.txt", f"{WNIDS[0]}/sketch_0.JPEG {WNIDS[0]}\n")  # here the name decides
    twice = run("imagenet1k", "--train", "in", "--validation", "in", "--validation-labels", rows)
    assert twice.code == 2
    assert "there are 4 files for sketch_0.JPEG" in twice.err


def test_imagenet_one_split_after_the_other(run: Run) -> None:
    train, validation = imagenet_arguments()[:2], imagenet_arguments()[2:]
    names = ["--names", text("LOC_synset_mapping.txt", NAMES)]
    assert run("imagenet1k", *train, *names).code == 0
    assert run("imagenet1k", *validation, "--names", "out/labels.txt").code == 0
    shown = read_manifest("out/validation.csv").label_names
    assert shown == read_manifest("out/train.csv").label_names == tuple(NAMES.splitlines())
    fewer = text("fewer.txt", NAMES + "n99999999 more\n")
    outcome = run("imagenet1k", *validation, "--names", fewer)
    assert outcome.code == 2
    assert "train.csv has the numbers of" in outcome.err


# --- CIFAR-10 -------------------------------------------------------------------------------------

CIFAR_NAMES = ["airplane", "automobile", "bird"]
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_batch(name: str) -> tuple[np.ndarray, list[int]]:
    """Pixels (N, 3072) and labels of two or three images."""
    seed = BATCHES.index(name)
    count = 2 + seed % 2
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)
    return pixels, [(seed + i) % 3 for i in range(count)]


def pickled_by_python_2(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Pickle as cPickle wrote the published files: an array, and text as bytes."""

    def string(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    kind = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\0K\x01tR(K\x03" + string(b"|") + b"NNN"
    kind += 2 * b"J\xff\xff\xff\xff" + b"K\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + string(b"b") + b"tR"
    array += b"(K\x01(K" + bytes([len(pixels)]) + b"M\x00\x0ct" + kind + b"\x89"
    array += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."


def cifar_files() -> dict[str, bytes]:
    files = {name: pickled_by_python_2(*cifar_batch(name)) for name in BATCHES}
    return files | {"batches.meta": pickle.dumps({"label_names": CIFAR_NAMES}, 2)}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make these files count as the published ones."""
    sums = {name: hashlib.md5(data).hexdigest() for name, data in cifar_files().items()}
    meta = CIFAR10.meta | {"md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in BATCHES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name in BATCHES[5:]])
    monkeypatch.setattr(CIFAR10, "meta", meta)


def cifar_archive(files: dict[str, bytes], path: str = "cifar.tar.gz") -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in reversed(files.items()):
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def check_cifar() -> None:
    assert Path("out/labels.txt").read_text().split() == CIFAR_NAMES
    for manifest, folder, names in (
        ("train", "train", BATCHES[:5]),
        ("validation", "test", BATCHES[5:]),
    ):
        batches = [cifar_batch(name) for name in names]
        read = read_manifest(f"out/{manifest}.csv")
        assert read.labels == tuple(label for _, labels in batches for label in labels)
        for i, (file, row) in enumerate(
            zip(read.files, np.concatenate([pixels for pixels, _ in batches]), strict=True)
        ):
            place = f"out/{folder}/{CIFAR_NAMES[read.labels[i]]}/{i:05}.png"
            assert file == str(Path(place).absolute())
            picture = np.array(Image.open(file))
            assert np.array_equal(picture, row.reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("form", ["archive", "folder", "folder above"])
def test_cifar_as_published(run: Run, form: str) -> None:
    files = cifar_files()
    folder = Path("root/cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    source = {"archive": "", "folder": str(folder), "folder above": "root"}[form]
    outcome = run("cifar10", source or cifar_archive(files))
    assert outcome.code == 0, outcome.err
    check_cifar()
    assert "train: 12 images listed, 12 found, 0 missing" in outcome.out
    assert "validation: 3 images listed" in outcome.out
    assert not list(Path("out").rglob("*.part*"))


@pytest.mark.usefixtures("published")
def test_cifar_starts_anew_where_it_was_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cifar_archive(cifar_files())
    write = Image.Image.save

    def fail(self: Image.Image, path: Path, form: str) -> None:
        if "00003" in str(path):
            raise OSError("no space left")
        write(self, path, form)

    monkeypatch.setattr(Image.Image, "save", fail)
    outcome = run("cifar10", source)
    assert outcome == (2, "", "error: no space left\n")
    assert not list(Path("out").glob("*.csv"))
    there = sorted(Path("out").rglob("*.png"))
    assert len(there) == 3
    there[0].write_bytes(b"half a picture")
    monkeypatch.setattr(Image.Image, "save", write)
    assert run("cifar10", source).code == 0
    check_cifar()


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harmed",)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data_batch_2", pickle.dumps(Harmful(), 2)),
        ("batches.meta", pickle.dumps({"label_names": Harmful()})),
        ("test_batch", b""),
        ("data_batch_5", None),
    ],
)
def test_cifar_pickles_that_are_not_published_are_refused(
    run: Run, name: str, content: bytes | None
) -> None:
    files = cifar_files()
    if content is None:
        del files[name]
    else:
        files[name] = content
    refused(run("cifar10", cifar_archive(files)), "cifar.tar.gz is not what is published", "MD5")
    assert not Path("harmed").exists()


def test_cifar_other_files_are_refused(run: Run) -> None:
    data = Path(cifar_archive(cifar_files())).read_bytes()
    Path("cut.tar.gz").write_bytes(data[: len(data) // 2])
    text("a.zip", "no archive")
    touch("c/train/bird/1.png")
    for name in ("cut.tar.gz", "a.zip", "c", "nowhere"):
        refused(run("cifar10", name), f"{name} is not what is published", "cifar-10-python.tar.gz")
