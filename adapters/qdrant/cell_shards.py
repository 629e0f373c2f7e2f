"""Cells in custom shard keys of their own, a graph in each: which cells share one, what is asked.

A layout has a shard key for every cell or, where cells outnumber the shards that a server bears,
for every group of neighbouring cells, and one more for the overflow. Other shard keys are somebody
else's: what lies there is overflow too, which every search asks and nobody moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["MOST_SHARDS", "CellShards", "ShardKey", "group_cells", "notes_on_sharing"]

ShardKey = int | str

MOST_SHARDS = 64
"""Shard keys for cells at most: each is a collection of its own to the server, with its files."""


def group_cells(
    n_cells: int, sizes: Sequence[int], centroids: FloatArray | None, most: int = MOST_SHARDS
) -> tuple[int, ...]:
    """Return the number of the shard of every cell.

    Neighbouring cells are searched together, so they share a shard where cells outnumber these:
    cells are halved along the direction in which their centroids spread most, by the keys in them.
    """
    weights = np.asarray(sizes, dtype=np.float32) + np.float32(1.0)
    if len(weights) != n_cells:
        weights = np.ones(n_cells, dtype=np.float32)
    if n_cells <= most:
        return tuple(range(n_cells))
    places = None if centroids is None or len(centroids) != n_cells else centroids
    found = np.empty(n_cells, dtype=np.int64)
    for number, cells in enumerate(_halved(np.arange(n_cells), most, weights, places)):
        found[cells] = number
    return tuple(found.tolist())


def notes_on_sharing(n_cells: int, shards: int, *, graphs: bool) -> tuple[str, ...]:
    """Say what the targets of a bundle do not count, where cells share graphs."""
    if not graphs or not 0 < shards < n_cells:
        return ()
    return (
        f"{n_cells} cells share {shards} graphs, while the bundle's targets count what a graph in "
        f"every cell misses: train with {shards} cells at most, or see what is found with "
        "`amips evaluate`",
    )


def _halved(
    cells: IntArray, parts: int, weights: FloatArray, places: FloatArray | None
) -> list[IntArray]:
    if parts == 1:
        return [cells]
    left = parts // 2
    order = cells
    if places is not None:
        seen = places[cells] - places[cells].mean(axis=0)
        _, _, axes = np.linalg.svd(seen, full_matrices=False)
        order = cells[np.argsort(seen @ axes[0], kind="stable")]
    filled = np.cumsum(weights[order], dtype=np.float64)
    cut = int(np.searchsorted(filled, filled[-1] * left / parts)) + 1
    cut = min(max(cut, left), len(order) - (parts - left))  # no part stays without a cell
    return [
        *_halved(order[:cut], left, weights, places),
        *_halved(order[cut:], parts - left, weights, places),
    ]


@dataclass(frozen=True, slots=True)
class CellShards:
    """A layout in shard keys, and the shard keys that there are in the database."""

    record: LayoutRecord
    there: tuple[ShardKey, ...]

    @property
    def others(self) -> list[ShardKey]:
        """Those that are no cells', the overflow's first: every search asks them."""
        ours = {*self.record.shard_keys}
        found = [key for key in self.there if key not in ours]
        return sorted(found, key=lambda key: (key != self.record.overflow_shard, str(key)))

    def asked(self, cells: Iterable[int]) -> list[ShardKey]:
        """Return the shard keys that hold these cells and the overflow."""
        here = {*self.there}
        chosen = {self.record.home(cell) for cell in cells if cell >= 0}
        return [*sorted(chosen & here), *self.others]

    @property
    def ours(self) -> list[ShardKey]:
        """Those of the layout that there are."""
        strange = {*self.strange}
        return [key for key in self.there if key not in strange]

    @property
    def missing(self) -> list[ShardKey]:
        """Shard keys of the layout that somebody has dropped, with all that was in them."""
        here = {*self.there}
        ours = (*self.record.shard_keys, self.record.overflow_shard)
        return [key for key in ours if key not in here]

    @property
    def strange(self) -> list[ShardKey]:
        """Shard keys that are none of the layout's."""
        return [key for key in self.others if key != self.record.overflow_shard]

    def notes(self) -> tuple[str, ...]:
        """Say in sentences what is not as the layout left it."""
        found = []
        if self.missing:
            named = ", ".join(map(str, self.missing[:10]))
            found.append(
                f"{len(self.missing)} shard keys of the layout are gone, with the keys that were "
                f"in them ({named}); backfill makes them again, empty."
            )
        if self.strange:
            named = ", ".join(map(str, self.strange[:10]))
            found.append(
                f"{len(self.strange)} shard keys are none of the layout's ({named}): every "
                "search asks them, and backfill leaves them alone."
            )
        return tuple(found)
