"""Keys that are read where they are needed: no step of a training holds all of them.

A step of the training is a function of a *shard*, a range of rows that follow one another, and of
what all shards share; results are merged in the order of the shards. How many shards there are
depends on the keys alone, so that the same keys give the same sums wherever they are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from amips_plugins.vectors import FloatArray, Metric, lift_keys, lifted_dim

__all__ = ["Keys", "LiftedKeys", "MappedKeys", "Shard", "blocks", "shards"]

BLOCK = 16_384  # keys read at once
_SHARD = 32_768  # keys, at least
_MOST_SHARDS = 1_024


class Keys(Protocol):
    """``(n, dim)`` float32 vectors; an array, or what reads some of their rows when asked.

    Keys that are not an array know where they lie, so that another process can read them, too.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Read a slice of rows, or an array of row numbers."""
        ...


@dataclass(frozen=True)
class Shard:
    """Rows ``first`` to ``end``, the latter not among them."""

    first: int
    end: int

    @property
    def rows(self) -> slice:
        """The rows, to take them from an array."""
        return slice(self.first, self.end)

    def __len__(self) -> int:
        return self.end - self.first


def shards(count: int) -> list[Shard]:
    """Cut rows into shards, the same for the same number of rows."""
    size = _SHARD * max(1, -(-count // (_SHARD * _MOST_SHARDS)))
    return [Shard(low, min(low + size, count)) for low in range(0, count, size)]


def blocks(keys: Keys, shard: Shard, size: int | None = None) -> Iterator[tuple[Shard, FloatArray]]:
    """Read a shard block by block: the rows of a block, and its keys."""
    step = BLOCK if size is None else size
    for low in range(shard.first, shard.end, step):
        block = Shard(low, min(low + step, shard.end))
        yield block, np.asarray(keys[block.rows], dtype=np.float32)


@dataclass(frozen=True)
class MappedKeys:
    """Keys in a file of nothing but float32 numbers, row after row."""

    path: Path
    count: int
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.count, self.dim

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Any, /) -> FloatArray:
        """Read rows; the file is mapped for this alone, so that its pages do not stay."""
        mapped = np.memmap(self.path, dtype="<f4", mode="r", shape=(self.count, self.dim))
        return np.array(mapped[rows])


@dataclass(frozen=True)
class LiftedKeys:
    """Keys as the inner-product problem of their metric sees them (``vectors.lift_keys``)."""

    keys: Keys
    metric: Metric
    centre: FloatArray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return len(self.keys), lifted_dim(self.keys.shape[1], self.metric)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Any, /) -> FloatArray:
        """Read rows and lift them."""
        read = np.asarray(self.keys[rows], dtype=np.float32)
        return lift_keys(read, self.metric, self.centre)
