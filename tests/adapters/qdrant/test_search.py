"""What Qdrant is asked when a plan is searched, and what the answers hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qdrant_client import QdrantClient, grpc, models
from qdrant_client.conversions.conversion import RestToGrpc
from qdrant_client.http.exceptions import ResponseHandlingException

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.qdrant.batches import in_portions
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.codes import Codes
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.messages import filter_message, params_message
from amips_plugins.adapters.qdrant.search import EXACT, has_cell, in_cells, one_cell, strays_of
from amips_plugins.adapters.qdrant.strays import may_have_strays
from amips_plugins.adapters.qdrant.strict_mode import Limits
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
    built.narrowed(request, plan, None)  # for a proxy's own call
    assert spent == [1, 2, 2]


# --- what a server is asked, answered by local mode ------------------------------------------


class Asked:
    """Keeps the queries of every batch call."""

    def __init__(self, client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[Any]] = []
        original = client.query_batch_points

        def call(name: str, requests: Any, **more: Any) -> Any:
            self.calls.append(list(requests))
            return original(name, requests, **more)

        monkeypatch.setattr(client, "query_batch_points", call)


@pytest.fixture
def server(collection: QdrantCollection, client: QdrantClient) -> QdrantCollection:
    lay_out(collection)
    client.upsert("docs", [models.PointStruct(id=99, vector=[0.3, 0.2, 0.1, 0.4])])  # overflow
    opened = QdrantCollection(client, "docs")
    opened._local = False
    return opened


LOCAL = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")


@LOCAL
def test_a_batch_is_asked_cell_by_cell_and_answers_as_its_queries(
    server: QdrantCollection, client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    queries = rng.standard_normal((64, KEYS.shape[1])).astype(np.float32)
    cells = np.array([rng.permutation(4)[:2] for _ in queries])
    cells[5, 1] = -1
    condition = models.Filter(must_not=[models.HasIdCondition(has_id=[7])])
    asked = Asked(client, monkeypatch)
    for one_filter in (None, condition):
        request = SearchRequest(queries, k=5, filter=one_filter, fields=("row",))
        found = server.search(request, QueryPlan(cells=cells, layout="a1"))
        for row, hits in enumerate(found):
            one = SearchRequest(queries[row : row + 1], k=5, filter=one_filter, fields=("row",))
            alone = server.search(one, QueryPlan(cells=cells[row : row + 1], layout="a1"))[0]
            assert [(hit.id, hit.fields) for hit in hits] == [(h.id, h.fields) for h in alone]
    (call, _) = asked.calls
    filters = [str(query.filter) for query in call]
    assert len(call) == 64 * 3 - 1
    assert len(set(filters)) == 5  # four cells and the overflow,
    assert sum(a != b for a, b in pairwise(filters)) == 4  # side by side


@LOCAL
def test_small_batches_and_counted_searches_are_one_a_query(
    server: QdrantCollection, client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(client, monkeypatch)
    few = QueryPlan(cells=np.zeros((10, 1), dtype=np.int64), layout="a1")
    server.search(SearchRequest(KEYS[:10], k=3), few)
    strict = models.StrictModeConfigOutput(enabled=True, read_rate_limit=1000)
    server._kept = replace(server._found, limits=Limits(strict))
    many = QueryPlan(cells=np.zeros((40, 1), dtype=np.int64), layout="a1")
    server.search(SearchRequest(np.concatenate([KEYS, KEYS])[:40], k=3), many)
    assert [len(call) for call in asked.calls] == [10, 40]


@LOCAL
def test_a_large_batch_is_cut_into_calls_that_a_server_takes(
    server: QdrantCollection, client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.searched_points._NUMBERS", 60)
    asked = Asked(client, monkeypatch)
    found = server.search(SearchRequest(KEYS, k=1))
    assert len(found) == len(KEYS)
    assert max(map(len, asked.calls)) == 60 // KEYS.shape[1]


@LOCAL
def test_cells_with_most_of_the_keys_are_a_search_of_the_graph_where_there_is_one(
    server: QdrantCollection,
) -> None:
    plan = QueryPlan(
        cells=np.arange(8).reshape(2, 4) % 4,
        layout="a1",
        shares=np.array([0.9, 0.1], dtype=np.float32),
    )
    request = SearchRequest(KEYS[:2], k=50, params={"hnsw_ef": 10})
    wide, narrow = (dict(query.params or {}) for query in server.queries(request, plan))
    assert (wide["exact"], narrow["exact"]) == (True, True)
    plan = replace(plan, recall=0.9)
    server._kept = replace(server._found, has_graph=True)
    wide, narrow = (dict(query.params or {}) for query in server.queries(request, plan))
    assert (wide["exact"], wide["hnsw_ef"]) == (None, 800)
    assert (narrow["exact"], narrow["hnsw_ef"]) == (True, 10)
    assert server.queries(request, plan)[0].filter is None


@LOCAL
@pytest.mark.parametrize(
    ("recall", "k", "ef"),
    [
        (None, 10, 1536),
        (0.5, 10, 384),
        (0.98, 10, 384),
        (0.98, 100, 1600),
        (0.99, 10, 1536),
        (0.999, 10, None),
        (1.0, 10, None),
        (0.9, 300, 4800),
    ],
)
def test_the_graph_is_followed_as_far_as_the_target_takes(
    server: QdrantCollection, recall: float | None, k: int, ef: int | None
) -> None:
    plan = QueryPlan(
        cells=np.array([[0, 1, 2]]),
        layout="a1",
        shares=np.array([0.9], dtype=np.float32),
        recall=recall,
    )
    server._kept = replace(server._found, has_graph=True)
    (query,) = server.queries(SearchRequest(KEYS[:1], k=k), plan)
    assert query.params is not None
    assert (query.params.hnsw_ef, query.params.exact) == (ef, True if ef is None else None)
    condition, params = server.narrowed(SearchRequest(KEYS[:1], k=k), plan, None)
    assert (condition, params) == (None, query.params)  # a proxy's own call, too
    if ef is not None:  # the scores are no codes'
        server._kept = replace(server._found, codes=Codes(1.5))
        (query,) = server.queries(SearchRequest(KEYS[:1], k=k), plan)
        assert query.params is not None
        assert query.params.quantization is not None
        assert query.params.quantization.rescore
    server._kept = replace(server._found, codes=None)
    strict = models.StrictModeConfigOutput(enabled=True, search_max_hnsw_ef=383)
    server._kept = replace(server._found, limits=Limits(strict))
    (query,) = server.queries(SearchRequest(KEYS[:1], k=k), plan)
    assert query.params is not None
    assert query.params.exact  # which strict mode does not count


@pytest.mark.parametrize(
    ("chosen", "others"),
    [([2, 0], [1, 3]), ([3, -1, 3, -1], [0, 1, 2]), ([4, 700], [0, 1, 2, 3]), ([0, 1, 2, 3], [])],
)
def test_the_cells_left_out_are_all_but_those_chosen(chosen: list[int], others: list[int]) -> None:
    record = LayoutRecord("a1", "v1", 4)
    assert [record.all_but(chosen) for _ in range(2)] == [others] * 2
    made = in_cells(record, chosen, None)
    validated = models.Filter(
        must_not=[models.FieldCondition(key=record.key, match=models.MatchAny(any=others))]
    )
    assert made == validated
    assert made.model_dump_json() == validated.model_dump_json()  # made without validation
    assert made.model_dump(exclude_unset=True) == validated.model_dump(exclude_unset=True)
    assert models.Filter.model_validate(made.model_dump()) == validated


# --- what a server's index can list ----------------------------------------------------------

BOTH: dict[int, Any] = {12: [0, 40]}  # which leaving out misses where another cell is chosen
LISTED: dict[int, Any] = {1: 7, 2: -9, 5: [], 6: None, 7: [40, -1], 9: [-2]}
STRAYS: dict[int, Any] = {3: "x", 10: 2.5, 11: True, 13: {"a": 1}, 14: ["x"]}


def _written(collection: QdrantCollection, values: dict[int, Any]) -> QdrantCollection:
    built = lay_out(collection)
    for key, value in values.items():
        collection.client.set_payload("docs", {"amips_cell_a1": value}, points=[key])
    return built


@pytest.mark.parametrize("chosen", [[0], [1, 2], [3, -1], [-1], [2, 2, 0]])
@pytest.mark.parametrize(
    "condition", [None, models.Filter(must_not=[models.HasIdCondition(has_id=[4, 5])])]
)
def test_alternatives_find_what_leaving_out_does(
    collection: QdrantCollection, chosen: list[int], condition: models.Filter | None
) -> None:
    built = _written(collection, LISTED | BOTH)
    record = built._found.cells
    assert record is not None

    def points(made: models.Filter) -> set[Any]:
        return {one.id for one in built.client.scroll("docs", made, limit=100)[0]}

    left_out = points(in_cells(record, chosen, condition)) | {*BOTH}
    assert points(in_cells(record, chosen, condition, strays=False)) == left_out
    one_by_one = {OVERFLOW, *(cell for cell in chosen if cell >= 0)}
    parts = [points(one_cell(record, cell, condition, strays=False)) for cell in one_by_one]
    assert set().union(*parts) == left_out


@pytest.mark.parametrize("n_chosen", [1, 16, 17, 40])
def test_alternatives_are_few_and_those_of_a_key_in_several_cells(n_chosen: int) -> None:
    record = LayoutRecord("a1", "v1", 64, shared=True)
    made = in_cells(record, range(n_chosen), None, strays=False)
    ways: Any = made.should
    assert len(ways) == 3 + (n_chosen if n_chosen <= 16 else 1)
    assert made == models.Filter.model_validate(made.model_dump())
    assert not any(isinstance(one, models.IsEmptyCondition) for one in ways)


@pytest.mark.parametrize("chosen", [[], [-1], [3], [5, 2, 5, -1], [*range(16)], [*range(40)]])
@pytest.mark.parametrize("condition", [None, models.Filter(must_not=[has_cell("city", [1, 2])])])
def test_a_message_says_what_the_model_does(
    chosen: list[int], condition: models.Filter | None
) -> None:
    record = LayoutRecord("a1", "v1", 64)
    made = in_cells(record, chosen, condition, strays=False)
    for _ in range(2):
        assert filter_message(record, condition, chosen) == RestToGrpc.convert_filter(made)
    assert params_message(EXACT) == RestToGrpc.convert_search_params(EXACT)
    assert params_message(None) is None
    other = models.SearchParams(hnsw_ef=7)
    assert params_message(other) is other


@LOCAL
@pytest.mark.parametrize("strays", [False, True])
def test_what_a_client_is_given_is_a_message_where_it_asks_over_grpc(
    server: QdrantCollection, monkeypatch: pytest.MonkeyPatch, strays: bool
) -> None:
    server._kept = replace(server._found, strays=strays)
    plan, given = QueryPlan(cells=np.array([[1, 2]]), layout="a1"), list[Any]()
    monkeypatch.setattr(server.client, "_init_options", {"prefer_grpc": True})

    def asked(_: str, **more: Any) -> Any:
        given.append(more["query_filter"])
        return SimpleNamespace(points=[])

    monkeypatch.setattr(server.client, "query_points", asked)
    server.search(SearchRequest(KEYS[:1], k=3), plan)
    condition, params = server.narrowed(SearchRequest(KEYS[:1], k=3), plan, None, over_grpc=True)
    kind = models.Filter if strays else grpc.Filter
    assert [type(one) for one in (*given, condition)] == [kind, kind]
    assert params == params_message(EXACT)
    monkeypatch.setattr(server._budget, "_limit", 100)  # which counts conditions
    condition, _ = server.narrowed(SearchRequest(KEYS[:1], k=3), plan, None, over_grpc=True)
    assert type(condition) is models.Filter
    assert condition.must_not
    condition, _ = server.narrowed(SearchRequest(KEYS[:1], k=3), plan, None)
    assert type(condition) is models.Filter


def test_strays_are_what_is_no_whole_number(collection: QdrantCollection) -> None:
    built = _written(collection, LISTED | STRAYS)
    record = built._found.cells
    assert record is not None
    found, _ = built.client.scroll("docs", strays_of(record), limit=100)
    assert {one.id for one in found} == {*STRAYS}
    for chosen in ([0], [1, 2], [-1]):
        here = in_cells(record, chosen, None, strays=True)
        assert {one.id for one in built.client.scroll("docs", here, limit=100)[0]} >= {*STRAYS}


class Counts:
    """A server's count of the strays, and how often it was asked for."""

    def __init__(self, found: int | Exception) -> None:
        self.found, self.asked = found, 0

    def count(self, *_: Any, **__: Any) -> models.CountResult:
        self.asked += 1
        if isinstance(self.found, Exception):
            raise self.found
        return models.CountResult(count=self.found)


