"""``amips tune`` on real servers: copies come and go, and what was chosen holds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from amips_plugins import LearnedRouter, Registry
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.tuning import MilvusTuning
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.tuning import QdrantTuning
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.health.recall import recall_at_k
from amips_plugins.plan import QueryPlan
from amips_plugins.progress import no_progress
from amips_plugins.tune.apply import apply_choice, settled
from amips_plugins.tune.rows import FOUND, NATIVE_ROW, Choice
from amips_plugins.tune.run import NothingToTune, TuneOptions, measure
from amips_plugins.tune.untried import CELLS_ROW, KEYNET_ROW
from integration_tests.servers import QdrantAddress, QdrantProcess, ServerError
from integration_tests.test_doctor import COUNT, DIM, KEYS, milvus, milvus_collection

pymilvus = pytest.importorskip("pymilvus")
qdrant_client = pytest.importorskip("qdrant_client")
models = pytest.importorskip("qdrant_client.models")

__all__ = ["milvus"]  # the fixture

OPTIONS = TuneOptions(recall=0.9)


def queries(seed: int, count: int) -> Any:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def assert_holds(collection: Collection, registry: Registry) -> None:
    quiet = HealthMonitor(share=0.0)
    router = LearnedRouter(collection, registry=registry, refresh=None, watch=quiet)
    found = []
    for query in queries(9, 200):
        (exact,) = collection.exact(SearchRequest(query[None], 10))
        hits = router.search(query, recall=0.9)
        assert hits.trace.mode == "tuned"
        larger = collection.info.metric.larger_is_better
        found.append(recall_at_k(hits, exact, 10, larger_is_better=larger))
    assert np.mean(found) >= 0.89


def test_milvus(milvus: Any, tmp_path: Path) -> None:
    collection = milvus_collection(milvus, "IVF_FLAT", {"nlist": 64})
    begun = list[str]()

    def progress(title: str, total: int, done: int = 0, unit: str = "") -> Any:
        begun.append(title)
        return no_progress(title, total, done, unit)

    measured = measure(collection, queries(1, 400), OPTIONS, tmp_path / "tune", progress)
    rows = {row.search: row for row in measured.result.rows}
    assert (rows[NATIVE_ROW].parameter, measured.result.unit) == ("nprobe", "time")
    assert rows["HNSW"].dropped is None
    assert (rows["HNSW"].memory_bytes or 0) > (rows[FOUND].memory_bytes or 0) > 0  # links
    assert (rows["SCANN"].recall or 0.0) > 0.85  # put in order by the vectors
    # 2.3.5 knows neither; a newer server may.
    refused = {row.search for row in rows.values() if row.dropped is not None}
    assert refused <= {"HNSW_SQ", "IVF_RABITQ", KEYNET_ROW}, refused
    built = {title.removeprefix("build ") for title in begun if title.startswith("build ")}
    assert "HNSW" in built
    assert not refused & built  # before any key was copied
    assert not any(name.endswith("__amips_tune") for name in milvus.list_collections())
    kept = settled(measured, rebuild=False)
    if kept.result.choice.answer == "tune":
        registry = Registry(tmp_path / "registry")
        apply_choice(collection, kept, registry, tmp_path / "tune")
        assert_holds(collection, registry)
    milvus.drop_collection(collection.info.name)


@pytest.mark.nightly
def test_milvus_with_a_graph_in_each_of_many_partitions(milvus: Any, tmp_path: Path) -> None:
    graphs, each = 9, 1_100  # a segment of fewer rows gets no index
    name = f"tune_{secrets.token_hex(4)}"
    keys = queries(5, graphs * each)
    schema = milvus.create_schema()
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    milvus.create_collection(name, schema=schema, num_shards=1)
    for part in range(graphs):
        milvus.create_partition(name, f"p{part}")
        ids = range(part, len(keys), graphs)
        milvus.insert(name, [{"id": n, "vector": keys[n]} for n in ids], partition_name=f"p{part}")
    milvus.flush(name)
    index = milvus.prepare_index_params()
    links = {"M": 8, "efConstruction": 40}
    index.add_index("vector", index_type="HNSW", metric_type="IP", index_name="v", params=links)
    milvus.create_index(name, index)
    milvus.load_collection(name)
    collection = MilvusCollection(milvus, name)
    deadline = time.monotonic() + 120
    while (collection.describe().graphs or 0) < graphs:
        assert time.monotonic() < deadline, "not every partition was indexed in two minutes"
        time.sleep(0.5)
        milvus.refresh_load(name)
    tuning = MilvusTuning(collection)
    assert "where yours has 9" in tuning.notes[1]
    assert tuning.builds()[0].name == "HNSW, fewer segments"
    options = replace(OPTIONS, seconds=5.0)  # the first of the builds, and no other
    measured = measure(collection, queries(1, 200), options, tmp_path / "tune")
    rows = {row.search: row for row in measured.result.rows}
    fewer = rows["HNSW, fewer segments"]
    assert fewer.dropped is None
    assert fewer.effort is not None
    assert not fewer.applies
    assert "asks 9 segments" in (rows[CELLS_ROW].dropped or "")
    milvus.drop_collection(name)


def test_milvus_automatic_index_is_searched_as_far_as_its_ef_says(
    milvus: Any, tmp_path: Path
) -> None:
    growing = milvus_collection(milvus, "AUTOINDEX", {}, flush=False)
    with pytest.raises(NothingToTune, match="flush, and wait for the index"):
        measure(growing, queries(1, 60), OPTIONS, tmp_path / "tune")
    milvus.drop_collection(growing.info.name)
    collection = milvus_collection(milvus, "AUTOINDEX", {})
    found = MilvusTuning(collection).as_found()
    assert found is not None
    assert found.knob.name == "ef"
    some = queries(3, 50)
    exact = [{hit.id for hit in hits} for hits in collection.exact(SearchRequest(some, 10))]

    def recall(ef: int) -> float:
        answers = collection.search(SearchRequest(some, 10), QueryPlan(params={"ef": ef}))
        found = zip(answers, exact, strict=True)
        return float(np.mean([len({hit.id for hit in hits} & best) / 10 for hits, best in found]))

    assert recall(10) < recall(400)
    milvus.drop_collection(collection.info.name)


def test_a_server_that_counts_its_work_is_asked_and_strict_mode_is_as_far_as_it_goes(
    tmp_path: Path,
) -> None:
    try:
        process = QdrantProcess({"service__hardware_reporting": "true"})
    except ServerError as exc:
        pytest.skip(str(exc))
    with process:
        client = process.address.client()
        collection = make_docs(client, "docs")
        client.update_collection(
            "docs", strict_mode_config=models.StrictModeConfig(enabled=True, max_query_limit=50)
        )
        collection = collection.current()
        with pytest.raises(InvalidInput, match="allows 50 hits"):
            measure(collection, queries(1, 200), replace(OPTIONS, k=51), tmp_path / "tune")
        measured = measure(collection, queries(1, 200), OPTIONS, tmp_path / "tune")
        assert measured.calibrations[NATIVE_ROW].guaranteed.shape[0] == 50
        rows = {row.search: row for row in measured.result.rows}
        native, int8 = rows[NATIVE_ROW].bytes_scored, rows["int8 codes"].bytes_scored
        assert native is not None
        assert int8 is not None
        assert int8 < native
        client.close()


@pytest.fixture
def docs(qdrant: QdrantAddress) -> Iterator[QdrantCollection]:
    client, name = qdrant.client(), f"tune_{secrets.token_hex(4)}"
    yield make_docs(client, name)
    client.delete_collection(name)
    client.close()


def make_docs(client: Any, name: str) -> QdrantCollection:
    """A collection whose graph is built."""
    client.create_collection(
        name,
        models.VectorParams(size=DIM, distance=models.Distance.COSINE),
        hnsw_config=models.HnswConfigDiff(m=8, ef_construct=32, full_scan_threshold=10),
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=100),
    )
    points = [models.PointStruct(id=row, vector=key.tolist()) for row, key in enumerate(KEYS)]
    for low in range(0, COUNT, 500):
        client.upsert(name, points[low : low + 500], wait=True)
    deadline = time.monotonic() + 120
    while (client.get_collection(name).indexed_vectors_count or 0) < COUNT / 2:
        assert time.monotonic() < deadline, "no graph in two minutes"
        time.sleep(0.5)
    return QdrantCollection(client, name)


def test_qdrant(docs: QdrantCollection, tmp_path: Path) -> None:
    measured = measure(docs, queries(1, 400), OPTIONS, tmp_path / "tune")
    rows = {row.search: row for row in measured.result.rows}
    assert {FOUND, NATIVE_ROW, "int8 codes", "binary codes"} <= set(rows)
    int8, as_is = rows["int8 codes"], rows[FOUND]
    assert int8.dropped is None
    assert as_is.memory_bytes is not None  # codes come on top of the vectors, which stay in memory
    assert (int8.memory_bytes or 0) - as_is.memory_bytes == COUNT * DIM
    assert not docs.client.collection_exists(f"{docs.info.name}__amips_tune")
    choice = Choice(answer="rebuild", search="int8 codes", text="by hand")
    result = msgspec.structs.replace(measured.result, choice=choice)
    registry = Registry(tmp_path / "registry")
    chosen = type(measured)(**{**vars(measured), "result": result})
    done = apply_choice(docs, chosen, registry, tmp_path / "tune")
    assert done.rebuilt == "int8 codes"
    assert "models.Disabled.DISABLED" in done.way_back[1]
    found = docs.current()
    tuning = QdrantTuning(found)
    present = tuning.as_found()
    assert present is not None
    assert present.name == "int8 codes"
    assert_holds(found, registry)
