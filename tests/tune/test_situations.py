"""What tune chooses is about as cheap as the best of all it could set, and never worse than before.

The situations of ``benchmarks/tune.py``, small, on real engines and queries that tuning never saw:
one graph, a graph in each of many segments, Milvus Lite as the demo has it, and few keys. The
fan-out over a Milvus server is in ``integration_tests/test_tune.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from amips_plugins import connect
from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
from amips_plugins.tune.rows import FOUND
from amips_plugins.tune.run import TuneOptions, measure
from amips_plugins.tune.untried import CELLS_ROW
from amips_plugins.vectors import FloatArray, normalise
from benchmarks.tune import Situation, demo, situation

edge = pytest.importorskip("qdrant_edge")

DIM = 48
pytestmark = pytest.mark.slow


def vectors(seed: int, count: int) -> FloatArray:
    """Keys of 40 topics, and queries that come from other places than keys do."""
    topics = np.random.default_rng(7).standard_normal((40, DIM))
    rng = np.random.default_rng(seed)
    shift = 0.4 * topics[(rng.integers(40, size=count))] if seed else 0.0
    noise = rng.standard_normal((count, DIM))
    made = topics[rng.integers(40, size=count)] + shift + noise
    return normalise(made.astype(np.float32))


@contextmanager
def shard(folder: Path, keys: FloatArray, segments: int) -> Iterator[QdrantEdgeCollection]:
    """A shard whose graphs are built, at most ``segments`` of them."""
    params = edge.EdgeVectorParams(
        size=DIM,
        distance=edge.Distance.Cosine,
        hnsw_config=edge.HnswIndexConfig(m=16, ef_construct=64, full_scan_threshold=10),
    )
    small = {} if segments == 1 else {"max_segment_size": 4 * DIM * len(keys) // 1024 // segments}
    optimizers = edge.EdgeOptimizersConfig(
        indexing_threshold=10, default_segment_number=segments, **small
    )
    config = edge.EdgeConfig(vectors=params, optimizers=optimizers)
    edge.EdgeShard.create(str(folder / "docs"), config).close()
    with QdrantEdgeCollection.connect(str(folder), "docs") as collection:
        for low in range(0, len(keys), 500):
            collection.upsert(range(low, min(low + 500, len(keys))), keys[low : low + 500])
            if segments > 1:
                collection.optimize()
        collection.optimize()
        yield collection


def held(found: Situation) -> None:
    """About as cheap as the best, with room for a busy machine; never worse than before."""
    best = found.best
    assert best is not None
    assert found.taken.recall >= found.recall - 0.02
    assert found.taken.ratio <= 1.4 * best.ratio, found
    worse = found.taken.ratio > 1.1
    assert not worse or found.as_found_recall < found.recall, found


def test_one_graph(tmp_path: Path) -> None:
    with shard(tmp_path, vectors(0, 4_000), 1) as collection:
        found = situation(
            "edge", collection, time.process_time, vectors(1, 500), vectors(2, 200), 0.95
        )
    assert found.answer in ("tune", "rebuild")
    held(found)


def test_many_graphs(tmp_path: Path) -> None:
    with shard(tmp_path, vectors(0, 6_000), 12) as collection:
        graphs = collection.describe().graphs
        assert graphs is not None
        assert graphs >= 8
        options = TuneOptions(seconds=0.0)
        rows = measure(collection, vectors(1, 200), options, tmp_path / "tune").result.rows
        assert f"asks {graphs} segments" in (rows[-1].dropped or "")
        assert rows[-1].search == CELLS_ROW
        found = situation(
            "fanned", collection, time.process_time, vectors(1, 300), vectors(2, 100), 0.9
        )
    held(found)


def test_milvus_lite_as_the_demo_has_it() -> None:
    pytest.importorskip("milvus_lite")
    with demo(vectors(0, 4_000)) as (collection, clock):
        found = situation("demo", collection, clock, vectors(1, 160), vectors(2, 40), 0.9)
    assert found.as_found_recall == 1.0
    held(found)


def test_few_keys(tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    keys = vectors(0, 2_000)
    with demo(keys) as (collection, clock):
        found = situation("small", collection, clock, vectors(1, 160), vectors(2, 40), 0.9)
    held(found)
    params = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Cosine)
    edge.EdgeShard.create(str(tmp_path / "docs"), edge.EdgeConfig(vectors=params)).close()
    with connect(f"qdrant-edge://{tmp_path}?collection=docs") as bare:
        bare.upsert(range(2_000), keys)
        found = situation("edge", bare, time.process_time, vectors(1, 300), vectors(2, 50), 0.95)
    assert (found.answer, found.chosen, found.taken.ratio) == ("leave", FOUND, 1.0)
    assert "nothing to tune" in found.text
