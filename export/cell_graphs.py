"""What a graph in every cell finds, and what that costs, counted in distances (HNSW of faiss)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.keys import Keys
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import BoolArray, FloatArray, IntArray

__all__ = ["CellGraphs", "Finds", "joint_curves"]

_ASKED = 100  # answers of one graph, at most


@dataclass(frozen=True)
class Finds:
    """What searches of single cells found.

    Attributes
    ----------
    found
        ``(n_efforts, n_queries, depth, width)`` bool: whether a query's true top key is found in
        each of its cells.
    distances
        ``(n_efforts, n_queries, n_cells)`` float32: distances computed; 0 for cells not visited.
    """

    found: BoolArray
    distances: npt.NDArray[np.float32]


class CellGraphs:
    """An HNSW graph over the keys of every cell.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32 of unit length, compared by inner product.
    members
        ``(n, width)`` int64: all cells of every key, the first again in unused places.
    n_cells
        Number of cells.
    links, build_effort
        HNSW's M and efConstruction.
    progress
        Watches the building.
    """

    def __init__(
        self,
        keys: Keys,
        members: IntArray,
        n_cells: int,
        *,
        links: int = 16,
        build_effort: int = 200,
        progress: Progress = no_progress,
    ) -> None:
        self._rows: list[IntArray] = []
        self._graphs: list[Any] = []
        self._members = members
        with progress("graphs", n_cells, 0, "cells") as step:
            for cell in range(n_cells):
                rows = np.flatnonzero((members == cell).any(axis=1))
                graph = faiss.IndexHNSWFlat(keys.shape[1], links, faiss.METRIC_INNER_PRODUCT)
                graph.hnsw.efConstruction = build_effort
                graph.add(np.ascontiguousarray(keys[rows], dtype=np.float32))
                self._rows.append(rows)
                self._graphs.append(graph)
                step.advance()

    def search(
        self,
        queries: FloatArray,
        hits: IntArray,
        visited: BoolArray,
        efforts: Sequence[int],
        progress: Progress = no_progress,
    ) -> Finds:
        """Search every query's cells with every effort (ef).

        Parameters
        ----------
        queries
            ``(n_queries, dim)`` float32.
        hits
            ``(n_queries, depth)`` int64: their true top keys.
        visited
            ``(n_queries, n_cells)`` bool.
        efforts
            Values of ef.
        progress
            Watches the work.
        """
        hit_cells = self._members[hits]
        found = np.zeros((len(efforts), *hit_cells.shape), dtype=np.bool_)
        distances = np.zeros((len(efforts), *visited.shape), dtype=np.float32)
        with progress("search graphs", visited.shape[1], 0, "cells") as step:
            for cell in range(visited.shape[1]):
                asking = np.flatnonzero(visited[:, cell])
                for place, effort in enumerate(efforts):
                    answers, cost = self._answers(cell, queries[asking], effort)
                    distances[place, asking, cell] = cost
                    there = (hits[asking][:, :, None] == answers[:, None, :]).any(axis=2)
                    here = hit_cells[asking] == cell
                    found[place, asking] |= here & there[:, :, None]
                step.advance()
        return Finds(found, distances)

    def _answers(self, cell: int, queries: FloatArray, effort: int) -> tuple[IntArray, IntArray]:
        """Return the rows that each query gets from a cell, and the distances that it took."""
        counters: Any = faiss.cvar  # which faiss types as nothing
        graph, stats = self._graphs[cell], counters.hnsw_stats
        asked = min(effort, _ASKED, graph.ntotal)
        answers = np.full((len(queries), asked), -1, dtype=np.int64)
        cost = np.zeros(len(queries), dtype=np.int64)
        graph.hnsw.efSearch = effort
        for row in range(len(queries)):  # one by one, for the counter knows no queries
            stats.reset()
            answers[row] = graph.search(queries[row : row + 1], asked)[1]
            cost[row] = stats.ndis
        return np.append(self._rows[cell], -1)[answers], cost


def joint_curves(
    finds: Finds,
    levels: IntArray,
    n_levels: int,
    hit_cells: IntArray,
    model_keys: float,
    n_keys: int,
    as_good: IntArray | None = None,
) -> list[Curve]:
    """Measure a router over cells that hold graphs, with each effort.

    Parameters
    ----------
    finds
        Searches of the cells.
    levels
        ``(n_queries, n_cells)`` int64: the level that first searches a cell; ``n_levels`` for
        never.
    n_levels
        Number of levels.
    hit_cells
        ``(n_queries, depth, width)`` int64: all cells of the true top keys.
    model_keys
        What choosing the cells costs, in distances.
    n_keys
        Number of keys; distances are told as a share of it.
    as_good
        As in ``Curve``.
    """
    width = n_levels + 1
    places = (levels + np.arange(len(levels))[:, None] * width).ravel()
    visits = np.bincount(levels.ravel(), minlength=width)[:n_levels]
    flat = np.take_along_axis(levels, hit_cells.reshape(len(levels), -1), axis=1)
    reached = flat.reshape(hit_cells.shape)
    curves = []
    for found, distances in zip(finds.found, finds.distances, strict=True):
        cost = np.bincount(places, distances.ravel(), len(levels) * width).reshape(-1, width)
        curves.append(
            Curve(
                found=np.where(found, reached, n_levels).min(axis=2),
                scanned=(cost[:, :n_levels].cumsum(axis=1) / n_keys).astype(np.float32),
                probes=visits.cumsum() / len(levels),
                model=model_keys / n_keys,
                as_good=as_good,
            )
        )
    return curves
