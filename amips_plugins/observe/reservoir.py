"""A uniform sample of a stream of unknown length, in memory of a fixed size."""

from __future__ import annotations

import math
import random

import numpy as np

from amips_plugins.vectors import FloatArray

__all__ = ["Reservoir"]

_START = 64


class Reservoir:
    """Keeps each row seen with the same probability (K.-H. Li 1994, algorithm L).

    Once it is full, most rows cost a comparison: the algorithm draws how many to skip.

    Parameters
    ----------
    capacity, dim
        Most rows kept, and their length.
    rng
        Where chance comes from.

    Attributes
    ----------
    seen
        Rows added so far.
    """

    def __init__(self, capacity: int, dim: int, rng: random.Random) -> None:
        self.seen = 0
        self._capacity = capacity
        self._rows: FloatArray = np.empty((min(_START, capacity), dim), dtype=np.float32)
        self._rng = rng
        self._weight = 1.0
        self._next = 0  # which row, counted from 0, replaces another; of use once it is full
        self._skip()
        self._next += capacity

    def __len__(self) -> int:
        return min(self.seen, self._capacity)

    def add(self, rows: FloatArray) -> None:
        """Show it rows, of which it copies what it keeps."""
        first, self.seen = self.seen, self.seen + len(rows)
        if first < self._capacity:
            fresh = rows[: self._capacity - first]
            self._grow(first + len(fresh))
            self._rows[first : first + len(fresh)] = fresh
        while self._next < self.seen:
            self._rows[self._rng.randrange(self._capacity)] = rows[self._next - first]
            self._next += 1
            self._skip()

    def rows(self) -> FloatArray:
        """Return a copy of the sample."""
        rows: FloatArray = self._rows[: len(self)].copy()
        return rows

    def _skip(self) -> None:
        """Draw how many rows to pass over before one is kept."""
        self._weight *= math.exp(-self._rng.expovariate(1.0) / self._capacity)
        kept = min(max(self._weight, 1e-300), 1.0 - 2.0**-53)
        self._next += int(-self._rng.expovariate(1.0) / math.log1p(-kept))

    def _grow(self, needed: int) -> None:
        if needed > len(self._rows):
            size = min(self._capacity, max(needed, 2 * len(self._rows)))
            self._rows = np.concatenate(
                [self._rows, np.empty((size - len(self._rows), self._rows.shape[1]), np.float32)]
            )
