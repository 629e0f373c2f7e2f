"""Spans of searches, with the real SDK."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.observe.tracing import SearchSpans
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.routing.effects import run_async
from tests.support.bundles import memory, write_bundle
from tests.support.observed_router import watched_router
from tests.support.routing_data import QUERIES, DatabaseError, Hook, Spy, only


@pytest.fixture
def exported() -> tuple[TracerProvider, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def of_router(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == "amips.search"]
    return span


def test_a_search_is_a_span_below_the_callers(
    exported: tuple[TracerProvider, InMemorySpanExporter], tmp_path: Path
) -> None:
    provider, exporter = exported
    router, seen = watched_router(write_bundle(tmp_path), SearchSpans(provider))
    with provider.get_tracer("app").start_as_current_span("answer") as parent:
        router.search(QUERIES, k=3, n_probes=2)
    span, (told,) = of_router(exporter), seen
    assert span.parent == parent.get_span_context()
    assert span.kind is SpanKind.CLIENT
    assert span.start_time is not None
    assert span.end_time is not None
    taken = (span.end_time - span.start_time) / 1e9
    assert taken == pytest.approx(told.plan_seconds + told.search_seconds, abs=1e-6)
    assert told.scanned is not None
    assert dict(span.attributes or {}) == {
        "db.system.name": "memory",
        "db.collection.name": "docs",
        "db.operation.name": "search",
        "amips.queries": len(QUERIES),
        "amips.k": 3,
        "amips.modes": ("route",),
        "amips.probes": 2 * len(QUERIES),
        "amips.plan_us": told.plan_seconds * 1e6,
        "amips.search_ms": told.search_seconds * 1e3,
        "amips.scanned": told.scanned / len(QUERIES),
        "amips.version": told.version,
    }


def test_a_span_says_why_the_native_search_answered(
    exported: tuple[TracerProvider, InMemorySpanExporter], tmp_path: Path
) -> None:
    provider, exporter = exported
    router = LearnedRouter(memory(), registry=tmp_path, observers=[SearchSpans(provider)])
    router.search(QUERIES[0], filter=only(*range(50)))
    attributes = of_router(exporter).attributes or {}
    assert attributes["amips.fallbacks"] == ("bundle: BundleNotFound",)
    assert not {"amips.scanned", "amips.version"} & attributes.keys()
    for value in attributes.values():  # names and numbers: no vector, no filter
        assert isinstance(value, (str, int, float)) or value in (
            ("native",),
            ("bundle: BundleNotFound",),
        )


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_the_client_traces_is_below_the_span(
    exported: tuple[TracerProvider, InMemorySpanExporter], kind: str
) -> None:
    provider, exporter = exported
    tracer = provider.get_tracer("client")

    class Traced(MemoryCollection):
        def search(self, request: Any, plan: Any = NATIVE) -> Any:
            with tracer.start_as_current_span("client"):
                return super().search(request, plan)

        async def search_async(self, client: Any, request: Any, plan: Any = NATIVE) -> Any:
            return await asyncio.to_thread(self.search, request, plan)

    router = LearnedRouter(
        Traced(np.eye(3, dtype=np.float32)),
        hook=Hook(lambda queries: QueryPlan(rewritten=queries, rescore=3)),
        observers=[SearchSpans(provider)],
    )
    with tracer.start_as_current_span("app") as parent:
        if kind == "sync":
            router.search([1.0, 0.0, 0.0], k=2)
        else:
            effects = router.search_effects(
                SearchRequest(np.eye(3, dtype=np.float32)[:1], 2), Target(2)
            )
            asyncio.run(run_async(effects, None))
        assert trace.get_current_span() is parent
    span = of_router(exporter)
    (client,) = [one for one in exporter.get_finished_spans() if one.name == "client"]
    assert client.parent is not None
    assert span.context is not None
    assert client.parent.span_id == span.context.span_id
    assert span.parent == parent.get_span_context()


def test_a_search_that_raises_leaves_the_name_of_its_error(
    exported: tuple[TracerProvider, InMemorySpanExporter],
) -> None:
    provider, exporter = exported
    spy = Spy(memory(), [DatabaseError("a filter of somebody's")])
    router = LearnedRouter(spy, hook=Hook(lambda _: QueryPlan()), observers=[SearchSpans(provider)])
    with pytest.raises(DatabaseError):
        router.search(QUERIES[0])
    span = of_router(exporter)
    assert span.status.description == "DatabaseError"
    assert not span.events
    assert not trace.get_current_span().is_recording()


def test_without_an_sdk_spans_go_nowhere() -> None:
    router = LearnedRouter(memory(), hook=None, registry="nowhere", observers=[SearchSpans()])
    assert len(router.search(QUERIES[0], k=3)) == 3
