"""OpenTelemetry spans of searches; needs the extra ``tracing``."""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import time

from amips_plugins.errors import require

require("opentelemetry.trace", "tracing")

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from amips_plugins.routing.observers import Observation

__all__ = ["SearchSpans"]


class SearchSpans:
    """An observer that gives every search a span ``amips.search``, a child of the caller's.

    The span is made once the answer is there, so what the database's client traces of itself
    stands beside it and not below. It holds neither vectors nor filters.

    Parameters
    ----------
    provider
        Where spans go; left out, the global tracer provider.

    Examples
    --------
    >>> import numpy as np
    >>> from amips_plugins import LearnedRouter, MemoryCollection
    >>> router = LearnedRouter(MemoryCollection(np.eye(3)), observers=[SearchSpans()])
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("amips_plugins", tracer_provider=provider)

    def __call__(self, observation: Observation) -> None:
        """Record one search."""
        ended = time.time_ns()
        taken = observation.plan_seconds + observation.search_seconds
        span = self._tracer.start_span(
            "amips.search",
            kind=trace.SpanKind.CLIENT,
            attributes=_attributes(observation),
            start_time=ended - round(taken * 1e9),
        )
        span.end(ended)


def _attributes(observation: Observation) -> dict[str, AttributeValue]:
    """Name the database as OpenTelemetry's semantic conventions do, and the rest our own way."""
    info = observation.collection
    attributes: dict[str, AttributeValue] = {
        "db.system.name": info.database,
        "db.collection.name": info.name,
        "db.operation.name": "search",
        "amips.queries": len(observation.queries),
        "amips.k": observation.k,
        "amips.modes": sorted(observation.modes),
        "amips.probes": observation.probes,
        "amips.plan_us": observation.plan_seconds * 1e6,
        "amips.search_ms": observation.search_seconds * 1e3,
    }
    if observation.scanned is not None:
        attributes["amips.scanned"] = observation.scanned / max(1, observation.routed)
    if observation.version is not None:
        attributes["amips.version"] = observation.version
    if observation.fallbacks:
        attributes["amips.fallbacks"] = sorted(observation.fallbacks)
    return attributes
