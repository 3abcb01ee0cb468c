"""Rules of the design, checked on the source code."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "hpm_video"
MAY_IMPORT = {
    "deepspeed": {"training/deepspeed_engine.py"},
    "decord": {"decoding/others.py"},
    "torchcodec": {"decoding/others.py"},
    "av": {
        "decoding/orientation.py",
        "decoding/pyav.py",
        "preparation/encode.py",
        "preparation/soundness.py",
        "decoding/video_stream.py",
    },
    "omegaconf": {"config/loading.py"},
    "pandas": {
        "data/manifest.py",
        "mining/pictures.py",
        "training/curves.py",
    },
    "argparse": {
        "runs/console.py",
        "runs/options.py",
        "preparation/recipes.py",
        "weights/files.py",
    },
    "transformers": {"weights/verify.py"},
    "onnx": {"weights/exporting.py"},
    "onnxruntime": {"weights/exporting.py"},
    "torchvision": {"data/augment.py", "decoding/image.py"},
    "wandb": {"training/trackers.py"},
    "mlflow": {"training/trackers.py"},
    "huggingface_hub": {"hub.py"},
    "sklearn": {"recognition/probes.py", "recognition/testing.py"},
    "timm": {
        "data/augment.py",
        "recognition/objective.py",
        "models/feature_model.py",
        "weights/exporting.py",
        "weights/geometry.py",
        "weights/verify.py",
    },
}
SEES_A_CONFIG = {
    "api.py",
    "models/from_config.py",
    "recognition/trained_model.py",
    "weights/geometry.py",
    "weights/importing.py",
}
NO_SCHEMA = {"choices", "checks", "batch_plan"}
"""Modules of config/ that every module may import: they know no section."""
ORDER = (
    ("files", "randomness", "tokens"),
    ("config",),
    ("models", "workers", "decoding"),
    ("data",),
    ("preparation", "training"),
    ("mining",),
    ("recognition",),
    ("weights",),
    ("hub", "runs"),
    ("api",),
)
"""Folders from the bottom: each may import only those in the lines before its own."""
PURE = {
    "tokens": {"tokens"},
    "models": {"tokens", "randomness", "config", "models", "files"},
    "training/progress.py": set(),
    "mining/losses.py": {"config"},
}
"""The parts of the package that may be imported there."""
CORE = (
    "tokens/masking",
    "tokens/patches",
    "mining/losses",
    "mining/targets",
    "mining/objective",
    "mining/validation",
    "recognition/objective",
    "training/loop",
    "training/objective",
    "training/engine",
    "training/ema",
    "models/encoder",
    "models/masked_autoencoder",
    "models/classifier",
    "models/vit",
)
"""Modules that must work alike for images and video."""
SAID_IN_THE_CORE = {
    "videomae",  # the paper whose rule or convention it is
    "hpm_video",  # the name of the package
    "tokens_per_step",  # in TokenGrid; an image has one time step
}
DECIDED_BY_TIME = {
    # One of the rankers that a predictor is compared with looks at motion. For one time step it
    # is left out, as it would find all patches equally hard.
    "mining/validation": {"clips.shape[2] > 1"},
}


def files():
    return sorted(SOURCE.rglob("*.py"))


@cache
def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "hpm_video":
                names |= {f"hpm_video.{alias.name}" for alias in node.names}
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
        if "hpm_video.config.schema" in imports_of(path)
        and path.relative_to(SOURCE).parts[0] not in ("config", "runs")
    }
    assert users <= SEES_A_CONFIG


def own_imports(path: Path) -> set[str]:
    """The package's folders and root modules that a module imports from."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("hpm_video.")}


@pytest.mark.parametrize("place", PURE)
def test_the_core_stands_alone(place):
    found = [SOURCE / place] if place.endswith(".py") else [*(SOURCE / place).glob("*.py")]
    assert found
    assert set().union(*map(own_imports, found)) <= PURE[place]


def test_every_folder_has_a_place_in_the_order():
    known = [name for level in ORDER for name in level]
    assert sorted(known) == sorted(
        path.stem for path in SOURCE.iterdir() if path.stem[0].isalpha() and path.name != "py.typed"
    )


def test_folders_import_downwards_only():
    found = {path: imported_from_above(path) for path in files()}
    assert {path: names for path, names in found.items() if names} == {}


