"""Training and testing, started as by a user, on data with files that crash the decoder.

The decoder is a stand-in for decord: the effect of real files on real decoders depends on the
machine, and no file is known that makes one hang.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DECORD = '''
"""A decoder that makes up frames, and crashes or hangs on some files, by their names."""
import ctypes
import os

import numpy as np

__version__ = "0.6.0"


class logging:
    QUIET = -8

    @staticmethod
    def set_level(_level):
        pass


class Frame:
    def __init__(self, pixels):
        self.asnumpy = lambda: pixels


class VideoReader:
    def __init__(self, path, num_threads=1):
        self.path, self.at = str(path), 0
        self.tried = not os.path.exists(self.path)  # the video with which a decoder is tried out

    def __len__(self):
        return 2 if self.tried else 12

    def next(self):
        self.at += 1
        if "hangs" in self.path:
            open(f"{os.path.dirname(self.path)}/{os.getpid()}.hangs", "w").close()
            ctypes.PyDLL(None).sleep(10**6)  # with the interpreter's lock
        if "crashes" in self.path:
            os.abort()
        eaten = []
        while "eats" in self.path:
            eaten.append(np.ones(2**22, np.uint8))
        if self.tried:
            return Frame(np.full((64, 64, 3), (0, 50, 200)[self.at], np.uint8))
        draw = np.random.default_rng([self.at, *os.path.basename(self.path).encode()])
        return Frame(draw.integers(256, size=(40, 40, 3), dtype=np.uint8))
'''
PROGRAM = """
import os, sys
from pathlib import Path
from hpm_video.workers import pool

class Clock:  # it runs only while the single decoding process hangs, so no other file is late
    now, folder = 0.0, Path(sys.argv[1])

    def monotonic(self):
        marks = [int(mark.stem) for mark in self.folder.rglob("*.hangs")]
        self.now += any(os.path.exists(f"/proc/{pid}") for pid in marks)
        return self.now

pool.time = Clock()
del sys.argv[:2]
sys.path.insert(0, "tools")
sys.exit(__import__(sys.argv[0]).main())
"""
REASONS = {
    "crashes": "the process that decoded it ended by SIGABRT",
    "eats": "it needs more memory than a process that decodes may have",
    "hangs": "it took longer than 1 s",
}
LIMITED = (
    "data.decoder=decord",
    "data.workers=1",
    "data.seconds_per_file=1",
    "data.memory_per_worker=0.25",
)


@pytest.fixture
def run(start_program, tmp_path):
    """Run a program on ``tmp_path / "videos"``, of which some hang. -> exit code and output"""
    (tmp_path / "hpm_video").symlink_to(ROOT / "hpm_video")
    (tmp_path / "decord.py").write_text(DECORD)

    def start(tool, *arguments):
        command = ("-c", PROGRAM, tmp_path / "videos", tool, *arguments)
        program = start_program(*command, PYTHONPATH=str(tmp_path))
        output, _ = program.communicate()
        return program.returncode, output

    return start


def among_hostile(folder, target):
    """Copy a folder of videos, and add three hostile files beside its first video."""
    shutil.copytree(folder, target)
    first = sorted(target.rglob("*.mp4"))[0]
    return {shutil.copy(first, first.with_name(f"{name}.mp4")): name for name in REASONS}


def test_pretraining_goes_on_and_names_them(run, config_file, videos, tmp_path):
    hostile = among_hostile(videos / "train", tmp_path / "videos")
    code, output = run(
        "pretrain",
        config_file,
        f"output_dir={tmp_path / 'run'}",
        f"data.train={tmp_path / 'videos'}",
        "data.max_bad_share=0.5",
        "recipe.epochs=2",
        *LIMITED,
    )
    assert code == 0, output
    rows = list(csv.DictReader((tmp_path / "run" / "bad_files.csv").read_text().splitlines()))
    assert {row["path"]: row["reason"] for row in rows} == {
        str(path): REASONS[name] for path, name in hostile.items()
    }
    for path in hostile:
        assert Path(path).name in output
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert max(line["update"] for line in lines) >= 7
    (tmp_path / "run" / "checkpoints" / "last").resolve(strict=True)


@pytest.mark.parametrize("exclude", [True, False])
def test_a_test_goes_on_or_names_all_of_them(
    run, finetune_config, labelled_videos, tmp_path, exclude
):
    among_hostile(labelled_videos / "validation", tmp_path / "videos")
    code, output = run(
        "finetune",
        finetune_config,
        f"output_dir={tmp_path / 'run'}",
        f"data.validation={tmp_path / 'videos'}",
        "recipe.epochs=1",
        "recipe.warmup_epochs=0",
        f"test.exclude_bad_files={str(exclude).lower()}",
        *LIMITED,
    )
    assert code == (0 if exclude else 2), output
    for name, reason in REASONS.items():
        assert f"{name}.mp4: {reason}" in output
