"""Engines that hold a graph for each partition: what loads them, and what asks some of them.

Every engine is asked one query a call. A query comes with a noise of a millionth each time it is
asked, for Milvus 2.3.5 remembers queries, and finds more when it is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import click
import numpy as np
from typing_extensions import Self

from amips_plugins.adapters.several.collection import SeveralCollections
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray
from benchmarks.traffic import Meter

__all__ = ["Asked", "Edge", "Engine", "K", "Milvus", "best", "named", "wait"]

K = 10
ROWS = 500  # in one write
LINKS, BUILD = 16, 100  # HNSW's M and efConstruction, everywhere
THRESHOLD = 10  # kilobytes, above which Qdrant builds a graph
PATIENCE = 1800.0

Asked = Sequence[tuple[int, int]]
"""The partitions that a query asks, each with an effort (HNSW's ef)."""


def named(cell: int) -> str:
    """Return a partition's name; names sort as their numbers."""
    return f"part{cell:04d}"


def best(answers: Sequence[tuple[float, int]]) -> list[int]:
    """Return the ids of the best answers; a larger score is better."""
    return [key for _, key in sorted(answers, reverse=True)[:K]]


@dataclass
class Engine:
    """An engine with the keys in partitions, and all of them once more in one graph.

    Attributes
    ----------
    folder
        A folder of its own.
    own_efforts
        Whether a search may follow each partition's graph as far as it pays there.
    efforts
        That are tried. Below 10 a partition is asked for as many hits as its effort.
    """

    folder: Path
    own_efforts: ClassVar[bool] = True
    efforts: ClassVar[tuple[int, ...]] = (3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96)

    def load(self, keys: FloatArray, cells: IntArray) -> None:
        """Load the keys, with their rows as ids."""
        raise NotImplementedError

    def ask(self, query: FloatArray, asked: Asked) -> list[int]:
        """Search some partitions, each with its effort."""
        raise NotImplementedError

    def whole(self, query: FloatArray, effort: int) -> list[int]:
        """Search the one graph."""
        raise NotImplementedError

    def cut(self) -> tuple[Collection, Callable[[int], dict[str, Any]]]:
        """Return the collection in its partitions, and how it is told an effort."""
        raise NotImplementedError

    def cpu(self) -> float:
        """Return the CPU seconds used so far."""
        raise NotImplementedError

    def scored(self) -> float:
        """Return the megabytes of vectors that the engine counts as scored so far."""
        return float("nan")

    def as_product(self) -> Callable[[FloatArray, Asked], list[int]]:
        """Return a search by the product: the best partitions by a plan, with one effort."""
        collection, params = self.cut()
        layout = collection.layout()

        def search(query: FloatArray, asked: Asked) -> list[int]:
            cells = np.array([[cell for cell, _ in asked]])
            request = SearchRequest(query[None], K, params=params(max(e for _, e in asked)))
            (hits,) = collection.search(request, QueryPlan(cells=cells, layout=layout))
            return [int(hit.id) for hit in hits]

        return search

    def __enter__(self) -> Self:
        """Start it."""
        self.stack = ExitStack()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stack.close()


class Milvus(Engine):
    """Milvus partitions, HNSW in those of 1,024 rows or more; a call names some, with one ef."""

    own_efforts = False
    efforts = (10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64, 96, 128)

    def __enter__(self) -> Self:
        """Start a server."""
        from pymilvus import MilvusClient

        from integration_tests.servers import MilvusProcess

        super().__enter__()
        self.server = self.stack.enter_context(MilvusProcess(session_ttl=5))
        self.client: Any = MilvusClient(self.server.uri)
        self.stack.callback(self.client.close)
        return self

    def load(self, keys: FloatArray, cells: IntArray) -> None:
        """Load, index, and wait until searches use the graphs."""
        self._create("whole", keys)
        self._insert("whole", keys, np.arange(len(keys)), None)
        self._create("cut", keys)
        self.values = tuple(named(cell) for cell in np.unique(cells))
        for cell in np.unique(cells).tolist():
            self.client.create_partition("cut", named(cell))
            self._insert("cut", keys, np.flatnonzero(cells == cell), named(cell))
        for name in ("whole", "cut"):
            self._index(name, len(keys))

    def _create(self, name: str, keys: FloatArray) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=keys.shape[1])
        self.client.create_collection(name, schema=schema, consistency_level="Bounded")

    def _insert(self, name: str, keys: FloatArray, rows: IntArray, partition: str | None) -> None:
        for low in range(0, len(rows), 4 * ROWS):
            some = rows[low : low + 4 * ROWS].tolist()
            records = [{"id": row, "vector": keys[row]} for row in some]
            self.client.insert(name, records, partition_name=partition)

    def _index(self, name: str, count: int) -> None:
        client, index = self.client, self.client.prepare_index_params()
        client.flush(name)
        build = {"M": LINKS, "efConstruction": BUILD}
        index.add_index(
            "vector", index_name="vector", index_type="HNSW", metric_type="COSINE", params=build
        )
        client.create_index(name, index)
        wait(lambda: client.describe_index(name, "vector")["indexed_rows"] >= count, name)
        client.load_collection(name)

        def loaded() -> bool:
            client.refresh_load(name)
            parts = client.list_loaded_segments(name)
            large = [part for part in parts if part.num_rows >= 1024]
            return sum(p.num_rows for p in parts) >= count and all(p.index_name for p in large)

        wait(loaded, name)

    def _search(self, name: str, query: FloatArray, effort: int, parts: list[str] | None) -> Any:
        params = {"metric_type": "COSINE", "params": {"ef": max(effort, K)}}
        (hits,) = self.client.search(
            name,
            data=[query],
            anns_field="vector",
            limit=K,
            output_fields=["id"],
            search_params=params,
            partition_names=parts,
        )
        return [int(hit["id"]) for hit in hits]

    def ask(self, query: FloatArray, asked: Asked) -> list[int]:
        """Name the partitions in one call."""
        effort = max(effort for _, effort in asked)
        found: list[int] = self._search("cut", query, effort, [named(cell) for cell, _ in asked])
        return found

    def whole(self, query: FloatArray, effort: int) -> list[int]:
        """Search the collection without partitions."""
        found: list[int] = self._search("whole", query, effort, None)
        return found

    def cut(self) -> tuple[Collection, Callable[[int], dict[str, Any]]]:
        """Return the collection in its partitions."""
        from amips_plugins.adapters.milvus.collection import MilvusCollection

        seen = MilvusCollection(self.client, "cut").partitioned(Partitions(None, self.values))
        return seen, lambda effort: {"params": {"ef": max(effort, K)}}

    def cpu(self) -> float:
        """Return the server's."""
        return Meter(self.server.pid).cpu()


