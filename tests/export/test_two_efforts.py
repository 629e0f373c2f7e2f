from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amips_plugins.export.cell_graphs import CellGraphs, Finds
from amips_plugins.export.cost_curves import levels_by_threshold
from amips_plugins.export.dataset import Split
from amips_plugins.export.efforts import EffortLevels
from amips_plugins.export.two_efforts import (
    Graded,
    TwoEfforts,
    cheapest_pair,
    choose_two_efforts,
)
from amips_plugins.progress import no_progress
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


def test_no_level_searches_any_cell_less_far_than_one_before(graded: Graded) -> None:
    until, near, far = choose_two_efforts(graded, EFFORTS, 3)
    for values in (until, near, far):
        assert len(values) == CELLS
        assert (np.diff(values) >= 0).all()
    assert (far <= near).all()


def test_what_a_level_finds_it_finds_at_all_later_ones() -> None:
    """Against a search that goes through all levels, hit by hit."""
    rng = np.random.default_rng(3)
    keys = normalise(rng.standard_normal((400, 8)).astype(np.float32))
    queries = normalise(rng.standard_normal((30, 8)).astype(np.float32))
    hits = np.argsort(-queries @ keys.T, axis=1)[:, :5]
    first = rng.integers(CELLS, size=400)
    members = np.stack([first, np.where(rng.random(400) < 0.3, (first + 1) % CELLS, first)], axis=1)
    thresholds = np.array([1.0, 0.5, 0.0, -0.5, -np.inf], dtype=np.float32)
    priorities = rng.standard_normal((30, CELLS)).astype(np.float32)
    near, efforts = np.array([0, 0, 1, 1, 4]), np.array([16, 16, 24, 48, 192])
    far = np.array([1, 2, 2, 8, 192])
    split = Split(queries, queries, hits)
    indexes = CellGraphs(keys, members, CELLS, links=2, build_effort=8)
    task: Any = SimpleNamespace(progress=no_progress)
    cells: Any = SimpleNamespace(sizes=np.ones(CELLS, dtype=np.int64), n_cells=CELLS)
    candidate: Any = SimpleNamespace(
        priority=lambda _: priorities, assignment=members, cells=cells, parameters=8.0
    )
    two = EffortLevels(thresholds, efforts, indexes, candidate, near, far)
    measured = two.measure(split, task)
    levels = levels_by_threshold(priorities, thresholds)
    grid = np.union1d(np.union1d(efforts, far), np.array([16, 24, 32, 48, 64, 100])).tolist()
    finds = indexes.search(queries, hits, levels < 4, grid)
    differing = 0
    for query in range(30):
        for rank in range(5):
            found_at = []
            for level in range(4):
                found = False
                for place, cell in enumerate(members[hits[query, rank]]):
                    reached = levels[query, cell]
                    effort = efforts[level] if reached <= near[level] else far[level]
                    at = next(i for i, one in enumerate(grid) if one >= max(effort, rank + 1))
                    found |= reached <= level and bool(finds.found[at, query, rank, place])
                found_at.append(found)
            # From which level on it is always found; a copy's misses count by themselves.
            always = next((lv for lv in range(5) if all(found_at[lv:])), 4)
            assert measured.found[query, rank] >= always
            differing += measured.found[query, rank] != always
    assert differing <= 3  # where two copies take turns


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


def test_where_visits_are_dear_fewer_graphs_are_searched_farther() -> None:
    """The second key lies in both cells, and in the first only the larger effort finds it."""
    found = np.zeros((2, 1, 2, 2), dtype=np.bool_)
    found[:, 0, 0, 0] = found[:, 0, 1, 1] = found[1, 0, 1, 0] = True
    distances = np.array([[[10, 10]], [[30, 30]]], dtype=np.float32)
    levels, hit_cells = np.array([[0, 1]]), np.array([[[0, 0], [0, 1]]])
    graded = Graded(Finds(found, distances), levels, 2, hit_cells, 0.0, 1)
    assert [one.cost(2, 1.0) for one in graded.single()] == [20.0, 30.0]
    assert [one.cost(2, 1.0) for one in graded.priced(20.0).single()] == [60.0, 50.0]
    assert graded.priced(20.0).curve(TwoEfforts(near=1, far=0, until=0)).cost(2, 1.0) == 50.0
