"""Types, as a test, so that they are checked beside the others."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.types
def test_types_are_right():
    command = [sys.executable, "-m", "mypy"]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