def imported_from_above(path: Path) -> set[str]:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    level = next((i for i, names in enumerate(ORDER) if own in names), len(ORDER))
    return own_imports(path) - {own} - {name for names in ORDER[:level] for name in names}


def test_no_module_has_a_vague_name():
    vague = {"utils", "util", "misc", "common", "helpers"}
    folders = [SOURCE, *(ROOT / name for name in ("tools", "tests", "datasets"))]
    assert not [path for folder in folders for path in folder.rglob("*.py") if path.stem in vague]


def identifiers_of(tree: ast.AST) -> set[str]:
    """Every name in a program, except names of imported modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.asname}
    return names


def strings_of(tree: ast.AST) -> set[str]:
    """Every string in a program, including parts of f-strings, but not docstrings."""
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    }


def conditions_of(tree: ast.AST) -> list[ast.AST]:
    """All comparisons and conditions of a program."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.BoolOp):
            found.append(node)
        elif isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            found.append(node.test)
        elif isinstance(node, ast.Match):
            found.append(node.subject)
        elif isinstance(node, ast.comprehension):
            found += node.ifs
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("min", "max", "bool"):
            found.append(node)
    return found


def looks_at_time(condition: ast.AST) -> bool:
    """Whether it uses the length of a clip: ``time``, ``num_frames``, ``shape[2]``."""
    for node in ast.walk(condition):
        if isinstance(node, ast.Name) and node.id in ("time", "num_frames"):
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("time", "num_frames"):
            return True
        if isinstance(node, ast.Subscript | ast.Call):
            text = ast.unparse(node)
            if text.endswith((".shape[2]", ".shape[-3]", ".size(2)", ".size(-3)")):
                return True
    return False


@pytest.mark.parametrize("name", CORE)
def test_core_has_no_name_for_images_or_video(name):
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    words = (identifiers_of(tree) | strings_of(tree)) - SAID_IN_THE_CORE
    found = [word for word in words if re.search("image|video|frame", word, re.IGNORECASE)]
    assert not found


@pytest.mark.parametrize("name", CORE)
def test_core_decides_nothing_by_the_length_of_a_clip(name):
    """One time step is data, not a case."""
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    found = {ast.unparse(node) for node in conditions_of(tree) if looks_at_time(node)}
    assert found == DECIDED_BY_TIME.get(name, set())


@pytest.mark.parametrize(
    ("program", "word"),
    [
        ("is_video = 1", "is_video"),
        ("def f(image): ...", "image"),
        ("f(num_frames=1)", "num_frames"),
        ("a.frames", "frames"),
        ("from b import VideoClips", "VideoClips"),
        ("import a as image", "image"),
        ("class Frames: ...", "Frames"),
    ],
)
def test_a_name_is_found_wherever_it_stands(program, word):
    assert word in identifiers_of(ast.parse(program))


def test_strings_are_found_and_docstrings_left_out():
    tree = ast.parse("""def f():\n    'a video'\n    return {'b': f'{c} of d', 'e': 'f'}""")
    assert strings_of(tree) == {"b", " of d", "e", "f"}


@pytest.mark.parametrize(
    "program",
    [
        "if grid.time > 1: ...",
        "a = b if time else c",
        "x = [a for a in b if a.num_frames]",
        "if clips.shape[2] == 1: ...",
        "assert clips.size(2) > 1",
        "second = min(1, clips.shape[2] - 1)",
        "while not grid.time: ...",
        "x = grid.time and y",
    ],
)
def test_a_decision_by_time_is_found_whatever_it_looks_like(program):
    assert any(map(looks_at_time, conditions_of(ast.parse(program))))


@pytest.mark.parametrize(
    "program",
    ["x = reduce(y, t=grid.time)", "x.repeat(1, grid.time)", "if clips.shape[1] > 3: ...", "a > b"],
)
def test_using_time_is_no_decision(program):
    assert not any(map(looks_at_time, conditions_of(ast.parse(program))))


@pytest.mark.slow
def test_importing_the_package_imports_no_optional_library():
    code = (
        "import sys, hpm_video.runs.pretraining; "
        "print([n for n in ('decord', 'deepspeed', 'transformers', 'timm', 'torchvision', "
        "'sklearn') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr
