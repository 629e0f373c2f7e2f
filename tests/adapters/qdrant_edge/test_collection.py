"""What only Qdrant Edge has: a folder of one process, a log, segments to rebuild."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge

from amips_plugins import LearnedRouter, QdrantEdgeCollection, connect
from amips_plugins.adapters.qdrant.cells import LayoutRecord, cell_key
from amips_plugins.adapters.qdrant_edge.filters import Outside, without_cell
from amips_plugins.adapters.qdrant_edge.search import EdgeSearch
from amips_plugins.adapters.qdrant_edge.shard import OpenShard
from amips_plugins.adapters.qdrant_edge.store import EdgeStore
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
)
from amips_plugins.models.hooks import NativeHook
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray

DIM, N_CELLS = 8, 4
SPEC = LayoutSpec("abc", N_CELLS, lambda ids, _: np.array(ids) % N_CELLS, version="v1")
Update = edge.UpdateOperation


def vectors(count: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def params(**changes: Any) -> edge.EdgeVectorParams:
    return edge.EdgeVectorParams(**{"size": DIM, "distance": edge.Distance.Dot, **changes})


def create(folder: Path, count: int = 0, **config: Any) -> None:
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(**{"vectors": params(), **config}))
    points = [edge.Point(row, key) for row, key in enumerate(vectors(count).tolist())]
    shard.update(Update.upsert_points(points))
    shard.close()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[QdrantEdgeCollection]:
    create(tmp_path / "docs", 40)
    collection = QdrantEdgeCollection.connect(str(tmp_path), "docs")
    yield collection
    collection.close()


def found(collection: Collection, cell: int, k: int = 50_000) -> list[int]:
    plan = QueryPlan(cells=np.array([[cell]]), layout="abc")
    (hits,) = collection.search(SearchRequest(vectors(1, 1), k=k), plan)
    return sorted(int(hit.id) for hit in hits)


# --- opening ---------------------------------------------------------------------------------


def test_what_was_written_is_there_after_opening_again(tmp_path: Path) -> None:
    create(tmp_path / "docs", 40)
    uri = f"qdrant-edge://{tmp_path}?collection=docs"
    collection = connect(uri)
    assert isinstance(collection, QdrantEdgeCollection)
    info = collection.info
    assert (info.database, info.name, info.field, info.dim) == ("qdrant-edge", "docs", "", DIM)
    built = collection.layouts.build(SPEC)
    built.upsert([1000], vectors(1, 3), [{"title": "new"}], np.array([2]))
    built.upsert([1001], vectors(1, 4))
    built.delete([0])
    built.close()
    again = connect(uri)
    assert isinstance(again, QdrantEdgeCollection)
    assert (again.layout(), again.count(), again.overflow()) == ("abc", 41, 1)
    assert again.layouts.status().version == "v1"
    assert found(again, 2) == [*range(2, 40, 4), 1000, 1001]
    again.close()


def test_a_shard_moves_with_its_cells(opened: QdrantEdgeCollection, tmp_path: Path) -> None:
    opened.layouts.build(SPEC)
    opened.close()
    shutil.move(tmp_path / "docs", tmp_path / "other")
    moved = QdrantEdgeCollection.connect(str(tmp_path), "other")
    assert (moved.info.name, moved.layout(), moved.overflow()) == ("other", "abc", 0)
    moved.close()


OPEN = """
import sys
from amips_plugins import connect
connect(sys.argv[1])
"""


def test_a_shard_is_open_once(opened: QdrantEdgeCollection, tmp_path: Path) -> None:
    uri = f"qdrant-edge://{tmp_path}?collection=docs"
    with pytest.raises(DatabaseUnreachable, match="open elsewhere, and only one process"):
        connect(uri)
    done = run_python(OPEN, uri)
    assert "DatabaseUnreachable: The Qdrant Edge shard in" in done.stderr
    opened.current().close()
    connect(uri).close()
    opened.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/docs", "a\0"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="plain name"):
        QdrantEdgeCollection.connect(str(tmp_path), name)


def test_a_folder_that_is_no_shard_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    with pytest.raises(CollectionNotFound, match="no Qdrant Edge shard"):
        QdrantEdgeCollection.connect(str(tmp_path), "docs")
    assert list((tmp_path / "docs").iterdir()) == []


def test_a_shard_without_a_log_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "docs", wal_enabled=False)
    with pytest.raises(CollectionError, match="no write-ahead log"):
        QdrantEdgeCollection.connect(str(tmp_path), "docs")


def test_vectors_that_cannot_be_served(tmp_path: Path) -> None:
    many = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
    create(
        tmp_path / "docs",
        vectors={
            "title": params(),
            "body": params(size=3, distance=edge.Distance.Euclid),
            "words": params(multivector_config=many),
            "city": params(distance=edge.Distance.Manhattan),
            "small": params(datatype=edge.VectorStorageDatatype.Uint8),
        },
        sparse_vectors={"terms": edge.EdgeSparseVectorParams()},
    )
    cases: list[tuple[str | None, type[CollectionError], str]] = [
        (None, FieldNotFound, "no vector was named; its dense vectors are 'body', 'city'"),
        ("none", FieldNotFound, "no dense vector 'none'"),
        ("terms", FieldNotFound, "no dense vector 'terms'"),
        ("words", CollectionError, "multivector"),
        ("city", MetricNotSupported, "Manhattan"),
        ("small", CollectionError, "stored as uint8"),
    ]
    for field, error, reason in cases:
        with pytest.raises(error, match=reason):
            QdrantEdgeCollection.connect(str(tmp_path), "docs", field)
    body = QdrantEdgeCollection.connect(str(tmp_path), "docs", "body")
    assert (body.info.field, body.info.dim, body.info.metric.value) == ("body", 3, "l2")
    with pytest.raises(InvalidInput, match="would lose the others"):
        body.upsert([1], np.ones((1, 3), dtype=np.float32))
    body.close()


def test_points_without_the_vector_are_no_keys(tmp_path: Path) -> None:
    create(tmp_path / "docs", vectors={"a": params(), "b": params()})
    shard = edge.EdgeShard.load(str(tmp_path / "docs"))
    one = [1.0] * DIM
    shard.update(Update.upsert_points([edge.Point(1, {"a": one}), edge.Point(2, {"b": one})]))
    collection = QdrantEdgeCollection(shard, tmp_path / "docs", "a")
    assert collection.count() == 1
    assert [batch.ids for batch in collection.scan(1)] == [[1]]
    built = collection.layouts.build(SPEC)
    assert (built.overflow(), found(built, 1)) == (0, [1])
    collection.close()  # the shard is not the collection's own
    assert shard.info().points_count == 2
    shard.close()


def test_the_schema_names_the_indexed_fields(opened: QdrantEdgeCollection) -> None:
    engine = opened._shard.engine
    engine.update(Update.create_field_index("group", edge.PayloadSchemaType.Keyword))
    built = opened.layouts.build(SPEC)
    assert dict(built.info.schema) == {"group": "keyword"}


def test_a_damaged_pointer_is_no_layout_and_is_told(opened: QdrantEdgeCollection) -> None:
    built = opened.layouts.build(SPEC)
    path = opened._shard.folder / "amips.json"
    for content in (b"{", b"[]", b'{"amips_layout": 7}'):
        path.write_bytes(content)
        now = built.current()
        assert now.layout() is None
        assert len(now.search(SearchRequest(vectors(1), k=5))[0]) == 5
        with pytest.raises(CollectionError):
            now.layouts.status()


# --- searching and writing -------------------------------------------------------------------


def test_filters_and_parameters_are_the_engines_own(opened: QdrantEdgeCollection) -> None:
    def search(**changes: Any) -> Any:
        return opened.search(SearchRequest(vectors(1), k=3, **changes))

    assert len(search(params={"hnsw_ef": 64, "exact": True})[0]) == 3
    cases: list[tuple[dict[str, Any], str]] = [
        ({"filter": {"must": []}}, "is a qdrant_edge.Filter, but got dict"),
        ({"params": {"ef": 64}}, "'ef' is not a search parameter of Qdrant Edge; it has 'acorn'"),
        ({"params": {"hnsw_ef": "much"}}, "cannot use the search parameters"),
        ({"params": {"hnsw_ef": -1}}, "cannot use the search parameters"),
    ]
    for changes, reason in cases:
        with pytest.raises(InvalidInput, match=reason):
            search(**changes)


def test_two_shoulds_are_both_meant(opened: QdrantEdgeCollection) -> None:
    built = opened.layouts.build(SPEC)
    built.upsert([1000], vectors(1, 3))
    one_of = edge.Filter(should=[edge.HasIdCondition({5, 6}), edge.HasIdCondition({9, 1000})])
    plan = QueryPlan(cells=np.array([[1]]), layout="abc")
    (hits,) = built.search(SearchRequest(vectors(1), k=50, filter=one_of), plan)
    assert sorted(hit.id for hit in hits) == [5, 9, 1000]


def test_rewritten_queries_stay_in_their_cells(opened: QdrantEdgeCollection) -> None:
    built = opened.layouts.build(SPEC)
    rewritten, queries = vectors(2, 5), vectors(2, 6)
    plan = QueryPlan(
        rewritten=rewritten, rescore=4, cells=np.array([[1, 2], [3, -1]]), layout="abc"
    )
    answers = built.search(SearchRequest(queries, k=2), plan)
    for row, cells in enumerate([(1, 2), (3,)]):
        inside = [key for key in range(40) if key % N_CELLS in cells]
        scores = vectors(40)[inside] @ rewritten[row]
        chosen = [inside[place] for place in np.argsort(-scores)[:4]]
        wanted = sorted(chosen, key=lambda key: -float(vectors(40)[key] @ queries[row]))[:2]
        assert [hit.id for hit in answers[row]] == wanted


def test_a_large_batch_is_the_sum_of_its_queries(opened: QdrantEdgeCollection) -> None:
    built = opened.layouts.build(SPEC)
    queries, rng = vectors(600, 7), np.random.default_rng(7)
    cells = np.where(rng.random((600, N_CELLS)) < 0.5, np.arange(N_CELLS), -1)
    shares = np.where(rng.random(600) < 0.2, 0.9, 0.1).astype(np.float32)
    together = built.search(
        SearchRequest(queries, k=5), QueryPlan(cells=cells, layout="abc", shares=shares)
    )
    scores = queries @ vectors(40).T
    for row, hits in enumerate(together):
        keys = [key for key in range(40) if shares[row] > 0.5 or key % N_CELLS in cells[row]]
        assert [hit.id for hit in hits] == sorted(keys, key=lambda key: -scores[row, key])[:5]


def test_ids(opened: QdrantEdgeCollection) -> None:
    one = uuid.uuid4()
    opened.upsert([str(one).upper(), 2**64 - 1], vectors(2, 3))
    (batch,) = opened.scan(100, after=39)
    assert batch.ids == [2**64 - 1, str(one)]
    opened.delete([f"urn:uuid:{one}", int(np.int64(7))])
    assert opened.count() == 40
    for bad in ("doc-1", -1, 2**64, 1.5, True, None):
        with pytest.raises(InvalidInput, match="cannot be an id in Qdrant"):
            opened.upsert([bad], vectors(1))  # type: ignore[list-item]
        with pytest.raises(InvalidInput, match="cannot be an id in Qdrant"):
            opened.delete([bad])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="twice"):
        opened.upsert([str(one), one.hex], vectors(2))


def test_cells_that_are_none_of_the_layouts_are_refused(opened: QdrantEdgeCollection) -> None:
    built = opened.layouts.build(SPEC)
    for cell in (-2, N_CELLS):
        with pytest.raises(InvalidInput, match="has 0 to 3, and -1 for none"):
            built.upsert([1], vectors(1), cells=np.array([cell]))
    built.upsert([1], vectors(1), [{cell_key("abc"): 99}])  # nor may a field hide the key
    built.upsert([2], vectors(1), cells=np.array([-1]))
    assert built.overflow() == 2
    assert all({1, 2} <= set(found(built, cell)) for cell in range(N_CELLS))


@pytest.mark.parametrize("shared", [False, True])
def test_whatever_lies_in_the_place_of_a_cell_is_found(
    opened: QdrantEdgeCollection, shared: bool
) -> None:
    built, key = opened.layouts.build(SPEC), cell_key("abc")
    assert isinstance(built, QdrantEdgeCollection)
    assert built._found.cells is not None
    engine, store = built._shard.engine, built._store
    record = replace(built._found.cells, shared=shared)
    built._kept = replace(built._found, cells=record)
    assert store.outside(record) is Outside.NOBODY
    listed = {1: -7, 2: 99, 5: [], 6: None, 7: [40, -1]}
    for number, value in listed.items():
        engine.update(Update.set_payload([number], {key: value}))
    engine.update(Update.upsert_points([edge.Point(1000, vectors(1)[0].tolist())]))
    assert store.outside(record) is Outside.LISTED
    assert all({*listed, 1000} <= set(found(built, cell)) for cell in range(N_CELLS))
    engine.update(Update.delete_points([1000]))
    for number, value in {9: "north", 10: 2.5, 13: {"a": 1}, 14: True}.items():
        engine.update(Update.set_payload([number], {key: value}))
        listed[number] = value
        assert store.outside(record) is Outside.ANYTHING
        assert all({*listed} <= set(found(built, cell)) for cell in range(N_CELLS))


@pytest.mark.parametrize(("has_graph", "exact", "ef"), [(True, False, 384), (False, True, None)])
def test_cells_with_most_of_the_keys_are_a_search_of_the_graph_where_there_is_one(
    has_graph: bool, exact: bool, ef: int | None
) -> None:
    request, record = SearchRequest(vectors(1), k=5), LayoutRecord("abc", "v1", N_CELLS)
    plan = QueryPlan(cells=np.array([[0, 1]]), layout="abc", recall=0.9)
    everything = np.array([True])
    search = EdgeSearch(request, plan, "", record, everything, has_graph=has_graph)
    ((_, query),) = search.requests(range(1), outside=Outside.NOBODY)
    params = query.params
    assert params is not None
    assert (params.exact, params.hnsw_ef) == (exact, ef)
    assert query.filter is None


def test_a_shard_says_whether_it_has_a_graph(tmp_path: Path) -> None:
    create(tmp_path / "docs")
    create(tmp_path / "bare", hnsw_config=edge.HnswIndexConfig(0, 100, 10_000))
    for name, expected in (("docs", True), ("bare", False)):
        collection = QdrantEdgeCollection.connect(str(tmp_path), name)
        assert collection._found.has_graph is expected
        collection.close()


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (edge.PayloadSchemaType.Float, 1.5),
        (edge.PayloadSchemaType.Keyword, "x"),
        (edge.IntegerIndexParams(lookup=False, range=True), "x"),
    ],
)
def test_an_index_that_somebody_has_made_hides_no_key(
    opened: QdrantEdgeCollection, index: Any, value: Any
) -> None:
    built, key = opened.layouts.build(SPEC), cell_key("abc")
    assert isinstance(built, QdrantEdgeCollection)
    engine = built._shard.engine
    engine.update(Update.delete_field_index(key))
    engine.update(Update.create_field_index(key, index))
    engine.update(Update.set_payload([3], {key: value}))
    assert all(3 in found(built, cell) for cell in range(N_CELLS))
    for row in range(40):  # until the index has as many points as there are
        engine.update(Update.set_payload([row], {key: value}))
    assert found(built, 1) == [*range(40)]


def test_given_partitions_of_an_index_without_lookup(opened: QdrantEdgeCollection) -> None:
    engine = opened._shard.engine
    for row in range(40):
        engine.update(Update.set_payload([row], {"year": 2000 + row % 2}))
    index = edge.IntegerIndexParams(lookup=False, range=True)
    engine.update(Update.create_field_index("year", index))
    given = opened.current().partitioned(Partitions("year", (2000, 2001)))
    plan = QueryPlan(cells=np.array([[1]]), layout=given.layout())
    (hits,) = given.search(SearchRequest(vectors(1), k=40), plan)
    assert sorted(hit.id for hit in hits) == [*range(1, 40, 2)]


def test_a_payload_key_of_another_kind_is_refused(opened: QdrantEdgeCollection) -> None:
    engine = opened._shard.engine
    engine.update(Update.set_payload([3], {cell_key("abc"): "north"}))
    with pytest.raises(CollectionError, match="something else than a cell"):
        opened.layouts.build(SPEC)
    assert opened.layouts.status().unfinished == ()


def test_the_engine_answers_through_the_router(opened: QdrantEdgeCollection) -> None:
    router = LearnedRouter(opened, hook=NativeHook())
    assert len(router.search(vectors(1)[0], k=3)) == 3


# --- segments --------------------------------------------------------------------------------

RESTLESS = edge.EdgeOptimizersConfig(
    indexing_threshold=1,
    default_segment_number=3,
    deleted_threshold=0.05,
    vacuum_min_vector_number=10,
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_engine_knows_whether_every_point_has_a_cell(tmp_path: Path, seed: int) -> None:
    # What ``outside`` reads is documented nowhere: hold it against the exact count.
    create(tmp_path / "docs", optimizers=RESTLESS)
    shard = OpenShard.load(tmp_path / "docs")
    record = LayoutRecord("abc", "v1", 4)
    cells, key = EdgeStore(shard, ""), record.key
    assert cells.outside(record) is Outside.ANYTHING
    cells.create_index(key)
    rng = np.random.default_rng(seed)
    seen = set()
    for _ in range(150):
        ids = rng.choice(600, rng.integers(1, 120), replace=False).tolist()
        points = zip(ids, vectors(len(ids)).tolist(), rng.integers(-1, 4, len(ids)), strict=True)
        step = rng.integers(0, 8)
        if step < 3:
            written = [edge.Point(one, vector, {key: int(cell)}) for one, vector, cell in points]
            shard.update(Update.upsert_points(written))
        elif step == 3:
            shard.update(Update.upsert_points([edge.Point(ids[0], vectors(1)[0].tolist())]))
        elif step == 4:
            shard.update(Update.delete_points(ids))
        elif step == 5:
            shard.update(Update.set_payload_by_filter(without_cell(record), {key: 2}))
        elif step == 6:
            shard.optimize()
        else:
            shard.close()
            shard = OpenShard.load(tmp_path / "docs")
            cells = EdgeStore(shard, "")
        outside = cells.outside(record)
        assert (outside is Outside.NOBODY) == (cells.overflow(record) == 0)
        seen.add(outside)
    assert seen == {Outside.NOBODY, Outside.LISTED}
    shard.close()


@pytest.mark.slow
def test_a_key_that_wanders_is_always_found(opened: QdrantEdgeCollection) -> None:
    built, stop = opened.layouts.build(SPEC), threading.Event()
    key = vectors(40)[1:2]

    def wander() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            built.upsert([1], key, cells=None if step % 2 else np.array([1]))

    thread = threading.Thread(target=wander)
    thread.start()
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert 1 in found(built, 1)
    finally:
        stop.set()
        thread.join()


def test_after_a_build_the_vector_index_is_there_again(tmp_path: Path) -> None:
    create(tmp_path / "docs", 2000, optimizers=RESTLESS)
    collection = QdrantEdgeCollection.connect(str(tmp_path), "docs")
    collection.optimize()
    engine = collection._shard.engine
    built = collection.layouts.build(SPEC)
    only_indexed = SearchRequest(vectors(1, 3), k=2000, params={"indexed_only": True})
    assert len(built.search(only_indexed)[0]) > 1000
    assert engine.optimize() is False
    assert [len(found(built, cell)) for cell in range(N_CELLS)] == [500] * N_CELLS
    built.close()


# --- crashes ---------------------------------------------------------------------------------

WRITE = """
import sys
import numpy as np
from amips_plugins import QdrantEdgeCollection
collection = QdrantEdgeCollection.connect(sys.argv[1], "docs")
for key in range(1000, 10**6):
    collection.upsert([key], np.full((1, 8), key, dtype=np.float32), [{"title": str(key)}])
    if key % 3 == 0:
        collection.delete([key - 1])
    print(key, flush=True)
