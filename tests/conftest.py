"""Small real videos, and runs over them as a user starts them."""

import fcntl
import gc
import importlib
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from multiprocessing import forkserver
from pathlib import Path
from tempfile import mkstemp

import hypothesis
import pytest
from tiny_runs import (
    AUTOENCODER,
    CLASSIFIER,
    ENGINE,
    finish,
    moving_texture,
    write_all,
    write_classes,
)

hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config):
    """Tests and the processes that they start see a GPU only under ``-m gpu``: otherwise
    ``device=auto`` is the CPU, as on a machine without a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


LONGEST = (
    "test_pretraining",
    "test_finetuning",
    "test_export",
    "test_check",
    "test_transcode",
    "test_docs",
    "test_loader",
    "test_launch",
    "test_image_runs",
    "test_endings",
    "test_memory",
)
"""The slowest files but for test_same_results: it takes 215 s beside these, 100 s beside others."""


def pytest_collection_modifyitems(items):
    """Slow tests come first, so that all workers end at about the same time."""

    def key(item):
        is_quick = item.get_closest_marker("slow") is None
        return is_quick, (*LONGEST, item.path.stem).index(item.path.stem)

    items.sort(key=key)


def pytest_collection_finish():
    """Modules are never garbage, and looking through them takes a second each time."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Tests print names that are not valid text, but the reports of workers must be."""
    report = yield
    report.sections = [
        (title, content.encode("utf-8", "backslashreplace").decode())
        for title, content in report.sections
    ]
    return report


pytest_plugins = ["painted_videos", "pool_clock"]  # of tests/fixtures
ROOT = Path(__file__).parent.parent
CONFIG = (
    AUTOENCODER
    + """  patch_size: [2, 8, 8]
data:
  train: {train}
  validation: {validation}
  num_frames: 4
  frame_stride: 1
  max_frame_stride: 2
  frame_size: [32, 32]
  workers: 0
masking: {{ratio: 0.75}}
mining: {{momentum: warmup, last_momentum: 0.9}}
recipe: {{epochs: 8, batch_size: 4, base_lr: 0.1, min_lr: 0, warmup_epochs: 1}}
logging: {{every_updates: 1, validate_every_epochs: 4, picture_every_epochs: 8, trackers: [jsonl]}}
checkpoint: {{every_updates: 5, keep_last: 1, keep_every_epochs: 4}}
"""
    + ENGINE
)
FINETUNE_CONFIG = (
    CLASSIFIER
    + """
init_weights: {init_weights}
recipe: {{epochs: 20, batch_size: 6, base_lr: 0.4, warmup_epochs: 2, layer_decay: 0.9,
  average_momentum: 0.8}}
augmentation: {{area: [0.5, 1.0], rand_augment: rand-m3-n1, mix_probability: 0.5, mixup: 0.2}}
logging: {{every_updates: 1, validate_every_epochs: 10, trackers: [jsonl]}}
checkpoint: {{every_updates: 5, keep_last: 1}}
test: {{clips: 2, crops: 2, weights: average}}
"""
    + ENGINE
)
"""30 updates with 6 of 9 videos, and two clips of each."""
DISTURBED = """
import os, signal, sys
from hpm_video.training import checkpoint, run

def interrupt():
    os.killpg(os.getpgrp(), signal.{signal})

def at_update(self, progress, settings, original=run.Run.after_update):
    if progress.update == 6 and {place!r} == "update":
        interrupt()
    original(self, progress, settings)

def on_the_third_call(original, calls=[0]):
    def call(*args, **options):
        calls[0] += 1
        if calls[0] == 3:
            interrupt()
        return original(*args, **options)
    return call

run.Run.after_update = at_update
if {place!r} == "writing":
    checkpoint._write_optimizer = on_the_third_call(checkpoint._write_optimizer)
if {place!r} == "linking":
    checkpoint.Path.symlink_to = on_the_third_call(checkpoint.Path.symlink_to)
sys.argv = {argv!r}
sys.path.insert(0, "tools")
import {tool}
sys.exit({tool}.main())
"""
"""A run of which all processes get a signal at a certain place."""


