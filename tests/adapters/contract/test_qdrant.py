from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.sync_facade import BlockingClient, open_blocking
from amips_plugins.collection import Collection, Hit, Id, SearchRequest
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from tests.adapters.contract.collection_contract import COUNT, DIM, CollectionContract
from tests.support.event_loop import LoopThread

DISTANCES = {
    Metric.COSINE: models.Distance.COSINE,
    Metric.IP: models.Distance.DOT,
    Metric.L2: models.Distance.EUCLID,
}


class QdrantContract(CollectionContract):
    """The contract against the client of the fixture ``client``."""

    l2_scores_are_squared = False
    string_ids = tuple(
        sorted(str(uuid.uuid5(uuid.NAMESPACE_OID, str(row))) for row in range(COUNT))
    )
    vector = ""
    client: Any
    made: list[str]
    """Names of the collections made, for those who have to drop them."""

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        name = f"contract_{uuid.uuid4().hex}"
        self.made.append(name)
        params = models.VectorParams(size=DIM, distance=DISTANCES[metric])
        self.client.create_collection(
            name, vectors_config={self.vector: params} if self.vector else params
        )
        self.upsert(name, ids, keys, groups)
        return QdrantCollection(self.client, name)

    def upsert(
        self, name: str, ids: Sequence[Id], keys: FloatArray, groups: Sequence[str] | None
    ) -> None:
        points = [
            models.PointStruct(
                id=ids[row],
                vector={self.vector: key.tolist()} if self.vector else key.tolist(),
                payload={"group": groups[row], "other": row} if groups else {},
            )
            for row, key in enumerate(keys)
        ]
        self.client.upsert(name, points)

    def group_filter(self, group: str) -> models.Filter:
        matches = models.FieldCondition(key="group", match=models.MatchValue(value=group))
        return models.Filter(must=[matches])

    def add_without_cell(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        self.upsert(collection.info.name, ids, keys, None)

    def rewrite_in_place(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        points = [
            models.PointVectors(id=one, vector={self.vector: key} if self.vector else key)
            for one, key in zip(ids, keys.tolist(), strict=True)
        ]
        self.client.update_vectors(collection.info.name, points)


class TestQdrantLocal(QdrantContract):
    @pytest.fixture(autouse=True)
    def _client(self) -> Iterator[None]:
        self.made = []
        self.client = QdrantClient(":memory:")
        yield
        self.client.close()


class TestQdrantLocalNamedVector(TestQdrantLocal):
    vector = "text"


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
class TestQdrantCallsToAServer(TestQdrantLocal):
    """The calls that a server gets (index, filters in place of lists, exact), answered locally."""

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        collection = super().make(keys, ids, metric, groups)
        assert isinstance(collection, QdrantCollection)
        collection._local = False
        return collection


class TestQdrantLocalThroughAnAsynchronousClient(QdrantContract):
    """With no other client, because local mode keeps what it has to itself."""

    @pytest.fixture(autouse=True)
    def _client(self) -> Iterator[None]:
        self.made = []
        self.awaited = AsyncQdrantClient(":memory:")
        with LoopThread() as self.loop:
            self.client = BlockingClient(self.awaited, self.loop.loop)
            yield
            self.client.close()

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        name = super().make(keys, ids, metric, groups).info.name
        return open_blocking(self.awaited, name, None, self.loop.loop)

    def search_async(
        self, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> list[list[Hit]]:
        assert isinstance(collection, QdrantCollection)
        return self.loop.run(collection.search_async(self.awaited, request, plan))
