"""What serving costs: a real Milvus server and Qdrant Edge, native and routed, at equal recall.

    python benchmarks/serving.py DATA --keys 50000,100000 [--json serving.json]

DATA is as for ``benchmarks/routing.py``. Keys beyond those of the data are repeats with noise.

Every setting (nprobe, ef, the router's threshold) is the cheapest that reaches the recall on the
same calibration queries, which no model has seen; recall, times and CPU are those of test queries,
which nothing has seen. A router's threshold has no safety margin here, since nprobe has none.
Server and clients share the machine: compare times within one run only.

Milvus is the server of the wheel ``milvus``, started anew for every collection and with nothing
else loaded; Qdrant Edge is the engine in a process of its own. CPU seconds come from ``/proc``:
Linux only.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError
from amips_plugins.export.dataset import Split, TrainingTask
from benchmarks.data import Dataset, Source, load
from benchmarks.engines import Built, Milvus, build_edge
from benchmarks.enlarge import enlarge
from benchmarks.examine import (
    Exam,
    K,
    Method,
    exact,
    examine,
    examine_edge,
    rewritten,
    routed,
    tuned,
)
from benchmarks.learned import Routing, train_rewriting, train_routing
from benchmarks.protocols import pose
from benchmarks.serving_report import cost_table, draw, growth_table, payback_table
from benchmarks.serving_rows import Served, ServedStore

_T = TypeVar("_T")

_KEYNET = "KeyNet on IVF_FLAT"
_CODES, _FEW_LISTS = "codes in partitions", "few lists of codes in partitions"
MILVUS = (
    *("full scan", "IVF_FLAT", _KEYNET, "HNSW", "partitions", "cell field"),
    *("IVF_SQ8", _CODES, _FEW_LISTS),
)
METHODS = (*MILVUS, "cells")
_REWRITE_UP_TO = 30_000  # keys: beyond, a KeyNet takes too long to train and to tune


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    keys
        Numbers of keys.
    targets
        Recalls.
    engines
        ``milvus``, ``edge`` or both.
    methods
        Those of ``METHODS`` that are wanted.
    partitions, cells
        Cells as partitions of Milvus, and as values of a field.
    keynet
        Cells that a KeyNet learns from, about.
    lists
        Of the IVF_FLAT index.
    queries
        Calibration queries; of test queries there are twice as many.
    seconds
        Length of each measurement.
    epochs
        Passes over the training queries; None for the recipe's own.
    """

    keys: tuple[int, ...]
    targets: tuple[float, ...]
    engines: tuple[str, ...]
    methods: tuple[str, ...]
    partitions: int
    cells: int
    keynet: int
    lists: int
    queries: int
    seconds: float
    epochs: int | None


