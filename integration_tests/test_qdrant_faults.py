"""A Qdrant server that hangs, restarts, limits and forbids.

Whatever it answers to the bare client, the router raises the same, and asks no second time; where
the bare client has an answer, so has the router. ``test_qdrant_crashes`` kills.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse

from amips_plugins import AsyncLearnedRouter, LearnedRouter, route
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import AmipsError
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from integration_tests.qdrant_data import (
    DIM,
    KEY,
    Background,
    EveryCell,
    amips,
    create,
    error_of,
    fill,
    keys,
    queries,
    spec,
    until,
)
from integration_tests.servers import QdrantAddress, QdrantServer
from tests.handmade import publish

COUNT = 1500
QUERY = np.ones(DIM, dtype=np.float32)


@pytest.fixture(scope="module")
def client(qdrant_to_break: QdrantServer) -> Iterator[QdrantClient]:
    client = qdrant_to_break.address.client()
    yield client
    client.close()


@pytest.fixture(scope="module")
def name(client: QdrantClient) -> str:
    """A collection in cells; the server goes, and the collection with it."""
    name = create(client)
    fill(client, name, keys(COUNT))
    QdrantCollection(client, name).layouts.build(spec())
    return name


class Counting(QdrantClient):
    """Notes the calls that it sends for its caller, who waits for none of another thread."""

    def __init__(self, **options: Any) -> None:
        self.asked: list[str] = []
        super().__init__(**options)

    def note(self, what: str) -> None:
        if threading.current_thread() is threading.main_thread():
            self.asked.append(what)

    def query_points(self, *args: Any, **kwargs: Any) -> Any:
        self.note("search")
        return super().query_points(*args, **kwargs)

    def query_batch_points(self, *args: Any, **kwargs: Any) -> Any:
        self.note("search")
        return super().query_batch_points(*args, **kwargs)

    def get_collection(self, *args: Any, **kwargs: Any) -> Any:
        self.note("look")
        return super().get_collection(*args, **kwargs)

    def count(self, *args: Any, **kwargs: Any) -> Any:
        self.note("count")
        return super().count(*args, **kwargs)


def counting(address: QdrantAddress, grpc: bool) -> Counting:
    return Counting(
        url=address.url,
        grpc_port=address.grpc_port,
        prefer_grpc=grpc,
        timeout=1,
        check_compatibility=False,
    )


class Routed:
    """A router of a hasty client that searches every cell, and the bare client."""

    def __init__(self, server: QdrantServer, name: str, grpc: bool = False) -> None:
        self.name = name
        self.client = counting(server.address, grpc)
        collection = QdrantCollection(self.client, name)
        self.router = LearnedRouter(collection, hook=EveryCell(), refresh=None)
        self.proxy = route(self.client, self.router)
        assert self.router.search(QUERY, k=5).trace.mode == "route"
        assert self.proxy.query_points(name, QUERY.tolist()).points

    def bare(self, **more: Any) -> list[Any]:
        return [p.id for p in self.client.query_points(self.name, QUERY.tolist(), **more).points]


def cost(
    routed: Routed, call: Callable[[], object]
) -> tuple[float, tuple[str, ...], type[Exception]]:
    """The seconds, the calls to the server and the error of a call that fails."""
    began = time.monotonic()
    routed.client.asked.clear()
    found = error_of(call)
    assert found is not None, "the server answered"
    return time.monotonic() - began, tuple(routed.client.asked), type(found)


@pytest.mark.parametrize("grpc", [False, True], ids=["rest", "grpc"])
def test_a_server_that_hangs_costs_what_it_costs_the_bare_client(
    qdrant_to_break: QdrantServer, name: str, grpc: bool
) -> None:
    """One search, one time, the client's own error; and it counts for the circuit breaker."""
    routed = Routed(qdrant_to_break, name, grpc)
    ways: dict[str, Callable[[], object]] = {
        "router": lambda: routed.router.search(QUERY, k=5),
        "batch": lambda: routed.router.search(np.tile(QUERY, (3, 1)), k=5),
        "proxy": lambda: routed.proxy.query_points(name, QUERY.tolist(), limit=5),
    }
    qdrant_to_break.pause()
    try:
        seconds, _, kind = cost(routed, routed.bare)
        for way, call in ways.items():
            found = cost(routed, call)
            assert found[1:] == (("search",), kind), way
            assert found[0] < 1.5 * seconds, way
        routed.router.enabled = False
        found = cost(routed, ways["router"])
        assert found[1:] == (("search",), kind)
        assert found[0] < 1.5 * seconds
        routed.router.enabled = True
        for _ in range(5 - len(ways)):
            cost(routed, ways["router"])
    finally:
        qdrant_to_break.unpause()
    qdrant_to_break.wait_until_ready(name)
    assert routed.router.search(QUERY).trace.mode == "native"  # the breaker is open
    until(lambda: routed.router.search(QUERY).trace.mode == "route")


