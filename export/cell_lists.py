"""What an IVF index of codes in every cell finds, and what that costs (IVF_SQ8 of faiss).

Every coordinate is a byte. Candidates are compared by their codes and the best of them scored by
their vectors, so two things lose keys: lists that are not searched, and codes that rank a key
behind all candidates there are. Both are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from amips_plugins.export.cell_graphs import Finds
from amips_plugins.export.keys import Keys
from amips_plugins.progress import Progress, no_progress
from amips_plugins.tuning import CODE_CANDIDATES, lists_in_cells
from amips_plugins.vectors import BoolArray, FloatArray, IntArray

__all__ = ["CellLists"]

_ROWS_PER_LIST = 39  # an engine makes fewer lists where they would be shorter
_TRAINED_ON = 64  # keys of a list, at most


class CellLists:
    """An IVF index of codes over the keys of every cell.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32 of unit length, compared by inner product.
    members
        ``(n, 1)`` int64: the cell of every key.
    n_cells
        Number of cells.
    progress
        Watches the building.

    Attributes
    ----------
    lists
        Lists of a cell, the same number for all, as an engine is told it.
    """

    def __init__(
        self, keys: Keys, members: IntArray, n_cells: int, *, progress: Progress = no_progress
    ) -> None:
        self.lists = lists_in_cells(len(members) / n_cells)
        self._rows: list[IntArray] = []
        self._indexes: list[Any] = []
        self._members, dim = members, keys.shape[1]
        with progress("lists", n_cells, 0, "cells") as step:
            for cell in range(n_cells):
                rows = np.flatnonzero((members == cell).any(axis=1))
                here = np.ascontiguousarray(keys[rows], dtype=np.float32)
                self._rows.append(rows)
                self._indexes.append(_index(here, dim, self.lists) if len(rows) else None)
                step.advance()

    def search(
        self,
        queries: FloatArray,
        hits: IntArray,
        visited: BoolArray,
        efforts: Sequence[int],
        progress: Progress = no_progress,
    ) -> Finds:
        """Search every query's cells with every effort (nprobe, rising; see ``CellGraphs``)."""
        hit_cells = self._members[hits]
        depth, ranks = hits.shape[1], np.arange(1, hits.shape[1] + 1)
        kept = math.ceil(CODE_CANDIDATES["IVF_SQ8"] * depth)
        found = np.zeros((len(efforts), *hit_cells.shape), dtype=np.bool_)
        distances = np.zeros((len(efforts), *visited.shape), dtype=np.float32)
        scores = np.full((*visited.shape, kept), -np.inf, dtype=np.float32)
        own = np.full(hits.shape, -np.inf, dtype=np.float32)
        with progress("search lists", visited.shape[1], 0, "cells") as step:
            for cell in range(visited.shape[1]):
                asking = np.flatnonzero(visited[:, cell])
                if len(asking) and self._indexes[cell] is not None:
                    here = hit_cells[asking] == cell
                    for place, effort in enumerate(efforts):
                        rows, near, cost = self._answers(cell, queries[asking], effort, kept)
                        distances[place, asking, cell] = cost
                        same = hits[asking][:, :, None] == rows[:, None, :]
                        found[place, asking] |= here & same.any(axis=2)[:, :, None]
                    # The last effort is the widest: whatever else is found is found there, too.
                    scores[asking, cell, : near.shape[1]] = near
                    mine = np.where(same, near[:, None, :], -np.inf).max(axis=2, initial=-np.inf)
                    own[asking] = np.maximum(own[asking], mine)
                step.advance()
        candidates = np.ceil(CODE_CANDIDATES["IVF_SQ8"] * ranks).astype(np.int64)
        flat = -np.sort(-scores.reshape(len(queries), -1), axis=1)[:, :kept]
        last = flat[:, np.minimum(candidates, flat.shape[1]) - 1]
        found &= (own >= last)[None, :, :, None]
        return Finds(found, distances)

    def _answers(
        self, cell: int, queries: FloatArray, probes: int, kept: int
    ) -> tuple[IntArray, FloatArray, IntArray]:
        """Return the rows that each query gets from a cell, their scores, and the distances."""
        index = self._indexes[cell]
        probes = min(probes, index.nlist)
        _, lists = index.quantizer.search(queries, probes)
        sizes = np.array([index.invlists.list_size(one) for one in range(index.nlist)])
        index.nprobe = probes
        near, places = index.search(queries, min(kept, index.ntotal))
        return np.append(self._rows[cell], -1)[places], near, index.nlist + sizes[lists].sum(axis=1)


def _index(keys: FloatArray, dim: int, lists: int) -> Any:
    n_lists = max(1, min(lists, len(keys) // _ROWS_PER_LIST))
    inner = faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim), dim, n_lists, faiss.ScalarQuantizer.QT_8bit, inner
    )
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _TRAINED_ON
    index.train(keys)
    index.add(keys)
    return index
