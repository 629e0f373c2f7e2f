"""What is written through a Milvus collection: accepted before anything goes, nothing of ours."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import Storage
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from tests.support.milvus_collection import COUNT, make, pymilvus, search, spec, vectors

pytestmark = pytest.mark.slow

BAD: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
    lambda row: {name: value for name, value in row.items() if name != "extra"},  # left out
    lambda row: {**row, "title": "x" * 100},  # too long
    lambda row: {**row, "title": 5},  # of a wrong type
    lambda row: {**row, "tenant": "seven"},
    lambda row: {**row, "extra": {"when": object()}},  # no JSON
]
STORAGES: list[Storage | None] = [None, "partitions", "field"]


def strict(client: Any, storage: Storage | None) -> MilvusCollection:
    """A collection, in cells by request, that takes no field it does not know."""
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=4)
    schema.add_field("title", pymilvus.DataType.VARCHAR, max_length=20)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="IP")
    client.create_collection("strict", schema=schema, index_params=index)
    rows = [
        {"key": key, "embedding": vector, "title": f"title {key}"}
        for key, vector in enumerate(vectors())
    ]
    client.insert("strict", rows)
    collection = MilvusCollection(client, "strict")
    return collection if storage is None else collection.layouts.build(spec(storage=storage))


def contents(collection: MilvusCollection) -> dict[Id, Any]:
    table = collection.table()
    rows = [row for page in table.pages(1000, 8 << 20, ["*"]) for row in page]
    assert collection.count() == len(rows)
    return {row["key"]: table.bare(row) for row in rows}


@pytest.mark.parametrize("storage", STORAGES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ids=st.lists(st.integers(0, COUNT + 5), min_size=1, max_size=8, unique=True),
    bad=st.sampled_from(BAD),
    place=st.integers(0, 7),
    seed=st.integers(0, 100),
)
def test_what_is_refused_changes_nothing(
    client: Any, storage: Storage | None, ids: list[int], bad: Any, place: int, seed: int
) -> None:
    name = "docs" if storage is None else "docs__g2" + ("f" if storage == "field" else "")
    if not client.has_collection("docs"):
        source = make(client)
        if storage is not None:
            source.layouts.build(spec(n_cells=3, storage=storage))
    collection = MilvusCollection(client, name)
    before = contents(collection)
    rng = np.random.default_rng(seed)
    rows = [{"title": f"new {key}", "extra": {"new": True}} for key in ids]
    rows[place % len(ids)] = bad(rows[place % len(ids)])
    cells = None if storage is None else rng.integers(-1, 3, len(ids))
    new = rng.standard_normal((len(ids), 4)).astype(np.float32)
    with pytest.raises(Exception):  # noqa: B017, PT011 - the client's own, of several kinds
        collection.upsert(ids, new, rows, cells)
    after = contents(collection)
    kept = {key: row for key, row in after.items() if key in before}
    assert kept == before


@pytest.mark.parametrize("storage", STORAGES)
def test_a_field_that_is_not_there_is_refused_and_loses_nothing(
    client: Any, storage: Storage | None
) -> None:
    collection = strict(client, storage)
    before = contents(collection)
    cells = None if storage is None else np.array([0, 1, 1])
    for fields in ([{"title": "a", "lang": "en"}] * 3, [{"title": "a"}, {}, {"title": "b"}]):
        with pytest.raises(pymilvus.MilvusException):
            collection.upsert([0, 1, 2], vectors()[:3], fields, cells)
        assert contents(collection) == before


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_that_is_written_again_is_found_by_its_new_values_alone(
    client: Any, storage: Storage | None
) -> None:
    source = make(client)
    collection = source if storage is None else source.layouts.build(spec(storage=storage))
    client.flush(collection.info.name)
    ids = [4, 5, 1000]
    for cells in ([1, 0, 1], [0, 0, 0], [-1, 1, 0]):
        new = 50 * np.roll(np.eye(4, dtype=np.float32)[:3], cells[0], axis=0)
        where = None if storage is None else np.array(cells)
        collection.upsert(ids, new, [{"extra": {}}] * 3, where)
        found = collection.search(SearchRequest(new, k=1, fields=("*",)))
        assert {hits[0].id for hits in found} == set(ids)
        assert all("free" not in hits[0].fields for hits in found)  # of the row before
        assert collection.count() == COUNT + 1
        if storage is not None:
            for cell in (0, 1):
                plan = QueryPlan(cells=np.array([[cell]]), layout="abc")
                (hits,) = collection.search(SearchRequest(new[:1], k=100), plan)
                here = {key for key, home in zip(ids, cells, strict=True) if home in (cell, -1)}
                assert {hit.id for hit in hits} & set(ids) == here


def test_nothing_of_ours_is_written_or_handed_out(client: Any) -> None:
    copy = make(client).layouts.build(spec(storage="field"))
    for fields in (("*",), ("$meta",), ("amips_cell", "title"), ("amips_sketch",)):
        for plan in (
            QueryPlan(),
            QueryPlan(cells=np.array([[0, 1]]), layout="abc"),
            QueryPlan(rewritten=vectors()[:1], rescore=10),
        ):
            (hits,) = search(copy, plan, fields=fields)
            for hit in hits:
                assert not [name for name in hit.fields if name.startswith("amips_")]
                assert ("embedding" in hit.fields) == (fields == ("*",))
                assert ("title" in hit.fields) == (fields[-1] in ("*", "title"))
                assert ("free" in hit.fields) == (fields[0] in ("*", "$meta"))
    assert not [name for name in copy.info.schema if name.startswith("amips_")]
    read = client.query(copy.info.name, filter="key == 3", output_fields=["*"])[0]
    assert read["amips_cell"] == 1  # the bare client sees it, and hands it back to us
    row = {name: value for name, value in read.items() if name not in ("key", "embedding")}
    copy.upsert([3], 5 * vectors()[:1], [row])
    assert copy.overflow() == 1
    plain = make(client, "plain")
    plain.upsert([3], vectors()[:1], [row])
    (stored,) = client.query("plain", filter="key == 3", output_fields=["*"])
    assert not [name for name in stored if name.startswith("amips_")]


def test_a_partition_that_others_make_is_overflow(client: Any) -> None:
    copy = make(client).layouts.build(spec(n_cells=4))
    name, new = copy.info.name, 50 * np.eye(4, dtype=np.float32)[:3]
    everywhere = QueryPlan(cells=np.array([[0], [1], [2]]), layout="abc")
    copy.search(SearchRequest(new, k=1), everywhere)
    client.create_partition(name, "archive")
    rows = [
        {"key": key, "embedding": vector, "extra": {}}
        for key, vector in zip((5, 1000, 1001), new, strict=True)
    ]
    client.insert(name, rows, partition_name="archive")
    found = copy.search(SearchRequest(new, k=1), everywhere)
    assert [hits[0].id for hits in found] == [5, 1000, 1001]
    assert copy.overflow() == 3
    assert copy.layouts.backfill(spec(n_cells=4).assign) == 3
    assert copy.overflow() == 0
    assert copy.count() == COUNT + 2
    assert copy.table().count("", ["archive"]) == 0


CONTROL = ["\x00", "\x01a", "a\x08b", "\x0c", "\x1b[0m", "a\x7f", "\u2028", "tab\tline\nend\r"]


@pytest.mark.parametrize("storage", STORAGES)
def test_ids_with_control_characters(client: Any, storage: Storage | None) -> None:
    ids = sorted([*CONTROL, *(f"doc {row}" for row in range(COUNT - len(CONTROL)))])
    source = make(client, ids=ids)
    by_length = lambda keys, _: np.array([len(key) % 2 for key in keys])  # noqa: E731
    collection = source
    if storage is not None:
        collection = source.layouts.build(spec(assign=by_length, storage=storage))
    assert [key for batch in collection.scan(3) for key in batch.ids] == ids
    cells = None if storage is None else np.zeros(len(CONTROL), dtype=np.int64)
    collection.upsert(CONTROL, vectors()[: len(CONTROL)], [{"extra": {}}] * len(CONTROL), cells)
    assert collection.count() == COUNT
    collection.delete(CONTROL)
    assert collection.count() == COUNT - len(CONTROL)


def test_the_smallest_and_the_largest_ids(client: Any) -> None:
    ids = [-(2**63), 1 - 2**63, -1, *range(COUNT - 5), 2**63 - 2, 2**63 - 1]
    by_parity = lambda keys, _: np.array([key % 2 for key in keys])  # noqa: E731
    copy = make(client, ids=ids).layouts.build(spec(assign=by_parity))
    assert copy.count() == COUNT
    for size in (1, 7, 1000):
        assert [key for batch in copy.scan(size) for key in batch.ids] == ids


class Hiding:
    """A client of a server that counts a row and never hands it out, as Milvus 2.3.5 does."""

    def __init__(self, client: Any, hidden: int) -> None:
        self._client = client
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def query(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._client.query(*args, **kwargs)
        return [row for row in rows if row.get("key") != self._hidden]


def test_a_copy_that_would_be_short_is_refused_before_and_after(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(client)
    client.create_alias("docs", "live")
    hiding = MilvusCollection(Hiding(client, 7), "live")
    with pytest.raises(Exception, match="1 rows more than Milvus hands out"):
        hiding.layouts.build(spec())
    monkeypatch.setattr(
        "amips_plugins.adapters.milvus.layout_plan._count_ids", lambda table: table.count()
    )
    with pytest.raises(Exception, match="1 rows more than it hands out"):
        hiding.layouts.build(spec())
    assert client.describe_alias("live")["collection_name"] == "docs"


def test_a_json_field_that_cannot_be_read_back_leaves_nothing_behind(client: Any) -> None:
    make(client)
    for text, said in (('"hello"', "is no JSON"), ('"12"', "does not take back a row")):
        client.upsert("docs", [{"key": 7, "embedding": vectors()[0], "extra": text}])
        with pytest.raises(Exception, match=said):
            MilvusCollection(client, "docs").layouts.build(spec())
        assert client.list_collections() == ["docs"]


class Newer:
    """A client of a server that has rows whose vector is null."""

    def __init__(self, client: Any, nullable: bool) -> None:
        self._client = client
        self._nullable = nullable

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def query(self, *args: Any, **kwargs: Any) -> Any:
        rows = [dict(row) for row in self._client.query(*args, **kwargs)]
        for row in rows:
            if "embedding" in row and row["key"] % 5 == 0:
                row["embedding"] = None
        return rows


def test_rows_without_a_vector_are_no_keys(client: Any) -> None:
    make(client)
    collection = MilvusCollection(Newer(client, nullable=False), "docs")
    for size in (1, 1000):
        ids = [key for batch in collection.scan(size) for key in batch.ids]
        assert ids == [key for key in range(COUNT) if key % 5]
    with pytest.raises(Exception, match="without a vector"):
        collection.layouts.build(spec())
    assert client.list_collections() == ["docs"]


def test_rows_whose_null_vector_lite_stores_as_zeros_are_no_keys(client: Any) -> None:
    schema = client.create_schema(auto_id=False)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=4, nullable=True)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="IP")
    client.create_collection("sparse", schema=schema, index_params=index)
    rows = [
        {"key": key, "embedding": None if key % 5 == 0 else vector}
        for key, vector in enumerate(vectors())
    ]
    client.insert("sparse", rows)
    keys = [key for key in range(COUNT) if key % 5]
    copy = MilvusCollection(client, "sparse").layouts.build(spec())
    for collection in (MilvusCollection(client, "sparse"), copy):
        assert [key for batch in collection.scan(1000) for key in batch.ids] == keys
        assert list(collection.fetch([0, 1]).ids) == [1]
    assert copy.count() == COUNT
    assert copy.table().overflow() == COUNT - len(keys)


def test_ids_of_other_types(client: Any) -> None:
    copy = make(client).layouts.build(spec())
    given: Any = np.array([3, 4])
    copy.upsert(given, vectors()[:2], [{"extra": {}}] * 2, np.array([1, 0]))
    assert sorted(copy.fetch(given).ids) == [3, 4]
    copy.delete(given)
    assert copy.count() == COUNT - 2
    refused: Any
    for refused in (["3"], [True], [3.0], [None]):
        for call in (copy.delete, copy.fetch):
            with pytest.raises(InvalidInput, match="of one kind"):
                call(refused)
    made: Any = [uuid.UUID(int=row) for row in range(COUNT)]
    texts = make(client, "texts", ids=[str(one) for one in made])
    texts.upsert(made[:2], vectors()[:2], [{"extra": {}}] * 2)
    assert texts.count() == COUNT
    texts.delete(made[:3])
    assert texts.count() == COUNT - 3