"""

BUILD = """
import dataclasses, os, sys, threading, time
import numpy as np
from tests.adapters.qdrant_edge.test_collection import SPEC, QdrantEdgeCollection
collection = QdrantEdgeCollection.connect(sys.argv[1], "docs")

def write():
    for key in range(int(sys.argv[2]), 10**9):
        collection.upsert([key], np.ones((1, 8), dtype=np.float32))
        os.write(1, b"%d\\n" % key)
        time.sleep(0.002)

def slowly(ids, keys):
    time.sleep(0.1)
    return SPEC.assign(ids, keys)

threading.Thread(target=write, daemon=True).start()
os.write(1, b"-1\\n")
collection.layouts.build(dataclasses.replace(SPEC, assign=slowly))
os.write(1, b"-2\\n")
threading.Event().wait()
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def killed(code: str, enough: Callable[[list[int]], bool], *arguments: str) -> list[int]:
    """Run code until it has acknowledged enough, kill it with SIGKILL, and return its numbers."""
    numbers: list[int] = []
    process = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    with process:
        try:
            for line in process.stdout:
                numbers.append(int(line))
                if enough(numbers):
                    break
        finally:
            process.kill()
        numbers += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    return numbers


@pytest.mark.slow
def test_what_was_acknowledged_outlives_a_kill(tmp_path: Path) -> None:
    create(tmp_path / "docs", 10)
    numbers = killed(WRITE, lambda so_far: len(so_far) == 300, str(tmp_path))
    collection = QdrantEdgeCollection.connect(str(tmp_path), "docs")
    there = {key for batch in collection.scan(1000) for key in batch.ids}
    last = numbers[-1]
    wanted = {*range(10), *(key for key in numbers if (key + 1) % 3 or key == last)}
    assert wanted - {last} <= there
    assert there - wanted <= {last + 1}  # written, and killed before it was said
    collection.close()


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on(tmp_path: Path) -> None:
    count, rng = 4000, np.random.default_rng(3)
    create(tmp_path / "docs", count, optimizers=RESTLESS)
    shutil.copytree(tmp_path / "docs", tmp_path / "clock" / "docs")
    clock = QdrantEdgeCollection.connect(str(tmp_path / "clock"), "docs")
    started = time.monotonic()
    clock.layouts.build(SPEC).close()
    whole = time.monotonic() - started + 0.4
    wanted = set(range(count))
    for delay in rng.uniform(0.0, whole, 3).tolist():

        def enough(numbers: list[int], delay: float = delay) -> bool:
            if -1 not in numbers:
                return False
            time.sleep(delay)
            return True

        numbers = killed(BUILD, enough, str(tmp_path), str(max(wanted) + 1))
        wanted |= {key for key in numbers if key >= 0}
        collection = connect(f"qdrant-edge://{tmp_path}?collection=docs")
        there = [int(key) for batch in collection.scan(1000) for key in batch.ids]
        assert wanted <= set(there)
        assert len(set(there)) == len(there) == collection.count()
        wanted = set(there)  # one more was written than was said
        if -2 in numbers:
            assert collection.layout() == "abc"
        if collection.layout() == "abc":
            assert everywhere(collection) == wanted
        collection.close()
        if collection.layout() == "abc":
            break
    collection = connect(f"qdrant-edge://{tmp_path}?collection=docs")
    if collection.layout() is None:
        collection = collection.layouts.build(SPEC)
    collection.layouts.backfill(SPEC.assign)
    status = collection.layouts.status()
    assert (status.layout, status.unfinished, status.overflow) == ("abc", (), 0)
    assert everywhere(collection) == wanted
    assert sum(len(found(collection, cell)) for cell in range(N_CELLS)) == len(wanted)
    collection.close()