@pytest.mark.parametrize("grpc", [False, True], ids=["rest", "grpc"])
def test_an_asynchronous_client_of_a_server_that_hangs(
    qdrant_to_break: QdrantServer, name: str, grpc: bool
) -> None:
    async def run() -> tuple[float, float, type, type]:
        client = qdrant_to_break.address.async_client(timeout=1, prefer_grpc=grpc)
        inner = LearnedRouter(
            QdrantCollection(qdrant_to_break.address.client(timeout=1), name),
            hook=EveryCell(),
            refresh=None,
        )
        router = AsyncLearnedRouter(inner, client)
        assert (await router.search(QUERY, k=5)).trace.mode == "route"
        times, kinds = [], []

        async def bare(asked: AsyncQdrantClient) -> None:
            await asked.query_points(name, QUERY.tolist())

        qdrant_to_break.pause()
        try:
            for call in (lambda: bare(client), lambda: router.search(QUERY, k=5)):
                began = time.monotonic()
                with pytest.raises(Exception) as caught:  # noqa: PT011 - compared
                    await call()
                times.append(time.monotonic() - began)
                kinds.append(caught.type)
        finally:
            qdrant_to_break.unpause()
        await client.close()
        return (*times, *kinds)  # type: ignore[return-value]

    alone, routed, bare_kind, kind = asyncio.run(run())
    assert kind is bare_kind
    assert routed < 1.5 * alone
    qdrant_to_break.wait_until_ready(name)


def test_a_call_has_its_own_deadline(qdrant_to_break: QdrantServer, name: str) -> None:
    """Which the client's is longer than."""
    client = qdrant_to_break.address.client(timeout=30)
    router = LearnedRouter(QdrantCollection(client, name), hook=EveryCell(), refresh=None)
    qdrant_to_break.pause()
    try:
        began = time.monotonic()
        assert error_of(lambda: router.search(QUERY, timeout=1.0)) is not None
        assert time.monotonic() - began < 3.0
    finally:
        qdrant_to_break.unpause()
    qdrant_to_break.wait_until_ready(name)


def test_a_restart_shows_no_error_that_the_bare_client_has_not(
    qdrant_to_break: QdrantServer, name: str
) -> None:
    """Each search of the router stands between two of the bare client."""
    routed = Routed(qdrant_to_break, name)
    seen: set[tuple[bool, bool, bool]] = set()
    only_ours: list[Exception] = []

    def search() -> None:
        before = error_of(routed.bare)
        ours = error_of(lambda: routed.router.search(QUERY, k=5))
        after = error_of(routed.bare)
        seen.add((before is None, ours is None, after is None))
        if ours is not None and before is None and after is None:
            only_ours.append(ours)

    with Background(search) as searching:
        qdrant_to_break.restart()
        qdrant_to_break.wait_until_ready(name)
        until(lambda: routed.router.search(QUERY).trace.mode == "route")
        done = searching.times
        until(lambda: searching.times > done + 5)
    assert (only_ours, searching.wrong) == ([], [])
    assert (True, True, True) in seen


def strict(client: QdrantClient, name: str, **settings: Any) -> None:
    """Set these; the server keeps what was set before."""
    client.update_collection(
        name, strict_mode_config=models.StrictModeConfig(enabled=True, **settings)
    )


@pytest.fixture
def fresh(client: QdrantClient) -> Iterator[str]:
    name = create(client)
    fill(client, name, keys(COUNT))
    yield name
    client.delete_collection(name)


def refused_for_the_rate(error: Exception | None) -> bool:
    return isinstance(error, ResourceExhaustedResponse) or getattr(error, "status_code", 0) == 429


