"""Keys in more than one cell on a Milvus server: what others see of them, and what they write."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import HealthMonitor, LearnedRouter, route
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.shared_rows import torn_keys
from amips_plugins.bundle.package import Bundle
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Hit, Id, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.layout import lay_out
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray, IntArray, normalise
from tests.support.known_filters import KnowsEveryFilter
from tests.support.milvus_crashing import Killed, Watched

pymilvus = pytest.importorskip("pymilvus")

TOKEN = os.environ.get("AMIPS_MILVUS_TOKEN", "")
DIM, COUNT, N_CELLS = 8, 2_000, 4


def vectors(count: int = COUNT, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def members(ids: Sequence[Id], _: Any = None) -> IntArray:
    """Keys whose id is a multiple of three lie in two cells."""
    numbers = np.array([int(key) for key in ids], dtype=np.int64)
    own = numbers % N_CELLS
    return np.stack([own, np.where(numbers % 3 == 0, (own + 1) % N_CELLS, own)], axis=1)


def spec(**more: Any) -> LayoutSpec:
    copies = len(range(0, COUNT, 3))
    return LayoutSpec("abc", N_CELLS, members, "v1", shared=True, copies=copies, **more)


@pytest.fixture(scope="module")
def client(milvus_uri: str) -> Iterator[Any]:
    client = pymilvus.MilvusClient(milvus_uri, token=TOKEN)
    yield client
    client.close()


@pytest.fixture
def alias(client: Any) -> Iterator[str]:
    """The alias of a collection without a dynamic field."""
    name = f"copies_{secrets.token_hex(4)}"
    schema = client.create_schema(auto_id=False)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("v", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("year", pymilvus.DataType.INT64)
    index = client.prepare_index_params()
    index.add_index("v", index_type="FLAT", metric_type="IP")
    client.create_collection(
        name, schema=schema, index_params=index, num_shards=1, consistency_level="Strong"
    )
    rows = [{"key": key, "v": one, "year": key % 10} for key, one in enumerate(vectors())]
    client.insert(name, rows)
    client.create_alias(name, f"{name}_live")
    yield f"{name}_live"
    for left in client.list_collections():
        if left.startswith(name):
            for known in client.list_aliases(left)["aliases"]:
                client.drop_alias(known)
            client.drop_collection(left)


def build(client: Any, alias: str, **more: Any) -> MilvusCollection:
    return MilvusCollection(client, alias).layouts.build(spec(**more))


def search(
    collection: MilvusCollection, cells: Sequence[int], k: int = 10, query: Any = None, **more: Any
) -> list[Hit]:
    wanted = np.ones((1, DIM), dtype=np.float32) if query is None else query
    plan = QueryPlan(cells=np.array([cells]), layout="abc")
    return collection.search(SearchRequest(wanted, k, **more), plan)[0]


class Cells:
    """Routes every query to two cells."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(cells=np.tile([0, 1], (len(queries), 1)), layout="abc")


def test_a_bare_client_behind_the_alias_sees_keys(client: Any, alias: str, milvus_uri: str) -> None:
    bare = pymilvus.MilvusClient(milvus_uri, token=TOKEN)
    ones = np.ones((1, DIM), dtype=np.float32)
    before = bare.search(alias, data=ones, limit=COUNT)[0]  # it remembers the fields now
    copy = build(client, alias)
    assert copy.table().count() == COUNT + len(range(0, COUNT, 3))
    assert copy.count() == copy.layouts.status().count == COUNT
    found = bare.search(alias, data=ones, limit=COUNT)[0]
    assert [hit["id"] for hit in found] == [hit["id"] for hit in before]
    rows = bare.query(alias, filter="key < 100", output_fields=["key", "year"])
    assert sorted(row["key"] for row in rows) == list(range(100))
    assert [row["key"] for row in bare.get(alias, ids=[3])] == [3]
    bare.insert(alias, [{"key": COUNT, "v": ones[0], "year": 1}])
    bare.upsert(alias, [{"key": COUNT + 1, "v": ones[0], "year": 1}])
    bare.delete(alias, ids=[3, 4])  # with all rows of a key
    assert (copy.count(), copy.overflow()) == (COUNT, 2)
    assert copy.table().which([3, 4]) == set()
    assert copy.layouts.backfill(members) == 2
    assert list(torn_keys(copy.table())) == []
    bare.close()


