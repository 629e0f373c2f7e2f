"""What a routed client does around a call, counted: times tell little on a busy machine."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from tests.support import simulated_router

QUERY = simulated_router.queries(1, 1)[0].tolist()


class Answering(QdrantClient):
    """Has its answer ready, and notes what it is asked."""

    answer: models.QueryResponse | None = None
    asked: dict[str, Any]

    def query_points(self, *args: Any, **kwargs: Any) -> models.QueryResponse:
        self.asked = kwargs
        return self.answer or super().query_points(*args, **kwargs)


@pytest.fixture(scope="module")
def client() -> Answering:
    made = Answering(":memory:")
    size = models.VectorParams(size=simulated_router.DIM, distance=models.Distance.COSINE)
    made.create_collection("docs", vectors_config=size)
    collection = QdrantCollection(made, "docs")
    keys = simulated_router.keys()[:100]
    spec = LayoutSpec("cells1", simulated_router.CELLS, lambda ids, _: np.zeros(len(ids), int))
    collection.layouts.build(spec).upsert(list(range(len(keys))), keys)
    made.answer = made.query_points("docs", QUERY, limit=10)
    return made


def functions(client: Any, name: str) -> int:
    """Count the Python functions that a search calls, once it has been made before."""
    for _ in range(3):
        client.query_points(name, query=QUERY, limit=10)
    called = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append(frame.f_code)

    sys.setprofile(note)
    try:
        client.query_points(name, query=QUERY, limit=10)
    finally:
        sys.setprofile(None)
    return len(called)


def router(client: Answering, **options: Any) -> LearnedRouter:
    return LearnedRouter(QdrantCollection(client, "docs"), refresh=None, **options)


def test_a_routed_search(client: Answering) -> None:
    found = functions(route(client, router(client, hook=simulated_router.router())), "docs")
    assert client.asked["query_filter"] is not None  # it was routed
    assert found <= 110  # 90 when this was written, 194 before


def test_a_search_that_is_left_alone(client: Answering) -> None:
    off = router(client, hook=simulated_router.router())
    off.enabled = False
    assert functions(route(client, off), "docs") <= 25  # 20 when this was written, 45 before
    assert functions(route(client, off), "others") <= 15
    assert functions(route(client, router(client, registry="nowhere")), "docs") <= 25
    assert "query_filter" not in client.asked
