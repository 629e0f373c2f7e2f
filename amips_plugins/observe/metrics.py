"""Prometheus metrics of routers; needs the extra ``metrics``."""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from amips_plugins.errors import require

require("prometheus_client", "metrics")

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from amips_plugins.collection import collection_key
from amips_plugins.health.gate import Health, State
from amips_plugins.routing.observers import Observation
from amips_plugins.routing.router import LearnedRouter

__all__ = ["RouterMetrics"]

_PLAN = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)
_SEARCH = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0, 2.0, 5.0, 10.0)
_STATES: Mapping[State, float] = {"healthy": 0.0, "widened": 1.0, "native": 2.0}
_LABELS = ("database", "collection", "field")


class RouterMetrics(Collector):
    """A collector of what routers do, one time series a collection; nothing is asked in a scrape.

    ===========================  =========  ====================================================
    metric                       kind       meaning
    ===========================  =========  ====================================================
    ``amips_queries_total``      counter    queries answered, by ``mode``
    ``amips_fallbacks_total``    counter    calls and writes without the model, by ``reason``
    ``amips_probes``             summary    cells chosen for a routed query
    ``amips_scanned_share``      summary    share of the keys scanned for a routed query
    ``amips_plan_seconds``       histogram  time of the plan, a call
    ``amips_search_seconds``     histogram  time in the database's client, a call
    ``amips_overflow_share``     gauge      share of keys without a cell, at the last refresh
    ``amips_learned``            gauge      1 where a model is loaded, else 0
    ``amips_bundle_info``        gauge      1, with ``version`` and ``model`` of the bundle
    ``amips_health``             gauge      0 healthy, 1 widened, 2 native (``health.gate``)
    ``amips_shadow_recall``      gauge      mean recall of sampled answers in this state
    ``amips_shadow_recall_low``  gauge      its lower bound, 95 % on both sides
    ``amips_drift_p``            gauge      p-value of the latest window of live queries
    ===========================  =========  ====================================================

    All of them have the labels ``database``, ``collection`` and ``field``.

    Parameters
    ----------
    routers
        Whom to watch. A registry takes one collector: give it all routers of the process, or
        ``watch`` them later.
    registry
        Where to register; None not to.

    Examples
    --------
    >>> import numpy as np
    >>> from prometheus_client import CollectorRegistry
    >>> from amips_plugins import LearnedRouter, MemoryCollection
    >>> registry = CollectorRegistry()
    >>> router = LearnedRouter(MemoryCollection(np.eye(3)))
    >>> metrics = RouterMetrics(router, registry=registry)
    >>> _ = router.search([0.0, 1.0, 0.0], k=1)
    >>> labels = {"database": "memory", "collection": "memory", "field": "vector"}
    >>> registry.get_sample_value("amips_queries_total", {**labels, "mode": "native"})
    1
    """

    def __init__(
        self, *routers: LearnedRouter, registry: CollectorRegistry | None = REGISTRY
    ) -> None:
        self._watched: list[tuple[LearnedRouter, _Counts]] = []
        for router in routers:
            self.watch(router)
        if registry is not None:
            registry.register(self)

    def watch(self, router: LearnedRouter) -> None:
        """Watch one more router; two of the same collection count together."""
        key = collection_key(router.collection.info)
        labels = (key.database, key.name, key.field)
        known = [counts for _, counts in self._watched if counts.labels == labels]
        counts = known[0] if known else _Counts(labels)
        self._watched.append((router, counts))
        router.observe(counts.note)

    def describe(self) -> Iterable[Metric]:
        """Name the metrics, so that a registry can refuse a second collector of them."""
        return _Families().all()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as they are now."""
        families = _Families()
        fallbacks: dict[tuple[str, ...], Counter[str]] = {}
        latest: dict[tuple[str, ...], tuple[LearnedRouter, _Counts]] = {}
        for router, counts in list(self._watched):
            reasons = dict(router.fallbacks)  # one step, while searches may add to it
            fallbacks.setdefault(counts.labels, Counter()).update(reasons)
            latest[counts.labels] = router, counts
        for labels, (router, counts) in latest.items():
            families.add_counts(counts)
            families.add_router(labels, router, fallbacks[labels])
        return families.all()


class _Histogram:
    """Counts of times by upper bound, as Prometheus wants them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return every upper bound with the number of values up to it."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