def test_answers_are_full_where_copies_crowd_them(client: Any, alias: str) -> None:
    copy = build(client, alias)
    keys, rows = vectors(), np.arange(COUNT)
    for cells in ([0], [0, 1], [1, 2], [0, 1, 2]):
        inside = np.isin(members(rows.tolist()), cells).any(axis=1)
        for k in (1, 10, 700):
            best = rows[inside][np.argsort(-keys[inside].sum(axis=1), kind="stable")][:k]
            found = [hit.id for hit in search(copy, cells, k)]
            assert found == best.tolist()
    batch = QueryPlan(cells=np.array([[c, (c + 1) % 4] for c in range(4)] * 8), layout="abc")
    answers = copy.search(SearchRequest(vectors(32, seed=1), 50), batch)
    assert all(len({hit.id for hit in hits}) == len(hits) == 50 for hits in answers)


def test_a_foreign_write_leaves_no_older_row_that_wins(
    client: Any, alias: str, milvus_uri: str
) -> None:
    copy = build(client, alias)
    best = [hit.id for hit in search(copy, [0, 1], 20)]
    shared = [key for key in best if int(key) % 12 == 0][:1]  # in the cells 0 and 1
    gone = [*shared, *[key for key in best if int(key) % 3][:2]]
    far = -np.ones(DIM, dtype=np.float32)
    client.upsert(alias, [{"key": key, "v": far, "year": 99} for key in gone])
    client.upsert(alias, [{"key": COUNT + 7, "v": 9 * np.ones(DIM), "year": 99}])  # a new key
    time.sleep(1.1)  # what is remembered of the overflow
    left = [COUNT + 7, *[key for key in best if key not in gone]]
    assert [hit.id for hit in search(copy, [0, 1], 18)] == left
    ones = np.ones((1, DIM), dtype=np.float32)
    rewritten = QueryPlan(
        cells=np.array([[0, 1]]), layout="abc", rewritten=np.full_like(ones, 0.5), rescore=40
    )
    scored = copy.search(SearchRequest(ones, 18), rewritten)[0]
    assert [hit.id for hit in scored] == left
    np.testing.assert_allclose(
        [hit.score for hit in scored],
        [hit.score for hit in search(copy, [0, 1], 18)],
        rtol=1e-5,
    )
    everything = {hit.id: hit for hit in search(copy, [0, 1], COUNT, fields=["year"])}
    assert all(everything[key].score == -DIM for key in gone)
    assert all(everything[key].fields["year"] == 99 for key in gone)

    async def awaited() -> list[Hit]:
        asking = pymilvus.AsyncMilvusClient(milvus_uri, token=TOKEN)
        request = SearchRequest(np.ones((1, DIM), dtype=np.float32), 18)
        plan = QueryPlan(cells=np.array([[0, 1]]), layout="abc")
        found = await copy.search_async(asking, request, plan)
        await asking.close()
        return found[0]

    assert [hit.id for hit in asyncio.run(awaited())] == left
    assert copy.layouts.backfill(members) == len(gone) + 1
    assert (copy.count(), copy.overflow()) == (COUNT + 1, 0)
    assert copy.table().count(f"key == {shared[0]}") == 2
    assert list(torn_keys(copy.table())) == []


def test_a_routed_client_counts_keys_and_hides_their_marks(client: Any, alias: str) -> None:
    copy = build(client, alias)
    routed = route(client, LearnedRouter(MilvusCollection(client, alias), hook=Cells()))
    count = routed.query(alias, filter="", output_fields=["count(*)"])
    assert count[0]["count(*)"] == COUNT
    for asked in ({"filter": "key < 30"}, {"ids": list(range(30))}):
        count = routed.query(alias, output_fields=["count(*)"], **asked)
        assert count[0]["count(*)"] == 30
    for row in routed.query(alias, filter="key < 30", output_fields=["*"]):
        assert set(row) == {"key", "v", "year"}
    hits = routed.search(
        alias, data=np.ones((1, DIM), dtype=np.float32), limit=20, output_fields=["*"]
    )[0]
    assert [hit["id"] for hit in hits] == [hit.id for hit in search(copy, [0, 1], 20)]
    assert all(set(hit["entity"]) <= {"key", "v", "year"} for hit in hits)
    gone = hits[2]["id"]
    client.upsert(alias, [{"key": gone, "v": -np.ones(DIM), "year": 99}])
    time.sleep(1.1)
    left = [hit["id"] for hit in hits if hit["id"] != gone]
    again = routed.search(alias, data=np.ones((1, DIM), dtype=np.float32), limit=19)[0]
    assert [hit["id"] for hit in again] == left
    pages = [
        routed.search(
            alias,
            data=np.ones((1, DIM), dtype=np.float32),
            limit=5,
            search_params={"offset": offset},
        )[0]
        for offset in (0, 5, 10)
    ]
    assert [hit["id"] for page in pages for hit in page] == left[:15]


