"""How a job of two processes, started as a user does, ends when it is stopped, killed or given a
wrong input; and how it goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import finish

from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.runs.pretraining import Pretraining
from hpm_video.runs.pretraining import pretrain as run_pretraining
from hpm_video.training.checkpoint import checkpoints_in, read_state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAUNCHED = (str(ROOT / "tools" / "launch.py"), "--processes", "2")
LONG = ("recipe.epochs=6", "checkpoint.every_updates=2", "logging.picture_every_epochs=99")
SHIFTS_ALL_SCORES = ("difficulty_decoder.head.bias", "difficulty_decoder.norm.bias")
"""Their true gradient is zero: see test_same_results.py."""
SPREAD = ("engine.name=deepspeed", "engine.zero_stage=3")
WAITER = """
import os, sys, time
from hpm_video.training.run import Run

def after_update(self, progress, settings, original=Run.after_update):
    original(self, progress, settings)
    while progress.update == int(os.environ["WAIT_AT"]) and self.stop.received is None:
        time.sleep(0.01)

Run.after_update = after_update
sys.path.insert(0, {tools!r})
import pretrain
sys.exit(pretrain.main())
"""
"""Each process waits after a certain update until it is told to stop."""
KILLER = """
import os, pathlib, signal, sys, time
from hpm_video.training import checkpoint

place = pathlib.Path({place!r})
(place / ("pid" + os.environ["RANK"])).write_text(str(os.getpid()))

def write(state, path, original=checkpoint._write_optimizer, calls=[]):
    calls.append(path)
    original(state, path)
    if len(calls) == 3:
        os.kill(int((place / "pid1").read_text()), signal.SIGKILL)
        time.sleep(10**6)

