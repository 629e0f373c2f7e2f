"""What shard keys for cells save a Qdrant server that asks many shards, by its own counter.

Starts the program ``qdrant`` that is on PATH, in cluster mode on loopback, with hardware reporting
on. Beside cells in shard keys, as the product makes them: as many shards with random keys, fanned
out, one graph over everything, and its int8 codes with rescoring. Efforts and thresholds are chosen
on calibration queries, every setting on some of its own; what is reported are test queries, each
asked once of each method.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
from qdrant_client import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.cli.progress import show_progress
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import AmipsError
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.plan import Target
from amips_plugins.vectors import FloatArray
from benchmarks.data import Source, load
from benchmarks.learned import Routing, train_routing
from benchmarks.protocols import pose
from benchmarks.qdrant_bench import INT8, TARGETS, Bench, K, Search, Way, first_keys, recall
from integration_tests.servers import QdrantProcess

_EFFORTS = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CELL_EFFORTS = (16, 24, 32, 48, 64, 96)
_CELL_RECALL = (0.9, 0.93, 0.95, 0.965, 0.98, 0.99)
_UPLOAD = 500
_BATCH = 256

Method = Callable[[float], "tuple[str, Way] | None"]
"""Set to a recall target on calibration queries: the setting, and the way; or None."""
RESCORED = models.QuantizationSearchParams(rescore=True, oversampling=2.0)


@dataclass(frozen=True)
class Queries:
    """Calibration queries, handed out so that no setting sees another's."""

    split: Split
    each: int

    def parts(self) -> Iterator[Split]:
        """Return parts of them, again from the first when all have been handed out."""
        starts = range(0, len(self.split.queries) - self.each + 1, self.each)
        for start in itertools.cycle(starts):
            chosen = slice(start, start + self.each)
            yield replace(
                self.split, queries=self.split.queries[chosen], hits=self.split.hits[chosen]
            )


def asked(bench: Bench, name: str, params: models.SearchParams) -> Search:
    """Search a collection as it is, all of a call's queries at once."""

    def search(queries: FloatArray) -> list[list[int]]:
        if len(queries) == 1:
            one = bench.client.query_points(
                name, queries[0].tolist(), limit=K, search_params=params, with_payload=False
            )
            return [[int(point.id) for point in one.points]]
        requests = [
            models.QueryRequest(query=one.tolist(), limit=K, params=params) for one in queries
        ]
        answers = bench.client.query_batch_points(name, requests)
        return [[int(point.id) for point in one.points] for one in answers]

    return search


def smallest(make: Callable[[int], Search], target: float, parts: Iterator[Split]) -> int | None:
    """Return the smallest effort that reaches a target."""
    for effort in _EFFORTS:
        part = next(parts)
        if recall(in_batches(make(effort), part), part) >= target:
            return effort
    return None


def in_batches(search: Search, split: Split) -> list[list[int]]:
    """Ask all queries of a split, in batches."""
    found: list[list[int]] = []
    for start in range(0, len(split.queries), _BATCH):
        found += search(split.queries[start : start + _BATCH])
    return found


def routed(collection: QdrantCollection, routing: Routing, level: float, effort: int) -> Search:
    """Search cells in shard keys as the product does."""
    hook = routing.hook()

    def search(queries: FloatArray) -> list[list[int]]:
        plan = replace(hook.plan(queries, Target(K, recall=level)), effort=effort)
        found = collection.search(SearchRequest(queries, K), plan)
        return [[int(hit.id) for hit in hits] for hits in found]

    return search


def shards_asked(
    collection: QdrantCollection, routing: Routing, level: float
) -> Callable[[FloatArray], float]:
    """Count the shards that a query is routed to."""
    hook = routing.hook()

    def asked(queries: FloatArray) -> float:
        found = []
        for row in range(len(queries)):
            plan = hook.plan(queries[row : row + 1], Target(K, recall=level))
            keys = collection.asked_shards(plan)
            found.append(routing.n_cells + 1 if keys is None else len(keys))
        return float(np.mean(found))

    return asked


