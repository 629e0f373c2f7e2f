"""Parameters of a Milvus search keep their meaning under every plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amips_plugins.adapters.milvus.cell_index import index_search
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.opening import describe_index
from amips_plugins.adapters.milvus.search import plan_calls
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.cell_layout import Storage
from amips_plugins.collection import SearchRequest
from amips_plugins.plan import QueryPlan
from tests.support.milvus_collection import COUNT, make, pymilvus, search, spec, vectors

PLANS = ["native", "cells", "rewritten", "rewritten in cells"]


def plan_of(kind: str, count: int, seed: int) -> QueryPlan:
    rng = np.random.default_rng(seed)
    cells = np.array([rng.permutation(4)[:3] for _ in range(count)])
    rewritten = vectors()[:count] + 0.1 * rng.standard_normal((count, 4)).astype(np.float32)
    return QueryPlan(
        cells=cells if "cells" in kind else None,
        layout="abc" if "cells" in kind else None,
        rewritten=rewritten if "rewritten" in kind else None,
        rescore=COUNT if "rewritten" in kind else 0,
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(PLANS),
    count=st.integers(1, 6),
    k=st.integers(1, 8),
    offset=st.integers(0, 12),
    seed=st.integers(0, 50),
)
@pytest.mark.slow
def test_a_page_is_what_follows_the_first(
    client: Any, kind: str, count: int, k: int, offset: int, seed: int
) -> None:
    if not client.has_collection("docs__g2"):
        make(client).layouts.build(spec(n_cells=4))
    copy = MilvusCollection(client, "docs__g2")
    plan = plan_of(kind, count, seed)
    first = copy.search(SearchRequest(vectors()[:count], k + offset), plan)
    params = {"offset": offset}
    page = copy.search(SearchRequest(vectors()[:count], k, params=params), plan)
    assert [[hit.id for hit in hits] for hits in page] == [
        [hit.id for hit in hits[offset:]] for hits in first
    ]
    exact = copy.exact(SearchRequest(vectors()[:count], k, params=params))
    whole = copy.exact(SearchRequest(vectors()[:count], k + offset))
    assert [[hit.id for hit in hits] for hits in exact] == [
        [hit.id for hit in hits[offset:]] for hits in whole
    ]


KEPT: list[dict[str, Any]] = [
    {},
    {"nprobe": 4},
    {"ef": 64, "offset": 3},
    {"metric_type": "IP", "params": {"nprobe": 4, "reorder_k": 10}},
    {"params": None},
]


@settings(max_examples=50)
@given(
    kept=st.sampled_from(KEPT),
    name=st.sampled_from(
        ["radius", "range_filter", "ignore_growing", "group_by_field", "group_size", "hints", "x"]
    ),
    inside=st.booleans(),
    rewritten=st.booleans(),
)
def test_what_says_which_hits_to_find_is_not_routed(
    kept: dict[str, Any], name: str, inside: bool, rewritten: bool
) -> None:
    collection = MilvusCollection(object(), "docs")

    def reason(params: dict[str, Any] | None) -> str | None:
        request = SearchRequest(vectors()[:1], 5, params=params)
        return collection.unroutable(request, rewritten=rewritten)

    assert reason(kept) is None
    more = {"params": {**(kept.get("params") or {}), name: 1}} if inside else {name: 1}
    assert reason({**kept, **more}) == f"params: {name}"


@pytest.mark.parametrize("offset", [-1, 1.5, "3", True, None])
def test_an_offset_that_is_none_is_the_clients_to_refuse(offset: Any) -> None:
    request = SearchRequest(vectors()[:1], 5, params={"offset": offset})
    reason = MilvusCollection(object(), "docs").unroutable(request, rewritten=False)
    assert reason == "params: offset"


def test_a_rewritten_query_fetches_no_more_than_a_server_gives(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = make(client)
    assert collection.max_candidates is None
    asked = []
    real = type(client).search

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["limit"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(client), "search", watched)
    for rescore, k in ((18_000, 900), (100, 5), (3, 7)):
        search(collection, QueryPlan(rewritten=vectors()[:1], rescore=rescore), k=k)
    assert asked == [16_384, 100, 7]
    monkeypatch.setattr(type(client), "get_server_version", lambda _: "v2.3.5")
    assert MilvusCollection(client, "docs").max_candidates == 16_384


def test_the_clients_own_error_for_a_field_comes_through(client: Any) -> None:
    with pytest.raises(pymilvus.MilvusException):
        search(make(client), filter="embedding > 3 and (")


@pytest.mark.parametrize("kind", ["rewritten", "rewritten in cells"])
@pytest.mark.slow
def test_a_server_scores_candidates_by_a_second_search(
    client: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    copy = make(client).layouts.build(spec(n_cells=4))
    plan = plan_of(kind, 1, 3)
    requests = [
        SearchRequest(vectors()[:1], 5, "tenant == 7", ("title", "free")),
        SearchRequest(vectors()[:1], 4, params={"offset": 3}),
        SearchRequest(vectors()[:1], 3, "tenant == 8"),  # nothing
    ]
    wanted = [copy.search(request, plan) for request in requests]
    monkeypatch.setattr(type(client), "get_server_version", lambda _: "v2.3.5")
    server, asked = MilvusCollection(client, copy.info.name), []
    real = type(client).search

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(client), "search", watched)
    found = [server.search(request, plan) for request in requests]
    for hits, others in zip(found, wanted, strict=True):
        assert [(h.id, h.fields) for h in hits[0]] == [(h.id, h.fields) for h in others[0]]
        scores = [hit.score for hit in others[0]]
        assert [hit.score for hit in hits[0]] == pytest.approx(scores, rel=1e-5)
    assert len(asked) == 5
    assert not any("embedding" in call["output_fields"] for call in asked)


@pytest.mark.parametrize(
    ("params", "k", "ef"),
    [
        (None, 5, 24),
        ({"nprobe": 4}, 5, 24),
        (None, 40, 40),  # a graph gives no more than it keeps
        ({"params": {"ef": 9}}, 5, 9),  # what the caller says
        ({"offset": 30}, 5, 35),
    ],
)
@pytest.mark.slow
def test_graphs_in_cells_are_searched_as_far_as_the_plan_says(
    client: Any, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any] | None, k: int, ef: int
) -> None:
    table = make(client).layouts.build(spec(index="hnsw")).table()
    plan = QueryPlan(cells=np.array([[0, 1], [1, 2]]), layout="abc", effort=24)
    request = SearchRequest(vectors()[:2], k, params=params)
    index = index_search({"index_type": "HNSW"})
    for call in plan_calls(request, plan, table, 1.0, None, index):  # Lite searches no graph
        assert "ef" not in call.arguments["search_params"].get("params", {}) or ef == 9
    monkeypatch.setattr(Table, "is_lite", False)
    calls = plan_calls(request, plan, table, 1.0, None, index)
    assert len(calls) == 2
    for call in calls:
        assert call.arguments["search_params"]["params"]["ef"] == ef
        assert call.arguments["search_params"].get("nprobe") == (params or {}).get("nprobe")
    plain = plan_calls(request, replace(plan, effort=None), table, 1.0, None, index)
    if params is None:
        assert "params" not in plain[0].arguments["search_params"]


@pytest.mark.parametrize(
    ("params", "k", "wanted"),
    [
        ({"params": {"ef": 7}}, 5, {"params": {"ef": 8}}),  # 1.5 candidates for a hit
        ({"ef": 7, "nprobe": 3}, 5, {"ef": 8, "nprobe": 3}),
        ({"params": {"ef": 90}}, 5, {"params": {"ef": 90}}),
        ({"ef": "7"}, 5, {"ef": 8}),  # a server reads a number in a text
        ({"ef": "90"}, 5, {"ef": "90"}),
        ({"ef": "wide"}, 5, {"ef": "wide"}),
        (
            {"params": {"search_list": 7}, "offset": 2},
            5,
            {"params": {"search_list": 11, "ef": 24}},
        ),
        ({"params": {"ef": 4}}, 5, {"params": {"ef": 4}}),  # the server's own error
    ],
)
@pytest.mark.slow
def test_a_list_of_candidates_that_is_told_holds_those_that_are_scored_again(
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    params: dict[str, Any],
    k: int,
    wanted: dict[str, Any],
) -> None:
    table = make(client).layouts.build(spec(index="hnsw")).table()
    monkeypatch.setattr(Table, "is_lite", False)
    plan = QueryPlan(cells=np.array([[0, 1]]), layout="abc", effort=24)
    request = SearchRequest(vectors()[:1], k, params=params)
    index = index_search({"index_type": "HNSW_SQ"})
    (call,) = plan_calls(request, plan, table, 1.0, None, index)
    assert call.arguments["search_params"] == {**wanted, "metric_type": table.info.metric.name}
    (plain,) = plan_calls(request, QueryPlan(), table, 1.0)
    told = {**params, "metric_type": table.info.metric.name}
    assert plain.arguments["search_params"] == told


@pytest.mark.parametrize(
    ("offset", "planned", "wanted"),
    [
        (0, {"ef": 16}, {"ef": 16}),
        (11, {"ef": 16}, {"ef": 16}),
        (20, {"ef": 16}, {"ef": 25}),
        (300, {"nprobe": 4, "reorder_k": 200}, {"nprobe": 4, "reorder_k": 305}),
    ],
)
def test_what_a_tuned_bundle_sets_holds_the_pages_before(
    client: Any, offset: int, planned: dict[str, Any], wanted: dict[str, Any]
) -> None:
    request = SearchRequest(vectors()[:1], 5, params={"offset": offset})
    (call,) = plan_calls(request, QueryPlan(params=planned), make(client).table(), 1.0)
    params = call.arguments["search_params"]
    assert params["params"] == wanted
    assert params["offset"] == offset


SQ8 = {"index_type": "IVF_SQ8", "nlist": "12"}


@pytest.mark.parametrize(
    ("described", "params", "probes", "wanted"),
    [
        (SQ8, None, None, {"nprobe": 12}),  # nothing was calibrated: all lists, as targets have it
        (SQ8, None, 5, {"nprobe": 5}),
        (SQ8, None, 50, {"nprobe": 12}),
        (SQ8, {"params": {"nprobe": 2}}, 5, {"nprobe": 2}),  # what the caller says
        ({"index_type": "IVF_PQ"}, None, None, {"nprobe": 65_536}),
        ({"index_type": "SCANN", "nlist": 9}, None, 3, {"nprobe": 3, "reorder_k": 50}),
        (
            {"index_type": "HNSW_SQ", "refine": "true"},
            None,
            None,
            {"refine_k": 1.5},
        ),
    ],
)
@pytest.mark.slow
def test_codes_in_cells_are_searched_as_far_as_the_plan_says(
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    described: dict[str, Any],
    params: dict[str, Any] | None,
    probes: int | None,
    wanted: dict[str, float],
) -> None:
    table = make(client).layouts.build(spec(index="hnsw")).table()
    monkeypatch.setattr(Table, "is_lite", False)
    plan = QueryPlan(cells=np.array([[0, 1]]), layout="abc", probes=probes)
    request = SearchRequest(vectors()[:1], 5, params=params)
    index = index_search(described)
    (call,) = plan_calls(request, plan, table, 1.0, None, index)
    assert call.arguments["search_params"]["params"] == wanted
    by_codes = described["index_type"] in ("IVF_SQ8", "IVF_PQ")
    assert call.with_vectors == by_codes
    assert call.arguments["limit"] == {"IVF_SQ8": 8, "IVF_PQ": 40}.get(described["index_type"], 5)
    assert ("embedding" in call.arguments["output_fields"]) == by_codes


@pytest.mark.parametrize("storage", ["partitions", "field"])
@pytest.mark.slow
def test_hits_of_codes_have_the_scores_of_the_vectors(client: Any, storage: Storage) -> None:
    """Milvus Lite compares codes of a byte; what it hands out is scored again."""
    collection = make(client)
    copy = collection.layouts.build(spec(index="ivf_sq8", storage=storage))
    assert copy.table().cells is not None
    assert str(describe_index(copy.table())["index_type"]) == "IVF_SQ8"
    plan = QueryPlan(cells=np.array([[0], [1], [0]]), layout="abc")
    fields = ("title", "free")
    request = SearchRequest(vectors()[:3], 4, params={"offset": 2}, fields=fields)
    for row, hits in enumerate(copy.search(request, plan)):
        own = np.flatnonzero(np.arange(COUNT) % 2 == plan.cells[row, 0])  # type: ignore[index]
        scores = vectors()[own] @ vectors()[row]
        best = np.argsort(-scores, kind="stable")[2:6]
        assert [hit.id for hit in hits] == own[best].tolist()
        assert [hit.score for hit in hits] == pytest.approx(scores[best].tolist(), rel=1e-5)
        assert all(set(hit.fields) == set(fields) for hit in hits)
    exact = copy.exact(SearchRequest(vectors()[:1], 3, params={"offset": 1}))[0]
    assert [hit.score for hit in exact] == pytest.approx(
        np.sort(vectors() @ vectors()[0])[::-1][1:4].tolist(), rel=1e-5
    )


@pytest.mark.slow
def test_codes_that_are_taken_away_under_a_router(client: Any) -> None:
    """An object that still takes them for there finds the same, and soon looks again."""
    copy = make(client).layouts.build(spec(index="ivf_sq8"))
    plan = QueryPlan(cells=np.array([[0], [1], [0]]), layout="abc")
    request = SearchRequest(vectors()[:3], 4)
    before = copy.search(request, plan)
    name = copy.info.name
    client.release_collection(name)
    client.drop_index(name, "embedding")
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="IP", index_name="embedding")
    client.create_index(name, index)
    client.load_collection(name)
    assert copy.index_inside(plan).oversampling == 1.5  # as of a moment ago
    assert copy.search(request, plan) == before
    copy._recent._index = (float("-inf"), copy._recent._index[1])
    assert copy.index_inside(plan).oversampling == 1.0
    after = copy.search(request, plan)
    assert [[hit.id for hit in hits] for hits in after] == [
        [hit.id for hit in hits] for hits in before
    ]
