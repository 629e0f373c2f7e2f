"""Three commands from a partitioned collection to a routed search: those of docs/partitions.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, connect
from amips_plugins.cli import main
from tests.support import given_data

FRESH = given_data.queries(100, seed=9)


def milvus(folder: Path, *, native: bool) -> str:
    """A file of Milvus Lite with a field ``topic``, or a partition for each of its values."""
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    client: Any = pymilvus.MilvusClient(str(folder / "docs.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=given_data.DIM)
    schema.add_field("topic", pymilvus.DataType.VARCHAR, max_length=20, nullable=True)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection("docs", schema=schema, index_params=index)
    by_part: dict[str, list[Any]] = {}
    for row, (key, value) in enumerate(zip(given_data.keys(), given_data.values(), strict=True)):
        place = "_default" if value is None or not native else str(value).replace(" ", "_")
        by_part.setdefault(place, []).append({"id": row, "vector": key, "topic": value})
    for part, rows in by_part.items():
        if part != "_default":
            client.create_partition("docs", part)
        client.insert("docs", rows, partition_name=part)
    client.close()
    return f"milvus://{folder}/docs.db?collection=docs"


def milvus_field(folder: Path) -> str:
    return milvus(folder, native=False)


def milvus_native(folder: Path) -> str:
    return milvus(folder, native=True)


def qdrant(folder: Path) -> str:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(folder / "store"))
    size = models.VectorParams(size=given_data.DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=size)
    points = [
        models.PointStruct(id=row, vector=key, payload={} if value is None else {"topic": value})
        for row, (key, value) in enumerate(
            zip(given_data.keys().tolist(), given_data.values(), strict=True)
        )
    ]
    client.upsert("docs", points)
    client.close()
    return f"qdrant://{folder}/store?collection=docs"


def edge(folder: Path) -> str:
    engine = pytest.importorskip("qdrant_edge")
    place = folder / "shards" / "docs"
    place.mkdir(parents=True)
    size = engine.EdgeVectorParams(size=given_data.DIM, distance=engine.Distance.Cosine)
    shard = engine.EdgeShard.create(str(place), engine.EdgeConfig(vectors=size))
    update, kind = engine.UpdateOperation, engine.PayloadSchemaType.Keyword
    shard.update(update.create_field_index("topic", kind))
    payloads = [{} if value is None else {"topic": value} for value in given_data.values()]
    points = zip(given_data.keys().tolist(), payloads, strict=True)
    shard.update(update.upsert_points([engine.Point(n, *point) for n, point in enumerate(points)]))
    shard.close()
    return f"qdrant-edge://{folder}/shards?collection=docs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "partitions"),
    [
        pytest.param(milvus_native, "native", id="milvus-native"),
        pytest.param(milvus_field, "topic", id="milvus-field", marks=pytest.mark.nightly),
        pytest.param(qdrant, "topic", id="qdrant", marks=pytest.mark.nightly),
        pytest.param(edge, "topic", id="edge", marks=pytest.mark.nightly),
    ],
)
def test_from_a_partitioned_collection_to_a_search(
    make: Callable[[Path], str],
    partitions: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMIPS_REGISTRY", raising=False)
    uri = make(tmp_path)
    np.save("queries.npy", given_data.queries())
    main(["snapshot", uri, "--partitions", partitions, "-o", "snap/"])
    quick = ["--epochs", "3", "--recall", "0.9"]  # which the page leaves to the defaults
    main(["train", "snap/", "--queries", "queries.npy", "-o", "run/", *quick])
    main(["publish", "run/"])
    with connect(uri) as collection:
        router = LearnedRouter(collection)
        missed = probes = 0
        for query in FRESH:
            hits = router.search(query, k=10)
            exact = router.search(query, k=10, recall=1.0)
            assert hits.trace.mode == "route"
            probes += hits.trace.n_probes or 0
            missed += len({hit.id for hit in exact} - {hit.id for hit in hits})
        assert missed <= 0.1 * 10 * len(FRESH)
        assert probes < 0.6 * given_data.PARTS * len(FRESH)
        assert router.fallbacks == {}
