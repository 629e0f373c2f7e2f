"""A router follows its collection and its registry, and nobody notices."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection, Registry
from amips_plugins.bundle.contents import MODEL
from amips_plugins.collection import CollectionKey, collection_key
from amips_plugins.errors import InvalidInput
from amips_plugins.layout import lay_out
from amips_plugins.models.hooks import NativeHook
from amips_plugins.routing.router import Trace
from tests.support.bundles import (
    COUNT,
    laid_out,
    memory,
    open_bundle,
    other_cells,
    vectors,
    write_bundle,
)
from tests.support.generations import Gone, World, generation
from tests.support.routing_data import QUERIES, DatabaseError, Spy, logged, native, pairs

KEY = collection_key(memory().info)


@dataclass
class Published:
    """A registry with bundle v1, and v2 (of other cells) to be published."""

    registry: Registry
    first: Path
    second: Path

    def publish_second(self) -> None:
        self.registry.publish(self.second)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    registry = Registry(tmp_path / "registry")
    first = write_bundle(tmp_path / "v1")
    registry.publish(first)
    return Published(
        registry, first, write_bundle(tmp_path / "v2", version="v2", change=other_cells)
    )


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def routed(router: LearnedRouter) -> Trace:
    trace: Trace = router.search(QUERIES[0], k=3, n_probes=2).trace
    return trace


def test_nothing_new_is_nothing_done(published: Published) -> None:
    collection = laid_out(published.first)
    router = LearnedRouter(collection, registry=published.registry, refresh=None)
    before = router._follower.serving
    assert not router.refresh()
    assert router._follower.serving is before
    for source in ({"bundle": published.first}, {"hook": NativeHook()}):
        assert not LearnedRouter(collection, **source).refresh()


def test_a_new_bundle_of_the_same_cells_is_used(published: Published, tmp_path: Path) -> None:
    collection = laid_out(published.first)
    router = LearnedRouter(collection, registry=published.registry, refresh=None)
    published.registry.publish(write_bundle(tmp_path / "again", version="v1b"))
    assert routed(router).version == "v1"
    assert router.refresh()
    assert routed(router) == Trace("route", n_probes=2, version="v1b")
    published.registry.roll_back(KEY)
    assert router.refresh()
    assert routed(router) == Trace("route", n_probes=2, version="v1")


def test_a_bundle_of_new_cells_waits_for_them(
    published: Published, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(generation(1, published.first))
    router = LearnedRouter(world.open(), registry=published.registry, refresh=None)
    published.publish_second()
    with caplog.at_level(logging.INFO, "amips_plugins"):
        router.refresh()
        router.refresh()
    assert caplog.text.count("Bundle v1 serves 'docs' until it is laid out") == 1
    assert routed(router) == Trace("route", n_probes=2, version="v1")
    # A router that starts now does the same.
    other = LearnedRouter(world.open(), registry=published.registry, refresh=None)
    assert routed(other) == Trace("route", n_probes=2, version="v1")
    world.switch(generation(2, published.second))
    for each in (router, other):
        assert routed(each).version == "v1"  # as long as nobody has looked
        assert each.refresh()
        assert routed(each) == Trace("route", n_probes=2, version="v2")
        assert each.collection.info.name == "docs__g2"
        assert not each.fallbacks


def test_cells_roll_back_under_the_router(published: Published) -> None:
    first = generation(1, published.first)
    world = World(first)
    published.publish_second()
    router = LearnedRouter(world.open(), registry=published.registry, refresh=None)
    world.switch(generation(2, published.second))
    router.refresh()
    world.switch(first)
    assert router.refresh()
    assert routed(router) == Trace("route", n_probes=2, version="v1")


def test_a_collection_that_gets_its_cells_heals(published: Published) -> None:
    collection = memory()
    for source in ({"registry": published.registry}, {"bundle": published.first}):
        collection = memory()
        router = LearnedRouter(collection, refresh=None, **source)
        assert routed(router) == Trace("native", version="v1", fallback="cells: not laid out")
        assert not router.refresh()
        lay_out(collection, open_bundle(published.first))
        assert router.refresh()
        assert routed(router) == Trace("route", n_probes=2, version="v1")


def test_cells_of_another_bundle_are_searched_natively(published: Published) -> None:
    collection = laid_out(published.first)
    router = LearnedRouter(collection, bundle=published.second, refresh=None)
    assert routed(router) == Trace("native", version="v2", fallback="cells: of another bundle")
    assert pairs(router.search(QUERIES, k=5)[0]) == native(collection)[0]


def test_a_bundle_that_comes_later_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_bundle(tmp_path / "v1")
    registry = Registry(tmp_path / "registry")
    router = LearnedRouter(laid_out(folder), registry=registry, refresh=None)
    assert not router.refresh()
    assert not router.refresh()
    assert len(logged(caplog)) == 1  # that there is none, once
    registry.publish(folder)
    assert router.refresh()
    assert routed(router).mode == "route"


def test_a_bad_new_bundle_is_refused_and_the_old_one_serves(
    published: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    router = LearnedRouter(laid_out(published.first), registry=published.registry, refresh=None)
    folder = write_bundle(tmp_path / "bad", version="v3")
    published.registry.publish(folder)
    (model,) = (tmp_path / "registry").rglob(f"v3/{MODEL}")
    good = model.read_bytes()
    model.write_bytes(good[:-1] + b"?")
    for _ in range(3):
        assert not router.refresh()
        assert routed(router) == Trace("route", n_probes=2, version="v1")
    (line,) = logged(caplog)
    assert "serves 'docs' on" in line
    assert "v3" in line
    assert not router.fallbacks
    model.write_bytes(good)
    assert router.refresh()
    assert routed(router).version == "v3"


def test_what_cannot_be_reached_is_logged_once_and_everything_serves_on(
    published: Published, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(generation(1, published.first))
    router = LearnedRouter(world.open(), registry=published.registry, refresh=None)

    def out_of_reach(_: str) -> bytes:
        raise ConnectionError("registry away")

    for _ in range(2):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(published.registry, "_read", out_of_reach)
            for _ in range(3):
                assert not router.refresh()
        assert len(logged(caplog)) == 1
        assert "registry away" in logged(caplog)[0]
        assert not router.refresh()  # it is back, and may go away again
    caplog.clear()
    world.failure = ConnectionError("database away")
    for _ in range(3):
        assert not router.refresh()
    assert ["database away" in line for line in logged(caplog)] == [True]
    assert routed(router) == Trace("route", n_probes=2, version="v1")


def test_an_alias_moved_to_another_collection(published: Published) -> None:
    """Its bundle is not for that one: natively, and from where the alias points."""
    world = World(generation(1, published.first))
    sources: list[dict[str, Any]] = [
        {"registry": published.registry},
        {"bundle": published.first},
        {"hook": NativeHook()},
    ]
    routers = [LearnedRouter(world.open(), refresh=None, **source) for source in sources]
    world.switch(MemoryCollection(vectors(seed=9), name="others", fields=[{}] * COUNT))
    for router in routers:
        assert router.refresh()
        (hits,) = router.search(QUERIES[:1], k=3)
        assert pairs(hits) == native(world.serves, 3)[0]
        assert hits.trace.mode == "native"


def test_a_mismatch_of_the_latest_bundle_names_it(tmp_path: Path) -> None:
    other = CollectionKey(database="memory", name="other", field="vector")
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "made", collection=other))
    router = LearnedRouter(memory(), registry=registry, refresh=None)
    assert router.search(QUERIES[0]).trace.fallback == "bundle: BundleNotFound"


def test_a_refresh_time_that_is_none_is_refused() -> None:
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(InvalidInput, match="refresh="):
            LearnedRouter(memory(), hook=NativeHook(), refresh=seconds)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="overflow_warning="):
            LearnedRouter(memory(), hook=NativeHook(), overflow_warning=share)


# By itself


def test_a_search_that_finds_the_time_come_refreshes_off_its_path(published: Published) -> None:
    world = World(generation(1, published.first))
    router = LearnedRouter(world.open(), registry=published.registry, refresh=0.05)
    started = threading.active_count()
    published.publish_second()
    world.switch(generation(2, published.second))
    time.sleep(0.06)
    wait_until(lambda: routed(router).version == "v2")
    assert not router.fallbacks
    wait_until(lambda: threading.active_count() <= started)  # no thread stays


def test_without_searches_nothing_is_asked(published: Published) -> None:
    world = World(generation(1, published.first))
    router = LearnedRouter(world.open(), registry=published.registry, refresh=0.01)
    time.sleep(0.05)
    assert world.looked == 0
    LearnedRouter(world.open(), registry=published.registry, refresh=None).search(QUERIES)
    assert world.looked == 0
    assert router.learned


def test_a_failed_routed_search_hurries_the_refresh_but_not_too_often(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(laid_out(published.first), [DatabaseError("partition gone")] * 50)
    router = LearnedRouter(spy, bundle=published.first)
    looked = 0
    follow = spy.current

    def count() -> Any:
        nonlocal looked
        looked += 1
        return follow()

    spy.current = count  # type: ignore[method-assign]
    for _ in range(5):
        with pytest.raises(DatabaseError):
            router.search(QUERIES, k=5)
    by_searches = 5
    assert looked == by_searches  # a router looks when it is made; a second has to pass
    monkeypatch.setattr(router._refresher, "_soonest", 0.0)
    with pytest.raises(DatabaseError):
        router.search(QUERIES, k=5)
    wait_until(lambda: looked == by_searches + 2)


# Generations that are gone


def test_a_dropped_generation_is_searched_in_the_next_one(published: Published) -> None:
    for source in ({"bundle": published.first}, {"hook": NativeHook()}):
        world = World(generation(1, published.first))
        router = LearnedRouter(world.open(), **source)
        world.switch(generation(2, published.second), drop=True)
        found = router.search(QUERIES, k=5, fields=["generation"])
        assert [pairs(hits) for hits in found] == native(world.serves)
        assert {hit.fields["generation"] for hits in found for hit in hits} == {2}
        assert {hits.trace.fallback for hits in found} == {"search: Gone"}
        assert {hits.trace.mode for hits in found} == {"native"}
        assert world.looked == 1
        assert router.fallbacks == {"search: Gone": 1}


def test_a_generation_dropped_between_two_searches_of_one_call(published: Published) -> None:
    """The rows found before are not kept: they are of the old generation."""
    world = World(generation(1, published.first))

    class DropsAfter(type(world.open())):  # type: ignore[misc]
        def search(self, *asked: Any) -> Any:
            found = super().search(*asked)
            world.switch(generation(2, published.second), drop=True)
            return found

    handle = DropsAfter(world, world.serves)
    router = LearnedRouter(handle, bundle=published.first)
    sizes = np.bincount(np.load(published.first / "known_cells.npy")[:, 0])
    k = int(np.sort(sizes)[len(sizes) // 2])
    found = router.search(QUERIES, k=k, n_probes=1, fields=["generation"])
    assert {hit.fields["generation"] for hits in found for hit in hits} == {2}
    assert [pairs(hits) for hits in found] == native(world.serves, k)


def test_an_error_that_no_other_generation_explains_is_the_databases(published: Published) -> None:
    world = World(generation(1, published.first))
    router = LearnedRouter(world.open(), bundle=published.first)
    world.dropped.append(world.serves)
    with pytest.raises(Gone):
        router.search(QUERIES, k=5)
    assert world.looked == 1
    world.failure = ConnectionError("away")
    with pytest.raises(Gone):  # not the error of looking
        router.search(QUERIES, k=5)
    assert not router.fallbacks


def test_no_second_search_after_the_deadline(published: Published) -> None:
    world = World(generation(1, published.first))
    router = LearnedRouter(world.open(), hook=NativeHook())
    world.switch(generation(2, published.second), drop=True)
    with pytest.raises(Gone):
        router.search(QUERIES, k=5, timeout=1e-9)
    assert world.looked == 0


# All at once


@pytest.mark.slow
def test_searches_during_switches_never_fail_and_never_mix(published: Published) -> None:
    world = World(generation(1, published.first))
    published.publish_second()
    router = LearnedRouter(world.open(), registry=published.registry, refresh=0.001)
    stop, failures = threading.Event(), []
    seen: list[set[tuple[int, str | None, str]]] = [set() for _ in range(4)]

    def search(thread: int) -> None:
        queries = vectors(seed=100 + thread, count=5)
        try:
            while not stop.is_set():
                found = router.search(queries, k=4, n_probes=2, fields=["generation"])
                (number,) = {hit.fields["generation"] for hits in found for hit in hits}
                for hits in found:
                    assert len(hits) == 4
                    seen[thread].add((number, hits.trace.version, hits.trace.mode))
        except BaseException as exc:  # noqa: BLE001 - it is the test's to raise
            failures.append(exc)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    folders = [published.first, published.second]
    for number in range(2, 14):
        world.switch(generation(number, folders[(number - 1) % 2]), drop=True)
        time.sleep(0.05)
    wait_until(lambda: router.collection.info.name == "docs__g13")
    time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    everything = set().union(*seen)
    assert len({number for number, _, _ in everything}) > 4
    # A routed answer is by the bundle whose cells its generation has.
    routes = {(number % 2, version) for number, version, mode in everything if mode == "route"}
    assert routes == {(1, "v1"), (0, "v2")}
    expected = {"search: Gone", "breaker: search", "cells: fewer than k hits"}
    assert set(router.fallbacks) <= expected