class Bench:
    """One number of keys, with models that are trained when they are first needed.

    Parameters
    ----------
    dataset
        The keys and queries.
    plan
        What to measure.
    store
        Where the rows go.
    work
        An empty folder.
    """

    def __init__(self, dataset: Dataset, plan: Plan, store: ServedStore, work: Path) -> None:
        self._dataset = dataset
        self._plan = plan
        self._store = store
        self._work = work
        self._routings: dict[int, Routing] = {}
        self._by_lists: Routing | None = None

    @cached_property
    def _task(self) -> TrainingTask:
        work = self._work / "training"
        work.mkdir()
        task = pose(self._dataset, "unseen", 0, work, show_progress)
        return replace(
            task,
            calibrate=_first(task.calibrate, self._plan.queries),
            test=_first(task.test, 2 * self._plan.queries),
        )

    @cached_property
    def _exam(self) -> Exam:
        tune, test = self._task.calibrate, self._task.test
        return Exam(
            self._dataset.name,
            len(self._dataset.keys),
            tune.queries,
            tune.hits,
            test.queries,
            test.hits,
            self._plan.targets,
            self._plan.seconds,
        )

    def _routing(self, n_cells: int) -> Routing:
        if n_cells not in self._routings:
            # A folder of its own: no checkpoint of another router is resumed.
            with tempfile.TemporaryDirectory(dir=self._work) as work:
                task = replace(self._task, work=Path(work))
                self._routings[n_cells] = train_routing(task, n_cells, self._plan.epochs)
        return self._routings[n_cells]

    def _routing_by_lists(self) -> Routing:
        """Return a router of the same cells, whose targets count what lists of codes miss."""
        if self._by_lists is None:
            with tempfile.TemporaryDirectory(dir=self._work) as work:
                task = replace(self._task, work=Path(work))
                wanted = self._plan.partitions, self._plan.epochs
                self._by_lists = train_routing(task, *wanted, index="ivf_sq8")
        return self._by_lists

    def _missing(self, engine: str, *methods: str) -> list[str]:
        """Return those of the methods that are wanted and not measured yet."""
        data, count = self._dataset.name, len(self._dataset.keys)
        return [
            method
            for method in methods
            if method in self._plan.methods and not self._store.has(data, count, engine, method)
        ]

    def milvus(self) -> None:
        """Measure what is missing of Milvus."""
        names = self._missing("milvus", *MILVUS)
        if len(self._dataset.keys) > _REWRITE_UP_TO:
            names = [name for name in names if name != _KEYNET]
        if not names:
            return
        # Before there is a server that would take a part of the machine.
        methods = {name: self._milvus_method(name) for name in names}
        with Milvus() as server:
            for built, here in self._milvus_collections(server, set(names)):
                collection, memory = server.alone(built.name)
                for name in sorted(here & set(names)):
                    rows = examine(
                        "milvus",
                        methods[name],
                        collection,
                        self._exam,
                        server.meter,
                        built,
                        memory,
                    )
                    self._keep(list(rows))

    def _milvus_method(self, name: str) -> Method:
        plan = self._plan
        if name in ("IVF_FLAT", "IVF_SQ8"):
            return tuned(name, "nprobe", 1, plan.lists)
        if name == _KEYNET:
            model = train_rewriting(self._task, plan.keynet, plan.epochs)
            return rewritten(name, model, "nprobe", 1, plan.lists)
        if name == "HNSW":
            return tuned(name, "ef", K, 2_000)
        if name == "full scan":
            return exact(name)
        if name == _FEW_LISTS:
            return routed(name, self._routing_by_lists())
        if name == _CODES:
            copy = self._routing_by_lists().layout
            return routed(name, replace(self._routing(plan.partitions), layout=copy))
        return routed(name, self._routing(plan.cells if name == "cell field" else plan.partitions))

    def _milvus_collections(
        self, server: Milvus, names: set[str]
    ) -> Iterator[tuple[Built, set[str]]]:
        """Build the collections that some methods need; yield them with their methods."""
        keys = self._dataset.keys
        built = []
        if names - {"HNSW", "IVF_SQ8"}:
            built.append((server.index("ivf", keys, self._plan.lists), {"IVF_FLAT", _KEYNET}))
        # The copies come at once: they are made from a collection that is loaded.
        if names & {"full scan", "cell field"}:
            copy = server.lay_out("ivf", self._routing(self._plan.cells), "field")
            built.append((copy, {"full scan", "cell field"}))
        if "partitions" in names:
            copy = server.lay_out("ivf", self._routing(self._plan.partitions), "partitions")
            built.append((copy, {"partitions"}))
        if names & {_CODES, _FEW_LISTS}:
            copy = server.lay_out("ivf", self._routing_by_lists(), "partitions", "ivf_sq8")
            built.append((copy, {_CODES, _FEW_LISTS}))
        if "IVF_SQ8" in names:
            server.release()
            built.append((server.index("sq8", keys, self._plan.lists, kind="IVF_SQ8"), {"IVF_SQ8"}))
        if "HNSW" in names:
            server.release()
            built.append((server.index("hnsw", keys, None), {"HNSW"}))
        yield from ((one, methods) for one, methods in built if methods & names)

    def edge(self) -> None:
        """Measure what is missing of Qdrant Edge."""
        for names, n_cells in ((("HNSW",), None), (("full scan", "cells"), self._plan.cells)):
            if self._missing("edge", *names):
                routing = None if n_cells is None else self._routing(n_cells)
                file = self._dataset.cache / "keys.npy"
                built = _apart(build_edge, self._work, file, routing)
                rows = _apart(examine_edge, self._work, built, self._exam, routing)
                missing = self._missing("edge", *names)
                self._keep([row for row in rows if row.method in missing])

    def _keep(self, rows: list[Served]) -> None:
        self._store.add(rows)
        for row in rows:
            click.echo(
                f"{row.keys:,} keys, {row.engine} {row.method} at {row.setting}: recall "
                f"{row.recall:.3f}, {row.p50:.2f} ms, {row.cpu:.2f} CPU s per 1,000",
                err=True,
            )