def cheapest(
    bench: Bench, collection: QdrantCollection, routing: Routing, target: float, queries: Queries
) -> tuple[float, int] | None:
    """Choose how many cells, and how far in each: what scores the fewest bytes at the target."""
    best: tuple[float, float, int] | None = None
    parts = queries.parts()
    for effort in _CELL_EFFORTS:
        for level in _CELL_RECALL:
            if level < target:
                continue  # cells that lose more than is allowed
            part, before = next(parts), bench.used()[1]
            found = recall(in_batches(routed(collection, routing, level, effort), part), part)
            cost = bench.used()[1] - before
            if found >= target:
                if best is None or cost < best[0]:
                    best = cost, level, effort
                break
    return None if best is None else best[1:]


def fill_shards(bench: Bench, name: str, shards: int, threshold: int) -> None:
    """Load the keys into shards at random, a graph in each."""
    vectors = models.VectorParams(size=bench.keys.shape[1], distance=models.Distance.COSINE)
    bench.client.create_collection(
        name,
        vectors,
        sharding_method=models.ShardingMethod.CUSTOM,
        shard_number=1,
        hnsw_config=models.HnswConfigDiff(full_scan_threshold=threshold),
        optimizers_config=models.OptimizersConfigDiff(
            indexing_threshold=threshold, default_segment_number=1
        ),
        wal_config=models.WalConfigDiff(wal_capacity_mb=1, wal_segments_ahead=0),
    )
    chosen = np.random.default_rng(0).integers(shards, size=len(bench.keys))
    for shard in range(shards):
        bench.client.create_shard_key(name, f"r{shard}")
        rows = np.flatnonzero(chosen == shard)
        for start in range(0, len(rows), _UPLOAD):
            some = rows[start : start + _UPLOAD].tolist()
            points = models.Batch(ids=some, vectors=bench.keys[some].tolist(), payloads=None)
            bench.client.upsert(name, points, wait=True, shard_key_selector=f"r{shard}")
    bench.wait(name)


def laid_out_in_shards(bench: Bench, routing: Routing, name: str) -> QdrantCollection:
    """Lay a collection out in shard keys, as the product does."""
    alias = bench.alias(name)
    spec = LayoutSpec(
        routing.layout,
        routing.n_cells,
        routing.assign,
        "bench",
        storage="shards",
        sizes=tuple(routing.sizes.tolist()),
        shared=routing.assignment.ndim == 2,
    )
    with bench.work("layout", "shards"):
        built = QdrantCollection(bench.client, alias).layouts.build(spec, show_progress)
        bench.wait(alias)
    assert isinstance(built, QdrantCollection)
    return built


def followed(
    bench: Bench,
    tuning: Queries,
    name: str,
    codes: models.QuantizationSearchParams | None = None,
    shards: int = 1,
) -> Method:
    """Follow the graphs of a collection as it is."""

    def make(target: float) -> tuple[str, Way] | None:
        def search(ef: int) -> Search:
            return asked(bench, name, models.SearchParams(hnsw_ef=ef, quantization=codes))

        ef = smallest(search, target, tuning.parts())
        return None if ef is None else (f"ef {ef}", Way(search(ef), lambda _: shards))

    return make


def in_shards(
    bench: Bench, tuning: Queries, collection: QdrantCollection, routing: Routing
) -> Method:
    """Route to the shards of cells."""

    def make(target: float) -> tuple[str, Way] | None:
        chosen = cheapest(bench, collection, routing, target, tuning)
        if chosen is None:
            return None
        level, effort = chosen
        way = Way(
            routed(collection, routing, level, effort), shards_asked(collection, routing, level)
        )
        return f"ef {effort}", way

    return make


