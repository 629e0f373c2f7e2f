"""What a query reads and takes when memory is smaller than the collection.

    python benchmarks/cold.py DATA --memory 50,25,13,6.5,5 --json cold.json

An engine runs in a process of its own whose memory is capped by a control group, page cache
included: at what the process itself takes once it has opened the collection, and so many per cent
of the vectors' float32 bytes. (So what an engine keeps in its own memory of every key, its ids, is
not counted against it; a cell file keeps none.) Settings are the cheapest that reach the recall on
calibration queries, which no model has seen, without a cap; recall, reads and times are those of
test queries, after other queries have warmed the cache. Reads and bytes are those of the group at
the disk. A sample is what one live search in a thousand is judged by.

Object stores are simulated. Of a cell file every read takes the latency more, with no cache at all,
and what is given is measured. Of an engine it is its time plus the latency for every read that its
cache misses, one after the other, as a graph's are.

Linux only; without a group that may be capped it skips, and says why.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError
from amips_plugins.files import replace_file
from amips_plugins.models.calibration import Calibration
from amips_plugins.vectors import FloatArray, IntArray
from benchmarks.cold_engines import (
    FILES,
    METHODS,
    STORES,
    K,
    Method,
    build,
    open_store,
    prepare,
)
from benchmarks.data import Dataset, Source, load
from benchmarks.enlarge import enlarge
from benchmarks.learned import Routing, train_routing
from benchmarks.memory_group import CannotCap, MemoryGroup
from benchmarks.protocols import pose

_TARGET = 0.95
_TUNED_ON = 400
_FIRST = 10  # queries before the cap
_SAMPLES = (5, 30)  # to warm up, and to measure
_LATENCIES = (0.001, 0.010, 0.030)
_SECONDS = 30.0  # of one row's queries, at most


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to search with so much memory, in per cent of the vectors; figures are of a query.

    ``store_ms`` are the times with every latency of ``_LATENCIES``; ``note`` says why there are no
    figures.
    """

    data: str
    keys: int
    memory: float
    method: str
    setting: float | None = None
    recall: float | None = None
    kb: float | None = None
    reads: float | None = None
    cpu_ms: float | None = None
    mean_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    queries: int = 0
    store_ms: list[float] = []
    note: str = ""


