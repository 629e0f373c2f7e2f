"""Short answers are completed by the native search."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.routing.router import Trace
from tests.support.bundles import (
    COUNT,
    N_CELLS,
    laid_out,
    memory,
    write_bundle,
)
from tests.support.routing_data import (
    QUERIES,
    TOO_FEW,
    DatabaseError,
    Hook,
    Spy,
    members_of,
    native,
    only,
    pairs,
    recorded_cells,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def keynet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("keynet"), model="keynet")


def test_a_narrow_filter_is_answered_in_full(folder: Path) -> None:
    """The keys it leaves lie in cells that the model did not choose."""
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder)
    (cell,) = router.search(QUERIES[0], k=1, n_probes=1, explain=True).trace.cells
    elsewhere = members_of(folder, (cell + 1) % N_CELLS)[:3]
    keep = only(*elsewhere)
    hits = router.search(QUERIES[0], k=3, n_probes=1, filter=keep, fields=["group"])
    assert hits.trace == Trace("native", n_probes=1, version="v1", fallback=TOO_FEW)
    assert {hit.id for hit in hits} == set(elsewhere)
    assert pairs(hits) == native(collection, 3, filter=keep)[0]
    assert [dict(hit.fields) for hit in hits] == [{"group": hit.id % 3} for hit in hits]
    assert router.fallbacks == {TOO_FEW: 1}


def test_a_filter_that_nothing_passes_gives_nothing(folder: Path) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder)
    hits = router.search(QUERIES[0], k=3, n_probes=2, filter=only())
    assert list(hits) == []
    assert hits.trace.fallback == TOO_FEW


def test_cells_with_fewer_than_k_keys_are_completed(folder: Path) -> None:
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder)
    k = 1 + int(np.bincount(recorded_cells(folder)).max())
    found = router.search(QUERIES, k=k, n_probes=1)
    assert [pairs(hits) for hits in found] == native(collection, k)
    assert {hits.trace.fallback for hits in found} == {TOO_FEW}


def test_only_the_short_rows_of_a_batch_are_searched_again(folder: Path) -> None:
    """Cells 0 and 1 for the rows by turns; in cell 1 the filter leaves one key."""
    spy = Spy(laid_out(folder))
    many, few = members_of(folder, 0), members_of(folder, 1)
    cells = np.tile([[0], [1]], (len(QUERIES) // 2, 1))
    plan = QueryPlan(cells=cells, layout=spy.layout())
    keep = only(*many, few[0])
    known = HealthMonitor(share=0.0, filters=[keep])
    router = LearnedRouter(spy, hook=Hook(lambda _: plan), watch=known)
    found = router.search(QUERIES, k=2, filter=keep, params={"ef": 3}, explain=True)
    (first, routed), (second, natively) = spy.asked
    assert (len(first.queries), routed) == (len(QUERIES), plan)
    assert natively is NATIVE
    np.testing.assert_array_equal(second.queries, QUERIES[1::2])
    assert (second.k, second.filter, second.params) == (2, keep, {"ef": 3})
    exact = native(spy, 2, filter=keep)
    for row, hits in enumerate(found):
        trace = hits.trace
        assert trace.plan_us is not None
        assert trace.search_ms is not None
        if row % 2:
            assert pairs(hits) == exact[row]
            assert (trace.mode, trace.fallback) == ("native", TOO_FEW)
            assert (trace.n_probes, trace.cells, trace.scanned) == (1, (1,), None)
        else:
            assert {hit.id for hit in hits} <= set(many)
            assert (trace.mode, trace.fallback, trace.cells) == ("route", None, (0,))
    assert router.fallbacks == {TOO_FEW: 1}  # one more search, however many rows


def test_a_full_answer_is_not_searched_again(folder: Path) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    router.search(QUERIES, k=1, n_probes=1)
    assert len(spy.asked) == 1
    assert not router.fallbacks


def test_a_rewrite_that_finds_too_few_is_completed(keynet: Path) -> None:
    class Stingy(Spy):
        """An index that gives half of what a rewritten query asks for."""

        def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
            found = super().search(request, plan)
            return [hits[:2] for hits in found] if plan.rewritten is not None else found

    spy = Stingy(memory())
    router = LearnedRouter(spy, bundle=keynet)
    found = router.search(QUERIES, k=5)
    assert [pairs(hits) for hits in found] == native(memory())
    assert {hits.trace for hits in found} == {Trace("native", version="v1", fallback=TOO_FEW)}
    assert len(spy.asked) == 2


def test_a_native_search_is_never_completed() -> None:
    spy = Spy(memory())
    hits = LearnedRouter(spy, hook=NativeHook()).search(QUERIES[0], k=5, filter=only(3))
    assert [hit.id for hit in hits] == [3]
    assert hits.trace == Trace("native")
    assert len(spy.asked) == 1


class Late(Spy):
    """Takes a while for a routed search."""

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        if plan.cells is not None:
            time.sleep(0.05)
        return super().search(request, plan)


def test_completing_keeps_the_callers_one_deadline(folder: Path) -> None:
    spy = Late(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    router.search(QUERIES[0], k=COUNT, n_probes=1, timeout=30.0)
    (_, _), (again, _) = spy.asked
    assert again.timeout is not None
    assert 20.0 < again.timeout <= 29.95
    # With no time left the caller has what was found, and no search comes after the deadline.
    hits = router.search(QUERIES[0], k=COUNT, n_probes=1, timeout=0.01)
    assert len(spy.asked) == 3
    assert 0 < len(hits) < COUNT
    assert (hits.trace.mode, hits.trace.fallback) == ("route", None)


def test_an_error_while_completing_is_the_databases(folder: Path) -> None:
    class Second(Spy):
        def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
            if plan is NATIVE:
                raise DatabaseError("gone")
            return super().search(request, plan)

    router = LearnedRouter(Second(laid_out(folder)), bundle=folder)
    with pytest.raises(DatabaseError, match="gone"):
        router.search(QUERIES[0], k=COUNT, n_probes=1)
    assert not router.fallbacks


# Cells that hold too much


class Scans(Spy):
    """A database whose full scan is cheaper than a search of more than a fifth of the keys."""

    break_even = 0.2


def test_a_scan_of_everything_is_counted_as_one(folder: Path) -> None:
    spy = Scans(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    model = N_CELLS / COUNT
    for n_probes in (1, 4):
        found = router.search(QUERIES, k=2, n_probes=n_probes, explain=True)
        for hits, exact in zip(found, native(spy, 2), strict=True):
            assert (hits.trace.mode, hits.trace.n_probes) == ("route", n_probes)
            assert hits.trace.cells is not None
            held = recorded_cells(folder)
            share = np.isin(held, hits.trace.cells).mean()
            if share > 0.2:
                assert hits.trace.scanned == pytest.approx(1.0 + model)
                assert pairs(hits) == exact
            else:
                assert hits.trace.scanned == pytest.approx(share + model)
    assert not router.fallbacks


def test_after_a_scan_of_everything_there_is_nothing_to_complete(folder: Path) -> None:
    spy = Scans(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    hits = router.search(QUERIES[0], k=3, n_probes=4, filter=only(1, 2))
    assert {hit.id for hit in hits} == {1, 2}
    assert (hits.trace.mode, hits.trace.fallback) == ("route", None)
    assert len(spy.asked) == 1


def test_shares_of_a_users_own_hook(folder: Path) -> None:
    spy = Scans(laid_out(folder))
    shares = np.array([0.1, 0.9, 0.2, 0.3, 0.0, 1.0], dtype=np.float32)
    cells = np.zeros((6, 1), dtype=np.int64)
    plan = QueryPlan(cells=cells, layout=spy.layout(), shares=shares)
    found = LearnedRouter(spy, hook=Hook(lambda _: plan)).search(QUERIES, k=1, explain=True)
    expected = [0.1, 1.0, 0.2, 1.0, 0.0, 1.0]
    assert [hits.trace.scanned for hits in found] == pytest.approx(expected)


def test_a_completion_that_comes_too_late_costs_no_answer(folder: Path) -> None:
    """The short answer is at hand when the time runs out."""

    class Slow(Spy):
        def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
            if plan is not NATIVE:
                return super().search(request, plan)
            time.sleep(0.2)
            raise TimeoutError

    router = LearnedRouter(Slow(laid_out(folder)), bundle=folder)
    hits = router.search(QUERIES[0], k=COUNT - 1, n_probes=1, timeout=0.1)
    assert 0 < len(hits) < COUNT - 1
    assert hits.trace.mode == "route"
    assert router.fallbacks == {"complete: TimeoutError": 1}
