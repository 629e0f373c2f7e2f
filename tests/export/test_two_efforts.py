from __future__ import annotations

import numpy as np
import pytest

from amips_plugins.export.cell_graphs import CellGraphs
from amips_plugins.export.two_efforts import Graded, TwoEfforts, cheapest_pair
from amips_plugins.vectors import IntArray, normalise

N, DIM, CELLS, EFFORTS = 1_200, 16, 6, (4, 8, 16, 48)


@pytest.fixture(scope="module")
def graded() -> Graded:
    rng = np.random.default_rng(0)
    keys = normalise(rng.standard_normal((N, DIM)).astype(np.float32))
    queries = normalise(rng.standard_normal((80, DIM)).astype(np.float32))
    centroids = keys[:CELLS]
    nearness = keys @ centroids.T
    members: IntArray = np.argsort(-nearness, axis=1)[:, :2]
    members[rng.random(N) < 0.7, 1] = -1
    members = np.where(members < 0, members[:, :1], members)
    hits = np.argsort(-queries @ keys.T, axis=1)[:, :10]
    order = np.argsort(-queries @ centroids.T, axis=1)
    levels = np.empty_like(order)
    np.put_along_axis(levels, order, np.arange(CELLS)[None, :], axis=1)
    graphs = CellGraphs(keys, members, CELLS)
    finds = graphs.search(queries, hits, np.ones((80, CELLS), dtype=np.bool_), EFFORTS)
    return Graded(finds, levels, CELLS, members[hits], 6.0, N)


def test_two_efforts_are_counted_query_by_query(graded: Graded) -> None:
    pair = TwoEfforts(near=3, far=1, until=1)
    curve = graded.curve(pair)
    for level in range(CELLS):
        found, cost = 0, 0.0
        for query, levels in enumerate(graded.levels):
            for cell in np.flatnonzero(levels <= level):
                effort = pair.near if levels[cell] <= pair.until else pair.far
                cost += float(graded.finds.distances[effort, query, cell])
            for rank, cells in enumerate(graded.hit_cells[query]):
                found += any(
                    levels[cell] <= level
                    and graded.finds.found[
                        pair.near if levels[cell] <= pair.until else pair.far, query, rank, place
                    ]
                    for place, cell in enumerate(cells)
                )
        assert curve.mean_recall(10)[level] == pytest.approx(found / (10 * len(graded.levels)))
        assert curve.scanned[:, level].mean() * N == pytest.approx(
            cost / len(graded.levels), rel=1e-4
        )


def test_the_cheapest_pair_is_cheaper_than_what_was_not_chosen(graded: Graded) -> None:
    wanted = [(5, 0.8), (10, 0.9), (10, 1.1)]
    pairs = cheapest_pair(graded, EFFORTS, wanted)
    assert pairs[2] is None
    for (k, recall), pair in zip(wanted[:2], pairs[:2], strict=True):
        assert pair is not None
        assert k <= EFFORTS[pair.far] < EFFORTS[pair.near]
        cost = graded.curve(pair).cost(k, recall)
        for far, near in ((1, 2), (2, 3), (1, 3)):
            if EFFORTS[far] >= k:
                for until in range(CELLS):
                    assert cost <= graded.curve(TwoEfforts(near, far, until)).cost(k, recall)
