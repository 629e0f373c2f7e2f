"""What others do to the vectors of a collection in cells, on a Qdrant server.

A vector may change while its payload, and with it the cell of the vector before, stays. Such a key
is nowhere where its vector is looked for, so that it must be found out, said and mended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from amips_plugins import LearnedRouter, Registry, route
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import FieldNotFound, InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray
from integration_tests.qdrant_data import (
    DIM,
    KEY,
    LAYOUT,
    N_CELLS,
    TRANSPORTS,
    Background,
    EveryCell,
    amips,
    by_sign,
    check,
    contents,
    create,
    error_of,
    fill,
    keys,
    queries,
    spec,
    until,
    wait_until_indexed,
    wrong_cells,
)
from integration_tests.servers import QdrantAddress
from tests.handmade import publish

COUNT = 1500
CELLS = 16
TARGET = 0.9


@pytest.fixture(params=TRANSPORTS)
def client(request: pytest.FixtureRequest, qdrant: QdrantAddress) -> Iterator[QdrantClient]:
    client = qdrant.client(prefer_grpc=request.param == "grpc")
    yield client
    client.close()


@pytest.fixture
def name(client: QdrantClient) -> Iterator[str]:
    name = create(client, distance=models.Distance.COSINE)
    fill(client, name, keys(COUNT))
    yield name
    client.delete_collection(name)


def new_vectors() -> FloatArray:
    """Of the same texts by another model, as it were: elsewhere in the same space."""
    moved: FloatArray = keys(COUNT)[np.random.default_rng(5).permutation(COUNT)]
    return moved


def uploaded(client: Any, name: str) -> None:
    client.upload_collection(name, new_vectors(), ids=range(COUNT), wait=True)


def upserted_with_an_empty_payload(client: Any, name: str) -> None:
    points = [
        models.PointStruct(id=row, vector=vector.tolist(), payload={})
        for row, vector in enumerate(new_vectors())
    ]
    client.upsert(name, points, wait=True)


def updated(client: Any, name: str) -> None:
    points = [
        models.PointVectors(id=row, vector=vector.tolist())
        for row, vector in enumerate(new_vectors())
    ]
    client.update_vectors(name, points, wait=True)


def updated_in_a_batch(client: Any, name: str) -> None:
    points = [
        models.PointVectors(id=row, vector=vector.tolist())
        for row, vector in enumerate(new_vectors())
    ]
    changed = models.UpdateVectorsOperation(update_vectors=models.UpdateVectors(points=points))
    client.batch_update_points(name, [changed], wait=True)


def read_changed_and_written(client: Any, name: str) -> None:
    records, _ = client.scroll(name, limit=COUNT, with_payload=True)
    vectors = new_vectors()
    points = [
        models.PointStruct(id=one.id, vector=vectors[int(one.id)].tolist(), payload=one.payload)
        for one in records
    ]
    client.upsert(name, points, wait=True)


WAYS: dict[str, Callable[[Any, str], None]] = {
    "upload without payload": uploaded,
    "upsert with an empty payload": upserted_with_an_empty_payload,
    "update_vectors": updated,
    "update_vectors in a batch": updated_in_a_batch,
    "read, change, write": read_changed_and_written,
}


def unit(vectors: FloatArray) -> dict[Any, FloatArray]:
    """As a collection that compares by cosine stores them, by the row."""
    return dict(enumerate(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)))


def recall(router: LearnedRouter, vectors: FloatArray) -> float:
    asked = queries(100, seed=7)
    stored = np.stack(list(unit(vectors).values()))
    best = np.argsort(-(asked @ stored.T), axis=1)[:, :10]
    found = router.search(asked, k=10)
    return float(
        np.mean(
            [
                len({hit.id for hit in hits} & set(row.tolist())) / 10
                for hits, row in zip(found, best, strict=True)
            ]
        )
    )


@pytest.mark.parametrize("way", WAYS)
def test_every_vector_is_replaced_and_the_payload_stays(
    client: QdrantClient, name: str, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out at a refresh: routed searches find what they promise, or native ones answer."""
    publish(QdrantCollection(client, name), queries(600), tmp_path, n_cells=CELLS, recall=TARGET)
    wait_until_indexed(client, name, COUNT // 2)
    registry = Registry(tmp_path / "registry")
    router = LearnedRouter(QdrantCollection(client, name), registry=registry, refresh=None)
    assert recall(router, keys(COUNT)) > TARGET - 0.05
    WAYS[way](client, name)
    with caplog.at_level(logging.WARNING, "amips_plugins"):
        router.refresh()
    assert recall(router, new_vectors()) > TARGET - 0.05
    if router.search(queries(1)[0]).trace.mode == "native":
        assert "amips backfill --verify" in caplog.text
    again = LearnedRouter(QdrantCollection(client, name), registry=registry, refresh=None)
    assert recall(again, new_vectors()) > TARGET - 0.05


def test_the_command_line_says_how_many_cells_are_wrong_and_mends_them(
    qdrant: QdrantAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if qdrant.token:
        monkeypatch.setenv("AMIPS_QDRANT_API_KEY", qdrant.token)
    client = qdrant.client()
    name = create(client, distance=models.Distance.COSINE)
    fill(client, name, keys(COUNT))
    publish(QdrantCollection(client, name), queries(600), tmp_path, n_cells=CELLS)
    wait_until_indexed(client, name, COUNT // 2)
    here = (qdrant.uri(name), "--registry", tmp_path / "registry")
    assert amips("status", *here)[0] == 0
    updated(client, name)
    code, said = amips("status", *here)
    assert code != 0
    assert "of the keys are in a wrong cell" in said
    assert amips("backfill", *here, "--verify")[0] == 0
    assert amips("status", *here)[0] == 0
    client.delete_collection(name)
    client.close()


@pytest.mark.parametrize("way", WAYS)
def test_verifying_mends_every_cell(client: QdrantClient, name: str, way: str) -> None:
    built = QdrantCollection(client, name).layouts.build(spec())
    wait_until_indexed(client, name, COUNT // 2)
    WAYS[way](client, name)
    built.layouts.backfill(by_sign, verify=True)
    check(client, name, unit(new_vectors()))
    assert built.layouts.audit(500, by_sign).stale == 0


def test_what_a_backfill_samples_as_wrong_is_overflow(client: QdrantClient, name: str) -> None:
    """Which takes a sample of up to a thousand, all that there are here."""
    built = QdrantCollection(client, name).layouts.build(spec())
    gone = models.FilterSelector(
        filter=models.Filter(
            must=[models.HasIdCondition(has_id=list(range(800, COUNT)))]  # the sample has all
        )
    )
    client.delete(name, gone, wait=True)
    wait_until_indexed(client, name, 400)
    vectors = keys(800)
    vectors[:100, :2] *= -1
    points = [models.PointVectors(id=row, vector=vectors[row].tolist()) for row in range(100)]
    client.update_vectors(name, points, wait=True)
    assert built.layouts.audit(800, by_sign).stale > 50
    built.layouts.backfill(by_sign)
    check(client, name, unit(vectors), overflow=100)  # every search looks at them
    built.layouts.backfill(by_sign)
    check(client, name, unit(vectors))


@pytest.mark.parametrize("way", ["collection", "router", "after a rollback"])
def test_our_own_upsert_never_relies_on_the_payload_going(
    client: QdrantClient, name: str, way: str
) -> None:
    """A point written without fields has none, and no cell but its own or none."""
    built = QdrantCollection(client, name).layouts.build(spec())
    wait_until_indexed(client, name, COUNT // 2)
    ids, vectors = (
        list(range(100)),
        keys(COUNT)[:100] * np.array([-1] * 2 + [1] * (DIM - 2), np.float32),
    )
    if way == "router":
        LearnedRouter(built, refresh=None).upsert(ids, vectors)
    elif way == "collection":
        built.upsert(ids, vectors)
    else:
        built.layouts.roll_back().upsert(ids, vectors)
        built = QdrantCollection(client, name).layouts.build(spec())
    points = contents(client, name)
    assert wrong_cells(points) == []
    assert not any("row" in (points[one].payload or {}) for one in ids)
    built.layouts.backfill(by_sign)
    expected = keys(COUNT)
    expected[:100] = vectors
    check(client, name, unit(expected))


def test_vectors_changed_in_place_while_a_layout_is_built(
    qdrant: QdrantAddress, client: QdrantClient, name: str
) -> None:
    expected = dict(unit(keys(COUNT)))
    rng, own = np.random.default_rng(3), qdrant.client()

    def change() -> None:
        ids = [int(one) for one in rng.choice(COUNT, 20, replace=False)]
        vectors = rng.standard_normal((len(ids), DIM)).astype(np.float32)
        points = [
            models.PointVectors(id=one, vector=vector.tolist())
            for one, vector in zip(ids, vectors, strict=True)
        ]
        own.update_vectors(name, points, wait=True)
        expected.update(zip(ids, unit(vectors).values(), strict=True))

    with Background(change) as changing:
        until(lambda: changing.times > 3)
        built = QdrantCollection(client, name).layouts.build(spec())
        until(lambda: changing.times > 10)
    assert changing.wrong == []
    built.layouts.backfill(by_sign, verify=True)
    check(client, name, expected)


def test_what_a_proxy_hands_out_brings_no_cell_back(
    client: QdrantClient, name: str, tmp_path: Path
) -> None:
    publish(QdrantCollection(client, name), queries(600), tmp_path, n_cells=CELLS, recall=TARGET)
    wait_until_indexed(client, name, COUNT // 2)
    router = LearnedRouter(
        QdrantCollection(client, name), registry=tmp_path / "registry", refresh=None
    )
    routed = route(client, router)
    (record,) = routed.retrieve(name, [1], with_payload=True)
    assert record.payload == {"row": 1}
    read_changed_and_written(routed, name)
    assert not any(
        key.startswith("amips_")
        for point in contents(client, name).values()
        for key in point.payload or {}
    )
    assert recall(router, new_vectors()) > TARGET - 0.05


def test_what_is_no_cell_is_overflow(client: QdrantClient, name: str) -> None:
    """Whatever others write under the cell's key: every plan finds it, a backfill mends it.

    What is no whole number it finds from the next look at the collection on.
    """
    QdrantCollection(client, name).layouts.build(spec())
    built = QdrantCollection(client, name)
    listed: list[Any] = [N_CELLS, 10**6, -7, None, [], [N_CELLS, -1]]
    strange: list[Any] = ["x", 1.5, ["x"], {"a": 1}, True]

    def missed(first: int, values: list[Any]) -> list[Any]:
        found = []
        for one, value in enumerate(values, first):
            vector = keys(COUNT)[one : one + 1]
            other = int((by_sign([one], vector)[0] + 1) % N_CELLS)
            plan = QueryPlan(cells=np.array([[other]]), layout=LAYOUT)
            (hits,) = built.search(SearchRequest(vector, k=1), plan)
            found += [] if hits[0].id == one else [value]
        return found

    assert not built._found.strays
    for one, value in enumerate(listed):
        client.set_payload(name, {KEY: value}, [one], wait=True)
    assert missed(0, listed) == []
    wait_until_indexed(client, name, COUNT // 2)
    assert missed(0, listed) == []
    assert not built.current()._found.strays
    for one, value in enumerate(strange, len(listed)):
        client.set_payload(name, {KEY: value}, [one], wait=True)
    client.set_payload(name, {KEY: [0, 1]}, [100], wait=True)  # in both, until it is mended
    built = built.current()
    assert built._found.strays
    assert missed(0, listed + strange) == []
    wait_until_indexed(client, name, COUNT // 2)
    assert missed(0, listed + strange) == []
    built.layouts.backfill(by_sign, verify=True)
    assert not built.current()._found.strays
    check(client, name, unit(keys(COUNT)))


class TestANamedVectorIsAdded:
    """``create_vector_name``, of Qdrant 1.18 or later, on a live collection."""

    @pytest.fixture(params=["", "text"])
    def field(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def grown(self, client: QdrantClient, field: str) -> Iterator[str]:
        name = create(client, field=field)
        fill(client, name, keys(600), field)
        yield name
        client.delete_collection(name)

    def add(self, client: QdrantClient, name: str) -> None:
        config = models.DenseVectorConfig(size=4, distance=models.Distance.COSINE)
        try:
            client.create_vector_name(name, "extra", models.DenseVectorNameConfig(dense=config))
        except UnexpectedResponse as exc:
            pytest.skip(f"this Qdrant adds no vector to a collection: {exc.status_code}")
        points = [models.PointVectors(id=row, vector={"extra": [1.0, 2, 3, 4]}) for row in range(9)]
        client.update_vectors(name, points, wait=True)

    def test_open_objects_go_on_and_no_write_loses_the_new_vector(
        self, client: QdrantClient, field: str, grown: str
    ) -> None:
        built = QdrantCollection(client, grown).layouts.build(spec())
        opened = QdrantCollection(client, grown)
        assert opened.layout() == LAYOUT
        router = LearnedRouter(QdrantCollection(client, grown), hook=EveryCell(), refresh=None)
        self.add(client, grown)
        for write in (
            lambda: router.upsert([1], keys(2)[1:]),
            lambda: opened.upsert([2], keys(3)[2:], cells=by_sign([2], keys(3)[2:])),
        ):
            found = error_of(write)  # a refusal that says what would be lost is as good
            assert found is None or isinstance(found, InvalidInput), repr(found)
        assert built.layouts.status().layout == LAYOUT
        router.refresh()
        assert router.search(queries(1)[0]).trace.mode == "route"
        assert router.collection.current().layouts.status().layout == LAYOUT
        points = client.retrieve(grown, range(9), with_vectors=True)
        assert all("extra" in (one.vector or {}) for one in points)

    def test_a_new_object_takes_the_unnamed_vector(
        self, client: QdrantClient, field: str, grown: str
    ) -> None:
        QdrantCollection(client, grown).layouts.build(spec())
        self.add(client, grown)
        if field:
            with pytest.raises(FieldNotFound, match="'extra', 'text'"):
                _ = QdrantCollection(client, grown).info
            found = QdrantCollection(client, grown, field)
        else:
            found = QdrantCollection(client, grown)
        assert (found.info.field, found.layout()) == (field, LAYOUT)
        assert found.layouts.status().layout == LAYOUT
