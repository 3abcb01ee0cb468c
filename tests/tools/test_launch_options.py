"""The launcher's options, and the environment variables that stand for them."""

import importlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(__file__))
VARIABLES = ("GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HPM_GRACE")


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("launch")


@pytest.fixture
def job_of(launch, monkeypatch):
    def job(*options, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        given = launch.read_options([*map(str, options), PROGRAM, "--seed", "1"])
        assert given.arguments == ["--seed", "1"]
        numbers = (given.processes, given.nodes, given.node_rank)
        return *numbers, given.master_addr, given.master_port, given.grace

    return job


def test_variables_stand_for_options(job_of):
    assert job_of() == (1, 1, 0, "127.0.0.1", None, 300)
    three = {"GPUS": "3", "MASTER_PORT": "29600", "HPM_GRACE": "7"}
    assert job_of(**three) == (3, 1, 0, "127.0.0.1", 29600, 7)
    two = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    assert job_of(**two) == (3, 2, 1, "node0", 29600, 7)
    assert job_of("--processes", 4, "--node-rank", 0) == (4, 2, 0, "node0", 29600, 7)


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        ((), {"GPUS": "0"}, "--processes 0 (GPUS) and --nodes 1 (NNODES) must be at least 1"),
        ((), {"GPUS": "2.5"}, "argument --processes: invalid int value: '2.5'"),
        ((), {"NNODES": "-1"}, "--nodes -1 (NNODES) must be at least 1"),
        ((), {"HPM_GRACE": "long"}, "argument --grace: invalid float value: 'long'"),
        (("--processes", "0"), {}, "--processes 0 (GPUS) and"),
        (("--nodes", "2"), {}, "(NNODES) needs --node-rank (NODE_RANK), from 0 to 1, and"),
        (("--nodes", "2", "--node-rank", "0"), {}, "--master-addr (MASTER_ADDR)"),
        (
            ("--nodes", "2", "--node-rank", "2", "--master-addr", "a"),
            {},
            "--node-rank (NODE_RANK), from 0 to 1",
        ),
    ],
)
def test_mistakes_are_named(launch, monkeypatch, capsys, options, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        launch.main([*options, PROGRAM])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_program_that_is_not_there(launch, capsys):
    with pytest.raises(SystemExit) as end:
        launch.main(["no.py"])
    assert end.value.code == 2
    assert "error: no program no.py in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "variables", "more"),
    [
        ((), {}, ()),
        ((), {"GPUS": "1"}, ()),
        (("--dry-run",), {}, ("--processes", "1")),
        (("--dry-run",), {"GPUS": "8", "NNODES": "8"}, ("--processes", "64")),
    ],
)
def test_one_process_takes_the_launchers_place(launch, monkeypatch, given, variables, more):
    """So does a dry run of many processes, which needs no other machines."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    class ReplacedError(Exception):
        pass

    def replace(*call):
        raise ReplacedError(call)

    monkeypatch.setattr(os, "execv", replace)
    with pytest.raises(ReplacedError) as replaced:
        launch.main([PROGRAM, "a b", *given])
    command = [sys.executable, "-u", PROGRAM, "a b", *given, *more]
    assert replaced.value.args[0] == (sys.executable, command)