@pytest.fixture(scope="session")
def reserve_port():
    """Find ports that nobody else gets before the tests end, as tools/launch.py does."""
    with ExitStack() as stack:

        def reserve() -> int:
            bound = stack.enter_context(socket.socket())
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(("127.0.0.1", 0))
            return bound.getsockname()[1]

        yield reserve


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """Make a folder once for all pytest workers, which wait for the one that makes it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def videos(make_once) -> Path:
    """Folders ``train`` with 14 videos and ``validation`` with 4."""
    return make_once(
        "videos with spaces", lambda folder: write_all(folder, moving_texture, "texture {}")
    )


@pytest.fixture(scope="session")
def labelled_videos(make_once) -> Path:
    """Folders ``train`` with 9 videos and ``validation`` with 6, in class folders by tint."""
    return make_once(
        "labelled", lambda folder: write_classes(folder, lambda _, seed: moving_texture(seed))
    )


def write_config(make_once, name: str, text: str, data: Path) -> Path:
    text = text.format(train=data / "train", validation=data / "validation")
    return make_once(name, lambda folder: (folder / "tiny.yaml").write_text(text)) / "tiny.yaml"


@pytest.fixture(scope="session")
def finetune_config(labelled_videos, finished_run, make_once) -> Path:
    """Fine-tuning from the finished pre-training run."""
    text = FINETUNE_CONFIG.replace("{init_weights}", str(finished_run / "checkpoints" / "last"))
    return write_config(make_once, "finetune config", text, labelled_videos)


@pytest.fixture(scope="session")
def config_file(videos, make_once) -> Path:
    """28 updates of 4 videos. Checkpoints within epochs (5, 10 ...), and at 14 and 28."""
    return write_config(make_once, "config", CONFIG, videos)


class Program:
    """A program of the repository in its own process, forked from a server with all imports.

    Importing torch takes longer than most programs of the tests. The program's pools fork from the
    same server, and so do not get signals to the program's group, unless the environment variable
    OWN_SERVER is set. The interface is the part of ``subprocess.Popen`` that the tests use;
    standard output and errors are one text.
    """

    def __init__(self, arguments, environment, folder: Path) -> None:
        handle, self._output = mkstemp(".txt", "output ", folder)
        os.close(handle)
        forkserver.ensure_running()
        values = {
            "arguments": list(map(str, arguments)),
            "environment": dict(environment),
            "output": self._output,
            "server": forkserver._forkserver._forkserver_address,
        }
        path = str(Path(__file__).with_name("program.py"))
        options = {"init_globals": values, "run_name": "__main__"}
        self._process = FORKS.Process(target=runpy.run_path, args=(path,), kwargs=options)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return Path(self._output).read_text(), None


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "hpm_video.runs.pretraining",
        "hpm_video.runs.finetuning",
        "hpm_video.weights.importing",
        "timm",
        "torch._inductor.compile_fx",  # by DeepSpeed
    ]
)


@pytest.fixture(scope="session")
def start_program(tmp_path_factory):
    """Start a program of the repository that can import the package, but not ``datasets``."""
    folder = tmp_path_factory.mktemp("import")
    (folder / "hpm_video").symlink_to(ROOT / "hpm_video")

    def start(*arguments, **variables) -> Program:
        return Program(arguments, os.environ | {"PYTHONPATH": str(folder)} | variables, folder)

    return start


@pytest.fixture(scope="session")
def start_job(start_program, reserve_port):
    """Start a program in several processes that form a job."""

    def start(processes, *arguments, **variables) -> list[Program]:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
        shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes)) | variables
        return [
            start_program(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            for rank in range(processes)
        ]

    return start


def starter_of(tool, config, start_program):
    """Start runs of a tool; with ``place`` they get the signal ``number`` there."""

    def start(run, *overrides, place=None, number="SIGKILL", curves=False) -> Program:
        arguments = [f"tools/{tool}.py", str(config), f"output_dir={run}", *overrides]
        variables = {"WITH_CURVES": "yes"} if curves else {}
        if place is not None:
            variables["OWN_SERVER"] = "yes"
            code = DISTURBED.format(place=place, signal=number, argv=arguments, tool=tool)
            arguments = ["-c", code]
        return start_program(*arguments, **variables)

    return start


@pytest.fixture(scope="session")
def pretrain(config_file, start_program):
    """Start ``tools/pretrain.py`` in a process of its own."""
    return starter_of("pretrain", config_file, start_program)


@pytest.fixture(scope="session")
def finetune(finetune_config, start_program):
    """Start ``tools/finetune.py`` in a process of its own."""
    return starter_of("finetune", finetune_config, start_program)


@pytest.fixture(scope="session")
def finished_run(pretrain, make_once) -> Path:
    """The directory of a run that nothing interrupted, beside its output."""

    def fill(folder: Path) -> None:
        (folder / "output.txt").write_text(finish(pretrain(folder / "run", curves=True)))

    return make_once("finished", fill) / "run"


@pytest.fixture(scope="session")
def finetuned_run(finetune_config, make_once) -> Path:
    """The directory of a fine-tuning run, started as a user starts it, beside its output."""

    def fill(folder: Path) -> None:
        command = [ROOT / "run_finetune.sh", finetune_config, f"output_dir={folder / 'run'}"]
        environment = os.environ | {"HPM_PYTHON": sys.executable}
        script = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert script.returncode == 0, script.stdout + script.stderr
        (folder / "output.txt").write_text(script.stdout)

    return make_once("finetuned", fill) / "run"


@pytest.fixture
def call_tool(without_curves, monkeypatch, capsys, caplog):
    """Run a program of ``tools/`` in this process. -> exit code and output, with its log"""
    monkeypatch.syspath_prepend(ROOT / "tools")

    def call(name, *arguments) -> tuple[int, str]:
        caplog.clear()
        with caplog.at_level("INFO"):
            code = importlib.import_module(name).main([*map(str, arguments)])
        return code, caplog.text + "".join(capsys.readouterr())

    return call


@pytest.fixture
def without_curves(monkeypatch):
    """Draw no curves in this process: they take as long as all updates of a tiny run."""
    for name in ("runs.run", "training.run"):
        monkeypatch.setattr(f"hpm_video.{name}.plot_curves", lambda *_: None)


@pytest.fixture
def run_tool(start_program, start_job):
    """Run a program of ``tools/`` to its end. -> exit code and output"""

    def run(name, *arguments, processes=1) -> tuple[int, str]:
        command = [f"tools/{name}.py", *arguments]
        programs = [start_program(*command)] if processes == 1 else start_job(processes, *command)
        outputs = [program.communicate()[0] for program in programs]
        codes = [program.returncode for program in programs]
        return next(filter(None, codes), 0), "".join(outputs)

    return run
