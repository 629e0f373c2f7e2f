from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import LayoutSpec, Storage
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import CollectionError, CollectionNotFound
from amips_plugins.models.tuned import EffortParameter, TunedHook
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from tests.adapters.contract.test_milvus import MilvusContract
from tests.support.tuned import optimistic

pymilvus = pytest.importorskip("pymilvus")

TOKEN = os.environ.get("AMIPS_MILVUS_TOKEN", "")
DIM = 16
COUNT = 6000  # a segment under 1024 rows gets no IVF index and ignores nprobe


class TestMilvusServer(MilvusContract):
    shares_keys = True
    shared_sketches = True
    brought_back = 0

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def database(cls, milvus_uri: str) -> Iterator[None]:
        cls.set_up(pymilvus.MilvusClient(milvus_uri, token=TOKEN))
        yield
        cls.tear_down()


@pytest.mark.nightly
class TestMilvusServerWithACellField(TestMilvusServer):
    shares_keys = False
    sketches = True
    storage: Storage | None = "field"


@pytest.fixture(scope="module")
def client(milvus_uri: str) -> Iterator[Any]:
    client = pymilvus.MilvusClient(milvus_uri, token=TOKEN)
    yield client
    client.close()


def keys() -> FloatArray:
    return np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)


def queries() -> FloatArray:
    return np.random.default_rng(1).standard_normal((20, DIM)).astype(np.float32)


def with_index(client: Any, name: str, kind: str, *, auto_id: bool) -> MilvusCollection:
    """Make a collection with a real index: flushed, built and loaded, so that its effort counts."""
    schema = client.create_schema(auto_id=auto_id, enable_dynamic_field=True)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    client.create_collection(name, schema=schema, num_shards=1)
    rows = [{"embedding": key, "row": row} for row, key in enumerate(keys())]
    ids = [{} if auto_id else {"key": row} for row in range(COUNT)]
    client.insert(name, [one | other for one, other in zip(ids, rows, strict=True)])
    client.flush(name)
    index = client.prepare_index_params()
    params = {"M": 8, "efConstruction": 40} if kind == "HNSW" else {"nlist": 64}
    index.add_index("embedding", index_type=kind, metric_type="IP", params=params)
    client.create_index(name, index)
    client.load_collection(name)
    deadline = time.monotonic() + 60
    while not all(part.index_name for part in client.list_loaded_segments(name)):
        assert time.monotonic() < deadline, "the index was not loaded in a minute"
        time.sleep(0.5)
        client.refresh_load(name)
    return MilvusCollection(client, name)


@pytest.fixture(scope="module")
def ivf(client: Any) -> Iterator[MilvusCollection]:
    """A collection with IVF_FLAT, whose keys have ids that the server gave."""
    name = f"ivf_{secrets.token_hex(4)}"
    yield with_index(client, name, "IVF_FLAT", auto_id=True)
    for made in client.list_collections():
        if made.startswith(name):
            client.drop_collection(made)


def exact_rows(k: int) -> list[set[int]]:
    return [set(row) for row in np.argsort(-(queries() @ keys().T), axis=1)[:, :k].tolist()]


def found_rows(collection: MilvusCollection, **request: Any) -> list[set[int]]:
    plan = request.pop("plan", QueryPlan())
    hits = collection.search(SearchRequest(queries(), fields=("row",), **request), plan)
    return [{int(hit.fields["row"]) for hit in found} for found in hits]


def recall(found: list[set[int]], wanted: list[set[int]]) -> float:
    return float(np.mean([len(a & b) / len(b) for a, b in zip(found, wanted, strict=True)]))


def test_nprobe_reaches_the_index(ivf: MilvusCollection) -> None:
    wanted = exact_rows(10)
    one, four, all_lists = (
        recall(found_rows(ivf, k=10, params={"nprobe": probes}), wanted) for probes in (1, 4, 64)
    )
    assert one < 0.6 < four + 0.2 < all_lists + 0.2
    assert all_lists == 1.0
    nested = recall(found_rows(ivf, k=10, params={"params": {"nprobe": 1}}), wanted)
    assert nested == one


def test_the_exact_search_goes_through_every_list(ivf: MilvusCollection) -> None:
    request = SearchRequest(queries(), k=10, fields=("row",), params={"nprobe": 1})
    found = [{int(hit.fields["row"]) for hit in hits} for hits in ivf.exact(request)]
    assert found == exact_rows(10)


@pytest.fixture
def indexed(client: Any) -> Iterator[Callable[[str], MilvusCollection]]:
    """Make a collection with a real index of some kind."""
    name = f"exact_{secrets.token_hex(4)}"

    yield partial(with_index, client, name, auto_id=False)
    client.drop_collection(name)