@pytest.mark.parametrize(
    ("indexed", "strict", "counted", "expected", "calls"),
    [
        (100, None, 0, False, 0),  # under every key a whole number
        ("yellow", None, 1, True, 1),  # the numbers are not those of one moment
        ("float", None, 0, True, 0),  # another index, which lists other things
        (99, None, 0, False, 1),
        (99, None, 1, True, 1),
        (99, None, ResponseHandlingException(TimeoutError()), True, 1),
        (None, None, 0, True, 0),  # somebody dropped the index
        (100, {"read_rate_limit": 10}, 0, True, 0),
        (100, {"filter_max_conditions": 10}, 0, True, 0),
        (100, {"search_allow_exact": False}, 0, True, 0),
        (100, {"max_query_limit": 500}, 0, False, 0),
    ],
)
def test_strays_are_counted_where_the_index_leaves_room_for_them(
    indexed: int | str | None,
    strict: dict[str, Any] | None,
    counted: int | Exception,
    expected: bool,
    calls: int,
) -> None:
    record, client = LayoutRecord("a1", "v1", 4), Counts(counted)
    limits = None if strict is None else models.StrictModeConfigOutput(enabled=True, **strict)
    kind = models.PayloadSchemaType("float" if indexed == "float" else "integer")
    schema = {"data_type": kind, "points": 100 if isinstance(indexed, str) else indexed}
    found: Any = SimpleNamespace(
        status=models.CollectionStatus("yellow" if indexed == "yellow" else "green"),
        config=SimpleNamespace(strict_mode_config=limits),
        payload_schema={} if indexed is None else {record.key: SimpleNamespace(**schema)},
        points_count=100,
    )
    assert may_have_strays(cast("Any", client), "docs", None, found, record) is expected
    assert client.asked == calls
    assert may_have_strays(cast("Any", client), "docs", None, found, None) is False


@given(
    st.lists(st.integers(0, 12), max_size=60),
    st.integers(1, 20),
)
def test_portions_keep_the_searches_of_a_query_together(rows: list[int], size: int) -> None:
    parts = in_portions(rows, size)
    assert sorted(number for part in parts for number in part) == [*range(len(rows))]
    assert all(part == sorted(part) for part in parts)  # searches side by side stay so
    held = [{rows[number] for number in part} for part in parts]
    assert all(not one & other for one, other in combinations(held, 2))
    assert all(len(part) <= size or len({rows[number] for number in part}) == 1 for part in parts)
