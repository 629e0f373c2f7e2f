"""Keys with structure, so that few cells hold the answers, and queries near them."""

from __future__ import annotations

import numpy as np

from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray

DIM = 8
COUNT = 240
GROUPS = 3


def keys() -> FloatArray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, DIM)) * 2
    return (centres[np.arange(COUNT) % 12] + rng.standard_normal((COUNT, DIM))).astype(np.float32)


def queries(seed: int, count: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    near = keys()[rng.integers(COUNT, size=count)]
    return (near + rng.standard_normal((count, DIM)) * 0.7).astype(np.float32)


class EveryCell:
    """Probes every cell there is, by the filter of a routed search."""

    def __init__(self, layout: str, n_cells: int) -> None:
        self.layout = layout
        self.n_cells = n_cells

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        cells = np.tile(np.arange(self.n_cells), (len(queries), 1))
        return QueryPlan(cells=cells, layout=self.layout)


class OneCell(EveryCell):
    """Probes one cell, which is too few."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(cells=np.zeros((len(queries), 1), np.int64), layout=self.layout)


class Rewrite:
    """Sends a blurred query, and has enough candidates rescored to mend that."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(rewritten=queries + np.float32(0.01), rescore=COUNT)


class Broken:
    """Raises."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        raise RuntimeError("the model is broken")
