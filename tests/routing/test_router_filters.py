"""Filtered searches are native until their class is known to hold and to pay."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.collection import Hit, Id, SearchRequest
from amips_plugins.health.filters import DEARER, MISSES, NOT_MEASURED
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray
from tests.support import simulated_router as world
from tests.support.bundles import laid_out, write_bundle
from tests.support.routing_data import QUERIES, logged, only, pairs

Condition = Callable[[Id, Mapping[str, Any]], bool]
SEEN = 20  # seconds to wait for the watch's thread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


class Clocked(MemoryCollection):
    """Takes as long as it is told to, by a clock of its own."""

    def __init__(self, inner: MemoryCollection, routed: float = 0.5) -> None:
        self.__dict__ = inner.__dict__
        self.routed = routed
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        self.now += 1.0 if plan is NATIVE else self.routed
        return super().search(request, plan)


def eager(**more: Any) -> HealthMonitor:
    """A watch that looks at every search, at once."""
    return HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0, drift_share=0.0, **more)


def watched(
    monkeypatch: pytest.MonkeyPatch, routed: float = 0.5, **more: Any
) -> tuple[LearnedRouter, HealthMonitor, Clocked]:
    collection, watch = Clocked(world.collection(), routed), eager(**more)
    monkeypatch.setattr("amips_plugins.health.shadow_search.perf_counter", collection.clock)
    router = LearnedRouter(collection, hook=world.router(), refresh=None, watch=watch)
    return router, watch, collection


def half(key: Id, _: Mapping[str, Any]) -> bool:
    """Every other key, whatever its vector."""
    return int(key) % 2 == 0


def ask(
    router: LearnedRouter, watch: HealthMonitor, condition: Condition, seed: int, n: int
) -> list[tuple[str, str | None]]:
    """Search under a filter; return how each was answered."""
    answered = []
    for query in world.queries(seed, n):
        trace = router.search(query, filter=condition).trace
        assert watch.idle(SEEN)
        answered.append((trace.mode, trace.fallback))
    return answered


def recall(router: LearnedRouter, condition: Condition, rows: FloatArray) -> float:
    found = 0
    for query in rows:
        exact = router.collection.exact(SearchRequest(query[None], world.K, filter=condition))[0]
        hits = router.search(query, world.K, filter=condition)
        found += len({hit.id for hit in hits} & {hit.id for hit in exact})
    return found / len(rows) / world.K


@pytest.mark.slow
def test_a_class_is_routed_once_it_is_known_to_hold_and_pay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router, watch, collection = watched(monkeypatch)
    answered = ask(router, watch, half, 1, 1_200)
    assert answered[0] == ("native", NOT_MEASURED)
    assert router.fallbacks[NOT_MEASURED] > 20
    assert answered[-1] == ("route", None)
    assert recall(router, half, world.queries(2, 150)) >= world.RECALL - 0.01
    assert router.health is not None
    (known,) = router.health.filters
    assert (known.reason, known.shape) == (None, "half")
    assert known.widen is not None
    # What is known of one filter says nothing of others, nor of searches without any.
    one = router.search(world.queries(3, 1)[0], filter=only(*range(400))).trace
    assert (one.mode, one.fallback) == ("native", NOT_MEASURED)
    assert router.health.recall is None
    collection.routed = 3.0
    assert ask(router, watch, half, 4, 300)[-1] == ("native", DEARER)


@pytest.mark.slow
def test_a_filter_that_costs_more_stays_native(monkeypatch: pytest.MonkeyPatch) -> None:
    router, watch, _ = watched(monkeypatch, routed=0.9)
    assert ("route", None) not in ask(router, watch, half, 1, 300)
    assert router.search(world.queries(2, 1)[0], filter=half).trace.fallback == DEARER


def test_a_class_goes_back_when_its_recall_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    router, watch, collection = watched(monkeypatch, filters=[half])
    assert ask(router, watch, half, 1, 1) == [("route", None)]
    world.scramble(collection)
    assert ask(router, watch, half, 2, 100)[-1] == ("native", MISSES)


def drawn_filter(rng: np.random.Generator) -> Condition:
    """Some of the keys, whatever their vectors, or those of some of the cells, or all but those."""
    kind, share = rng.choice(["any", "cells", "not cells"]), float(rng.choice([0.5, 0.2, 0.05]))
    if kind == "any":
        passing = rng.random(world.COUNT) < share
    else:
        cells = rng.random(world.CELLS) < share
        passing = cells[world.cells()] == (kind == "cells")
    allowed: set[int] = set(np.flatnonzero(passing).tolist())

    def drawn(key: Id, _: Mapping[str, Any]) -> bool:
        return key in allowed

    return drawn


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_under_any_filter_the_target_is_kept_or_the_native_search_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = 200 if "AMIPS_NIGHTLY" in os.environ else 20
    rng, broken, dear, routed = np.random.default_rng(3), [], [], 0
    for draw in range(draws):
        condition, ratio = drawn_filter(rng), float(rng.choice([0.3, 0.6, 1.2]))
        k, target = int(rng.choice([5, 10])), float(rng.choice([0.7, 0.9]))
        router, watch, collection = watched(monkeypatch, routed=ratio)
        recalls = []
        for number, query in enumerate(world.queries(1_000 + draw, 600)):
            hits = router.search(query, k, recall=target, filter=condition)
            assert watch.idle(SEEN)
            if hits.trace.mode == "native":
                assert str(hits.trace.fallback).startswith(("filter: ", "cells: fewer"))
            if number >= 400 and hits.trace.fallback is None:
                request = SearchRequest(query[None], k, condition)
                exact = collection.exact(request)[0]
                recalls.append(len({h.id for h in hits} & {h.id for h in exact}) / len(exact))
        if len(recalls) > 100:
            routed += 1
            broken += [(draw, target, np.mean(recalls))] if np.mean(recalls) < target - 0.02 else []
            dear += [draw] if ratio > 1.0 else []
    assert routed >= draws // 10  # where it holds and pays
    assert len(broken) <= draws // 20, broken
    assert not dear


def test_what_is_answered_is_what_the_native_search_finds(folder: Path) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder, refresh=None, watch=eager())
    for condition in (only(), only(3), only(*range(50))):
        hits = router.search(QUERIES[0], k=5, filter=condition)
        (native,) = router.collection.search(SearchRequest(QUERIES[:1], 5, filter=condition))
        assert pairs(hits) == pairs(native)
        assert (hits.trace.mode, hits.trace.fallback) == ("native", NOT_MEASURED)


def test_the_callers_own_number_of_cells_is_taken(folder: Path) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder, refresh=None)
    hits = router.search(QUERIES[0], k=5, filter=only(*range(500)), n_probes=3)
    assert (hits.trace.mode, hits.trace.n_probes) == ("route", 3)


def test_a_native_router_tries_no_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    router, watch, collection = watched(monkeypatch)
    watch.add_overflow(0.9, 0.4)
    before = collection.now
    assert set(ask(router, watch, half, 1, 20)) == {("native", "health: native")}
    assert collection.now == before + 20


def test_a_failing_trial_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    router, watch, _ = watched(monkeypatch)

    def refuse(_: SearchRequest) -> list[list[Hit]]:
        raise ConnectionError("no exact search")

    monkeypatch.setattr(router.collection, "exact", refuse)
    ask(router, watch, half, 1, 5)
    assert watch.failures == {"ConnectionError": 5}
    assert [line for line in logged(caplog) if "no exact search" in line]
