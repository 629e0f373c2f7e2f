"""How ``amips doctor`` sees the collections of real servers."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection.sizing import Kept
from amips_plugins.doctor.diagnose import diagnose

pymilvus = pytest.importorskip("pymilvus")
qdrant_client = pytest.importorskip("qdrant_client")

COUNT, DIM = 6_000, 16
KEYS = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
QUERIES = np.random.default_rng(1).standard_normal((800, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def milvus(milvus_uri: str) -> Iterator[Any]:
    client = pymilvus.MilvusClient(milvus_uri, token=os.environ.get("AMIPS_MILVUS_TOKEN", ""))
    yield client
    client.close()


def milvus_collection(
    client: Any, kind: str, params: dict[str, int], *, flush: bool = True
) -> MilvusCollection:
    name = f"doctor_{secrets.token_hex(4)}"
    schema = client.create_schema()
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("vector", index_type=kind, metric_type="IP", index_name="v", params=params)
    client.create_collection(name, schema=schema, num_shards=1)
    client.insert(name, [{"id": row, "vector": key} for row, key in enumerate(KEYS)])
    if flush:
        client.flush(name)
    client.create_index(name, index)
    client.load_collection(name)
    deadline = time.monotonic() + 60
    built = flush and kind != "FLAT"  # of which no segment says that it has it
    while built and not all(part.index_name for part in client.list_loaded_segments(name)):
        assert time.monotonic() < deadline, "the index was not loaded in a minute"
        time.sleep(0.5)
    return MilvusCollection(client, name)


@pytest.mark.parametrize(
    ("kind", "params", "native", "shown"),
    [
        ("IVF_FLAT", {"nlist": 64}, "lists", "IVF_FLAT (nlist 64)"),
        ("HNSW", {"M": 8, "efConstruction": 40}, "graph", "HNSW (M 8, efConstruction 40)"),
        ("FLAT", {}, "scan", "FLAT"),
    ],
)
def test_milvus(milvus: Any, kind: str, params: dict[str, int], native: str, shown: str) -> None:
    collection = milvus_collection(milvus, kind, params)
    try:
        built = collection.describe()
        facts = dict(built.facts)
        assert (built.native, facts["index"]) == (native, shown)
        assert built.lists == params.get("nlist")
        assert built.notes == ()
        indexed = 0 if kind == "FLAT" else 1
        assert facts["segments"] == f"1 loaded, {indexed} of them indexed, 0 still growing"
        assert ("a graph in memory" in built.obstacle) == (kind == "HNSW")
        assert built.kept == Kept(kind)
        found = diagnose(collection, QUERIES, n_cells=8, memory=10**9)
        assert f"Its {kind} index and ids take" in found.notes[-1]
        assert found.verdict.answer == "leave"  # of so few keys
        assert found.trial is not None
        assert (found.trial.cost("index", 0.95) is not None) == (kind == "IVF_FLAT")
    finally:
        milvus.drop_collection(collection.info.name)


def test_a_milvus_collection_that_still_grows(milvus: Any) -> None:
    collection = milvus_collection(milvus, "IVF_FLAT", {"nlist": 64}, flush=False)
    try:
        assert collection.count() == COUNT
        built = collection.describe()
        assert built.native == "scan"  # whatever the index says
        assert f"{COUNT:,} of {COUNT:,} rows are in segments without an index" in built.notes[0]
    finally:
        milvus.drop_collection(collection.info.name)


def test_qdrant(qdrant_url: str) -> None:
    key = os.environ.get("AMIPS_QDRANT_API_KEY")
    client = qdrant_client.QdrantClient(qdrant_url, api_key=key, check_compatibility=False)
    name = f"doctor_{secrets.token_hex(4)}"
    models = qdrant_client.models
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    quantised = models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
    )
    client.create_collection(name, vectors_config=params, quantization_config=quantised)
    try:
        client.upload_collection(name, KEYS, ids=range(COUNT), wait=True)
        client.create_payload_index(name, "group", models.PayloadSchemaType.INTEGER, wait=True)
        built = QdrantCollection(client, name).describe()
        facts = dict(built.facts)
        assert built.native == "scan"  # segments this small get no graph
        assert f"{COUNT:,} of {COUNT:,} points are in no graph yet" in built.notes[0]
        assert facts["graph"] == "HNSW m=16, ef_construct=100"
        assert facts["quantisation"] == "scalar, always in RAM"
        assert facts["payload"] == "group (integer)"
        assert facts["vectors"] == "in memory"
    finally:
        client.delete_collection(name)
        client.close()
