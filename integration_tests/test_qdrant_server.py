"""The adapter's contract against a Qdrant server.

Collections are made with random names and dropped again; others are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.base import Id, SearchRequest
from amips_plugins.adapters.qdrant import QdrantCollection
from amips_plugins.errors import CollectionNotFound
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import Metric
from tests.contract.collection_contract import COUNT, vectors
from tests.contract.test_qdrant import QdrantContract

URL = os.environ.get("AMIPS_QDRANT_URL")
API_KEY = os.environ.get("AMIPS_QDRANT_API_KEY")

pytestmark = pytest.mark.skipif(
    not URL,
    reason="no Qdrant server: start `docker compose -f docker/compose.yaml up -d --wait qdrant` "
    "and set AMIPS_QDRANT_URL, for example to http://127.0.0.1:6333",
)


class TestQdrantServer(QdrantContract):
    @pytest.fixture(autouse=True)
    def _client(self) -> Iterator[None]:
        self.made = []
        self.client = QdrantClient(url=URL, api_key=API_KEY, timeout=60, check_compatibility=False)
        yield
        for name in self.made:
            self.client.delete_collection(name)
        self.client.close()

    def test_connect(self) -> None:
        assert URL is not None
        made = self.build(Metric.L2)
        collection = QdrantCollection.connect(URL, made.info.name, token=API_KEY)
        assert collection.info == made.info
        assert collection.count() == COUNT
        collection.close()
        with pytest.raises(CollectionNotFound, match=made.info.name):
            QdrantCollection.connect(URL, "amips_no_such_collection", token=API_KEY)

    def test_mixed_ids_come_in_one_order(self) -> None:
        ids: list[Id] = [7, 2**64 - 1, *self.string_ids[:3], 0]
        collection = self.make(vectors(count=len(ids)), ids, Metric.IP, ["g"] * len(ids))
        order: list[Id] = [0, 7, 2**64 - 1, *self.string_ids[:3]]
        assert [key for batch in collection.scan(2) for key in batch.ids] == order
        for place, after in enumerate(order):
            rest = [key for batch in collection.scan(2, after) for key in batch.ids]
            assert rest == order[place + 1 :]

    def test_a_cell_search_has_its_index(self) -> None:
        collection = self.laid_out()
        name = collection.info.name
        schema = self.client.get_collection(name).payload_schema
        assert schema["amips_cell_abc123"].data_type == models.PayloadSchemaType.INTEGER
        assert "amips_cell_abc123" not in QdrantCollection(self.client, name).info.schema

    def test_a_quantised_collection_keeps_its_scores_when_rewritten(self) -> None:
        collection = self.build(Metric.IP)
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
