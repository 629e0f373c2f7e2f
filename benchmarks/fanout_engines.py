"""What a fan-out and a routed search cost an engine: Qdrant Edge in this process, a Milvus server.

The engines are called directly, each in the way that costs it least: Edge has a shard for every
graph, Milvus a partition of one collection. Of a single query a Milvus server is asked in one call
that names its partitions; of a batch each graph is asked once, with all queries that chose it. What
is counted is the CPU of the engine's process: of Edge that is this one, merging answers included;
of Milvus the server, less what it uses while nobody asks. Graphs are chosen beforehand: with ONNX
that takes a service some 10 to 30 microseconds a query (docs/method.md).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from amips_plugins.export.keys import Keys
from amips_plugins.vectors import FloatArray
from benchmarks.engines import Milvus, quiet
from benchmarks.fanout_ways import Way

__all__ = ["Engine", "Graphs", "Scored", "engine"]

_IDLE_SECONDS = 10.0
_UPLOAD = 1_000
_KB_OF_A_GRAPH = 10  # below it Edge would scan

Scored = list[tuple[float, int]]


class Graphs(Protocol):
    """The graphs of one way in an engine."""

    def ask(
        self, queries: FloatArray, cells: Sequence[int] | None, k: int, effort: int
    ) -> list[Scored]:
        """Return ``k`` keys of these graphs together, or of all of them, for every query."""

    def cpu(self) -> float:
        """Return CPU seconds so far."""


@dataclass(frozen=True)
class Engine:
    """An engine that is running.

    Attributes
    ----------
    graphs
        Builds the graphs of a way, for as long as the block lasts.
    together
        Whether one call may ask several graphs.
    remembers
        Whether a query that is asked again is answered better: then none is.
    """

    graphs: Callable[[Keys, Way], Any]
    together: bool
    remembers: bool


@contextmanager
def engine(name: Literal["counts", "edge", "milvus"], work: Path) -> Iterator[Engine | None]:
    """Start an engine, none for counts; it ends with the block, and its data goes."""
    if name == "counts":
        yield None
        return
    if name == "edge":
        yield Engine(lambda keys, way: _edge(work, keys, way), together=False, remembers=False)
        return
    with Milvus() as server:
        yield Engine(lambda keys, way: _milvus(server, keys, way), together=True, remembers=True)


class _EdgeGraphs:
    """A shard for every graph."""

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = shards

    def ask(
        self, queries: FloatArray, cells: Sequence[int] | None, k: int, effort: int
    ) -> list[Scored]:
        import qdrant_edge as edge

        params = edge.SearchParams(hnsw_ef=effort)
        requests = [
            edge.QueryRequest(k, query=edge.Query.Nearest(one), params=params)
            for one in queries.tolist()
        ]
        found: list[Scored] = [[] for _ in requests]
        for cell in range(len(self._shards)) if cells is None else cells:
            if len(requests) == 1:
                answers = [self._shards[cell].query(requests[0])]
            else:
                answers = self._shards[cell].query_batch(edge.QueryBatchRequest(requests))
            for here, points in zip(found, answers, strict=True):
                here += [(point.score, point.id) for point in points]
        return found

    def cpu(self) -> float:
        return time.process_time()


@contextmanager
def _edge(work: Path, keys: Keys, way: Way) -> Iterator[Graphs]:
    import qdrant_edge as edge

    folder = Path(tempfile.mkdtemp(dir=work))
    vectors = edge.EdgeVectorParams(
        size=keys.shape[1],
        distance=edge.Distance.Cosine,
        hnsw_config=edge.HnswIndexConfig(16, 200, _KB_OF_A_GRAPH),
    )
    optimizers = edge.EdgeOptimizersConfig(
        default_segment_number=1, indexing_threshold=_KB_OF_A_GRAPH
    )
    config = edge.EdgeConfig(vectors=vectors, optimizers=optimizers, max_search_threads=1)
    shards = []
    try:
        for cell in range(way.n_cells):
            shard = edge.EdgeShard.create(str(folder / str(cell)), config)
            shards.append(shard)
            rows = np.flatnonzero((way.members == cell).any(axis=1))
            for low in range(0, len(rows), _UPLOAD):
                some = rows[low : low + _UPLOAD]
                block = np.asarray(keys[some]).tolist()
                points = [edge.Point(*one) for one in zip(some.tolist(), block, strict=True)]
                shard.update(edge.UpdateOperation.upsert_points(points))
            shard.optimize()
        yield _EdgeGraphs(shards)
    finally:
        for shard in shards:
            shard.close()
        shutil.rmtree(folder, ignore_errors=True)


class _MilvusGraphs:
    """A partition for every graph."""

    def __init__(self, server: Milvus, name: str) -> None:
        self._server = server
        self._name = name
        quiet(server.meter)
        before, began = server.meter.cpu(), time.perf_counter()
        time.sleep(_IDLE_SECONDS)
        self._since = time.perf_counter()
        self._idle = (server.meter.cpu() - before) / (self._since - began)

    def ask(
        self, queries: FloatArray, cells: Sequence[int] | None, k: int, effort: int
    ) -> list[Scored]:
        found = self._server.client.search(
            self._name,
            data=list(queries),
            limit=k,
            search_params={"metric_type": "COSINE", "params": {"ef": effort}},
            partition_names=None if cells is None else [f"c{cell}" for cell in cells],
        )
        return [[(hit["distance"], hit["id"]) for hit in hits] for hits in found]

    def cpu(self) -> float:
        idle = self._idle * (time.perf_counter() - self._since)
        return self._server.meter.cpu() - idle


@contextmanager
def _milvus(server: Milvus, keys: Keys, way: Way) -> Iterator[Graphs]:
    name = "graphs"
    server.index(name, keys, None, way.members)
    try:
        yield _MilvusGraphs(server, name)
    finally:
        server.client.drop_collection(name)
