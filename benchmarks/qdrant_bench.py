"""What the benchmarks on a Qdrant server share: a server, what it has used, and rows of figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

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
from integration_tests.servers import QdrantAddress

__all__ = [
    "INT8",
    "TARGETS",
    "Bench",
    "K",
    "Measured",
    "Node",
    "Running",
    "Search",
    "Way",
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
_SLOW = 120.0  # seconds for a page of a server that has much else to do

_TURN = 64  # single searches of one way before it is the next one's turn
_COUNTER = "collection_hardware_metric_cpu"

Search = Callable[[FloatArray], list[list[int]]]


@dataclass(frozen=True)
class Way:
    """A way to search, and how many shards it asks for a query, on average."""

    search: Search
    shards: Callable[[FloatArray], float] = lambda _: 1.0


class Node(Protocol):
    """A server, and its process if that is on this machine."""

    @property
    def address(self) -> QdrantAddress:
        """Where it answers."""

    @property
    def pid(self) -> int | None:
        """Its process."""


@dataclass(frozen=True)
class Running:
    """A server that somebody else has started."""

    address: QdrantAddress
    pid: int | None


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
        scored, per query (of a layout: in all); null where its process, or counter, is not to be
        seen.
    client_cpu_ms, p50_ms
        CPU of the asking thread, and the median of a call, per query; of a layout the seconds.
    batch
        Queries in a call.
    shards
        Shards that a query asks, on average.
    keys
        Keys in the collection.
    queries
        Test queries asked.
    """

    situation: str
    method: str
    target: float | None
    recall: float | None
    server_cpu_ms: float | None
    mb_scored: float | None
    client_cpu_ms: float
    p50_ms: float
    batch: int
    shards: float = 1.0
    keys: int
    queries: int = 0


@dataclass
class _Taken:
    """What one way has taken until now."""

    server: float = 0.0
    scored: float = 0.0
    client: float = 0.0
    calls: list[float] = field(default_factory=list)
    found: list[list[int]] = field(default_factory=list)


@dataclass
class Bench:
    """The nodes of a server, a client of the first, and the rows that were measured on it.

    The ``names`` of all collections begin alike; where not empty, nothing else is looked at.
    """

    nodes: Sequence[Node]
    client: QdrantClient
    keys: FloatArray
    rows: list[Measured]
    file: Path | None
    idle: float = 0.0  # CPU seconds a second
    names: str = ""

    def rest(self, seconds: float = 15.0) -> None:
        """Measure what it uses when nobody asks: a shard is looked after by itself."""
        before, began = self.used()[0], time.perf_counter()
        time.sleep(seconds)
        self.idle = (self.used()[0] - before) / (time.perf_counter() - began)

    def add(self, row: Measured) -> None:
        """Keep a row, on disk too."""
        self.rows.append(row)
        numbers = row.server_cpu_ms, row.mb_scored, row.client_cpu_ms
        cpu, scored, mine = ["?" if one is None else format(one, ".2f") for one in numbers]
        click.echo(
            f"{row.situation:<16} {row.method:<28} {row.target or '':<5} "
            f"{'' if row.recall is None else format(row.recall, '.3f'):<6} "
            f"{cpu:>10} ms {scored:>10} MB {mine:>8} ms {row.shards:6.1f} shards"
        )
        if self.file is not None:
            replace_file(self.file, msgspec.json.format(msgspec.json.encode(self.rows)))

    def used(self) -> tuple[float, float]:
        """Return the nodes' CPU seconds, and the megabytes they have scored, since they started.

        NaN where that is not to be seen.
        """
        return self.cpu(), self.scored()

    def cpu(self) -> float:
        """Return the nodes' CPU seconds."""
        return sum(np.nan if node.pid is None else Meter(node.pid).cpu() for node in self.nodes)

    def scored(self) -> float:
        """Return the megabytes scored; a node that asks another counts what that one has, too."""
        scored = 0.0
        for node in self.nodes:
            lines = node.address.ask("/metrics", timeout=_SLOW).decode().splitlines()
            told = [line for line in lines if line.startswith(_COUNTER)]
            ours = [float(line.rsplit(" ", 1)[1]) for line in told if self.names in line]
            scored += np.nan if self.names and not told else sum(ours)
        return scored / 1e6

    @contextmanager
    def work(self, situation: str, method: str) -> Iterator[None]:
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
                server_cpu_ms=_seen(1e3 * (after[0] - before[0])),
                mb_scored=_seen(after[1] - before[1]),
                client_cpu_ms=0.0,
                p50_ms=1e3 * seconds,
                batch=0,
                keys=len(self.keys),
            )
        )

    def compare(
        self,
        situation: str,
        ways: Mapping[str, Way],
        target: float | None,
        split: Split,
        batch: int,
    ) -> None:
        """Ask every query once of every way, and keep what that took.

        They take turns, so that whatever else the machine does meets all of them.
        """
        taken = {name: _Taken() for name in ways}
        step, names = max(batch, _TURN), list(ways)
        for turn, start in enumerate(range(0, len(split.queries), step)):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                some = split.queries[start : start + step]
                self._ask(ways[name].search, some, batch, taken[name])
        n = len(split.queries)
        for name, one in taken.items():
            self.add(
                Measured(
                    situation=situation,
                    method=name,
                    target=target,
                    recall=recall(one.found, split) if any(one.found) else None,
                    server_cpu_ms=_seen(1e3 * one.server / n),
                    mb_scored=_seen(one.scored / n),
                    client_cpu_ms=1e3 * one.client / n,
                    p50_ms=1e3 * float(np.median(one.calls)),
                    batch=batch,
                    shards=ways[name].shards(split.queries),
                    keys=len(self.keys),
                    queries=n,
                )
            )

    def _ask(self, search: Search, queries: FloatArray, batch: int, taken: _Taken) -> None:
        scored, cpu = self.scored(), self.cpu()  # to say the first costs the server, too
        thread, first = time.thread_time(), time.perf_counter()
        for start in range(0, len(queries), batch):
            some, began = queries[start : start + batch], time.perf_counter()
            taken.found += search(some)
            taken.calls.append((time.perf_counter() - began) / len(some))
        taken.client += time.thread_time() - thread
        idle = self.idle * (time.perf_counter() - first)
        taken.server += self.cpu() - cpu - idle
        taken.scored += self.scored() - scored

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


def _seen(number: float) -> float | None:
    return None if np.isnan(number) else number


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