class Questions(msgspec.Struct, frozen=True):
    """Where the queries of a run lie, and its model."""

    folder: str

    def array(self, name: str) -> Any:
        """Return queries, or their exact answers."""
        return np.load(Path(self.folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False)

    def routing(self) -> Routing:
        """Read the model."""
        folder = Path(self.folder)
        calibration = Calibration.from_bytes((folder / "calibration").read_bytes())
        model, layout = (folder / "model").read_bytes(), (folder / "layout").read_text()
        return Routing(model, calibration, layout, self.array("sizes"), self.array("assignment"))


def train(dataset: Dataset, cells: int, learned: int, folder: Path) -> None:
    """Train a router and keep it, with the queries and their exact answers."""
    some = replace(dataset, train=dataset.train[:learned])
    task = pose(some, "unseen", 0, folder, show_progress)
    routing = train_routing(task, cells, None)
    for name, array in (
        ("tune", task.calibrate.queries),
        ("tune_hits", task.calibrate.hits[:, :K]),
        ("test", task.test.queries),
        ("test_hits", task.test.hits[:, :K]),
        ("sizes", routing.sizes),
        ("assignment", routing.assignment),
    ):
        np.save(folder / f"{name}.npy", array)
    (folder / "calibration").write_bytes(routing.calibration.to_bytes())
    (folder / "model").write_bytes(routing.model)
    replace_file(folder / "layout", routing.layout.encode())


def recall_of(search: Any, queries: FloatArray, hits: IntArray) -> float:
    """Return mean recall@10 of single queries."""
    found = [
        len({hit.id for hit in search(queries[row : row + 1])} & set(hits[row].tolist())) / K
        for row in range(len(queries))
    ]
    return float(np.mean(found))


def tune(folder: str, method: Method, asked: Questions) -> float | None:
    """Return the smallest setting that reaches the recall, by bisection; None if none does."""
    if method.kind == "sample":
        return method.settings[0]
    queries, hits = (np.array(asked.array(name)[:_TUNED_ON]) for name in ("tune", "tune_hits"))
    routing = asked.routing()
    with open_store(Path(folder), method.store, None) as collection:
        low, high = 0, len(method.settings)
        while low < high:
            middle = (low + high) // 2
            search = prepare(collection, method, method.settings[middle], routing)
            enough = recall_of(search, queries, hits) >= _TARGET
            low, high = (low, middle) if enough else (middle + 1, high)
    return None if low == len(method.settings) else method.settings[low]


def measure(
    folder: str,
    method: Method,
    setting: float,
    asked: Questions,
    memory: int | None,
    latency: float | None,
    n_warm: int,
    n_test: int,
    group: MemoryGroup,
) -> dict[str, Any]:
    """Ask test queries under a cap; for a process of its own, which joins the group."""
    group.cap(None)
    group.take(os.getpid())
    routing = asked.routing()
    warm = np.array(asked.array("tune")[-n_warm:])
    queries, hits = (np.array(asked.array(name)[:n_test]) for name in ("test", "test_hits"))
    routing.hook()
    _forget(Path(folder, method.store))
    with open_store(Path(folder), method.store, latency) as collection:
        search = prepare(collection, method, setting, routing)
        for row in range(min(_FIRST, n_warm)):
            search(warm[row : row + 1])
        gc.collect()
        if memory is not None and not group.cap(group.used() + memory):
            return {"note": "the cap is below what the process itself needs"}
        until = time.monotonic() + _SECONDS
        for row in range(n_warm):
            search(warm[row : row + 1])
            if time.monotonic() > until:
                break
        before, cpu, times, right = group.reads(), time.process_time(), [], []
        until = time.monotonic() + _SECONDS
        for row in range(n_test):
            started = time.perf_counter()
            found = search(queries[row : row + 1])
            times.append(1e3 * (time.perf_counter() - started))
            right.append(len({hit.id for hit in found} & set(hits[row].tolist())) / K)
            if time.monotonic() > until:
                break
        cpu, after, count = time.process_time() - cpu, group.reads(), len(times)
    return {
        "recall": float(np.mean(right)),
        "kb": (after.n_bytes - before.n_bytes) / 1e3 / count,
        "reads": (after.count - before.count) / count,
        "cpu_ms": 1e3 * cpu / count,
        "mean_ms": float(np.mean(times)),
        "p50_ms": float(np.quantile(times, 0.5)),
        "p99_ms": float(np.quantile(times, 0.99)),
        "queries": count,
    }


def _forget(store: Path) -> None:
    """Have the kernel drop what it has cached of a store."""
    for path in [store] if store.is_file() else [p for p in store.rglob("*") if p.is_file()]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def examine(
    dataset: Dataset,
    folder: Path,
    method: Method,
    setting: float | None,
    memory: float,
    counts: tuple[int, int],
) -> Row:
    """Measure one row."""
    row = Row(data=dataset.name, keys=len(dataset.keys), memory=memory, method=method.name)
    if setting is None:
        return msgspec.structs.replace(row, note=f"does not reach a recall of {_TARGET}")
    asked = Questions(str(folder))
    n_bytes = round(memory / 100 * dataset.keys.nbytes)
    with MemoryGroup() as group:
        try:
            found = _apart(
                measure, str(folder), method, setting, asked, n_bytes, None, *counts, group
            )
        except BrokenProcessPool:
            found = {"note": "does not fit: the kernel ended it"}
    row = msgspec.structs.replace(row, setting=setting, **found)
    if method.store in FILES or row.note or row.reads is None or row.mean_ms is None:
        return row  # a file's reads go side by side: ``examine_store`` measures them
    slow = [row.mean_ms + 1e3 * latency * row.reads for latency in _LATENCIES]
    return msgspec.structs.replace(row, store_ms=slow)


def examine_store(
    dataset: Dataset, folder: Path, method: Method, setting: float, counts: tuple[int, int]
) -> Row:
    """Measure a cell file in a simulated object store: uncapped, and nothing of it is cached."""
    asked, slow = Questions(str(folder)), []
    found: dict[str, Any] = {}
    for latency in _LATENCIES:
        with MemoryGroup() as group:
            found = _apart(
                measure, str(folder), method, setting, asked, None, latency, *counts, group
            )
        slow.append(found["mean_ms"])
    return Row(
        data=dataset.name,
        keys=len(dataset.keys),
        memory=0.0,
        method=f"{method.name}, in a store",
        setting=setting,
        recall=found["recall"],
        queries=found["queries"],
        store_ms=slow,
    )


def table(rows: list[Row]) -> str:
    """Write the rows as a table in Markdown."""
    lines = [
        "| memory | method | recall | KB | reads | CPU ms | mean ms | p50 | p99 "
        "| 1 / 10 / 30 ms a read |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda one: -one.memory):
        memory = f"{row.memory:g} %" if row.memory else "store"
        if row.note:
            lines.append(f"| {memory} | {row.method} | {row.note} | | | | | | | |")
            continue
        figures = (row.kb, row.reads, row.cpu_ms, row.mean_ms, row.p50_ms, row.p99_ms)
        cells = [
            "-" if one is None else f"{one:,.3g}" if one < 100 else f"{one:,.0f}" for one in figures
        ]
        stores = " / ".join(f"{one:,.0f}" for one in row.store_ms)
        lines.append(
            f"| {memory} | {row.method} | {row.recall:.3f} | {' | '.join(cells)} | {stores} |"
        )
    return "\n".join(lines)


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise click.BadParameter("pass per cents above 0, such as 50,25,13,6.5,5")
    return numbers


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--memory", default="50,25,13,6.5,5", show_default=True, callback=_numbers)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--keys", default=100_000, show_default=True, help="More than there are: with noise.")
@click.option("--cells", default=256, show_default=True)
@click.option("--train", "learned", default=40_000, show_default=True, help="Training queries.")
@click.option("--warm", default=300, show_default=True, help="Queries before those measured.")
@click.option("--queries", default=400, show_default=True, help="Test queries.")
@click.option("--only", help="Methods, separated by semicolons; default all.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps what is built.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    memory: tuple[float, ...],
    json_file: Path | None,
    keys: int,
    cells: int,
    learned: int,
    warm: int,
    queries: int,
    only: str | None,
    work: Path | None,
    cache: Path,
) -> None:
    """Measure searches of DATA with too little memory: a folder of arrays, pydocs, or beir:NAME.

    Run again with the same --work and --json it goes on where it was.
    """
    try:
        with MemoryGroup():
            pass
    except CannotCap as exc:
        click.echo(f"Skipped: {exc}.")
        return
    wanted = METHODS if only is None else [m for m in METHODS if m.name in only.split(";")]
    try:
        dataset = enlarge(load(Source(data, cache), show_progress), keys)
        folder = work or dataset.cache / f"cold-{cells}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "layout").exists():
            train(dataset, cells, learned, folder)
        asked = Questions(str(folder))
        for store in STORES:
            done = folder / f".{store}.built"
            if store in {method.store for method in wanted} and not done.exists():
                started = time.monotonic()
                _apart(build, folder, store, dataset.cache / "keys.npy", asked.routing())
                done.touch()
                click.echo(f"built {store} in {time.monotonic() - started:.0f} s", err=True)
        rows = _rows(dataset, folder, wanted, memory, json_file, (warm, queries))
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(table(rows))


def _rows(
    dataset: Dataset,
    folder: Path,
    wanted: Any,
    memory: tuple[float, ...],
    json_file: Path | None,
    counts: tuple[int, int],
) -> list[Row]:
    rows: list[Row] = []
    if json_file is not None and json_file.exists():
        rows = msgspec.json.decode(json_file.read_bytes(), type=list[Row])

    def keep(row: Row) -> None:
        rows.append(row)
        click.echo(table([row]).splitlines()[-1], err=True)
        if json_file is not None:
            replace_file(json_file, msgspec.json.format(msgspec.json.encode(rows)))

    there = {(row.memory, row.method) for row in rows}
    for method in wanted:
        due = [one for one in memory if (one, method.name) not in there]
        stored = (
            method.store in FILES
            and method.kind == "routed"
            and (
                0.0,
                f"{method.name}, in a store",
            )
            not in there
        )
        if not due and not stored:
            continue
        setting = _apart(tune, str(folder), method, Questions(str(folder)))
        for one in due:
            some = _SAMPLES if method.kind == "sample" else counts
            keep(examine(dataset, folder, method, setting, one, some))
        if stored and setting is not None:
            keep(examine_store(dataset, folder, method, setting, (5, 100)))
    return rows


if __name__ == "__main__":
    main()
