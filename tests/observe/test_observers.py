"""The hook behind metrics, traces and the query log."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.collection import Id
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.routing.observers import Observation
from tests.support.bundles import laid_out, memory, write_bundle
from tests.support.observed_router import watched_router
from tests.support.routing_data import (
    QUERIES,
    TOO_FEW,
    DatabaseError,
    Hook,
    Spy,
    logged,
    only,
    pairs,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def test_an_observer_is_told_what_the_traces_say(folder: Path) -> None:
    router, seen = watched_router(folder)
    found = router.search(QUERIES, k=3, n_probes=2, explain=True)
    (told,) = seen
    assert told.collection is router.collection.info
    assert told.k == 3
    np.testing.assert_array_equal(told.queries, QUERIES)
    assert dict(told.modes) == {"route": len(QUERIES)}
    assert dict(told.fallbacks) == {}
    assert (told.routed, told.probes) == (len(QUERIES), 2 * len(QUERIES))
    assert told.scanned == pytest.approx(sum(hits.trace.scanned or 0.0 for hits in found))
    assert told.plan_seconds * 1e6 == pytest.approx(found[0].trace.plan_us)
    assert told.search_seconds * 1e3 == pytest.approx(found[0].trace.search_ms)
    assert router.manifest is not None
    assert told.version == router.manifest.version
    with pytest.raises(FrozenInstanceError):
        told.k = 4  # type: ignore[misc]


def test_queries_searched_again_natively_are_told_of(folder: Path) -> None:
    router, seen = watched_router(folder)
    accept = only(*range(5))
    found = router.search(QUERIES, k=5, n_probes=1, filter=accept, explain=True)
    again = [hits for hits in found if hits.trace.mode == "native"]
    assert again
    (told,) = seen
    assert told.modes["native"] == len(again)
    assert sum(told.modes.values()) == told.routed == len(QUERIES)
    assert dict(told.fallbacks) == {TOO_FEW: len(again)}
    assert told.scanned == pytest.approx(sum(hits.trace.scanned or 0.0 for hits in found))


def test_a_native_search_and_a_rewritten_one_are_told_of() -> None:
    seen: list[Observation] = []
    collection = memory()
    native = LearnedRouter(collection, hook=Hook(lambda _: QueryPlan()), observers=[seen.append])
    native.search(QUERIES[0])
    rewrite = Hook(lambda queries: QueryPlan(rewritten=queries, rescore=20))
    LearnedRouter(collection, hook=rewrite, observers=[seen.append]).search(QUERIES)
    assert [dict(told.modes) for told in seen] == [{"native": 1}, {"rewrite": len(QUERIES)}]
    assert [(told.routed, told.scanned, told.version) for told in seen] == [(0, None, None)] * 2
    assert seen[0].queries.shape == (1, QUERIES.shape[1])


def test_fallbacks_are_told_by_reason(tmp_path: Path) -> None:
    seen: list[Observation] = []
    router = LearnedRouter(memory(), registry=tmp_path, observers=[seen.append])
    router.search(QUERIES)
    assert dict(seen[0].fallbacks) == {"bundle: BundleNotFound": len(QUERIES)}


def test_what_an_observer_raises_is_logged_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Observation) -> None:
        raise RuntimeError("a full queue")

    router, seen = watched_router(folder, broken)
    later: list[Observation] = []
    router.observe(later.append)
    plain = LearnedRouter(laid_out(folder), bundle=folder)
    for _ in range(3):
        assert [pairs(hits) for hits in router.search(QUERIES)] == [
            pairs(hits) for hits in plain.search(QUERIES)
        ]
    assert (len(seen), len(later)) == (3, 3)
    (line,) = logged(caplog)
    assert "broken fails, and is called on all the same: a full queue" in line


def test_a_search_that_raises_is_not_told_of() -> None:
    seen: list[Observation] = []
    spy = Spy(memory(), [DatabaseError("gone")])
    router = LearnedRouter(spy, hook=Hook(lambda _: QueryPlan()), observers=[seen.append])
    with pytest.raises(DatabaseError):
        router.search(QUERIES)
    with pytest.raises(InvalidInput):
        router.search(QUERIES, k=0)
    assert seen == []


def test_the_last_overflow_share_is_remembered(folder: Path) -> None:
    router, _ = watched_router(folder)
    shares = [router.last_overflow_share]
    router.refresh()
    shares.append(router.last_overflow_share)
    assert shares == [None, 0.0]
    ids: list[Id] = [10_000]
    router.collection.upsert(ids, QUERIES[:1])
    share = router.overflow_share()
    assert 0.0 < share == router.last_overflow_share


@pytest.mark.parametrize(
    ("observers", "message"),
    [
        (print, r"pass observers=\[your observer\]"),
        (["log"], "'log' is no observer; pass a callable"),
    ],
)
def test_what_is_no_observer_is_refused(observers: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LearnedRouter(memory(), registry="nowhere", observers=observers)
