"""What goes in and out through a routed Qdrant client carries nothing of ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import grpc, models

from amips_plugins import route
from tests.proxies.test_qdrant import QUERY, Database, done
from tests.support.proxy_data import COUNT, keys

Write = Callable[[Any, list[Any], list[list[float]]], Any]


@pytest.fixture(scope="module", params=["sync", "async"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Database:
    return Database(tmp_path_factory.mktemp("q"), request.param, models.Distance.COSINE, "")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return Database(tmp_path_factory.mktemp("q"), "sync", models.Distance.COSINE, "text")


def restored(database: Database) -> None:
    """Give every point the vector, the payload and the cell that it had at first."""
    database.bare.upsert("docs", database.first)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def as_at_first(request: pytest.FixtureRequest) -> None:
    for name in {"database", "named"} & set(request.fixturenames):
        found = request.getfixturevalue(name)
        if not hasattr(found, "first"):
            records = found.bare.scroll("docs", limit=COUNT, with_vectors=True)[0]
            found.first = [
                models.PointStruct(id=one.id, vector=one.vector, payload=one.payload)
                for one in records
            ]
        restored(found)


def ours(found: Any) -> list[Any]:
    """Everything of ours in an answer."""
    return [part for part in str(found).split("'") if part.startswith("amips_")]


READS: dict[str, Callable[[Any], Any]] = {
    "query_points": lambda c: c.query_points("docs", QUERY),
    "a filter": lambda c: c.query_points("docs", QUERY, query_filter=models.Filter(must=[])),
    "by an id": lambda c: c.query_points("docs", 3),
    "the cell itself": lambda c: c.query_points("docs", 3, with_payload=True, limit=2),
    "query_batch_points": lambda c: c.query_batch_points(
        "docs", [models.QueryRequest(query=QUERY, with_payload=True)] * 2
    ),
    "a batch of one": lambda c: c.query_batch_points(
        "docs", [models.QueryRequest(query=QUERY, with_payload=True)]
    ),
    "query_points_groups": lambda c: c.query_points_groups("docs", "group", QUERY, limit=2),
    "groups with lookup": lambda c: c.query_points_groups(
        "docs", "row", QUERY, limit=2, with_lookup="docs"
    ),
    "scroll": lambda c: c.scroll("docs", limit=5),
    "retrieve": lambda c: c.retrieve("docs", [1, 2]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("hook", ["cells", "none"])
def test_what_is_read_holds_nothing_of_ours(
    database: Database, read: Callable[[Any], Any], hook: str
) -> None:
    assert ours(read(database.bare))  # or there would be nothing to hide
    client = database.routed(database.every_cell() if hook == "cells" else None)
    found = done(read(client))
    assert not ours(found)
    assert "group" in str(found)


def points(records: list[Any], vectors: list[Any]) -> list[Any]:
    return [
        models.PointStruct(id=one.id, vector=vector, payload=one.payload)
        for one, vector in zip(records, vectors, strict=True)
    ]


def bare_points(records: list[Any], vectors: list[Any]) -> list[Any]:
    return [one.model_copy(update={"payload": None}) for one in points(records, vectors)]


def ids(records: list[Any]) -> list[Any]:
    return [one.id for one in records]


def payloads(records: list[Any]) -> list[Any]:
    return [one.payload for one in records]


def moved(records: list[Any], vectors: list[Any]) -> list[Any]:
    return [
        models.PointVectors(id=key, vector=vector)
        for key, vector in zip(ids(records), vectors, strict=True)
    ]


def operations(*made: Any) -> Write:
    def write(client: Any, records: list[Any], vectors: list[Any]) -> Any:
        return client.batch_update_points("docs", [make(records, vectors) for make in made])

    return write


def op_upsert(records: list[Any], vectors: list[Any]) -> Any:
    return models.UpsertOperation(upsert=models.PointsList(points=points(records, vectors)))


def op_batch(records: list[Any], vectors: list[Any]) -> Any:
    batch = models.Batch(ids=ids(records), vectors=vectors)
    return models.UpsertOperation(upsert=models.PointsBatch(batch=batch))


def op_vectors(records: list[Any], vectors: list[Any]) -> Any:
    update = models.UpdateVectors(points=moved(records, vectors))
    return models.UpdateVectorsOperation(update_vectors=update)


def op_set(records: list[Any], _: list[Any]) -> Any:
    change = models.SetPayload(payload=records[0].payload, points=ids(records))
    return models.SetPayloadOperation(set_payload=change)


def op_overwrite(records: list[Any], _: list[Any]) -> Any:
    change = models.SetPayload(payload=records[0].payload, points=ids(records))
    return models.OverwritePayloadOperation(overwrite_payload=change)


WRITES: dict[str, Write] = {
    "upsert": lambda c, r, v: c.upsert("docs", points(r, v)),
    "upsert without payload": lambda c, r, v: c.upsert("docs", bare_points(r, v)),
    "upsert a batch": lambda c, r, v: c.upsert(
        "docs", models.Batch(ids=ids(r), vectors=v, payloads=payloads(r))
    ),
    "upsert a bare batch": lambda c, r, v: c.upsert("docs", models.Batch(ids=ids(r), vectors=v)),
    "upload_points": lambda c, r, v: c.upload_points("docs", iter(points(r, v)), wait=True),
    "upload_collection": lambda c, r, v: c.upload_collection(
        "docs", np.array(v), ids=ids(r), payload=payloads(r), wait=True
    ),
    "upload a bare collection": lambda c, r, v: c.upload_collection(
        "docs", np.array(v), ids=iter(ids(r)), wait=True
    ),
    "update_vectors": lambda c, r, v: c.update_vectors("docs", moved(r, v)),
    "operation upsert": operations(op_upsert),
    "operation batch": operations(op_batch),
    "operation vectors": operations(op_vectors),
    "operations": operations(op_vectors, op_set, op_upsert),
}


def misplaced(database: Database) -> list[Any]:
    """The points that are in a cell of another vector than theirs, or bring ours in another way."""
    key = f"amips_cell_{database.layout}"
    found = database.bare.scroll("docs", limit=COUNT, with_vectors=True)[0]
    first = {one.id: one for one in database.first}  # type: ignore[attr-defined]
    wrong = []
    for one in found:
        cell = (one.payload or {}).get(key, -1)
        before = first[one.id]
        same = np.allclose(_dense(one.vector), _dense(before.vector), atol=1e-6)
        if cell != -1 and not (same and cell == before.payload[key]):
            wrong.append(one.id)
    return wrong


def _dense(vector: Any) -> Any:
    return vector.get("text") if isinstance(vector, dict) else vector


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("reader", ["bare", "routed"])
def test_what_is_read_changed_and_written_is_found(
    database: Database, write: Write, reader: str
) -> None:
    client = database.routed()
    by = database.bare if reader == "bare" else client
    records = done(by.scroll("docs", limit=30, with_payload=True))[0]
    vectors = (keys()[100:130] * 1.5).tolist()  # of other points, in other cells
    done(write(client, records, vectors))
    assert not misplaced(database)
    for one, vector in zip(records, vectors, strict=True):
        found = done(client.query_points("docs", vector, limit=2)).points
        assert one.id in [point.id for point in found]


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(WRITES)), st.integers(0, 200), st.integers(1, 20)),
        min_size=1,
        max_size=4,
    )
)
def test_no_sequence_of_writes_leaves_a_stale_cell(
    database: Database, steps: list[tuple[str, int, int]]
) -> None:
    restored(database)
    client = database.routed()
    held = database.bare.scroll("docs", limit=COUNT)[0]  # read once, and written back late
    for number, (name, start, count) in enumerate(steps):
        some = held[start : start + count]
        vectors = np.roll(keys(), 7 * number + 50, axis=0)[start : start + len(some)].tolist()
        done(WRITES[name](client, some, vectors))
    assert not misplaced(database)


@pytest.mark.parametrize("name", ["set_payload", "overwrite_payload", "operations"])
def test_a_payload_brings_no_cell_to_another_point(database: Database, name: str) -> None:
    client = database.routed()
    read = database.bare.retrieve("docs", [0])[0].payload
    assert read is not None
    if name == "operations":
        records = database.bare.retrieve("docs", [0])
        other = [records[0].model_copy(update={"id": 5})]
        done(operations(op_set, op_overwrite)(client, other, []))
    else:
        done(getattr(client, name)("docs", payload=read, points=[5]))
    assert not misplaced(database)
    assert "row" in read
    assert ours(read)  # the caller's own is left alone


def test_messages_of_grpc_are_written_alike() -> None:
    from amips_plugins.proxies.qdrant_writes import _point

    message = grpc.PointStruct()
    message.id.num = 3
    message.payload["amips_cell_x"].integer_value = 4
    written = _point(message, {"amips_cell_y": -1})
    assert {key: value.integer_value for key, value in written.payload.items()} == {
        "amips_cell_y": -1
    }
    message.payload["row"].integer_value = 5
    assert list(_point(message, {"amips_cell_y": -1}).payload) == ["row"]
    assert len(message.payload) == 2


def test_another_vector_of_a_point_leaves_its_cell(named: Database) -> None:
    client = route(named.watched, named.router())
    key = f"amips_cell_{named.layout}"
    for field, left in (("other", True), ("text", False)):
        client.update_vectors("docs", [models.PointVectors(id=1, vector={field: QUERY})])
        (found,) = named.bare.retrieve("docs", [1])
        assert found.payload is not None
        assert (found.payload[key] >= 0) == left


def test_a_collection_without_cells_is_written_as_it_is(database: Database) -> None:
    size = models.VectorParams(size=len(QUERY), distance=models.Distance.DOT)
    database.bare.create_collection("plain", size)
    try:
        client = database.routed()
        done(client.upload_collection("plain", [QUERY, QUERY], ids=[1, 2], wait=True))
        done(client.upsert("plain", [models.PointStruct(id=3, vector=QUERY, payload={"a": 1})]))
        found = database.bare.scroll("plain")[0]
        assert [one.payload for one in found] == [{}, {}, {"a": 1}]
    finally:
        database.bare.delete_collection("plain")


@pytest.mark.parametrize("bad", [None, 3, "points", [3], [None]], ids=str)
def test_what_cannot_be_written_is_the_clients_to_refuse(database: Database, bad: Any) -> None:
    def error(client: Any) -> Any:
        try:
            return done(client.upsert("docs", bad))
        except Exception as exc:  # noqa: BLE001 - whatever the client raises
            return type(exc), str(exc)

    assert error(database.routed()) == error(database.watched)


@pytest.mark.parametrize(
    "distance",
    [
        models.Distance.COSINE,
        pytest.param(models.Distance.EUCLID, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.slow
def test_pages_fit_together(tmp_path: Path, distance: models.Distance) -> None:
    database = Database(tmp_path, "sync", distance, "")
    client = database.routed()
    group = models.Filter(
        must=[models.FieldCondition(key="group", match=models.MatchValue(value=1))]
    )
    missed = []
    for query, condition in itertools.product((keys()[::16] + 0.1).tolist(), (None, group)):
        asked: dict[str, Any] = {"query_filter": condition, "limit": 10}
        whole = database.bare.query_points("docs", query, query_filter=condition, limit=COUNT)
        pages = []
        for offset in range(0, COUNT + 10, 10):
            pages += client.query_points("docs", query, offset=offset, **asked).points
        found = [point.id for point in pages]
        assert len(set(found)) == len(found)
        assert set(found) == {point.id for point in whole.points}  # to the last one
        best = {point.id for point in whole.points[:30]}
        missed.append(len(best - set(found[:30])) / len(best))
    assert np.mean(missed) <= 0.15  # the plan is that of the first page
