"""The engines of the serving benchmark: a real Milvus server, and Qdrant Edge in a process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from amips_plugins.adapters.milvus.cell_index import INDEXED_FROM
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import CellIndex, LayoutSpec, Storage
from amips_plugins.export.keys import Keys
from amips_plugins.vectors import IntArray
from benchmarks.learned import Routing
from benchmarks.traffic import Meter
from integration_tests.servers import MilvusProcess

__all__ = ["Built", "Milvus", "build_edge", "quiet"]

_MILVUS_ROWS = 2_000  # in one insert
_EDGE_ROWS = 1_000
_INDEX_SECONDS = 3600.0
_QUIET = 0.1  # CPU seconds a second
_QUIET_SECONDS = 120.0
_HNSW = {"M": 16, "efConstruction": 200}


@dataclass(frozen=True)
class Built:
    """A collection that is ready to serve, and what that took.

    Attributes
    ----------
    name
        Its name, for Qdrant Edge its folder.
    seconds, cpu
        See ``Served.build``.
    """

    name: str
    seconds: float
    cpu: float


class Milvus:
    """A Milvus server of its own, that serves one collection at a time.

    As a context manager it starts the server, and removes it with its data.
    """

    def __init__(self) -> None:
        # Collections serve soon again after a restart, and nothing here pauses.
        self._server = MilvusProcess(session_ttl=5)
        self._client: Any = None
        self.empty = 0.0
        """Megabytes of a server that has loaded nothing, at the last restart."""

    def __enter__(self) -> Milvus:
        self._server.__enter__()
        self._client = MilvusClient(self._server.uri)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()
        self._server.__exit__(kind, error, traceback)

    @property
    def meter(self) -> Meter:
        """What the server has used since it was started last."""
        return Meter(self._server.pid)

    @property
    def client(self) -> Any:
        """The client of the server that runs now."""
        return self._client

    def index(
        self,
        name: str,
        keys: Keys,
        lists: int | None,
        members: IntArray | None = None,
        kind: str = "IVF_FLAT",
    ) -> Built:
        """Create a collection of unit keys, with their rows as ids.

        Parameters
        ----------
        name
            Of the collection.
        keys
            ``(n, dim)``.
        lists
            Of an index of lists, of this ``kind``; None for HNSW.
        members
            ``(n, width)`` numbers of the partitions that hold each key, called ``c0`` and so on;
            None for none.
        """
        client, meter = self._client, self.meter
        started, cpu = time.perf_counter(), meter.cpu()
        schema = client.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=keys.shape[1])
        # Strong, Milvus' other choice, would add 200 ms to every search.
        client.create_collection(name, schema=schema, consistency_level="Bounded")
        parts: list[tuple[str, IntArray]] = [("", np.arange(len(keys)))]
        if members is not None:
            numbers = range(int(members.max()) + 1)
            parts = [(f"c{one}", np.flatnonzero((members == one).any(axis=1))) for one in numbers]
        for part, rows in parts:
            if part:
                client.create_partition(name, part)
            for low in range(0, len(rows), _MILVUS_ROWS):
                some = rows[low : low + _MILVUS_ROWS]
                block = zip(some.tolist(), np.asarray(keys[some]), strict=True)
                lines = [{"id": row, "vector": vector} for row, vector in block]
                client.insert(name, lines, partition_name=part or None)
        client.flush(name)
        params = client.prepare_index_params()
        params.add_index(
            "vector",
            index_name="vector",
            index_type="HNSW" if lists is None else kind,
            metric_type="COSINE",
            params=_HNSW if lists is None else {"nlist": lists},
        )
        client.create_index(name, params)
        deadline, stored = time.monotonic() + _INDEX_SECONDS, sum(len(rows) for _, rows in parts)
        while True:
            found = client.describe_index(name, "vector")
            if found["indexed_rows"] >= stored and not found["pending_index_rows"]:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"Milvus has not indexed {name!r} within the hour.")
            time.sleep(0.2)
        self._load(name)
        return Built(name, time.perf_counter() - started, meter.cpu() - cpu)

    def lay_out(
        self, source: str, routing: Routing, storage: Storage, index: CellIndex = "flat"
    ) -> Built:
        """Copy a loaded collection into cells, searched exactly or by an index; return the copy."""
        meter = self.meter
        started, cpu = time.perf_counter(), meter.cpu()
        spec = LayoutSpec(
            routing.layout,
            routing.n_cells,
            routing.assign,
            storage=storage,
            index=index,
            lists=routing.calibration.lists,
        )
        built = self.collection(source).layouts.build(spec)
        return Built(built.info.name, time.perf_counter() - started, meter.cpu() - cpu)

    def collection(self, name: str) -> MilvusCollection:
        """Return a loaded collection."""
        return MilvusCollection(self._client, name)

    def release(self) -> None:
        """Unload every collection."""
        for name in self._client.list_collections():
            self._client.release_collection(name)

    def alone(self, name: str) -> tuple[MilvusCollection, float]:
        """Load one collection into a server that was just started.

        Returns
        -------
        tuple
            The collection, and the megabytes that it has added to the server's memory.
        """
        self.release()
        self._client.close()
        self._server.restart()
        self._server.wait_until_ready()
        self._client = MilvusClient(self._server.uri)
        quiet(self.meter)
        self.empty = self.meter.memory()
        self._load(name)
        quiet(self.meter)
        return self.collection(name), self.meter.memory() - self.empty

    def _load(self, name: str) -> None:
        """Load, and wait until searches use the index: what is not indexed is scanned whole."""
        client = self._client
        client.load_collection(name)
        (index,) = client.list_indexes(name, field_name="vector")
        if client.describe_index(name, index)["index_type"] == "FLAT":
            return  # a scan it is, and no segment ever names an index
        deadline = time.monotonic() + _INDEX_SECONDS
        while not all(  # of small segments no index is built
            part.index_name or part.num_rows < INDEXED_FROM
            for part in client.list_loaded_segments(name)
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Milvus has not loaded the index of {name!r} within the hour.")
            time.sleep(0.2)
            client.refresh_load(name)


def quiet(meter: Meter) -> float:
    """Wait until a process does nothing much; return its CPU seconds a second then."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while True:
        before, started = meter.cpu(), time.perf_counter()
        time.sleep(1.5)
        idle = (meter.cpu() - before) / (time.perf_counter() - started)
        if idle < _QUIET or time.monotonic() > deadline:
            return idle


