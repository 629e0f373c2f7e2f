"""What the tests of the router share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import Hits, LearnedRouter, MemoryCollection, Registry
from amips_plugins.collection import Hit, Id, SearchRequest, collection_key
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.vectors import FloatArray, IntArray
from tests.support.bundles import (
    memory,
    vectors,
    write_bundle,
)

QUERIES = vectors(seed=5, count=6)


class Spy(MemoryCollection):
    """Notes every search; ``failures`` are raised first, one a search."""

    def __init__(self, inner: MemoryCollection, failures: Sequence[Exception] = ()) -> None:
        self.__dict__ = inner.__dict__
        self.asked: list[tuple[SearchRequest, QueryPlan]] = []
        self.counted = 0
        self.layouts_asked = 0
        self.failures: Iterator[Exception] = iter(failures)

    def count(self) -> int:
        self.counted += 1
        return super().count()

    def layout(self) -> str | None:
        self.layouts_asked += 1
        return super().layout()

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        self.asked.append((request, plan))
        for failure in self.failures:
            raise failure
        return super().search(request, plan)


class Hook:
    """A user's own hook that gives whatever it was told to."""

    def __init__(self, give: Callable[[FloatArray], Any]) -> None:
        self.give = give

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        plan: QueryPlan = self.give(queries)
        return plan


def pairs(hits: Sequence[Hit]) -> list[tuple[Id, float]]:
    return [(hit.id, hit.score) for hit in hits]


def native(collection: MemoryCollection, k: int = 5, **more: Any) -> list[list[tuple[Id, float]]]:
    found = MemoryCollection.search(collection, SearchRequest(QUERIES, k, **more))
    return [pairs(hits) for hits in found]


TOO_FEW = "cells: fewer than k hits"


def assert_native(router: LearnedRouter, reason: str | None) -> list[Hits]:
    """The hits are those of the native search, and the trace says why."""
    collection = router.collection
    assert isinstance(collection, MemoryCollection)
    before = router.fallbacks.total()
    found: list[Hits] = router.search(QUERIES, k=5)
    assert [pairs(hits) for hits in found] == native(collection)
    for hits in found:
        assert hits.trace.mode == "native"
        assert hits.trace.n_probes is None
        if reason is None:
            assert hits.trace.fallback is None
        else:
            assert hits.trace.fallback is not None
            assert hits.trace.fallback.startswith(reason)
            assert router.fallbacks[hits.trace.fallback] >= 1
    assert router.fallbacks.total() == before + (reason is not None)
    return found


def publish(tmp_path: Path, **changes: Any) -> Registry:
    """Publish a bundle, and change it where the collection ``docs`` looks for its own."""
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "made"))
    if changes:  # which publishing would refuse
        write_bundle(Path(registry._home(collection_key(memory().info))) / "v1", **changes)
    return registry


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class DatabaseError(Exception):
    pass


def only(*keys: int) -> Callable[[Id, Mapping[str, Any]], bool]:
    """A filter that few keys pass."""
    return lambda key, _: key in keys


def recorded_cells(folder: Path) -> IntArray:
    recorded: IntArray = np.load(folder / "known_cells.npy")[:, 0]
    return recorded


def members_of(folder: Path, cell: int) -> list[int]:
    rows: list[int] = np.flatnonzero(recorded_cells(folder) == cell).tolist()
    return rows