def test_codes_and_an_older_row_through_a_routed_client(client: Any, alias: str) -> None:
    copy = build(client, alias, index="ivf_sq8")
    watch = KnowsEveryFilter()
    router = LearnedRouter(MilvusCollection(client, alias), hook=Cells(), watch=watch)
    routed, ones = route(client, router), np.ones((1, DIM), dtype=np.float32)
    best = [hit.id for hit in search(copy, [0, 1], 12)]
    client.upsert(alias, [{"key": best[2], "v": -np.ones(DIM), "year": 99}])
    time.sleep(1.1)
    left = [key for key in best if key != best[2]][:10]
    for condition in ("", "year < 50"):
        found = routed.search(alias, data=ones, limit=10, filter=condition)[0]
        assert [hit["id"] for hit in found] == left
    assert not router.fallbacks
    routed.search(alias, data=ones, limit=12_000)  # more candidates than a server gives
    assert set(router.fallbacks) == {"cells: fewer than k hits"}


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_write_that_died_between_two_cells_is_made_one(client: Any, alias: str) -> None:
    copy = build(client, alias)
    new = vectors(1, seed=5) + 9
    total, told = 100, [0]
    for deadly in range(total):
        told[0] = 0

        def die(_name: str, _done: bool, deadly: int = deadly) -> None:
            told[0] += 1
            if told[0] == deadly + 1:
                raise Killed

        watched = MilvusCollection(Watched(client, die), copy.info.name)
        key = 3 * (deadly + 1)
        cells = (members([key]) + 2) % N_CELLS  # both cells are others
        try:
            watched.upsert([key], new, [{"year": 1}], cells)
            break
        except Killed:
            pass
        hits = [hit.id for hit in search(copy, range(N_CELLS), COUNT)]
        assert len(hits) == len(set(hits)) == COUNT
        copy.layouts.backfill(members)
        assert list(torn_keys(copy.table())) == []
        assert copy.count() == COUNT
    assert deadly >= 4


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shared", [False, True], ids=["one cell", "more cells"])
def test_a_backfill_that_died_loses_no_row_that_others_wrote(
    client: Any, alias: str, shared: bool
) -> None:
    """The older row of its key, in a cell, goes before the one in the overflow."""

    def own(ids: Sequence[Id], _: Any = None) -> IntArray:
        return members(ids) if shared else members(ids)[:, 0]

    def moved(ids: Sequence[Id], _: Any = None) -> IntArray:
        return (members(ids) + 1) % N_CELLS if shared else (members(ids)[:, 0] + 1) % N_CELLS

    plain = LayoutSpec("abc", N_CELLS, own, "v1", shared=shared)
    copy = MilvusCollection(client, alias).layouts.build(plain)
    total, told = 100, [0]
    for deadly in range(1, total, 4):  # behind every fourth call
        key = 3 * deadly if shared else deadly
        client.upsert(alias, [{"key": key, "v": np.full(DIM, 9.0), "year": 99}])
        told[0] = 0

        def die(_name: str, _done: bool, deadly: int = deadly) -> None:
            told[0] += 1
            if told[0] == deadly + 1:
                raise Killed

        try:
            MilvusCollection(Watched(client, die), copy.info.name).layouts.backfill(moved)
            break
        except Killed:
            pass
        copy.layouts.backfill(moved)
        assert copy.table().read([key])[key]["year"] == 99
        assert copy.table().count(f"key == {key} and year != 99") == 0
        assert not shared or list(torn_keys(copy.table())) == []
    assert deadly >= 6
    assert (copy.count(), copy.overflow()) == (COUNT, 0)


