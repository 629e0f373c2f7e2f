"""Collections of several tenants: in shard keys of their own, or with graphs of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import AmipsError, InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray, normalise
from integration_tests.qdrant_data import (
    KEY,
    LAYOUT,
    TRANSPORTS,
    EveryCell,
    amips,
    by_sign,
    check,
    contents,
    create,
    error_of,
    fill,
    keys,
    queries,
    spec,
    wait_until_indexed,
    wrong_cells,
)
from integration_tests.servers import QdrantAddress
from tests.handmade import publish
from tests.support.known_filters import KnowsEveryFilter

COUNT = 1500


class TestShardKeys:
    """A tenant to a shard key; writes that name none are refused by the server."""

    TENANTS = ("a", "b", "c")

    @pytest.fixture(params=TRANSPORTS)
    def client(
        self, request: pytest.FixtureRequest, qdrant_node: QdrantAddress
    ) -> Iterator[QdrantClient]:
        client = qdrant_node.client(prefer_grpc=request.param == "grpc")
        yield client
        client.close()

    @pytest.fixture
    def name(self, client: QdrantClient) -> Iterator[str]:
        name = create(client, sharding_method=models.ShardingMethod.CUSTOM, shard_number=1)
        vectors = keys(COUNT)
        for place, tenant in enumerate(self.TENANTS):
            client.create_shard_key(name, tenant)
            points = [
                models.PointStruct(id=row, vector=vectors[row].tolist(), payload={"row": row})
                for row in range(place, COUNT, len(self.TENANTS))
            ]
            client.upsert(name, points, shard_key_selector=tenant, wait=True)
        wait_until_indexed(client, name, COUNT // 2)
        yield name
        client.delete_collection(name)

    def test_a_layout_is_built_mended_and_taken_back(self, client: QdrantClient, name: str) -> None:
        collection = QdrantCollection(client, name)
        collection.layouts.plan(spec())
        built = collection.layouts.build(spec())
        check(client, name, dict(enumerate(keys(COUNT))))
        new = models.PointStruct(id=10_000, vector=keys(1)[0].tolist(), payload={"row": 0})
        client.upsert(name, [new], shard_key_selector="b", wait=True)
        assert built.overflow() == 1
        assert built.layouts.backfill(by_sign) == 1
        assert wrong_cells(contents(client, name)) == []
        assert built.layouts.roll_back().layouts.drop_old() == [LAYOUT]
        points = contents(client, name)
        assert len(points) == COUNT + 1
        assert not any(KEY in (point.payload or {}) for point in points.values())

    def test_searches_are_routed_over_all_and_over_one(
        self, client: QdrantClient, name: str
    ) -> None:
        QdrantCollection(client, name).layouts.build(spec())
        router = LearnedRouter(QdrantCollection(client, name), hook=EveryCell(), refresh=None)
        routed = route(client, router)
        for query in queries(10):
            bare = client.query_points(name, query.tolist(), limit=7).points
            found = router.search(query, k=7)
            assert [hit.id for hit in found] == [one.id for one in bare]
            assert found.trace.mode == "route"
            tenants: list[Any] = ["a", ["b", "c"]]
            for tenant in tenants:
                bare = client.query_points(
                    name, query.tolist(), limit=7, shard_key_selector=tenant
                ).points
                here = routed.query_points(
                    name, query.tolist(), limit=7, shard_key_selector=tenant
                ).points
                assert [one.id for one in here] == [one.id for one in bare]

    def test_writes_of_a_router_reach_the_shard_key_of_their_key(
        self, client: QdrantClient, name: str
    ) -> None:
        """Or are refused in a sentence; never the server's raw answer."""
        built = QdrantCollection(client, name).layouts.build(spec())
        router = LearnedRouter(built, hook=EveryCell(), refresh=None)
        before = contents(client, name)
        for found in (
            error_of(lambda: router.upsert([1], keys(1))),
            error_of(lambda: router.delete([1])),
        ):
            assert found is None or isinstance(found, AmipsError), repr(found)
        after = contents(client, name)
        assert {**before, 1: None}.keys() == {**after, 1: None}.keys()
        assert wrong_cells(after) == []

    def test_a_router_of_one_shard_key(
        self, client: QdrantClient, name: str, qdrant_node: QdrantAddress, tmp_path: Path
    ) -> None:
        """Its snapshot has the keys of that one, and no others."""
        uri = f"{qdrant_node.uri(name)}&shard_key=a"
        code, said = amips("snapshot", uri, "-o", tmp_path / "snapshot")
        assert code == 0, said
        assert f"{COUNT // 3:,} keys" in said

    def test_they_are_partitions_that_are_given(
        self, client: QdrantClient, name: str, qdrant_node: QdrantAddress, tmp_path: Path
    ) -> None:
        """A plan names some; those that came later are always asked."""
        whole = QdrantCollection(client, name)
        seen = whole.partitioned(Partitions(None, ("c", "a", "gone")))
        layout = seen.layout()
        assert (whole.partitions, seen.overflow()) == (None, COUNT // 3)
        assert seen.layouts.status().sizes == (COUNT // 3, COUNT // 3, 0)
        values = {
            key: value
            for batch in seen.scan(100)
            for key, value in zip(batch.ids, batch.values or (), strict=True)
        }
        assert values == {row: self.TENANTS[row % 3] for row in range(COUNT)}
        batches = list(seen.scan(100))
        behind = [key for batch in seen.scan(100, batches[6].cursor) for key in batch.ids]
        assert behind == [key for batch in batches[7:] for key in batch.ids]
        asked = queries(6)
        plan = QueryPlan(cells=np.array([[0], [1], [2], [-1], [0], [1]]), layout=layout)
        exact = {"exact": True}
        answers = seen.search(SearchRequest(asked, 9, params=exact), plan)

        async def awaited() -> list[list[Any]]:
            later = qdrant_node.async_client()
            try:
                return await seen.search_async(later, SearchRequest(asked, 9, params=exact), plan)
            finally:
                await later.close()

        for found in (answers, asyncio.run(awaited())):
            for row, hits in enumerate(found):
                chosen = {"c", "b"} if row in (0, 4) else {"a", "b"} if row in (1, 5) else {"b"}
                rows = [key for key in range(COUNT) if self.TENANTS[key % 3] in chosen]
                best = np.argsort(-(keys(COUNT)[rows] @ asked[row]), kind="stable")[:9]
                assert [hit.id for hit in hits] == [rows[place] for place in best]
        with pytest.raises(InvalidInput, match="layout"):
            seen.search(SearchRequest(asked, 3), QueryPlan(cells=plan.cells, layout="other"))
        code, said = amips(
            "snapshot", qdrant_node.uri(name), "--partitions", "native", "-o", tmp_path / "snap"
        )
        assert code == 0, said
        client.create_shard_key(name, "d")
        point = models.PointStruct(id=9_999, vector=(1e3 * asked[0]).tolist())
        client.upsert(name, [point], shard_key_selector="d", wait=True)
        time.sleep(1.1)
        only = QueryPlan(cells=np.array([[1]]), layout=layout)
        assert seen.search(SearchRequest(asked[:1], 1), only)[0][0].id == 9_999
        assert seen.current() is seen

    def test_a_routed_client_asks_the_chosen_ones(self, client: QdrantClient, name: str) -> None:
        seen = QdrantCollection(client, name).partitioned(Partitions(None, self.TENANTS))

        class Second:
            def plan(self, asked: FloatArray, target: Target) -> QueryPlan:
                return QueryPlan(cells=np.full((len(asked), 1), 1), layout=seen.layout())

        routed = route(client, LearnedRouter(seen, hook=Second(), refresh=None))
        for query in queries(5):
            found = routed.query_points(name, query.tolist(), limit=7).points
            assert {int(str(one.id)) % 3 for one in found} == {1}
            own = routed.query_points(name, query.tolist(), limit=7, shard_key_selector="a").points
            assert {int(str(one.id)) % 3 for one in own} == {0}


class TestGraphsForTenantsOnly:
    """``m=0`` and ``payload_m=16``: the server has no graph for who names no tenant, or several."""

    COUNT = 8_000
    DIM = 32
    TENANTS = 16

    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, qdrant: QdrantAddress) -> Iterator[QdrantClient]:
        client = qdrant.client()
        yield client
        client.close()

    @pytest.fixture(scope="class")
    @classmethod
    def vectors(cls) -> tuple[FloatArray, FloatArray, Any]:
        rng = np.random.default_rng(0)

        def drawn(count: int) -> FloatArray:
            return normalise(rng.standard_normal((count, cls.DIM)).astype(np.float32))

        stored, asked = drawn(cls.COUNT), drawn(40)
        alike = stored @ rng.standard_normal((cls.TENANTS, cls.DIM)).T
        return stored, asked, alike.argmax(axis=1)

    @pytest.fixture(scope="class")
    @classmethod
    def name(
        cls, client: QdrantClient, vectors: tuple[FloatArray, FloatArray, Any]
    ) -> Iterator[str]:
        stored, _, tenant = vectors
        name = create(
            client,
            size=cls.DIM,
            threshold=100,
            hnsw_config=models.HnswConfigDiff(m=0, payload_m=16, full_scan_threshold=10),
        )
        client.create_payload_index(name, "tenant", models.PayloadSchemaType.KEYWORD)
        client.upload_collection(
            name,
            stored,
            payload=[{"tenant": f"t{one}"} for one in tenant],
            ids=range(cls.COUNT),
            wait=True,
        )
        wait_until_indexed(client, name, cls.COUNT // 2)
        yield name
        client.delete_collection(name)

    @pytest.fixture(params=["filter", "none"])
    def count(self, request: pytest.FixtureRequest) -> int:
        return 4 if request.param == "filter" else 0

    def recall(
        self,
        vectors: tuple[FloatArray, FloatArray, Any],
        ask: Callable[[FloatArray, models.Filter | None], Any],
        count: int,
    ) -> float:
        stored, asked, tenant = vectors
        rows = np.flatnonzero(tenant < count) if count else np.arange(self.COUNT)
        named = models.MatchAny(any=[f"t{one}" for one in range(count)])
        only = models.Filter(must=[models.FieldCondition(key="tenant", match=named)])
        shares = []
        for query in asked:
            best = set(rows[np.argsort(-(stored[rows] @ query))[:10]].tolist())
            found = {hit.id for hit in ask(query, only if count else None)}
            shares.append(len(best & found) / 10)
        return float(np.mean(shares))

    def test_the_server_loses_neighbours(
        self, client: QdrantClient, name: str, vectors: Any, count: int
    ) -> None:
        """If this fails, Qdrant has mended what the others are about."""

        def ask(query: FloatArray, only: models.Filter | None) -> Any:
            return client.query_points(name, query.tolist(), query_filter=only, limit=10).points

        assert self.recall(vectors, ask, count) < 0.8
        assert self.recall(vectors, ask, 1) > 0.9

    @pytest.mark.parametrize("way", ["router", "proxy"])
    def test_they_are_found_without_a_bundle(
        self, client: QdrantClient, name: str, vectors: Any, count: int, way: str, tmp_path: Path
    ) -> None:
        router = LearnedRouter(
            QdrantCollection(client, name), registry=tmp_path / "none", refresh=None
        )
        routed = route(client, router)

        def ask(query: FloatArray, only: models.Filter | None) -> Any:
            if way == "router":
                return router.search(query, k=10, filter=only)
            return routed.query_points(name, query.tolist(), query_filter=only, limit=10).points

        assert self.recall(vectors, ask, count) > 0.9

    def test_the_adapters_native_search_finds_them(
        self, client: QdrantClient, name: str, vectors: Any, count: int
    ) -> None:
        collection = QdrantCollection(client, name)

        def ask(query: FloatArray, only: models.Filter | None) -> Any:
            return collection.search(SearchRequest(query[None], k=10, filter=only), QueryPlan())[0]

        assert self.recall(vectors, ask, count) > 0.9

    def test_the_doctor_says_what_it_is(
        self, qdrant: QdrantAddress, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if qdrant.token:
            monkeypatch.setenv("AMIPS_QDRANT_API_KEY", qdrant.token)
        rng = np.random.default_rng(2)
        np.save(tmp_path / "queries.npy", rng.standard_normal((300, self.DIM)).astype(np.float32))
        _, said = amips(
            "doctor",
            qdrant.uri(name),
            *("--queries", tmp_path / "queries.npy", "--cells", 4, "--sample", 1000),
        )
        assert "is exact" not in said
        assert "full scan, as now" not in said
        assert "payload_m" in said


def test_a_bundle_of_a_collection_of_tenants(qdrant: QdrantAddress, tmp_path: Path) -> None:
    """A filter of the caller's own stays a filter when cells are added to it."""
    client = qdrant.client()
    name = create(client)
    fill(client, name, keys(COUNT))
    publish(QdrantCollection(client, name), queries(300), tmp_path, n_cells=8)
    wait_until_indexed(client, name, COUNT // 2)
    router = LearnedRouter(
        QdrantCollection(client, name),
        registry=tmp_path / "registry",
        refresh=None,
        watch=KnowsEveryFilter(),
    )
    few = models.Filter(must=[models.FieldCondition(key="row", range=models.Range(lt=200))])
    for query in queries(20):
        found = router.search(query, k=5, filter=few)
        assert len(found) == 5
        assert all(int(hit.id) < 200 for hit in found)
    client.delete_collection(name)
    client.close()
