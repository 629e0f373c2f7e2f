"""``amips tune`` on real servers: copies come and go, and what was chosen holds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from amips_plugins import LearnedRouter, Registry
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.tuning import QdrantTuning
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.health.recall import recall_at_k
from amips_plugins.tune.apply import apply_choice, settled
from amips_plugins.tune.rows import FOUND, NATIVE_ROW, Choice
from amips_plugins.tune.run import TuneOptions, measure
from integration_tests.servers import QdrantAddress
from integration_tests.test_doctor import COUNT, DIM, KEYS, milvus, milvus_collection

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
    measured = measure(collection, queries(1, 400), OPTIONS, tmp_path / "tune")
    rows = {row.search: row for row in measured.result.rows}
    assert (rows[NATIVE_ROW].parameter, measured.result.unit) == ("nprobe", "time")
    assert rows["HNSW"].dropped is None
    # 2.3.5 knows neither; a newer server may.
    refused = [row for row in rows.values() if row.dropped is not None]
    assert all(row.search in ("HNSW_SQ", "IVF_RABITQ") for row in refused), refused
    assert not any(name.endswith("__amips_tune") for name in milvus.list_collections())
    kept = settled(measured, rebuild=False)
    if kept.result.choice.answer == "tune":
        registry = Registry(tmp_path / "registry")
        apply_choice(collection, kept, registry, tmp_path / "tune")
        assert_holds(collection, registry)
    milvus.drop_collection(collection.info.name)


@pytest.fixture
def docs(qdrant: QdrantAddress) -> Iterator[QdrantCollection]:
    client, name = qdrant.client(), f"tune_{secrets.token_hex(4)}"
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
    yield QdrantCollection(client, name)
    client.delete_collection(name)
    client.close()


def test_qdrant(docs: QdrantCollection, tmp_path: Path) -> None:
    measured = measure(docs, queries(1, 400), OPTIONS, tmp_path / "tune")
    rows = {row.search: row for row in measured.result.rows}
    assert {FOUND, NATIVE_ROW, "int8 codes", "binary codes"} <= set(rows)
    assert rows["int8 codes"].dropped is None
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
