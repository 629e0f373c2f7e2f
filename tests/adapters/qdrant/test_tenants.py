"""Graphs for the values of a payload key only: what a native search has to be asked there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.tenants import by_value, tenant_keys
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan
from tests.support.qdrant_data import KEYS, fill

KEYWORD = models.PayloadSchemaType.KEYWORD


def named(key: str, *values: Any) -> models.FieldCondition:
    if len(values) == 1:
        return models.FieldCondition(key=key, match=models.MatchValue(value=values[0]))
    return models.FieldCondition(key=key, match=models.MatchAny(any=list(values)))


def made(m: int, payload_m: int | None, own: int | None = None, kind: Any = KEYWORD) -> Any:
    client = QdrantClient(":memory:")
    fill(client)
    found: Any = client.get_collection("docs")
    found.config.hnsw_config = found.config.hnsw_config.model_copy(
        update={"m": m, "payload_m": payload_m}
    )
    found.config.params.vectors.hnsw_config = models.HnswConfigDiff(m=own)
    found.payload_schema = {"tenant": models.PayloadIndexInfo(data_type=kind, points=40)}
    return found


def test_such_collections_are_known() -> None:
    assert tenant_keys(made(0, 16), "") == frozenset({"tenant"})
    assert tenant_keys(made(0, 16, kind=models.PayloadSchemaType.TEXT), "") == frozenset()
    for other in (made(16, 16), made(0, 0), made(0, None), made(0, 16, own=16)):
        assert tenant_keys(other, "") is None
    assert tenant_keys(made(16, 16, own=0), "") == frozenset({"tenant"})


def test_a_filter_is_cut_by_the_values_that_it_names() -> None:
    keys = frozenset({"tenant", "year"})
    other = models.FieldCondition(key="row", range=models.Range(lt=20))
    several = models.Filter(must=[other, named("tenant", "a", "b", "a")], must_not=[other])
    parts = by_value(several, keys)
    assert parts is not None
    assert [part.must for part in parts] == [
        [other, named("tenant", "a")],
        [other, named("tenant", "b")],
    ]
    assert all(part.must_not == [other] for part in parts)
    fewest = by_value(models.Filter(must=[named("tenant", "a", "b"), named("year", 1)]), keys)
    assert fewest == [models.Filter(must=[named("tenant", "a", "b"), named("year", 1)])]
    assert by_value(models.Filter(must=named("tenant", "a", "b")), keys) is not None
    for unnamed in (
        None,
        models.Filter(must=[other]),
        models.Filter(should=[named("tenant", "a"), named("tenant", "b")]),
        models.Filter(must_not=[named("tenant", "a")]),
        models.Filter(must=[named("group", "a")]),
        models.Filter(must=[named("tenant", *range(101))]),
    ):
        assert by_value(unnamed, keys) is None


class Tenants:
    """Local mode that says it is such a server, and a note of what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, client: QdrantClient) -> None:
        self.asked: list[Any] = []
        self.strict: models.StrictModeConfigOutput | None = None
        describe, one, many = client.get_collection, client.query_points, client.query_batch_points

        def answer(name: str) -> models.CollectionInfo:
            found = describe(name)
            found.config.hnsw_config = found.config.hnsw_config.model_copy(
                update={"m": 0, "payload_m": 16}
            )
            found.payload_schema = {
                "group": models.PayloadIndexInfo(
                    data_type=models.PayloadSchemaType.INTEGER, points=40
                )
            }
            found.config.strict_mode_config = self.strict
            return found

        def alone(name: str, **more: Any) -> Any:
            self.asked.append((more["query_filter"], more["search_params"]))
            return one(name, **{**more, "search_params": None})

        def batch(name: str, queries: Any, **more: Any) -> Any:
            self.asked += [(each.filter, each.params) for each in queries]
            return many(
                name, [each.model_copy(update={"params": None}) for each in queries], **more
            )

        for name, method in (
            ("get_collection", answer),
            ("query_points", alone),
            ("query_batch_points", batch),
        ):
            monkeypatch.setattr(client, name, method)


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    fill(opened)
    yield opened
    opened.close()


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
def test_a_native_search_finds_the_neighbours_of_all_values(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = QdrantCollection(client, "docs")
    server = Tenants(monkeypatch, client)
    collection = QdrantCollection(client, "docs")
    collection._local = False
    one, both = models.Filter(must=[named("group", 1)]), models.Filter(must=[named("group", 0, 2)])
    exact = models.SearchParams(exact=True)
    for condition, asked in (
        (one, [(one, None)]),
        (both, [(models.Filter(must=[named("group", g)]), None) for g in (0, 2)]),
        (None, [(None, exact)]),
    ):
        for queries in (KEYS[:1], KEYS[:3]):
            request = SearchRequest(queries, k=7, filter=condition)
            server.asked.clear()
            found = collection.search(request)
            assert server.asked == asked * len(queries)
            expected = truth.search(request)
            assert [[hit.id for hit in hits] for hits in found] == [
                [hit.id for hit in hits] for hits in expected
            ]


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
def test_candidates_of_a_rewritten_query_are_true_neighbours_too(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tenants(monkeypatch, client)
    collection = QdrantCollection(client, "docs")
    collection._local = False
    both = models.Filter(must=[named("group", 0, 2)])
    plan = QueryPlan(rewritten=KEYS[5:6], rescore=9)
    queries = collection._planned(SearchRequest(KEYS[:1], k=7, filter=both), plan, None)[1]
    inner: Any = queries[0].prefetch
    assert [one.filter.must[0].match.value for one in inner] == [0, 2]
    queries = collection._planned(SearchRequest(KEYS[:1], k=7), plan, None)[1]
    inner = queries[0].prefetch
    assert [one.params.exact for one in inner] == [True]


def test_the_description_claims_no_exactness(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Tenants(monkeypatch, client)
    collection = QdrantCollection(client, "docs")
    collection._local = False
    for allowed in (True, False):
        server.strict = models.StrictModeConfigOutput(enabled=True, search_allow_exact=allowed)
        found = collection.describe()
        assert found.native == "graph"
        assert dict(found.facts)["graph"] == "one a payload value (m=0, payload_m=16)"
        assert ("forbids" in found.notes[0]) != allowed
    collection = QdrantCollection(client, "docs")
    collection._local = False
    assert collection.native_parts(None, None) is None  # what is not allowed is not asked
    assert np.isfinite(collection.break_even)


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
def test_partitions_with_graphs_are_asked_one_by_one(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = QdrantCollection(client, "docs").partitioned(Partitions("group", (0, 1)))
    server = Tenants(monkeypatch, client)
    opened = QdrantCollection(client, "docs")
    opened._local, opened._indexed_only = False, True
    seen = opened.partitioned(Partitions("group", (0, 1)))
    assert (opened.break_even, seen.break_even) == (0.4, 1.0)
    plan = QueryPlan(cells=np.array([[0, 1], [1, -1]]), layout=seen.layout())
    mine = models.Filter(must=[models.FieldCondition(key="row", range=models.Range(lt=30))])
    for condition in (None, mine):
        server.asked.clear()
        request = SearchRequest(KEYS[:2], k=9, filter=condition)
        found = seen.search(request, plan)
        params = [one and one.exact for _, one in server.asked]
        assert params == [None, None, True, None, True]  # at last those of no known value
        expected = truth.search(request, plan)
        assert [[hit.id for hit in hits] for hits in found] == [
            [hit.id for hit in hits] for hits in expected
        ]
    with pytest.raises(InvalidInput, match="no index"):
        opened.partitioned(Partitions("row"))