@pytest.mark.nightly
def test_two_writers_of_one_key_leave_the_rows_of_one(
    client: Any, alias: str, milvus_uri: str
) -> None:
    copy = build(client, alias)
    clients = [pymilvus.MilvusClient(milvus_uri, token=TOKEN) for _ in range(2)]
    writers = [MilvusCollection(one, copy.info.name) for one in clients]
    for key in range(0, 12, 3):
        threads = [
            threading.Thread(
                target=writer.upsert,
                args=([key], np.full((1, DIM), 7.0 + place, dtype=np.float32)),
                kwargs={"fields": [{"year": place}], "cells": np.array([[place, 2]])},
            )
            for place, writer in enumerate(writers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        table = copy.table()
        assert table.cells is not None
        rows = [
            table.read_in(table.cells.partition(cell), [key], ["*"]).get(key) for cell in range(4)
        ]
        there = [row["year"] for row in rows if row is not None]
        assert there in ([0, 0], [1, 1])
        assert (rows[there[0]] is not None, rows[2] is not None) == (True, True)
    assert list(torn_keys(copy.table())) == []
    assert copy.count() == COUNT
    for one in clients:
        one.close()


@pytest.mark.nightly
def test_a_new_layout_and_the_old_one_have_every_key_once(client: Any, alias: str) -> None:
    build(client, alias)
    again = MilvusCollection(client, alias).layouts.build(
        LayoutSpec("def", 2, lambda ids, _: np.asarray(ids) % 2, "v2")
    )
    assert again.count() == again.table().count() == COUNT
    again.upsert([1], vectors(1, seed=3), [{"year": 1}], np.array([1]))
    back = MilvusCollection(client, alias).layouts.roll_back()
    assert (back.layout(), back.count(), back.overflow()) == ("abc", COUNT, 1)
    assert back.layouts.backfill(members) == 1
    assert list(torn_keys(back.table())) == []


def test_a_plan_says_what_copies_take(client: Any, alias: str, tmp_path: Path) -> None:
    collection = MilvusCollection(client, alias)
    plain = collection.layouts.plan(LayoutSpec("abc", N_CELLS, members, "v1", work=tmp_path))
    plan = collection.layouts.plan(spec())
    (note,) = [note for note in plan.notes if "more than one cell" in note]
    assert "667 rows more" in note
    assert "1.33 times" in note
    assert plan.n_bytes == pytest.approx(plain.n_bytes * (COUNT + 667) / COUNT, rel=0.01)
    with pytest.raises(InvalidInput, match="--spill 0"):
        collection.layouts.plan(spec(storage="field"))


@pytest.mark.nightly
def test_targets_hold_in_graphs_with_keys_in_two_cells(client: Any, tmp_path: Path) -> None:
    """For several k, on queries that nothing has seen, with an HNSW graph in every cell."""
    pytest.importorskip("torch")
    from amips_plugins.export.snapshot import take_snapshot
    from amips_plugins.export.train import TrainOptions, train
    from tests.support.training_data import clustered_keys, narrow_queries

    keys = normalise(clustered_keys(9_000, DIM, clusters=300))
    name = f"graphs_{secrets.token_hex(4)}"
    schema = client.create_schema(auto_id=False)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("v", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("v", index_type="FLAT", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=index, num_shards=1)
    for start in range(0, len(keys), 3_000):
        some = keys[start : start + 3_000]
        client.insert(name, [{"key": start + row, "v": one} for row, one in enumerate(some)])
    options = TrainOptions(
        model="linear", n_cells=6, epochs=4, recall=0.9, k=10, spill=0.27, index="hnsw"
    )
    snapshot = take_snapshot(MilvusCollection(client, name), tmp_path / "snap")
    run = train(snapshot, narrow_queries(9_000, DIM), tmp_path / "run", options)
    bundle = Bundle.in_folder(run.bundle)
    copy = lay_out(MilvusCollection(client, name), bundle, work=tmp_path / "work")
    assert copy.count() == len(keys)
    table = MilvusCollection(client, copy.info.name).table()
    assert table.count() == len(keys) + bundle.manifest.copies > len(keys)
    segments = client.list_loaded_segments(copy.info.name)
    assert all(part.index_name for part in segments if part.num_rows >= 1_024)
    unseen = narrow_queries(300, DIM, seed=9)
    best = np.argsort(-(unseen @ keys.T), axis=1)[:, :100]
    router = LearnedRouter(copy, bundle=run.bundle, watch=HealthMonitor(share=0, drift_share=0))
    for k, recall in ((1, 0.9), (10, 0.9), (10, 0.8), (100, 0.9)):
        answers = router.search(unseen, k=k, recall=recall)
        found = [[hit.id for hit in hits] for hits in answers]
        assert all(len(set(ids)) == k for ids in found)
        shares = [len({*ids} & {*row}) / k for ids, row in zip(found, best[:, :k], strict=True)]
        assert np.mean(shares) >= recall - 0.02, (k, recall)
        assert {hits.trace.mode for hits in answers} == {"route"}
    for left in (copy.info.name, name):
        client.drop_collection(left)
