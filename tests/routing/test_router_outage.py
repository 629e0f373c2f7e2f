"""A database that does not answer, has too much to do or gives fewer candidates than asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import AsyncLearnedRouter, LearnedRouter, MemoryCollection
from amips_plugins.collection import Failure, Hit, SearchRequest
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import NATIVE, QueryPlan
from tests.support.bundles import laid_out, memory, write_bundle
from tests.support.routing_data import QUERIES, DatabaseError, Hook, Spy, logged, native, pairs

K = 5


class Trouble(Exception):
    """What a client raises."""

    def __init__(self, kind: Failure) -> None:
        super().__init__(kind.value)
        self.kind = kind


class Server(Spy):
    """Fails as it is told to, and notes when it is looked at."""

    def __init__(
        self, inner: MemoryCollection, failures: Sequence[Exception] = (), wait: float = 0.0
    ) -> None:
        super().__init__(inner, failures)
        self.wait = wait
        self.own_timeout: float | None = None
        self.most: int | None = None
        self.looked = 0

    @property
    def timeout(self) -> float | None:
        return self.own_timeout

    @property
    def max_candidates(self) -> int | None:
        return self.most

    def failure(self, exc: BaseException) -> Failure:
        return exc.kind if isinstance(exc, Trouble) else Failure.OTHER

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:
        kind = "rewrite" if rewritten else "route"
        return "params: radius" if (request.params or {}).get("radius") == kind else None

    def current(self) -> Server:
        self.looked += 1
        return self

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        time.sleep(self.wait)
        if self.most is not None and plan.rewritten is not None and plan.rescore > self.most:
            raise Trouble(Failure.SIZE)
        return super().search(request, plan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def rewriting(rescore: int = 30) -> Hook:
    return Hook(lambda queries: QueryPlan(rewritten=queries.copy(), rescore=rescore))


@pytest.mark.parametrize("waits", ["threads", "tasks"])
@pytest.mark.parametrize("way", ["routed", "disabled", "native"])
@pytest.mark.parametrize("kind", [Failure.OUTAGE, Failure.BUSY])
def test_a_database_in_trouble_is_asked_once(
    folder: Path, kind: Failure, way: str, waits: str
) -> None:
    trouble = Trouble(kind)
    server = Server(laid_out(folder), [trouble])
    source: dict[str, Any] = {"hook": NativeHook()} if way == "native" else {"bundle": folder}
    router = LearnedRouter(server, refresh=3600.0, **source)
    router.enabled = way != "disabled"
    router._refresher._soonest = 0.0

    def search() -> Any:
        if waits == "threads":
            return router.search(QUERIES[0], K, n_probes=None if way == "native" else 2)
        return asyncio.run(AsyncLearnedRouter(router, None).search(QUERIES[0], K))

    with pytest.raises(Trouble) as caught:
        search()
    assert caught.value is trouble
    assert len(server.asked) == 1
    assert server.looked == 0
    assert not router._refresher.busy


@pytest.mark.parametrize("waits", ["threads", "tasks"])
@pytest.mark.parametrize("way", ["routed", "disabled"])
@pytest.mark.parametrize(("kind", "looks"), [(Failure.REQUEST, 0), (Failure.OTHER, 1)])
def test_a_wrong_request_is_sent_once_more_at_most(
    folder: Path, kind: Failure, looks: int, way: str, waits: str
) -> None:
    """The plan may be what is wrong with it; without one nothing else can answer.

    Anything else may come of a collection that is gone: what serves now is looked for.
    """
    troubles = [Trouble(kind) for _ in range(4)]
    server = Server(laid_out(folder), troubles)
    router = LearnedRouter(server, bundle=folder, refresh=None)
    router.enabled = way == "routed"
    sent = 2 if way == "routed" else 1
    last = troubles[sent - 1]

    def search() -> Any:
        if waits == "threads":
            return router.search(QUERIES[0], K)
        return asyncio.run(AsyncLearnedRouter(router, None).search(QUERIES[0], K))

    with pytest.raises(Trouble) as caught:
        search()
    assert caught.value is last
    assert (len(server.asked), server.looked) == (sent, looks)


def test_wrong_requests_time_and_again_are_no_plans_fault(folder: Path) -> None:
    server = Server(laid_out(folder), [Trouble(Failure.REQUEST)] * 20)
    router = LearnedRouter(server, bundle=folder, refresh=None)
    for _ in range(10):
        with pytest.raises(Trouble):
            router.search(QUERIES[0], K, n_probes=2)
    assert router.search(QUERIES[0], K, n_probes=2).trace.mode == "route"


@pytest.mark.parametrize("kind", [Failure.OUTAGE, Failure.BUSY])
def test_trouble_time_and_again_opens_the_circuit_breaker(
    folder: Path, kind: Failure, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(laid_out(folder), [Trouble(kind)] * 5)
    router = LearnedRouter(server, bundle=folder, refresh=None)
    for _ in range(5):
        with pytest.raises(Trouble):
            router.search(QUERIES[0], K, n_probes=2)
    hits = router.search(QUERIES[0], K, n_probes=2)
    assert (hits.trace.mode, hits.trace.fallback) == ("native", "breaker: search")
    assert len(server.asked) == 6
    assert "Circuit breaker open: the routed search of 'docs'" in logged(caplog)[0]


def test_trouble_of_native_searches_says_nothing_of_routed_ones(folder: Path) -> None:
    server = Server(laid_out(folder), [Trouble(Failure.OUTAGE)] * 9)
    router = LearnedRouter(server, bundle=folder, refresh=None)
    router.enabled = False
    for _ in range(9):
        with pytest.raises(Trouble):
            router.search(QUERIES[0], K)
    router.enabled = True
    assert router.search(QUERIES[0], K, n_probes=2).trace.mode == "route"


def test_trouble_in_the_second_search_is_the_callers(folder: Path) -> None:
    server = Server(laid_out(folder), [DatabaseError("the plan"), Trouble(Failure.OUTAGE)])
    router = LearnedRouter(server, bundle=folder, refresh=None)
    with pytest.raises(Trouble):
        router.search(QUERIES[0], K, n_probes=2)
    assert len(server.asked) == 2
    assert server.looked == 0


def test_the_clients_own_timeout_is_a_deadline_too(folder: Path) -> None:
    server = Server(laid_out(folder), [DatabaseError("slow")], wait=0.05)
    server.own_timeout = 0.04
    router = LearnedRouter(server, bundle=folder, refresh=None)
    with pytest.raises(DatabaseError, match="slow"):
        router.search(QUERIES[0], K, n_probes=2)
    assert len(server.asked) == 1
    server.failures, server.own_timeout = iter([DatabaseError("once")]), 30.0
    assert router.search(QUERIES[0], K, n_probes=2).trace.fallback == "search: DatabaseError"
    first, second = (request.timeout for request, _ in server.asked[1:])
    assert first is None  # the client knows
    assert second is not None
    assert 20.0 < second < 29.96


# Candidates


def test_candidates_are_no_more_than_the_database_gives() -> None:
    server = Server(memory())
    server.most = 20
    router = LearnedRouter(server, hook=rewriting(10_000), refresh=None)
    assert router.search(QUERIES[0], K).trace.mode == "rewrite"
    assert server.asked[0][1].rescore == 20
    hits = router.search(QUERIES[0], 21)
    assert hits.trace.fallback == "k: more than there may be candidates"
    assert [hit.id for hit in hits] == [key for key, _ in native(server, 21)[0]]
    assert [plan.rescore for _, plan in server.asked] == [20, 0]


def test_a_refusal_by_size_is_not_held_against_the_model() -> None:
    """The limit may be lower than the adapter knows."""
    server = Server(memory())
    router = LearnedRouter(server, hook=rewriting(), refresh=None)
    for _ in range(10):
        server.failures = iter([Trouble(Failure.SIZE)])
        assert router.search(QUERIES[0], K).trace.fallback == "search: Trouble"
    server.failures = iter(())
    assert router.search(QUERIES[0], K).trace.mode == "rewrite"


# What a plan would change


def test_what_a_plan_would_change_goes_native(folder: Path) -> None:
    for kind, source in (("route", {"bundle": folder}), ("rewrite", {"hook": rewriting()})):
        server = Server(laid_out(folder))
        router = LearnedRouter(server, refresh=None, **source)
        how: dict[str, Any] = {"n_probes": 2} if kind == "route" else {}
        hits = router.search(QUERIES[0], K, params={"radius": kind}, **how)
        assert (hits.trace.mode, hits.trace.fallback) == ("native", "params: radius")
        assert pairs(hits) == native(server)[0]
        assert server.asked[0][1] is NATIVE
        assert router.search(QUERIES[0], K, params={"radius": 1}, **how).trace.mode == kind
        assert router.fallbacks == {"params: radius": 1}


def test_a_native_plan_is_asked_no_such_thing() -> None:
    server = Server(memory())
    router = LearnedRouter(server, hook=NativeHook(), refresh=None)
    hits = router.search(np.asarray(QUERIES[0]), K, params={"radius": "route"})
    assert hits.trace.fallback is None
