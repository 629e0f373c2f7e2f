"""Large batches, cell by cell: over gRPC, answered by the client's local mode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, grpc, models
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.plan import QueryPlan

DIM, CELLS, COUNT = 4, 6, 90
pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")


class Points:
    """A server's half of gRPC: reads messages, asks the local client, and answers in messages."""

    def __init__(self, client: QdrantClient) -> None:
        self.client = client
        self.calls: list[Any] = []
        self.seconds: list[float | None] = []

    def QueryBatch(self, call: Any, timeout: float | None) -> Any:  # noqa: N802 - of gRPC
        self.calls.append(grpc.QueryBatchPoints.FromString(call.SerializeToString()))
        self.seconds.append(timeout)
        asked = [GrpcToRest.convert_query_points(one) for one in call.query_points]
        answers = self.client.query_batch_points(call.collection_name, asked)
        return grpc.QueryBatchResponse(
            result=[
                grpc.BatchResult(
                    result=[RestToGrpc.convert_scored_point(point) for point in one.points]
                )
                for one in answers
            ]
        )


class OverGrpc:
    """A client that prefers gRPC."""

    def __init__(self, client: QdrantClient, points: Any) -> None:
        self._client = client
        self.grpc_points = points
        self.init_options = {"prefer_grpc": True}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Awaited:
    """The same of an asynchronous client."""

    def __init__(self, points: Points) -> None:
        self.init_options = {"prefer_grpc": True}
        self.grpc_points = self
        self._points = points

    async def QueryBatch(self, call: Any, timeout: float | None) -> Any:  # noqa: N802
        return self._points.QueryBatch(call, timeout)


def vectors(seed: int, count: int) -> Any:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    made = QdrantClient(":memory:")
    size = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    made.create_collection("docs", vectors_config=size)
    uuids = [f"00000000-0000-0000-0000-{row:012d}" for row in range(COUNT)]
    ids = [row if row % 2 else uuids[row] for row in range(COUNT)]
    points = [
        models.PointStruct(id=key, vector=vector, payload={"row": row})
        for row, (key, vector) in enumerate(zip(ids, vectors(0, COUNT).tolist(), strict=True))
    ]
    made.upsert("docs", points[: COUNT - 5])
    cells = dict(zip(ids, np.arange(COUNT) % CELLS, strict=True))
    spec = LayoutSpec("a1", CELLS, lambda keys, _: np.array([cells[key] for key in keys]))
    QdrantCollection(made, "docs").layouts.build(spec)
    made.upsert("docs", points[COUNT - 5 :])  # overflow
    yield made
    made.close()


def server(client: Any) -> QdrantCollection:
    collection = QdrantCollection(client, "docs")
    collection._local = False
    return collection


def asked(count: int, condition: models.Filter | None = None) -> tuple[SearchRequest, QueryPlan]:
    rng = np.random.default_rng(1)
    cells = np.array([rng.permutation(CELLS)[:3] for _ in range(count)])
    cells[3, 2] = -1
    shares = np.full(count, 0.3, dtype=np.float32)
    shares[7] = 0.9  # searched whole
    request = SearchRequest(vectors(2, count), 5, condition, ("row",), timeout=7.5)
    return request, QueryPlan(cells=cells, layout="a1", shares=shares)