def measure(
    bench: Bench,
    methods: Sequence[tuple[str, Method]],
    singles: Split,
    batches: Split,
    over_grpc: Callable[[], AbstractContextManager[None]] | None = None,
) -> None:
    """Ask the test queries of every method, set to every target; batches over gRPC, too."""
    bench.rest()
    for target in TARGETS:
        ways: dict[str, Way] = {}
        for name, make in methods:
            made = make(target)
            if made is None:
                click.echo(f"{name} does not reach {target}")
            else:
                ways[f"{name}, {made[0]}"] = made[1]
        bench.compare("single", ways, target, singles, 1)
        bench.compare("batch", ways, target, batches, _BATCH)
        if over_grpc is not None:
            with over_grpc():
                bench.compare("batch over gRPC", ways, target, batches, _BATCH)


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default=100_000, show_default=True, help="Keys, from the first.")
@click.option("--shards", default="64,16", show_default=True, help="Shards that are fanned out.")
@click.option("--spills", default="0,0.27", show_default=True, help="Copies, a layout for each.")
@click.option("--cells", default=64, show_default=True, help="Cells, a shard key for each.")
@click.option("--queries", default=2_000, show_default=True, help="Test queries.")
@click.option("--each", default=100, show_default=True, help="Calibration queries a setting.")
@click.option("--epochs", type=int, help="Of training; default the recipe's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    keys: int,
    shards: str,
    spills: str,
    cells: int,
    queries: int,
    each: int,
    epochs: int | None,
    json_file: Path | None,
    cache: Path,
) -> None:
    """Measure on DATA: a folder of arrays, pydocs, or beir:NAME."""
    settings = {"service__hardware_reporting": "true"}
    try:
        dataset = first_keys(load(Source(data, cache), show_progress), keys)
        with (
            tempfile.TemporaryDirectory(dir=dataset.cache) as work,
            QdrantProcess(settings, cluster=True) as server,
        ):
            task = pose(dataset, "unseen", 0, Path(work), show_progress)
            routings = {}
            for spill in [float(one) for one in spills.split(",")]:
                own = in_folder(task, f"spill{spill:g}")
                made = train_routing(own, cells, epochs, graphs=True, spill=spill)
                routings["routed" + (f", {1 + spill:g} times the keys" if spill else "")] = made
            client = server.address.client(timeout=600)
            bench = Bench([server], client, np.asarray(dataset.keys), [], json_file)
            run(bench, routings, task.calibrate, task.test, queries, each, shards)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc


def run(
    bench: Bench,
    routings: Mapping[str, Routing],
    calibrate: Split,
    test: Split,
    queries: int,
    each: int,
    shards: str,
) -> None:
    """Build what is compared, and compare it."""
    half = queries // 2
    singles = replace(test, queries=test.queries[:half], hits=test.hits[:half])
    batches = replace(test, queries=test.queries[half:queries], hits=test.hits[half:queries])
    tuning = Queries(calibrate, each)
    methods: list[tuple[str, Method]] = [("one graph", followed(bench, tuning, "docs"))]
    collections = []
    for number, (name, routing) in enumerate(routings.items()):
        source = f"docs{number or ''}"
        bench.fill(source)
        collections.append(laid_out_in_shards(bench, routing, source))
        methods.append((name, in_shards(bench, tuning, collections[-1], routing)))
    mean = len(bench.keys) * bench.keys.shape[1] * 4 / 1024
    for number in [int(one) for one in shards.split(",") if one]:
        name = f"random{number}"
        with bench.work("load", f"{number} random shards"):
            fill_shards(bench, name, number, max(10, int(mean / number / 4)))
        methods.append(
            (f"fan-out over {number} shards", followed(bench, tuning, name, shards=number))
        )
    with bench.work("load", "int8 codes"):
        bench.fill("codes", INT8)
    methods.append(("one graph, int8 rescored", followed(bench, tuning, "codes", RESCORED)))
    measure(bench, methods, singles, batches, lambda: asking_over_grpc(bench, *collections))


@contextmanager
def asking_over_grpc(bench: Bench, *collections: QdrantCollection) -> Iterator[None]:
    """Have collections, and the bench, ask over gRPC."""
    rest = bench.client
    bench.client = bench.nodes[0].address.client(timeout=600, prefer_grpc=True)
    for collection in collections:
        collection._client = bench.client
    try:
        yield
    finally:
        bench.client.close()
        bench.client = rest
        for collection in collections:
            collection._client = rest


def in_folder(task: TrainingTask, name: str) -> TrainingTask:
    """Return the task with a folder of its own for checkpoints."""
    work = task.work / name
    work.mkdir()
    return replace(task, work=work)


if __name__ == "__main__":
    main()