def test_a_limit_of_reads_leaves_a_routed_client_as_many_answers(
    client: QdrantClient, fresh: str, tmp_path: Path
) -> None:
    """The server charges each search and each condition of its filter."""
    publish(QdrantCollection(client, fresh), queries(300), tmp_path)
    router = LearnedRouter(
        QdrantCollection(client, fresh), registry=tmp_path / "registry", refresh=None
    )
    assert router.search(QUERY).trace.mode == "route"
    answered = {}
    for what, asked in (("bare", client), ("routed", route(client, router))):
        strict(client, fresh, read_rate_limit=60)  # a budget is full when it is given
        found = [
            error_of(lambda: asked.query_points(fresh, QUERY.tolist(), limit=5))  # noqa: B023
            for _ in range(100)
        ]
        answered[what] = sum(one is None for one in found)
        assert all(refused_for_the_rate(one) for one in found if one is not None)
    assert answered["routed"] >= 0.8 * answered["bare"], answered


def test_a_refusal_for_the_rate_is_not_answered_by_a_second_search(
    qdrant_to_break: QdrantServer, client: QdrantClient, fresh: str
) -> None:
    QdrantCollection(client, fresh).layouts.build(spec())
    routed = Routed(qdrant_to_break, fresh)
    strict(client, fresh, read_rate_limit=1)
    until(lambda: error_of(routed.bare) is not None, every=0)
    for call in (
        lambda: routed.router.search(QUERY, k=5),
        lambda: routed.proxy.query_points(fresh, QUERY.tolist(), limit=5),
    ):
        until(lambda: error_of(routed.bare) is not None, every=0)
        routed.client.asked.clear()
        assert refused_for_the_rate(error_of(call))
        assert routed.client.asked == ["search"]
    strict(client, fresh, read_rate_limit=100_000)
    until(lambda: routed.router.search(QUERY).trace.mode == "route")


@pytest.mark.parametrize(("count", "reads"), [(1500, 1200), (900, 700)])
def test_a_build_under_a_limit_of_reads_gets_on_with_every_budget(
    client: QdrantClient, fresh: str, count: int, reads: int
) -> None:
    """Or it is refused by name before anything is written."""
    gone = models.FilterSelector(
        filter=models.Filter(must=[models.FieldCondition(key="row", range=models.Range(gte=count))])
    )
    client.delete(fresh, gone, wait=True)
    placed = models.Filter(must=[models.FieldCondition(key=KEY, range=models.Range(gte=0))])
    runs = [0]
    for _ in range(8):
        strict(client, fresh, read_rate_limit=reads)
        said = error_of(lambda: QdrantCollection(client, fresh).layouts.build(spec()))
        strict(client, fresh, read_rate_limit=10**6)
        if said is None:
            return
        named = isinstance(said, AmipsError) and "rate" in str(said)
        if named and not client.get_collection(fresh).config.metadata:
            return
        runs.append(client.count(fresh, placed).count)
        assert runs[-1] > runs[-2], (runs, said)
    raise AssertionError(f"never done: {runs}")


class TestStrictModeThatComesLater:
    """Exact searches, and even exact counts, are forbidden when the cells are there already."""

    @pytest.fixture(params=[True, False], ids=["with cells", "without"])
    def forbidden(
        self, request: pytest.FixtureRequest, client: QdrantClient, fresh: str, tmp_path: Path
    ) -> str:
        self.cells = bool(request.param)
        if self.cells:
            publish(QdrantCollection(client, fresh), queries(300), tmp_path)
        strict(client, fresh, search_allow_exact=False)
        return fresh

    def test_a_router_starts_and_answers_as_the_bare_client(
        self, client: QdrantClient, forbidden: str, tmp_path: Path
    ) -> None:
        router = LearnedRouter(
            QdrantCollection(client, forbidden), registry=tmp_path / "registry", refresh=None
        )
        for query in queries(5):
            bare = client.query_points(forbidden, query.tolist(), limit=5).points
            assert [hit.id for hit in router.search(query, k=5)] == [one.id for one in bare]
        router.refresh()
        assert router.search(QUERY, k=3)

    def test_commands_do_their_work_or_say_a_sentence(
        self, qdrant_to_break: QdrantServer, forbidden: str, tmp_path: Path
    ) -> None:
        uri = qdrant_to_break.address.uri(forbidden)
        np.save(tmp_path / "queries.npy", queries(300))
        registry = ("--registry", tmp_path / "registry")
        asked = ("--queries", tmp_path / "queries.npy", "--cells", 4)
        for command in (
            ("status", uri, *registry),
            ("layout", "status", uri),
            ("snapshot", uri, "-o", tmp_path / "snapshot"),
            ("doctor", uri, *asked),
        ):
            _, said = amips(*command)
            assert said.strip(), command[0]
            for raw in ("Unexpected Response", "Raw response", "should not have", "Traceback"):
                assert raw not in said, command[0]


