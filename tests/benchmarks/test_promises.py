"""The benchmark of promises, on a tenth of a second of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.promises import Situation, measure, situations
from tests.support.training_data import clustered_keys, narrow_queries


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
