"""What Qdrant is asked when a plan is searched, and what the answers hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from tests.support.qdrant_data import KEYS, dense, fill, lay_out


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    yield opened
    opened.close()


@pytest.fixture
def collection(client: QdrantClient) -> QdrantCollection:
    fill(client)
    return QdrantCollection(client, "docs")


def test_every_clause_of_a_filter_keeps_its_meaning(collection: QdrantCollection) -> None:
    def group(value: int) -> models.FieldCondition:
        return models.FieldCondition(key="group", match=models.MatchValue(value=value))

    row = models.FieldCondition(key="row", range=models.Range(lt=20))
    filters = [
        models.Filter(should=[group(0), group(1)]),
        models.Filter(must=[row], must_not=[group(2)]),
        models.Filter(
            min_should=models.MinShould(conditions=[group(0), group(1), row], min_count=2)
        ),
    ]
    collection = lay_out(collection)
    cells = np.array([[0, 3]])
    plans = [
        QueryPlan(),
        QueryPlan(rewritten=KEYS[5:6], rescore=100),
        QueryPlan(cells=cells, layout="a1"),
        QueryPlan(rewritten=KEYS[5:6], rescore=100, cells=cells, layout="a1"),
    ]
    for number, condition in enumerate(filters):
        passes = [
            (row % 3 in (0, 1), row < 20 and row % 3 != 2, row < 20 and row % 3 != 2)[number]
            for row in range(len(KEYS))
        ]
        for plan in plans:
            request = SearchRequest(KEYS[:1], k=100, filter=condition)
            found = [hit.id for hit in collection.search(request, plan)[0]]
            expected = [
                row
                for row in np.argsort(-(KEYS @ KEYS[0])).tolist()
                if passes[row] and (plan.cells is None or row % 4 in (0, 3))
            ]
            assert found == expected


def test_stored_fields_by_path(client: QdrantClient) -> None:
    client.create_collection("docs", vectors_config=dense())
    payload = {"meta": {"title": "a", "author": "b"}, "text": "c"}
    client.upsert("docs", [models.PointStruct(id=1, vector=KEYS[0].tolist(), payload=payload)])
    collection = lay_out(QdrantCollection(client, "docs"))
    request = SearchRequest(KEYS[:1], k=1, fields=("meta.title", "text", "missing"))
    hit = collection.search(request)[0][0]
    assert dict(hit.fields) == {"meta": {"title": "a"}, "text": "c"}


class Calls:
    """Records what the client is asked, and lets it answer."""

    def __init__(self, client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        for name in ("query_points", "query_batch_points", "get_collection"):
            monkeypatch.setattr(client, name, self._recorded(name, getattr(client, name)))

    def _recorded(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made.append((name, kwargs | ({"queries": args[1]} if len(args) > 1 else {})))
            return method(*args, **kwargs)

        return call


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
def test_what_a_server_is_asked(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = lay_out(collection)
    collection._local = False  # a server's searches are approximate unless told otherwise
    calls = Calls(client, monkeypatch)
    request = SearchRequest(KEYS[:3], k=5, params={"hnsw_ef": 64, "exact": False}, timeout=0.2)

    collection.search(request)
    (name, asked) = calls.made.pop()
    assert (name, len(asked["queries"]), asked["timeout"]) == ("query_batch_points", 3, 1)
    assert asked["queries"][0].params == models.SearchParams(hnsw_ef=64, exact=False)

    cells = np.array([[2, -1], [0, 1], [3, 3]])
    collection.search(request, QueryPlan(cells=cells, layout="a1"))
    queries = calls.made.pop()[1]["queries"]
    assert all(query.params == models.SearchParams(hnsw_ef=64, exact=True) for query in queries)
    left_out = [query.filter.must_not[0].match.any for query in queries]
    assert left_out == [[0, 1, 3], [2, 3], [0, 1, 2]]

    collection.search(request, QueryPlan(rewritten=KEYS[5:8], rescore=2))
    query = calls.made.pop()[1]["queries"][0]
    assert query.params == models.SearchParams(exact=True)
    assert query.query.nearest == KEYS[0].tolist()
    assert query.prefetch[0].query.nearest == KEYS[5].tolist()
    assert query.prefetch[0].limit == 5
    assert query.prefetch[0].params == models.SearchParams(hnsw_ef=64, exact=False)

    collection.search(SearchRequest(KEYS[:1], k=5, timeout=1.5))
    (name, asked) = calls.made.pop()
    assert (name, asked["timeout"], asked["search_params"]) == ("query_points", 2, None)
    assert calls.made == []  # nothing but the searches: the layout is known from before


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
def test_a_query_of_most_keys_names_no_cells(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = lay_out(collection)
    built._local = False
    asked: list[Any] = []
    answer = client.query_batch_points

    def record(name: str, queries: Any, **more: Any) -> Any:
        asked.extend(queries)
        return answer(name, queries, **more)

    monkeypatch.setattr(client, "query_batch_points", record)
    shares = np.array([built.break_even + 0.01, built.break_even], dtype=np.float32)
    user = models.Filter(must=[models.HasIdCondition(has_id=[1, 2, 3])])
    plan = QueryPlan(cells=np.array([[0], [0]]), layout="a1", shares=shares)
    built.search(SearchRequest(KEYS[:2], k=3, filter=user), plan)
    assert [query.params.exact for query in asked] == [True, True]
    assert asked[0].filter == user
    assert asked[1].filter.must[0] == user


def test_one_query_is_answered_as_in_a_batch(collection: QdrantCollection) -> None:
    collection = lay_out(collection)
    cells = np.array([[0, 1], [2, -1], [1, 3]])
    for plan in (
        QueryPlan(),
        QueryPlan(rewritten=KEYS[5:8], rescore=7),
        QueryPlan(cells=cells, layout="a1"),
    ):
        request = SearchRequest(KEYS[:3], k=4, fields=("row",))
        together = collection.search(request, plan)
        for row in range(3):
            one = slice(row, row + 1)
            alone = QueryPlan(
                rewritten=None if plan.rewritten is None else plan.rewritten[one],
                rescore=plan.rescore,
                cells=None if plan.cells is None else plan.cells[one],
                layout=plan.layout,
            )
            request = SearchRequest(KEYS[one], k=4, fields=("row",))
            assert collection.search(request, alone) == [together[row]]


def test_unusable_filters_and_parameters_are_refused(collection: QdrantCollection) -> None:
    with pytest.raises(InvalidInput, match=r"models\.Filter, but got str"):
        collection.search(SearchRequest(KEYS[:1], k=1, filter="group == 1"))
    with pytest.raises(InvalidInput, match="'nprobe' is not a search parameter"):
        collection.search(SearchRequest(KEYS[:1], k=1, params={"nprobe": 16}))


def test_what_is_no_cell_is_searched_by_every_plan(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    built = lay_out(collection)
    odd = {1: "x", 2: 7, 3: -9, 5: 2.5, 6: ["x"], 7: True, 9: {"a": 1}, 10: [], 11: None}
    for key, value in odd.items():
        client.set_payload("docs", {"amips_cell_a1": value}, points=[key])
    for cells in ([0], [1, 2], [3], [-1]):
        plan = QueryPlan(cells=np.array([cells]), layout="a1")
        hits = built.search(SearchRequest(KEYS[:1], k=100), plan)[0]
        assert set(odd) <= {hit.id for hit in hits}
    assert built.overflow() == len(odd)


def test_fields_of_ours_are_not_shown(collection: QdrantCollection) -> None:
    built = lay_out(collection)
    request = SearchRequest(KEYS[:1], k=1, fields=("row", "amips_cell_a1", "amips_sketch_a1"))
    assert set(built.search(request)[0][0].fields) == {"row"}


def test_a_plan_keeps_what_parameters_mean(collection: QdrantCollection) -> None:
    for params, routable in (
        (None, True),
        ({"hnsw_ef": 64, "exact": False}, True),
        ({"exact": True}, False),
        ({"indexed_only": True}, False),
    ):
        request = SearchRequest(KEYS[:1], k=1, params=params)
        assert (collection.unroutable(request, rewritten=False) is None) == routable


def test_every_search_of_cells_is_counted_against_the_limit_of_reads(
    collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, spent = lay_out(collection), list[int]()
    monkeypatch.setattr(built._budget, "spend", spent.append)
    plan, request = QueryPlan(cells=np.array([[0]]), layout="a1"), SearchRequest(KEYS[:1], k=1)
    built.search(request)
    built.search(request, plan)
    built.narrowed(request, plan)  # for a proxy's own call
    assert spent == [1, 2, 2]
