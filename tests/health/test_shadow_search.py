from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.errors import CollectionError
from amips_plugins.health.shadow_search import ServedQuery, shadow_search
from amips_plugins.plan import QueryPlan, Target


class OnDisk(MemoryCollection):
    """Vectors that no sample may read all of."""

    asked = 0

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        raise CollectionError("Every vector would be read.")

    def thorough(self, request: SearchRequest) -> list[list[Hit]]:
        type(self).asked += 1
        return super().search(request)


class Hook:
    def plan(self, queries: Any, target: Target) -> QueryPlan:
        return QueryPlan(rewritten=queries, rescore=20)


@pytest.mark.parametrize("right", [10, 7])
def test_where_vectors_lie_on_a_disk_none_but_the_candidates_are_read(right: int) -> None:
    keys = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)
    collection, query = OnDisk(keys), keys[0] + 0.1
    (best,) = collection.search(SearchRequest(query[None], k=50))
    found = [*best[:right], *best[-(10 - right) :]][:10]
    served = ServedQuery(collection, Hook(), query, Target(10), found, "rewrite", 1.0)
    shadow = shadow_search(served, None, 1.0)
    assert shadow is not None
    assert shadow.served.recall == right / 10
    assert OnDisk.asked
