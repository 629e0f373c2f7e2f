"""Live searches hold a router to its target: the watch, wired into the search."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, Registry
from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.errors import InvalidInput
from amips_plugins.health.gate import Health
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from tests.support import simulated_router as world
from tests.support.bundles import COUNT, laid_out, memory, vectors, write_bundle
from tests.support.routing_data import QUERIES, Hook, Spy, assert_native, only, pairs

SEEN = 20  # seconds to wait for the watch's thread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def eager(**more: Any) -> HealthMonitor:
    """A watch that looks at every search, at once."""
    settings: dict[str, Any] = {
        "share": 1.0,
        "at_most_every": 0.0,
        "at_most_busy": 1.0,
        "drift_share": 0.0,
    }
    return HealthMonitor(**{**settings, **more})


def ask(
    router: LearnedRouter,
    watch: HealthMonitor,
    queries: FloatArray,
    until: Callable[[Health], bool],
) -> None:
    """Search until the router is so, for as many queries as there are."""
    for query in queries:
        router.search(query)
        assert watch.idle(SEEN)
        if router.health is not None and until(router.health):
            return
    raise AssertionError(f"after {len(queries)} searches it is {router.health}")


@pytest.mark.slow
def test_a_router_whose_cells_go_bad_hands_over_and_comes_back() -> None:
    states: list[str] = []
    watch = eager(on_change=lambda health: states.append(health.state))
    collection, queries = world.collection(), world.queries(9, 3000)
    router = LearnedRouter(collection, hook=world.router(), refresh=None, watch=watch)
    ask(router, watch, queries, lambda health: health.recall is not None and health.recall.n == 9)
    assert states == []
    world.scramble(collection)
    ask(router, watch, queries, lambda health: health.state == "native")
    assert [state for state, _ in itertools.groupby(states)] == ["widened", "native"]
    hits = router.search(queries[0])
    assert (hits.trace.mode, hits.trace.fallback) == ("native", "health: native")
    assert router.fallbacks["health: native"] >= 1
    world.mend(collection)
    ask(router, watch, queries, lambda health: health.state == "healthy")
    assert [state for state, _ in itertools.groupby(states)] == [
        "widened",
        "native",
        "widened",
        "healthy",
    ]
    assert router.search(queries[0]).trace.mode == "route"


def test_widened_searches_look_further(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = eager(share=0.0)
    router = LearnedRouter(laid_out(folder), bundle=folder, refresh=None, watch=watch)
    before = [hits.trace for hits in router.search(QUERIES, k=3, recall=0.5)]
    given = router.search(QUERIES, k=3, n_probes=2)
    monkeypatch.setattr(router._follower.serving.watch, "health", Health("widened", "now"))
    after = [hits.trace for hits in router.search(QUERIES, k=3, recall=0.5)]
    probes = [(a.n_probes or 99, b.n_probes or 99) for a, b in zip(before, after, strict=True)]
    assert all(wider >= narrow for narrow, wider in probes)
    assert sum(wider for _, wider in probes) > sum(narrow for narrow, _ in probes)
    # What the caller has decided stays decided, in every state.
    for state in ("widened", "native"):
        monkeypatch.setattr(router._follower.serving.watch, "health", Health(state, "now"))
        again = router.search(QUERIES, k=3, n_probes=2)
        assert [hits.trace for hits in again] == [hits.trace for hits in given]
    assert_native(router, "health: native")


@pytest.mark.parametrize(
    "how",
    [{"filter": only(*range(COUNT))}, {"n_probes": 2}],
    ids=["filter", "probes"],
)
def test_searches_without_a_promise_are_not_sampled(folder: Path, how: dict[str, Any]) -> None:
    spy = Spy(laid_out(folder))
    watch = eager()
    router = LearnedRouter(spy, bundle=folder, refresh=None, watch=watch)
    for query in vectors(seed=3, count=20):
        router.search(query, k=3, **how)
    assert watch.idle(SEEN)
    assert router.health is not None
    assert router.health.recall is None


def test_native_answers_in_place_of_a_broken_model_are_not_sampled() -> None:
    def fail(_: FloatArray) -> QueryPlan:
        raise RuntimeError("no model")

    watch = eager()
    router = LearnedRouter(memory(), hook=Hook(fail), watch=watch)
    for query in QUERIES:
        router.search(query, k=3)
    assert watch.idle(SEEN)
    assert router.health is not None
    assert router.health.recall is None


def test_one_query_of_a_batch_is_sampled_and_answers_stay_what_they_are(folder: Path) -> None:
    watch, watched = eager(), laid_out(folder)
    router = LearnedRouter(watched, bundle=folder, refresh=None, watch=watch)
    plain = LearnedRouter(laid_out(folder), bundle=folder, refresh=None)
    for _ in range(5):
        found = router.search(QUERIES, k=4)
        assert [pairs(hits) for hits in found] == [
            pairs(hits) for hits in plain.search(QUERIES, k=4)
        ]
        assert watch.idle(SEEN)
    assert router.health is not None
    assert router.health.recall is not None
    assert router.health.recall.n == 5


def test_a_new_bundle_starts_healthy(tmp_path: Path, folder: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(folder)
    collection = laid_out(folder)
    watch = eager()
    router = LearnedRouter(collection, registry=registry, refresh=None, watch=watch)
    collection._cells = np.random.default_rng(0).permutation(collection._cells)
    ask(router, watch, vectors(seed=77, count=500), lambda health: health.state != "healthy")
    registry.publish(write_bundle(tmp_path / "v2", version="v2"))
    assert router.refresh()
    assert router.health is not None
    assert router.health.state == "healthy"


def test_too_much_overflow_is_searched_natively(folder: Path) -> None:
    class Costly(Spy):
        break_even = 0.25

    collection = Costly(laid_out(folder))
    router = LearnedRouter(collection, bundle=folder, refresh=None, watch=eager(share=0.0))
    cells = collection._cells.copy()
    collection._cells[: COUNT // 2] = OVERFLOW
    router.refresh()
    assert router.search(QUERIES[0], k=3).trace.fallback == "health: native"
    collection._cells = cells
    router.overflow_share()
    assert router.search(QUERIES[0], k=3).trace.mode == "route"


def test_queries_that_drift_widen_the_search(folder: Path) -> None:
    watch = eager(share=0.0, drift_share=1.0)
    router = LearnedRouter(laid_out(folder), bundle=folder, refresh=None, watch=watch)
    rng = np.random.default_rng(0)
    strange = (vectors()[0] + 0.01 * rng.standard_normal((600, 4))).astype(np.float32)
    for query in strange:
        router.search(query, k=3)
    assert watch.idle(SEEN)
    assert router.health is not None
    assert router.health.state == "widened"
    assert router.health.drift is not None
    assert router.health.drift.found


def test_without_a_model_there_is_nothing_to_watch(tmp_path: Path) -> None:
    router = LearnedRouter(memory(), registry=tmp_path / "none", watch=eager())
    assert router.health is None
    router.search(QUERIES[0], k=3)


def test_a_user_hook_may_read_the_widening() -> None:
    seen: list[float] = []

    class Reads:
        def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
            seen.append(target.widen)
            raise InvalidInput("seen")

    with pytest.raises(InvalidInput, match="seen"):
        LearnedRouter(memory(), hook=Reads()).search(QUERIES[0], k=3)
    assert seen == [1.0]
