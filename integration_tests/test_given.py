"""Given partitions and several collections on servers: partitions that go, rights, and deaths."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pymilvus
import pytest
from qdrant_client import QdrantClient

from amips_plugins import LearnedRouter, MemoryCollection, route
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from integration_tests.qdrant_data import create, fill, keys, queries, until
from integration_tests.servers import QdrantServer
from integration_tests.test_qdrant_clients import jwt

COUNT, DIM, PARTS = 600, 8, ("north", "south", "west")
VECTORS: FloatArray = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
QUERIES: FloatArray = np.random.default_rng(1).standard_normal((8, DIM)).astype(np.float32)


class Chosen:
    """Chooses the same parts for every query."""

    def __init__(self, layout: str | None, *cells: int) -> None:
        self.layout, self.cells = layout, cells

    def plan(self, asked: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(cells=np.tile(self.cells, (len(asked), 1)), layout=self.layout)


class TestMilvusPartitions:
    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, milvus_uri: str) -> Iterator[Any]:
        client: Any = pymilvus.MilvusClient(milvus_uri)
        yield client
        client.close()

    @pytest.fixture
    def name(self, client: Any) -> Iterator[str]:
        name = f"given_{secrets.token_hex(4)}"
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        client.create_collection(
            name, schema=schema, index_params=index, consistency_level="Strong"
        )
        for place, part in enumerate(PARTS):
            client.create_partition(name, part)
            rows = range(place, COUNT, len(PARTS))
            client.insert(
                name, [{"id": r, "vector": VECTORS[r]} for r in rows], partition_name=part
            )
        client.load_collection(name)
        yield name
        client.drop_collection(name)

    def best(self, query: FloatArray, *parts: int) -> list[int]:
        rows = np.array([row for row in range(COUNT) if row % len(PARTS) in parts])
        found: list[int] = rows[np.argsort(-(VECTORS[rows] @ query))[:5]].tolist()
        return found

    def test_a_plan_searches_some(self, client: Any, name: str) -> None:
        seen = MilvusCollection(client, name).partitioned(Partitions(None, PARTS))
        assert (seen.layouts.status().sizes, seen.overflow()) == ((200, 200, 200), 0)
        plan = QueryPlan(cells=np.array([[0, 2], [1, -1]] * 4), layout=seen.layout())
        for row, hits in enumerate(seen.search(SearchRequest(QUERIES, 5), plan)):
            parts = (1,) if row % 2 else (0, 2)
            assert [int(hit.id) for hit in hits] == self.best(QUERIES[row], *parts)
        read = {k: v for b in seen.scan(90) for k, v in zip(b.ids, b.values or (), strict=True)}
        assert read == {row: PARTS[row % len(PARTS)] for row in range(COUNT)}
        with pytest.raises(InvalidInput, match="texts or whole numbers"):
            MilvusCollection(client, name).partitioned(Partitions("vector"))

    @pytest.mark.parametrize("way", ["router", "routed client"])
    @pytest.mark.parametrize("fault", ["released", "dropped"])
    def test_one_that_goes_while_it_serves(
        self, client: Any, name: str, fault: str, way: str
    ) -> None:
        """What the bare client finds of those that are left is found, whatever was chosen."""
        seen = MilvusCollection(client, name).partitioned(Partitions(None, PARTS))
        for cells in ((0,), (0, 1)):
            router = LearnedRouter(seen, hook=Chosen(seen.layout(), *cells), refresh=None)
            routed = route(client, router)

            def ask(query: FloatArray, router: Any = router, routed: Any = routed) -> list[int]:
                if way == "router":
                    return [int(hit.id) for hit in router.search(query, k=5)]
                (hits,) = routed.search(name, [query], limit=5, anns_field="vector")
                return [int(hit["id"]) for hit in hits]

            if cells == (0,):
                assert ask(QUERIES[0]) == self.best(QUERIES[0], 0)
                client.release_partitions(name, ["north"])
                if fault == "dropped":
                    client.drop_partition(name, "north")
            for query in QUERIES:
                (bare,) = client.search(name, [query], limit=5, anns_field="vector")
                left = [int(hit["id"]) for hit in bare]
                assert left == self.best(query, 1, 2)
                found = ask(query)
                assert found in (left, self.best(query, 1))
                assert len(found) == 5


class TestSeveral:
    @pytest.fixture(scope="class")
    @classmethod
    def owner(cls, qdrant_with_keys: QdrantServer) -> Iterator[QdrantClient]:
        client = qdrant_with_keys.address.client()
        yield client
        client.close()

    @pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection:UserWarning")
    @pytest.mark.parametrize("grpc", [False, True], ids=["rest", "grpc"])
    def test_one_that_may_not_be_read_is_left_out_and_named(
        self, qdrant_with_keys: QdrantServer, owner: QdrantClient, grpc: bool
    ) -> None:
        mine, others = create(owner), create(owner)
        for name in (mine, others):
            fill(owner, name, keys(1500))
        token = jwt(access=[{"collection": mine, "access": "r"}])
        reader = qdrant_with_keys.address.client(api_key=token, prefer_grpc=grpc)
        # Opened by someone who may, and asked by someone who may not any longer.
        there = QdrantCollection(owner, others)
        assert there.info.name == others
        there._client = reader
        members = {"mine": QdrantCollection(reader, mine), "others": there}
        router = LearnedRouter.over(members, refresh=None)
        hits = router.search(queries(1)[0], k=5)
        assert {hit.collection for hit in hits} == {"mine"}
        assert hits.trace.left_out == ("others",)
        strict = LearnedRouter.over(members, strict=True, refresh=None)
        with pytest.raises(Exception, match=r"(?i)forbidden|access"):
            strict.search(queries(1)[0], k=5)
        for name in (mine, others):
            owner.delete_collection(name)
        reader.close()

    def test_one_that_dies_is_left_out_and_found_back(
        self, qdrant_to_break: QdrantServer, tmp_path: Path
    ) -> None:
        client = qdrant_to_break.address.client(timeout=2)
        name = create(client)
        fill(client, name, keys(1500))
        other = MemoryCollection(keys(300, seed=5), metric="ip")
        members: Any = {"server": QdrantCollection(client, name), "memory": other}
        router = LearnedRouter.over(members, registry=tmp_path, refresh=None, timeout=5.0)
        both = router.search(queries(1)[0], k=20)
        assert {hit.collection for hit in both} == {"server", "memory"}
        qdrant_to_break.kill()
        for _ in range(5):
            hits = router.search(queries(1)[0], k=20)
            assert {hit.collection for hit in hits} == {"memory"}
            assert hits.trace.left_out == ("server",)
        qdrant_to_break.start()
        qdrant_to_break.wait_until_ready(name)
        until(lambda: not router.search(queries(1)[0], k=20).trace.left_out)
        assert [hit.key for hit in router.search(queries(1)[0], k=20)] == [h.key for h in both]
        client.close()
