from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from amips_plugins.export.balance import capped_offsets
from amips_plugins.export.clustering import query_aware_cells
from amips_plugins.export.views import QueryAware
from amips_plugins.export.votes import members_by_votes
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise

N, DIM, CELLS = 3_000, 8, 10


def crowded() -> tuple[FloatArray, FloatArray, IntArray]:
    """Keys of which half lie close together, queries all over them, and their best keys."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((N, DIM))
    keys[: N // 2] = keys[0] + 0.2 * keys[: N // 2]
    unit = normalise(keys.astype(np.float32))
    queries = normalise(rng.standard_normal((400, DIM)).astype(np.float32))
    return unit, queries, np.argsort(-queries @ unit.T, axis=1)[:, :10]


def cut(max_cell: float | None) -> tuple[IntArray, IntArray]:
    keys, queries, hits = crowded()
    recipe = QueryAware(max_cell=max_cell)
    cells, assignment = query_aware_cells(keys, Metric.COSINE, CELLS, 0, queries, hits, recipe)
    return cells.sizes, assignment


def test_no_cell_is_larger_than_allowed() -> None:
    mean = N / CELLS
    assert cut(None)[0].max() > 1.3 * mean
    for allowed in (1.3, 1.1):
        sizes, assignment = cut(allowed)
        assert sizes.max() <= allowed * mean
        assert sizes.sum() == len(assignment) == N
        assert len(sizes) == CELLS


def test_a_cap_that_nothing_reaches_changes_nothing() -> None:
    np.testing.assert_array_equal(cut(9.0)[1], cut(None)[1])


def test_copies_count() -> None:
    _, assignment = cut(1.2)
    hits = crowded()[2]
    members = members_by_votes(assignment, hits, CELLS, 0.3, max_cell=1.05)
    copied = sum(int((column != members[:, 0]).sum()) for column in members.T)
    assert copied > 0.05 * N
    sizes = np.array([(members == cell).any(axis=1).sum() for cell in range(CELLS)])
    assert sizes.max() <= 1.05 * 1.3 * N / CELLS
    free = members_by_votes(assignment, hits, CELLS, 0.3)
    assert max((free == cell).any(axis=1).sum() for cell in range(CELLS)) > sizes.max()


def chooser(points: FloatArray) -> Callable[[FloatArray], tuple[IntArray, FloatArray]]:
    def choose(offsets: FloatArray) -> tuple[IntArray, FloatArray]:
        nearness = points + offsets
        two = np.sort(nearness, axis=1)[:, -2:]
        return nearness.argmax(axis=1), two[:, 1] - two[:, 0]

    return choose


def test_where_nothing_parts_equal_keys_the_best_that_was_tried_is_taken() -> None:
    points = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (20, 1))
    found = capped_offsets(chooser(points), np.zeros(2, dtype=np.float32), 12)
    assert np.bincount(chooser(points)(found)[0]).max() == 20


@pytest.mark.parametrize("most", [100, 60, 50])
def test_offsets_only_fall(most: int) -> None:
    points = np.random.default_rng(1).standard_normal((200, 4)).astype(np.float32)
    start = np.array([1.8, 0.0, 0.1, 0.0], dtype=np.float32)
    found = capped_offsets(chooser(points), start, most)
    assert (found <= start).all()
    assert np.bincount(chooser(points)(found)[0]).max() <= most


def test_small_cells_keep_to_it_too() -> None:
    """The key at the border is as near to the other cell then, and may stay where it is."""
    for seed in range(10):
        points = np.random.default_rng(seed).standard_normal((200, 8)).astype(np.float32)
        points[:, 0] += 1.0
        found = capped_offsets(chooser(points), np.zeros(8, dtype=np.float32), 30)
        assert np.bincount(chooser(points)(found)[0]).max() <= 30