@pytest.mark.parametrize(("kind", "least"), [("HNSW", 0.98), ("IVF_SQ8", 0.95), ("SCANN", 0.99)])
def test_the_exact_search_of_other_indexes(
    indexed: Callable[[str], MilvusCollection], kind: str, least: float
) -> None:
    collection = indexed(kind)
    for k in (10, 200):
        hits = collection.exact(SearchRequest(queries(), k=k))
        assert recall([{int(hit.id) for hit in found} for found in hits], exact_rows(k)) >= least


@pytest.mark.parametrize(
    ("kind", "length", "listed"),
    [("HNSW", "ef", 12), ("HNSW", "ef", "12"), ("SCANN", "reorder_k", 12)],
)
def test_a_list_of_candidates_that_is_told_holds_those_of_a_plan(
    client: Any,
    indexed: Callable[[str], MilvusCollection],
    kind: str,
    length: str,
    listed: int | str,
) -> None:
    collection = indexed(kind)
    told = {length: listed, **({"nprobe": 64} if kind == "SCANN" else {})}
    client.search(collection.info.name, queries()[:1], limit=10, search_params=told)
    with pytest.raises(pymilvus.MilvusException):  # so a server takes a list that is too short
        client.search(collection.info.name, queries()[:1], limit=50, search_params=told)
    plan = QueryPlan(rewritten=queries(), rescore=50)
    assert recall(found_rows(collection, params=told, k=10, plan=plan), exact_rows(10)) >= 0.8
    router = LearnedRouter(collection, hook=Rewriting(), refresh=None)
    routed: Any = route(client, router)
    found = []
    for query in queries():
        (hits,) = routed.search(collection.info.name, [query], limit=10, search_params=told)
        found.append(set(hits.ids))
    assert recall(found, exact_rows(10)) >= 0.8
    assert router.fallbacks == {}


@pytest.mark.parametrize(
    ("kind", "parameter"),
    [("HNSW", EffortParameter("ef")), ("SCANN", EffortParameter("nprobe", reorder_k=16))],
)
def test_a_tuned_bundle_answers_pages_behind_its_list_of_candidates(
    client: Any,
    indexed: Callable[[str], MilvusCollection],
    kind: str,
    parameter: EffortParameter,
) -> None:
    collection = indexed(kind)
    hook = TunedHook(parameter, optimistic((16, 32)), 0.9)
    router = LearnedRouter(collection, hook=hook, refresh=None)
    routed: Any = route(client, router, recall=0.9)
    page = {"offset": 40}
    (hits,) = routed.search(collection.info.name, queries()[:1], limit=10, search_params=page)
    found = router.search(queries()[0], 10, recall=0.9, params=page)
    assert [hit.id for hit in found] == list(hits.ids)
    assert len(hits.ids) == 10
    assert router.fallbacks == {}


