"""Several sources of training clips in one run: which of them each update takes its batch from.

The batches of a run are dealt out by weight, as evenly as can be: each goes to the source that is
furthest behind its share. So a run can go on anywhere, and each source is a stream of its own,
whose samples do not depend on the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Place(NamedTuple):
    """A sample of a run: a position in the endless stream of one source."""

    source: int
    position: int


class Places(Sequence[Place]):
    """The samples of the updates from ``start`` to the last, in order.

    Each of several processes has its own stretch of every batch: together they have the samples of
    one. Nothing is padded: a batch that begins in one pass over the data goes on into the next.
    """

    def __init__(
        self,
        sources: NDArray[np.int64],
        batch_size: int,
        start: int = 0,
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """``sources``: of every update, from :func:`deal_out`; processes share a batch evenly."""
        self._sources, self._batch_size, self._start = sources, batch_size, start
        self._share = batch_size // processes
        self._first = rank * self._share
        self._turn = np.zeros(len(sources), np.int64)  # earlier updates with the same source
        for source in np.unique(sources):
            its_own = sources == source
            self._turn[its_own] = np.arange(its_own.sum())

    def __len__(self) -> int:
        return (len(self._sources) - self._start) * self._share

    def __getitem__(self, index: int) -> Place:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        update, sample = divmod(index, self._share)
        update += self._start
        begin = int(self._turn[update]) * self._batch_size + self._first
        return Place(int(self._sources[update]), begin + sample)


def deal_out(weights: Sequence[float], num_updates: int) -> NDArray[np.int64]:
    """Choose the source of every update by positive weights: -> (num_updates,)

    After n updates a source has had its share of n, within one update for two sources.
    """
    shares = [weight / sum(weights) for weight in weights]
    behind = [0.0] * len(shares)
    sources = np.zeros(num_updates, np.int64)
    for update in range(num_updates if len(shares) > 1 else 0):
        behind = [lag + share for lag, share in zip(behind, shares, strict=True)]
        sources[update] = chosen = behind.index(max(behind))
        behind[chosen] -= 1
    return sources
