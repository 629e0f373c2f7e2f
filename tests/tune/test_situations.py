"""What tune chooses is about as cheap as the best of all it could set, and never worse than before.

The situations of ``benchmarks/tune.py``, small, on real engines and queries that tuning never saw:
one graph, a graph in each of many segments, Milvus Lite as the demo has it, and few keys. The
fan-out over a Milvus server is in ``integration_tests/test_tune.py``. Costs are counted, not timed,
so that no busy machine decides what is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest

from amips_plugins import connect
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
from amips_plugins.adapters.tuning import tuning_of
from amips_plugins.collection import SearchRequest
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.tune.rows import FOUND
from amips_plugins.tune.run import TuneOptions, measure
from amips_plugins.tune.untried import CELLS_ROW
from amips_plugins.vectors import FloatArray, normalise
from benchmarks.tune import Situation, demo, situation

edge = pytest.importorskip("qdrant_edge")

DIM, BUILD_EFFORT, LINKS = 48, 64, 16
pytestmark = pytest.mark.slow


def vectors(seed: int, count: int) -> FloatArray:
    """Keys of 40 topics, and queries that come from other places than keys do."""
    topics = np.random.default_rng(7).standard_normal((40, DIM))
    rng = np.random.default_rng(seed)
    shift = 0.4 * topics[(rng.integers(40, size=count))] if seed else 0.0
    noise = rng.standard_normal((count, DIM))
    made = topics[rng.integers(40, size=count)] + shift + noise
    return normalise(made.astype(np.float32))


class Work:
    """A clock whose seconds are the bytes that searches compare, by what each index is."""

    def __init__(self) -> None:
        self.done = 0.0
        self.known = WeakKeyDictionary[Any, Any]()

    def __call__(self) -> float:
        return self.done

    def add(self, collection: Any, queries: int, plan: QueryPlan) -> None:
        if collection not in self.known:  # what is asked now and again costs as much as searches
            self.known[collection] = tuning_of(collection).as_found(), collection.count()
        build, keys = self.known[collection]
        if build is None or not build.knob.efforts:
            self.done += queries * keys * 4.0 * DIM
            return
        effort = (plan.params or {}).get(build.knob.name, BUILD_EFFORT)  # as Qdrant does
        if build.knob.name == "nprobe":
            lists = build.knob.efforts[-1]
            self.done += queries * (lists * 4.0 * DIM + effort / lists * keys * build.bytes_per_key)
        else:
            rescored = 4.0 * DIM if build.knob.rescored else 0.0
            self.done += queries * effort * (LINKS * build.bytes_per_key + rescored)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    clock = Work()

    def count(kind: Any) -> None:
        search = kind.search

        def counted(self: Any, request: SearchRequest, plan: QueryPlan = NATIVE) -> Any:
            clock.add(self, len(request.queries), plan)
            return search(self, request, plan)

        monkeypatch.setattr(kind, "search", counted)

    count(QdrantEdgeCollection)
    count(MilvusCollection)
    return clock


@contextmanager
def shard(folder: Path, keys: FloatArray, segments: int) -> Iterator[QdrantEdgeCollection]:
    """A shard whose graphs are built, at most ``segments`` of them."""
    params = edge.EdgeVectorParams(
        size=DIM,
        distance=edge.Distance.Cosine,
        hnsw_config=edge.HnswIndexConfig(
            m=LINKS, ef_construct=BUILD_EFFORT, full_scan_threshold=10
        ),
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
    """About as cheap as the best, which test queries chose; never worse than before."""
    best = found.best
    assert best is not None
    assert found.taken.recall >= found.recall - 0.02
    assert found.taken.ratio <= 1.4 * best.ratio, found
    worse = found.taken.ratio > 1.1
    assert not worse or found.as_found_recall < found.recall, found


def test_one_graph(tmp_path: Path, work: Work) -> None:
    with shard(tmp_path, vectors(0, 4_000), 1) as collection:
        found = situation("edge", collection, work, vectors(1, 500), vectors(2, 200), 0.95)
    assert found.answer in ("tune", "rebuild")
    held(found)


def test_many_graphs(tmp_path: Path, work: Work) -> None:
    with shard(tmp_path, vectors(0, 6_000), 12) as collection:
        graphs = collection.describe().graphs
        assert graphs is not None
        assert graphs >= 8
        options = TuneOptions(seconds=0.0)
        rows = measure(collection, vectors(1, 200), options, tmp_path / "tune").result.rows
        assert f"asks {graphs} segments" in (rows[-1].dropped or "")
        assert rows[-1].search == CELLS_ROW
        found = situation("fanned", collection, work, vectors(1, 300), vectors(2, 100), 0.9)
    held(found)


def test_milvus_lite_as_the_demo_has_it(work: Work) -> None:
    pytest.importorskip("milvus_lite")
    with demo(vectors(0, 4_000)) as (collection, _):
        found = situation("demo", collection, work, vectors(1, 160), vectors(2, 40), 0.9)
    assert found.as_found_recall == 1.0
    held(found)


def test_few_keys(tmp_path: Path, work: Work) -> None:
    pytest.importorskip("milvus_lite")
    keys = vectors(0, 2_000)
    with demo(keys) as (collection, _):
        found = situation("small", collection, work, vectors(1, 160), vectors(2, 40), 0.9)
    held(found)
    params = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Cosine)
    edge.EdgeShard.create(str(tmp_path / "docs"), edge.EdgeConfig(vectors=params)).close()
    with connect(f"qdrant-edge://{tmp_path}?collection=docs") as bare:
        bare.upsert(range(2_000), keys)
        found = situation("edge", bare, work, vectors(1, 300), vectors(2, 50), 0.95)
    assert (found.answer, found.chosen, found.taken.ratio) == ("leave", FOUND, 1.0)
    assert "nothing to tune" in found.text
