"""The shell scripts: what they start, and what they say. No environment is made here."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = (
    "run_finetune.sh",
    "run_pretrain.sh",
    "run_tests.sh",
    "requirements.txt",
    "pyproject.toml",
    "tests/requirements.txt",
    "tools/environment.sh",
    "tools/launch.sh",
)
# What says how many processes to start.
PROCESSES = {"GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE"}

# Stands for Python: says yes to the checks (-c) and writes down what else it is started with.
RECORDER = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exit 0; fi
printf '%s\\n' "$PWD" "$@" -- >>"$RECORD"
if [[ $1 == tools/* ]]; then exit "${EXIT_CODE:-0}"; fi
"""


class Clone:
    """A copy of the scripts, in a folder whose name holds spaces."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.elsewhere = folder / "else where"
        self.elsewhere.mkdir()
        for name in FILES:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.write("configs/pretrain/demo.yaml", "data: {train: datasets/demo/train.csv}")
        self.write("configs/pretrain/other.yaml", "data: {train: datasets/k400/train.csv}")
        self.write(
            "configs/finetune/demo.yaml",
            "init_weights: runs/demo/checkpoints/last\ndata: {train: datasets/demo/train.csv}",
        )
        self.write("configs/finetune/other.yaml", "data: {train: datasets/k400/train.csv}")
        (self.root / "datasets" / "demo").mkdir(parents=True)
        self.python = folder / "my python"
        self.python.write_text(RECORDER)
        self.python.chmod(0o755)
        self.record = folder / "record"

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(
        self,
        script: str,
        *arguments: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int = subprocess.PIPE,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / script), *arguments],
            cwd=cwd or self.elsewhere,
            env={
                **{name: value for name, value in os.environ.items() if name not in PROCESSES},
                "HPM_PYTHON": str(self.python),
                "RECORD": str(self.record),
                **(env or {}),
            },
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    def starts(self) -> list[list[str]]:
        """What Python was started with, each as [folder, argument, ...]."""
        starts: list[list[str]] = [[]]
        for line in self.record.read_text().splitlines():
            if line == "--":
                starts.append([])
            else:
                starts[-1].append(line)
        return starts[:-1]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


PREPARE = ["datasets/demo/prepare.py"]
DEMO = "configs/pretrain/demo.yaml"


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        ([], [PREPARE, ["tools/pretrain.py", DEMO]]),
        (
            ["recipe.epochs=2", "output_dir=runs/my run"],
            [PREPARE, ["tools/pretrain.py", DEMO, "recipe.epochs=2", "output_dir=runs/my run"]],
        ),
        ([DEMO, "seed=1"], [PREPARE, ["tools/pretrain.py", DEMO, "seed=1"]]),
        (
            ["configs/pretrain/other.yaml"],
            [["tools/pretrain.py", "configs/pretrain/other.yaml"]],
        ),
    ],
)
def test_arguments_reach_python_in_the_root(
    clone: Clone, arguments: Sequence[str], starts: list[list[str]]
) -> None:
    result = clone.run("run_pretrain.sh", *arguments)
    assert result.returncode == 0, result.stderr
    assert clone.starts() == [[str(clone.root), *start] for start in starts]


def test_config_is_looked_up_from_the_callers_folder_first(clone: Clone) -> None:
    mine = clone.elsewhere / "configs" / "pretrain" / "other.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("seed: 1")
    assert clone.run("run_pretrain.sh", "configs/pretrain/other.yaml").returncode == 0
    assert clone.starts() == [[str(clone.root), "tools/pretrain.py", str(mine)]]


def test_demo_data_is_made_once(clone: Clone) -> None:
    for split in ("train", "validation"):
        clone.write(f"datasets/demo/{split}.csv", "path,label\n")
    assert clone.run("run_pretrain.sh").returncode == 0
    assert [start[1] for start in clone.starts()] == ["tools/pretrain.py"]


@pytest.mark.parametrize(
    ("there", "starts"),
    [
        (["train", "validation"], [*PREPARE, "tools/pretrain.py"]),
        (["train_images"], [*PREPARE, "tools/pretrain.py"]),
        (["train_images", "validation_images"], ["tools/pretrain.py"]),
    ],
)
def test_demo_data_is_made_where_what_the_config_names_is_missing(
    clone: Clone, there: Sequence[str], starts: list[str]
) -> None:
    """Clips of an earlier version have no images beside them."""
    data = "data:\n  train: datasets/demo/train_images.csv\n"
    clone.write(DEMO, data + "  validation: datasets/demo/validation_images.csv")
    for name in there:
        clone.write(f"datasets/demo/{name}.csv", "path,label\n")
    assert clone.run("run_pretrain.sh").returncode == 0
    assert [start[1] for start in clone.starts()] == starts


def test_no_demo_data_is_made_where_both_lists_are_given(clone: Clone) -> None:
    given = ("data.train=mine.csv", "data.validation=null")
    assert clone.run("run_pretrain.sh", *given).returncode == 0
    assert [start[1] for start in clone.starts()] == ["tools/pretrain.py"]
    assert clone.run("run_pretrain.sh", given[0]).returncode == 0
    assert [start[1] for start in clone.starts()][1:] == [*PREPARE, "tools/pretrain.py"]


FINETUNE = "configs/finetune/demo.yaml"
PRETRAIN_FIRST = ["tools/pretrain.py", DEMO]


@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        ([], [PREPARE, PRETRAIN_FIRST, ["tools/finetune.py", FINETUNE]]),
        (
            ["recipe.epochs=2", "output_dir=runs/my run"],
            [
                PREPARE,
                PRETRAIN_FIRST,
                ["tools/finetune.py", FINETUNE, "recipe.epochs=2", "output_dir=runs/my run"],
            ],
        ),
        (
            ["init_weights=null"],
            [PREPARE, ["tools/finetune.py", FINETUNE, "init_weights=null"]],
        ),
        (
            ["configs/finetune/other.yaml", "init_weights=w"],
            [["tools/finetune.py", "configs/finetune/other.yaml", "init_weights=w"]],
        ),
    ],
)
def test_finetuning_makes_what_the_demo_starts_from(
    clone: Clone, arguments: Sequence[str], starts: list[list[str]]
) -> None:
    result = clone.run("run_finetune.sh", *arguments)
    assert result.returncode == 0, result.stderr
    assert clone.starts() == [[str(clone.root), *start] for start in starts]


def test_both_steps_run_where_nobody_reads_the_output(clone: Clone) -> None:
    read, write = os.pipe()
    os.close(read)
    result = clone.run("run_finetune.sh", stdout=write)
    os.close(write)
    assert result.returncode == 0, result.stderr
    assert [start[1] for start in clone.starts()][1:] == ["tools/pretrain.py", "tools/finetune.py"]


def test_a_pretraining_that_was_stopped_stops_the_fine_tuning(clone: Clone) -> None:
    assert clone.run("run_finetune.sh", env={"EXIT_CODE": "130"}).returncode == 130
    assert [start[1] for start in clone.starts()] == [PREPARE[0], "tools/pretrain.py"]


OTHER = ["tools/pretrain.py", "configs/pretrain/other.yaml"]


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({"GPUS": "1"}, []),
        ({"GPUS": "3"}, ["tools/launch.py", "--processes", "3"]),
        (
            {"GPUS": "3", "MASTER_PORT": "29600"},
            ["tools/launch.py", "--processes", "3", "--master-port", "29600"],
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"},
            [
                "tools/launch.py",
                "--processes",
                "1",
                "--nodes",
                "2",
                "--node-rank",
                "1",
                "--master-addr",
                "node0",
            ],
        ),
    ],
)
def test_processes_are_started_by_the_launcher(
    clone: Clone, env: Mapping[str, str], launcher: list[str]
) -> None:
    result = clone.run("run_pretrain.sh", *OTHER[1:], "seed=1", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert clone.starts() == [[str(clone.root), *launcher, *OTHER, "seed=1"]]


def test_both_steps_of_the_finetuning_demo_are_launched(clone: Clone) -> None:
    assert clone.run("run_finetune.sh", "init_weights=w", env={"GPUS": "2"}).returncode == 0
    assert clone.run("run_finetune.sh", env={"GPUS": "2"}).returncode == 0
    launcher = ["tools/launch.py", "--processes", "2"]
    programs = [start[1:] for start in clone.starts() if start[1:] != PREPARE]
    assert programs == [
        [*launcher, "tools/finetune.py", FINETUNE, "init_weights=w"],
        [*launcher, *PRETRAIN_FIRST],
        [*launcher, "tools/finetune.py", FINETUNE],
    ]


def test_hosts_are_started_by_the_launcher(clone: Clone) -> None:
    hosts = clone.elsewhere / "my hosts"
    hosts.write_text("# two\nnode0 slots=3\n\nnode1  slots=8 # more")
    env = {"HOSTFILE": "my hosts"}  # as seen from where the script is started
    assert clone.run("run_pretrain.sh", *OTHER[1:], env=env).returncode == 0
    assert clone.run("run_pretrain.sh", *OTHER[1:], "--dry-run", env=env).returncode == 0
    assert [start[1:] for start in clone.starts()] == [
        ["tools/launch.py", "--hostfile", str(hosts), *OTHER],
        [*OTHER, "--dry-run", "--processes", "11"],
    ]


@pytest.mark.parametrize(
    ("env", "processes"), [({}, "1"), ({"GPUS": "8"}, "8"), ({"GPUS": "8", "NNODES": "8"}, "64")]
)
def test_dry_run_is_one_process_anywhere(
    clone: Clone, env: Mapping[str, str], processes: str
) -> None:
    """Without the machines that the run itself needs."""
    for_both = ["--dry-run", "--processes", processes]
    arguments = ["--dry-run", *OTHER[1:], "seed=1"]
    assert clone.run("run_pretrain.sh", *arguments, env=env).returncode == 0
    assert clone.run("run_finetune.sh", "seed=1", "--dry-run", env=env).returncode == 0
    assert [start[1:] for start in clone.starts()] == [
        [*OTHER, "seed=1", *for_both],
        PREPARE,
        ["tools/finetune.py", FINETUNE, "seed=1", *for_both],
    ]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"GPUS": "0"}, "GPUS=0 must be a whole number of at least 1"),
        ({"GPUS": "two"}, "GPUS=two must be a whole number"),
        ({"GPUS": "2.5"}, "GPUS=2.5 must be a whole number"),
        ({"GPUS": "all"}, "GPUS=all must be a whole number"),
        ({"NNODES": "-1"}, "NNODES=-1 must be a whole number"),
        ({"GPUS": "2", "HOSTFILE": "h"}, "GPUS=2 and HOSTFILE=h are both given"),
        ({"NNODES": "2", "HOSTFILE": "h"}, "NNODES=2 and HOSTFILE=h are both given"),
        ({"HOSTFILE": "h"}, "HOSTFILE=h is no file"),
        ({"HOSTFILE": "bad"}, "HOSTFILE=bad names no host"),
        ({"HOSTFILE": "empty"}, "HOSTFILE=empty names no host"),
    ],
)
@pytest.mark.parametrize("script", ["run_pretrain.sh", "run_finetune.sh"])
def test_mistaken_processes(
    clone: Clone, script: str, env: Mapping[str, str], message: str
) -> None:
    (clone.elsewhere / "bad").write_text("node0\n")
    (clone.elsewhere / "empty").write_text("# none\n")
    result = clone.run(script, env=env)
    assert result.returncode == 2
    assert message in result.stderr
    assert not clone.record.exists()


def test_exit_code_is_pythons(clone: Clone) -> None:
    assert clone.run("run_pretrain.sh", env={"EXIT_CODE": "75"}).returncode == 75


def test_help(clone: Clone) -> None:
    result = clone.run("run_pretrain.sh", "--help", env={"HPM_PYTHON": "/nowhere"})
    assert result.returncode == 0
    assert "./run_pretrain.sh CONFIG [section.key=value ...]" in result.stdout


@pytest.mark.parametrize("script", ["run_pretrain.sh", "run_finetune.sh"])
@pytest.mark.parametrize(
    ("argument", "message"),
    [("configs/none.yaml", "no configuration configs/none.yaml"), ("--fast", "unknown option")],
)
@pytest.mark.parametrize("others", [[], ["--dry-run"]])
def test_mistaken_argument(
    clone: Clone, script: str, argument: str, message: str, others: Sequence[str]
) -> None:
    result = clone.run(script, *others, argument)
    assert result.returncode == 2
    assert message in result.stderr
    assert not clone.record.exists()


def test_given_python_without_the_modules(clone: Clone) -> None:
    clone.python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -I -S "$@"\n')
    result = clone.run("run_pretrain.sh")
    assert result.returncode == 1
    assert "lacks modules:\n  torch\n" in result.stderr
    assert f"'{clone.python}' -m pip install -r '{clone.root}/requirements.txt'" in result.stderr


def test_given_python_that_is_none(clone: Clone) -> None:
    result = clone.run("run_pretrain.sh", env={"HPM_PYTHON": "/no/such python"})
    assert result.returncode == 1
    assert "HPM_PYTHON=/no/such python is no program" in result.stderr


def test_given_python_that_is_too_old(clone: Clone) -> None:
    clone.python.write_text("#!/usr/bin/env bash\nexit 1\n")
    result = clone.run("run_pretrain.sh")
    assert result.returncode == 1
    assert "is not Python 3.10 to 3.13" in result.stderr


def test_without_any_python(clone: Clone, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "basename", "cat", "cksum", "grep"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    result = clone.run("run_pretrain.sh", env={"HPM_PYTHON": "", "PATH": str(tools)})
    assert result.returncode == 1
    assert "no Python 3.10 to 3.13 found" in result.stderr

    # As Debian's python3 is without python3-venv.
    (tools / "python3").write_text(
        f"#!{tools}/bash\n"
        "[[ $2 != *ensurepip* ]] || exit 1\nif [[ $2 == *print* ]]; then echo 3.11; fi\n"
    )
    (tools / "python3").chmod(0o755)
    result = clone.run("run_pretrain.sh", env={"HPM_PYTHON": "", "PATH": str(tools)})
    assert result.returncode == 1
    assert "sudo apt-get install python3.11-venv" in result.stderr
    assert not (clone.root / ".venv").exists()


def test_package_is_found_from_anywhere_and_the_datasets_folder_is_not(clone: Clone) -> None:
    clone.write("hpm_video/__init__.py", "")
    clone.python.write_text(
        f'#!/usr/bin/env bash\nif [[ $1 == -c ]]; then exit 0; fi\nexec "{sys.executable}" "$@"\n'
    )
    clone.write(
        "tools/pretrain.py",
        "import sys\nimport hpm_video\nprint(hpm_video.__file__)\nprint(*sys.path, sep='\\n')\n",
    )
    result = clone.run("run_pretrain.sh", "configs/pretrain/other.yaml")
    assert result.returncode == 0, result.stderr
    package, *search = map(Path, result.stdout.splitlines())
    assert package.resolve() == clone.root / "hpm_video" / "__init__.py"
    assert clone.root not in search


def test_signals_reach_python(clone: Clone) -> None:
    clone.python.write_text('#!/usr/bin/env bash\n[[ $1 == -c ]] || echo "$$"\n')
    started = subprocess.Popen(
        [str(clone.root / "run_pretrain.sh"), "configs/pretrain/other.yaml"],
        env={**os.environ, "HPM_PYTHON": str(clone.python)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = started.communicate()
    assert int(output) == started.pid


def test_failing_step_of_the_tests_ends_them(clone: Clone) -> None:
    recorder = RECORDER.replace(
        "if [[ $1 == tools",
        "if [[ $2 == ruff && $3 == check ]]; then exit 3; fi\nif [[ $1 == tools",
    )
    clone.python.write_text(recorder)
    result = clone.run("run_tests.sh")
    assert result.returncode == 3
    assert [start[2:4] for start in clone.starts()] == [["ruff", "format"], ["ruff", "check"]]
    assert "== failed, with code 3" in result.stderr