def one_by_one(
    collection: QdrantCollection, request: SearchRequest, plan: QueryPlan
) -> list[list[Hit]]:
    assert plan.cells is not None
    assert plan.shares is not None
    found = []
    for row in range(len(request.queries)):
        only = slice(row, row + 1)
        alone = SearchRequest(request.queries[only], request.k, request.filter, request.fields)
        part = QueryPlan(cells=plan.cells[only], layout="a1", shares=plan.shares[only])
        found += collection.search(alone, part)
    return found


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    "condition", [None, models.Filter(must_not=[models.HasIdCondition(has_id=[7, 11])])]
)
def test_a_batch_over_grpc_finds_what_its_queries_find(
    client: QdrantClient, kind: str, condition: models.Filter | None
) -> None:
    points = Points(client)
    collection = server(OverGrpc(client, points))
    request, plan = asked(70, condition)
    wanted = one_by_one(server(client), request, plan)
    if kind == "sync":
        found = collection.search(request, plan)
    else:
        awaited: Any = Awaited(points)
        found = asyncio.run(collection.search_async(awaited, request, plan))
    for hits, alone in zip(found, wanted, strict=True):
        assert [(hit.id, hit.fields) for hit in hits] == [(hit.id, hit.fields) for hit in alone]
        np.testing.assert_allclose(
            [hit.score for hit in hits], [hit.score for hit in alone], rtol=1e-5
        )
    (call,) = points.calls
    filters = [one.filter.SerializeToString(deterministic=True) for one in call.query_points]
    assert len(filters) == 1 + 69 * 4 - 1  # one whole, the others in cells and the overflow
    assert sum(a != b for a, b in pairwise(filters)) == CELLS + 1  # side by side
    assert (call.timeout, points.seconds) == (8, [8])


def test_without_a_timeout_the_client_s_own_holds(client: QdrantClient) -> None:
    points = Points(client)
    collection = server(OverGrpc(client, points))
    request, plan = asked(64)
    collection.search(SearchRequest(request.queries, 5), plan)
    assert points.seconds == [5.0]
    assert not points.calls[0].HasField("timeout")


def test_a_large_batch_over_grpc_is_several_calls(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.searched_points._NUMBERS", 100 * DIM)
    points = Points(client)
    request, plan = asked(70)
    assert len(server(OverGrpc(client, points)).search(request, plan)) == 70
    assert [len(call.query_points) for call in points.calls] == [100, 100, 76]


def test_few_queries_and_other_clients_use_the_client_s_call(client: QdrantClient) -> None:
    points = Points(client)
    server(OverGrpc(client, points)).search(*asked(63))
    server(client).search(*asked(64))
    assert not points.calls


@pytest.mark.parametrize("over", ["grpc", "rest"])
def test_the_calls_of_a_batch_have_one_deadline(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    module = "amips_plugins.adapters.qdrant.searched_points"
    clock = iter(range(0, 1000, 3))  # every look at it is three seconds later
    monkeypatch.setattr(f"{module}._NUMBERS", 100 * DIM)
    points, given = Points(client), list[Any]()
    request, plan = asked(250 if over == "rest" else 70)

    def batch(_: str, requests: Any, timeout: int | None) -> Any:
        given.append(timeout)
        return [SimpleNamespace(points=[]) for _ in requests]

    if over == "rest":
        monkeypatch.setattr(client, "query_batch_points", batch)
        collection, plan = server(client), QueryPlan()
    else:
        collection = server(OverGrpc(client, points))
    monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    collection.search(request, plan)
    assert (given or points.seconds) == [5, 2, 1]  # of 7.5 seconds
    assert given or [call.timeout for call in points.calls] == [5, 2, 1]


def test_an_asynchronous_client_s_own_time_holds(client: QdrantClient) -> None:
    points = Points(client)
    request, plan = asked(64)
    awaited: Any = Awaited(points)
    awaited.init_options = {"prefer_grpc": True, "timeout": 59.5}
    untimed = SearchRequest(request.queries, 5)
    asyncio.run(server(OverGrpc(client, points)).search_async(awaited, untimed, plan))
    assert points.seconds == [60]


@pytest.mark.parametrize("over", ["grpc", "rest"])
def test_queries_without_a_cell_keep_their_places(client: QdrantClient, over: str) -> None:
    request, plan = asked(64)
    shares = np.zeros(64, dtype=np.float32)
    shares[7] = 0.9  # searched whole, and so before the others, which find the overflow
    plan = QueryPlan(cells=np.full((64, 1), -1), layout="a1", shares=shares)
    asks = OverGrpc(client, Points(client)) if over == "grpc" else client
    found = server(asks).search(request, plan)
    wanted = one_by_one(server(client), request, plan)
    assert [[hit.id for hit in hits] for hits in found] == [
        [hit.id for hit in hits] for hits in wanted
    ]