def everywhere(collection: Collection) -> set[int]:
    return {key for cell in range(N_CELLS) for key in found(collection, cell)}


# --- importing -------------------------------------------------------------------------------


def test_without_the_engine_the_extra_is_named() -> None:
    blocked = "import sys; sys.modules['qdrant_edge'] = None\n"
    for code in (
        "from amips_plugins import QdrantEdgeCollection",
        "from amips_plugins import connect; connect('qdrant-edge:///docs?collection=docs')",
    ):
        last = run_python(blocked + code).stderr.splitlines()[-1]
        assert last.startswith("amips_plugins.errors.MissingExtra: This needs the package")
        assert last.endswith("run: pip install 'amips-plugins[qdrant-edge]'")


def test_the_engine_needs_no_client(opened: QdrantEdgeCollection, tmp_path: Path) -> None:
    opened.close()
    uri = f"qdrant-edge://{tmp_path}?collection=docs"
    blocked = "import sys; sys.modules['qdrant_client'] = None\n"
    done = run_python(blocked + OPEN + "assert 'grpc' not in sys.modules", uri)
    assert (done.returncode, done.stderr) == (0, "")


# --- codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [0, 16])
@pytest.mark.parametrize("bits", ["Bits4", "Bits2"])
def test_cells_are_scanned_by_their_codes_and_found_as_exactly(
    tmp_path: Path, links: int, bits: str
) -> None:
    """Real codes of a real engine: some 1,300 keys in two cells of 4."""
    dim, rng = 64, np.random.default_rng(5)
    centres = rng.standard_normal((40, dim))
    keys = (centres[rng.integers(40, size=2600)] + 0.5 * rng.standard_normal((2600, dim))).astype(
        np.float32
    )
    coded = edge.EdgeVectorParams(
        size=dim,
        distance=edge.Distance.Cosine,
        hnsw_config=edge.HnswIndexConfig(m=links, ef_construct=50, full_scan_threshold=1000),
        quantization_config=edge.TurboQuantQuantizationConfig(
            bits=getattr(edge.TurboQuantBitSize, bits)
        ),
    )
    config = edge.EdgeConfig(
        vectors={"": coded}, optimizers=edge.EdgeOptimizersConfig(indexing_threshold=10)
    )
    shard = edge.EdgeShard.create(str(tmp_path / "docs"), config)
    shard.update(Update.upsert_points([edge.Point(i, v) for i, v in enumerate(keys.tolist())]))
    shard.close()
    with QdrantEdgeCollection.connect(str(tmp_path), "docs") as collection:
        collection.layouts.build(SPEC)
        collection.optimize()
        assert collection._shard.engine.info().indexed_vectors_count == 2600
        collection = collection.current()
        queries = (keys[:100] + 0.3 * rng.standard_normal((100, dim))).astype(np.float32)
        request = SearchRequest(queries, k=10)
        cells = np.tile([[1, 2]], (100, 1))
        shares = np.full(100, 0.25, dtype=np.float32)
        plan = QueryPlan(cells=cells, layout="abc", shares=shares)
        by_codes = collection.search(request, plan)
        collection._kept = replace(collection._found, codes=None)
        exactly = collection.search(request, plan)
    pairs = zip(by_codes, exactly, strict=True)
    agree = [len({h.id for h in one} & {h.id for h in other}) / 10 for one, other in pairs]
    assert np.mean(agree) > 0.98
    # The scores are those of the vectors, not of the codes.
    assert by_codes[0][0].score == pytest.approx(exactly[0][0].score, abs=1e-6)