checkpoint._write_optimizer = write
sys.path.insert(0, "tools")
import pretrain
sys.exit(pretrain.main())
"""
"""The first process kills the second in the middle of its third checkpoint, then hangs."""


@pytest.fixture
def environment(tmp_path):
    """Variables that let programs import ``hpm_video``, but not ``datasets`` beside it."""
    (tmp_path / "import").mkdir()
    (tmp_path / "import" / "hpm_video").symlink_to(ROOT / "hpm_video")
    return os.environ | {"PYTHONPATH": str(tmp_path / "import"), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def start(environment):
    """Start a program as a job of two processes; those left at the end are killed."""
    started = []

    def begin(program, *arguments, **variables):
        started.append(
            subprocess.Popen(
                [sys.executable, *LAUNCHED, str(program), *map(str, arguments)],
                cwd=ROOT,
                env=environment | variables,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        return started[-1]

    yield begin
    for launcher in started:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.communicate()


def saved(run):
    """The update at which a run would go on."""
    stored = checkpoints_in(run / "checkpoints")
    return read_state(stored[-1])["update"] if stored else 0


def wait_until_saved(run, launcher, update):
    """Wait for a checkpoint after at least ``update`` updates."""
    while saved(run) < update:
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.1)


def process_of(launcher, rank):
    """The process id of a rank that a launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = [
        int(child)
        for child in children
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{child}/environ').read_text()}"
    ]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def unbroken(small_configs, tmp_path_factory):
    """The newest checkpoint of a run in one process that nothing interrupts."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    overrides = [f"output_dir={run}", *LONG]
    run_pretraining(load_config(PretrainConfig, small_configs["video"], overrides))
    return checkpoints_in(run / "checkpoints")[-1]


def assert_same(run, unbroken):
    """The order of sums alone changes weights by less than 1e-5 in these 21 updates. An update that
    is lost, repeated or made with other clips changes them by up to the learning rate, 1e-3.
    """
    ours = checkpoints_in(run / "checkpoints")[-1]
    assert ours.name == unbroken.name
    for name in ("model", "teacher"):
        found, expected = (load_file(path / f"{name}.safetensors") for path in (ours, unbroken))
        assert found.keys() == expected.keys()
        for key in found.keys() - set(SHIFTS_ALL_SCORES):
            assert (found[key] - expected[key]).abs().max() < 1e-4, f"{name} {key}"


def test_stopped_then_one_killed_then_gone_on(start, start_job, small_configs, unbroken, tmp_path):
    """They are stopped by a signal to each process, as by the launcher and a scheduler."""
    run, waiter = tmp_path / "run", tmp_path / "waiter.py"
    waiter.write_text(WAITER.format(tools=str(ROOT / "tools")))
    command = (small_configs["video"], f"output_dir={run}", *LONG)

    stopped = start_job(2, waiter, *command, WAIT_AT="2")
    wait_until_saved(run, stopped[0], 2)
    for process in stopped:
        os.kill(process.pid, signal.SIGTERM)
    output = "".join(finish(process, code=75) for process in stopped)
    assert f"stopped by SIGTERM before update {saved(run)}; the state is saved" in output
    assert output.count("stopped by SIGTERM") == 1
    assert "Traceback" not in output

    at = saved(run)
    killed = start(waiter, *command, *SPREAD, WAIT_AT=str(at + 2))
    wait_until_saved(run, killed, at + 1)
    victim = process_of(killed, 1)
    os.kill(victim, signal.SIGKILL)
    output = finish(killed, code=1)
    assert f"resuming at update {at} of " in output
    assert f"error: rank 1 of 2 (pid {victim} on " in output
    assert "was killed by SIGKILL" in output
    assert "Start the same command again" in output

    run_pretraining(load_config(PretrainConfig, command[0], list(command[1:])))
    assert_same(run, unbroken)
    assert not list((run / "checkpoints").glob(".writing*"))


def test_killed_while_the_other_saves(start_job, small_configs, unbroken, tmp_path):
    """Half a checkpoint does not count: one process goes on from the one before."""
    run = tmp_path / "run"
    arguments = (small_configs["video"], f"output_dir={run}", *LONG)
    first, second = start_job(2, "-c", KILLER.format(place=str(tmp_path)), *arguments)
    output, _ = second.communicate()
    assert second.returncode == -signal.SIGKILL, output
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert list((run / "checkpoints").glob(".writing*"))
    assert saved(run) == 4
    run_pretraining(load_config(PretrainConfig, arguments[0], list(arguments[1:])))
    assert not list((run / "checkpoints").glob(".writing*"))
    assert_same(run, unbroken)


def test_a_wrong_input_is_reported_once(environment, small_configs, tmp_path):
    arguments = [small_configs["video"], f"output_dir={tmp_path / 'run'}", "recipe.batch_size=5"]
    done = subprocess.run(
        [ROOT / "run_pretrain.sh", *arguments],
        env=environment | {"HPM_PYTHON": sys.executable, "GPUS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout
    assert "got 5; take recipe.batch_size=6" in done.stdout
    assert done.stdout.count("error:") == 1
    assert "Traceback" not in done.stdout


def test_a_wrong_file_of_one_process_is_reported(start_job, small_configs, small_data, tmp_path):
    """The file is in the second half of the first batch, which the second process reads."""
    config, folder = small_configs["video"], tmp_path / "train"
    shutil.copytree(small_data / "videos" / "train", folder)
    overrides = [f"data.train={folder}", "data.max_bad_share=0", f"output_dir={tmp_path / 'run'}"]
    loaded = load_config(PretrainConfig, config, overrides)
    clips = Pretraining(loaded).training_clips()
    bad = Path(clips[0][3].file)
    bad.write_bytes(b"")
    first, second = start_job(2, "tools/pretrain.py", config, *overrides)
    output, _ = second.communicate()
    assert second.returncode == 2, output
    assert "1 of 14 files does not decode" in output
    assert str(bad) in output
    assert "Traceback" not in first.communicate()[0] + output
    assert first.returncode in (1, 2), "it lost the other process, or got the signal"
