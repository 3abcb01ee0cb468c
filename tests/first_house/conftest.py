"""What the first house left: tiny data, stopped runs and the numbers that it computed from them.

A script made it all at commit c18a27b; it is tests/first_house/make_fixtures.py of commit be0a370.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def first_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, gradients or moments of today's models by the first house's names and shapes.

    The one place to change where parameters are renamed, joined, permuted or reshaped; it is also
    given expanded scalars and tensors without data. Today nothing has changed.
    """
    return tensors


@pytest.fixture(name="first_names")
def _first_names():
    return first_names


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """To read only."""
    return FIXTURES


@pytest.fixture
def first_house(tmp_path, monkeypatch) -> Path:
    """The working directory: a copy to go on in. All paths in its configs are relative."""
    shutil.copytree(FIXTURES, tmp_path / "first house", symlinks=True)
    monkeypatch.chdir(tmp_path / "first house")
    threads = torch.get_num_threads()
    yield tmp_path / "first house"
    torch.set_num_threads(threads)
