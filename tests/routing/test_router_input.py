"""What the caller of a router did wrong is the caller's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.routing.router import Trace
from tests.support.bundles import (
    COUNT,
    DIM,
    N_CELLS,
    K,
    laid_out,
    memory,
    weaken,
    write_bundle,
)
from tests.support.routing_data import (
    QUERIES,
    DatabaseError,
    Spy,
    logged,
    only,
    pairs,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def keynet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("keynet"), model="keynet")


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"k": 0}, "k=0 asks for nothing"),
        ({"k": -3}, "k=-3"),
        ({"k": True}, "k=True"),
        ({"k": 2.0}, "k=2.0"),
        ({"k": "3"}, "k='3'"),
        ({"k": None}, "k=None"),
        ({"recall": 0.0}, "recall=0.0 is no share"),
        ({"recall": 1.01}, "recall=1.01"),
        ({"recall": -1}, "recall=-1"),
        ({"recall": float("nan")}, "recall=nan"),
        ({"recall": "0.9"}, "recall='0.9'"),
        ({"recall": True}, "recall=True"),
        ({"n_probes": 0}, "n_probes=0 searches nothing"),
        ({"n_probes": -1}, "n_probes=-1"),
        ({"n_probes": 2.5}, "n_probes=2.5"),
        ({"n_probes": "2"}, "n_probes='2'"),
        ({"n_probes": True}, "n_probes=True"),
        ({"queries": [float("nan")] * DIM}, "NaN"),
        ({"queries": [[0.0] * DIM, [float("inf")] * DIM]}, "Query 1"),
        ({"queries": [1.0] * (DIM + 1)}, f"dimension {DIM}"),
        ({"queries": np.zeros((0, DIM))}, "empty"),
        ({"queries": "text"}, "numbers"),
        ({"fields": "group"}, "fields='group' is one name"),
    ],
)
def test_bad_input_is_the_callers(
    folder: Path, learned: bool, arguments: dict[str, Any], says: str
) -> None:
    spy = Spy(laid_out(folder))
    source: dict[str, Any] = {"bundle": folder} if learned else {"hook": NativeHook()}
    router = LearnedRouter(spy, **source)
    with pytest.raises(InvalidInput) as caught:
        router.search(**({"queries": QUERIES[0], "k": 3} | arguments))
    assert says in str(caught.value)
    assert spy.asked == []
    assert not router.fallbacks


def test_numpy_integers_are_whole_numbers(folder: Path) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    assert len(router.search(QUERIES[0], k=np.int64(3), n_probes=np.int32(N_CELLS - 1))) == 3
    assert type(spy.asked[0][0].k) is int
    router.search(QUERIES[0], k=3, recall=np.float32(0.5))
    assert not router.fallbacks


def test_a_recall_without_a_promise_is_answered_natively_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever publishes a bundle that promises less must not make callers fail."""
    folder = write_bundle(tmp_path, change=weaken(0.85, confidence=0.9))  # .9 is the default
    router = LearnedRouter(laid_out(folder), bundle=folder)
    for recall in (None, 0.95):
        hits = router.search(QUERIES[0], k=3, recall=recall)
        assert hits.trace == Trace("native", version="v1", fallback="target: not promised")
        assert len(hits) == 3
    assert router.search(QUERIES[0], k=3, recall=0.8).trace.mode == "route"
    for recall in (None, 0.5):
        trace = router.search(QUERIES[0], k=K + 1, recall=recall).trace
        assert (trace.mode, trace.fallback) == ("native", "target: k not calibrated")
    assert router.fallbacks == {"target: not promised": 2, "target: k not calibrated": 2}
    assert len(logged(caplog)) == 2
    assert "train with more queries" in logged(caplog)[0]
    assert router.search(QUERIES[0], k=K + 1, recall=1.0).trace.fallback is None


class Graph(Spy):
    """Its native search misses the best key, and an exact one need not look at every key."""

    exhaustive = True

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        found = super().search(replace(request, k=request.k + 1), plan)
        return [hits[1:] for hits in found]

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        return MemoryCollection.search(self, request)


@pytest.mark.parametrize("condition", [None, only(*range(0, COUNT, 2))])
@pytest.mark.parametrize("exhaustive", [True, False])
def test_a_recall_of_one_is_an_exact_search_or_says_otherwise(
    folder: Path, exhaustive: bool, condition: Any
) -> None:
    graph = Graph(laid_out(folder))
    graph.exhaustive = exhaustive
    router = LearnedRouter(graph, bundle=folder, refresh=None)
    for k in (3, K + 1, COUNT + 5):
        found = router.search(QUERIES, k=k, recall=1.0, filter=condition)
        request = SearchRequest(QUERIES, k, condition)
        exact = MemoryCollection.search(graph, request)
        assert [pairs(hits) for hits in found] == [pairs(hits) for hits in exact]
        reason = None if exhaustive else "exact: as far as the index goes"
        assert {(hits.trace.mode, hits.trace.fallback) for hits in found} == {("exact", reason)}
    assert router.fallbacks.total() == (0 if exhaustive else 3)
    router.enabled = False
    hits = router.search(QUERIES[0], k=3, recall=1.0)
    assert (hits.trace.mode, hits.trace.fallback) == ("native", "disabled")


def test_an_exact_search_that_is_refused_is_answered_natively(folder: Path) -> None:
    class Strict(Graph):
        def exact(self, request: SearchRequest) -> list[list[Hit]]:
            raise DatabaseError("exact searches are not allowed")

    router = LearnedRouter(Strict(laid_out(folder)), bundle=folder, refresh=None)
    hits = router.search(QUERIES[0], k=3, recall=1.0)
    assert (hits.trace.mode, hits.trace.fallback) == ("native", "search: DatabaseError")
    assert len(hits) == 3


def test_a_rewrite_refuses_recall_targets(keynet: Path) -> None:
    router = LearnedRouter(memory(), bundle=keynet)
    for target in ({"recall": 0.9}, {"n_probes": 3}):
        with pytest.raises(InvalidInput, match="params="):
            router.search(QUERIES[0], k=3, **target)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_more_hits_than_keys_are_all_the_keys(folder: Path, learned: bool, count: int) -> None:
    collection = laid_out(folder) if learned else memory()
    collection.delete([key for key in range(COUNT) if key >= count])
    source: dict[str, Any] = {"bundle": folder} if learned else {"hook": NativeHook()}
    spy = Spy(collection)
    router = LearnedRouter(spy, **source)
    assert spy.counted == 0  # what a server may refuse to count is not asked for
    assert sorted(hit.id for hit in router.search(QUERIES[0], k=10)) == list(range(count))
    assert [len(hits) for hits in router.search(QUERIES[:3], k=10)] == [count] * 3


def test_only_one_source_of_plans(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="one of registry, bundle and hook"):
        LearnedRouter(memory(), registry=tmp_path, bundle=folder)
    with pytest.raises(InvalidInput, match="one of registry, bundle and hook"):
        LearnedRouter(memory(), hook=NativeHook(), bundle=folder)
