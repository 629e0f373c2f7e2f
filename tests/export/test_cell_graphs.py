from __future__ import annotations

import numpy as np
import pytest

from amips_plugins.export.cell_graphs import CellGraphs, joint_curves
from amips_plugins.export.cost_curves import curve, levels_by_rank
from amips_plugins.vectors import normalise
from tests.support.training_data import gaussian

N_CELLS, N, DIM = 5, 400, 8

keys = normalise(gaussian(N, DIM))
queries = normalise(gaussian(30, DIM, 1))
hits = np.argsort(-(queries @ keys.T), axis=1)[:, :10]
rng = np.random.default_rng(0)
first = rng.integers(N_CELLS, size=N)
second = np.where(rng.random(N) < 0.3, (first + 1) % N_CELLS, first)
members = np.stack([first, second], axis=1)
levels = levels_by_rank(gaussian(30, N_CELLS, 2))


def test_graphs_that_are_searched_whole_find_what_lies_in_their_cells() -> None:
    graphs = CellGraphs(keys, members, N_CELLS, links=32)
    finds = graphs.search(queries, hits, np.ones((30, N_CELLS), dtype=bool), [4, N])
    few, whole = joint_curves(finds, levels, N_CELLS, members[hits], 5.0, N)
    sizes = np.array([(members == cell).any(axis=1).sum() for cell in range(N_CELLS)])
    exact = curve(levels, N_CELLS, members[hits], sizes, 5.0, n_keys=N)
    assert (whole.found == exact.found).all()
    assert (few.found >= exact.found).all()
    assert few.mean_recall(10)[-1] < 1.0
    assert (few.scanned < whole.scanned).all()
    assert few.scanned[0, -1] * N == pytest.approx(finds.distances[0, 0].sum())
    assert few.probes.tolist() == [1, 2, 3, 4, 5]
    assert whole.model == 5.0 / N


def test_cells_that_are_not_visited_find_and_cost_nothing() -> None:
    graphs = CellGraphs(keys, members, N_CELLS)
    visited = levels < 2
    finds = graphs.search(queries, hits, visited, [50])
    assert (finds.distances[0][~visited] == 0).all()
    assert (finds.distances[0][visited] > 0).all()
    (measured,) = joint_curves(finds, np.minimum(levels, 2), 2, members[hits], 0.0, N)
    assert measured.n_levels == 2
    assert 0.0 < measured.mean_recall(10)[1] < 1.0
