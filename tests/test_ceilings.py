"""How large the project may be. Each number is today's: lower it where you made something smaller.

Outside of the tests, and with what supports them: of tests/ only what holds tests is left out.
"""

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHYSICAL_LINES = 23_002
CODE_LINES = 16_249
LINES = {
    ".": 85,
    "datasets": 858,
    "docs": 14,
    "hpm_video": 640,
    "hpm_video/config": 1148,
    "hpm_video/data": 1919,
    "hpm_video/decoding": 1458,
    "hpm_video/files": 564,
    "hpm_video/mining": 1042,
    "hpm_video/models": 866,
    "hpm_video/preparation": 1911,
    "hpm_video/recognition": 1272,
    "hpm_video/runs": 2014,
    "hpm_video/tokens": 449,
    "hpm_video/training": 2622,
    "hpm_video/weights": 1797,
    "hpm_video/workers": 604,
    "tests": 1279,
    "tools": 2460,
}
"""Physical lines of each folder; "." is the scripts at the root."""
MODULES_AT_THE_ROOT = 5
README_LINES = 220
LONGEST_FILE = 400
LONGER_FILES = {}
"""Files that are still longer, and how long they may be."""
LONGEST_FUNCTION = 60
STARRED = {}
"""How often a file still unpacks a tuple or list where it is written: f(*(a, b), c)."""

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
PROGRAMS = {".py", ".sh", ".sbatch", ".ipynb", ".jinja", ".j2", ".tmpl"}


@cache
def programs() -> tuple[Path, ...]:
    """Every program outside of the tests, and what supports the tests."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in ("hpm_video", "tools", "datasets", "configs", "docs", "tests"):
        found += (ROOT / folder).rglob("*")
    return tuple(
        sorted(
            path
            for path in found
            if path.suffix in PROGRAMS and not (is_below(path, "tests") and is_test(path))
        )
    )


def is_below(path: Path, folder: str) -> bool:
    return path.relative_to(ROOT).parts[0] == folder


def is_test(path: Path) -> bool:
    return path.name.startswith("test_")


def folder_of(path: Path) -> str:
    *folders, _ = path.relative_to(ROOT).parts
    return "/".join(folders[: 2 if folders[:1] == ["hpm_video"] else 1]) or "."


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def code_lines_of(path: Path) -> int:
    """Lines without blanks, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return sum(
            bool(line.strip()) and not line.lstrip().startswith("#") for line in text.split("\n")
        )
    return count_code(text)


def count_code(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type not in NOT_CODE
        for line in range(token.start[0], token.end[0] + bool(token.string))
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


def modules() -> list[Path]:
    return [path for path in programs() if path.suffix == ".py"]


def count_starred(tree: ast.AST) -> int:
    """Tuples and lists that are written and unpacked at once."""
    return sum(
        isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List | ast.Set)
        for node in ast.walk(tree)
    )


def test_the_whole_fits():
    assert sum(map(lines_of, programs())) <= PHYSICAL_LINES
    assert sum(map(code_lines_of, programs())) <= CODE_LINES


def test_each_folder_fits():
    lines = dict.fromkeys(map(folder_of, programs()), 0)
    for path in programs():
        lines[folder_of(path)] += lines_of(path)
    assert {name: count for name, count in lines.items() if count > LINES.get(name, 0)} == {}


def test_the_root_of_the_package_is_a_list_of_folders():
    assert len([*(ROOT / "hpm_video").glob("*.py")]) <= MODULES_AT_THE_ROOT


def test_no_file_is_long():
    too_long = {
        name_of(path): lines_of(path)
        for path in programs()
        if lines_of(path) > LONGER_FILES.get(name_of(path), LONGEST_FILE)
    }
    assert too_long == {}


def test_the_readme_is_short():
    assert lines_of(ROOT / "README.md") <= README_LINES


def test_no_function_is_long():
    functions = [
        (name_of(path), node.name, node.end_lineno - node.lineno + 1)
        for path in modules()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [each for each in functions if each[2] > LONGEST_FUNCTION] == []


def test_nothing_is_written_to_be_unpacked():
    found = {
        name_of(path): count_starred(tree_of(path))
        for path in ROOT.glob("*/**/*.py")
        if name_of(path).split("/")[0] in ("hpm_video", "tools", "datasets", "tests")
    }
    assert {name: count for name, count in found.items() if count > STARRED.get(name, 0)} == {}


@pytest.mark.parametrize("listed", [LONGER_FILES, STARRED], ids=["longer files", "starred"])
def test_no_exception_is_of_the_past(listed):
    """A file that was mended, moved or deleted leaves the table."""
    assert [name for name in listed if not (ROOT / name).is_file()] == []
    assert [name for name in LONGER_FILES if lines_of(ROOT / name) <= LONGEST_FILE] == []


def test_code_is_counted_without_blanks_comments_and_docstrings():
    documented = '"""Of a module.\n\nTwo lines."""\n\n# comment\nx = 1  # one\n"""Of x."""\n'
    assert count_code(documented) == 1
    assert count_code('x = f(\n    1,  # one\n)\n\ny = """a\n\nb"""\n') == 6


@pytest.mark.parametrize("text", ["f(*(a, b), c)", "{*('a', 'b')}", "[*[a], b]"])
def test_an_unpacked_tuple_is_found(text):
    assert count_starred(ast.parse(text)) == 1


def test_what_is_unpacked_by_its_name_is_none():
    assert count_starred(ast.parse("f(*a, *b()); [*a, *(x for x in y)]; a, *b = c")) == 0