class Edge(Engine):
    """A Qdrant Edge shard for each part, in this process; a call for each."""

    def load(self, keys: FloatArray, cells: IntArray) -> None:
        """Load, and build the graphs."""
        self.values = tuple(named(cell) for cell in np.unique(cells))
        self.shards = [
            self._shard(named(cell), keys, np.flatnonzero(cells == cell))
            for cell in np.unique(cells).tolist()
        ]
        self.one = self._shard("whole", keys, np.arange(len(keys)))

    def _shard(self, name: str, keys: FloatArray, rows: IntArray) -> Any:
        import qdrant_edge as edge

        from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

        params = edge.EdgeVectorParams(
            size=keys.shape[1],
            distance=edge.Distance.Cosine,
            hnsw_config=edge.HnswIndexConfig(LINKS, BUILD, THRESHOLD),
        )
        small = edge.EdgeOptimizersConfig(indexing_threshold=THRESHOLD, default_segment_number=1)
        place = str(self.folder / name)
        edge.EdgeShard.create(place, edge.EdgeConfig(vectors=params, optimizers=small)).close()
        collection = QdrantEdgeCollection.connect(str(self.folder), name)
        self.stack.callback(collection.close)
        for low in range(0, len(rows), 2 * ROWS):
            some = rows[low : low + 2 * ROWS]
            collection.upsert(some.tolist(), keys[some])
        collection.optimize()
        return collection

    def _search(self, shard: Any, query: FloatArray, effort: int) -> list[tuple[float, int]]:
        import qdrant_edge as edge

        request = edge.QueryRequest(
            min(K, effort),
            query=edge.Query.Nearest(query.tolist()),
            params=edge.SearchParams(hnsw_ef=effort),
        )
        return [(one.score, int(one.id)) for one in shard._shard.engine.query(request)]

    def ask(self, query: FloatArray, asked: Asked) -> list[int]:
        """Search shard by shard."""
        answers = [self._search(self.shards[cell], query, effort) for cell, effort in asked]
        return best([one for answer in answers for one in answer])

    def whole(self, query: FloatArray, effort: int) -> list[int]:
        """Search the one shard of all keys."""
        return best(self._search(self.one, query, effort))

    def cut(self) -> tuple[Collection, Callable[[int], dict[str, Any]]]:
        """Return the shards as one collection."""
        members: dict[str, Collection] = dict(zip(self.values, self.shards, strict=True))
        seen = SeveralCollections(members).partitioned(Partitions(None, self.values))
        return seen, lambda effort: {"hnsw_ef": effort}

    def cpu(self) -> float:
        """Return this process' own."""
        return time.process_time()


def wait(done: Callable[[], bool], name: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise click.ClickException(f"{name} was not ready after {PATIENCE:.0f} s.")
        time.sleep(0.3)
