"""Strict mode, old servers and other people's indexes: refused in one sentence.

Local mode has none of these. The configurations are built by hand, and the client is made to answer
with them; ``integration_tests/test_qdrant_server.py`` asks a real server.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import CollectionError
from amips_plugins.proxies import route
from tests.support.proxy_data import OneCell
from tests.support.qdrant_data import A1, KEYS, cells_of, fill, lay_out

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")


def strict(enabled: bool = True, **settings: Any) -> models.StrictModeConfigOutput:
    return models.StrictModeConfigOutput(enabled=enabled, **settings)


FORBIDDING: list[dict[str, Any]] = [
    {"search_allow_exact": False},
    {"filter_max_conditions": 3},
    {"condition_max_size": 64},
    {"max_query_limit": 99},
    {"max_payload_index_count": 2},
]
ALLOWING: dict[str, Any] = {
    "search_allow_exact": True,
    "unindexed_filtering_retrieve": False,
    "unindexed_filtering_update": False,
    "filter_max_conditions": 4,
    "condition_max_size": 100,
    "max_query_limit": 100,
    "max_payload_index_count": 3,
    "max_timeout": 30,
    "upsert_max_batchsize": 7,
}


@pytest.mark.parametrize("settings", FORBIDDING, ids=lambda settings: next(iter(settings)))
def test_what_forbids_cells_is_named(settings: dict[str, Any]) -> None:
    ((setting, value),) = settings.items()
    reason = Limits(strict(**settings)).refusal(n_cells=64, n_indexes=3)
    assert reason is not None
    assert f"{setting} = {str(value).lower()}, and " in reason
    assert reason.count(".") == 1
    assert Limits(strict(enabled=False, **settings)).refusal(64, 3) is None


def test_what_leaves_room_is_allowed() -> None:
    assert Limits(None).refusal(64, 3) is None
    assert Limits(strict()).refusal(64, 3) is None
    assert Limits(strict(**ALLOWING)).refusal(64, 3) is None
    assert Limits(strict(condition_max_size=100)).refusal(101, 3) is not None


def test_limits_are_kept() -> None:
    none, allowing, off = (
        Limits(None),
        Limits(strict(**ALLOWING)),
        Limits(strict(enabled=False, max_query_limit=1, search_allow_exact=False)),
    )
    assert (none.points(7), allowing.points(7), allowing.points(700)) == (7, 7, 100)
    assert (none.seconds(600), allowing.seconds(600), off.seconds(600)) == (600, 30, 600)
    assert (none.upserts(500), allowing.upserts(500), off.upserts(500)) == (500, 7, 500)
    assert (none.max_candidates, allowing.max_candidates, off.max_candidates) == (None, 100, None)
    assert off.points(50) == 50
    assert off.allows_exact
    assert not Limits(strict(search_allow_exact=False)).allows_exact


def test_rate_limits_are_told() -> None:
    assert list(Limits(None).notes()) == list(Limits(strict()).notes()) == []
    limited = strict(read_rate_limit=1, write_rate_limit=2, search_max_batchsize=3)
    notes = list(Limits(limited).notes())
    assert ["read_rate_limit" in notes[0], "write_rate_limit" in notes[1]] == [True, True]
    assert "3 queries a batch" in notes[2]


class Server:
    """Local mode that answers like a server with this strict mode and these indexes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, client: QdrantClient) -> None:
        self.strict: models.StrictModeConfigOutput | None = None
        self.indexes: dict[str, models.PayloadIndexInfo] = {}
        self.timeouts: set[int] = set()
        self.batches: list[int] = []
        describe, count = client.get_collection, client.count
        scroll, upsert = client.scroll, client.upsert

        def answer(name: str) -> models.CollectionInfo:
            found = describe(name)
            found.config.strict_mode_config = self.strict
            found.payload_schema = dict(self.indexes)
            return found

        def index(_: str, key: str, *__: Any, **___: Any) -> None:
            self.add_index(key, models.PayloadSchemaType.INTEGER)

        def drop_index(_: str, key: str, **__: Any) -> None:
            del self.indexes[key]

        def counted(name: str, condition: models.Filter, timeout: int, **_: Any) -> Any:
            self.timeouts.add(timeout)
            if condition is not None:
                self.refuse_unindexed(condition)
            return count(name, condition)

        def scrolled(name: str, condition: Any = None, *, limit: int, **more: Any) -> Any:
            self.batches.append(limit)
            if condition is not None:
                self.refuse_unindexed(condition)
            return scroll(name, condition, limit=limit, **more)

        def upserted(name: str, points: Any, **_: Any) -> Any:
            self.batches.append(len(points))
            return upsert(name, points)

        for name, method in (
            ("get_collection", answer),
            ("create_payload_index", index),
            ("delete_payload_index", drop_index),
            ("count", counted),
            ("scroll", scrolled),
            ("upsert", upserted),
        ):
            monkeypatch.setattr(client, name, method)

    def add_index(self, key: str, kind: models.PayloadSchemaType) -> None:
        self.indexes[key] = models.PayloadIndexInfo(data_type=kind, points=0)

    def refuse_unindexed(self, condition: models.Filter) -> None:
        if self.strict is not None and self.strict.unindexed_filtering_retrieve is False:
            used = "amips_cell_a1" in condition.model_dump_json()
            assert not used or "amips_cell_a1" in self.indexes, "Index required but not found"


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    fill(opened)
    yield opened
    opened.close()


