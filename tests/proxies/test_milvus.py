"""Milvus clients, routed: the engine is Milvus Lite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import CellIndex
from amips_plugins.errors import InvalidInput
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.proxies.records import hide
from amips_plugins.vectors import FloatArray
from tests.handmade import publish
from tests.support.known_filters import KnowsEveryFilter
from tests.support.proxy_data import COUNT, DIM, Broken, EveryCell, OneCell, Rewrite, keys, queries

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

QUERY = queries(7, 1)[0].tolist()


class Watched(pymilvus.MilvusClient):  # type: ignore[name-defined,misc]
    """Notes every search; ``failures`` are raised first, one a search."""

    calls: list[tuple[Any, dict[str, Any]]]
    failures: list[Exception]

    def search(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if self.failures:
            raise self.failures.pop(0)
        return super().search(*args, **kwargs)


class WatchedAsync(pymilvus.AsyncMilvusClient):  # type: ignore[name-defined,misc]
    calls: list[tuple[Any, dict[str, Any]]]
    failures: list[Exception]

    async def search(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if self.failures:
            raise self.failures.pop(0)
        return await super().search(*args, **kwargs)


class Database:
    """A collection in cells, a plain client of it, and one to be routed, of either kind."""

    def __init__(
        self, folder: Path, path: Path, kind: str, storage: str, metric: str, codes: bool = False
    ) -> None:
        self.bare = pymilvus.MilvusClient(str(path))
        self.kind = kind
        source = f"source_{storage}_{metric}_{'codes' * codes}".lower()
        schema = self.bare.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("key", pymilvus.DataType.VARCHAR, is_primary=True, max_length=20)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
        schema.add_field("group", pymilvus.DataType.INT64)
        index = self.bare.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type=metric)
        self.bare.create_collection(source, schema=schema, index_params=index)
        rows = [
            {"key": f"k{row}", "vector": key.tolist(), "group": row % 3, "more": f"row {row}"}
            for row, key in enumerate(keys())
        ]
        self.bare.insert(source, rows)
        collection = MilvusCollection(self.bare, source)
        inside: CellIndex | None = "ivf_sq8" if codes else None
        built = publish(collection, queries(1, 400), folder, storage=storage, index=inside)
        self.registry = folder / "registry"
        self.name = built.info.name
        self.layout = built.layout() or ""
        self.storage = storage
        self.path = path
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.failures: list[Exception] = []

    def router(
        self, hook: Any = None, name: str | None = None, watch: HealthMonitor | None = None
    ) -> LearnedRouter:
        collection = MilvusCollection(self.bare, name or self.name)
        watch = watch or KnowsEveryFilter()
        if hook is not None:
            return LearnedRouter(collection, hook=hook, watch=watch)
        return LearnedRouter(collection, registry=self.registry, watch=watch)

    def every_cell(self) -> EveryCell:
        return EveryCell(self.layout, 8)

    def search(self, router: LearnedRouter, *args: Any, **kwargs: Any) -> Any:
        """Search through a routed client."""
        more = {"recall": kwargs.pop("recall")} if "recall" in kwargs else {}
        if self.kind == "sync":
            client = Watched(str(self.path))
            client.calls, client.failures = self.calls, self.failures
            try:
                return route(client, router, **more).search(*args, **kwargs)
            finally:
                client.close()

        async def one() -> Any:  # a client belongs to the loop that it was first used in
            client = WatchedAsync(str(self.path))
            client.calls, client.failures = self.calls, self.failures
            async with route(client, router, **more) as routed:
                return await routed.search(*args, **kwargs)

        return asyncio.run(one())


@pytest.fixture(scope="module", params=["sync", "async"])
def built(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Database]]:
    made: dict[Any, Database] = {}
    path = tmp_path_factory.mktemp("milvus") / "docs.db"

    def build(storage: str = "partitions", metric: str = "COSINE", codes: bool = False) -> Database:
        asked = storage, metric, codes
        if asked not in made:
            folder = tmp_path_factory.mktemp("bundle")
            made[asked] = Database(folder, path, request.param, *asked)
        return made[asked]

    yield build
    for database in made.values():
        database.bare.close()


@pytest.fixture
def database(built: Callable[..., Database]) -> Database:
    found = built()
    found.calls.clear()
    return found


def names_cells(kwargs: Any) -> bool:
    return bool(kwargs.get("partition_names")) or "amips_cell in" in kwargs.get("filter", "")


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for the last bits of the scores."""
    assert type(found) is type(expected)
    assert found.extra == expected.extra
    assert found.recalls == expected.recalls
    (hits,), (wanted,) = found, expected
    assert type(hits) is type(wanted)
    assert list(hits.ids) == list(wanted.ids)
    assert list(hits.distances) == pytest.approx(list(wanted.distances), rel=1e-4, abs=1e-5)
    for hit, other in zip(hits, wanted, strict=True):
        assert type(hit) is type(other)
        hide(other.fields)  # a bare client shows the cell
        assert hit["distance"] == pytest.approx(other["distance"], rel=1e-4, abs=1e-5)
        assert {**hit, "distance": 0} == {**other, "distance": 0}
        assert hit.fields == other.fields
        assert hit.get("group") == other.get("group")


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"limit": 7, "output_fields": ["group"]},
    {"limit": 5, "search_params": {"offset": 4}},
    {"limit": 5, "offset": 3},
    {"filter": "group == 1 or key < 'k3'", "limit": 8, "output_fields": ["*"]},
    {"output_fields": ["vector", "more"], "timeout": 5.0},
    {"anns_field": "vector", "search_params": {"params": {"nprobe": 4}}},
    {"search_params": {}, "output_fields": ["$meta", "group"], "consistency_level": "Strong"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("hook", ["cells", "rewrite"])
@pytest.mark.parametrize(
    ("storage", "metric"), [("partitions", "COSINE"), ("field", "L2"), ("partitions", "IP")]
)
@pytest.mark.slow
def test_results_are_the_clients_own(
    built: Callable[..., Database], storage: str, metric: str, hook: str, arguments: dict[str, Any]
) -> None:
    database = built(storage, metric)
    given = {"collection_name": database.name, "data": [QUERY], **arguments}
    expected = database.bare.search(**given)
    database.calls.clear()
    router = database.router(database.every_cell() if hook == "cells" else Rewrite())
    found = database.search(router, **given)
    assert len(expected[0]) == given.get("limit", 10)
    assert_same(found, expected)
    ((args, kwargs),) = database.calls
    assert args == ()
    if hook == "cells":
        assert names_cells(kwargs)
        kept = set(given) - {"filter", "timeout"}
        assert {name: kwargs[name] for name in kept} == {name: given[name] for name in kept}
    else:
        assert kwargs["data"][0].tolist() != QUERY
        assert kwargs["limit"] == COUNT


def test_arguments_by_position(database: Database) -> None:
    router = database.router(database.every_cell())
    given = (database.name, np.array([QUERY], np.float32), "group == 1", 6, ["group"])
    assert_same(database.search(router, *given), database.bare.search(*given))
    assert names_cells(database.calls[-1][1])


def ranker() -> Any:
    return pymilvus.Function(
        name="decay",
        input_field_names=["group"],
        function_type=pymilvus.FunctionType.RERANK,
        params={"reranker": "decay", "function": "gauss", "origin": 0, "scale": 1},
    )


UNTOUCHED: dict[str, dict[str, Any]] = {
    "several queries": {"data": [QUERY, QUERY]},
    "a flat vector": {"data": QUERY},
    "text": {"data": ["what is it"]},
    "ids": {"ids": ["k1"]},
    "a range": {"data": [QUERY], "search_params": {"params": {"radius": 0.1}}},
    "another metric": {"data": [QUERY], "search_params": {"metric_type": "L2"}},
    "partitions": {"data": [QUERY], "partition_names": ["_default"]},
    "groups": {"data": [QUERY], "group_by_field": "group"},
    "rounded": {"data": [QUERY], "round_decimal": 2},
    "ranker": {"data": [QUERY], "ranker": ranker()},
    "unknown argument": {"data": [QUERY], "no_such": 1},
    "another field": {"data": [QUERY], "anns_field": "nope"},
    "another collection": {"data": [QUERY], "collection_name": "nope"},
    "too short": {"data": [QUERY[:-1]]},
    "not finite": {"data": [[float("nan")] * DIM]},
    "no limit": {"data": [QUERY], "limit": 0},
    "a filter that is none": {"data": [QUERY], "filter": 3},
    "a name for a list": {"data": [QUERY], "output_fields": "group"},
    "names as a set": {"data": [QUERY], "output_fields": {"group"}},
    "no time": {"data": [QUERY], "timeout": 0},
}


@pytest.mark.parametrize("arguments", UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_everything_else_passes_untouched(database: Database, arguments: dict[str, Any]) -> None:
    router = database.router(Broken())
    given = {"collection_name": database.name, **arguments}

    def answer(ask: Callable[[], Any]) -> str:
        try:
            return str(list(ask()[0]))
        except Exception as exc:  # noqa: BLE001 - whatever the client raises
            return type(exc).__name__

    expected = answer(lambda: database.bare.search(**given))
    # The two clients do not raise the same everywhere; without time either may be in time or late.
    if database.kind == "sync" and "timeout" not in arguments:
        assert answer(lambda: database.search(router, **given)) == expected
    else:
        answer(lambda: database.search(router, **given))
    ((args, kwargs),) = database.calls
    assert args == ()
    assert set(kwargs) == set(given)
    assert all(kwargs[name] is given[name] for name in given)
    assert not router.fallbacks  # the model was not even asked


def test_a_native_plan_is_the_callers_call(database: Database) -> None:
    class Native:
        def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
            return NATIVE

    data = [QUERY]
    database.search(database.router(Native()), database.name, data, limit=3)
    assert database.calls == [((database.name, data), {"limit": 3})]
    assert database.calls[0][0][1] is data


def test_a_broken_model_leaves_the_callers_call(database: Database) -> None:
    router = database.router(Broken())
    found = database.search(router, database.name, [QUERY], filter="group == 1")
    assert_same(found, database.bare.search(database.name, [QUERY], filter="group == 1"))
    assert database.calls == [((database.name, [QUERY]), {"filter": "group == 1"})]
    assert router.fallbacks == {"model: RuntimeError": 1}


def test_a_filter_that_nothing_is_known_of_leaves_the_callers_call(database: Database) -> None:
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0, drift_share=0.0)
    router = database.router(database.every_cell(), watch=watch)
    asked: list[dict[str, Any]] = [
        {"filter": "group == 1"},
        {"filter": "group == 2", "search_params": {"offset": 2}},
        {"filter": "group == 2", "filter_params": {"group": 2}},  # a template, as far as Lite goes
    ]
    for given in asked:
        database.calls.clear()
        found = database.search(router, database.name, [QUERY], **given)
        assert_same(found, database.bare.search(database.name, [QUERY], **given))
        assert database.calls == [((database.name, [QUERY]), given)]
        assert watch.idle(20)
    assert router.fallbacks == {"filter: not measured": 3}
    # Measured is what the expression and the query say by themselves.
    assert not watch.failures
    assert watch.health is not None
    assert [(one.shape, one.samples) for one in watch.health.filters] == [("group == ?", 1)]
    database.calls.clear()
    database.search(router, database.name, [QUERY], filter="")
    assert names_cells(database.calls[0][1])


def test_a_recall_of_one_asks_the_client_for_its_widest_search(database: Database) -> None:
    asked: list[dict[str, Any]] = [{}, {"filter": "group == 1", "search_params": {"offset": 2}}]
    for given in asked:
        database.calls.clear()
        found = database.search(database.router(), database.name, [QUERY], recall=1.0, **given)
        assert_same(found, database.bare.search(database.name, [QUERY], **given))
        ((_, kwargs),) = database.calls
        assert kwargs["search_params"] == {**given.get("search_params", {}), "params": {}}
        assert not names_cells(kwargs)


@pytest.mark.parametrize("storage", ["partitions", "field"])
@pytest.mark.slow
def test_too_few_hits_are_made_up_for(built: Callable[..., Database], storage: str) -> None:
    database = built(storage)
    router = database.router(OneCell(database.layout, 8))
    database.calls.clear()
    found = database.search(router, database.name, [QUERY], limit=200)
    assert_same(found, database.bare.search(database.name, [QUERY], limit=200))
    routed, native = database.calls
    assert names_cells(routed[1])
    assert native == ((database.name, [QUERY]), {"limit": 200})
    assert router.fallbacks == {"cells: fewer than k hits": 1}


@pytest.mark.slow
def test_a_dropped_partition_is_made_up_for(tmp_path: Path) -> None:
    database = Database(tmp_path, tmp_path / "own.db", "sync", "partitions", "COSINE")
    router = database.router(database.every_cell())
    table = MilvusCollection(database.bare, database.name).table()
    assert table.cells is not None
    lost = table.cells.partition(3)
    database.bare.release_collection(database.name)
    database.bare.drop_partition(database.name, lost)
    database.bare.load_collection(database.name)
    found = database.search(router, database.name, [QUERY])
    assert_same(found, database.bare.search(database.name, [QUERY]))
    assert router.fallbacks == {"search: CollectionError": 1}
    database.bare.close()


def test_the_databases_error_is_the_databases(database: Database) -> None:
    router = database.router(database.every_cell())
    errors: list[Exception] = [RuntimeError("routed"), KeyError("native")]
    database.failures[:] = errors
    with pytest.raises(KeyError) as caught:
        database.search(router, database.name, [QUERY])
    assert caught.value is errors[1]
    assert len(database.calls) == 2


def test_time_is_one_deadline(database: Database) -> None:
    database.failures[:] = [RuntimeError("routed")]
    router = database.router(database.every_cell())
    database.search(router, database.name, [QUERY], timeout=30.0)
    first, second = (kwargs["timeout"] for _, kwargs in database.calls)
    assert second < first <= 30


def test_a_fault_of_ours_leaves_the_callers_call(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = database.router(database.every_cell())

    def faulty(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(router, "search_effects", faulty)
    found = database.search(router, database.name, [QUERY])
    assert_same(found, database.bare.search(database.name, [QUERY]))
    assert router.fallbacks == {"proxy: ZeroDivisionError": 1}


@pytest.mark.slow
def test_the_recall_of_unseen_queries(database: Database) -> None:
    router = database.router()
    hit = []
    for query in queries(2, 100).tolist():
        best = set(database.bare.search(database.name, [query])[0].ids)
        hit.append(len(best & set(database.search(router, database.name, [query])[0].ids)) / 10)
    assert np.mean(hit) >= 0.9
    routed = [kwargs for _, kwargs in database.calls if names_cells(kwargs)]
    assert len(routed) > 70
    assert np.mean([len(kwargs["partition_names"]) for kwargs in routed]) < 9


def test_an_alias_is_the_collection(database: Database) -> None:
    database.bare.create_alias(database.name, "now")
    database.bare.create_collection("unlike", dimension=DIM)
    try:
        for name in (database.name, "now"):
            router = database.router(database.every_cell(), name)
            for asked in (database.name, "now"):
                found = database.search(router, asked, [QUERY])
                assert_same(found, database.bare.search(database.name, [QUERY]))
                _, kwargs = database.calls[-1]
                assert names_cells(kwargs)
                assert kwargs["collection_name"] == asked
            database.search(router, "unlike", [QUERY])
            assert database.calls[-1] == (("unlike", [QUERY]), {})
    finally:
        database.bare.drop_alias("now")
        database.bare.drop_collection("unlike")


def test_an_alias_that_moves_is_followed_by_the_next_call(database: Database) -> None:
    bare = database.bare
    bare.create_alias(database.name, "now")
    bare.create_collection("green", dimension=DIM, metric_type="COSINE", auto_id=False)
    keys = -queries(3, 50)
    bare.insert("green", [{"id": row, "vector": key} for row, key in enumerate(keys.tolist())])
    try:
        for hook in (database.every_cell(), Rewrite()):
            router = database.router(hook)
            for name in (database.name, "green", database.name):
                bare.alter_alias(name, "now")
                found = database.search(router, "now", [QUERY])
                assert_same(found, bare.search("now", [QUERY]))
    finally:
        bare.drop_alias("now")
        bare.drop_collection("green")


def test_a_server_scores_the_candidates_of_a_rewritten_query_by_a_second_search(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = database.bare
    given = [
        {"limit": 7, "output_fields": ["*"], "search_params": {"ef": 8}},
        {"limit": 5, "offset": 4, "filter": "group == 1"},
        {"limit": 5, "filter": "group < 0"},
    ]
    wanted = [bare.search(database.name, [QUERY], **more) for more in given]
    monkeypatch.setattr(type(bare), "get_server_version", lambda _: "v2.3.5")
    router = database.router(Rewrite())
    for more, hits in zip(given, wanted, strict=True):
        before = len(database.calls)
        assert_same(database.search(router, database.name, [QUERY], **more), hits)
        first, *_ = database.calls[before:]
        assert first[1]["output_fields"] == ["key"]
        assert first[1]["search_params"].get("ef") in (None, first[1]["limit"])
    assert router.fallbacks == {"cells: fewer than k hits": 1}  # where there are none


@pytest.mark.parametrize(("storage", "metric"), [("partitions", "IP"), ("field", "L2")])
@pytest.mark.slow
def test_hits_of_codes_are_scored_by_their_vectors(
    built: Callable[..., Database], storage: str, metric: str
) -> None:
    """The caller gets what a collection without codes gives, and no vector that was not asked for.

    Milvus' own native search of codes hands out their scores.
    """
    database, exact = built(storage, metric, codes=True), built(storage, metric)
    given: list[dict[str, Any]] = [
        {"limit": 6, "output_fields": ["group"]},
        {"limit": 5, "offset": 4, "output_fields": ["*"]},
        {"limit": 4, "search_params": {"params": {"nprobe": 100}}, "filter": "group == 1"},
        {"limit": 4, "search_params": {"params": {"ef": 5}}},
    ]
    for more in given:
        (wanted,) = exact.bare.search(exact.name, [QUERY], **more)
        database.calls.clear()
        router = database.router(database.every_cell())
        (found,) = database.search(router, database.name, [QUERY], **more)
        assert list(found.ids) == list(wanted.ids)
        assert list(found.distances) == pytest.approx(list(wanted.distances), rel=1e-4, abs=1e-5)
        assert [hit["entity"].keys() for hit in found] == [
            {name for name in hit["entity"] if not name.startswith("amips_")} for hit in wanted
        ]
        (first, *_), depth = database.calls, more["limit"] + more.get("offset", 0)
        assert first[1]["limit"] == -(-3 * depth // 2)
        told = first[1]["search_params"].get("params", {})
        assert told.get("ef") in (None, first[1]["limit"])  # a server refuses a shorter list


def test_it_behaves_as_the_client(database: Database) -> None:
    client: Any = route(database.bare, database.router(database.every_cell()))
    assert isinstance(client, pymilvus.MilvusClient)
    assert client._using == database.bare._using
    assert client.list_collections() == database.bare.list_collections()
    client._mine = 5
    assert database.bare._mine == 5


def test_a_router_of_another_database_is_refused(database: Database) -> None:
    other = QdrantClient(":memory:")
    other.create_collection("docs", models.VectorParams(size=2, distance=models.Distance.DOT))
    router = LearnedRouter(QdrantCollection(other, "docs"), hook=Broken())
    with pytest.raises(InvalidInput, match="client is of milvus"):
        route(database.bare, router)


def test_the_watch_sees_what_the_caller_got(database: Database) -> None:
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0, drift_share=0.0)
    collection = MilvusCollection(database.bare, database.name)
    router = LearnedRouter(collection, hook=database.every_cell(), watch=watch)
    given: dict[str, Any] = {"search_params": {"params": {"nprobe": 4}}, "filter": ""}
    for query in queries(2, 5).tolist():
        database.search(router, database.name, [query], **given)
        assert watch.idle(20)
    assert router.health is not None
    seen = router.health.recall
    assert seen is not None
    assert (seen.n, seen.mean) == (5, 1.0)
    part: list[dict[str, Any]] = [{"filter": "group == 1"}, {"offset": 3}]
    for more in part:
        database.search(router, database.name, [QUERY], **more)
        assert watch.idle(20)
    assert router.health.recall == seen
