"""The shell scripts: what they start, and what they print. No environment is created here."""

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
    "tools/launch.py",
    "tools/launch.sh",
)
# Variables that say how many processes to start.
PROCESSES = {"GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}

# A stand-in for Python: all checks (-c) succeed, and other arguments are written down; of the
# launcher, those of the program that it starts.
RECORDER = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exit 0; fi
[[ $1 != tools/launch.py ]] || shift
printf '%s\\n' "$PWD" "$@" -- >>"$RECORD"
if [[ $1 == tools/* ]]; then exit "${EXIT_CODE:-0}"; fi
"""


class Clone:
    """A copy of the scripts, in a folder with spaces in its name."""

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
        """All starts of Python, each as [working directory, argument, ...]."""
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


def test_a_config_is_found_by_its_name(clone: Clone) -> None:
    lists = ["data.train=a", "data.validation=b"]
    for name, found in (("demo", DEMO), ("finetune/demo", FINETUNE)):
        assert clone.run("run_pretrain.sh", name, *lists).returncode == 0
        assert clone.starts()[-1] == [str(clone.root), "tools/pretrain.py", found, *lists]


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
    """An earlier version made clips without images."""
    data = "data:\n  train: datasets/demo/train_images.csv\n"
    clone.write(DEMO, data + "  validation: datasets/demo/validation_images.csv")
    for name in there:
        clone.write(f"datasets/demo/{name}.csv", "path,label\n")
    assert clone.run("run_pretrain.sh").returncode == 0
    assert [start[1] for start in clone.starts()] == starts


def test_no_demo_data_is_made_where_both_lists_are_given(clone: Clone) -> None:
    lists = ("data.train=mine.csv", "data.validation=null")
    assert clone.run("run_pretrain.sh", *lists).returncode == 0
    assert [start[1] for start in clone.starts()] == ["tools/pretrain.py"]
    assert clone.run("run_pretrain.sh", lists[0]).returncode == 0
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


def test_the_launcher_starts_all_programs(clone: Clone) -> None:
    """The launcher itself reads GPUS, NNODES and so on: see test_launch_options.py."""
    recorder = RECORDER.replace("[[ $1 != tools/launch.py ]] || shift", "")
    clone.python.write_text(recorder)
    assert clone.run("run_pretrain.sh", *OTHER[1:], "seed=1").returncode == 0
    assert clone.run("run_finetune.sh").returncode == 0
    assert [start[1:] for start in clone.starts()] == [
        ["tools/launch.py", *OTHER, "seed=1"],
        PREPARE,
        ["tools/launch.py", *PRETRAIN_FIRST],
        ["tools/launch.py", "tools/finetune.py", FINETUNE],
    ]


def test_a_dry_run_may_go_without_data(clone: Clone) -> None:
    sizes = ["--files=9", "--clips-per-second=2.5"]
    assert clone.run("run_finetune.sh", "seed=1", "--dry-run").returncode == 0
    assert clone.run("run_finetune.sh", "--dry").returncode == 0  # or an option that is none
    assert clone.run("run_pretrain.sh", "--dry-run", *sizes, DEMO).returncode == 0
    assert [start[1:] for start in clone.starts()] == [
        PREPARE,
        ["tools/finetune.py", FINETUNE, "seed=1", "--dry-run"],
        PREPARE,
        ["tools/finetune.py", FINETUNE, "--dry"],
        ["tools/pretrain.py", DEMO, "--dry-run", *sizes],
    ]


def test_exit_code_is_pythons(clone: Clone) -> None:
    assert clone.run("run_pretrain.sh", env={"EXIT_CODE": "75"}).returncode == 75


def test_help(clone: Clone) -> None:
    result = clone.run("run_pretrain.sh", "--help", env={"HPM_PYTHON": "/nowhere"})
    assert result.returncode == 0
    assert "./run_pretrain.sh CONFIG [section.key=value ...]" in result.stdout


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
@pytest.mark.parametrize("others", [[], ["--dry-run"]])
def test_a_config_that_is_not_there_is_the_programs_to_tell(
    clone: Clone, program: str, others: list[str]
) -> None:
    assert clone.run(f"run_{program}.sh", *others, "configs/none.yaml").returncode == 0
    start = [f"tools/{program}.py", "configs/none.yaml", *others]
    assert clone.starts() == [[str(clone.root), *start]]


def test_given_python_without_the_modules(clone: Clone) -> None:
    clone.python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -I -S "$@"\n')
    result = clone.run("run_pretrain.sh")
    assert result.returncode == 1
    assert "lacks modules:\n  torch\n" in result.stderr
    assert f"'{clone.python}' -m pip install -r '{clone.root}/requirements.txt'" in result.stderr


def test_given_python_that_does_not_exist(clone: Clone) -> None:
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
    assert "no Python 3.10 to 3.13 with" in result.stderr

    # Like Debian's python3 without python3-venv.
    (tools / "python3").write_text(f"#!{tools}/bash\n[[ $2 != *ensurepip* ]]\n")
    (tools / "python3").chmod(0o755)
    result = clone.run("run_pretrain.sh", env={"HPM_PYTHON": "", "PATH": str(tools)})
    assert result.returncode == 1
    assert "sudo apt-get install python3-venv" in result.stderr
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


@pytest.mark.parametrize("before", ["", "/mine"])
def test_the_place_of_the_package_comes_before_what_is_given(clone: Clone, before: str) -> None:
    clone.python.write_text('#!/usr/bin/env bash\n[[ $1 == -c ]] || echo "$PYTHONPATH"\n')
    result = clone.run("run_pretrain.sh", *OTHER[1:], env={"PYTHONPATH": before})
    expected = [f"{clone.root}/build/import", *([before] if before else [])]
    assert result.stdout.strip().split(":") == expected


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
