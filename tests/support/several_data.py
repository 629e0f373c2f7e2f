"""Collections of one embedding in several places, and what may happen to one of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.collection import Collection, Failure, Hit, SearchRequest
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from tests.support import given_data


def rows_of(part: int) -> list[int]:
    """The keys that lie in one of the collections; ids start over in each of them."""
    return [
        row for row, topic in enumerate(given_data.topics()) if topic % given_data.PARTS == part
    ]


def collections() -> dict[str, MemoryCollection]:
    """A collection of each part of ``given_data``, in memory."""
    keys = given_data.keys()
    return {
        f"part-{part}": MemoryCollection(
            keys[rows_of(part)], name=f"part-{part}", fields=[{"part": part}] * len(rows_of(part))
        )
        for part in range(given_data.PARTS)
    }


class Unreliable(MemoryCollection):
    """Fails as it is told to, or takes its time."""

    def __init__(self, vectors: FloatArray, **more: Any) -> None:
        super().__init__(vectors, **more)
        self.error: Exception | None = None
        self.seconds = 0.0
        self.asked = 0

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        self.asked += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return super().search(request, plan)

    def failure(self, exc: BaseException) -> Failure:
        return Failure.OUTAGE if isinstance(exc, ConnectionError) else Failure.OTHER


def on_milvus(folder: Path, keys: FloatArray, name: str, metric: Metric) -> Collection:
    from pymilvus import MilvusClient

    from amips_plugins.adapters.milvus.collection import MilvusCollection

    client = MilvusClient(str(folder / f"{name}.db"))
    client.create_collection(name, dimension=keys.shape[1], metric_type=metric.value.upper())
    client.insert(name, [{"id": n, "vector": v} for n, v in enumerate(keys)])
    return MilvusCollection(client, name)


def on_qdrant(keys: FloatArray, name: str, metric: Metric) -> Collection:
    from qdrant_client import QdrantClient, models

    from amips_plugins.adapters.qdrant.collection import QdrantCollection

    client = QdrantClient(":memory:")
    distance = {"cosine": models.Distance.COSINE, "ip": models.Distance.DOT}
    distance["l2"] = models.Distance.EUCLID
    params = models.VectorParams(size=keys.shape[1], distance=distance[metric.value])
    client.create_collection(name, vectors_config=params)
    points = [models.PointStruct(id=n, vector=v) for n, v in enumerate(keys.tolist())]
    client.upsert(name, points)
    return QdrantCollection(client, name)


def on_edge(folder: Path, keys: FloatArray, name: str, metric: Metric) -> Collection:
    import qdrant_edge as edge

    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    distance = {"cosine": edge.Distance.Cosine, "ip": edge.Distance.Dot}
    distance["l2"] = edge.Distance.Euclid
    params = edge.EdgeVectorParams(size=keys.shape[1], distance=distance[metric.value])
    place = folder / f"{name}-{uuid.uuid4().hex}"
    shard = edge.EdgeShard.create(str(place), edge.EdgeConfig(vectors=params))
    points = [edge.Point(n, v) for n, v in enumerate(keys.tolist())]
    shard.update(edge.UpdateOperation.upsert_points(points))
    return QdrantEdgeCollection(shard, place)


def found(hits: Sequence[Hit]) -> list[tuple[str, int | str]]:
    return [(hit.collection, hit.id) for hit in hits]
