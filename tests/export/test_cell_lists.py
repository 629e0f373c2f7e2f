"""Lists of codes in every cell find what a scan of the cell finds, but for what is counted."""

from __future__ import annotations

import numpy as np
import pytest

from amips_plugins.export.cell_graphs import joint_curves
from amips_plugins.export.cell_lists import CellLists
from amips_plugins.export.cost_curves import curve, levels_by_rank
from amips_plugins.tuning import list_efforts, lists_in_cells
from amips_plugins.vectors import normalise
from tests.support.training_data import gaussian

N_CELLS, N, DIM = 5, 2_000, 8

keys = normalise(gaussian(N, DIM))
queries = normalise(gaussian(30, DIM, 1))
hits = np.argsort(-(queries @ keys.T), axis=1)[:, :10]
members = np.random.default_rng(0).integers(N_CELLS, size=(N, 1))
levels = levels_by_rank(gaussian(30, N_CELLS, 2))


def test_all_lists_find_what_a_scan_finds_and_few_of_them_less() -> None:
    cells = CellLists(keys, members, N_CELLS)
    assert cells.lists == lists_in_cells(N / N_CELLS) == 20
    efforts = list_efforts(cells.lists)
    finds = cells.search(queries, hits, np.ones((30, N_CELLS), dtype=bool), efforts)
    curves = joint_curves(finds, levels, N_CELLS, members[hits], 0.0, N)
    sizes = np.bincount(members[:, 0], minlength=N_CELLS)
    scanned = curve(levels, N_CELLS, members[hits], sizes, 0.0, n_keys=N)
    # A byte for each coordinate ranks next to none of ten keys behind fifteen others.
    assert (curves[-1].found == scanned.found).mean() > 0.99
    recalls = [float(one.mean_recall(10)[-1]) for one in curves]
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.9 < recalls[-1]
    costs = [float(one.scanned[0, -1]) for one in curves]
    assert costs == sorted(costs)
    # Every key of every cell, and the centroids of the lists: 2,000 / 5 / 39 of them in a cell.
    assert costs[-1] * N == pytest.approx(N + finds.distances[0, 0].size * 10, rel=0.02)


def test_a_key_that_codes_rank_behind_all_candidates_is_lost() -> None:
    rng = np.random.default_rng(0)
    near = np.ones((400, 4)) + 1e-4 * rng.standard_normal((400, 4))  # closer than codes can tell
    far = 10 * rng.standard_normal((100, 4))  # which stretch the codes
    some = np.concatenate([near, far]).astype(np.float32)
    asked = np.ones((1, 4), dtype=np.float32)
    top = np.argsort(-(near @ asked[0]))[None, :10]
    cells = CellLists(some, np.zeros((500, 1), dtype=np.int64), 1)
    finds = cells.search(asked, top, np.ones((1, 1), dtype=bool), [cells.lists])
    assert finds.found.mean() < 1.0


def test_cells_that_are_not_visited_find_and_cost_nothing() -> None:
    cells = CellLists(keys, members, N_CELLS)
    visited = levels < 2
    finds = cells.search(queries, hits, visited, [4])
    assert (finds.distances[0][~visited] == 0).all()
    assert (finds.distances[0][visited] > 0).all()
