"""Cells as payload: what is stored, what is refused, and what others' writing does to it."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import CollectionError, DatabaseUnreachable, InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.sketch import sketch
from amips_plugins.vectors import FloatArray, IntArray, Metric
from tests.support.progress_recorder import Recorder
from tests.support.qdrant_data import A1, KEYS, by_row, cells_of, dense, fill, ids_found, lay_out

# What a server is asked for, and local mode does not have.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
]

ROWS = {row: row % 4 for row in range(len(KEYS))}
HALVES = LayoutSpec("b2", 2, lambda ids, _: by_row(ids, _) // 2, version="v2")


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    yield opened
    opened.close()


@pytest.fixture(params=["local", "server"])
def collection(client: QdrantClient, request: pytest.FixtureRequest) -> QdrantCollection:
    """The collection, also with the calls that a server gets (answered locally)."""
    fill(client)
    opened = QdrantCollection(client, "docs")
    opened._local = request.param == "local"
    return opened


def write(client: QdrantClient, key: Id, vector: FloatArray, **payload: Any) -> None:
    point = models.PointStruct(id=key, vector=vector.tolist(), payload=payload)
    client.upsert("docs", [point])


# --- what is stored --------------------------------------------------------------------------


def test_the_layout_is_stored_with_the_collection(tmp_path: Path) -> None:
    folder = str(tmp_path / "database")
    client = QdrantClient(path=folder)
    fill(client)
    client.update_collection("docs", metadata={"owner": "search team"})
    client.close()
    collection = QdrantCollection.connect(folder, "docs")
    lay_out(collection)
    collection.close()

    collection = QdrantCollection.connect(folder, "docs")
    assert collection.layout() == "a1"
    assert ids_found(collection, 3) == list(range(3, 40, 4))
    collection.close()
    client = QdrantClient(path=folder)
    record = {"layout": "a1", "version": "v1", "n_cells": 4, "complete": True}
    assert client.get_collection("docs").config.metadata == {
        "owner": "search team",
        "amips_layout": {"serving": record, "before": [{}], "idle": []},
    }
    (beside,) = sketch(KEYS[6:7], Metric.IP).tolist()
    stored = {"row": 6, "group": 0, "amips_cell_a1": 2, "amips_sketch_a1": beside}
    assert client.retrieve("docs", [6])[0].payload == stored
    client.close()


def test_an_object_stays_on_its_layout_until_it_looks_again(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    first = lay_out(collection)
    assert (collection.layout(), first.layout()) == (None, "a1")
    assert first.current() is first

    def halves(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        assert QdrantCollection(client, "docs").layout() == "a1"  # in force until the end
        return HALVES.assign(ids, vectors)

    second = lay_out(first, LayoutSpec("b2", 2, halves))
    assert (first.layout(), second.layout()) == ("a1", "b2")
    assert ids_found(second, 1, "b2") == [row for row in range(40) if row % 4 >= 2]
    # A reader that planned with the old layout still finds exactly its cells, and writes them.
    first.upsert([0], KEYS[:1], cells=np.array([3]))
    assert ids_found(first, 3) == [0, *range(3, 40, 4)]
    assert second.overflow() == 1
    assert first.current().layout() == "b2"


def test_each_vector_has_its_own_layout(client: QdrantClient) -> None:
    client.create_collection("docs", vectors_config={"title": dense(), "body": dense()})
    vector = {"title": KEYS[0].tolist(), "body": KEYS[1].tolist()}
    client.upsert("docs", [models.PointStruct(id=1, vector=vector)])
    title, body = (QdrantCollection(client, "docs", field) for field in ("title", "body"))
    assert lay_out(title).layout() == "a1"
    assert body.current().layout() is None
    with pytest.raises(CollectionError, match="something else than a cell"):
        body.layouts.build(A1)  # the payload key is the title's
    assert lay_out(body, HALVES).layout() == "b2"
    assert title.current().layout() == "a1"
    assert body.layouts.drop_old() == []
    assert cells_of(client) == {1: 1}


def test_an_overwritten_point_becomes_overflow(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    collection = lay_out(collection)
    write(client, 3, KEYS[3])
    client.upsert("docs", [models.PointStruct(id=99, vector=KEYS[9].tolist(), payload=None)])
    for cell in range(4):
        assert {3, 99} <= set(ids_found(collection, cell))
    empty = QueryPlan(cells=np.array([[-1, -1]]), layout="a1")
    hits = collection.search(SearchRequest(KEYS[:1], k=100), empty)[0]
    assert sorted(hit.id for hit in hits) == [3, 99]
    assert collection.overflow() == 2


def test_scores_are_those_from_before(collection: QdrantCollection) -> None:
    request = SearchRequest(KEYS[:3], k=100, fields=("row", "group"))
    before = collection.search(request)
    built = lay_out(collection)
    assert built.search(request) == before
    everywhere = QueryPlan(cells=np.tile(np.arange(4), (3, 1)), layout="a1")
    assert built.search(request, everywhere) == before


def test_roll_back_and_drop(client: QdrantClient, collection: QdrantCollection) -> None:
    second = lay_out(lay_out(collection), HALVES)
    assert second.layouts.status().older == ("a1",)
    first = second.layouts.roll_back()
    assert first.layout() == "a1"
    assert first.layouts.status().older == ("b2",)  # until it is dropped, or built again at once
    assert lay_out(collection.current(), HALVES).layouts.roll_back().layout() == "a1"
    native = first.layouts.roll_back()
    assert native.layout() is None
    with pytest.raises(InvalidInput, match="roll back"):
        native.layouts.roll_back()
    assert sorted(native.layouts.drop_old()) == ["a1", "b2"]
    assert native.layouts.drop_old() == []
    assert native.layouts.status().older == ()
    payloads = [record.payload or {} for record in client.scroll("docs", limit=100)[0]]
    assert {key for payload in payloads for key in payload} == {"row", "group"}


def test_a_reader_of_dropped_cells_still_finds_every_key(collection: QdrantCollection) -> None:
    first = lay_out(collection)
    lay_out(first, HALVES).layouts.drop_old()
    assert ids_found(first, 0) == list(range(40))


def test_a_build_reports_its_progress(
    collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.store._WRITE_BATCH", 10)
    monkeypatch.setattr("amips_plugins.adapters.qdrant.local_store._PAGE", 10)
    interrupted = Recorder(stop_after=25)
    with pytest.raises(KeyboardInterrupt):
        collection.layouts.build(A1, interrupted)
    assert (interrupted.totals, interrupted.started_at) == ([40], [0])
    resumed = Recorder()
    collection.layouts.build(A1, resumed)
    assert (resumed.totals, resumed.started_at, resumed.done) == ([40], [30], 40)


def test_a_plan_says_what_it_knows(collection: QdrantCollection) -> None:
    plan = collection.layouts.plan(A1)
    assert plan.keys == 40
    assert 40 * len("amips_cell_a1") < plan.n_bytes < 40 * 200
    assert 0 < plan.seconds < 60
    assert ("local mode" in plan.notes[0]) == collection._local


# --- what is refused, before anything is changed ----------------------------------------------


@pytest.mark.parametrize("content", ["x", 7, 2, 0.5, ["x"]])
def test_a_payload_key_of_others_is_refused(
    client: QdrantClient, collection: QdrantCollection, content: Any
) -> None:
    write(client, 99, KEYS[0], amips_cell_a1=content)
    for attempt in (collection.layouts.plan, collection.layouts.build):
        with pytest.raises(CollectionError, match=r"something else than a cell"):
            attempt(A1)
    assert not client.get_collection("docs").config.metadata
    assert {key: cell for key, cell in cells_of(client).items() if cell is not None} == {
        99: content
    }


def test_content_that_is_no_cell_is_mended(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    odd: list[Any] = ["x", 7, -3, 2.5, ["x"], [1, 2], {"a": 1}]
    came: list[bool] = []

    def meddling(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        for key, value in enumerate(odd) if not came else ():
            write(client, 60 + key, KEYS[0], amips_cell_a1=value)
        came.append(True)
        return by_row(ids, vectors)

    built = lay_out(collection, LayoutSpec("a1", 4, meddling))
    built.layouts.backfill(by_row)
    assert built.overflow() == 0
    expected = ROWS | {60 + key: key % 4 for key in range(len(odd))}
    assert cells_of(client) == expected
    for key, value in enumerate(odd):
        client.set_payload("docs", {"amips_cell_a1": value}, points=[key])
    assert built.layouts.backfill(by_row) == len(odd)
    assert cells_of(client) == expected


def test_an_unfinished_build_with_other_cells_is_refused(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    with pytest.raises(KeyboardInterrupt):
        collection.layouts.build(A1, Recorder(stop_after=1))
    assert collection.layouts.status().unfinished == ("a1",)
    with pytest.raises(InvalidInput, match="begun with 4 cells, not 5"):
        collection.layouts.build(LayoutSpec("a1", 5, by_row))
    assert collection.layouts.drop_old() == ["a1"]
    assert collection.layouts.status().unfinished == ()
    assert set(cells_of(client).values()) == {None}
    assert lay_out(collection, LayoutSpec("a1", 5, by_row)).layout() == "a1"


def test_metadata_of_others_are_refused(client: QdrantClient, collection: QdrantCollection) -> None:
    client.update_collection("docs", metadata={"amips_layout": "mine"})
    assert collection.layout() is None
    with pytest.raises(CollectionError, match="remove that entry"):
        collection.layouts.build(A1)


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = QdrantClient(path=str(tmp_path))
    fill(client)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100))
    collection = QdrantCollection(client, "docs")
    with pytest.raises(CollectionError, match="100 are free"):
        collection.layouts.build(A1)
    assert not client.get_collection("docs").config.metadata
    client.close()


@pytest.mark.parametrize("cells", [[0.0] * 40, [0] * 39, [4] * 40, [-2] * 40])
def test_cells_that_cannot_be_are_refused(collection: QdrantCollection, cells: list[int]) -> None:
    with pytest.raises(InvalidInput, match="assign"):
        collection.layouts.build(LayoutSpec("a1", 4, lambda *_: np.array(cells)))
    assert collection.current().layout() is None
    assert lay_out(collection).overflow() == 0


def test_a_server_without_metadata_is_refused(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.layouts._SETTLING", 0.1)
    monkeypatch.setattr(client, "update_collection", lambda *_, **__: True)
    with pytest.raises(CollectionError, match=r"from 1\.16 on"):
        collection.layouts.build(A1)
    assert set(cells_of(client).values()) == {None}


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_only_read_is_refused(
    client: QdrantClient,
    collection: QdrantCollection,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UnexpectedResponse(status, "no", b"", httpx.Headers())

    for method in ("update_collection", "upsert", "delete", "batch_update_points"):
        monkeypatch.setattr(client, method, refuse)
    for attempt in (
        lambda: collection.layouts.build(A1),
        lambda: collection.upsert([1], KEYS[:1]),
        lambda: collection.delete([1]),
    ):
        with pytest.raises(DatabaseUnreachable, match="may write to the collection"):
            attempt()
    assert set(cells_of(client).values()) == {None}


# --- others who write -------------------------------------------------------------------------


def test_lost_cells_are_noticed(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = client.batch_update_points

    def lose(name: str, writes: Any, **more: Any) -> None:
        """Do as if all were done, and write no cell 0."""
        kept = [one for one in writes if one.set_payload.payload["amips_cell_a1"] != 0]
        if kept:
            update(name, kept, **more)

    monkeypatch.setattr(client, "batch_update_points", lose)
    with pytest.raises(CollectionError, match="10 of the 40 cells"):
        collection.layouts.build(A1)
    assert collection.current().layout() is None


def test_a_new_vector_never_gets_the_cell_of_the_old_one(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    """A writer comes between our reading a vector and our writing its cell."""

    def by_sign(_: Sequence[Id], vectors: FloatArray) -> IntArray:
        return (vectors[:, 0] > 0).astype(np.int64)

    turned: list[bool] = []

    def meddled(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        if not turned:
            turned.append(True)
            for key in (4, 7):
                write(client, key, -KEYS[key])
        return by_sign(ids, vectors)

    expected = {row: int(KEYS[row, 0] > 0) for row in range(40)}
    expected |= {key: 1 - expected[key] for key in (4, 7)}
    built = lay_out(collection, LayoutSpec("a1", 2, meddled))
    assert cells_of(client) == expected

    for key in range(5):  # the same in a backfill
        write(client, key, KEYS[key])
    turned.clear()
    assert built.layouts.backfill(meddled) == 5 + 2  # two of them twice
    assert cells_of(client) == expected


def test_keys_that_get_no_cell_stay_overflow(collection: QdrantCollection) -> None:
    def some(ids: Sequence[Id], _: FloatArray) -> IntArray:
        return np.array([-1 if int(key) < 10 else 1 for key in ids])

    built = lay_out(collection, LayoutSpec("a1", 4, some))
    assert built.overflow() == 10
    assert ids_found(built, 2) == list(range(10))
    assert built.layouts.backfill(some) == 0
    assert built.layouts.backfill(by_row) == 10
    assert built.overflow() == 0


def test_a_backfill_needs_the_cells_it_was_opened_with(collection: QdrantCollection) -> None:
    first = lay_out(collection)
    lay_out(first, HALVES)
    with pytest.raises(InvalidInput, match="have changed"):
        first.layouts.backfill(by_row)


def test_two_writers_during_a_build(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One knows the cells in force, the other knows of none; both write between any two steps."""
    monkeypatch.setattr("amips_plugins.adapters.qdrant.store._WRITE_BATCH", 3)
    monkeypatch.setattr("amips_plugins.adapters.qdrant.local_store._PAGE", 3)
    writer = lay_out(collection)
    rng = np.random.default_rng(5)
    present = {row: KEYS[row] for row in range(40)}
    writes = []

    def halves(ids: Sequence[Id], _: FloatArray) -> IntArray:
        return np.array([int(key) % 2 for key in ids])

    def meddled(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        key, vector = int(rng.integers(60)), rng.standard_normal(4).astype(np.float32)
        writes.append(int(rng.integers(3)))
        if writes[-1] == 0:
            write(client, key, vector)
        elif writes[-1] == 1:
            writer.upsert([key], vector[None], cells=np.array([key % 4]))
        else:
            writer.delete([key])
        present[key] = vector
        if writes[-1] == 2:
            del present[key]
        return halves(ids, vectors)

    built = lay_out(writer, LayoutSpec("b2", 2, meddled))
    assert len(writes) > 13  # one a batch, and in the passes behind the first
    assert built.overflow() <= 2
    built.layouts.backfill(halves)
    assert cells_of(client, "b2") == {key: key % 2 for key in present}
    batch = next(iter(built.scan(100)))
    assert list(batch.ids) == sorted(present)
    np.testing.assert_allclose(batch.vectors, [present[key] for key in sorted(present)], atol=1e-6)


# --- what changed under a cell ----------------------------------------------------------------


def test_a_verification_goes_on_where_it_was_killed(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.store._READ_BATCH", 5)
    monkeypatch.setattr("amips_plugins.adapters.qdrant.staleness._PAGES", 1)
    built = lay_out(collection)
    changed = [0, 1, 33, 34]
    points = [models.PointVectors(id=key, vector=(-KEYS[key]).tolist()) for key in changed]
    client.update_vectors("docs", points)
    killed = Recorder(stop_after=25)
    with pytest.raises(KeyboardInterrupt):
        built.layouts.backfill(by_row, killed, verify=True)
    assert built.overflow() == 2
    again = Recorder()
    assert built.layouts.backfill(by_row, again, verify=True) == 4
    assert again.done < 40  # without the pages that were noted, and what was placed
    assert (built.overflow(), built.layouts.audit(40).stale) == (0, 0)
    assert not (client.get_collection("docs").config.metadata or {})["amips_verified_a1"]


def test_metadata_that_are_seen_late(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node shows what was written a moment later."""
    describe = client.get_collection
    shown: list[Any] = []

    def late(name: str) -> Any:
        found = describe(name)
        shown.append(found.config.metadata)
        found.config.metadata = shown[max(0, len(shown) - 3)]
        return found

    monkeypatch.setattr(client, "get_collection", late)
    built = lay_out(collection)
    assert built.layout() == "a1"
    assert built.layouts.roll_back().layout() is None


def test_a_copy_without_its_metadata_keeps_the_cells_that_are_right(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    lay_out(collection)
    client.update_vectors("docs", [models.PointVectors(id=7, vector=(-KEYS[7]).tolist())])
    client.update_collection("docs", metadata={"amips_layout": {**LOST}})
    asked: list[Id] = []

    def noting(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        asked.extend(ids)
        return by_row(ids, vectors)

    copy = QdrantCollection(client, "docs")
    copy._local = collection._local
    assert copy.layout() is None
    built = lay_out(copy, LayoutSpec("a1", 4, noting))
    assert set(asked) == {7}
    assert cells_of(client) == ROWS
    assert built.layouts.audit(40).stale == 0


LOST: dict[str, Any] = {"serving": {}, "before": [], "idle": []}
