"""What cells cost a Qdrant server, by its own counter: single searches, batches and layouts.

    python benchmarks/qdrant_server.py npm2pypi --ways copy,payload --json server.json
    python benchmarks/qdrant_server.py npm2pypi --url http://localhost:6333 --pid "$(pidof qdrant)"

Starts the program ``qdrant`` that is on PATH, on loopback, with hardware reporting on, or takes a
server that runs already, on which it touches no collection but its own, and removes these. Efforts
and thresholds are chosen on calibration queries; what is reported are test queries, each asked once
of each method, which take turns. ``cells, as before`` asks as releases before 2026-11 did, and
``leaving out`` as where strays, or strict mode, make it necessary; ``above break-even`` are the
test queries whose plan takes more of the keys than that, by themselves, with several numbers of
candidates; ``form`` are the ways to name the same cells, and what counting them costs.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import numpy as np
from qdrant_client import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.qdrant import searched_points, wide_search
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.search import empty, has_cell, in_cells
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
from benchmarks.qdrant_bench import (
    Bench,
    K,
    Node,
    Running,
    Search,
    Way,
    first_keys,
    native,
    tuned,
)
from integration_tests.servers import QdrantAddress, QdrantProcess

_FEWEST = 20  # queries that a row is measured with
_FORMS_AT = 0.95  # the target whose cells are named in every way
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


def leaving_out(collection: QdrantCollection) -> QdrantCollection:
    """Return the collection as if there were strays: searches leave the other cells out."""
    other = collection.sibling(collection.info.name)
    other._kept = replace(collection._found, strays=True)
    return other


def with_constant(module: Any, name: str, value: float, search: Search) -> Search:
    """Search with another value of a constant of a module."""

    def changed(queries: FloatArray) -> list[list[int]]:
        kept = getattr(module, name)
        setattr(module, name, value)
        try:
            return search(queries)
        finally:
            setattr(module, name, kept)

    return changed


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
    token = bench.nodes[0].address.token
    headers = {"api-key": token} if token else {}
    asked = {"query": query, "limit": K}
    answer = httpx.post(page, json=asked, headers=headers, timeout=_SLOW).json()
    return float((answer.get("usage") or {}).get("hardware", {}).get("cpu", 0)) / 1e6


def layouts(
    bench: Bench, routing: Routing, split: Split, ways: Sequence[Storage]
) -> QdrantCollection:
    """Measure a first load, and cells by a copy and in place; return the first that has cells."""
    built = None
    queries = split.queries[:100]
    for storage in ways:
        name = f"{bench.names}docs_{storage}"
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
    bench: Bench,
    routing: Routing,
    cells: QdrantCollection,
    tune: Split,
    test: Split,
    targets: Sequence[float],
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
    for target in targets:
        ef = tuned(lambda effort: native(cells, effort), target, tune)
        plan = planned(routing, target)
        ways = {
            "cells, as before": Way(before(cells, record, plan)),
            "cells, leaving out": Way(routed(leaving_out(cells), plan, grouped=False)),
            "cells": Way(routed(cells, plan, grouped=False)),
        }
        if ef is not None:
            ways |= {f"one graph, ef {ef}": Way(native(cells, ef))}
        one_by_one = with_constant(
            searched_points, "_SEARCHES_EACH_GRPC", 64, routed(over_grpc, plan)
        )
        more = {
            "cells, gRPC": Way(
                with_constant(searched_points, "_SEARCHES_EACH_GRPC", 0, routed(over_grpc, plan))
            ),
            "cells, one by one, gRPC": Way(one_by_one),
        }
        bench.compare("single", ways, target, singles, 1)
        bench.compare("batch", {**ways, **more}, target, batches, 256)
        shares = plan(test.queries).shares
        assert shares is not None
        above = np.flatnonzero(shares > cells.break_even)
        if len(above) >= _FEWEST:
            some = replace(test, queries=test.queries[above], hits=test.hits[above])
            wide = {
                f"cells, {most} candidates": Way(
                    with_constant(wide_search, "_CANDIDATES", most, routed(cells, plan))
                )
                for most in (256, 512)
            }
            bench.compare("above break-even", {**ways, **wide}, target, some, 1)
        if target == _FORMS_AT:
            shares = plan(singles.queries).shares
            assert shares is not None
            few = np.flatnonzero(shares <= cells.break_even)
            some = replace(singles, queries=singles.queries[few], hits=singles.hits[few])
            bench.compare("form", forms(cells, record, plan), target, some, 1)


def forms(
    collection: QdrantCollection, record: LayoutRecord, plan: Callable[[FloatArray], QueryPlan]
) -> dict[str, Way]:
    """Return ways to name the cells of a query, and to count what they name: nothing is scored."""
    client, name = collection._client, collection.info.name
    exact = models.SearchParams(exact=True)
    none = models.Filter(must=[empty(record.key)])

    def chosen(query: FloatArray) -> list[int]:
        cells = plan(query).cells
        assert cells is not None
        return [cell for cell in cells[0].tolist() if cell >= 0]

    def named(cells: list[int]) -> models.Filter:
        return models.Filter.model_construct(must=[has_cell(record.key, cells)])

    def alternatives(cells: list[int]) -> models.Filter:
        return models.Filter(should=[empty(record.key), has_cell(record.key, cells)])

    def listed(cells: list[int]) -> models.Filter:
        return in_cells(record, cells, None, strays=False)

    def listed_as_one(cells: list[int]) -> models.Filter:
        none: Any = in_cells(record, [], None, strays=False).should
        return models.Filter(should=[has_cell(record.key, cells), *none])

    conditions: dict[str, Callable[[list[int]], list[models.Filter | None]]] = {
        "no point": lambda _: [named([record.n_cells + 1])],
        "these": lambda cells: [named(cells)],
        "these, or none": lambda cells: [alternatives(cells)],
        "these one by one, none, or no cell": lambda cells: [listed(cells)],
        "these in a list, none, or no cell": lambda cells: [listed_as_one(cells)],
        "not the others": lambda cells: [in_cells(record, cells, None)],
        "these, and none: two searches": lambda cells: [named(cells), none],
        "everything": lambda _: [None],
    }

    def searching(make: Callable[[list[int]], list[models.Filter | None]]) -> Search:
        def search(query: FloatArray) -> list[list[int]]:
            vector = query[0].tolist()
            asked = [
                models.QueryRequest(query=vector, filter=one, params=exact, limit=K)
                for one in make(chosen(query))
            ]
            answers = client.query_batch_points(name, asked)
            points = [point for answer in answers for point in answer.points]
            best = sorted(points, key=lambda point: -point.score)[:K]
            return [[int(point.id) for point in best]]

        return search

    def counting(make: Callable[[list[int]], list[models.Filter | None]]) -> Search:
        def search(query: FloatArray) -> list[list[int]]:
            for one in make(chosen(query)):
                client.count(name, count_filter=one, exact=True)
            return [[]]

        return search

    ways = {form: Way(searching(make)) for form, make in conditions.items()}
    return ways | {f"count {form}": Way(counting(make)) for form, make in conditions.items()}


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default=100_000, show_default=True, help="Keys, from the first.")
@click.option("--cells", default=64, show_default=True, help="Cells.")
@click.option("--targets", default="0.9,0.95,0.98", show_default=True, help="Recalls.")
@click.option("--queries", default=4_000, show_default=True, help="Test queries.")
@click.option("--epochs", type=int, help="Of training; default the recipe's.")
@click.option(
    "--ways", default="copy,payload", show_default=True, help="Layouts, one after another."
)
@click.option("--url", help="A server that runs, over REST; else one is started.")
@click.option("--grpc-port", default=6334, show_default=True, help="Of the server at --url.")
@click.option("--pid", type=int, help="Of the server at --url, on this machine: its CPU is shown.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    keys: int,
    cells: int,
    targets: str,
    queries: int,
    epochs: int | None,
    ways: str,
    url: str | None,
    grpc_port: int,
    pid: int | None,
    json_file: Path | None,
    cache: Path,
) -> None:
    """Measure on DATA: a folder of arrays, pydocs, or beir:NAME."""
    try:
        dataset = first_keys(load(Source(data, cache), show_progress), keys)
        with tempfile.TemporaryDirectory(dir=dataset.cache) as work:
            task = pose(dataset, "unseen", 0, Path(work), show_progress)
            routing = train_routing(task, cells, epochs)
            test = replace(
                task.test, queries=task.test.queries[:queries], hits=task.test.hits[:queries]
            )
            chosen: Any = [one.strip() for one in ways.split(",")]
            at = None if url is None else Running(QdrantAddress(url, grpc_port, _token()), pid)
            with server(at) as (node, names):
                client = node.address.client(timeout=600)
                bench = Bench([node], client, np.asarray(dataset.keys), [], json_file, names=names)
                laid_out = layouts(bench, routing, task.calibrate, chosen)
                wanted = [float(one) for one in targets.split(",")]
                searches(bench, routing, laid_out, task.calibrate, test, wanted)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc


@contextmanager
def server(running: Running | None) -> Iterator[tuple[Node, str]]:
    """Start a server, or take one; and how the names of all collections on it are to begin."""
    if running is None:
        with QdrantProcess({"service__hardware_reporting": "true"}) as started:
            yield started, ""
        return
    names = f"amips_bench_{secrets.token_hex(4)}_"
    try:
        yield running, names
    finally:
        client = running.address.client(timeout=600)
        for found in client.get_collections().collections:
            if found.name.startswith(names):
                client.delete_collection(found.name)  # its aliases go with it
        client.close()


def _token() -> str | None:
    return os.environ.get("AMIPS_QDRANT_API_KEY")


if __name__ == "__main__":
    main()
