"""Command lines of all programs: help and error messages, and that these come quickly."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpm_video import __main__ as commands
from hpm_video.files.wording import counted

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    path.relative_to(ROOT).as_posix()
    for path in (*sorted(ROOT.glob("tools/*.py")), *sorted(ROOT.glob("datasets/*/prepare.py")))
    if "def main(" in path.read_text() or "main = " in path.read_text()
]
ANSWERS = """
import argparse, contextlib, importlib.util, io, json, os, sys
from pathlib import Path
import av, numpy, omegaconf, pandas, tqdm.contrib.logging  # once; torch is in none

def parsers_of(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (each for one in action.choices.values() for each in parsers_of(one))

def remember(self, *arguments, original=argparse.ArgumentParser.parse_known_args, **more):
    parsers.append(self)
    return original(self, *arguments, **more)

argparse.ArgumentParser.parse_known_args = remember
for path in sys.argv[1:]:
    if os.fork():  # each program in its own process
        os.wait()
        continue
    parsers, shown, codes = [], io.StringIO(), []
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        for words in (["--help"], ["--misspelt", "1"]):
            try:
                module.main(words)
            except SystemExit as end:
                codes.append(end.code)
    answer = {
        "program": path,
        "codes": codes,
        "shown": shown.getvalue(),
        "torch": "torch" in sys.modules,
        "options": [
            {
                "names": action.option_strings or [action.dest],
                "help": action.help,
                "takes": [action.nargs, action.metavar],
                "choices": action.choices and [*action.choices],
                "default": str(action.default),
            }
            for parser in parsers_of(parsers[0])
            for action in parser._actions
            if not isinstance(action, argparse._SubParsersAction)
        ],
    }
    os.write(1, (json.dumps(answer) + "\\n").encode())
    os._exit(0)
"""
OF_ITS_OWN = {"--clips", "--decoder", "--labels", "--output", "--processes", "--seconds"}
OF_ITS_OWN |= {"--tokens", "--train", "--validation", "--workers"}
"""Options that differ in meaning, or in allowed values, between programs."""


@pytest.fixture(scope="module")
def answers():
    """The output of each program for --help and for a misspelt option."""
    command = [sys.executable, "-c", ANSWERS, *PROGRAMS]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [each["program"] for each in found] == PROGRAMS, ended.stderr
    return {each["program"]: each for each in found}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_a_misspelt_option_do_not_wait_for_torch(answers, program):
    answer = answers[program]
    assert answer["codes"] == [0, 2]
    assert re.search(r"error: .*(--misspelt|required|invalid choice)", answer["shown"])
    assert not answer["torch"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_explained(answers, program):
    assert [each["names"] for each in answers[program]["options"] if not each["help"]] == []


def test_an_option_takes_the_same_everywhere(answers):
    takes = {}
    for program, answer in answers.items():
        for each in answer["options"]:
            if each["names"][-1].startswith("--"):
                takes.setdefault(each["names"][0], {}).setdefault(str(each["takes"]), program)
    differing = {name: ways for name, ways in takes.items() if len(ways) > 1}
    assert {*differing} - OF_ITS_OWN == set(), differing


def test_what_the_command_lines_repeat_is_what_the_package_has(answers):
    """To import it there would take seconds."""
    from hpm_video.weights.exporting import ENDINGS
    from hpm_video.weights.verify import TOLERANCE

    found = {each["names"][0]: each for each in answers["tools/weights.py"]["options"]}
    assert (found["--to"]["choices"], found["--tolerance"]["default"]) == (
        [*ENDINGS],
        str(TOLERANCE),
    )
    found = {each["names"][0]: each for each in answers["tools/probe.py"]["options"]}
    assert found["--neighbours"]["default"] == "[10, 20, 100, 200]"


def test_plurals_are_made_by_one_function():
    own = re.compile(r"""\w\(s\)|["']e?s["'] [*i]""")
    sources = [
        path
        for folder in ("hpm_video", "tools", "datasets")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    found = {path: own.findall(path.read_text()) for path in sources if path.stem != "wording"}
    assert {path: words for path, words in found.items() if words} == {}
    assert [counted(n, "class") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [counted(2, noun) for noun in ("batch", "epoch")] == ["2 batches", "2 epochs"]


def test_the_doctor_lists_what_is_there_where_torch_is_not(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    doctor = importlib.import_module("doctor")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main([]) == 2
    shown = capsys.readouterr().out
    assert re.search(r"^  einops +\d", shown, re.MULTILINE)
    assert "error: import of torch" in shown


def test_a_command_that_is_not_there_is_a_wrong_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hpm-video", "pretrian"])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert capsys.readouterr().err.startswith("error: there is no command pretrian")


def test_there_are_programs():
    assert {"tools/predict.py", "tools/launch.py", "datasets/demo/prepare.py"} <= {*PROGRAMS}
