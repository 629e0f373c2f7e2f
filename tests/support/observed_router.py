"""What the tests of the observers share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from amips_plugins import LearnedRouter
from amips_plugins.collection import CollectionInfo
from amips_plugins.routing.observers import Observation, Observer
from amips_plugins.vectors import FloatArray, Metric
from tests.support.bundles import laid_out

INFO = CollectionInfo("memory", "docs", "vector", Metric.COSINE, 4)


def observed(queries: FloatArray, **changes: Any) -> Observation:
    """An observation of these queries."""
    info = CollectionInfo("memory", "docs", "vector", Metric.COSINE, queries.shape[1])
    fields: dict[str, Any] = {
        "collection": info,
        "queries": queries,
        "k": 10,
        "modes": {"native": len(queries)},
        "fallbacks": {},
        "routed": 0,
        "probes": 0,
        "scanned": None,
        "plan_seconds": 1e-5,
        "search_seconds": 1e-3,
        "version": None,
    }
    return Observation(**{**fields, **changes})


def numbered(first: int, count: int, dim: int = 4) -> FloatArray:
    """Queries that say which they are."""
    numbers = np.arange(first, first + count, dtype=np.float32)
    return np.repeat(numbers[:, None], dim, axis=1)


def watched_router(folder: Path, *observers: Observer) -> tuple[LearnedRouter, list[Observation]]:
    """A router that routes, and what an observer is told of it."""
    seen: list[Observation] = []
    note: Callable[[Observation], None] = seen.append
    router = LearnedRouter(
        laid_out(folder), bundle=folder, refresh=None, observers=[note, *observers]
    )
    return router, seen
