"""What only Qdrant has: vectors by name, mixed ids, folders, cells as payload."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.base import Id, SearchRequest
from amips_plugins.adapters.qdrant import QdrantCollection
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
from amips_plugins.progress import Step
from amips_plugins.vectors import FloatArray, IntArray, Metric

DIM = 4
KEYS = np.random.default_rng(0).standard_normal((40, DIM)).astype(np.float32)
UUIDS = sorted(str(uuid.uuid5(uuid.NAMESPACE_OID, str(row))) for row in range(5))


def dense(distance: models.Distance = models.Distance.DOT, **more: Any) -> models.VectorParams:
    return models.VectorParams(size=DIM, distance=distance, **more)


def fill(client: QdrantClient, name: str = "docs", ids: Sequence[Id] = range(len(KEYS))) -> None:
    client.create_collection(name, vectors_config=dense())
    client.upsert(
        name,
        [
            models.PointStruct(
                id=key, vector=vector.tolist(), payload={"row": row, "group": row % 3}
            )
            for row, (key, vector) in enumerate(zip(ids, KEYS, strict=False))
        ],
    )


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


def by_row(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.array([int(key) % 4 for key in ids], dtype=np.int64)


def ids_found(collection: QdrantCollection, cell: int, layout: str) -> list[Id]:
    plan = QueryPlan(cells=np.array([[cell]]), layout=layout)
    return sorted(hit.id for hit in collection.search(SearchRequest(KEYS[:1], k=100), plan)[0])


# --- opening ---------------------------------------------------------------------------------


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "amips_plugins.adapters.qdrant")
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    monkeypatch.delitem(sys.modules, "qdrant_client.models", raising=False)
    with pytest.raises(MissingExtra, match=r"amips-plugins\[qdrant\]"):
        __import__("amips_plugins.adapters.qdrant")


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
    collection = QdrantCollection(client, "live").lay_out("a1", 4, by_row)
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
        collection.lay_out("a1", 4, by_row)
        assert ids_found(collection, 1, "a1") == [1, 5]


def test_an_empty_collection_has_no_keys(client: QdrantClient) -> None:
    client.create_collection("docs", vectors_config=dense())
    collection = QdrantCollection(client, "docs")
    assert (collection.count(), list(collection.scan(10))) == (0, [])
    assert collection.search(SearchRequest(KEYS[:2], k=3)) == [[], []]
    assert collection.lay_out("a1", 4, by_row).layout() == "a1"


# --- searching -------------------------------------------------------------------------------


def test_every_clause_of_a_filter_keeps_its_meaning(collection: QdrantCollection) -> None:
    def group(value: int) -> models.FieldCondition:
        return models.FieldCondition(key="group", match=models.MatchValue(value=value))

    row = models.FieldCondition(key="row", range=models.Range(lt=20))
    filters = [
        models.Filter(should=[group(0), group(1)]),
        models.Filter(must=[row], must_not=[group(2)]),
        models.Filter(
            min_should=models.MinShould(conditions=[group(0), group(1), row], min_count=2)
        ),
    ]
    collection.lay_out("a1", 4, by_row)
    cells = np.array([[0, 3]])
    plans = [
        QueryPlan(),
        QueryPlan(rewritten=KEYS[5:6], rescore=100),
        QueryPlan(cells=cells, layout="a1"),
        QueryPlan(rewritten=KEYS[5:6], rescore=100, cells=cells, layout="a1"),
    ]
    for number, condition in enumerate(filters):
        passes = [
            (row % 3 in (0, 1), row < 20 and row % 3 != 2, row < 20 and row % 3 != 2)[number]
            for row in range(len(KEYS))
        ]
        for plan in plans:
            request = SearchRequest(KEYS[:1], k=100, filter=condition)
            found = [hit.id for hit in collection.search(request, plan)[0]]
            expected = [
                row
                for row in np.argsort(-(KEYS @ KEYS[0])).tolist()
                if passes[row] and (plan.cells is None or row % 4 in (0, 3))
            ]
            assert found == expected


def test_stored_fields_by_path(client: QdrantClient) -> None:
    client.create_collection("docs", vectors_config=dense())
    payload = {"meta": {"title": "a", "author": "b"}, "text": "c"}
    client.upsert("docs", [models.PointStruct(id=1, vector=KEYS[0].tolist(), payload=payload)])
    collection = QdrantCollection(client, "docs").lay_out("a1", 4, by_row)
    request = SearchRequest(KEYS[:1], k=1, fields=("meta.title", "text", "missing"))
    hit = collection.search(request)[0][0]
    assert dict(hit.fields) == {"meta": {"title": "a"}, "text": "c"}


class Calls:
    """Records what the client is asked, and lets it answer."""

    def __init__(self, client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        for name in ("query_points", "query_batch_points", "get_collection"):
            monkeypatch.setattr(client, name, self._recorded(name, getattr(client, name)))

    def _recorded(self, name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made.append((name, kwargs | ({"queries": args[1]} if len(args) > 1 else {})))
            return method(*args, **kwargs)

        return call


@pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")
def test_what_a_server_is_asked(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.lay_out("a1", 4, by_row)
    collection._local = False  # a server's searches are approximate unless told otherwise
    calls = Calls(client, monkeypatch)
    request = SearchRequest(KEYS[:3], k=5, params={"hnsw_ef": 64, "exact": False}, timeout=0.2)

    collection.search(request)
    (name, asked) = calls.made.pop()
    assert (name, len(asked["queries"]), asked["timeout"]) == ("query_batch_points", 3, 1)
    assert asked["queries"][0].params == models.SearchParams(hnsw_ef=64, exact=False)

    cells = np.array([[2, -1], [0, 1], [3, 3]])
    collection.search(request, QueryPlan(cells=cells, layout="a1"))
    queries = calls.made.pop()[1]["queries"]
    assert all(query.params == models.SearchParams(hnsw_ef=64, exact=True) for query in queries)
    assert [query.filter.should[1].match.any for query in queries] == [[2], [0, 1], [3]]

    collection.search(request, QueryPlan(rewritten=KEYS[5:8], rescore=2))
    query = calls.made.pop()[1]["queries"][0]
    assert query.params == models.SearchParams(exact=True)
    assert query.query.nearest == KEYS[0].tolist()
    assert query.prefetch[0].query.nearest == KEYS[5].tolist()
    assert query.prefetch[0].limit == 5
    assert query.prefetch[0].params == models.SearchParams(hnsw_ef=64, exact=False)

    collection.search(SearchRequest(KEYS[:1], k=5, timeout=1.5))
    (name, asked) = calls.made.pop()
    assert (name, asked["timeout"], asked["search_params"]) == ("query_points", 2, None)
    assert calls.made == []  # nothing but the searches: the layout is known from before


def test_one_query_is_answered_as_in_a_batch(collection: QdrantCollection) -> None:
    collection.lay_out("a1", 4, by_row)
    cells = np.array([[0, 1], [2, -1], [1, 3]])
    for plan in (
        QueryPlan(),
        QueryPlan(rewritten=KEYS[5:8], rescore=7),
        QueryPlan(cells=cells, layout="a1"),
    ):
        request = SearchRequest(KEYS[:3], k=4, fields=("row",))
        together = collection.search(request, plan)
        for row in range(3):
            one = slice(row, row + 1)
            alone = QueryPlan(
                rewritten=None if plan.rewritten is None else plan.rewritten[one],
                rescore=plan.rescore,
                cells=None if plan.cells is None else plan.cells[one],
                layout=plan.layout,
            )
            request = SearchRequest(KEYS[one], k=4, fields=("row",))
            assert collection.search(request, alone) == [together[row]]


def test_unusable_filters_and_parameters_are_refused(collection: QdrantCollection) -> None:
    with pytest.raises(InvalidInput, match=r"models\.Filter, but got str"):
        collection.search(SearchRequest(KEYS[:1], k=1, filter="group == 1"))
    with pytest.raises(InvalidInput, match="'nprobe' is not a search parameter"):
        collection.search(SearchRequest(KEYS[:1], k=1, params={"nprobe": 16}))


# --- cells -----------------------------------------------------------------------------------


def test_the_layout_is_stored_with_the_collection(folder: Path) -> None:
    client = QdrantClient(path=str(folder))
    client.update_collection("docs", metadata={"owner": "search team"})
    client.close()
    collection = QdrantCollection.connect(str(folder), "docs")
    collection.lay_out("a1", 4, by_row)
    collection.close()

    collection = QdrantCollection.connect(str(folder), "docs")
    assert collection.layout() == "a1"
    assert ids_found(collection, 3, "a1") == list(range(3, 40, 4))
    collection.close()
    client = QdrantClient(path=str(folder))
    assert client.get_collection("docs").config.metadata == {
        "owner": "search team",
        "amips_layout": "a1",
    }
    assert client.retrieve("docs", [6])[0].payload == {"row": 6, "group": 0, "amips_cell_a1": 2}
    client.close()


def test_an_interrupted_layout_is_none_and_can_be_run_again(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant._READ_BATCH", 7)
    monkeypatch.setattr("amips_plugins.adapters.qdrant._WRITE_BATCH", 10)
    killed = iter([False, False, False, True])

    def interrupted(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        if next(killed):
            raise KeyboardInterrupt
        return by_row(ids, vectors)

    with pytest.raises(KeyboardInterrupt):
        collection.lay_out("a1", 4, interrupted)
    assert collection.layout() is None
    assert QdrantCollection(client, "docs").layout() is None
    with pytest.raises(InvalidInput, match="layout"):
        ids_found(collection, 0, "a1")

    assert collection.lay_out("a1", 4, by_row).layout() == "a1"
    for cell in range(4):
        assert ids_found(collection, cell, "a1") == list(range(cell, 40, 4))
    assert collection.lay_out("a1", 4, by_row).layout() == "a1"


def test_two_layouts_live_side_by_side(client: QdrantClient, collection: QdrantCollection) -> None:
    other = QdrantCollection(client, "docs")
    collection.lay_out("a1", 4, by_row)
    assert ids_found(other, 0, "a1") == list(range(0, 40, 4))

    def halves(ids: Sequence[Id], _: FloatArray) -> IntArray:
        assert QdrantCollection(client, "docs").layout() == "a1"  # in force until the end
        return np.array([int(key) // 20 for key in ids])

    collection.lay_out("b2", 2, halves)
    assert collection.layout() == "b2"
    assert ids_found(collection, 1, "b2") == list(range(20, 40))
    # A reader that planned with the old layout still finds exactly its cells.
    assert ids_found(other, 0, "a1") == list(range(0, 40, 4))


def test_each_vector_has_its_own_layout(client: QdrantClient) -> None:
    client.create_collection("docs", vectors_config={"title": dense(), "body": dense()})
    vector = {"title": KEYS[0].tolist(), "body": KEYS[1].tolist()}
    client.upsert("docs", [models.PointStruct(id=1, vector=vector)])
    QdrantCollection(client, "docs", "title").lay_out("a1", 4, by_row)
    assert QdrantCollection(client, "docs", "title").layout() == "a1"
    assert QdrantCollection(client, "docs", "body").layout() is None


def test_an_overwritten_point_becomes_overflow(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    collection.lay_out("a1", 4, by_row)
    client.upsert("docs", [models.PointStruct(id=3, vector=KEYS[3].tolist(), payload={})])
    client.upsert("docs", [models.PointStruct(id=99, vector=KEYS[9].tolist(), payload=None)])
    for cell in range(4):
        assert {3, 99} <= set(ids_found(collection, cell, "a1"))
    empty = QueryPlan(cells=np.array([[-1, -1]]), layout="a1")
    hits = collection.search(SearchRequest(KEYS[:1], k=100), empty)[0]
    assert sorted(hit.id for hit in hits) == [3, 99]


@pytest.mark.parametrize(
    "cells", [[0.0] * 40, [0] * 39, [4] * 40, [-1] * 40], ids=["float", "short", "large", "none"]
)
def test_cells_that_cannot_be_are_refused(
    client: QdrantClient, collection: QdrantCollection, cells: list[int]
) -> None:
    with pytest.raises(InvalidInput, match="integers from 0 to 3"):
        collection.lay_out("a1", 4, lambda *_: np.array(cells))
    assert collection.layout() is None
    assert all("amips_cell_a1" not in (r.payload or {}) for r in client.scroll("docs")[0])


@pytest.mark.parametrize("layout", ["", "A1", "a.b", "a" * 17, "a1\n"])
def test_a_layout_needs_a_plain_identifier(collection: QdrantCollection, layout: str) -> None:
    with pytest.raises(InvalidInput, match="identify a layout"):
        collection.lay_out(layout, 4, by_row)


def test_foreign_content_under_the_key_is_refused(
    client: QdrantClient, collection: QdrantCollection
) -> None:
    def meddling(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        point = models.PointStruct(id=99, vector=KEYS[0].tolist(), payload={"amips_cell_a1": "x"})
        client.upsert("docs", [point])
        return by_row(ids, vectors)

    with pytest.raises(CollectionError, match="something else than a cell"):
        collection.lay_out("a1", 4, meddling)
    assert collection.layout() is None


def test_lost_cells_are_noticed(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_update = client.batch_update_points
    monkeypatch.setattr(
        client,
        "batch_update_points",
        lambda name, writes, **more: batch_update(name, writes[:-1], **more),
    )
    with pytest.raises(CollectionError, match="Only 30 of the 40 cells"):
        collection.lay_out("a1", 4, by_row)
    assert collection.layout() is None


def test_a_server_without_metadata_is_refused_before_anything_changes(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "update_collection", lambda *_, **__: True)
    with pytest.raises(CollectionError, match=r"1\.16 or newer"):
        collection.lay_out("a1", 4, by_row)
    assert all("amips_cell_a1" not in (r.payload or {}) for r in client.scroll("docs")[0])


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_a_point_deleted_meanwhile_does_not_stop_a_servers_layout(
    client: QdrantClient, collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection._local = False
    monkeypatch.setattr("amips_plugins.adapters.qdrant._MISSED", 0.1)

    def deleting(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        client.delete("docs", models.PointIdsList(points=[7]))
        return by_row(ids, vectors)

    collection.lay_out("a1", 4, deleting)
    assert ids_found(collection, 3, "a1") == [key for key in range(3, 40, 4) if key != 7]
    assert collection.count() == len(KEYS) - 1


def test_laying_out_reports_its_progress(collection: QdrantCollection) -> None:
    seen: list[Any] = []

    class Watch:
        def advance(self, amount: int = 1, note: str = "") -> None:
            seen.append(amount)

    @contextmanager
    def progress(title: str, total: int, done: int = 0, unit: str = "") -> Iterator[Step]:
        seen.append((title, total, done, unit))
        yield Watch()

    collection.lay_out("a1", 4, by_row, progress)
    assert seen == [("cells", 40, 0, "keys"), 40]
