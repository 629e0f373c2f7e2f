"""The benchmark of promises, on a tenth of a second of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.live_promises import World, filtered, traffic
from benchmarks.promises import Situation, measure, situations
from tests.support.training_data import clustered_keys, narrow_queries


@pytest.mark.nightly
@pytest.mark.slow
def test_rows_say_who_answered_and_what_it_cost(tmp_path: Path) -> None:
    keys, queries = clustered_keys(600, 8), narrow_queries(500, 8)
    rows = measure(Situation("few", keys, queries[:300], queries[300:], (1, 10)), 8, tmp_path)
    assert [(row.k, row.target) for row in rows] == [
        (k, target) for k in (1, 10) for target in (0.90, 0.93, 0.95)
    ]
    for row in rows:
        assert row.answered_by in ("learned", "native")
        assert row.recall >= row.target - 0.03
        assert row.native_recall >= row.target
        if row.answered_by == "native":
            assert (row.recall, row.cost_ratio) == (1.0, 1.0)
        else:
            assert 0.0 < row.cost_ratio < 3.0


def test_situations_name_each_population_once() -> None:
    keys, queries = clustered_keys(100, 4), narrow_queries(200, 4)
    made = list(situations(keys, queries[:150], queries[150:], (50, 150)))
    assert len({situation.name for situation in made}) == len(made) >= 6
    repeated = next(s for s in made if "times" in s.name)
    assert len(np.unique(repeated.keys, axis=0)) == len(repeated.keys) // 5
    popular = next(s for s in made if "popular" in s.name)
    assert len(popular.train) > len(np.unique(popular.train, axis=0))


@pytest.mark.nightly
@pytest.mark.slow
def test_rows_of_what_is_served(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge")
    keys, queries = clustered_keys(1_200, 8), narrow_queries(900, 8)
    with World.built(keys, queries[:600], 8, tmp_path) as world:
        rows = list(filtered(world, queries[600:660], queries[860:880]))
        assert len(rows) == 18  # nine classes, as they are answered and as if always routed
        for row, at_once in zip(rows[::2], rows[1::2], strict=True):
            assert at_once.situation == f"{row.situation}, routed at once"
            assert row.recall >= row.target - 0.05
            assert row.answered_by == "native"  # sixty searches prove nothing
            assert row.cost_ratio > 0.0
        served = list(traffic(world, queries[600:860], 300))
    assert len({row.situation for row in served}) == len(served) == 5
    for row in served:
        assert row.answered_by == "learned"
        assert row.cost_ratio == pytest.approx(1.0, abs=0.2)
        assert row.recall >= row.target - 0.1
