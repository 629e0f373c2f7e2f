"""The router for tasks: the same answers, and nothing left behind by a task that is cancelled."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge
from qdrant_client import AsyncQdrantClient, models

from amips_plugins import AsyncLearnedRouter, LearnedRouter, QdrantEdgeCollection, Registry
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Hit, SearchRequest, collection_key
from amips_plugins.errors import CollectionError, CollectionNotFound, InvalidInput
from amips_plugins.layout import lay_out
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray
from tests.support.bundles import COUNT, DIM, laid_out, memory, open_bundle, vectors, write_bundle
from tests.support.routing_data import QUERIES, DatabaseError, Hook, Spy, pairs

pymilvus = pytest.importorskip("pymilvus")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


class Awaited(Spy):
    """Takes as long as it is told to."""

    def __init__(self, inner: MemoryCollection, failures: Any = ()) -> None:
        super().__init__(inner, failures)
        self.hold: asyncio.Event | None = None

    async def search_async(
        self, client: object, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        if self.hold is not None:
            await self.hold.wait()
        return await super().search_async(client, request, plan)


def test_answers_traces_and_errors_are_those_of_the_router(folder: Path) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder, refresh=None)
    awaited = AsyncLearnedRouter(router, None)
    asked: list[tuple[Any, dict[str, Any]]] = [
        (QUERIES, {"k": 5, "n_probes": 2}),
        (QUERIES[0], {"k": 5}),
        (QUERIES, {"k": 3, "recall": 0.5, "fields": ["group"], "filter": lambda key, _: key % 2}),
        (QUERIES[0], {"k": 40, "n_probes": 1, "timeout": 5.0}),
    ]
    for queries, more in asked:
        found = asyncio.run(awaited.search(queries, **more))
        expected = router.search(queries, **more)
        if queries.ndim == 1:
            found, expected = [found], [expected]
        for hits, others in zip(found, expected, strict=True):
            assert hits.trace == others.trace
            assert [(hit.id, hit.fields) for hit in hits] == [
                (hit.id, hit.fields) for hit in others
            ]
    assert asyncio.run(awaited.search(QUERIES[0], explain=True)).trace.plan_us > 0
    bad: list[tuple[Any, dict[str, Any]]] = [
        (QUERIES, {"k": 0}),
        (QUERIES[:, :2], {}),
    ]
    for queries, more in bad:
        with pytest.raises(InvalidInput):
            asyncio.run(awaited.search(queries, **more))


def test_writes_and_refreshes(folder: Path) -> None:
    router = AsyncLearnedRouter(LearnedRouter(laid_out(folder), bundle=folder, refresh=None), None)

    async def write() -> None:
        await router.upsert([1000], vectors(9, 1))
        assert (await router.search(vectors(9, 1)[0], k=1))[0].id == 1000
        await router.delete([1000])
        assert not await router.refresh()

    asyncio.run(write())
    assert router.router.collection.count() == COUNT


def test_a_database_without_an_asynchronous_client_is_refused(tmp_path: Path) -> None:
    config = edge.EdgeConfig(vectors=edge.EdgeVectorParams(size=2, distance=edge.Distance.Dot))
    shard = edge.EdgeShard.create(str(tmp_path), config)
    router = LearnedRouter(QdrantEdgeCollection(shard, tmp_path), hook=NativeHook())
    with pytest.raises(InvalidInput, match="to_thread"):
        AsyncLearnedRouter(router, None)
    shard.close()


def test_it_cannot_be_pickled() -> None:
    router = LearnedRouter(memory(), hook=NativeHook())
    for one in (router, AsyncLearnedRouter(router, None)):
        with pytest.raises(TypeError, match="in every process"):
            pickle.dumps(one)


# One asynchronous client alone


async def fill(client: AsyncQdrantClient) -> None:
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    await client.create_collection("docs", vectors_config=params)
    points = [models.PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(vectors())]
    await client.upsert("docs", points)


def test_the_life_of_a_router_of_an_asynchronous_client(tmp_path: Path) -> None:
    async def live() -> None:
        client = AsyncQdrantClient(":memory:")
        await fill(client)
        registry = Registry(tmp_path / "registry")
        router = await AsyncLearnedRouter.open(client, "docs", registry=registry, refresh=None)
        collection = router.router.collection
        bundle = write_bundle(tmp_path / "v1", collection=collection_key(collection.info))
        registry.publish(bundle)
        native = await router.search(QUERIES[0], k=3, n_probes=2)
        assert native.trace.fallback == "bundle: BundleNotFound"
        await asyncio.to_thread(lay_out, collection, open_bundle(bundle))
        assert await router.refresh()
        found = await router.search(vectors(), k=1, n_probes=2)
        assert {hits.trace.mode for hits in found} == {"route"}
        assert [hits[0].id for hits in found].count(0) == 1
        await router.upsert([1000], vectors(9, 1))
        assert (await router.search(vectors(9, 1)[0], k=1))[0].id == 1000
        await router.delete([1000])
        assert await asyncio.to_thread(router.router.overflow_share) == 0.0
        assert len(await asyncio.to_thread(router.router.search, QUERIES[0], k=3)) == 3
        with pytest.raises(CollectionError, match="to_thread"):  # it would wait for itself
            router.router.collection.count()
        await client.close()

    asyncio.run(live())


def test_what_cannot_be_opened() -> None:
    async def attempt(name: str = "docs", client: Any = None, **options: Any) -> None:
        one = AsyncQdrantClient(":memory:")
        await fill(one)
        try:
            await AsyncLearnedRouter.open(client or one, name, **options)
        finally:
            await one.close()

    with pytest.raises(CollectionNotFound, match="others"):
        asyncio.run(attempt("others", hook=NativeHook()))
    with pytest.raises(InvalidInput, match="refresh="):
        asyncio.run(attempt(refresh=-1.0, hook=NativeHook()))
    with pytest.raises(InvalidInput, match="no asynchronous client"):
        asyncio.run(attempt(client=object()))


# Cancelled, or out of time


def sound(router: LearnedRouter) -> None:
    """Nothing has been learned from a search that nobody waited for."""
    assert router._follower.serving.model_breaker.closed
    assert router._follower.serving.search_breaker.closed
    assert (
        router._follower.serving.model_breaker._failed
        == router._follower.serving.search_breaker._failed
        == 0
    )
    assert not router.fallbacks
    assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"


@pytest.mark.parametrize("by_timeout", [False, True])
def test_a_task_that_goes_away_during_a_search(folder: Path, by_timeout: bool) -> None:
    spy = Awaited(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder, refresh=None)
    awaited = AsyncLearnedRouter(router, None)

    async def main() -> None:
        spy.hold = asyncio.Event()
        for _ in range(20):
            search = awaited.search(QUERIES, k=3, n_probes=2)
            if by_timeout:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(search, 0.005)
                continue
            task = asyncio.create_task(search)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        spy.hold = None
        assert len(await awaited.search(QUERIES, k=3, n_probes=2)) == len(QUERIES)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    sound(router)


def test_a_task_that_goes_away_while_the_model_plans() -> None:
    """The model goes on in vain, and what it gives is nobody's."""
    collection = memory()
    collection.layouts.build(
        LayoutSpec("here", 6, lambda ids, _: np.array([int(key) % 6 for key in ids]))
    )
    hold, entered = threading.Event(), threading.Semaphore(0)

    def give(queries: FloatArray) -> QueryPlan:
        entered.release()
        assert hold.wait(20)
        return QueryPlan(cells=np.zeros((len(queries), 1), dtype=np.int64), layout="here")

    router = LearnedRouter(collection, hook=Hook(give), refresh=None, plan_timeout=10.0)
    awaited = AsyncLearnedRouter(router, None)

    async def main() -> None:
        tasks = [asyncio.create_task(awaited.search(QUERIES[0], k=3)) for _ in range(10)]
        for _ in tasks:
            assert await asyncio.to_thread(entered.acquire, timeout=20)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError)
            for end in await asyncio.gather(*tasks, return_exceptions=True)
        )
        hold.set()
        assert (await awaited.search(QUERIES[0], k=3)).trace.mode == "route"

    asyncio.run(main())
    assert router._follower.serving.model_breaker._failed == 0
    assert not router.fallbacks


