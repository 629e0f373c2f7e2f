from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from amips_plugins.adapters.cell_groups import OVERFLOW, group_by_cells, merge_hits
from amips_plugins.collection import Hit


@given(
    arrays(
        np.int64,
        st.tuples(st.integers(1, 30), st.integers(1, 4)),
        elements=st.integers(-1, 7),
    )
)
def test_every_query_searches_its_cells_and_the_overflow_once(cells: np.ndarray) -> None:
    calls = group_by_cells(cells)
    for row, chosen in enumerate(cells.tolist()):
        searched = [cell for group, rows in calls for cell in group if row in rows]
        assert sorted(searched) == sorted({OVERFLOW, *chosen})
    sets = {tuple(sorted({*chosen} - {OVERFLOW})) for chosen in cells.tolist()}
    assert len(calls) == min(len(sets), 1 + len({*cells.ravel().tolist()} - {OVERFLOW}))


def test_few_calls_for_a_large_batch() -> None:
    cells = np.random.default_rng(0).integers(0, 8, (500, 3))
    assert len(group_by_cells(cells)) == 9


def test_merging_keeps_the_best_of_every_id() -> None:
    some = [Hit("a", 0.9), Hit("b", 0.5)]
    more = [Hit("c", 0.7), Hit("a", 0.6), Hit("d", 0.1)]
    merged = merge_hits([some, more], 3, larger_is_better=True)
    assert [(hit.id, hit.score) for hit in merged] == [("a", 0.9), ("c", 0.7), ("b", 0.5)]
    nearest = merge_hits([some[::-1], more[::-1]], 3, larger_is_better=False)
    assert [hit.id for hit in nearest] == ["d", "b", "a"]
