"""Spans of searches, with the real SDK."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from amips_plugins import LearnedRouter
from amips_plugins.observe.tracing import SearchSpans
from tests.support.bundles import memory, write_bundle
from tests.support.observed_router import watched_router
from tests.support.routing_data import QUERIES, only


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


def test_without_an_sdk_spans_go_nowhere() -> None:
    router = LearnedRouter(memory(), hook=None, registry="nowhere", observers=[SearchSpans()])
    assert len(router.search(QUERIES[0], k=3)) == 3
