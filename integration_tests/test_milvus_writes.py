"""Several writers of the same keys, and ids that need quoting: what only a server shows."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray
from tests.support.milvus_collection import spec

pymilvus = pytest.importorskip("pymilvus")

DIM = 4
COUNT = 40
AWKWARD = ["", "'", '"', '\\"', "\\", "\\n", "\n", "\x01", "%s", "日本", "🎉", "a', 'b", "a' or 1"]


@pytest.fixture(scope="module")
def client(milvus_uri: str) -> Iterator[Any]:
    client = pymilvus.MilvusClient(milvus_uri)
    yield client
    client.close()


@pytest.fixture
def name(client: Any) -> Iterator[str]:
    name = f"writes_{secrets.token_hex(3)}"
    yield name
    for made in client.list_collections():
        if made.startswith(name):
            for alias in client.list_aliases(made)["aliases"]:
                client.drop_alias(alias)
            client.drop_collection(made)


def make(client: Any, name: str, ids: Sequence[Id] = tuple(range(COUNT))) -> MilvusCollection:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
    kind = pymilvus.DataType.VARCHAR if isinstance(ids[0], str) else pymilvus.DataType.INT64
    schema.add_field("key", kind, is_primary=True, max_length=100)
    schema.add_field("v", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("v", index_type="FLAT", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=index, num_shards=1)
    keys = np.random.default_rng(0).standard_normal((len(ids), DIM)).astype(np.float32)
    client.insert(name, [{"key": key, "v": v} for key, v in zip(ids, keys, strict=True)])
    return MilvusCollection(client, name)


def ones() -> FloatArray:
    return np.ones((1, DIM), dtype=np.float32)


def by_length(ids: Sequence[Id], _: Any) -> IntArray:
    return np.array([len(str(key)) % 2 for key in ids], dtype=np.int64)


def test_two_writers_who_move_one_key_do_not_delete_each_others_row(
    client: Any, milvus_uri: str, name: str
) -> None:
    copy = make(client, name).layouts.build(spec(n_cells=4))
    clients = [pymilvus.MilvusClient(milvus_uri) for _ in range(2)]
    writers = [MilvusCollection(one, copy.info.name) for one in clients]
    for key in range(5):
        written = [np.full((1, DIM), value, dtype=np.float32) for value in (7.0, 8.0)]
        # Both move it: the key lies in cell ``key % 4`` now.
        threads = [
            threading.Thread(
                target=writer.upsert, args=([key], new, None, np.array([(key + 1 + place) % 4]))
            )
            for place, (writer, new) in enumerate(zip(writers, written, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert copy.table().count(f"key == {key}") == 1
        assert copy.table().read([key])[key]["v"][0] in (7.0, 8.0)
    for one in clients:
        one.close()


def test_awkward_string_ids_are_moved_and_deleted_alone(client: Any, name: str) -> None:
    ids = sorted([*AWKWARD, *(f"doc {row}" for row in range(COUNT - len(AWKWARD)))])
    copy = make(client, name, ids=ids).layouts.build(spec(assign=by_length))
    for key in AWKWARD:
        copy.upsert([key], ones(), None, 1 - by_length([key], None))
    assert copy.count() == len(ids)
    for key in AWKWARD:
        copy.delete([key])
        ids.remove(key)
        assert [found for batch in copy.scan(100) for found in batch.ids] == ids


def test_the_newer_row_is_read_where_others_have_upserted(client: Any, name: str) -> None:
    source = make(client, name)
    client.create_alias(name, f"{name}_live")
    live = MilvusCollection(client, f"{name}_live").layouts.build(spec())
    rows = [{"key": key, "v": np.full(DIM, 50.0)} for key in range(20)]
    client.upsert(f"{name}_live", rows)
    assert live.count() == COUNT + 20  # the rows from before are still in their cells

    def newer(collection: MilvusCollection) -> list[Id]:
        return [
            key
            for batch in collection.scan(7)
            for key, vector in zip(batch.ids, batch.vectors, strict=True)
            if vector[0] == 50.0
        ]

    assert newer(live) == list(range(20))
    assert live.table().read([3])[3]["v"][0] == 50.0
    again = MilvusCollection(client, f"{name}_live").layouts.build(spec("def"))
    assert (again.count(), newer(again)) == (COUNT, list(range(20)))
    for _ in range(2):
        back = MilvusCollection(client, f"{name}_live").layouts.roll_back()
    assert (back.info.name, back.count(), newer(back)) == (source.info.name, COUNT, list(range(20)))


def test_rows_with_long_texts_are_read_in_answers_that_a_server_sends(
    client: Any, name: str
) -> None:
    make(client, name)
    text = "x" * 60_000
    for start in range(100, 1700, 200):  # 96 MB; one answer holds 64 MiB
        rows = [{"key": key, "v": ones()[0], "free": text} for key in range(start, start + 200)]
        client.insert(name, rows)
    table = MilvusCollection(client, name).table()
    assert sum(len(page) for page in table.pages(16_384, 8 << 20, ["*"])) == COUNT + 1600


def test_a_partition_that_others_make_is_overflow(client: Any, name: str) -> None:
    copy = make(client, name).layouts.build(spec(n_cells=4))
    new = 50 * np.eye(DIM, dtype=np.float32)[:3]
    plan = QueryPlan(cells=np.array([[0], [1], [2]]), layout="abc")
    copy.search(SearchRequest(new, k=1), plan)
    client.create_partition(copy.info.name, "archive")
    rows = [{"key": key, "v": v} for key, v in zip((5, 1000, 1001), new, strict=True)]
    client.insert(copy.info.name, rows, partition_name="archive")
    assert copy.overflow() == 3
    time.sleep(1.1)
    found = copy.search(SearchRequest(new, k=1), plan)
    assert [hits[0].id for hits in found] == [5, 1000, 1001]
    assert copy.layouts.backfill(spec(n_cells=4).assign) == 3
    assert (copy.overflow(), copy.count()) == (0, COUNT + 2)


def test_the_largest_id_is_counted_by_a_server_and_never_handed_out(client: Any, name: str) -> None:
    collection = make(client, name, ids=[*range(COUNT - 1), 2**63 - 1])
    if sum(len(batch.ids) for batch in collection.scan(100)) == COUNT:
        pytest.skip("This server hands it out.")
    with pytest.raises(InvalidInput, match=r"1 rows more than Milvus hands out"):
        collection.layouts.build(spec())
    assert client.list_collections().count(f"{name}__building_abc") == 0


def test_a_refused_upsert_loses_no_row(client: Any, name: str) -> None:
    copy = make(client, name).layouts.build(spec(n_cells=4))
    fields: list[dict[str, Any]] = [{"note": "fine"}, {"note": "x" * 70_000}]  # too long for $meta
    with pytest.raises(pymilvus.MilvusException):
        copy.upsert([4, 5], np.repeat(ones(), 2, axis=0), fields, np.array([1, 2]))
    assert copy.count() == COUNT
    assert [key for batch in copy.scan(100) for key in batch.ids] == list(range(COUNT))


def test_a_cell_field_never_comes_behind_an_alias_that_clients_know(client: Any, name: str) -> None:
    make(client, name)
    client.create_alias(name, f"{name}_live")
    live = MilvusCollection(client, f"{name}_live")
    for wanted in (spec(storage="field"), spec(n_cells=200)):
        with pytest.raises(InvalidInput, match=r"remember the fields"):
            live.layouts.build(wanted)
    assert client.list_collections().count(f"{name}__building_abc_field") == 0
    copy = live.layouts.build(spec(storage="field", alias=f"{name}_new"))
    assert (copy.info.name, copy.count()) == (f"{name}__g2f", COUNT)
    assert copy.layouts.audit(COUNT).stale == 0