def test_a_slow_model_holds_up_no_other_task() -> None:
    hold = threading.Event()

    def give(_: FloatArray) -> QueryPlan:
        hold.wait(20)
        return QueryPlan()

    slow = LearnedRouter(memory(), hook=Hook(give), refresh=None, plan_timeout=0.02)

    async def main() -> None:
        waiting = asyncio.create_task(AsyncLearnedRouter(slow, None).search(QUERIES[0], k=3))
        turns = 0
        while not waiting.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 10
        assert waiting.result().trace.fallback == "model: TimeoutError"

    asyncio.run(main())
    hold.set()


def test_a_routed_search_that_fails_is_searched_natively(folder: Path) -> None:
    spy = Awaited(laid_out(folder), [DatabaseError("partition gone")])
    router = LearnedRouter(spy, bundle=folder, refresh=None)
    found = asyncio.run(AsyncLearnedRouter(router, None).search(QUERIES, k=5, n_probes=2))
    assert {hits.trace.fallback for hits in found} == {"search: DatabaseError"}
    spy.failures = iter([DatabaseError("first"), DatabaseError("second")])
    with pytest.raises(DatabaseError, match="second"):
        asyncio.run(AsyncLearnedRouter(router, None).search(QUERIES, k=5, n_probes=2))


# The calls of one Milvus search