class Rewriting:
    """Asks for what it is asked for, with candidates to be scored again."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(rewritten=queries, rescore=50)


def test_rewritten_queries_search_an_ivf_index(ivf: MilvusCollection) -> None:
    best = keys()[np.argmax(queries() @ keys().T, axis=1)]
    plan = QueryPlan(rewritten=best, rescore=50)
    hits = ivf.search(SearchRequest(queries(), k=3, params={"nprobe": 8}, fields=("row",)), plan)
    for query, found in zip(queries(), hits, strict=True):
        rows = [int(hit.fields["row"]) for hit in found]
        np.testing.assert_allclose([h.score for h in found], keys()[rows] @ query, rtol=1e-4)
        assert [hit.score for hit in found] == sorted((h.score for h in found), reverse=True)
        assert all(set(hit.fields) == {"row"} for hit in found)
    raw = recall(found_rows(ivf, k=1, params={"nprobe": 1}), exact_rows(1))
    rewritten = recall(found_rows(ivf, k=1, params={"nprobe": 1}, plan=plan), exact_rows(1))
    assert rewritten > raw  # the perfect rewriting looks for the best key itself


def test_laying_out_keeps_generated_ids_and_dynamic_fields(ivf: MilvusCollection) -> None:
    copy = ivf.layouts.build(LayoutSpec("abc", 8, lambda ids, _: np.asarray(ids) % 8))
    assert copy.info.name == f"{ivf.info.name}__g2"
    assert copy.count() == COUNT
    before = [key for batch in ivf.scan(4000) for key in batch.ids]
    assert [key for batch in copy.scan(1000) for key in batch.ids] == before
    assert found_rows(copy, k=10) == exact_rows(10)
    cells = np.tile(np.arange(8), (20, 1))
    assert found_rows(copy, k=10, plan=QueryPlan(cells=cells, layout="abc")) == exact_rows(10)
    again = copy.layouts.build(LayoutSpec("def", 2, lambda ids, _: np.asarray(ids) % 2))
    assert again.info.name == f"{ivf.info.name}__g3"
    assert (ivf.layout(), copy.layout(), again.layout()) == (None, "abc", "def")


def test_a_dropped_partition_is_the_databases_own_error(ivf: MilvusCollection, client: Any) -> None:
    copy = ivf.layouts.build(LayoutSpec("fff", 2, lambda ids, _: np.asarray(ids) % 2))
    assert copy.layout() == "fff"
    client.release_partitions(copy.info.name, ["cell_fff_0001"])
    client.drop_partition(copy.info.name, "cell_fff_0001")
    plan = QueryPlan(cells=np.ones((20, 1), dtype=np.int64), layout="fff")
    with pytest.raises(pymilvus.MilvusException, match="partition name cell_fff_0001 not found"):
        copy.search(SearchRequest(queries(), k=1), plan)


def test_an_unloaded_collection_says_so(client: Any) -> None:
    name = f"cold_{secrets.token_hex(4)}"
    client.create_collection(name, dimension=DIM)
    try:
        client.release_collection(name)
        with pytest.raises(CollectionError, match="load_collection"):
            _ = MilvusCollection(client, name).info
    finally:
        client.drop_collection(name)


def test_connect_opens_and_closes_a_client_of_its_own(
    milvus_uri: str, ivf: MilvusCollection
) -> None:
    collection = MilvusCollection.connect(milvus_uri, ivf.info.name, token=TOKEN)
    assert collection.count() == COUNT
    collection.close()
    collection.close()
    assert ivf.count() == COUNT
    with pytest.raises(CollectionNotFound, match=ivf.info.name):
        _ = MilvusCollection.connect(milvus_uri, "nowhere", token=TOKEN).info


def test_a_timeout_ends_the_search(ivf: MilvusCollection) -> None:
    def search() -> None:
        for _ in range(20):  # a client that is put aside for so long finds the answer there
            ivf.search(SearchRequest(queries(), k=1, timeout=0.00001))

    with pytest.raises(Exception, match=r"(?i)deadline|timeout"):
        search()


@pytest.mark.nightly
@pytest.mark.parametrize("storage", ["partitions", "field"])
def test_codes_inside_cells(ivf: MilvusCollection, client: Any, storage: Storage) -> None:
    """Cells are searched by their codes, and what is handed out is scored by the vectors."""
    n_cells, wanted = 4, exact_rows(10)

    def by_row(ids: Any, _: FloatArray) -> Any:
        return rows_of(ivf, ids) % n_cells

    copy = ivf.layouts.build(
        LayoutSpec(f"codes{storage[0]}", n_cells, by_row, storage=storage, index="ivf_sq8")
    )
    assert isinstance(copy, MilvusCollection)
    index = client.describe_index(copy.info.name, "embedding")
    assert index["index_type"] == "IVF_SQ8"
    layout = copy.layout()
    cells = np.tile(np.arange(3), (len(queries()), 1))
    plan = QueryPlan(cells=cells, layout=layout)
    inside = [{row for row in rows if row % n_cells < 3} for rows in exact_rows(60)]
    request = SearchRequest(queries(), k=10, fields=("row",))
    found = copy.search(request, plan)
    for hits, rows, query in zip(found, inside, queries(), strict=True):
        assert len({int(hit.fields["row"]) for hit in hits} & rows) >= 9
        true = [float(query @ keys()[int(hit.fields["row"])]) for hit in hits]
        assert [hit.score for hit in hits] == pytest.approx(true, rel=1e-4)
        assert (np.diff([hit.score for hit in hits]) <= 0).all()
    every = recall(found_rows(copy, k=10, plan=plan), wanted)
    fewer = recall(found_rows(copy, k=10, plan=replace(plan, probes=2)), wanted)
    assert every >= 0.7  # three cells of four
    assert (fewer < every - 0.2) == (storage == "partitions")  # a field has one index over all
    exact = copy.exact(SearchRequest(queries(), k=10, fields=("row",)))
    assert recall([{int(hit.fields["row"]) for hit in hits} for hits in exact], wanted) >= 0.99


def rows_of(collection: MilvusCollection, ids: Any) -> Any:
    rows = collection.client.get(collection.info.name, list(ids), output_fields=["key", "row"])
    found = {int(row["key"]): int(row["row"]) for row in rows}
    return np.array([found[int(one)] for one in ids])
