"""What is special to Milvus: its errors, and what Milvus Lite would get silently wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.base import Collection, Id, SearchRequest
from amips_plugins.adapters.milvus import MilvusCollection
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
from amips_plugins.vectors import FloatArray, IntArray, Metric

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

DIM = 4
COUNT = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("milvus") / "docs.db"


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[Any]:
    client = pymilvus.MilvusClient(str(path))
    yield client
    client.close()


@pytest.fixture(autouse=True)
def leave_nothing_behind(client: Any) -> Iterator[None]:
    yield
    for name in client.list_collections():
        client.drop_collection(name)


def vectors() -> FloatArray:
    return np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)


def make(
    client: Any,
    name: str = "docs",
    *,
    metric: str | None = "IP",
    fields: Sequence[str] = ("embedding",),
    ids: Sequence[Id] = tuple(range(COUNT)),
    auto_id: bool = False,
    partition_key: bool = False,
) -> MilvusCollection:
    schema = client.create_schema(auto_id=auto_id, enable_dynamic_field=True)
    kind = pymilvus.DataType.VARCHAR if isinstance(ids[0], str) else pymilvus.DataType.INT64
    schema.add_field("key", kind, is_primary=True, max_length=100)
    for field in fields:
        schema.add_field(field, pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("title", pymilvus.DataType.VARCHAR, max_length=50, nullable=True)
    schema.add_field(
        "tenant",
        pymilvus.DataType.INT64,
        default_value=7,
        **({"is_partition_key": True} if partition_key else {}),
    )
    schema.add_field("extra", pymilvus.DataType.JSON)
    index = client.prepare_index_params()
    for field in fields:
        if metric is not None:
            index.add_index(field, index_type="HNSW", metric_type=metric, M=8, efConstruction=32)
    client.create_collection(name, schema=schema, index_params=index)
    rows = [
        {
            **({} if auto_id else {"key": key}),
            **{field: vector * (place + 1) for place, field in enumerate(fields)},
            "title": None if row % 2 else f"title {row}",
            "extra": {"nested": [row, None, "é"]},
            "free": row,
        }
        for row, (key, vector) in enumerate(zip(ids, vectors(), strict=True))
    ]
    client.insert(name, rows)
    return MilvusCollection(client, name)


def halves(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.asarray(ids, dtype=np.int64) % 2


def search(collection: Collection, plan: QueryPlan | None = None, **request: Any) -> Any:
    return collection.search(
        SearchRequest(vectors()[:1], **{"k": 3, **request}), plan or QueryPlan()
    )


# What it is


def test_constructing_asks_nothing() -> None:
    MilvusCollection(object(), "docs")


def test_info(client: Any) -> None:
    info = make(client).info
    assert (info.database, info.name, info.field) == ("milvus", "docs", "embedding")
    assert (info.metric, info.dim) == (Metric.IP, DIM)
    assert info.schema["embedding"] == "FLOAT_VECTOR"
    assert info.schema["key"] == "INT64"


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
            "nothing": None,
        }
    hit = search(collection, plan, fields=("embedding",))[0][0]
    np.testing.assert_allclose(hit.fields["embedding"], vectors()[int(hit.id)], rtol=1e-6)


def test_a_dropped_partition_is_not_an_empty_one(client: Any) -> None:
    copy = make(client).lay_out("abc", 2, halves)
    plan = QueryPlan(cells=np.array([[1]]), layout="abc")
    assert len(search(copy, plan)[0]) == 3
    client.drop_partition(copy.info.name, "cell_abc_0001")
    with pytest.raises(CollectionError, match="cell_abc_0001"):
        search(copy, plan)
    assert len(search(copy, QueryPlan(cells=np.array([[0]]), layout="abc"))[0]) == 3


def test_queries_of_the_same_cells_are_one_call(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make(client).lay_out("abc", 4, lambda ids, _: np.asarray(ids) % 4)
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


# Laying out


def test_generations_follow_one_another(client: Any) -> None:
    first = make(client)
    second = first.lay_out("abc", 2, halves)
    third = second.lay_out("def", 2, halves)
    fourth = first.lay_out("abc", 2, halves)
    assert [c.info.name for c in (second, third, fourth)] == ["docs__g2", "docs__g3", "docs__g4"]
    assert [c.layout() for c in (first, second, third, fourth)] == [None, "abc", "def", "abc"]
    assert MilvusCollection(client, "docs__g3").layout() == "def"
    client.drop_collection("docs__g2")
    assert [c.count() for c in (first, third, fourth)] == [COUNT] * 3


def test_a_copy_keeps_rows_ids_and_other_indexes(client: Any) -> None:
    original = make(client, fields=("body", "heading"), auto_id=True)
    source = MilvusCollection(client, "docs", "body")
    ids = [key for batch in source.scan(100) for key in batch.ids]
    copy = source.lay_out("abc", 3, lambda keys, _: np.arange(len(keys)) % 4 - 1)
    everything = {"filter": "", "output_fields": ["*"], "limit": COUNT}
    rows, copied = (
        sorted(client.query(name, **everything), key=lambda row: row["key"])
        for name in (original._name, copy.info.name)
    )
    assert [row["key"] for row in copied] == sorted(ids)
    assert copied == rows
    assert client.describe_index("docs__g2", "body")["index_type"] == "FLAT"
    assert client.describe_index("docs__g2", "heading")["index_type"] == "HNSW"
    overflow = client.query("docs__g2", partition_names=["_default"], limit=COUNT)
    assert len(overflow) == COUNT // 4  # -1 is no cell
    other = search(MilvusCollection(client, "docs__g2", "heading"))
    assert [hit.id for hit in other[0]] == [
        hit.id for hit in search(MilvusCollection(client, "docs", "heading"))[0]
    ]


def test_a_copy_through_connect_owns_its_client(client: Any, path: Path) -> None:
    make(client)
    source = MilvusCollection.connect(str(path), "docs")
    copy = source.lay_out("abc", 2, halves)
    source.close()
    assert copy.count() == COUNT
    copy.close()


def wrong_shape(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.zeros(len(ids) - 1, dtype=np.int64)


def too_large(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.full(len(ids), 2, dtype=np.int64)


def fractions(ids: Sequence[Id], _: FloatArray) -> Any:
    return np.zeros(len(ids))


@pytest.mark.parametrize("assign", [wrong_shape, too_large, fractions])
def test_what_fails_half_way_is_dropped(client: Any, assign: Any) -> None:
    source = make(client)
    with pytest.raises(InvalidInput, match="assign"):
        source.lay_out("abc", 2, assign)
    assert client.list_collections() == ["docs"]
    assert source.count() == COUNT


def test_an_interruption_leaves_nothing_half_written(client: Any) -> None:
    def interrupted(_ids: Sequence[Id], _found: FloatArray) -> IntArray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(client).lay_out("abc", 2, interrupted)
    assert client.list_collections() == ["docs"]


def test_a_copy_has_no_generation_name_before_it_is_complete(client: Any) -> None:
    def look(ids: Sequence[Id], found: FloatArray) -> IntArray:
        names = [name for name in client.list_collections() if name != "docs"]
        assert [name.partition("_building_")[0] for name in names] == ["docs_"]
        return halves(ids, found)

    assert make(client).lay_out("abc", 2, look).info.name == "docs__g2"


def test_a_collection_that_changes_meanwhile_is_refused(client: Any) -> None:
    source = make(client)

    def write(ids: Sequence[Id], found: FloatArray) -> IntArray:
        row = {"key": -1, "embedding": found[0], "extra": {}}  # behind the cursor
        client.insert("docs", [row])
        return halves(ids, found)

    with pytest.raises(CollectionError, match="changed while it was copied"):
        source.lay_out("abc", 2, write)
    assert client.list_collections() == ["docs"]


def test_layouts_that_cannot_be_are_refused_before_anything_is_made(client: Any) -> None:
    source = make(client)
    for layout in ("", "ABC", "a_b", "a" * 17):
        with pytest.raises(InvalidInput, match="lower-case"):
            source.lay_out(layout, 2, halves)
    for n_cells in (0, 1025):
        with pytest.raises(InvalidInput, match="1 to 1024"):
            source.lay_out("abc", n_cells, halves)
    client.create_partition("docs", "archive")
    with pytest.raises(InvalidInput, match="archive"):
        source.lay_out("abc", 2, halves)
    with pytest.raises(InvalidInput, match="partition key"):
        make(client, "tenants", partition_key=True).lay_out("abc", 2, halves)
    assert sorted(client.list_collections()) == ["docs", "tenants"]


def test_many_cells_warn(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amips_plugins.adapters.milvus._MANY_CELLS", 1)
    with pytest.warns(UserWarning, match="2 partitions"):
        make(client).lay_out("abc", 2, halves)


def test_progress_is_told_of_every_key(client: Any) -> None:
    told: list[tuple[Any, ...]] = []

    class Watch:
        def __call__(self, *step: Any) -> Watch:
            told.append(step)
            return self

        def __enter__(self) -> Watch:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def advance(self, amount: int = 1, note: str = "") -> None:
            told.append((amount,))

    make(client).lay_out("abc", 2, halves, Watch())
    assert told == [("cells", COUNT, 0, "keys"), (COUNT,)]
