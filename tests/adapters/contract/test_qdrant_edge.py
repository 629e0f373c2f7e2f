from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import qdrant_edge as edge

from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
from amips_plugins.collection import Collection, Hit, Id, SearchRequest
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from tests.adapters.contract.collection_contract import COUNT, DIM, CollectionContract

DISTANCES = {
    Metric.COSINE: edge.Distance.Cosine,
    Metric.IP: edge.Distance.Dot,
    Metric.L2: edge.Distance.Euclid,
}


class TestQdrantEdge(CollectionContract):
    l2_scores_are_squared = False
    string_ids = tuple(
        sorted(str(uuid.uuid5(uuid.NAMESPACE_OID, str(row))) for row in range(COUNT))
    )
    vector = ""
    collection: type[QdrantEdgeCollection] = QdrantEdgeCollection
    optimizers = edge.EdgeOptimizersConfig()
    folder: Path
    shard: edge.EdgeShard
    shards: list[edge.EdgeShard]

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> Iterator[None]:
        self.folder, self.shards = tmp_path, []
        yield
        for shard in self.shards:
            shard.close()

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        folder = self.folder / uuid.uuid4().hex
        params = edge.EdgeVectorParams(size=DIM, distance=DISTANCES[metric])
        self.shard = edge.EdgeShard.create(
            str(folder),
            edge.EdgeConfig(
                vectors={self.vector: params} if self.vector else params,
                optimizers=self.optimizers,
            ),
        )
        self.shards.append(self.shard)
        kind = edge.PayloadSchemaType.Keyword
        self.shard.update(edge.UpdateOperation.create_field_index("group", kind))
        self.upsert(ids, keys, groups)
        return self.collection(self.shard, folder)

    def upsert(
        self, ids: Sequence[Id], keys: FloatArray, groups: Sequence[str] | None = None
    ) -> None:
        points = [
            edge.Point(
                ids[row],
                {self.vector: key} if self.vector else key,
                {"group": groups[row], "other": row} if groups else {},
            )
            for row, key in enumerate(keys.tolist())
        ]
        self.shard.update(edge.UpdateOperation.upsert_points(points))

    def group_filter(self, group: str) -> edge.Filter:
        return edge.Filter(must=[edge.FieldCondition("group", match=edge.MatchValue(group))])

    def add_without_cell(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        self.upsert(ids, keys)

    def rewrite_in_place(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        points = [
            edge.PointVectors(one, {self.vector: key} if self.vector else key)
            for one, key in zip(ids, keys.tolist(), strict=True)
        ]
        self.shard.update(edge.UpdateOperation.update_vectors(points))


@pytest.mark.slow
class TestQdrantEdgeNamedVector(TestQdrantEdge):
    vector = "text"


class _ByGraphs(QdrantEdgeCollection):
    """Plans that say nothing of an effort go through the graphs of the cells, too."""

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        if plan.cells is not None and plan.effort is None:
            plan = replace(plan, effort=1_000)
        return super().search(request, plan)


@pytest.mark.slow
class TestQdrantEdgeShards(TestQdrantEdge):
    """A shard with a graph in it for every cell."""

    storage = "shards"
    collection: type[QdrantEdgeCollection] = _ByGraphs


@pytest.mark.slow
class TestQdrantEdgeScannedShards(TestQdrantEdge):
    """The same without an effort, so that cells are scanned."""

    storage = "shards"


@pytest.mark.slow
class TestQdrantEdgeOfManySegments(TestQdrantEdge):
    """Everything is indexed and moved about as soon as it can be."""

    optimizers = edge.EdgeOptimizersConfig(
        indexing_threshold=1,
        default_segment_number=3,
        deleted_threshold=0.01,
        vacuum_min_vector_number=1,
    )
