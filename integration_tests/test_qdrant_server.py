"""The adapter's contract, and layouts under fire, against a Qdrant server.

Collections are made with random names and dropped again; others are left alone.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import CollectionError, CollectionNotFound
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray, Metric
from tests.adapters.contract.collection_contract import COUNT, DIM, cells_of, everywhere, vectors
from tests.adapters.contract.test_qdrant import QdrantContract
from tests.support.progress_recorder import Recorder

API_KEY = os.environ.get("AMIPS_QDRANT_API_KEY")
MANY = 20_000

BUILDER = """
import os, sys
import numpy as np
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.adapters.qdrant.collection import QdrantCollection

def assign(ids, vectors):
    print(flush=True)  # what follows is the writing
    return (vectors[:, 0] > 0).astype(np.int64)

token = os.environ.get("AMIPS_QDRANT_API_KEY")
collection = QdrantCollection.connect(sys.argv[1], sys.argv[2], token=token)
collection.layouts.build(LayoutSpec("sign", 2, assign))
"""


def connected(url: str) -> QdrantClient:
    return QdrantClient(url=url, api_key=API_KEY, timeout=60, check_compatibility=False)


def by_sign(_: Sequence[Id], keys: FloatArray) -> IntArray:
    return (keys[:, 0] > 0).astype(np.int64)


class TestQdrantServer(QdrantContract):
    @pytest.fixture(autouse=True)
    def _client(self, qdrant_url: str) -> Iterator[None]:
        self.made = []
        self.url = qdrant_url
        self.client = connected(qdrant_url)
        yield
        for name in self.made:
            self.client.delete_collection(name)
        self.client.close()

    def test_connect(self) -> None:
        made = self.build(Metric.L2)
        collection = QdrantCollection.connect(self.url, made.info.name, token=API_KEY)
        assert collection.info == made.info
        assert collection.count() == COUNT
        collection.close()
        with pytest.raises(CollectionNotFound, match=made.info.name):
            QdrantCollection.connect(self.url, "amips_no_such_collection", token=API_KEY)

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
        collection.layouts.roll_back().layouts.drop_old()
        assert self.client.get_collection(name).payload_schema == {}

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

    def test_a_build_goes_on_where_it_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("amips_plugins.adapters.qdrant.store._WRITE_BATCH", 16)
        collection = self.build()
        with pytest.raises(KeyboardInterrupt):
            collection.layouts.build(self.spec(), Recorder(stop_after=40))
        assert collection.layouts.status().unfinished == ("abc123",)
        resumed = Recorder()
        built = collection.layouts.build(self.spec(), resumed)
        assert (resumed.started_at, resumed.done) == ([32], COUNT)
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
        name = self.build().info.name
        self.client.create_payload_index(name, "group", models.PayloadSchemaType.KEYWORD)
        self.client.update_collection(
            name, strict_mode_config=models.StrictModeConfig(enabled=True, **settings)
        )
        return QdrantCollection(self.client, name)

    def many(self) -> tuple[QdrantCollection, FloatArray]:
        keys = vectors(5, MANY)
        groups = ["g"] * 500
        made = self.make(keys[:500], list(range(500)), Metric.IP, groups)
        made.upsert(list(range(500, MANY)), keys[500:])
        return QdrantCollection(self.client, made.info.name), keys

    def check_cells(self, collection: QdrantCollection, keys: dict[int, FloatArray]) -> None:
        """Every key is there once, as last written, and in the cell of that vector."""
        found: dict[Any, tuple[Any, Any]] = {}
        offset: Any = None
        while True:
            records, offset = self.client.scroll(
                collection.info.name, limit=5000, offset=offset, with_vectors=True
            )
            for record in records:
                assert record.id not in found
                found[record.id] = (record.vector, (record.payload or {}).get("amips_cell_sign"))
            if offset is None:
                break
        assert sorted(found) == sorted(keys)
        for key, (vector, cell) in found.items():
            np.testing.assert_allclose(vector, keys[key], atol=1e-6)
            assert cell == int(keys[key][0] > 0)

    def test_a_builder_killed_at_random(self) -> None:
        collection, keys = self.many()
        chance = random.Random(11)
        for _ in range(3):
            with subprocess.Popen(
                [sys.executable, "-c", BUILDER, self.url, collection.info.name],
                stdout=subprocess.PIPE,
            ) as builder:
                assert builder.stdout is not None
                builder.stdout.readline()
                time.sleep(chance.uniform(0.0, 0.5))
                builder.kill()
            assert collection.count() == MANY
        if collection.current().layout() is None:
            collection.layouts.build(LayoutSpec("sign", 2, by_sign))
        built = collection.current()
        assert built.layouts.status().unfinished == ()
        assert built.overflow() == 0
        self.check_cells(built, dict(enumerate(keys)))

    def test_two_writers_and_a_reader_during_a_build(self) -> None:
        collection, array = self.many()
        name, keys = collection.info.name, dict(enumerate(array))
        stop, problems = threading.Event(), []

        def write(seed: int) -> None:
            # Each writer has its own half of the ids, so that the last write of each is known.
            client, rng = connected(self.url), np.random.default_rng(seed)
            while not stop.is_set():
                key = int(rng.integers(MANY // 2)) * 2 + seed
                vector = rng.standard_normal(DIM).astype(np.float32)
                client.upsert(name, [models.PointStruct(id=key, vector=vector.tolist())])
                keys[key] = vector
                gone = int(rng.integers(MANY // 2)) * 2 + seed
                client.delete(name, models.PointIdsList(points=[gone]))
                keys.pop(gone, None)
            client.close()

        def read() -> None:
            client = connected(self.url)
            reader = QdrantCollection(client, name)
            while not stop.is_set():
                reader = reader.current()
                plan = QueryPlan()
                if reader.layout() is not None:
                    plan = QueryPlan(cells=np.array([[0, 1]]), layout="sign")
                (hits,) = reader.search(SearchRequest(vectors(1, 1), k=10), plan)
                if len({hit.id for hit in hits}) != 10:
                    problems.append(hits)
            client.close()

        threads = [threading.Thread(target=write, args=(seed,)) for seed in (0, 1)]
        threads.append(threading.Thread(target=read))
        for thread in threads:
            thread.start()
        try:
            built = collection.layouts.build(LayoutSpec("sign", 2, by_sign))
            time.sleep(1.0)
            built.layouts.backfill(by_sign)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert problems == []
        built.layouts.backfill(by_sign)
        assert built.overflow() == 0
        self.check_cells(QdrantCollection(self.client, name), keys)
