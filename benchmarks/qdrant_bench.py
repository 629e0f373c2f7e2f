"""What the benchmarks on a Qdrant server share: a server, what it has used, and rows of figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.export.dataset import Split
from amips_plugins.files import replace_file
from amips_plugins.plan import NATIVE
from amips_plugins.vectors import FloatArray
from benchmarks.data import Dataset
from benchmarks.traffic import Meter
from integration_tests.servers import QdrantProcess

__all__ = [
    "INT8",
    "TARGETS",
    "Bench",
    "K",
    "Measured",
    "Search",
    "first_keys",
    "native",
    "recall",
    "tuned",
]

K = 10
TARGETS = (0.9, 0.95, 0.98)
INT8 = models.ScalarQuantization(
    scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
)
_EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_UPLOAD = 500
_READY = 3600.0

Search = Callable[[FloatArray], list[list[int]]]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One method in one situation.

    Attributes
    ----------
    situation, method
        What was asked, and how.
    target
        Recall@10 that it was set to; None where there was nothing to set.
    recall
        Recall@10 on the test queries; None for work that answers none.
    server_cpu_ms, mb_scored
        The server's CPU, less what it uses when idle, and the bytes of vectors that it counts as
        scored, per query (of a layout: in all).
    client_cpu_ms, p50_ms
        CPU of the asking thread, and the median of a call, per query; of a layout the seconds.
    batch
        Queries in a call.
    keys
        Keys in the collection.
    queries
        Test queries asked.
    """

    situation: str
    method: str
    target: float | None
    recall: float | None
    server_cpu_ms: float
    mb_scored: float
    client_cpu_ms: float
    p50_ms: float
    batch: int
    keys: int
    queries: int = 0