class Watched:
    """Milvus Lite's asynchronous client; counts calls, and slows or fails some of them."""

    def __init__(self, client: Any, before: Callable[[list[str]], Any]) -> None:
        self.client = client
        self.before = before
        self.under_way = self.most = self.begun = self.cancelled = 0
        self.timeouts: list[float | None] = []

    async def search(self, **arguments: Any) -> Any:
        self.begun += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.timeouts.append(arguments["timeout"])
        try:
            await self.before(arguments["partition_names"])
            return await self.client.search(**arguments)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1


N_CELLS = 12


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("milvus_lite")
    path = str(tmp_path_factory.mktemp("lite") / "docs.db")
    client = pymilvus.MilvusClient(path)
    client.create_collection("docs", dimension=DIM, metric_type="IP")
    client.insert("docs", [{"id": i, "vector": v.tolist()} for i, v in enumerate(vectors())])
    spec = LayoutSpec("here", N_CELLS, lambda ids, _: np.array(ids) % N_CELLS)
    collection = MilvusCollection(client, "docs").layouts.build(spec)
    yield path, collection
    client.close()


QUERY_A_CELL = SearchRequest(vectors(7, N_CELLS), k=3, timeout=30.0)
A_CELL_EACH = QueryPlan(cells=np.arange(N_CELLS)[:, None], layout="here")


def on_lite(path: str, before: Any, use: Callable[[Watched], Any]) -> Any:
    async def main() -> Any:
        async with pymilvus.AsyncMilvusClient(path) as client:
            result = await use(Watched(client, before))
            assert asyncio.all_tasks() - {asyncio.current_task()} == set()
            return result

    return asyncio.run(main())


