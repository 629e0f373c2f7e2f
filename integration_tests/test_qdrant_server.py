"""The adapter's contract against a Qdrant server, over REST and gRPC.

Collections are made with random names and dropped again; others are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient, models

from amips_plugins.adapters.qdrant import searched_points
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import Collection, Hit, Id, SearchRequest
from amips_plugins.errors import CollectionError, CollectionNotFound
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from integration_tests.qdrant_data import create, wait_until_indexed
from integration_tests.servers import QdrantAddress
from tests.adapters.contract.collection_contract import COUNT, DIM, cells_of, everywhere, vectors
from tests.adapters.contract.test_qdrant import DISTANCES, QdrantContract
from tests.support.event_loop import LoopThread
from tests.support.progress_recorder import Recorder


class TestQdrantServer(QdrantContract):
    """The contract over REST, with every vector in a graph.

    Building a graph takes a moment, so collections are shared by the tests that only read them.
    """

    grpc = False
    address: ClassVar[QdrantAddress]
    built: ClassVar[dict[tuple[Any, ...], str]]
    loop: ClassVar[LoopThread]
    awaited: ClassVar[AsyncQdrantClient]
    client: ClassVar[QdrantClient]  # type: ignore[misc]
    made: ClassVar[list[str]]  # type: ignore[misc]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, qdrant: QdrantAddress) -> Iterator[None]:
        cls.address, cls.built, cls.made = qdrant, {}, []
        cls.client = qdrant.client(prefer_grpc=cls.grpc)
        cls.awaited = qdrant.async_client(prefer_grpc=cls.grpc)
        with LoopThread() as cls.loop, pytest.MonkeyPatch.context() as patch:
            if cls.grpc:  # small batches, too, are messages of ours
                patch.setattr(searched_points, "_BATCH", 2)
            yield
            cls.loop.run(cls.awaited.close())
        for name in cls.made:
            cls.client.delete_collection(name)
        cls.client.close()

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        content = (metric, keys.tobytes(), *ids)
        if content not in self.built:
            name = create(
                self.client, field=self.vector, distance=DISTANCES[metric], size=DIM, threshold=1
            )
            self.made.append(name)
            self.client.create_payload_index(name, "group", models.PayloadSchemaType.KEYWORD)
            self.upsert(name, ids, keys, groups)
            self.built[content] = name
            self.indexed(name)
        return QdrantCollection(self.client, self.built[content])

    def indexed(self, name: str) -> None:
        """Wait for the graph, of collections that are large enough for one."""
        count = self.client.count(name).count
        wait_until_indexed(self.client, name, count if count * DIM * 4 > 1024 else 0)

    def upsert(
        self, name: str, ids: Sequence[Id], keys: FloatArray, groups: Sequence[str] | None
    ) -> None:
        super().upsert(name, ids, keys, ["foreign"] * len(ids) if groups is None else groups)

    def fresh(self, metric: Metric = Metric.COSINE) -> Collection:
        shared = (metric, vectors().tobytes(), *range(COUNT))
        self.built.pop(shared, None)
        made = self.build(metric)
        del self.built[shared]  # what becomes of it is nobody else's
        return made

    def laid_out(self, metric: Metric = Metric.COSINE) -> Collection:
        if (metric,) not in self.built:
            name = self.fresh_laid_out(metric).info.name
            self.built[metric,] = name
        return QdrantCollection(self.client, self.built[metric,])

    def fresh_laid_out(self, metric: Metric = Metric.COSINE) -> Collection:
        built = super().fresh_laid_out(metric)
        self.indexed(built.info.name)
        return built

    def search_async(
        self, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> list[list[Hit]]:
        assert isinstance(collection, QdrantCollection)
        return self.loop.run(collection.search_async(self.awaited, request, plan))

    def test_connect(self) -> None:
        made = self.build(Metric.L2)
        collection = QdrantCollection.connect(
            self.address.url, made.info.name, token=self.address.token
        )
        assert collection.info == made.info
        assert collection.count() == COUNT
        collection.close()
        with pytest.raises(CollectionNotFound, match=made.info.name):
            QdrantCollection.connect(
                self.address.url, "amips_no_such_collection", token=self.address.token
            )

    def test_mixed_ids_come_in_one_order(self) -> None:
        ids: list[Id] = [7, 2**64 - 1, *self.string_ids[:3], 0]
        collection = self.make(vectors(count=len(ids)), ids, Metric.IP, ["g"] * len(ids))
        order: list[Id] = [0, 7, 2**64 - 1, *self.string_ids[:3]]
        assert [key for batch in collection.scan(2) for key in batch.ids] == order
        for place, after in enumerate(order):
            rest = [key for batch in collection.scan(2, after) for key in batch.ids]
            assert rest == order[place + 1 :]

    def test_a_cell_search_has_its_index(self) -> None:
        collection = self.fresh_laid_out()
        name = collection.info.name
        schema = self.client.get_collection(name).payload_schema
        assert schema["amips_cell_abc123"].data_type == models.PayloadSchemaType.INTEGER
        assert "amips_cell_abc123" not in QdrantCollection(self.client, name).info.schema
        collection.layouts.roll_back().layouts.drop_old()
        assert list(self.client.get_collection(name).payload_schema) == ["group"]

    def test_a_quantised_collection_keeps_its_scores_when_rewritten(self) -> None:
        collection = self.fresh(Metric.IP)
        self.client.update_collection(
            collection.info.name,
            quantization_config=models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8)
            ),
        )
        queries = vectors(1, 3)
        plan = QueryPlan(rewritten=vectors(2, 3), rescore=COUNT)
        expected = self.reference(Metric.IP).search(SearchRequest(queries, k=4))
        found = collection.search(SearchRequest(queries, k=4), plan)
        assert [[hit.id for hit in hits] for hits in found] == [
            [hit.id for hit in hits] for hits in expected
        ]

    def test_a_build_goes_on_where_it_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("amips_plugins.adapters.qdrant.store._WRITE_BATCH", 16)
        collection = self.fresh()
        with pytest.raises(KeyboardInterrupt):
            collection.layouts.build(self.spec(), Recorder(stop_after=40))
        assert collection.layouts.status().unfinished == ("abc123",)
        resumed = Recorder()
        built = collection.layouts.build(self.spec(), resumed)
        (started_at,) = resumed.started_at
        assert 32 <= started_at < COUNT  # what was written before is not written again
        assert resumed.done == COUNT
        assert everywhere(built) == list(range(COUNT))

    @pytest.mark.parametrize(
        "settings",
        [
            {"search_allow_exact": False},
            {"condition_max_size": 50},
            {"filter_max_conditions": 1},
            {"max_query_limit": 10},
            {"max_payload_index_count": 1},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_a_strict_server_is_left_as_it_is(self, settings: dict[str, Any]) -> None:
        collection = self.strict(**settings)
        with pytest.raises(CollectionError, match=next(iter(settings))):
            collection.layouts.build(self.spec())
        found = self.client.get_collection(collection.info.name)
        assert not found.config.metadata
        assert set(found.payload_schema) == {"group"}

    def test_a_strict_server_that_leaves_room_is_laid_out(self) -> None:
        collection = self.strict(
            unindexed_filtering_retrieve=False,
            unindexed_filtering_update=False,
            filter_max_conditions=4,
            condition_max_size=100,
            max_query_limit=100,
            max_payload_index_count=2,
            max_timeout=30,
            upsert_max_batchsize=25,
        )
        collection.layouts.plan(self.spec())
        built = collection.layouts.build(self.spec())
        (hits,) = built.search(
            SearchRequest(vectors(1, 1), k=50), QueryPlan(cells=np.array([[0]]), layout="abc123")
        )
        assert {hit.id for hit in hits} == {k for k in range(COUNT) if cells_of([k])[0] == 0}
        built.upsert(list(range(COUNT)), vectors())
        assert built.layouts.backfill(self.spec().assign) == COUNT
        assert built.overflow() == 0
        assert built.layouts.roll_back().layouts.drop_old() == ["abc123"]

    def strict(self, **settings: Any) -> QdrantCollection:
        name = self.fresh().info.name
        self.client.create_payload_index(name, "group", models.PayloadSchemaType.KEYWORD)
        self.client.update_collection(
            name, strict_mode_config=models.StrictModeConfig(enabled=True, **settings)
        )
        return QdrantCollection(self.client, name)


class TestQdrantServerOverGrpc(TestQdrantServer):
    grpc = True


@pytest.mark.nightly
class TestQdrantServerNamedVector(TestQdrantServer):
    vector = "text"