@dataclass
class Bench:
    """The nodes of a server, a client of the first, and the rows that were measured on it."""

    nodes: Sequence[QdrantProcess]
    client: QdrantClient
    keys: FloatArray
    rows: list[Measured]
    file: Path | None
    idle: float = 0.0  # CPU seconds a second

    def rest(self, seconds: float = 15.0) -> None:
        """Measure what it uses when nobody asks: a shard is looked after by itself."""
        before, began = self.used()[0], time.perf_counter()
        time.sleep(seconds)
        self.idle = (self.used()[0] - before) / (time.perf_counter() - began)

    def add(self, row: Measured) -> None:
        """Keep a row, on disk too."""
        self.rows.append(row)
        click.echo(
            f"{row.situation:<16} {row.method:<28} {row.target or '':<5} "
            f"{'' if row.recall is None else format(row.recall, '.3f'):<6} "
            f"{row.server_cpu_ms:10.2f} ms {row.mb_scored:10.2f} MB {row.client_cpu_ms:8.2f} ms"
        )
        if self.file is not None:
            replace_file(self.file, msgspec.json.format(msgspec.json.encode(self.rows)))

    def used(self) -> tuple[float, float]:
        """Return the nodes' CPU seconds, and the megabytes they have scored, since they started.

        A node that asks another counts what that one has scored, too.
        """
        scored = seconds = 0.0
        for node in self.nodes:
            seconds += Meter(node.pid).cpu()
            for line in node.address.ask("/metrics").decode().splitlines():
                if line.startswith("collection_hardware_metric_cpu"):
                    scored += float(line.rsplit(" ", 1)[1])
        return seconds, scored / 1e6

    @contextmanager
    def work(self, situation: str, method: str) -> Any:
        """Measure what a piece of work costs the server."""
        before, began = self.used(), time.perf_counter()
        yield
        after, seconds = self.used(), time.perf_counter() - began
        self.add(
            Measured(
                situation=situation,
                method=method,
                target=None,
                recall=None,
                server_cpu_ms=1e3 * (after[0] - before[0]),
                mb_scored=after[1] - before[1],
                client_cpu_ms=0.0,
                p50_ms=1e3 * seconds,
                batch=0,
                keys=len(self.keys),
            )
        )

    def examine(
        self,
        situation: str,
        method: str,
        target: float | None,
        search: Search,
        split: Split,
        batch: int,
    ) -> None:
        """Ask every query once, and keep what that took."""
        found: list[list[int]] = []
        taken = []
        before, thread, first = self.used(), time.thread_time(), time.perf_counter()
        for start in range(0, len(split.queries), batch):
            began = time.perf_counter()
            found += search(split.queries[start : start + batch])
            taken.append((time.perf_counter() - began) / batch)
        mine, after, n = time.thread_time() - thread, self.used(), len(split.queries)
        idle = self.idle * (time.perf_counter() - first)
        self.add(
            Measured(
                situation=situation,
                method=method,
                target=target,
                recall=recall(found, split),
                server_cpu_ms=1e3 * (after[0] - before[0] - idle) / n,
                mb_scored=(after[1] - before[1]) / n,
                client_cpu_ms=1e3 * mine / n,
                p50_ms=1e3 * float(np.median(taken)),
                batch=batch,
                keys=len(self.keys),
                queries=n,
            )
        )

    def fill(
        self, name: str, codes: models.ScalarQuantization | None = None, **options: Any
    ) -> None:
        """Create a collection, with quantised codes if wanted, and load the keys into it."""
        vectors = models.VectorParams(size=self.keys.shape[1], distance=models.Distance.COSINE)
        self.client.create_collection(
            name,
            vectors,
            optimizers_config=models.OptimizersConfigDiff(
                indexing_threshold=1000, default_segment_number=2
            ),
            quantization_config=codes,
            **options,
        )
        for start in range(0, len(self.keys), _UPLOAD):
            some = self.keys[start : start + _UPLOAD]
            ids = range(start, start + len(some))
            points = models.Batch(ids=list(ids), vectors=some.tolist(), payloads=None)
            self.client.upsert(name, points, wait=True)
        self.wait(name)

    def wait(self, name: str) -> None:
        """Wait until nothing is left to optimise."""
        deadline = time.monotonic() + _READY
        calm = 0
        while calm < 3:
            green = self.client.get_collection(name).status is models.CollectionStatus.GREEN
            calm = calm + 1 if green else 0
            if time.monotonic() > deadline:
                raise click.ClickException(f"{name} is not optimised after an hour.")
            time.sleep(0.5)

    def alias(self, name: str) -> str:
        """Give a collection an alias."""
        made = models.CreateAlias(collection_name=name, alias_name=f"{name}_live")
        self.client.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])
        return f"{name}_live"


def recall(found: Sequence[Sequence[int]], split: Split) -> float:
    """Return mean recall@10."""
    pairs = zip(found, split.hits[: len(found), :K].tolist(), strict=True)
    return float(np.mean([len(set(one) & set(true)) / K for one, true in pairs]))


def first_keys(dataset: Dataset, keys: int) -> Dataset:
    """Return a dataset of the first keys, whose exact answers are kept apart."""
    if keys >= len(dataset.keys):
        return dataset
    cache = dataset.cache.with_name(f"{dataset.cache.name}-{keys}")
    cache.mkdir(exist_ok=True)
    return replace(dataset, name=f"{dataset.name}-{keys}", keys=dataset.keys[:keys], cache=cache)


def native(collection: QdrantCollection, ef: int) -> Search:
    """Search the graph."""

    def search(queries: FloatArray) -> list[list[int]]:
        found = collection.search(SearchRequest(queries, K, params={"hnsw_ef": ef}), NATIVE)
        return [[int(hit.id) for hit in hits] for hits in found]

    return search


def tuned(make: Callable[[int], Search], target: float, split: Split) -> int | None:
    """Return the smallest effort that reaches a target; every effort has queries of its own."""
    parts = np.array_split(np.arange(len(split.queries)), len(_EFFORTS))
    for effort, part in zip(_EFFORTS, parts, strict=True):
        some = replace(split, queries=split.queries[part], hits=split.hits[part])
        if recall(make(effort)(some.queries), some) >= target:
            return effort
    return None
