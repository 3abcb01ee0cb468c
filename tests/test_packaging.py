"""pyproject.toml and the requirements files agree."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    return {line.replace('"', "'") for line in lines if line and not line.startswith("#")}


def listed(name: str) -> set[str]:
    """Entries of a list in pyproject.toml (tomllib came with Python 3.11)."""
    found = re.search(rf"^{name} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert found is not None
    return set(re.findall(r'"([^"]+)"', re.sub(r"#.*", "", found.group(1))))


def test_requirements_are_those_of_the_package() -> None:
    optional = listed("decord") | listed("deepspeed")
    assert requirements("requirements.txt") == listed("dependencies") | optional
    assert not any(entry.startswith(("decord", "deepspeed")) for entry in listed("dependencies"))


def test_requirements_of_the_tests() -> None:
    assert requirements("tests/requirements.txt") == listed("dev")


def test_the_package_is_installed_whole_and_nothing_else() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("hpm_video/**/*.py")
    }
    configs = {
        f"hpm_video.{path.parent.relative_to(ROOT)}" for path in ROOT.glob("configs/*/*.yaml")
    }
    beside = {"hpm_video.configs", "hpm_video.programs"} | {
        name.replace("/", ".") for name in configs
    }
    assert listed("packages") == found | beside
    assert (ROOT / "hpm_video" / "py.typed").is_file()