def test_a_limit_of_conditions_that_comes_later(
    client: QdrantClient, fresh: str, tmp_path: Path
) -> None:
    publish(QdrantCollection(client, fresh), queries(300), tmp_path)
    strict(client, fresh, filter_max_conditions=1)
    router = LearnedRouter(
        QdrantCollection(client, fresh), registry=tmp_path / "registry", refresh=None
    )
    for query in queries(5):
        bare = {one.id for one in client.query_points(fresh, query.tolist(), limit=5).points}
        assert len(bare & {hit.id for hit in router.search(query, k=5)}) >= 3


def test_more_candidates_than_strict_mode_allows(client: QdrantClient, fresh: str) -> None:
    """A rewrite asks for as many as it may; the search is not held against the model."""
    strict(client, fresh, max_query_limit=50)
    collection = QdrantCollection(client, fresh)
    assert collection.max_candidates == 50
    router = LearnedRouter(collection, hook=Blurred(), refresh=None)
    for _ in range(8):
        assert len(router.search(QUERY, k=5)) == 5
    assert router.search(QUERY, k=5).trace.mode == "rewrite"


class Blurred:
    """Rewrites the query a little, and wants many candidates."""

    def plan(self, asked: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(rewritten=asked + np.float32(0.01), rescore=200)


def test_an_error_of_the_callers_own_is_the_clients(
    qdrant_to_break: QdrantServer, client: QdrantClient, fresh: str
) -> None:
    QdrantCollection(client, fresh).layouts.build(spec())
    routed = Routed(qdrant_to_break, fresh)
    strict(client, fresh, unindexed_filtering_retrieve=False)
    match = models.MatchValue(value=1)
    bad = models.Filter(must=[models.FieldCondition(key="row", match=match)])
    _, _, kind = cost(routed, lambda: routed.bare(query_filter=bad))
    for call in (
        lambda: routed.router.search(QUERY, k=5, filter=bad),
        lambda: routed.proxy.query_points(fresh, QUERY.tolist(), query_filter=bad),
    ):
        found = cost(routed, call)
        assert found[2] is kind
        assert found[1].count("search") <= 2
    assert not routed.router.fallbacks["breaker: search"]


@pytest.mark.parametrize("links", [0, 16])
def test_codes_that_are_taken_away_under_a_router(client: QdrantClient, links: int) -> None:
    """Cells are found as before, and the next look at the collection notices."""
    name = create(client)
    client.update_collection(
        name,
        hnsw_config=models.HnswConfigDiff(m=links),
        vectors_config={"": models.VectorParamsDiff(on_disk=True)},
        quantization_config=models.ScalarQuantization(
            scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8)
        ),
    )
    fill(client, name, keys(COUNT))
    QdrantCollection(client, name).layouts.build(spec())
    collection = QdrantCollection(client, name)
    router = LearnedRouter(collection, hook=EveryCell(), refresh=None)
    asked = queries(30)

    def found() -> list[list[Any]]:
        return [[hit.id for hit in router.search(query, k=10)] for query in asked]

    exact = [[hit.id for hit in hits] for hits in collection.exact(SearchRequest(asked, k=10))]

    def recall() -> float:
        pairs = zip(found(), exact, strict=True)
        return float(np.mean([len(set(one) & set(other)) / 10 for one, other in pairs]))

    assert collection._found.codes is not None
    assert recall() >= 0.98
    client.update_collection(name, quantization_config=models.Disabled.DISABLED)
    until(lambda: client.get_collection(name).status == models.CollectionStatus.GREEN)
    assert recall() >= 0.98  # by an object that still takes them for there
    assert collection.current()._found.codes is None
    assert recall() == 1.0
    assert router.fallbacks == {}
