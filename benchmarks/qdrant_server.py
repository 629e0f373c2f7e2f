"""What cells cost a Qdrant server, by its own counter: single searches, batches and layouts.

Starts the program ``qdrant`` that is on PATH, on loopback, with hardware reporting on. Efforts and
thresholds are chosen on calibration queries; what is reported are test queries, each asked once of
each method.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import numpy as np
from qdrant_client import QdrantClient, models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.search import empty, has_cell
from amips_plugins.cell_layout import LayoutSpec, Storage
from amips_plugins.cli.progress import show_progress
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import AmipsError
from amips_plugins.export.dataset import Split
from amips_plugins.files import replace_file
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.vectors import FloatArray
from benchmarks.data import Source, load
from benchmarks.learned import Routing, train_routing
from benchmarks.protocols import pose
from benchmarks.traffic import Meter
from integration_tests.servers import QdrantProcess

K = 10
_TARGETS = (0.9, 0.95, 0.98)
_EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_UPLOAD = 500
_READY = 3600.0
_SLOW = 120.0  # seconds for a search while everything else is going on

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
        The server's CPU, and the bytes of vectors that it counts as scored, per query (of a layout:
        in all).
    client_cpu_ms, p50_ms
        CPU of the asking thread, and the median of a call, per query; of a layout the seconds.
    batch
        Queries in a call.
    keys
        Keys in the collection.
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


@dataclass
class Bench:
    """A server and the rows that were measured on it."""

    server: QdrantProcess
    client: QdrantClient
    keys: FloatArray
    rows: list[Measured]
    file: Path | None

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
        """Return the server's CPU seconds, and the megabytes it has scored, since it started."""
        scored = 0.0
        for line in self.server.address.ask("/metrics").decode().splitlines():
            if line.startswith("collection_hardware_metric_cpu"):
                scored += float(line.rsplit(" ", 1)[1])
        return Meter(self.server.pid).cpu(), scored / 1e6

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
        before, thread = self.used(), time.thread_time()
        for start in range(0, len(split.queries), batch):
            began = time.perf_counter()
            found += search(split.queries[start : start + batch])
            taken.append((time.perf_counter() - began) / batch)
        mine, after, n = time.thread_time() - thread, self.used(), len(split.queries)
        self.add(
            Measured(
                situation=situation,
                method=method,
                target=target,
                recall=recall(found, split),
                server_cpu_ms=1e3 * (after[0] - before[0]) / n,
                mb_scored=(after[1] - before[1]) / n,
                client_cpu_ms=1e3 * mine / n,
                p50_ms=1e3 * float(np.median(taken)),
                batch=batch,
                keys=len(self.keys),
            )
        )

    def fill(self, name: str, codes: models.ScalarQuantization | None = None) -> None:
        """Create a collection, with quantised codes if wanted, and load the keys into it."""
        vectors = models.VectorParams(size=self.keys.shape[1], distance=models.Distance.COSINE)
        self.client.create_collection(
            name,
            vectors,
            optimizers_config=models.OptimizersConfigDiff(
                indexing_threshold=1000, default_segment_number=2
            ),
            quantization_config=codes,
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


def planned(routing: Routing, target: float) -> Callable[[FloatArray], QueryPlan]:
    """Choose cells as a router does."""
    hook = routing.hook()
    return lambda queries: hook.plan(queries, Target(K, recall=target))


def routed(
    collection: QdrantCollection, plan: Callable[[FloatArray], QueryPlan], grouped: bool = True
) -> Search:
    """Search cells as the product does; not grouped, with a filter for every query."""

    def search(queries: FloatArray) -> list[list[int]]:
        request, chosen = SearchRequest(queries, K), plan(queries)
        if grouped:
            found = collection.search(request, chosen)
            return [[int(hit.id) for hit in hits] for hits in found]
        answers = collection._client.query_batch_points(
            collection.info.name, collection.queries(request, chosen)
        )
        return [[int(point.id) for point in one.points] for one in answers]

    return search


def before(
    collection: QdrantCollection, record: LayoutRecord, plan: Callable[[FloatArray], QueryPlan]
) -> Search:
    """Search cells as releases before this one did: two alternatives, and always exactly."""
    exact = models.SearchParams(exact=True)

    def search(queries: FloatArray) -> list[list[int]]:
        chosen = plan(queries)
        assert chosen.cells is not None
        assert chosen.shares is not None
        asked = []
        for row, cells in enumerate(chosen.cells.tolist()):
            wanted = [cell for cell in cells if cell >= 0]
            alternatives = models.Filter(should=[empty(record.key), has_cell(record.key, wanted)])
            everything = chosen.shares[row] > collection.break_even
            asked.append(
                models.QueryRequest(
                    query=queries[row].tolist(),
                    filter=None if everything else alternatives,
                    params=exact,
                    limit=K,
                )
            )
        answers = collection._client.query_batch_points(collection.info.name, asked)
        return [[int(point.id) for point in one.points] for one in answers]

    return search


class Bystander:
    """Others' plain searches while something else happens: what one scores, at worst."""

    def __init__(self, bench: Bench, name: str, queries: FloatArray) -> None:
        self.worst = 0.0
        self.slowest = 0.0
        self._bench, self._name, self._queries = bench, name, queries
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        client, number = self._bench.server.address.client(), 0
        while not self._stop.is_set():
            query = self._queries[number % len(self._queries)].tolist()
            began = time.perf_counter()
            self.worst = max(self.worst, scored_by(self._bench, self._name, query))
            self.slowest = max(self.slowest, time.perf_counter() - began)
            number += 1
            self._stop.wait(0.5)
        client.close()

    def __enter__(self) -> Bystander:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def scored_by(bench: Bench, name: str, query: list[float]) -> float:
    """Return the megabytes that one search scores: the raw answer says so, the client does not."""
    page = f"{bench.server.address.url}/collections/{name}/points/query"
    answer = httpx.post(page, json={"query": query, "limit": K}, timeout=_SLOW).json()
    return float((answer.get("usage") or {}).get("hardware", {}).get("cpu", 0)) / 1e6


def layouts(bench: Bench, routing: Routing, split: Split) -> QdrantCollection:
    """Measure a first load, and cells by a copy and in place; return what has cells."""
    built = None
    queries = split.queries[:100]
    for storage in ("copy", "payload"):
        name = f"docs_{storage}"
        if storage == "copy":
            with bench.work("layout", "first load and graph"):
                bench.fill(name)
        else:
            bench.fill(name)
        alias = bench.alias(name)
        quiet = max(scored_by(bench, alias, one.tolist()) for one in queries)
        kind: Storage = "copy" if storage == "copy" else "payload"
        spec = LayoutSpec(routing.layout, routing.n_cells, routing.assign, "bench", storage=kind)
        with bench.work("layout", storage), Bystander(bench, alias, queries) as others:
            collection = QdrantCollection(bench.client, alias).layouts.build(spec, show_progress)
            bench.wait(alias)
        click.echo(
            f"{storage}: others' searches scored at worst {others.worst:.2f} MB "
            f"(before: {quiet:.2f}), the slowest took {1e3 * others.slowest:.0f} ms"
        )
        worst = bench.rows[-1]
        ratio = others.worst / max(quiet, 1e-9)
        bench.add(
            msgspec.structs.replace(
                worst,
                situation="others meanwhile",
                server_cpu_ms=0.0,
                mb_scored=ratio,
                p50_ms=1e3 * others.slowest,
            )
        )
        if storage == "copy":
            assert isinstance(collection, QdrantCollection)
            built = collection
        else:
            bench.client.delete_collection(name)
    assert built is not None
    return built


def searches(
    bench: Bench, routing: Routing, cells: QdrantCollection, tune: Split, test: Split
) -> None:
    """Measure single searches and batches, native and routed."""
    half = len(test.queries) // 2
    singles = replace(test, queries=test.queries[:half], hits=test.hits[:half])
    batches = replace(test, queries=test.queries[half:], hits=test.hits[half:])
    record = LayoutRecord(routing.layout, "bench", routing.n_cells)
    for target in _TARGETS:
        ef = tuned(lambda effort: native(cells, effort), target, tune)
        if ef is not None:
            for split, size in ((singles, 1), (batches, 256)):
                what = "single" if size == 1 else "batch"
                bench.examine(what, f"one graph, ef {ef}", target, native(cells, ef), split, size)
        plan = planned(routing, target)
        methods = {
            "cells, as before": before(cells, record, plan),
            "cells": routed(cells, plan, grouped=False),
            "cells, one by one": routed(cells, plan),
        }
        for split, size in ((singles, 1), (batches, 256)):
            for name, search in methods.items():
                if size > 1 or name != "cells, one by one":
                    what = "single" if size == 1 else "batch"
                    bench.examine(what, name, target, search, split, size)


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default=100_000, show_default=True, help="Keys, from the first.")
@click.option("--cells", default=64, show_default=True, help="Cells.")
@click.option("--queries", default=4_000, show_default=True, help="Test queries.")
@click.option("--epochs", type=int, help="Of training; default the recipe's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    keys: int,
    cells: int,
    queries: int,
    epochs: int | None,
    json_file: Path | None,
    cache: Path,
) -> None:
    """Measure on DATA: a folder of arrays, pydocs, or beir:NAME."""
    settings = {"service__hardware_reporting": "true"}
    try:
        dataset = load(Source(data, cache), show_progress)
        dataset = replace(dataset, name=f"{dataset.name}-{keys}", keys=dataset.keys[:keys])
        with (
            tempfile.TemporaryDirectory(dir=dataset.cache) as work,
            QdrantProcess(settings) as server,
        ):
            task = pose(dataset, "unseen", 0, Path(work), show_progress)
            routing = train_routing(task, cells, epochs)
            test = replace(
                task.test, queries=task.test.queries[:queries], hits=task.test.hits[:queries]
            )
            bench = Bench(server, server.address.client(), np.asarray(dataset.keys), [], json_file)
            laid_out = layouts(bench, routing, task.calibrate)
            searches(bench, routing, laid_out, task.calibrate, test)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main()
