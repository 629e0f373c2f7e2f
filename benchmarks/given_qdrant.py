"""Qdrant servers that hold a graph for each partition: for values of a key, and in shard keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from typing_extensions import Self

from amips_plugins.collection import Collection
from amips_plugins.partitions import Partitions
from amips_plugins.vectors import FloatArray, IntArray
from benchmarks.given_engines import (
    BUILD,
    LINKS,
    ROWS,
    Asked,
    Edge,
    Engine,
    K,
    Milvus,
    best,
    named,
    wait,
)
from benchmarks.traffic import Meter

__all__ = ["ENGINES", "QdrantGraphs", "QdrantShards"]

THRESHOLD = 10  # kilobytes, above which Qdrant builds a graph


class QdrantGraphs(Engine):
    """A Qdrant collection with a graph for each value of a key; a search a value, in one batch."""

    cluster: ClassVar[bool] = False

    def __enter__(self) -> Self:
        """Start a server."""
        from integration_tests.servers import QdrantProcess

        super().__enter__()
        settings = {"service__hardware_reporting": "true"}
        self.server = self.stack.enter_context(QdrantProcess(settings, cluster=self.cluster))
        self.connect(self.server.address.client(timeout=600))
        return self

    def connect(self, client: Any) -> None:
        """Ask through a client, which leaving closes."""
        self.client = client
        self.stack.callback(client.close)

    def _create(self, name: str, dim: int, links: int, inside: int, **more: Any) -> None:
        from qdrant_client import models

        graph = models.HnswConfigDiff(
            m=links, payload_m=inside, ef_construct=BUILD, full_scan_threshold=THRESHOLD
        )
        self.client.create_collection(
            name,
            models.VectorParams(size=dim, distance=models.Distance.COSINE),
            hnsw_config=graph,
            optimizers_config=models.OptimizersConfigDiff(
                indexing_threshold=THRESHOLD, default_segment_number=1
            ),
            **more,
        )

    def _write(self, name: str, keys: FloatArray, rows: IntArray, cells: Any, **more: Any) -> None:
        from qdrant_client import models

        for low in range(0, len(rows), ROWS):
            some = rows[low : low + ROWS].tolist()
            payloads = None if cells is None else [{"part": named(cells[row])} for row in some]
            points = models.Batch(ids=some, vectors=keys[some].tolist(), payloads=payloads)
            self.client.upsert(name, points, wait=True, **more)

    def _green(self, name: str) -> None:
        from qdrant_client import models

        calm = 0

        def green() -> bool:
            nonlocal calm
            now = self.client.get_collection(name).status is models.CollectionStatus.GREEN
            calm = calm + 1 if now else 0
            return calm > 2

        wait(green, name)

    def load(self, keys: FloatArray, cells: IntArray) -> None:
        """Load, and wait for the graphs."""
        from qdrant_client import models

        rows = np.arange(len(keys))
        self._create("whole", keys.shape[1], LINKS, 0)
        self._write("whole", keys, rows, None)
        self.values = tuple(named(cell) for cell in np.unique(cells))
        self._create("cut", keys.shape[1], 0, LINKS)
        self.client.create_payload_index("cut", "part", models.PayloadSchemaType.KEYWORD)
        self._write("cut", keys, rows, cells)
        for name in ("whole", "cut"):
            self._green(name)

    def _requests(self, query: FloatArray, asked: Asked) -> list[Any]:
        from qdrant_client import models

        nearest = query.tolist()
        return [
            models.QueryRequest(
                query=nearest,
                filter=models.Filter(
                    must=[
                        models.FieldCondition(
                            key="part", match=models.MatchValue(value=named(cell))
                        )
                    ]
                ),
                params=models.SearchParams(hnsw_ef=effort),
                limit=min(K, effort),
            )
            for cell, effort in asked
        ]

    def ask(self, query: FloatArray, asked: Asked) -> list[int]:
        """Search value by value, in one batch."""
        answers = self.client.query_batch_points("cut", self._requests(query, asked))
        return best([(one.score, int(one.id)) for found in answers for one in found.points])

    def whole(self, query: FloatArray, effort: int) -> list[int]:
        """Search the collection with one graph."""
        from qdrant_client import models

        params = models.SearchParams(hnsw_ef=effort)
        found = self.client.query_points("whole", query.tolist(), limit=K, search_params=params)
        return [int(one.id) for one in found.points]

    def _partitions(self) -> Partitions:
        return Partitions("part", self.values)

    def cut(self) -> tuple[Collection, Callable[[int], dict[str, Any]]]:
        """Return the collection in its values."""
        from amips_plugins.adapters.qdrant.collection import QdrantCollection

        seen = QdrantCollection(self.client, "cut").partitioned(self._partitions())
        return seen, lambda effort: {"hnsw_ef": effort}

    def cpu(self) -> float:
        """Return the server's."""
        return Meter(self.server.pid).cpu()

    def scored(self) -> float:
        """Return what the server's own counter says."""
        total = 0.0
        for line in self.server.address.ask("/metrics").decode().splitlines():
            if line.startswith("collection_hardware_metric_cpu"):
                total += float(line.rsplit(" ", 1)[1])
        return total / 1e6


class QdrantShards(QdrantGraphs):
    """A Qdrant collection with a shard key for each part; a search names those of one effort."""

    cluster = True
    efforts = Milvus.efforts

    def load(self, keys: FloatArray, cells: IntArray) -> None:
        """Load, and wait for the graphs."""
        from qdrant_client import models

        self._create("whole", keys.shape[1], LINKS, 0)
        self._write("whole", keys, np.arange(len(keys)), None)
        self.values = tuple(named(cell) for cell in np.unique(cells))
        self._create(
            "cut",
            keys.shape[1],
            LINKS,
            0,
            sharding_method=models.ShardingMethod.CUSTOM,
            shard_number=1,
            wal_config=models.WalConfigDiff(wal_capacity_mb=1, wal_segments_ahead=0),
        )
        for cell in np.unique(cells).tolist():
            self.client.create_shard_key("cut", named(cell))
            rows = np.flatnonzero(cells == cell)
            self._write("cut", keys, rows, None, shard_key_selector=named(cell))
        for name in ("whole", "cut"):
            self._green(name)

    def _requests(self, query: FloatArray, asked: Asked) -> list[Any]:
        from qdrant_client import models

        return [
            models.QueryRequest(
                query=query.tolist(),
                shard_key=[named(cell) for cell, effort in asked if effort == one],
                params=models.SearchParams(hnsw_ef=one),
                limit=K,
            )
            for one in sorted({effort for _, effort in asked})
        ]

    def _partitions(self) -> Partitions:
        return Partitions(None, self.values)


ENGINES: dict[str, type[Engine]] = {
    "milvus": Milvus,
    "qdrant-graphs": QdrantGraphs,
    "qdrant-shards": QdrantShards,
    "edge": Edge,
}
"""All that can be measured, by name."""
