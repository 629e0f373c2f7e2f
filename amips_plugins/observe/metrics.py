"""Prometheus metrics of routers; needs the extra ``metrics``."""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from amips_plugins.errors import require

require("prometheus_client", "metrics")

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from amips_plugins.collection import collection_key
from amips_plugins.health.gate import State
from amips_plugins.routing.observers import Observation
from amips_plugins.routing.router import LearnedRouter

__all__ = ["RouterMetrics"]

_PLAN = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)
_SEARCH = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0, 2.0, 5.0, 10.0)
_STATES: Mapping[State, float] = {"healthy": 0.0, "widened": 1.0, "native": 2.0}
_MODES = ("route", "rewrite", "tuned", "exact", "native")
_LABELS = ("database", "collection", "field")
_GAUGES = {
    "amips_overflow_share": "Share of keys without a cell.",
    "amips_learned": "1 where a model is loaded, else 0.",
    "amips_health": "0 healthy, 1 widened, 2 native.",
    "amips_shadow_recall": "Mean recall of sampled answers.",
    "amips_shadow_recall_low": "Lower bound of the mean recall.",
    "amips_drift_p": "p-value of the latest window of live queries.",
}
_Labels = tuple[str, str, str]


class RouterMetrics(Collector):
    """A collector of what routers do, one time series a collection; nothing is asked in a scrape.

    ===========================  =========  ====================================================
    metric                       kind       meaning
    ===========================  =========  ====================================================
    ``amips_queries_total``      counter    queries answered, by ``mode``
    ``amips_fallbacks_total``    counter    calls and writes without the model, by ``reason``
    ``amips_left_out_total``     counter    queries answered without one of several collections,
                                            by ``source``
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
    1.0
    """

    def __init__(
        self, *routers: LearnedRouter, registry: CollectorRegistry | None = REGISTRY
    ) -> None:
        self._searches = _Searches()
        self._watched: list[tuple[_Labels, LearnedRouter]] = []
        for router in routers:
            self.watch(router)
        if registry is not None:
            registry.register(self)

    def watch(self, router: LearnedRouter) -> None:
        """Watch one more router; two of the same collection count together."""
        key = collection_key(router.collection.info)
        labels = (key.database, key.name, key.field)
        self._watched.append((labels, router))
        router.observe(self._searches.counting(labels))

    def describe(self) -> Iterable[Metric]:
        """Name the metrics, so that a registry can refuse a second collector of them."""
        return [*_Searches().collect(), *_states([])]

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as they are now."""
        return [*self._searches.collect(), *_states(list(self._watched))]


class _Searches:
    """What is counted with every search."""

    def __init__(self) -> None:
        own = self._own = CollectorRegistry()
        self._queries = Counter(
            "amips_queries", "Queries answered.", (*_LABELS, "mode"), registry=own
        )
        self._left_out = Counter(
            "amips_left_out",
            "Queries answered without one of several collections.",
            (*_LABELS, "source"),
            registry=own,
        )
        self._probes = Summary(
            "amips_probes", "Cells chosen for a routed query.", _LABELS, registry=own
        )
        self._scanned = Summary(
            "amips_scanned_share",
            "Share of the keys scanned for a routed query.",
            _LABELS,
            registry=own,
        )
        self._plan = Histogram(
            "amips_plan_seconds", "Time of the plan, a call.", _LABELS, buckets=_PLAN, registry=own
        )
        self._search = Histogram(
            "amips_search_seconds",
            "Time in the database's client, a call.",
            _LABELS,
            buckets=_SEARCH,
            registry=own,
        )

    def counting(self, labels: _Labels) -> Callable[[Observation], None]:
        """Return an observer that counts the searches of one collection."""
        modes = {mode: self._queries.labels(*labels, mode) for mode in _MODES}
        probes, scanned = self._probes.labels(*labels), self._scanned.labels(*labels)
        plan, search = self._plan.labels(*labels), self._search.labels(*labels)

        def count(observation: Observation) -> None:
            for mode, queries in observation.modes.items():
                modes[mode].inc(queries)
            for source, queries in observation.left_out.items():
                self._left_out.labels(*labels, source).inc(queries)
            _add(probes, observation.routed, observation.probes)
            if observation.scanned is not None:
                _add(scanned, observation.routed, observation.scanned)
            plan.observe(observation.plan_seconds)
            search.observe(observation.search_seconds)

        return count

    def collect(self) -> Iterator[Metric]:
        for metric in self._own.collect():
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric


def _add(summary: Summary, count: int, total: float) -> None:
    """Add several observations of one sum: all that a summary keeps of them."""
    for observation in range(count):
        summary.observe(0.0 if observation else total)


def _states(watched: Sequence[tuple[_Labels, LearnedRouter]]) -> list[Metric]:
    """Return what routers know of themselves; of two of a collection, the later one."""
    fallbacks = CounterMetricFamily(
        "amips_fallbacks", "Calls and writes without the model.", labels=(*_LABELS, "reason")
    )
    bundle = GaugeMetricFamily(
        "amips_bundle_info", "1; the bundle in use.", labels=(*_LABELS, "version", "model")
    )
    gauges = {name: GaugeMetricFamily(name, text, labels=_LABELS) for name, text in _GAUGES.items()}
    reasons: Tally[tuple[str, ...]] = Tally()
    for labels, router in watched:
        for reason, count in dict(router.fallbacks).items():  # one step: searches may add to it
            key = (*labels, reason)
            reasons[key] += count
    for named, count in reasons.items():
        fallbacks.add_metric(named, count)
    for labels, router in dict(watched).items():
        manifest = router.manifest
        if manifest is not None:
            bundle.add_metric((*labels, manifest.version, manifest.model), 1.0)
        for name, value in _state(router).items():
            if value is not None:
                gauges[name].add_metric(labels, value)
    return [fallbacks, bundle, *gauges.values()]


def _state(router: LearnedRouter) -> dict[str, float | None]:
    """Return the gauges of one router; None where there is nothing to say yet."""
    health = router.health  # taken once: it may change meanwhile
    recall = None if health is None else health.recall
    drift = None if health is None else health.drift
    return {
        "amips_overflow_share": router.last_overflow_share,
        "amips_learned": float(router.learned),
        "amips_health": None if health is None else _STATES[health.state],
        "amips_shadow_recall": None if recall is None else recall.mean,
        "amips_shadow_recall_low": None if recall is None else recall.low,
        "amips_drift_p": None if drift is None else drift.p_value,
    }
