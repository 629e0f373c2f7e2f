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

import click
import msgspec
import numpy as np

from amips_plugins.errors import InvalidInput
from amips_plugins.export.cell_graphs import Finds, joint_curves
from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.keys import Keys
from amips_plugins.vectors import BoolArray, FloatArray, IntArray
from benchmarks.engines import Milvus, quiet
from benchmarks.fanout_ways import RECALLS, FanoutRow, Way, chosen

__all__ = ["Engine", "engine", "engine_rows"]

_MANY = (10, 16, 24, 32, 48, 64, 96)
_ALL = (10, 13, 16, 20, 24, 32, 40, 48, 64)  # where nothing is chosen but the effort
_ONE = (16, 24, 32, 48, 64, 80, 100, 128, 160, 200)
_CALIBRATED = 1_000  # queries with every effort
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
    shards = []
    try:
        for cell in range(way.n_cells):
            shard = edge.EdgeShard.create(
                str(folder / str(cell)), edge.EdgeConfig(vectors=vectors, optimizers=optimizers)
            )
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
        self._idle = quiet(server.meter)
        self._since = time.perf_counter()

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


def engine_rows(
    running: Engine,
    row: Callable[..., FanoutRow],
    task: TrainingTask,
    way: Way,
    ks: Sequence[int],
    batch: int,
) -> list[FanoutRow]:
    """Measure one way on an engine, with single queries and in batches; ``row`` makes a row."""
    slots = len(ks) * len(RECALLS)
    share = len(task.test.queries) // slots
    if share <= batch:
        raise InvalidInput(
            f"{len(task.test.queries)} test queries are too few for {slots} settings with a batch "
            f"of {batch} and single queries each; pass a smaller --batch."
        )
    grid = _ONE if way.n_cells == 1 else _MANY if way.model_keys else _ALL
    efforts = [one for one in grid if one >= max(ks)]
    if not efforts:
        raise InvalidInput(f"The engines are searched for {max(_MANY)} keys at most.")
    measured = []
    with running.graphs(task.keys, way) as graphs:
        calibrate = task.calibrate
        if not running.remembers:
            calibrate = calibrate.take(np.arange(min(_CALIBRATED, len(calibrate.queries))))
        curves = _calibrated(running, graphs, way, calibrate, efforts, max(ks))
        for slot, (k, target) in enumerate((k, target) for k in ks for target in RECALLS):
            own = task.test.take(np.arange(slot * share, (slot + 1) * share))
            place = chosen(curves, efforts, k, target)
            for size in (1, batch):
                measured.append(row(k=k, target=target, batch=size))
                if place is None:
                    continue
                level = int((curves[place].mean_recall(k) >= target).argmax())
                some = own.take(np.arange(batch) if size > 1 else np.arange(batch, share))
                figures = _asked(running, graphs, way, some, level, efforts[place], k, size)
                measured[-1] = msgspec.structs.replace(
                    measured[-1], effort=efforts[place], **figures
                )
                click.echo(msgspec.json.encode(measured[-1]).decode())
    return measured


def _calibrated(
    running: Engine, graphs: Graphs, way: Way, split: Split, efforts: Sequence[int], k: int
) -> list[Curve]:
    """Search single graphs with every effort, and say what each level of the way finds so.

    What a level costs are its visits, each as dear as the mean one with that effort.
    """
    everyone = np.arange(len(split.queries))
    parts = [everyone] * len(efforts)
    if running.remembers:
        parts = np.array_split(everyone, len(efforts))
    curves = []
    for effort, rows in zip(efforts, parts, strict=True):
        some = split.take(rows)
        levels, n_levels = way.levels(some)
        visited, hit_cells, spent = levels < n_levels, way.members[some.hits], 0.0
        found = np.zeros(hit_cells.shape, dtype=np.bool_)
        for cell in range(way.n_cells):
            asking = np.flatnonzero(visited[:, cell])
            if not len(asking):
                continue
            before = graphs.cpu()
            answers = graphs.ask(some.queries[asking], [cell], k, effort)
            spent += graphs.cpu() - before
            for row, answer in zip(asking, answers, strict=True):
                there = np.isin(some.hits[row], [key for _, key in answer])
                found[row] |= there[:, None] & (hit_cells[row] == cell)
        visit = max(spent, 1e-6) / visited.sum()
        costs = (visited * np.float32(visit)).astype(np.float32)
        finds = Finds(found[None], costs[None])
        curves += joint_curves(finds, levels, n_levels, hit_cells, 0.0, 1)
    return curves


def _asked(
    running: Engine,
    graphs: Graphs,
    way: Way,
    split: Split,
    level: int,
    effort: int,
    k: int,
    batch: int,
) -> dict[str, float]:
    """Ask queries, each once, and return the figures of a row."""
    found, times = 0, []
    visited = way.levels(split)[0] <= level
    started = graphs.cpu()
    for low in range(0, len(split.queries), batch):
        rows = np.arange(low, min(low + batch, len(split.queries)))
        some = split.take(rows)
        began = time.perf_counter()
        answers = _search(running, graphs, some.queries, visited[rows], k, effort)
        times.append(time.perf_counter() - began)
        for answer, true in zip(answers, some.hits[:, :k].tolist(), strict=True):
            found += len({*answer} & {*true})
    count = len(split.queries)
    return {
        "recall": found / (k * count),
        "cpu_s_per_1000": (graphs.cpu() - started) / count * 1e3,
        "p50_ms": float(np.median(times)) * 1e3,
        "graphs": int(visited.sum()) / count,
    }


def _search(
    running: Engine, graphs: Graphs, queries: FloatArray, visited: BoolArray, k: int, effort: int
) -> list[list[int]]:
    """Ask every query's graphs, and merge what they answer: of a key with copies the best."""
    found: list[Scored] = [[] for _ in queries]
    everyone: IntArray = np.arange(len(queries))
    calls: list[tuple[list[int] | None, IntArray]]
    if visited.all():
        calls = [(None, everyone)]
    elif len(queries) == 1:
        calls = [(np.flatnonzero(visited[0]).tolist(), everyone)]
    else:
        by_cell = ((cell, np.flatnonzero(visited[:, cell])) for cell in range(visited.shape[1]))
        calls = [([cell], asking) for cell, asking in by_cell if len(asking)]
    for cells, asking in calls:
        answers = graphs.ask(queries[asking], cells, k, effort)
        for row, answer in zip(asking.tolist(), answers, strict=True):
            found[row] += answer
    if running.together and len(calls) == 1:
        return [[key for _, key in answer] for answer in found]
    best = []
    for answer in found:
        keys = dict.fromkeys(key for _, key in sorted(answer, key=lambda one: -one[0]))
        best.append(list(keys)[:k])
    return best
