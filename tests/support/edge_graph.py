"""A Qdrant Edge shard whose graph is small enough to miss keys, and queries for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge

from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
from amips_plugins.vectors import FloatArray, normalise

DIM, COUNT = 24, 3000


def keys() -> FloatArray:
    rng = np.random.default_rng(0)
    return normalise(rng.standard_normal((COUNT, DIM)).astype(np.float32))


def queries(seed: int, count: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    return normalise(rng.standard_normal((count, DIM)).astype(np.float32))


def make_shard(folder: Path, name: str = "docs", codes: Any = None) -> None:
    """Write the keys into a new shard, with row numbers as ids, and build its graph."""
    params = edge.EdgeVectorParams(
        size=DIM,
        distance=edge.Distance.Cosine,
        hnsw_config=edge.HnswIndexConfig(m=6, ef_construct=16, full_scan_threshold=10),
        quantization_config=codes,
    )
    small = edge.EdgeOptimizersConfig(indexing_threshold=10, default_segment_number=1)
    config = edge.EdgeConfig(vectors=params, optimizers=small)
    edge.EdgeShard.create(str(folder / name), config).close()
    with QdrantEdgeCollection.connect(str(folder), name) as collection:
        collection.upsert(range(COUNT), keys(), [{"year": 2000 + row % 20} for row in range(COUNT)])
        collection.optimize()
