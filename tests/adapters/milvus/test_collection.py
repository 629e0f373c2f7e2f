"""What is special to Milvus: its errors, and what Milvus Lite would get silently wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.opening import looks_at_all
from amips_plugins.cell_layout import Storage
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    MissingExtra,
)
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import Metric
from tests.support.milvus_collection import COUNT, DIM, make, search, spec, vectors

pytestmark = pytest.mark.slow

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


# What it is


def test_constructing_asks_nothing() -> None:
    MilvusCollection(object(), "docs")


def test_info(client: Any) -> None:
    info = make(client).info
    assert (info.database, info.name, info.field) == ("milvus", "docs", "embedding")
    assert (info.metric, info.dim) == (Metric.IP, DIM)
    assert info.schema["embedding"] == "FLOAT_VECTOR"
    assert info.schema["key"] == "INT64"


def test_generations_and_aliases_are_of_one_family(client: Any) -> None:
    source = make(client)
    assert (source.info.namespace, source.info.family) == ("", "docs")
    client.create_alias("docs", "live")
    assert MilvusCollection(client, "live").info.family == "docs"
    for storage in ("partitions", "field"):
        copy = MilvusCollection(client, "live").layouts.build(spec(storage[:3], storage=storage))
        assert copy.info.name != "docs"
        assert copy.info.family == MilvusCollection(client, "live").info.family == "docs"
    make(client, "events__g2")  # the user's own
    assert MilvusCollection(client, "events__g2").info.family == "events__g2"


def test_a_collection_of_one_name_in_another_database(client: Any, path: Path) -> None:
    make(client)
    client.create_database("tenant")
    other = pymilvus.MilvusClient(str(path), db_name="tenant")
    make(other)
    other.delete("docs", ids=[0])
    assert MilvusCollection(client, "docs").info.namespace == ""
    with MilvusCollection.connect(str(path), "docs", database="tenant") as collection:
        assert collection.info.namespace == "tenant"
        assert collection.count() == COUNT - 1
        copy = collection.layouts.build(spec())
        assert (copy.info.namespace, copy.count()) == ("tenant", COUNT - 1)
        copy.close()
    with pytest.raises(CollectionNotFound, match=r"no database 'nope'; it has: default, tenant"):
        MilvusCollection.connect(str(path), "docs", database="nope")
    for name in other.list_collections():
        other.drop_collection(name)
    other.close()
    client.drop_database("tenant")


def test_keys_are_fetched_by_their_ids(client: Any) -> None:
    copy = make(client).layouts.build(spec())
    batch = copy.fetch([3, 4711, 0])
    found = dict(zip(batch.ids, batch.vectors.tolist(), strict=True))
    assert found == {key: vectors()[key].tolist() for key in (0, 3)}
    assert copy.fetch([]).vectors.shape == (0, DIM)


def test_an_unknown_collection_lists_what_there_is(client: Any) -> None:
    make(client, "papers")
    with pytest.raises(CollectionNotFound, match="'docs'; it has: papers"):
        _ = MilvusCollection(client, "docs").info


def test_the_vector_field_is_checked(client: Any) -> None:
    make(client, fields=("body", "heading"))
    with pytest.raises(FieldNotFound, match=r"2 float vector fields \(body, heading\)"):
        _ = MilvusCollection(client, "docs").info
    with pytest.raises(FieldNotFound, match="'title'; it has: body, heading"):
        _ = MilvusCollection(client, "docs", "title").info
    assert MilvusCollection(client, "docs", "heading").info.field == "heading"


def test_a_field_without_an_index_has_no_metric(client: Any) -> None:
    with pytest.raises(CollectionError, match="create_index"):
        _ = make(client, metric=None).info


def test_another_metric_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make(client)
    monkeypatch.setattr(type(client), "describe_index", lambda *_, **__: {"metric_type": "JACCARD"})
    with pytest.raises(MetricNotSupported, match="JACCARD"):
        _ = MilvusCollection(client, "docs").info


def test_an_alias_is_followed_once(client: Any) -> None:
    make(client, "docs_a")
    client.create_alias("docs_a", "docs")
    collection = MilvusCollection(client, "docs")
    assert collection.info.name == "docs_a"
    make(client, "docs_b")
    client.alter_alias("docs_b", "docs")
    assert collection.info.name == "docs_a"
    assert MilvusCollection(client, "docs").info.name == "docs_b"
    client.drop_alias("docs")


# Connecting


def test_connect_opens_an_existing_database_and_loads_it(client: Any, path: Path) -> None:
    make(client)
    client.release_collection("docs")
    collection = MilvusCollection.connect(str(path), "docs")
    assert collection.count() == COUNT
    assert len(search(collection)[0]) == 3
    collection.close()
    collection.close()
    assert client.list_collections() == ["docs"]  # another's client is not closed


def test_connect_creates_no_database(tmp_path: Path) -> None:
    with pytest.raises(CollectionNotFound, match=r"missing\.db"):
        MilvusCollection.connect(str(tmp_path / "missing.db"), "docs")
    assert list(tmp_path.iterdir()) == []


def test_an_address_of_neither_kind_is_refused() -> None:
    with pytest.raises(InvalidInput, match="http"):
        MilvusCollection.connect("localhost:19530", "docs")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.db").write_text("SQLite format 3")
    with pytest.raises(DatabaseUnreachable, match="older"):
        MilvusCollection.connect(str(tmp_path / "old.db"), "docs")


HOLD = """
import sys
from pymilvus import MilvusClient
client = MilvusClient(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_database_open_elsewhere_is_refused(tmp_path: Path) -> None:
    held = str(tmp_path / "held.db")
    with subprocess.Popen(  # noqa: S603 - our own interpreter and script
        [sys.executable, "-c", HOLD, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(DatabaseUnreachable, match="other process"):
            MilvusCollection.connect(held, "docs")
        other.communicate()


def test_no_server_is_a_quick_and_discreet_error() -> None:
    with pytest.raises(DatabaseUnreachable, match=r"127\.0\.0\.1:1 ") as caught:
        MilvusCollection.connect("http://root:secret@127.0.0.1:1", "docs")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "address", "extra"),
    [
        ("pymilvus", "http://127.0.0.1:1", r"amips-plugins\[milvus\]"),
        ("milvus_lite", "x.db", r"amips-plugins\[milvus-lite\]"),
    ],
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, address: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=extra):
        MilvusCollection.connect(address, "docs")


# Reading

AWKWARD = ["", " ", "'", '"', '\\"', "\\n", "\n", "\t", "%s", "{0}", "Ünï", "日本", "🎉", "a' or 1"]


def test_awkward_string_ids_are_read_once_at_any_batch_size(client: Any) -> None:
    ids = sorted([*AWKWARD, *(f"doc {row}" for row in range(COUNT - len(AWKWARD)))])
    collection = make(client, ids=list(reversed(ids)))
    for size in (1, 7, 1000):
        assert [key for batch in collection.scan(size) for key in batch.ids] == ids
    for place, key in enumerate(ids):
        rest = [found for batch in collection.scan(1000, after=key) for found in batch.ids]
        assert rest == ids[place + 1 :]


@pytest.mark.parametrize("storage", ["partitions", "field"])
def test_awkward_string_ids_are_written_and_deleted_alone(client: Any, storage: Storage) -> None:
    ids = sorted([*AWKWARD, "a', 'b", *(f"doc {row}" for row in range(COUNT - len(AWKWARD) - 1))])
    by_length = lambda keys, _: np.array([len(key) % 2 for key in keys])  # noqa: E731
    copy = make(client, ids=ids).layouts.build(spec(assign=by_length, storage=storage))
    for key in [*AWKWARD, "a', 'b"]:
        copy.upsert([key], vectors()[:1], [{"extra": {}}], np.array([0]))
        assert copy.count() == len(ids)
        copy.delete([key])
        ids.remove(key)
        assert [found for batch in copy.scan(100) for found in batch.ids] == ids


def test_scan_refuses_what_it_cannot_do(client: Any) -> None:
    collection = make(client)
    with pytest.raises(InvalidInput, match="at least 1"):
        next(collection.scan(0))
    with pytest.raises(InvalidInput, match="integers"):
        next(collection.scan(10, after="doc-3"))


def test_count_follows_the_writes(client: Any) -> None:
    collection = make(client)
    client.delete("docs", ids=[0, 1, 2])
    assert collection.count() == COUNT - 3


# Searching


def test_another_metric_in_the_parameters_is_refused(client: Any) -> None:
    collection = make(client)  # Milvus Lite would answer with wrong scores
    for params in ({"metric_type": "L2"}, {"params": {"metric_type": "L2"}}):
        with pytest.raises(InvalidInput, match="compares by IP"):
            search(collection, params=params)
    assert search(collection, params={"metric_type": "IP", "params": {"ef": 64}})


def test_a_filter_of_another_database_is_refused(client: Any) -> None:
    with pytest.raises(InvalidInput, match="expression"):
        search(make(client), filter={"must": []})


def test_the_databases_own_error_is_not_wrapped(client: Any) -> None:
    with pytest.raises(pymilvus.MilvusException):
        search(make(client), filter="no such (")


def test_stored_and_dynamic_fields_come_as_asked(client: Any) -> None:
    collection = make(client)
    names = ("key", "title", "extra", "free", "nothing")
    plan = QueryPlan(rewritten=vectors()[:1], rescore=10)
    for hits in (search(collection, fields=names), search(collection, plan, fields=names)):
        hit = hits[0][0]
        row = int(hit.id)
        assert dict(hit.fields) == {
            "key": row,
            "title": None if row % 2 else f"title {row}",
            "extra": {"nested": [row, None, "é"]},
            "free": row,
        }  # and nothing of "nothing", as the client's hits
    hit = search(collection, plan, fields=("embedding",))[0][0]
    np.testing.assert_allclose(hit.fields["embedding"], vectors()[int(hit.id)], rtol=1e-6)


def test_a_dropped_partition_is_not_an_empty_one(client: Any) -> None:
    copy = make(client).layouts.build(spec())
    plan = QueryPlan(cells=np.array([[1]]), layout="abc")
    assert len(search(copy, plan)[0]) == 3
    client.drop_partition(copy.info.name, "cell_abc_0001")
    with pytest.raises(CollectionError, match="cell_abc_0001"):
        search(copy, plan)
    assert len(search(copy, QueryPlan(cells=np.array([[0]]), layout="abc"))[0]) == 3


def test_queries_of_the_same_cells_are_one_call(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make(client).layouts.build(spec(n_cells=4))
    asked = []
    real = type(client).search

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((len(kwargs["data"]), kwargs["partition_names"]))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(client), "search", watched)
    cells = np.array([[0, 1], [2, -1], [1, 0], [-1, -1]])
    found = copy.search(SearchRequest(vectors()[:4], k=2), QueryPlan(cells=cells, layout="abc"))
    assert asked == [
        (2, ["_default", "cell_abc_0000", "cell_abc_0001"]),
        (1, ["_default", "cell_abc_0002"]),
        (1, ["_default"]),
    ]
    assert [len(hits) for hits in found] == [2, 2, 2, 0]


def test_the_calls_of_a_batch_share_one_deadline(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make(client).layouts.build(spec(n_cells=4))
    allowed = []
    real = type(client).search

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        allowed.append(kwargs["timeout"])
        time.sleep(0.2)
        return real(self, *args, **{**kwargs, "timeout": None})  # a slow machine is no failure

    monkeypatch.setattr(type(client), "search", slow)
    plan = QueryPlan(cells=np.array([[0], [1], [2]]), layout="abc")
    copy.search(SearchRequest(vectors()[:3], k=2, timeout=0.3), plan)
    assert 0.2 < allowed[0] <= 0.3
    assert 0.0 < allowed[1] <= 0.1
    assert 0.0 < allowed[2] < 0.01  # pymilvus would take 0 for no limit at all


def test_a_write_in_the_moment_in_which_a_build_ends(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make(client).layouts.build(spec())
    client.create_alias("docs", "docs__g2__draining")
    copy.table()
    real = type(client).describe_collection

    def late(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "docs__g2__draining":
            client.drop_alias(name)
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(type(client), "describe_collection", late)
    copy.upsert([100], vectors()[:1], [{"extra": {}}], np.array([0]))
    assert copy.count() == COUNT + 1


# The exact search


@pytest.mark.parametrize(
    ("index_type", "narrow"),
    [("IVF_FLAT", {"nprobe": 1}), ("HNSW", {"ef": 10}), ("FLAT", {}), ("AUTOINDEX", {})],
)
def test_the_exact_search_goes_through_all_of_an_index(
    client: Any, index_type: str, narrow: dict[str, int]
) -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((3000, DIM)).astype(np.float32)
    queries = rng.standard_normal((20, DIM)).astype(np.float32)
    schema = client.create_schema(auto_id=False)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    client.create_collection("indexed", schema=schema)
    client.insert("indexed", [{"key": row, "embedding": key} for row, key in enumerate(keys)])
    client.flush("indexed")
    index = client.prepare_index_params()
    params = {"nlist": 16} if index_type == "IVF_FLAT" else {}
    index.add_index("embedding", index_type=index_type, metric_type="IP", params=params)
    client.create_index("indexed", index)
    client.load_collection("indexed")
    collection = MilvusCollection(client, "indexed")
    wanted = np.argsort(-(queries @ keys.T), axis=1)[:, :10].tolist()
    request = SearchRequest(queries, k=10, params=narrow)
    assert [[hit.id for hit in hits] for hits in collection.exact(request)] == wanted
    if narrow:  # else the test would show nothing
        assert [[hit.id for hit in hits] for hits in collection.search(request)] != wanted


@pytest.mark.parametrize(
    ("kind", "all_of_it"),
    [("FLAT", True), ("IVF_FLAT", True), ("IVF_SQ8", False), ("HNSW", False), ("AUTOINDEX", False)],
)
def test_an_exact_search_looks_at_every_key_where_the_index_lets_it(
    kind: str, all_of_it: bool
) -> None:
    assert looks_at_all({"index_type": kind}) is all_of_it
