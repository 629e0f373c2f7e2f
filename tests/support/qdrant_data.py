"""A small Qdrant collection for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray

DIM = 4
KEYS = np.random.default_rng(0).standard_normal((40, DIM)).astype(np.float32)


def dense(distance: models.Distance = models.Distance.DOT, **more: Any) -> models.VectorParams:
    return models.VectorParams(size=DIM, distance=distance, **more)


def fill(client: QdrantClient, name: str = "docs", ids: Sequence[Id] = range(len(KEYS))) -> None:
    client.create_collection(name, vectors_config=dense())
    client.upsert(
        name,
        [
            models.PointStruct(
                id=key, vector=vector.tolist(), payload={"row": row, "group": row % 3}
            )
            for row, (key, vector) in enumerate(zip(ids, KEYS, strict=False))
        ],
    )


def by_row(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.array([int(key) % 4 for key in ids], dtype=np.int64)


A1 = LayoutSpec("a1", 4, by_row, version="v1")


def lay_out(collection: QdrantCollection, spec: LayoutSpec = A1) -> QdrantCollection:
    built = collection.layouts.build(spec)
    assert isinstance(built, QdrantCollection)
    return built


def ids_found(collection: QdrantCollection, cell: int, layout: str = "a1") -> list[Id]:
    plan = QueryPlan(cells=np.array([[cell]]), layout=layout)
    return sorted(hit.id for hit in collection.search(SearchRequest(KEYS[:1], k=100), plan)[0])


def cells_of(client: QdrantClient, layout: str = "a1") -> dict[Any, Any]:
    """What is stored under the layout's key, point by point."""
    records, _ = client.scroll("docs", limit=10_000)
    return {record.id: (record.payload or {}).get(f"amips_cell_{layout}") for record in records}
