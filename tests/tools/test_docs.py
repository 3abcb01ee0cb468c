"""Everything that the documentation says to run does run, and the site builds without warnings."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpm_video.config.loading import load_any_config
from hpm_video.config.schema import FinetuneConfig
from hpm_video.runs.directory import check_same_model

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "configs" / "README.md",
    *sorted(ROOT.glob("datasets/*/README.md")),
)
NOT_RUN = ("compare_pretraining.py", "--processes", "probe.py", "bench.py")
"""These commands need more data or time than a test has: only their options are checked."""


def commands(first: str) -> list[list[str]]:
    """All different commands on the pages that start with ``first``, split into words."""
    found = {}
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            command = re.sub(r"^(\w+=\S+ )*", "", " ".join(line.split()))
            if line.startswith("    ") and command.startswith(first):
                found[command] = command.split()
    return list(found.values())


def starts() -> list[list[str]]:
    """Commands with one of the two scripts and a shipped config."""
    return [words for words in commands("./run_") if words[1:] and words[1].startswith("configs/")]


def test_the_pages_have_commands():
    assert len(starts()) >= 12
    assert len(commands("python tools/")) >= 20


@pytest.mark.parametrize("words", starts(), ids=" ".join)
def test_a_start_with_a_config_can_be_made(words):
    config = load_any_config(ROOT / words[1], [word for word in words[2:] if word[:2] != "--"])
    start = Path(config.init_weights or "")
    source = ROOT / "configs" / "pretrain" / f"{start.parts[1]}.yaml" if start.parts[1:] else ROOT
    if isinstance(config, FinetuneConfig) and source.is_file():
        check_same_model(config, load_any_config(source))


def test_runs_that_are_named_come_from_a_config_or_a_command():
    texts = [" ".join(words) for words in (*commands("./run_"), *commands("python "))]
    texts += [path.read_text(encoding="utf-8") for path in ROOT.glob("configs/*/*.yaml")]
    made = {folder for text in texts for folder in re.findall(r"output_dir[=:] ?(\S+)", text)}
    named = {run for text in texts for run in re.findall(r"(runs/\S+)/checkpoints/", text)}
    assert named - made == set()


@pytest.fixture(scope="module")
def stand_in(videos, labelled_videos, finished_run, finetuned_run, start_program, tmp_path_factory):
    """A function that replaces a word of a command with something that exists."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(labelled_videos / "train", folder / "my_videos")
    checkpoint, classifier = (run / "checkpoints" / "last" for run in (finished_run, finetuned_run))
    video = videos / "train" / "texture 0.mp4"
    exported = str(folder / "videomae.pth")
    command = ["tools/weights.py", "export", str(checkpoint), exported, "--to", "videomae"]
    export = start_program(*command)
    output, _ = export.communicate()
    assert export.returncode == 0, output
    words = {
        "VIDEO": video,
        "IMAGE": video,
        "VIDEO_OR_FOLDER": videos / "validation",
        "MANIFEST": folder / "my_videos",
        "LIST": folder / "my_videos",
        "LIST_OR_FOLDER": folder / "my_videos",
        "my_videos": folder / "my_videos",
        "my_videos.checked.csv": folder / "my_videos",
        "datasets/demo/train.csv": labelled_videos / "train",
        "datasets/demo/validation.csv": labelled_videos / "validation",
        "FILE": exported,
    }

    def stands_for(tool: str, word: str) -> list[str]:
        if "runs/" in word or word == "CHECKPOINT":
            return [str(classifier if tool in ("predict.py", "evaluate.py") else checkpoint)]
        if word in ("OUT", "OUTPUT", "FOLDER", "features/"):
            return [str(folder / f"{tool} {word.strip('/')}")]
        if "*" in word:
            return [str(path) for path in sorted(ROOT.glob(word))[:2]]
        return [str(words.get(word, word))]

    return stands_for


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("python tools/"), ids=" ".join)
def test_a_command_can_be_run(words, call_tool, capsys, stand_in, tmp_path):
    tool, *arguments = words[1].removeprefix("tools/"), *words[2:]
    if any(mark in " ".join(words) for mark in NOT_RUN):
        with pytest.raises(SystemExit, match="0"):
            call_tool(tool.removesuffix(".py"), *_verbs(arguments), "--help")
        output = capsys.readouterr().out
        assert [word for word in arguments if word[:2] == "--" and word not in output] == []
        return
    options = [word for argument in arguments for word in stand_in(tool, argument)]
    options += ["--output", str(tmp_path)] if tool in ("show_masks.py", "split.py") else []
    options += ["--share", "0.4"] if tool == "split.py" else []  # enough of three videos per class
    code, output = call_tool(tool.removesuffix(".py"), *options)
    assert code == 0, output


def _verbs(arguments: list[str]) -> list[str]:
    return [word for word in arguments[:1] if re.fullmatch("[a-z]+", word)]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "hidden" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
