"""``given_data`` on the engines: a field that tells parts apart, one that does not; a router."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amips_plugins import Registry
from amips_plugins.bundle.contents import (
    CALIBRATION,
    GOLDEN_OUTPUTS,
    KEY_SAMPLE,
    MODEL,
    PARTITIONS,
    REFERENCE,
    BundleContents,
)
from amips_plugins.collection import Collection
from amips_plugins.models.given import GivenCells
from amips_plugins.partitions import Partitions, Value
from tests.handmade import about, make_contents
from tests.support import given_data

_KEPT: tuple[Any, ...] = (CALIBRATION, GOLDEN_OUTPUTS, KEY_SAMPLE, MODEL, REFERENCE)

Values = Sequence[Value | None]


@dataclass
class Store:
    """A collection whose field ``part`` has given values, and the owner's own way to change one."""

    collection: Collection
    rename: Callable[[str, str], None]


def publish(collection: Collection, folder: Path, field: str | None = "part") -> Path:
    """Publish a router over the values, made by hand from their mean keys; return its registry."""
    batches = list(collection.partitioned(Partitions(field)).scan(1_000))
    ids = [key for batch in batches for key in batch.ids]
    keys = np.concatenate([batch.vectors for batch in batches])
    values = [value for batch in batches for value in batch.values or ()]
    partitions = Partitions(field, tuple(sorted({str(one) for one in values if one is not None})))
    cells = partitions.cells_of(values)
    n_cells = len(partitions.values)
    means = np.stack([keys[cells == cell].mean(axis=0) for cell in range(n_cells)])
    centroids = means.astype(np.float32)
    info = collection.info
    made = make_contents(ids, keys, info.metric, centroids, given_data.queries(600, seed=4))
    sizes, others = np.bincount(cells[cells >= 0], minlength=n_cells), int((cells < 0).sum())
    parts: dict[str, Any] = {name: made[name] for name in _KEPT}
    contents = BundleContents({**parts, PARTITIONS: GivenCells(partitions, sizes, others)})
    contents.write(folder / "made", **about(info, len(keys), n_cells, 0.9))
    Registry(folder / "registry").publish(folder / "made")
    return folder / "registry"


@contextmanager
def on_milvus(folder: Path, values: Values) -> Iterator[Store]:
    import pymilvus

    from amips_plugins.adapters.milvus.collection import MilvusCollection

    client: Any = pymilvus.MilvusClient(str(folder / f"{uuid.uuid4().hex}.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=given_data.DIM)
    schema.add_field("part", pymilvus.DataType.VARCHAR, max_length=20, nullable=True)
    schema.add_field("weight", pymilvus.DataType.FLOAT)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection("docs", schema=schema, index_params=index)
    rows = [
        {"id": row, "vector": key, "part": value, "weight": 0.5}
        for row, (key, value) in enumerate(zip(given_data.keys(), values, strict=True))
    ]
    client.insert("docs", rows)

    def rename(old: str, new: str) -> None:
        client.upsert("docs", [{**row, "part": new} for row in rows if row["part"] == old])

    yield Store(MilvusCollection(client, "docs"), rename)
    client.close()


@contextmanager
def on_qdrant(folder: Path, values: Values) -> Iterator[Store]:  # noqa: ARG001 - in memory
    from qdrant_client import QdrantClient, models

    from amips_plugins.adapters.qdrant.collection import QdrantCollection

    client = QdrantClient(":memory:")
    size = models.VectorParams(size=given_data.DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=size)
    points = [
        models.PointStruct(
            id=row, vector=key, payload={"weight": 0.5} | ({"part": value} if value else {})
        )
        for row, (key, value) in enumerate(zip(given_data.keys().tolist(), values, strict=True))
    ]
    client.upsert("docs", points)

    def rename(old: str, new: str) -> None:
        is_old = models.FieldCondition(key="part", match=models.MatchValue(value=old))
        client.set_payload("docs", {"part": new}, models.Filter(must=[is_old]))

    yield Store(QdrantCollection(client, "docs"), rename)
    client.close()


@contextmanager
def on_edge(folder: Path, values: Values) -> Iterator[Store]:
    import qdrant_edge as edge

    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    place = folder / uuid.uuid4().hex / "docs"
    place.mkdir(parents=True)
    size = edge.EdgeVectorParams(size=given_data.DIM, distance=edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(place), edge.EdgeConfig(vectors=size))
    update = edge.UpdateOperation
    shard.update(update.create_field_index("part", edge.PayloadSchemaType.Keyword))
    shard.update(update.create_field_index("weight", edge.PayloadSchemaType.Float))
    payloads = [{"weight": 0.5} | ({"part": value} if value else {}) for value in values]
    points = zip(given_data.keys().tolist(), payloads, strict=True)
    shard.update(update.upsert_points([edge.Point(n, *point) for n, point in enumerate(points)]))

    def rename(old: str, new: str) -> None:
        rows: list[Any] = [row for row, value in enumerate(values) if value == old]
        shard.update(update.set_payload(rows, {"part": new}))

    yield Store(QdrantEdgeCollection(shard, place), rename)
    shard.close()


ENGINES = {"milvus-lite": on_milvus, "qdrant-local": on_qdrant, "edge": on_edge}