@pytest.fixture
def server(client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch, client)


@pytest.fixture
def collection(client: QdrantClient) -> QdrantCollection:
    opened = QdrantCollection(client, "docs")
    opened._local = False
    return opened


@pytest.mark.parametrize("settings", FORBIDDING, ids=lambda settings: next(iter(settings)))
def test_a_forbidding_server_stays_as_it_is(
    client: QdrantClient, server: Server, collection: QdrantCollection, settings: dict[str, Any]
) -> None:
    for key in ("row", "group"):
        server.add_index(key, models.PayloadSchemaType.INTEGER)
    server.strict = strict(**settings)
    for attempt in (collection.layouts.plan, collection.layouts.build):
        with pytest.raises(CollectionError, match=next(iter(settings))):
            attempt(A1)
    assert not client.get_collection("docs").config.metadata
    assert set(server.indexes) == {"row", "group"}


def test_a_strict_server_that_leaves_room_is_laid_out(
    client: QdrantClient, server: Server, collection: QdrantCollection
) -> None:
    server.strict = strict(**ALLOWING)
    collection.layouts.plan(A1)
    built = lay_out(collection)
    assert built.overflow() == 0
    built.upsert(list(range(40)), KEYS)
    assert built.overflow() == 40
    assert sum(len(batch.ids) for batch in built.scan(1000)) == 40
    assert max(server.batches) <= 100
    assert 7 in server.batches
    assert server.timeouts == {30}
    built.layouts.roll_back().layouts.drop_old()
    assert server.indexes == {}
    assert set(cells_of(client).values()) == {None}


def test_a_payload_key_of_others_is_refused_where_it_cannot_be_seen_before(
    client: QdrantClient, server: Server, collection: QdrantCollection
) -> None:
    server.strict = strict(unindexed_filtering_retrieve=False)
    client.set_payload("docs", {"amips_cell_a1": 2}, points=[7])
    with pytest.raises(CollectionError, match="something else"):
        collection.layouts.build(A1)
    assert server.indexes == {}
    assert collection.layouts.status().unfinished == ()
    assert {key for key, cell in cells_of(client).items() if cell is not None} == {7}


def test_an_index_of_another_type_is_refused(server: Server, collection: QdrantCollection) -> None:
    server.add_index("amips_cell_a1", models.PayloadSchemaType.KEYWORD)
    with pytest.raises(CollectionError, match="index of 'amips_cell_a1' as keyword"):
        collection.layouts.plan(A1)


@pytest.mark.parametrize("version", ["1.15.5", "v1.9.0", "0.11.1"])
def test_an_old_server_is_refused_by_the_plan(
    client: QdrantClient,
    collection: QdrantCollection,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    info = models.VersionInfo(title="qdrant", version=version)
    monkeypatch.setattr(client, "info", lambda: info)
    with pytest.raises(CollectionError, match=f"is Qdrant {version}"):
        collection.layouts.plan(A1)
    monkeypatch.setattr(client, "info", lambda: info.model_copy(update={"version": "dev"}))
    assert collection.layouts.plan(A1).keys == len(KEYS)


def test_exact_counts_may_be_refused(
    client: QdrantClient,
    server: Server,
    collection: QdrantCollection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = lay_out(collection)
    client.upsert("docs", [models.PointStruct(id=99, vector=KEYS[0].tolist())])

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("Exact search is not allowed")

    monkeypatch.setattr(client, "count", refused)
    server.strict = strict(search_allow_exact=False)
    opened = QdrantCollection(client, "docs")
    opened._local = False
    assert (opened.count(), opened.overflow(), opened.layouts.status().overflow) == (41, 1, 1)
    assert opened.layouts.audit(10).sampled > 0
    assert built.layout() == "a1"


@pytest.mark.parametrize(
    ("setting", "value"), [("search_allow_exact", False), ("condition_max_size", 2)]
)
def test_a_limit_that_comes_later_leaves_searches_native_and_says_why(
    collection: QdrantCollection, setting: str, value: object
) -> None:
    built = lay_out(collection)
    assert built.unroutable(SearchRequest(KEYS[:1], k=1), rewritten=False) is None
    for rewritten in (False, True):
        for enabled, said in ((True, setting), (False, None)):
            limits = Limits(strict(enabled, **{setting: value}))
            built._kept = replace(built._found, limits=limits)
            reason = built.unroutable(SearchRequest(KEYS[:1], k=1), rewritten=rewritten)
            assert (reason and reason.partition(":")[0]) == said
    built._kept = replace(built._found, limits=Limits(strict(condition_max_size=A1.n_cells)))
    assert built.unroutable(SearchRequest(KEYS[:1], k=1), rewritten=False) is None


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
def test_a_router_and_a_routed_client_count_what_strict_mode_refuses(
    client: QdrantClient, server: Server, collection: QdrantCollection
) -> None:
    built = lay_out(collection)
    server.strict = strict(search_allow_exact=False)
    router = LearnedRouter(built, hook=OneCell("a1", 4), refresh=None)
    assert router.search(KEYS[0], k=1).trace.mode == "route"
    router.refresh()
    trace = router.search(KEYS[0], k=1).trace
    assert trace.mode == "native"
    assert str(trace.fallback).startswith("search_allow_exact")
    route(client, router).query_points("docs", KEYS[0].tolist(), limit=1)
    assert router.fallbacks[str(trace.fallback)] == 2
