"""What cells cost a Qdrant server, by its own counter: single searches, batches and layouts.

    python benchmarks/qdrant_server.py npm2pypi --ways copy,payload --json server.json

Starts the program ``qdrant`` that is on PATH, on loopback, with hardware reporting on. Efforts and
thresholds are chosen on calibration queries; what is reported are test queries, each asked once of
each method. ``cells, as before`` asks as releases before this one did; ``above break-even`` are the
test queries whose plan takes more of the keys than that, by themselves.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import numpy as np
from qdrant_client import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.search import empty, has_cell
from amips_plugins.cell_layout import LayoutSpec, Storage
from amips_plugins.cli.progress import show_progress
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import AmipsError
from amips_plugins.export.dataset import Split
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from benchmarks.data import Source, load
from benchmarks.learned import Routing, train_routing
from benchmarks.protocols import pose
from benchmarks.qdrant_bench import TARGETS, Bench, K, Search, first_keys, native, tuned
from integration_tests.servers import QdrantProcess

_FEWEST = 20  # queries that a row is measured with
_SLOW = 120.0  # seconds for a search while everything else is going on


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
        client, number = self._bench.nodes[0].address.client(), 0
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
    page = f"{bench.nodes[0].address.url}/collections/{name}/points/query"
    answer = httpx.post(page, json={"query": query, "limit": K}, timeout=_SLOW).json()
    return float((answer.get("usage") or {}).get("hardware", {}).get("cpu", 0)) / 1e6


def layouts(
    bench: Bench, routing: Routing, split: Split, ways: Sequence[Storage]
) -> QdrantCollection:
    """Measure a first load, and cells by a copy and in place; return the first that has cells."""
    built = None
    queries = split.queries[:100]
    for storage in ways:
        name = f"docs_{storage}"
        with bench.work("layout", "first load and graph"):
            bench.fill(name)
        alias = bench.alias(name)
        quiet = max(scored_by(bench, alias, one.tolist()) for one in queries)
        spec = LayoutSpec(routing.layout, routing.n_cells, routing.assign, "bench", storage=storage)
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
        assert isinstance(collection, QdrantCollection)
        if built is None:
            built = collection
        else:
            bench.client.delete_collection(name)
    if built is None:
        raise click.ClickException("Name a way to lay out: copy or payload.")
    return built


def searches(
    bench: Bench, routing: Routing, cells: QdrantCollection, tune: Split, test: Split
) -> None:
    """Measure single searches and batches, native and routed."""
    half = len(test.queries) // 2
    singles = replace(test, queries=test.queries[:half], hits=test.hits[:half])
    batches = replace(test, queries=test.queries[half:], hits=test.hits[half:])
    record = LayoutRecord(routing.layout, "bench", routing.n_cells)
    over_grpc = QdrantCollection(
        bench.nodes[0].address.client(timeout=600, prefer_grpc=True), cells.info.name
    )
    bench.rest()
    for target in TARGETS:
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
            "cells, one by one, gRPC": routed(over_grpc, plan),
        }
        for split, size in ((singles, 1), (batches, 256)):
            for name, search in methods.items():
                if size > 1 or "one by one" not in name:
                    what = "single" if size == 1 else "batch"
                    bench.examine(what, name, target, search, split, size)
        shares = plan(test.queries).shares
        assert shares is not None
        most = np.flatnonzero(shares > cells.break_even)
        if len(most) >= _FEWEST:
            some = replace(test, queries=test.queries[most], hits=test.hits[most])
            if ef is not None:
                graph = f"one graph, ef {ef}"
                bench.examine("above break-even", graph, target, native(cells, ef), some, 1)
            for name in ("cells, as before", "cells"):
                bench.examine("above break-even", name, target, methods[name], some, 1)


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default=100_000, show_default=True, help="Keys, from the first.")
@click.option("--cells", default=64, show_default=True, help="Cells.")
@click.option("--queries", default=4_000, show_default=True, help="Test queries.")
@click.option("--epochs", type=int, help="Of training; default the recipe's.")
@click.option(
    "--ways", default="copy,payload", show_default=True, help="Layouts, one after another."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    keys: int,
    cells: int,
    queries: int,
    epochs: int | None,
    ways: str,
    json_file: Path | None,
    cache: Path,
) -> None:
    """Measure on DATA: a folder of arrays, pydocs, or beir:NAME."""
    settings = {"service__hardware_reporting": "true"}
    try:
        dataset = first_keys(load(Source(data, cache), show_progress), keys)
        with (
            tempfile.TemporaryDirectory(dir=dataset.cache) as work,
            QdrantProcess(settings) as server,
        ):
            task = pose(dataset, "unseen", 0, Path(work), show_progress)
            routing = train_routing(task, cells, epochs)
            test = replace(
                task.test, queries=task.test.queries[:queries], hits=task.test.hits[:queries]
            )
            client = server.address.client(timeout=600)
            bench = Bench([server], client, np.asarray(dataset.keys), [], json_file)
            chosen: Any = [one.strip() for one in ways.split(",")]
            laid_out = layouts(bench, routing, task.calibrate, chosen)
            searches(bench, routing, laid_out, task.calibrate, test)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main()
