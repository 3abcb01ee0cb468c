"""What runs leave if they are killed away from checkpoints, or nobody reads their output."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny_runs import finish, lines_of

from hpm_video.files.atomic import remove_unfinished, temporary_folder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

KILLED_DRAWING = """
import os, signal, sys
from PIL import Image

def save(self, file, **options):
    open(file, "wb").close()
    os.killpg(os.getpgrp(), signal.SIGKILL)

Image.Image.save = save
sys.path.insert(0, "tools")
import pretrain
sys.exit(pretrain.main(sys.argv[1:]))
"""
KILLED_READING = """
import os, signal, sys
from hpm_video.training.run import Run

def after_update(self, progress, settings):
    if {group}:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

Run.after_update = after_update
sys.path.insert(0, "tools")
import pretrain
sys.exit(pretrain.main(sys.argv[1:]))
"""
NOT_KILLED = """
import sys
from hpm_video.runs import run
from hpm_video.training import run as of_training

run.plot_curves = of_training.plot_curves = lambda *_: None
sys.path.insert(0, "tools")
import pretrain
sys.exit(pretrain.main(sys.argv[1:]))
"""
WITHOUT_A_READER = """
import os, sys

read, write = os.pipe()
for number in {closed}:
    os.dup2(write, number)
os.close(read)
os.close(write)
sys.path.insert(0, "tools")
import pretrain
code = pretrain.main(sys.argv[1:])
sys.stdout.flush()
sys.exit(code)
"""
SHORT = ("recipe.epochs=1", "recipe.warmup_epochs=0", "logging.picture_every_epochs=99")


def test_pictures_that_a_kill_interrupted_are_drawn_at_the_next_start(
    start_program, config_file, tmp_path
):
    run = tmp_path / "run"
    command = [str(config_file), f"output_dir={run}", *SHORT]
    killed = start_program("-c", KILLED_DRAWING, *command, WITHOUT_CURVES="yes", OWN_SERVER="yes")
    finish(killed, code=-signal.SIGKILL)
    (part,) = (run / "pictures").iterdir()
    assert part.name.endswith(".part.png")
    finish(start_program("tools/pretrain.py", *command))
    assert [path.name for path in (run / "pictures").iterdir()] == ["update-00000003.png"]
    assert "is complete, with 3 updates" in finish(start_program("tools/pretrain.py", *command))


def test_a_killed_run_leaves_no_temporary_files_for_ever(config_file, tmp_path):
    """One process or all of them are killed. They are started as by a user, and share nothing with
    those of the tests."""
    for name in ("t", "t/hpmv-of-a-user", "import"):
        (tmp_path / name).mkdir()
    (tmp_path / "import" / "hpm_video").symlink_to(ROOT / "hpm_video")
    temporary = tmp_path / "t"  # paths of sockets must be short
    environment = {"TMPDIR": str(temporary), "PYTHONPATH": str(tmp_path / "import")}

    def run(code) -> int:
        command = [str(config_file), f"output_dir={tmp_path / 'run'}", *SHORT, "data.workers=1"]
        started = subprocess.Popen(
            [sys.executable, "-c", code, *command],
            cwd=ROOT,
            env=os.environ | environment,
            start_new_session=True,
        )
        return started.wait()

    for group in (True, False):
        assert run(KILLED_READING.format(group=group)) == -signal.SIGKILL
        assert len([*temporary.iterdir()]) == 2
    assert run(NOT_KILLED) == 0
    assert [path.name for path in temporary.iterdir()] == ["hpmv-of-a-user"]


@pytest.mark.parametrize("closed", [(1,), (1, 2)], ids=["output", "output and errors"])
def test_a_run_whose_output_nobody_reads_goes_on(start_program, config_file, tmp_path, closed):
    run = tmp_path / "run"
    command = [str(config_file), f"output_dir={run}", *SHORT]
    code = WITHOUT_A_READER.format(closed=closed)
    output = finish(start_program("-c", code, *command, WITHOUT_CURVES="yes"))
    assert output == ""
    assert [line["update"] for line in lines_of(run, "train")] == [1, 2, 3]
    assert (run / "pictures" / "update-00000003.png").is_file()


def test_only_what_a_dead_process_began_is_deleted(tmp_path):
    dead = 2**22 + 1  # above the highest process id on Linux
    names = [
        f".a.{dead}.part.png",
        f".part_0.{dead}.part.npy",
        f".b.{os.getpid()}.part.png",
        ".c.part.png",
        "d.part",
    ]
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == sorted(names[2:])


def test_the_temporary_folder_of_a_living_process_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = temporary_folder.__wrapped__(), temporary_folder.__wrapped__()
    assert first != second
    assert sorted(tmp_path.iterdir()) == sorted([first, second])
