"""What only Qdrant has: vectors by name, mixed ids, folders, points as a whole."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    MissingExtra,
)
from amips_plugins.sketch import sketch
from amips_plugins.vectors import Metric
from tests.support.qdrant_data import KEYS, cells_of, dense, fill, ids_found, lay_out

UUIDS = sorted(str(uuid.uuid5(uuid.NAMESPACE_OID, str(row))) for row in range(5))


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    yield opened
    opened.close()


@pytest.fixture
def collection(client: QdrantClient) -> QdrantCollection:
    fill(client)
    return QdrantCollection(client, "docs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "database"
    opened = QdrantClient(path=str(path))
    fill(opened)
    opened.close()
    return path


# --- opening ---------------------------------------------------------------------------------


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "amips_plugins.adapters.qdrant.collection")
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    monkeypatch.delitem(sys.modules, "qdrant_client.models", raising=False)
    with pytest.raises(MissingExtra, match=r"amips-plugins\[qdrant\]"):
        __import__("amips_plugins.adapters.qdrant.collection")


def test_constructing_asks_nothing_and_an_absent_server_is_named_quickly() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    client = QdrantClient(url=f"http://127.0.0.1:{port}", check_compatibility=False)
    collection = QdrantCollection(client, "docs")
    with pytest.raises(DatabaseUnreachable, match="does not answer"):
        _ = collection.info
    client.close()
    began = time.monotonic()
    with pytest.raises(DatabaseUnreachable, match=f"at http://127.0.0.1:{port} does not answer"):
        QdrantCollection.connect(f"http://user:secret@127.0.0.1:{port}", "docs")
    assert time.monotonic() - began < 20, "an absent server is noticed, not waited for"


def test_an_absent_server_is_named_over_grpc() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    client = QdrantClient(
        host="127.0.0.1", grpc_port=port, prefer_grpc=True, check_compatibility=False
    )
    with pytest.raises(DatabaseUnreachable, match="does not answer"):
        _ = QdrantCollection(client, "docs").info
    client.close()


@contextmanager
def http_server(status: int, body: bytes) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_refused_key_says_so_without_showing_it() -> None:
    with (
        http_server(403, b"forbidden") as address,
        pytest.warns(UserWarning, match="insecure connection"),
        pytest.raises(DatabaseUnreachable, match="API key") as caught,
    ):
        QdrantCollection.connect(address, "docs", None, "hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("status", "body"), [(404, b"no such page"), (200, b"<html>")])
def test_another_kind_of_server_is_no_qdrant(status: int, body: bytes) -> None:
    with (
        http_server(status, body) as address,
        pytest.raises(DatabaseUnreachable, match="the address is Qdrant's"),
    ):
        QdrantCollection.connect(address, "docs")


def test_a_folder_without_a_database_stays_as_it_is(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CollectionNotFound, match="no Qdrant database"):
            QdrantCollection.connect(str(folder), "docs")
    assert list(tmp_path.iterdir()) == []


def test_connect_closes_what_it_opened(folder: Path) -> None:
    for _ in range(2):  # the second needs the lock of the first
        collection = QdrantCollection.connect(str(folder), "docs")
        assert collection.count() == len(KEYS)
        collection.close()
        collection.close()
    with pytest.raises(CollectionNotFound, match="it has 'docs'"):
        QdrantCollection.connect(str(folder), "dogs")
    with pytest.raises(FieldNotFound):
        QdrantCollection.connect(str(folder), "docs", "title")
    QdrantCollection.connect(str(folder), "docs").close()


# The client forgets the lock file it could not lock.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_folder_in_use_says_so(folder: Path) -> None:
    hold = (
        "import sys; from qdrant_client import QdrantClient; "
        "client = QdrantClient(path=sys.argv[1]); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(  # noqa: S603 - the interpreter that runs this test
        [sys.executable, "-c", hold, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(DatabaseUnreachable, match="open elsewhere"):
            QdrantCollection.connect(str(folder), "docs")
        holder.communicate()
    QdrantCollection.connect(str(folder), "docs").close()


def test_close_leaves_a_client_that_was_given(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    collection.close()
    assert client.count("docs").count == len(KEYS)


# --- info ------------------------------------------------------------------------------------


def test_an_unknown_collection_lists_those_there_are(client: QdrantClient) -> None:
    with pytest.raises(CollectionNotFound, match="it has none"):
        _ = QdrantCollection(client, "docs").info
    fill(client, "docs")
    fill(client, "blog")
    for name in ("dogs", ""):
        with pytest.raises(CollectionNotFound, match="it has 'blog', 'docs'"):
            _ = QdrantCollection(client, name).info


def test_an_alias_is_a_name(client: QdrantClient) -> None:
    fill(client)
    alias = models.CreateAlias(collection_name="docs", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    collection = lay_out(QdrantCollection(client, "live"))
    assert (collection.info.name, collection.count()) == ("live", len(KEYS))
    assert QdrantCollection(client, "docs").layout() == "a1"


def test_the_vector_is_chosen_by_name(client: QdrantClient) -> None:
    multi = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    client.create_collection(
        "docs",
        vectors_config={
            "title": dense(),
            "body": models.VectorParams(size=7, distance=models.Distance.EUCLID),
            "tokens": dense(multivector_config=multi),
            "bytes": dense(datatype=models.Datatype.UINT8),
            "half": dense(datatype=models.Datatype.FLOAT16),
            "city": dense(models.Distance.MANHATTAN),
        },
        sparse_vectors_config={"words": models.SparseVectorParams()},
    )
    info = QdrantCollection(client, "docs", "body").info
    assert (info.field, info.dim, info.metric, info.database) == ("body", 7, Metric.L2, "qdrant")
    assert QdrantCollection(client, "docs", "half").info.metric is Metric.IP
    dense_ones = "'body', 'bytes', 'city', 'half', 'title'"
    for field in (None, "", "words", "summary"):
        with pytest.raises(FieldNotFound, match=f"its dense vectors are {dense_ones}"):
            _ = QdrantCollection(client, "docs", field).info
    with pytest.raises(CollectionError, match="multivector"):
        _ = QdrantCollection(client, "docs", "tokens").info
    with pytest.raises(CollectionError, match="uint8"):
        _ = QdrantCollection(client, "docs", "bytes").info
    with pytest.raises(MetricNotSupported, match="Manhattan"):
        _ = QdrantCollection(client, "docs", "city").info


def test_sparse_vectors_and_multivectors_are_no_candidates(client: QdrantClient) -> None:
    multi = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    words = {"words": models.SparseVectorParams()}
    client.create_collection("sparse", vectors_config={}, sparse_vectors_config=words)
    with pytest.raises(FieldNotFound, match="are none"):
        _ = QdrantCollection(client, "sparse").info
    client.create_collection(
        "both",
        vectors_config={"text": dense(), "tokens": dense(multivector_config=multi)},
        sparse_vectors_config=words,
    )
    assert QdrantCollection(client, "both").info.field == "text"


# --- reading ---------------------------------------------------------------------------------


def test_ids_of_both_kinds_keep_their_order_and_form(client: QdrantClient) -> None:
    ids: list[Id] = [7, UUIDS[3], 2**64 - 1, UUIDS[0], 0, UUIDS[1]]
    order: list[Id] = [0, 7, 2**64 - 1, UUIDS[0], UUIDS[1], UUIDS[3]]
    fill(client, ids=ids)
    collection = QdrantCollection(client, "docs")
    for size in (1, 2, 100):
        assert [key for batch in collection.scan(size) for key in batch.ids] == order
        for place, after in enumerate(order):
            rest = [key for batch in collection.scan(size, after) for key in batch.ids]
            assert rest == order[place + 1 :]
    hits = collection.search(SearchRequest(KEYS[:6], k=6))[0]
    assert {hit.id for hit in hits} == set(order)
    assert all(type(hit.id) in (int, str) for hit in hits)


def test_a_cursor_survives_its_point(client: QdrantClient, collection: QdrantCollection) -> None:
    client.delete("docs", models.PointIdsList(points=[10]))
    assert next(iter(collection.scan(3, after=10))).ids == [11, 12, 13]
    assert next(iter(collection.scan(3, after=9))).ids == [11, 12]


def test_points_without_the_vector_are_no_keys(client: QdrantClient) -> None:
    for name, vector in (("named", "text"), ("unnamed", "")):
        client.create_collection(
            name,
            vectors_config={vector: dense()} if vector else dense(),
            sparse_vectors_config={"words": models.SparseVectorParams()},
        )
        words = models.SparseVector(indices=[1], values=[1.0])
        for key in range(6):
            held: dict[str, Any] = {"words": words}
            if key % 2:
                held[vector] = KEYS[key].tolist()
            client.upsert(name, [models.PointStruct(id=key, vector=held)])
        collection = QdrantCollection(client, name, vector)
        assert collection.count() == 3
        batches = list(collection.scan(2))
        assert [key for batch in batches for key in batch.ids] == [1, 3, 5]
        np.testing.assert_allclose(
            np.concatenate([batch.vectors for batch in batches]), KEYS[[1, 3, 5]], atol=1e-6
        )
        assert ids_found(lay_out(collection), 1) == [1, 5]


def test_an_empty_collection_has_no_keys(client: QdrantClient) -> None:
    client.create_collection("docs", vectors_config=dense())
    collection = QdrantCollection(client, "docs")
    assert (collection.count(), list(collection.scan(10))) == (0, [])
    assert collection.search(SearchRequest(KEYS[:2], k=3)) == [[], []]
    assert lay_out(collection).layout() == "a1"


# --- writing ---------------------------------------------------------------------------------


def test_a_point_is_replaced_as_a_whole(client: QdrantClient, collection: QdrantCollection) -> None:
    built = lay_out(collection)
    stale = {"text": "new", "amips_cell_a1": 2, "amips_cell_zz": 9}  # as read with its payload
    built.upsert([3], KEYS[:1], [stale], cells=np.array([1]))
    built.upsert([4, UUIDS[0].upper()], KEYS[1:3], cells=np.array([-1, 0]))
    beside = sketch(KEYS[:3], built.info.metric).tolist()
    payloads = {r.id: r.payload for r in client.retrieve("docs", [3, 4, UUIDS[0]])}
    assert payloads == {
        3: {"text": "new", "amips_cell_a1": 1, "amips_sketch_a1": beside[0]},
        4: {"amips_cell_a1": -1},
        UUIDS[0]: {"amips_cell_a1": 0, "amips_sketch_a1": beside[2]},
    }
    built.delete([3, UUIDS[0], UUIDS[1], 4711])
    built.delete([])
    built.upsert([], KEYS[:0])
    assert (built.count(), built.overflow()) == (39, 1)


def test_numpy_ids_are_numbers(collection: QdrantCollection) -> None:
    ids: Any = np.arange(100, 103)
    collection.upsert(ids, KEYS[:3])
    assert collection.count() == 43
    collection.delete(ids)
    assert collection.count() == 40


def test_a_large_batch_is_several_calls(
    collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.written_points._UPSERT_BATCH", 7)
    keys = KEYS[::-1].copy()
    collection.upsert(list(range(40)), keys)
    read = next(iter(collection.scan(100)))
    np.testing.assert_allclose(read.vectors, keys, atol=1e-6)


def test_what_cannot_be_written_is_refused(collection: QdrantCollection) -> None:
    built = lay_out(collection)
    for cell in (4, -2):
        with pytest.raises(InvalidInput, match="0 to 3"):
            built.upsert([1], KEYS[:1], cells=np.array([cell]))
    for key in ("doc-1", -1, 2**64, True, 1.5):
        bad: Any = [key]
        with pytest.raises(InvalidInput, match="cannot be an id"):
            built.upsert(bad, KEYS[:1])
        with pytest.raises(InvalidInput, match="cannot be an id"):
            built.delete(bad)
    assert cells_of(built._client)[1] == 1


def test_other_vectors_of_a_point_are_never_lost(client: QdrantClient) -> None:
    words = {"words": models.SparseVectorParams()}
    client.create_collection("docs", vectors_config=dense(), sparse_vectors_config=words)
    with pytest.raises(InvalidInput, match="'', 'words', and writing one would lose the others"):
        QdrantCollection(client, "docs").upsert([1], KEYS[:1])


def test_a_moved_alias_is_found_by_looking_again(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    lay_out(collection)
    wide = models.VectorParams(size=7, distance=models.Distance.DOT)
    client.create_collection("wide", vectors_config=wide)

    def point_at(name: str) -> None:
        alias = models.CreateAlias(collection_name=name, alias_name="live")
        client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])

    point_at("docs")
    live = QdrantCollection(client, "live")
    assert (live.layout(), live.info.dim) == ("a1", 4)
    point_at("wide")
    assert (live.current().layout(), live.current().info.dim) == (None, 7)
