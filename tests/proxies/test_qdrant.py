"""Qdrant clients, routed: the engine is the client's own local mode."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient, models

from amips_plugins import LearnedRouter, MemoryCollection, route
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.proxies.late import LateRouter
from amips_plugins.proxies.records import hide
from amips_plugins.vectors import FloatArray
from tests.handmade import publish
from tests.support.known_filters import KnowsEveryFilter
from tests.support.proxy_data import COUNT, DIM, Broken, EveryCell, OneCell, Rewrite, keys, queries

QUERY = queries(7, 1)[0].tolist()
GROUP = models.Filter(
    must=[models.FieldCondition(key="group", match=models.MatchValue(value=1))],
)
EITHER = models.Filter(
    should=[
        models.FieldCondition(key="group", match=models.MatchValue(value=1)),
        models.FieldCondition(key="row", range=models.Range(lt=40)),
    ]
)


class Watched(QdrantClient):
    """Notes every query; ``failures`` are raised first, one a query."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.batches: list[tuple[Any, dict[str, Any]]] = []
        self.failures: list[Exception] = []
        self.looked_up = 0

    def query_points(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if self.failures:
            raise self.failures.pop(0)
        return super().query_points(*args, **kwargs)

    def query_batch_points(self, *args: Any, **kwargs: Any) -> Any:
        self.batches.append((args, kwargs))
        return super().query_batch_points(*args, **kwargs)

    def get_aliases(self, **kwargs: Any) -> Any:
        self.looked_up += 1
        return super().get_aliases(**kwargs)


class WatchedAsync(AsyncQdrantClient):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.batches: list[tuple[Any, dict[str, Any]]] = []
        self.failures: list[Exception] = []
        self.looked_up = 0

    async def query_points(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if self.failures:
            raise self.failures.pop(0)
        return await super().query_points(*args, **kwargs)

    async def query_batch_points(self, *args: Any, **kwargs: Any) -> Any:
        self.batches.append((args, kwargs))
        return await super().query_batch_points(*args, **kwargs)

    async def get_aliases(self, **kwargs: Any) -> Any:
        self.looked_up += 1
        return await super().get_aliases(**kwargs)


class Database:
    """A collection in cells, a plain client of it, and one to be routed, of either kind."""

    def __init__(self, folder: Path, kind: str, distance: models.Distance, field: str) -> None:
        self.bare = QdrantClient(":memory:")
        dense = models.VectorParams(size=DIM, distance=distance)
        self.bare.create_collection(
            "docs",
            vectors_config={field: dense, "other": dense} if field else dense,
            sparse_vectors_config={"words": models.SparseVectorParams()} if field else None,
        )
        self.bare.upsert(
            "docs",
            [
                models.PointStruct(
                    id=row,
                    vector={field: key.tolist(), "other": key.tolist()} if field else key.tolist(),
                    payload={"row": row, "group": row % 3},
                )
                for row, key in enumerate(keys())
            ],
        )
        self.field = field
        self.collection = QdrantCollection(self.bare, "docs", field)
        publish(self.collection, queries(1, 400), folder)
        self.registry = folder / "registry"
        layout = QdrantCollection(self.bare, "docs", field).layout()
        assert layout is not None
        self.layout = layout
        self.watched: Any = Watched(":memory:") if kind == "sync" else WatchedAsync(":memory:")
        inner: Any = self.bare._client
        watched_inner: Any = self.watched._client
        watched_inner.collections = inner.collections

    def router(self, hook: Any = None, **more: Any) -> LearnedRouter:
        collection = QdrantCollection(self.bare, more.pop("name", "docs"), self.field)
        more.setdefault("watch", KnowsEveryFilter())
        if hook is not None:
            return LearnedRouter(collection, hook=hook, **more)
        return LearnedRouter(collection, registry=self.registry, **more)

    def routed(self, hook: Any = None, **more: Any) -> Any:
        return route(self.watched, self.router(hook), **more)

    def every_cell(self) -> EveryCell:
        return EveryCell(self.layout, 8)


def done(result: Any) -> Any:
    """The result of a call of either kind of client."""
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


@pytest.fixture(scope="module", params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Callable[..., Database]:
    made: dict[Any, Database] = {}

    def build(distance: models.Distance = models.Distance.COSINE, field: str = "") -> Database:
        if (distance, field) not in made:
            made[distance, field] = Database(
                tmp_path_factory.mktemp("qdrant"), kind, distance, field
            )
        return made[distance, field]

    return build


@pytest.fixture
def database(built: Callable[..., Database]) -> Database:
    found = built()
    found.watched.calls.clear()
    found.watched.batches.clear()
    found.watched.looked_up = 0
    return found


OURS = re.compile(r"(, )?'amips_\w+': -?\d+")  # which a bare client shows


def names_cells(kwargs: Any) -> bool:
    return "amips_cell_" in str(kwargs.get("query_filter")) + str(kwargs.get("prefetch"))


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for the last bits of the scores, which differ by what numpy multiplies at once."""
    scores = [point.score for point in found.points]
    assert scores == pytest.approx([point.score for point in expected.points], rel=1e-5)
    unscored = [
        [point.model_copy(update={"score": 0.0}) for point in response.points]
        for response in (found, expected)
    ]
    for point in unscored[1]:
        hide(point.payload)  # a bare client shows the cell
    assert unscored[0] == unscored[1]


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"limit": 7},
    {"limit": 5, "offset": 4},
    {"offset": None, "query_filter": GROUP},
    {"query_filter": EITHER, "limit": 8},
    {"query_filter": EITHER, "offset": 3},
    {"with_payload": False},
    {"with_payload": ["row"], "with_vectors": True},
    {"with_payload": models.PayloadSelectorExclude(exclude=["row"])},
    {"timeout": 5, "consistency": "all"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("hook", ["cells", "rewrite"])
@pytest.mark.parametrize("distance", [models.Distance.COSINE, models.Distance.EUCLID])
def test_results_are_the_clients_own(
    built: Callable[..., Database], distance: models.Distance, hook: str, arguments: dict[str, Any]
) -> None:
    database = built(distance)
    client = database.routed(database.every_cell() if hook == "cells" else Rewrite())
    given = {"collection_name": "docs", "query": QUERY, **arguments}
    expected = database.bare.query_points(**given)
    database.watched.calls.clear()
    found = done(client.query_points(**given))
    assert type(found) is type(expected)
    assert_same(found, expected)
    ((args, kwargs),) = database.watched.calls
    assert args == ()
    assert names_cells(kwargs) if hook == "cells" else kwargs["prefetch"]
    kept = set(given) - {"query_filter"}
    assert {name: kwargs[name] for name in kept} == {name: given[name] for name in kept}


def test_a_filter_that_nothing_is_known_of_leaves_the_callers_call(database: Database) -> None:
    router = database.router(database.every_cell(), watch=HealthMonitor(share=1.0))
    client = route(database.watched, router)
    filtered: list[dict[str, Any]] = [
        {"query_filter": GROUP},
        {"query_filter": GROUP, "offset": 3},
    ]
    for given in filtered:
        found = done(client.query_points("docs", QUERY, **given))
        assert_same(found, database.bare.query_points("docs", QUERY, **given))
        assert database.watched.calls[-1] == (("docs", QUERY), given)
    assert router.fallbacks == {"filter: not measured": 2}
    # An empty filter, a later page and a least score keep no key from being among the best.
    free: list[dict[str, Any]] = [
        {"query_filter": models.Filter(must=[])},
        {"offset": 3},
        {"score_threshold": 0},
    ]
    for plain in free:
        done(client.query_points("docs", QUERY, **plain))
        assert names_cells(database.watched.calls[-1][1])


@pytest.mark.filterwarnings("ignore:.*exact:UserWarning")
@pytest.mark.filterwarnings("ignore:.*search_params:UserWarning")
def test_a_recall_of_one_asks_the_client_for_an_exact_search(database: Database) -> None:
    client = route(database.watched, database.router(), recall=1.0)
    asked: list[dict[str, Any]] = [{}, {"query_filter": GROUP, "offset": 3}]
    for given in asked:
        found = done(client.query_points("docs", QUERY, **given))
        assert_same(found, database.bare.query_points("docs", QUERY, **given))
        assert database.watched.calls[-1][1]["search_params"] == models.SearchParams(exact=True)


def test_a_filter_is_measured_with_its_own_searches(database: Database) -> None:
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0)
    router = database.router(database.every_cell(), watch=watch)
    client = route(database.watched, router)
    for row in range(3):
        done(client.query_points("docs", queries(row, 1)[0].tolist(), query_filter=GROUP))
        assert watch.idle(20)
    done(client.query_points("docs", QUERY, query_filter=GROUP, offset=2))
    done(client.query_points("docs", QUERY, query_filter=GROUP, score_threshold=0.5))
    assert watch.idle(20)
    assert not watch.failures
    assert watch.health is not None
    (known,) = watch.health.filters
    assert known.samples == 3
    assert known.shape == "{must: [{key: group, match: {value: ?}}]}"


@pytest.mark.parametrize("distance", [models.Distance.COSINE, models.Distance.EUCLID])
@pytest.mark.parametrize("hook", ["cells", "rewrite"])
def test_a_threshold_is_the_databases_own(
    built: Callable[..., Database], distance: models.Distance, hook: str
) -> None:
    database = built(distance)
    client = database.routed(database.every_cell() if hook == "cells" else Rewrite())
    scores = [p.score for p in database.bare.query_points("docs", QUERY, limit=12).points]
    best = 2.0 if distance is models.Distance.COSINE else 0.0
    for threshold in [(scores[4] + scores[5]) / 2, scores[11], best]:
        for offset in (0, 2):
            given: dict[str, Any] = {"limit": 10, "offset": offset, "score_threshold": threshold}
            expected = database.bare.query_points("docs", QUERY, **given)
            assert_same(done(client.query_points("docs", QUERY, **given)), expected)


def test_a_score_at_the_threshold_is_the_databases_to_judge(database: Database) -> None:
    client = database.routed(database.every_cell())
    third = done(client.query_points("docs", QUERY, limit=3)).points[-1].score
    database.watched.calls.clear()
    found = done(client.query_points("docs", QUERY, score_threshold=third))
    assert len(found.points) == 2  # local mode takes the threshold for a bound that is out
    cut = [kwargs.get("score_threshold") for _, kwargs in database.watched.calls]
    assert cut == [None, third]
    assert all(names_cells(kwargs) for _, kwargs in database.watched.calls)


def test_hits_cut_off_by_a_threshold_take_no_second_search(database: Database) -> None:
    client = database.routed(database.every_cell())
    scores = [p.score for p in database.bare.query_points("docs", QUERY, limit=4).points]
    found = done(client.query_points("docs", QUERY, score_threshold=sum(scores[2:]) / 2))
    assert len(found.points) == 3
    assert len(database.watched.calls) == 1


@pytest.mark.parametrize("query", [np.array(QUERY, np.float32), np.array(QUERY), tuple(QUERY)])
def test_arrays_and_tuples_are_vectors_too(database: Database, query: Any) -> None:
    client = database.routed(database.every_cell())
    if isinstance(query, tuple):  # which the client itself does not take
        with pytest.raises(ValueError, match="Unsupported query type"):
            done(client.query_points("docs", query))
        return
    found = done(client.query_points("docs", query))
    assert_same(found, database.bare.query_points("docs", query))
    assert names_cells(database.watched.calls[-1][1])


def test_arguments_by_position(database: Database) -> None:
    client = database.routed(database.every_cell())
    found = done(client.query_points("docs", QUERY, None, None, GROUP, None, 6, 2))
    expected = database.bare.query_points("docs", QUERY, None, None, GROUP, None, 6, 2)
    assert_same(found, expected)
    assert names_cells(database.watched.calls[-1][1])


def test_a_named_vector(built: Callable[..., Database]) -> None:
    database = built(field="text")
    client = database.routed(database.every_cell())
    database.watched.calls.clear()
    for using, routed in (("text", True), ("other", False)):
        found = done(client.query_points("docs", QUERY, using=using))
        assert_same(found, database.bare.query_points("docs", QUERY, using=using))
        assert names_cells(database.watched.calls[-1][1]) == routed


def rounded(text: str) -> str:
    return re.sub(r"\d\.\d{6,}", lambda found: f"{float(found[0]):.4f}", text)


PREFETCH = models.Prefetch(query=QUERY, limit=20)
UNTOUCHED: dict[str, dict[str, Any]] = {
    "id": {"query": 3},
    "nothing": {"query": None},
    "several vectors": {"query": [QUERY, QUERY]},
    "nearest": {"query": models.NearestQuery(nearest=QUERY, mmr=models.Mmr())},
    "recommendation": {
        "query": models.RecommendQuery(recommend=models.RecommendInput(positive=[1, 2]))
    },
    "prefetch": {"query": QUERY, "prefetch": [PREFETCH]},
    "fusion": {
        "query": models.FusionQuery(fusion=models.Fusion.RRF),
        "prefetch": [PREFETCH, PREFETCH],
    },
    "exact": {"query": QUERY, "search_params": models.SearchParams(exact=True)},
    "indexed": {"query": QUERY, "search_params": models.SearchParams(indexed_only=True)},
    "unknown argument": {"query": QUERY, "no_such": 1},
    "another vector": {"query": QUERY, "using": "nope"},
    "another collection": {"query": QUERY, "collection_name": "others"},
    "too short": {"query": QUERY[:-1]},
    "not finite": {"query": [float("nan")] * DIM},
    "no limit": {"query": QUERY, "limit": 0},
    "beyond": {"query": QUERY, "offset": -1},
    "filter": {"query": QUERY, "query_filter": {"must": []}},
    "looked up": {"query": QUERY, "lookup_from": models.LookupLocation(collection="docs")},
}


@pytest.mark.parametrize("arguments", UNTOUCHED.values(), ids=UNTOUCHED.keys())
@pytest.mark.filterwarnings("ignore:.*search_params:UserWarning")
@pytest.mark.filterwarnings("ignore:.*exact:UserWarning")
def test_everything_else_passes_untouched(database: Database, arguments: dict[str, Any]) -> None:
    router = database.router(Broken())
    client = route(database.watched, router)
    given = {"collection_name": "docs", **arguments}

    def answer(ask: Callable[..., Any]) -> Any:
        try:
            return done(ask(**given))
        except Exception as exc:  # noqa: BLE001 - whatever the client raises
            return type(exc), str(exc)

    expected = answer(database.bare.query_points)
    found = answer(client.query_points)
    # As text, for NaN is not equal to itself; where arrays lie in memory changes the last digits.
    assert rounded(str(found)) == rounded(OURS.sub("", str(expected)))
    ((args, kwargs),) = database.watched.calls
    assert args == ()
    assert set(kwargs) == set(given)
    assert all(kwargs[name] is given[name] for name in given)
    assert not router.fallbacks  # the model was not even asked


def test_no_arguments_at_all(database: Database) -> None:
    with pytest.raises(TypeError, match="collection_name"):
        done(database.routed(Broken()).query_points())


def test_a_native_plan_is_the_callers_call(database: Database) -> None:
    class Native:
        def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
            return NATIVE

    client = database.routed(Native())
    done(client.query_points("docs", QUERY, limit=3))
    assert database.watched.calls == [(("docs", QUERY), {"limit": 3})]
    assert database.watched.calls[0][0][1] is QUERY


def test_a_broken_model_leaves_the_callers_call(database: Database) -> None:
    router = database.router(Broken())
    client = route(database.watched, router)
    found = done(client.query_points("docs", QUERY, query_filter=GROUP))
    assert_same(found, database.bare.query_points("docs", QUERY, query_filter=GROUP))
    assert database.watched.calls == [(("docs", QUERY), {"query_filter": GROUP})]
    assert router.fallbacks == {"model: RuntimeError": 1}


def test_a_refused_bundle_leaves_the_callers_call(database: Database, tmp_path: Path) -> None:
    router = LearnedRouter(QdrantCollection(database.bare, "docs"), registry=tmp_path)
    found = done(route(database.watched, router).query_points("docs", QUERY))
    assert_same(found, database.bare.query_points("docs", QUERY))
    assert database.watched.calls == [(("docs", QUERY), {})]
    assert router.fallbacks.total() == 1


def test_too_few_hits_are_made_up_for(database: Database) -> None:
    router = database.router(OneCell(database.layout, 8))
    client = route(database.watched, router)
    found = done(client.query_points("docs", QUERY, limit=200))
    assert_same(found, database.bare.query_points("docs", QUERY, limit=200))
    routed, native = database.watched.calls
    assert names_cells(routed[1])
    assert native == (("docs", QUERY), {"limit": 200})
    assert router.fallbacks == {"cells: fewer than k hits": 1}


def test_a_refused_search_of_cells_is_made_up_for(database: Database) -> None:
    router = database.router(database.every_cell())
    client = route(database.watched, router)
    database.watched.failures = [RuntimeError("strict mode")]
    found = done(client.query_points("docs", QUERY))
    assert_same(found, database.bare.query_points("docs", QUERY))
    assert database.watched.calls[1] == (("docs", QUERY), {})
    assert router.fallbacks == {"search: RuntimeError": 1}


def test_a_plan_of_other_cells_is_made_up_for(database: Database) -> None:
    router = database.router(EveryCell("another", 8))
    found = done(route(database.watched, router).query_points("docs", QUERY))
    assert_same(found, database.bare.query_points("docs", QUERY))
    assert database.watched.calls == [(("docs", QUERY), {})]
    assert router.fallbacks == {"search: InvalidInput": 1}


def test_the_databases_error_is_the_databases(database: Database) -> None:
    router = database.router(database.every_cell())
    errors: list[Exception] = [RuntimeError("routed"), KeyError("native")]
    database.watched.failures = [*errors]
    with pytest.raises(KeyError) as caught:
        done(route(database.watched, router).query_points("docs", QUERY))
    assert caught.value is errors[1]
    assert len(database.watched.calls) == 2


def test_time_is_one_deadline(database: Database) -> None:
    client = database.routed(database.every_cell())
    database.watched.failures = [RuntimeError("routed")]
    done(client.query_points("docs", QUERY, timeout=30))
    first, second = (kwargs["timeout"] for _, kwargs in database.watched.calls)
    assert first == 30
    assert 0 < second <= 30
    assert isinstance(second, int)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_of_ours_leaves_the_callers_call(
    database: Database, when: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    router = database.router(database.every_cell())
    inner = router.search_effects

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            yield from inner(*args, **kwargs)
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(router, "search_effects", faulty)
    client = route(database.watched, router)
    for _ in range(2):
        assert_same(
            done(client.query_points("docs", QUERY)), database.bare.query_points("docs", QUERY)
        )
    assert len(database.watched.calls) == 2  # what was found is not asked for again
    assert router.fallbacks == {"proxy: ZeroDivisionError": 2}
    assert sum("proxy: ZeroDivisionError" in record.message for record in caplog.records) == 1


def test_a_target_that_cannot_be_promised_leaves_the_callers_call(database: Database) -> None:
    router = database.router()
    client = route(database.watched, router, recall=0.99999)
    assert_same(done(client.query_points("docs", QUERY)), database.bare.query_points("docs", QUERY))
    assert router.fallbacks == {"target: not promised": 1}


def test_the_target_is_the_bundles_or_the_one_given(database: Database) -> None:
    found = {}
    for recall in (None, 0.5):
        client = database.routed(recall=recall)
        database.watched.calls.clear()
        for query in queries(3, 40):
            done(client.query_points("docs", query.tolist()))
        filters = [kwargs.get("query_filter") for _, kwargs in database.watched.calls]
        # Without a filter every cell is searched: that is the cheaper one where they are many.
        found[recall] = sum(8 - len(f.must_not[0].match.any) if f else 8 for f in filters)
    assert 40 <= found[0.5] < found[None]


@pytest.mark.slow
def test_the_recall_of_unseen_queries(database: Database) -> None:
    client = database.routed()
    hit = []
    for query in queries(2, 200):
        best = {p.id for p in database.bare.query_points("docs", query.tolist()).points}
        found = {p.id for p in done(client.query_points("docs", query.tolist())).points}
        hit.append(len(best & found) / 10)
    assert np.mean(hit) >= 0.9
    routed = [kwargs for _, kwargs in database.watched.calls if names_cells(kwargs)]
    assert len(routed) > 150


def test_an_alias_is_the_collection(database: Database) -> None:
    database.bare.update_collection_aliases(
        [
            models.CreateAliasOperation(
                create_alias=models.CreateAlias(collection_name="docs", alias_name="now")
            )
        ]
    )
    database.watched._client.aliases = {"now": "docs"}
    try:
        for name, other in (("docs", "now"), ("now", "docs")):
            client = route(database.watched, database.router(database.every_cell(), name=name))
            database.watched.looked_up = 0
            for asked in (name, other, other):
                found = done(client.query_points(asked, QUERY))
                assert_same(found, database.bare.query_points("docs", QUERY))
                (_, kwargs) = database.watched.calls[-1]
                assert names_cells(kwargs)
                assert kwargs["collection_name"] == asked
            assert database.watched.looked_up == 1
    finally:
        database.watched._client.aliases = {}
        database.bare.update_collection_aliases(
            [models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name="now"))]
        )


def test_another_collection_of_the_same_vectors_is_not_routed(database: Database) -> None:
    database.bare.create_collection(
        "copy", models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    )
    try:
        client = database.routed(database.every_cell())
        done(client.query_points("copy", QUERY))
        assert database.watched.calls == [(("copy", QUERY), {})]
    finally:
        database.bare.delete_collection("copy")


def test_parameters_of_a_server_are_kept(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactness is asked for on a server alone, so the call is looked at, not made."""
    from amips_plugins.proxies.calls import Call
    from amips_plugins.proxies.qdrant import _Qdrant

    dialect = _Qdrant()
    params = models.SearchParams(
        hnsw_ef=99, quantization=models.QuantizationSearchParams(rescore=True)
    )
    asked = dialect.read({"collection_name": "docs", "query": QUERY, "search_params": params})
    assert asked is not None
    collection = QdrantCollection(database.bare, "docs")
    monkeypatch.setattr(collection, "_local", False)
    request = asked.request(collection)
    assert request is not None
    for hook in (database.every_cell(), Rewrite()):
        plan = hook.plan(request.queries, Target(10))
        step = next(asked.routed(Call(print), collection, request, plan))
        assert isinstance(step, Call)
        if plan.cells is not None:
            expected = params.model_copy(update={"exact": True})
            assert step.kwargs["search_params"] == expected
        else:
            assert step.kwargs["search_params"] == models.SearchParams(exact=True)
            assert step.kwargs["prefetch"][0].params == params
            assert step.kwargs["prefetch"][0].limit == COUNT


def test_it_behaves_as_the_client(database: Database, kind: str) -> None:
    client = database.routed()
    kinds: dict[str, Any] = {"sync": QdrantClient, "async": AsyncQdrantClient}
    assert isinstance(client, kinds[kind])
    assert client.__class__ is type(database.watched)
    assert client._client is database.watched._client
    assert client.close == database.watched.close
    assert client.calls is database.watched.calls
    assert vars(client) is vars(database.watched)
    client._mine = 5
    assert database.watched._mine == 5
    del client._mine
    assert not hasattr(database.watched, "_mine")
    with pytest.raises(AttributeError, match="no_such"):
        _ = client.no_such
    assert set(dir(database.watched)) < set(dir(client))
    assert "routed" in repr(client)
    assert isinstance(client.amips_router, LearnedRouter)
    assert done(client.collection_exists("docs"))
    assert done(client.count("docs")).count == COUNT
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(client)


def test_two_collections(database: Database) -> None:
    database.bare.create_collection(
        "second", models.VectorParams(size=DIM, distance=models.Distance.DOT)
    )
    try:
        database.bare.upsert("second", [models.PointStruct(id=1, vector=QUERY)])
        second = LearnedRouter(QdrantCollection(database.bare, "second"), hook=Rewrite())
        client = route(database.routed(database.every_cell()), second)
        done(client.query_points("docs", QUERY))
        done(client.query_points("second", QUERY, limit=1))
        (_, docs), (_, other) = database.watched.calls
        assert names_cells(docs)
        assert other["prefetch"]
        assert isinstance(client, type(database.watched))
    finally:
        database.bare.delete_collection("second")


def test_a_router_that_comes_late(database: Database, caplog: Any) -> None:
    there: list[LearnedRouter] = []

    def make() -> LearnedRouter:
        if not there:
            raise RuntimeError("no such collection yet")
        return there[0]

    late = LateRouter("docs", make)
    client = route(database.watched, late)
    for _ in range(2):
        done(client.query_points("docs", QUERY))
        assert database.watched.calls[-1] == (("docs", QUERY), {})
    assert sum("no such collection yet" in record.message for record in caplog.records) == 1
    there.append(database.router(database.every_cell()))
    done(client.query_points("docs", QUERY))
    assert late.made is None  # it is not tried again at once
    late._next = 0.0
    done(client.query_points("docs", QUERY))
    assert client.amips_router is there[0]
    assert names_cells(database.watched.calls[-1][1])


@pytest.mark.parametrize(
    ("client", "router", "message"),
    [
        (object(), "memory", "object cannot be routed"),
        (QdrantClient(":memory:"), "memory", "client is of qdrant"),
        (QdrantClient(":memory:"), "docs", "pass a LearnedRouter"),
    ],
)
def test_what_cannot_be_routed_is_refused(client: Any, router: Any, message: str) -> None:
    if router == "memory":
        router = LearnedRouter(MemoryCollection(np.eye(3, dtype=np.float32)), hook=Broken())
    with pytest.raises(InvalidInput, match=message):
        route(client, router)


def test_a_recall_that_is_none_is_refused(database: Database) -> None:
    with pytest.raises(InvalidInput, match="recall=2"):
        database.routed(recall=2)


BATCHED: list[dict[str, Any]] = [
    {},
    {"limit": 7, "with_payload": True},
    {"limit": 5, "offset": 4, "with_vector": True},
    {"limit": 5, "filter": GROUP, "with_payload": ["row"]},
    {"limit": 6, "filter": EITHER},
]


@pytest.mark.parametrize("arguments", BATCHED, ids=str)
@pytest.mark.parametrize("hook", ["cells", "rewrite"])
def test_a_batch_of_one_is_routed(database: Database, hook: str, arguments: dict[str, Any]) -> None:
    router = database.router(database.every_cell() if hook == "cells" else Rewrite())
    client = route(database.watched, router)
    request = models.QueryRequest(query=QUERY, **arguments)
    before = request.model_copy()
    (expected,) = database.bare.query_batch_points("docs", [request])
    (found,) = done(client.query_batch_points("docs", [request]))
    assert_same(found, expected)
    assert request == before  # the caller's own is left alone
    ((args, kwargs),) = database.watched.batches
    assert args == ()
    (made,) = kwargs["requests"]
    if hook == "cells":
        assert "amips_cell_" in str(made.filter)
    else:
        assert made.prefetch
    same = {"limit", "offset", "with_payload", "with_vector", "score_threshold"}
    assert made.model_dump(include=same) == request.model_dump(include=same)
    assert not router.fallbacks


def test_the_threshold_of_a_batch_of_one(database: Database) -> None:
    client = database.routed(database.every_cell())
    scores = [p.score for p in database.bare.query_points("docs", QUERY, limit=4).points]
    request = models.QueryRequest(query=QUERY, score_threshold=sum(scores[2:]) / 2)
    (expected,) = database.bare.query_batch_points("docs", [request])
    (found,) = done(client.query_batch_points("docs", [request], timeout=9))
    assert_same(found, expected)
    assert len(found.points) == 3
    assert len(database.watched.batches) == 1


@pytest.mark.parametrize(
    "requests",
    [
        [models.QueryRequest(query=QUERY), models.QueryRequest(query=QUERY)],
        [models.QueryRequest(query=3)],
        [models.QueryRequest(query=QUERY, using="nope")],
        [
            models.QueryRequest(
                query=models.FusionQuery(fusion=models.Fusion.RRF), prefetch=[PREFETCH]
            )
        ],
        [models.QueryRequest(query=QUERY, params=models.SearchParams(indexed_only=True))],
        [],
    ],
    ids=["two", "an id", "another vector", "fusion", "parameters", "none"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_other_batches_pass_untouched(database: Database, requests: list[Any]) -> None:
    router = database.router(Broken())
    client = route(database.watched, router)

    def answer(ask: Callable[..., Any]) -> Any:
        try:
            return done(ask("docs", requests))
        except Exception as exc:  # noqa: BLE001 - whatever the client raises
            return type(exc), str(exc)

    expected = OURS.sub("", str(answer(database.bare.query_batch_points)))
    assert str(answer(client.query_batch_points)) == expected
    ((args, kwargs),) = database.watched.batches
    assert args[1] is requests
    assert not kwargs
    assert not router.fallbacks


def test_a_batch_whose_routed_search_fails(database: Database) -> None:
    router = database.router(EveryCell("another", 8))
    requests = [models.QueryRequest(query=QUERY)]
    (found,) = done(route(database.watched, router).query_batch_points("docs", requests))
    (expected,) = database.bare.query_batch_points("docs", requests)
    assert_same(found, expected)
    assert database.watched.batches == [(("docs", requests), {})]
    assert router.fallbacks == {"search: InvalidInput": 1}


def test_the_watch_sees_what_the_caller_got(database: Database) -> None:
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0, drift_share=0.0)
    router = database.router(database.every_cell(), watch=watch)
    client = route(database.watched, router)
    for query in queries(2, 5).tolist():
        done(client.query_points("docs", query))
        assert watch.idle(20)
    assert router.health is not None
    seen = router.health.recall
    assert seen is not None
    assert (seen.n, seen.mean) == (5, 1.0)
    # Not the best k keys of the collection, so nothing to hold against it.
    part: list[dict[str, Any]] = [
        {"query_filter": GROUP},
        {"offset": 3},
        {"score_threshold": 0.9},
    ]
    for more in part:
        done(client.query_points("docs", QUERY, **more))
        assert watch.idle(20)
    assert router.health.recall == seen
