"""Hooks and databases that fail under a router."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, IntArray
from tests.support.bundles import (
    laid_out,
    memory,
    write_bundle,
)
from tests.support.routing_data import (
    QUERIES,
    DatabaseError,
    Hook,
    Spy,
    assert_native,
    logged,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def fail(_: FloatArray) -> QueryPlan:
    raise RuntimeError("out of memory")


def nan(queries: FloatArray) -> QueryPlan:
    return QueryPlan(rewritten=np.full_like(queries, np.nan), rescore=30)


def one_nan(queries: FloatArray) -> QueryPlan:
    rewritten = queries.copy()
    rewritten[-1, 0] = np.inf
    return QueryPlan(rewritten=rewritten, rescore=30)


def cells(array: IntArray, layout: str | None = "here") -> Callable[[FloatArray], QueryPlan]:
    return lambda _: QueryPlan(cells=array, layout=layout)


N = len(QUERIES)


@pytest.mark.parametrize(
    "give",
    [
        fail,
        nan,
        one_nan,
        lambda q: QueryPlan(rewritten=q[:-1], rescore=30),
        lambda q: QueryPlan(rewritten=np.vstack([q, q]), rescore=30),
        lambda q: QueryPlan(rewritten=q[:, :-1].copy(), rescore=30),
        lambda q: QueryPlan(rewritten=np.hstack([q, q]), rescore=30),
        lambda q: QueryPlan(rewritten=q[0], rescore=30),
        lambda _: None,
        lambda q: q,
        cells(np.zeros((N - 1, 2), dtype=np.int64)),
        cells(np.zeros((N + 1, 2), dtype=np.int64)),
        cells(np.zeros(N, dtype=np.int64)),
        lambda q: QueryPlan(cells=np.zeros((len(q), 1), dtype=np.int64), layout="here", shares=q),
        cells(np.zeros((N, 2), dtype=np.int64), "there"),
        cells(np.zeros((N, 2), dtype=np.int64), None),
    ],
)
def test_a_hook_that_fails(
    give: Callable[[FloatArray], Any], caplog: pytest.LogCaptureFixture
) -> None:
    collection = memory()
    spec = LayoutSpec("here", 2, lambda ids, _: np.zeros(len(ids), dtype=np.int64))
    collection.layouts.build(spec)
    router = LearnedRouter(collection, hook=Hook(give))
    for _ in range(3):
        assert_native(router, "")
    assert len(router.fallbacks) == 1
    assert router.fallbacks.total() == 3
    assert len(logged(caplog)) == 1
    assert "The native search answers for 'docs'" in logged(caplog)[0]


def test_a_users_hook_may_refuse_its_caller() -> None:
    def refuse(_: FloatArray) -> QueryPlan:
        raise InvalidInput("Not today.")

    router = LearnedRouter(memory(), hook=Hook(refuse))
    with pytest.raises(InvalidInput, match="Not today"):
        router.search(QUERIES)
    assert not router.fallbacks


def test_an_interrupt_is_not_a_fallback() -> None:
    def interrupt(_: FloatArray) -> QueryPlan:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LearnedRouter(memory(), hook=Hook(interrupt)).search(QUERIES)


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([fail, nan, fail, nan])
    router = LearnedRouter(memory(), hook=Hook(lambda queries: next(answers)(queries)))
    for _ in range(4):
        assert_native(router, "model: ")
    assert router.fallbacks == {"model: RuntimeError": 2, "model: ModelFault": 2}
    assert len(logged(caplog)) == 2


# The database's own errors


def test_a_routed_search_that_fails_is_searched_natively(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy(laid_out(folder), [ConnectionError("partition gone")])
    router = LearnedRouter(spy, bundle=folder)
    assert_native(router, "search: ConnectionError")
    (routed, plan), (request, after) = spy.asked
    assert plan.cells is not None
    assert after is NATIVE
    assert request == routed
    assert "partition gone" in logged(caplog)[0]
    assert router.search(QUERIES[0], k=5, n_probes=2).trace.mode == "route"  # it may be back


@pytest.mark.parametrize("route", [True, False])
def test_errors_of_the_database_surface(folder: Path, route: bool) -> None:
    spy = Spy(laid_out(folder), [DatabaseError("first"), DatabaseError("second")])
    source: dict[str, Any] = {"bundle": folder} if route else {"hook": NativeHook()}
    router = LearnedRouter(spy, **source)
    with pytest.raises(DatabaseError, match="second" if route else "first"):
        router.search(QUERIES, k=5, n_probes=2)
    assert not router.fallbacks  # nothing answered in its place
    assert len(spy.asked) == (2 if route else 1)


def test_a_hooks_own_empty_plan_is_searched_once() -> None:
    spy = Spy(memory(), [DatabaseError("once")])
    with pytest.raises(DatabaseError, match="once"):
        LearnedRouter(spy, hook=Hook(lambda _: QueryPlan())).search(QUERIES, k=5)
    assert len(spy.asked) == 1


class Slow(Spy):
    """Takes a while to fail."""

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        if plan.cells is not None:
            time.sleep(0.05)
            raise TimeoutError("too slow")
        return super().search(request, plan)


def test_a_timeout_is_one_deadline_for_both_searches(folder: Path) -> None:
    spy = Slow(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    hits = router.search(QUERIES[0], k=5, n_probes=2, timeout=30.0)
    assert hits.trace.fallback == "search: TimeoutError"
    left = spy.asked[0][0].timeout
    assert left is not None
    assert 20.0 < left <= 29.95
    with pytest.raises(TimeoutError, match="too slow"):
        router.search(QUERIES[0], k=5, n_probes=2, timeout=0.01)
    assert len(spy.asked) == 1
