"""Searching the collection itself, natively and routed, one query at a time."""

from __future__ import annotations

import time

import numpy as np

from amips_plugins.bundle.loading import given_cells
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.errors import BundleMismatch
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.health.recall import recall_at_k
from amips_plugins.models.hooks import NativeHook
from amips_plugins.progress import Progress, no_progress
from amips_plugins.report.data import Timings
from amips_plugins.routing.router import LearnedRouter
from amips_plugins.vectors import FloatArray

__all__ = ["MOST_QUERIES", "measure_timings"]

MOST_QUERIES = 300
_WARM_UP = 3


def measure_timings(
    collection: Collection,
    bundle: Bundle,
    queries: FloatArray,
    progress: Progress = no_progress,
) -> Timings:
    """Time the first 300 queries natively and routed, in turns; compare both with the exact search.

    Raises ``BundleMismatch`` where the bundle is of another collection, or of other cells.
    """
    manifest = bundle.manifest
    k = min(manifest.default_k, collection.count())
    larger_is_better = collection.info.metric.larger_is_better
    laid_out = manifest.layout and given_cells(bundle) is None
    if laid_out and collection.layout() != manifest.layout:
        raise BundleMismatch(
            f"Collection {collection.info.name!r} is not laid out in the cells of bundle "
            f"{manifest.version}; lay it out first, or report without --collection."
        )
    quiet = HealthMonitor(share=0.0, drift_share=0.0)
    routed = LearnedRouter(collection, bundle=bundle, refresh=None, watch=quiet)
    native = LearnedRouter(collection, hook=NativeHook(), refresh=None, watch=quiet)
    chosen = queries[:MOST_QUERIES]
    times: dict[str, list[float]] = {"native": [], "routed": []}
    found: dict[str, list[float]] = {"native": [], "routed": []}
    for query in chosen[:_WARM_UP]:
        native.search(query, k)
        routed.search(query, k)
    with progress("search", len(chosen), 0, "queries") as step:
        for query in chosen:
            exact = collection.exact(SearchRequest(query[None], k))[0]
            for name, router in (("native", native), ("routed", routed)):
                started = time.perf_counter()
                hits = router.search(query, k)
                times[name].append(1e3 * (time.perf_counter() - started))
                found[name].append(recall_at_k(hits, exact, k, larger_is_better=larger_is_better))
            step.advance()
    return Timings(
        k=k,
        target=manifest.default_recall,
        native_ms=times["native"],
        routed_ms=times["routed"],
        native_recall=float(np.mean(found["native"])),
        routed_recall=float(np.mean(found["routed"])),
        fallbacks=sum(routed.fallbacks.values()),
        caveat=collection.describe().first,
    )
