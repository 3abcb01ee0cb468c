# ruff: noqa: NPY002 - numpy's global generator is looked at

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.randomness import global_generators


def numbers() -> tuple[float, float, float]:
    """The next draw of each global generator: Python's, numpy's and torch's."""
    return random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()


def numbers_inside(key: int) -> tuple[float, float, float]:
    with global_generators(key):
        return numbers()


@given(key=st.integers(-(2**63), 2**64))
def test_draws_depend_on_the_key_alone(key):
    assert numbers_inside(key) == numbers_inside(key)


def test_another_key_draws_otherwise():
    drawn = [numbers_inside(key) for key in (*range(-100, 100), 2**32, 2**63 - 1, -(2**63))]
    for of_one_library in zip(*drawn, strict=True):
        assert len(set(of_one_library)) == len(drawn)


def test_the_libraries_do_not_draw_the_same():
    with global_generators(7):
        python = [random.random() for _ in range(100)]
        numpy = np.random.rand(100)
        pytorch = torch.rand(100, dtype=torch.float64).numpy()
    assert np.abs(np.corrcoef([python, numpy, pytorch])[np.triu_indices(3, 1)]).max() < 0.35


def draw_within_another_key(fails: bool) -> None:
    with suppress(ArithmeticError), global_generators(3):
        numbers()
        random.gauss(0, 1)
        np.random.randn()
        if fails:
            raise ArithmeticError


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_they_go_on_as_if_nothing_had_been_drawn(fails):
    random.gauss(0, 1)  # one of a pair of values; the other one waits
    np.random.randn()
    torch.randn(())
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = numbers(), random.gauss(0, 1), np.random.randn()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    draw_within_another_key(fails)
    assert (numbers(), random.gauss(0, 1), np.random.randn()) == expected


def test_they_nest():
    with global_generators(1):
        first, second = numbers(), numbers()
    with global_generators(1):
        assert numbers() == first
        assert numbers_inside(2) not in (first, second)
        assert numbers() == second


def test_an_error_goes_through():
    with pytest.raises(ArithmeticError), global_generators(3):
        raise ArithmeticError