def build_edge(folder: Path, file: Path, routing: Routing | None) -> Built:
    """Create a Qdrant Edge shard of unit keys, with their rows as ids, and close it.

    Parameters
    ----------
    folder
        Folder of shards.
    file
        The keys, ``(n, dim)`` in a ``.npy`` file.
    routing
        Cells to lay it out in, without a graph; None for HNSW.
    """
    import qdrant_edge as edge

    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    keys = np.load(file, mmap_mode="r", allow_pickle=False)
    started, cpu = time.perf_counter(), time.process_time()
    name = "hnsw" if routing is None else "cells"
    graph = edge.HnswIndexConfig(16 if routing is None else 0, 200, 10_000)
    params = edge.EdgeVectorParams(
        size=keys.shape[1], distance=edge.Distance.Cosine, hnsw_config=graph
    )
    edge.EdgeShard.create(str(folder / name), edge.EdgeConfig(vectors=params)).close()
    collection = QdrantEdgeCollection.connect(str(folder), name)
    try:
        for low in range(0, len(keys), _EDGE_ROWS):
            block = np.asarray(keys[low : low + _EDGE_ROWS])
            collection.upsert(range(low, low + len(block)), block)
        if routing is None:
            collection.optimize()
        else:
            collection.layouts.build(LayoutSpec(routing.layout, routing.n_cells, routing.assign))
    finally:
        collection.close()
    return Built(name, time.perf_counter() - started, time.process_time() - cpu)
