"""Keys whose vectors others have changed: found by looking at a few, and not routed past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection, Registry
from amips_plugins.bundle.loading import known_cells
from amips_plugins.routing.hits import Trace
from tests.support.bundles import laid_out, open_bundle, vectors, write_bundle
from tests.support.routing_data import QUERIES, logged, native, pairs

STALE = "cells: stale"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "v1")


def rewrite(collection: MemoryCollection, count: int) -> None:
    """Change vectors as a writer does who knows of no cells."""
    collection._vectors[:count] = vectors(seed=99, count=count)


def routed(router: LearnedRouter) -> Trace:
    trace: Trace = router.search(QUERIES[0], k=5, n_probes=2).trace
    return trace


def mend(collection: MemoryCollection, folder: Path) -> int:
    return collection.layouts.backfill(known_cells(open_bundle(folder)), verify=True)


def test_stale_cells_are_not_routed_past(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    collection = laid_out(folder)
    rewrite(collection, 5)
    router = LearnedRouter(collection, bundle=folder, refresh=None)
    hits = router.search(QUERIES, k=5)
    assert {(h.trace.mode, h.trace.fallback) for h in hits} == {("native", STALE)}
    assert [pairs(h) for h in hits] == native(collection)
    assert router.fallbacks == {STALE: 1}
    (found, answers) = logged(caplog)
    assert "5 of 48 keys of 'docs'" in found
    assert "amips backfill --verify" in found
    assert "amips backfill --verify" in answers
    serving = router._follower.serving
    for _ in range(3):
        assert not router.refresh()  # nothing is replaced, nor said again
    assert router._follower.serving is serving
    assert len(logged(caplog)) == 2

    assert mend(collection, folder) == 5
    assert router.refresh()
    assert routed(router) == Trace("route", n_probes=2, version="v1")


def test_cells_that_go_stale_are_found_by_a_refresh(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(folder)
    collection = laid_out(folder)
    router = LearnedRouter(collection, registry=registry, refresh=None)
    assert routed(router).fallback is None
    rewrite(collection, 5)
    assert router.refresh()
    assert routed(router).fallback == STALE
    assert not router.refresh()
    # What is published meanwhile serves as soon as the cells are sound.
    registry.publish(write_bundle(tmp_path / "v2", version="v2"))
    router.refresh()
    assert routed(router) == Trace("native", version="v2", fallback=STALE)
    mend(collection, folder)
    assert router.refresh()
    assert routed(router) == Trace("route", n_probes=2, version="v2")


def test_in_the_background_cells_are_looked_at_now_and_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("amips_plugins.routing.refresh.time.monotonic", lambda: clock[0])
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder, refresh=None)
    rewrite(collection, 5)
    look = router._follower.look
    clock[0] += 599.0
    assert not look()
    clock[0] += 2.0
    assert look()
    mend(collection, folder)
    clock[0] += 59.0
    assert not look()
    clock[0] += 2.0
    assert look()
    assert routed(router).mode == "route"


def test_a_dear_look_is_rare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("amips_plugins.routing.refresh.time.monotonic", lambda: clock[0])
    collection = laid_out(folder)
    looked: list[float] = []
    overflow = collection.overflow

    def count() -> int:
        looked.append(clock[0])
        clock[0] += 3.0
        return overflow()

    monkeypatch.setattr(collection, "overflow", count)
    router = LearnedRouter(collection, bundle=folder, refresh=None)
    for _ in range(30):
        router._follower.look()
        clock[0] += 30.0
    assert len(looked) == 3
    assert min(np.diff(looked)) >= 300.0
    router.overflow_share()
    assert len(looked) == 4


def test_a_few_stale_keys_stop_nobody(folder: Path) -> None:
    collection = laid_out(folder)
    rewrite(collection, 2)
    assert routed(LearnedRouter(collection, bundle=folder)).mode == "route"


def test_a_look_that_is_refused_stops_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(MemoryCollection):
        refuses = True

        def __init__(self, inner: MemoryCollection) -> None:
            self.__dict__ = inner.__dict__

        @property
        def layouts(self) -> Any:
            if self.refuses:
                raise PermissionError("not for you")
            return super().layouts

    collection = Refusing(laid_out(folder))
    router = LearnedRouter(collection, bundle=folder, refresh=None)
    assert routed(router).mode == "route"
    assert logged(caplog) == []
    rewrite(collection, 5)
    monkeypatch.setattr(Refusing, "refuses", False)
    router.refresh()
    monkeypatch.setattr(Refusing, "refuses", True)
    router.refresh()
    assert routed(router).fallback == STALE  # as it was last known
