"""A collection of Milvus Lite for the tests, with every kind of field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Collection, Id, SearchRequest
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray

pymilvus = pytest.importorskip("pymilvus")

DIM = 4
COUNT = 40


def vectors() -> FloatArray:
    return np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)


def make(
    client: Any,
    name: str = "docs",
    *,
    metric: str | None = "IP",
    fields: Sequence[str] = ("embedding",),
    ids: Sequence[Id] = tuple(range(COUNT)),
    auto_id: bool = False,
    partition_key: bool = False,
) -> MilvusCollection:
    schema = client.create_schema(auto_id=auto_id, enable_dynamic_field=True)
    kind = pymilvus.DataType.VARCHAR if isinstance(ids[0], str) else pymilvus.DataType.INT64
    schema.add_field("key", kind, is_primary=True, max_length=100)
    for field in fields:
        schema.add_field(field, pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("title", pymilvus.DataType.VARCHAR, max_length=50, nullable=True)
    schema.add_field(
        "tenant",
        pymilvus.DataType.INT64,
        default_value=7,
        **({"is_partition_key": True} if partition_key else {}),
    )
    schema.add_field("extra", pymilvus.DataType.JSON)
    index = client.prepare_index_params()
    for field in fields:
        if metric is not None:
            index.add_index(field, index_type="HNSW", metric_type=metric, M=8, efConstruction=32)
    client.create_collection(name, schema=schema, index_params=index)
    rows = [
        {
            **({} if auto_id else {"key": key}),
            **{field: vector * (place + 1) for place, field in enumerate(fields)},
            "title": None if row % 2 else f"title {row}",
            "extra": {"nested": [row, None, "é"]},
            "free": row,
        }
        for row, (key, vector) in enumerate(zip(ids, vectors(), strict=True))
    ]
    client.insert(name, rows)
    return MilvusCollection(client, name)


def halves(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.asarray(ids, dtype=np.int64) % 2


def search(collection: Collection, plan: QueryPlan | None = None, **request: Any) -> Any:
    return collection.search(
        SearchRequest(vectors()[:1], **{"k": 3, **request}), plan or QueryPlan()
    )


def spec(layout: str = "abc", n_cells: int = 2, assign: Any = None, **options: Any) -> LayoutSpec:
    def by_row(ids: Sequence[Id], _: FloatArray) -> IntArray:
        return np.asarray(ids, dtype=np.int64) % n_cells

    return LayoutSpec(layout, n_cells, assign or by_row, **options)
