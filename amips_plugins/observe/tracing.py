"""OpenTelemetry spans of searches; needs the extra ``tracing``."""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from amips_plugins.errors import require

require("opentelemetry.trace", "tracing")

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from amips_plugins.routing.observers import Observation

__all__ = ["SearchSpans"]


class SearchSpans:
    """An observer that gives every search a span ``amips.search``, a child of the caller's.

    What the database's client traces of itself is below it. It holds neither vectors nor filters.
    A search that raises leaves a span with the name of the error.

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
        self._searched: ContextVar[_Searched | None] = ContextVar("searched", default=None)

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Make the span, for as long as one search takes, the parent of others."""
        started = time.time_ns()
        span = self._tracer.start_span(
            "amips.search", kind=trace.SpanKind.CLIENT, start_time=started
        )
        searched = _Searched(span, started)
        token = self._searched.set(searched)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        except Exception as exc:
            span.set_status(trace.StatusCode.ERROR, type(exc).__name__)
            raise
        finally:
            span.end(searched.ended)
            self._searched.reset(token)

    def __call__(self, observation: Observation) -> None:
        """Record one search."""
        searched = self._searched.get()
        if searched is not None:
            taken = observation.plan_seconds + observation.search_seconds
            searched.ended = searched.started + round(taken * 1e9)
            searched.span.set_attributes(_attributes(observation))


@dataclass(slots=True)
class _Searched:
    """A span, and when it began and ended, in nanoseconds."""

    span: trace.Span
    started: int
    ended: int | None = None


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
    if observation.left_out:
        attributes["amips.left_out"] = sorted(observation.left_out)
    return attributes