class _Counts:
    """What the searches of one collection added up to."""

    def __init__(self, labels: tuple[str, str, str]) -> None:
        self.labels = labels
        self.lock = threading.Lock()
        self.modes = dict.fromkeys(("route", "rewrite", "native"), 0)
        self.routed = self.probes = self.measured = 0
        self.scanned = 0.0
        self.plan = _Histogram(_PLAN)
        self.search = _Histogram(_SEARCH)

    def note(self, observation: Observation) -> None:
        """Count one search."""
        with self.lock:
            for mode, count in observation.modes.items():
                self.modes[mode] = self.modes.get(mode, 0) + count
            self.routed += observation.routed
            self.probes += observation.probes
            if observation.scanned is not None:
                self.measured += observation.routed
                self.scanned += observation.scanned
            self.plan.note(observation.plan_seconds)
            self.search.note(observation.search_seconds)


class _Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        self.queries = CounterMetricFamily(
            "amips_queries", "Queries answered.", labels=(*_LABELS, "mode")
        )
        self.fallbacks = CounterMetricFamily(
            "amips_fallbacks", "Calls and writes without the model.", labels=(*_LABELS, "reason")
        )
        self.probes = SummaryMetricFamily(
            "amips_probes", "Cells chosen for a routed query.", labels=_LABELS
        )
        self.scanned = SummaryMetricFamily(
            "amips_scanned_share", "Share of the keys scanned for a routed query.", labels=_LABELS
        )
        self.plan = HistogramMetricFamily(
            "amips_plan_seconds", "Time of the plan, a call.", labels=_LABELS
        )
        self.search = HistogramMetricFamily(
            "amips_search_seconds", "Time in the database's client, a call.", labels=_LABELS
        )
        self.overflow = GaugeMetricFamily(
            "amips_overflow_share", "Share of keys without a cell.", labels=_LABELS
        )
        self.learned = GaugeMetricFamily(
            "amips_learned", "1 where a model is loaded, else 0.", labels=_LABELS
        )
        self.bundle = GaugeMetricFamily(
            "amips_bundle_info", "1; the bundle in use.", labels=(*_LABELS, "version", "model")
        )

        self.health = GaugeMetricFamily(
            "amips_health", "0 healthy, 1 widened, 2 native.", labels=_LABELS
        )
        self.recall = GaugeMetricFamily(
            "amips_shadow_recall", "Mean recall of sampled answers.", labels=_LABELS
        )
        self.recall_low = GaugeMetricFamily(
            "amips_shadow_recall_low", "Lower bound of the mean recall.", labels=_LABELS
        )
        self.drift = GaugeMetricFamily(
            "amips_drift_p", "p-value of the latest window of live queries.", labels=_LABELS
        )

    def all(self) -> list[Metric]:
        return list(vars(self).values())

    def add_counts(self, counts: _Counts) -> None:
        """Add what the searches of one collection added up to, all of one moment."""
        labels = counts.labels
        with counts.lock:
            for mode, count in counts.modes.items():
                self.queries.add_metric((*labels, mode), count)
            self.probes.add_metric(labels, counts.routed, counts.probes)
            self.scanned.add_metric(labels, counts.measured, counts.scanned)
            for family, times in ((self.plan, counts.plan), (self.search, counts.search)):
                family.add_metric(labels, times.buckets(), times.total)

    def add_router(
        self, labels: tuple[str, ...], router: LearnedRouter, fallbacks: Mapping[str, int]
    ) -> None:
        """Add what a router knows of itself."""
        for reason, count in fallbacks.items():
            self.fallbacks.add_metric((*labels, reason), count)
        manifest, overflow = router.manifest, router.last_overflow_share
        if overflow is not None:
            self.overflow.add_metric(labels, overflow)
        self.learned.add_metric(labels, float(router.learned))
        if manifest is not None:
            self.bundle.add_metric((*labels, manifest.version, manifest.model), 1.0)
        health = router.health  # taken once: it may change meanwhile
        if health is not None:
            self._add_health(labels, health)

    def _add_health(self, labels: tuple[str, ...], health: Health) -> None:
        self.health.add_metric(labels, _STATES[health.state])
        if health.recall is not None:
            self.recall.add_metric(labels, health.recall.mean)
            self.recall_low.add_metric(labels, health.recall.low)
        if health.drift is not None:
            self.drift.add_metric(labels, health.drift.p_value)