@pytest.mark.slow
def test_calls_for_different_cells_are_under_way_together(lite: Any) -> None:
    path, collection = lite
    watched: list[Watched] = []

    async def use(client: Watched) -> Any:
        watched.append(client)
        return await collection.search_async(client, QUERY_A_CELL, A_CELL_EACH)

    async def wait(_: list[str]) -> None:
        await asyncio.sleep(0.02)

    found = on_lite(path, wait, use)
    assert found == collection.search(QUERY_A_CELL, A_CELL_EACH)
    assert [[hit.id % N_CELLS for hit in hits] for hits in found] == [
        [cell] * 3 for cell in range(N_CELLS)
    ]
    (client,) = watched
    assert (client.begun, client.most) == (N_CELLS, 8)
    # One deadline: those that had to wait for their turn have less time.
    assert client.timeouts == sorted((t or 0.0 for t in client.timeouts), reverse=True)
    assert client.timeouts[-1] is not None
    assert client.timeouts[-1] < 30.0 - 0.015


def test_where_one_call_fails_the_others_are_not_waited_for(lite: Any) -> None:
    path, collection = lite

    async def fail_at_five(partitions: list[str]) -> None:
        if partitions[-1].endswith("0005"):
            raise DatabaseError("lost")
        await asyncio.sleep(3600)

    async def use(client: Watched) -> None:
        with pytest.raises(DatabaseError, match="lost"):
            await collection.search_async(client, QUERY_A_CELL, A_CELL_EACH)
        while client.under_way:
            await asyncio.sleep(0)
        assert client.cancelled == client.begun - 1
        assert client.begun < N_CELLS  # those that waited for their turn never got it
        await asyncio.sleep(0)

    on_lite(path, fail_at_five, use)


def test_a_cancelled_search_cancels_its_calls(lite: Any) -> None:
    path, collection = lite

    async def hang(_: list[str]) -> None:
        await asyncio.sleep(3600)

    async def use(client: Watched) -> None:
        task = asyncio.create_task(collection.search_async(client, QUERY_A_CELL, A_CELL_EACH))
        while client.under_way < 8:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while client.under_way:
            await asyncio.sleep(0)
        assert client.cancelled == 8
        await asyncio.sleep(0)

    on_lite(path, hang, use)


@pytest.mark.slow
def test_a_lost_partition_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    path = str(tmp_path / "docs.db")
    client = pymilvus.MilvusClient(path)
    client.create_collection("docs", dimension=DIM, metric_type="IP")
    client.insert("docs", [{"id": i, "vector": v.tolist()} for i, v in enumerate(vectors())])
    spec = LayoutSpec("here", 3, lambda ids, _: np.array(ids) % 3)
    collection = MilvusCollection(client, "docs").layouts.build(spec)
    lost = "cell_here_0001"
    client.drop_partition(collection.info.name, lost)
    assert isinstance(collection, MilvusCollection)

    async def search() -> Any:
        async with pymilvus.AsyncMilvusClient(path) as client:
            plan = QueryPlan(cells=np.array([[1]]), layout="here")
            return await collection.search_async(client, SearchRequest(QUERIES[:1], 3), plan)

    with pytest.raises(CollectionError, match=lost):
        asyncio.run(search())
    client.close()


def test_the_first_use_of_a_collection_looks_on_a_thread(lite: Any) -> None:
    """Two clients, and nothing known of the collection yet: the event loop is not held up."""
    path, collection = lite
    fresh = MilvusCollection(collection.client, collection.info.name)
    here, looked = threading.get_ident(), []
    real = fresh.table

    def table() -> Any:
        if fresh._table is None:
            looked.append(threading.get_ident())
        return real()

    fresh.table = table  # type: ignore[method-assign]

    async def search() -> Any:
        async with pymilvus.AsyncMilvusClient(path) as client:
            return await fresh.search_async(client, SearchRequest(QUERIES[:1], 3))

    found = asyncio.run(search())
    assert [pairs(hits) for hits in found] == [
        pairs(hits) for hits in collection.search(SearchRequest(QUERIES[:1], 3))
    ]
    assert len(looked) == 1
    assert looked[0] != here