def _first(split: Split, count: int) -> Split:
    return Split(split.queries[:count], split.unit[:count], split.hits[:count])


def _apart(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a new process: what it frees, or leaves behind, is none of ours."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 2_000:
        raise click.BadParameter("pass whole numbers of 2,000 or more, such as 100000,300000")
    return numbers


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = METHODS if value is None else tuple(name.strip() for name in value.split(","))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise click.BadParameter(f"there is no {unknown[0]!r}; there are {', '.join(METHODS)}")
    return names


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default="50000,100000", show_default=True, callback=_numbers)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--engine", type=click.Choice(["milvus", "edge", "both"]), default="both")
@click.option("--only", callback=_names, help="Methods, comma-separated; default all.")
@click.option("--partitions", default=64, show_default=True, help="Cells as partitions.")
@click.option("--cells", default=512, show_default=True, help="Cells as values of a field.")
@click.option("--lists", default=1024, show_default=True, help="Lists of the IVF_FLAT index.")
@click.option("--seconds", default=4.0, show_default=True, help="Of each measurement.")
@click.option("--quick", is_flag=True, help="Recall .90, few cells and queries, no KeyNet.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
@click.option("--limit", default=50_000, show_default=True, help="Pairs of pydocs, at most.")
@click.option("--beir-root", type=click.Path(path_type=Path), help="Local copies of BEIR sets.")
def main(
    data: str,
    keys: tuple[int, ...],
    json_file: Path | None,
    engine: str,
    only: tuple[str, ...],
    partitions: int,
    cells: int,
    lists: int,
    seconds: float,
    quick: bool,
    out: Path,
    cache: Path,
    limit: int,
    beir_root: Path | None,
) -> None:
    """Measure what serving DATA costs: a folder of arrays, pydocs, or beir:NAME.

    An interrupted run goes on where it was, if --json names the file of its rows.
    """
    engines = ("milvus", "edge") if engine == "both" else (engine,)
    plan = Plan(
        keys=keys,
        targets=(0.9, 0.95),
        engines=engines,
        methods=only,
        partitions=partitions,
        cells=cells,
        keynet=256,
        lists=lists,
        queries=1_000,
        seconds=seconds,
        epochs=None,
    )
    if quick:
        plan = replace(plan, targets=(0.9,), partitions=16, cells=64, keynet=16, lists=128)
        plan = replace(plan, queries=200, seconds=0.5, epochs=1)
        plan = replace(plan, methods=tuple(name for name in only if name != _KEYNET))
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it tells of restarts at length
    try:
        store = ServedStore(json_file)
        dataset = load(Source(data, cache, quick, limit, beir_root), show_progress)
        for count in plan.keys:
            with tempfile.TemporaryDirectory(dir=dataset.cache) as work:
                bench = Bench(enlarge(dataset, count), plan, store, Path(work))
                for name in plan.engines:
                    getattr(bench, name)()
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc
    rows = [row for row in store.rows if row.data == dataset.name]
    click.echo(f"### {dataset.name}\n\n{cost_table(rows)}")
    click.echo(
        f"\nCPU s/1,000 = fixed + slope * keys/100,000 (of three sizes or more)\n\n"
        f"{growth_table(rows)}"
    )
    click.echo(f"\nQueries after which the graph of HNSW pays\n\n{payback_table(rows)}")
    draw(rows, out / "serving")
    click.echo(f"\nPicture: {out / 'serving.png'}", err=True)


if __name__ == "__main__":
    main()
