"""How often a comparison is made, and what of it counts: by a clock that only searches move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amips_plugins import MemoryCollection
from amips_plugins.plan import NATIVE
from amips_plugins.progress import no_progress
from amips_plugins.tune.keys import truth_of
from amips_plugins.tune.measuring import try_both

KEYS = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
QUERIES, WARM = 20, 5


@pytest.mark.parametrize(
    ("first", "again", "rounds", "least"),
    [(0.02, 1, 1, 0.02), (0.02, 4, 4, 0.01), (1.0, 4, 1, 1.0)],  # the last is long
)
def test_the_least_that_a_search_took_counts_and_a_long_comparison_is_made_once(
    first: float, again: int, rounds: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, asked = MemoryCollection(KEYS), KEYS[:QUERIES]
    truth = truth_of(collection, asked, 3, no_progress)
    search, now, calls = collection.search, [0.0], [0]

    def timed(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        now[0] += first if calls[0] <= WARM + QUERIES else 0.01
        return search(*args, **more)

    monkeypatch.setattr(collection, "search", timed)
    ways = [(collection, NATIVE, truth)]
    (trial,) = try_both(ways, asked, 3, lambda: now[0], again=again)
    assert calls[0] == WARM + rounds * QUERIES
    assert trial.seconds == pytest.approx(least)
    assert trial.recall.mean() == 1.0
