"""Random draws that depend on a key and on nothing else.

A draw is a hash of (seed, epoch, sample, repeat, purpose), never the next number of a generator
that others also use. So a sample looks the same whatever the number of workers, processes or
interruptions before it.
"""

import hashlib
import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def key_of(*parts: Hashable) -> int:
    """A signed 64-bit key of whatever identifies a draw: integers and strings."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def generator(*parts: Hashable) -> np.random.Generator:
    """A generator of its own for the draws that ``parts`` identify."""
    return np.random.Generator(np.random.Philox(key=key_of(*parts) % 2**64))


@contextmanager
def global_generators(key: int) -> Iterator[None]:
    """Inside, the global generators of Python, numpy and torch (CPU) depend on ``key`` alone.

    For libraries that draw from them. Afterwards all three go on as if nothing had been drawn.
    The generators are those of the process, so no other thread may draw meanwhile.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # A seed for each: Python's and numpy's are the same algorithm and would draw the same.
    random.seed(key_of("python", key))
    np.random.seed(key_of("numpy", key) % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(key_of("torch", key))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def uniform(keys: Tensor, count: int, purpose: str) -> Tensor:
    """Draws in [0, 1), computed where ``keys`` are: (B,) int64 -> (B, count) float32

    The generator is SplitMix64 (Steele, Lea and Flood, 2014), of which the upper 24 bits are
    kept, as many as a float32 holds exactly.
    """
    counter = torch.arange(1, count + 1, device=keys.device)
    state = (keys ^ key_of(purpose)).unsqueeze(1) + counter * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    shifted: Tensor = (value >> bits) & (2 ** (64 - bits) - 1)
    return shifted
