"""The seams of the design, checked on the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "hpm_video"
MAY_IMPORT = {
    "deepspeed": {"training/deepspeed_engine.py"},
    "decord": {"data/decode.py"},
    "av": {"data/decode.py", "data/encode.py"},
    "omegaconf": {"config.py"},
    "pandas": {"data/manifest.py"},
    "argparse": {"console.py", "data/recipes.py"},
    "transformers": set(),
    "torchvision": {"data/augment.py"},
    "timm": {"data/augment.py", "mixing.py"},
}
SEES_A_CONFIG = {
    "config.py",
    "console.py",
    "experiment.py",
    "features.py",
    "finetune.py",
    "pretrain.py",
    "recognition.py",
}
PURE = ("token_grid", "randomness", "masking", "targets", "losses", "pixels", "progress", "models")
LONGEST_FUNCTION = 60


def files():
    return sorted(SOURCE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_library_is_imported_only_behind_its_seam(library):
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in files()
        if library in {name.split(".")[0] for name in imports_of(path)}
    }
    assert users <= MAY_IMPORT[library]


def test_only_the_assembly_sees_a_config():
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in files()
        if "hpm_video.config" in imports_of(path)
    }
    assert users <= SEES_A_CONFIG


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_the_core_stands_alone(path):
    parts = path.relative_to(SOURCE).parts
    if parts[0].removesuffix(".py") in PURE:
        own = {name for name in imports_of(path) if name.startswith("hpm_video.")}
        assert all(name.split(".")[1] in PURE for name in own)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_function_is_long(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


def test_no_room_without_a_name():
    vague = {"utils", "util", "misc", "common", "helpers"}
    folders = [SOURCE, *(ROOT / name for name in ("tools", "tests", "datasets"))]
    assert not [path for folder in folders for path in folder.rglob("*.py") if path.stem in vague]


def test_core_does_not_know_whether_it_has_images_or_video():
    """A count of time steps is compared nowhere: one time step is data, not a case."""
    for name in ("masking", "targets", "losses", "mining", "held_out"):
        tree = ast.parse((SOURCE / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "time" not in text, text
                assert "num_frames" not in text, text


def test_importing_the_package_imports_no_optional_library():
    code = (
        "import sys, hpm_video.pretrain; "
        "print([n for n in ('decord', 'deepspeed', 'transformers', 'timm') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr
