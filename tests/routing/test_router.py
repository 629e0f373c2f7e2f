"""The learned router: what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins import Hits, LearnedRouter, MemoryCollection
from amips_plugins.bundle.contents import CELLS
from amips_plugins.collection import Hit, Id, SearchRequest
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.models.cells import Cells
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import QueryPlan
from amips_plugins.routing.router import Trace
from amips_plugins.vectors import FloatArray, Metric
from tests.support.bundles import (
    COUNT,
    N_CELLS,
    laid_out,
    make_files,
    memory,
    vectors,
    write_bundle,
)
from tests.support.routing_data import (
    QUERIES,
    TOO_FEW,
    Hook,
    Spy,
    members_of,
    native,
    pairs,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def keynet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("keynet"), model="keynet")


@pytest.fixture
def router(folder: Path) -> LearnedRouter:
    return LearnedRouter(laid_out(folder), bundle=folder)


def test_one_vector_gives_hits_and_a_matrix_a_list(router: LearnedRouter) -> None:
    one = router.search(QUERIES[0], k=3)
    many = router.search(QUERIES[:1], k=3)
    assert isinstance(one, Hits)
    assert isinstance(many, list)
    assert pairs(one) == pairs(many[0])
    assert len(router.search(QUERIES, k=3)) == len(QUERIES)
    assert pairs(router.search(QUERIES[0].tolist(), k=3)) == pairs(one)


def test_hits_are_a_sequence() -> None:
    found = [Hit(1, 0.5), Hit("b", 0.4), Hit(3, 0.3)]
    hits = Hits(found, Trace("native"))
    assert isinstance(hits, Sequence)
    assert len(hits) == 3
    assert list(hits) == found
    assert hits[0] is found[0]
    assert hits[-1] is found[2]
    assert hits[1:] == tuple(found[1:])
    assert found[1] in hits
    assert hits.index(found[2]) == 2
    assert list(reversed(hits)) == found[::-1]
    assert "trace=Trace(mode='native'" in repr(hits)
    with pytest.raises(IndexError):
        hits[3]
    assert not Hits([], Trace("native"))


def test_a_batch_answers_as_its_queries(router: LearnedRouter) -> None:
    batch = router.search(QUERIES, k=4, n_probes=2)
    alone = [router.search(query, k=4, n_probes=2) for query in QUERIES]
    assert [pairs(hits) for hits in batch] == [pairs(hits) for hits in alone]
    assert [hits.trace for hits in batch] == [hits.trace for hits in alone]


def test_a_batch_answers_as_its_queries_at_a_target(router: LearnedRouter) -> None:
    """Each query has its own number of cells, in a batch as alone."""
    batch = router.search(QUERIES, k=3, recall=0.9)
    alone = [router.search(query, k=3, recall=0.9) for query in QUERIES]
    assert [pairs(hits) for hits in batch] == [pairs(hits) for hits in alone]
    assert [hits.trace for hits in batch] == [hits.trace for hits in alone]
    assert {hits.trace.mode for hits in batch} == {"route"}
    assert len({hits.trace.n_probes for hits in batch}) > 1


@pytest.mark.parametrize("metric", Metric)
def test_higher_targets_search_more_and_find_what_they_promise(
    folders: Mapping[Metric, Path], metric: Metric
) -> None:
    """The whole line: thresholds of a calibration, kept for queries nobody has seen."""
    collection, k = laid_out(folders[metric], metric), 3
    router = LearnedRouter(collection, bundle=folders[metric])
    unseen = vectors(seed=77, count=600)
    exact = MemoryCollection.search(collection, SearchRequest(unseen, k))
    before: list[set[int]] = [set() for _ in unseen]
    probes = []
    for recall in (0.8, 0.9, 0.95):
        found = router.search(unseen, k, recall=recall, explain=True)
        shares = [
            len({hit.id for hit in hits} & {hit.id for hit in true}) / k
            for hits, true in zip(found, exact, strict=True)
        ]
        assert np.mean(shares) >= recall
        routed = [hits.trace for hits in found if hits.trace.mode == "route"]
        assert len(routed) > 0.9 * len(unseen)
        assert len({trace.n_probes for trace in routed}) > 1, "easy queries search fewer cells"
        probes.append(np.mean([trace.n_probes for trace in routed]))
        for row, hits in enumerate(found):
            if hits.trace.cells is not None:
                assert before[row] <= set(hits.trace.cells)
                before[row] = set(hits.trace.cells)
    assert probes[0] < probes[1] < probes[2] < N_CELLS - 1
    assert set(router.fallbacks) <= {TOO_FEW}


def test_the_trace_of_a_route(router: LearnedRouter) -> None:
    short = router.search(QUERIES[0], k=4, n_probes=2).trace
    assert short == Trace("route", n_probes=2, version="v1")
    full = router.search(QUERIES[0], k=4, n_probes=2, explain=True).trace
    assert full.cells is not None
    assert len(full.cells) == 2
    sizes = Cells.from_bytes(make_files()[CELLS]).sizes
    expected = (sizes[list(full.cells)].sum() + N_CELLS) / COUNT  # the model costs its cells
    assert full.scanned == pytest.approx(expected)
    assert full.plan_us is not None
    assert full.plan_us > 0
    assert full.search_ms is not None
    assert full.search_ms > 0
    assert replace(full, cells=None, scanned=None, plan_us=None, search_ms=None) == short


def test_the_trace_of_a_rewrite_and_of_a_native_search(keynet: Path) -> None:
    router = LearnedRouter(memory(), bundle=keynet)
    assert router.search(QUERIES[0]).trace == Trace("rewrite", version="v1")
    trace = router.search(QUERIES[0], explain=True).trace
    assert (trace.mode, trace.cells, trace.scanned) == ("rewrite", None, None)
    assert trace.plan_us is not None
    trace = LearnedRouter(memory(), hook=NativeHook()).search(QUERIES[0], explain=True).trace
    assert (trace.mode, trace.cells, trace.version) == ("native", None, None)
    assert trace.search_ms is not None


def test_the_trace_of_a_users_own_route(folder: Path) -> None:
    collection = laid_out(folder)
    plan = QueryPlan(cells=np.array([[3, -1, 1]]), layout=collection.layout())
    router = LearnedRouter(collection, hook=Hook(lambda _: plan))
    trace = router.search(QUERIES[0], k=2, explain=True).trace
    assert (trace.mode, trace.n_probes, trace.cells, trace.version) == ("route", 2, (3, 1), None)
    assert trace.scanned is None  # nobody knows the sizes of their cells


def test_a_route_searches_its_cells_and_the_overflow(router: LearnedRouter, folder: Path) -> None:
    collection = router.collection
    assert isinstance(collection, MemoryCollection)
    collection.upsert([1000], QUERIES[:1])
    (cell,) = router.search(QUERIES[0], k=1, n_probes=1, explain=True).trace.cells
    members = set(members_of(folder, cell))
    hits = router.search(QUERIES[0], k=len(members) + 1, n_probes=1)
    assert hits.trace.mode == "route"
    assert hits[0].id == 1000
    assert {hit.id for hit in hits[1:]} == members


def test_fields_filter_and_everything_else_reach_the_database(folder: Path) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)

    def keep(_: Id, fields: Mapping[str, Any]) -> bool:
        return bool(fields["group"] == 1)

    hits = router.search(
        QUERIES[0], k=3, filter=keep, fields=["group"], params={"ef": 3}, timeout=7.0
    )
    assert [dict(hit.fields) for hit in hits] == [{"group": 1}] * 3
    request, _ = spy.asked[0]
    assert (request.k, request.filter, request.fields) == (3, keep, ("group",))
    assert request.params == {"ef": 3}
    assert request.timeout is not None
    assert 6.0 < request.timeout <= 7.0  # the plan is part of the caller's time
    np.testing.assert_array_equal(request.queries, QUERIES[:1])


@pytest.mark.parametrize("n_probes", [1, 3, N_CELLS, None])
def test_planning_is_pure_and_the_search_is_one_call(folder: Path, n_probes: int | None) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    assert spy.asked == []
    counted, layouts_asked = spy.counted, spy.layouts_asked
    router.search(QUERIES, k=3, n_probes=n_probes)
    assert len(spy.asked) == 1
    assert spy.counted == counted
    assert spy.layouts_asked == layouts_asked  # Qdrant asks the server for it


def test_one_call_for_a_rewrite_and_for_native(keynet: Path) -> None:
    sources: list[dict[str, Any]] = [{"bundle": keynet}, {"hook": NativeHook()}]
    for source in sources:
        spy = Spy(memory())
        LearnedRouter(spy, **source).search(QUERIES, k=5)
        assert len(spy.asked) == 1


@pytest.mark.parametrize("n_probes", [N_CELLS, N_CELLS + 3])
def test_all_cells_are_the_native_search(router: LearnedRouter, n_probes: int) -> None:
    for hits, expected in zip(
        router.search(QUERIES, k=5, n_probes=n_probes), native(memory()), strict=True
    ):
        assert hits.trace == Trace("native", version="v1")
        assert pairs(hits) == expected
    assert not router.fallbacks


def knowing(condition: Any) -> HealthMonitor:
    return HealthMonitor(share=0.0, filters=[] if condition is None else [condition])


@pytest.mark.parametrize("metric", Metric)
@given(
    k=st.integers(1, COUNT),
    n=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    groups=st.none() | st.sets(st.integers(0, 2)),
    new=st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_routed_through_all_cells_equals_native(
    folders: Mapping[Metric, Path],
    metric: Metric,
    k: int,
    n: int,
    seed: int,
    groups: set[int] | None,
    new: int,
) -> None:
    """As a plan that names every cell, and as a target that takes every cell."""
    folder = folders[metric]
    collection = laid_out(folder, metric)
    collection.upsert(range(1000, 1000 + new), vectors(seed + 1, max(new, 1))[:new]) if new else 0
    queries = vectors(seed, n)
    chosen = (lambda _, fields: fields.get("group") in groups) if groups is not None else None
    layout = collection.layout()

    def every_cell(rows: FloatArray) -> QueryPlan:
        order = np.random.default_rng(seed).permutation(N_CELLS)
        return QueryPlan(cells=np.tile(order, (len(rows), 1)), layout=layout)

    expected = collection.search(SearchRequest(queries, k, chosen))
    for router, probes in (
        (LearnedRouter(collection, hook=Hook(every_cell), watch=knowing(chosen)), None),
        (LearnedRouter(collection, bundle=folder), N_CELLS),
    ):
        found = router.search(queries, k, filter=chosen, n_probes=probes)
        assert [pairs(hits) for hits in found] == [pairs(hits) for hits in expected]
        # Where no search finds k hits the router has looked twice, and says so.
        looked_twice = probes is None and any(len(hits) < k for hits in expected)
        assert router.fallbacks == ({TOO_FEW: 1} if looked_twice else {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Metric, Path]:
    return {
        metric: write_bundle(tmp_path_factory.mktemp(metric.value), metric) for metric in Metric
    }