@pytest.mark.parametrize("bits", [None, "Bits4"])
def test_samples_of_vectors_on_a_disk_are_judged_by_codes(tmp_path: Path, bits: str | None) -> None:
    dim, rng = 64, np.random.default_rng(5)
    keys = rng.standard_normal((1500, dim)).astype(np.float32)
    four = edge.TurboQuantBitSize.Bits4
    quantised = edge.TurboQuantQuantizationConfig(bits=four) if bits else None
    coded = edge.EdgeVectorParams(
        size=dim,
        distance=edge.Distance.Cosine,
        on_disk=True,
        hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=50, full_scan_threshold=1000),
        quantization_config=quantised,
    )
    shard = edge.EdgeShard.create(str(tmp_path / "docs"), edge.EdgeConfig(vectors={"": coded}))
    shard.update(Update.upsert_points([edge.Point(i, v) for i, v in enumerate(keys.tolist())]))
    shard.close()
    with QdrantEdgeCollection.connect(str(tmp_path), "docs") as collection:
        assert collection.break_even == (0.3 if bits else 1.0)
        exactly: list[SearchRequest] = []
        exact = collection.exact
        collection.exact = lambda request: (exactly.append(request), exact(request))[1]  # type: ignore[method-assign, func-returns-value]
        request = SearchRequest(keys[:40] + 0.3, k=10, params={"hnsw_ef": 1})
        found = collection.thorough(request)
        assert bool(exactly) == (bits is None)
        pairs = zip(found, exact(request), strict=True)
        agree = [len({h.id for h in one} & {h.id for h in other}) / 10 for one, other in pairs]
        assert np.mean(agree) > 0.995
