"""What a search costs where an engine searches many graphs: all of them, or those of some cells.

    python benchmarks/fanout.py DATA --segments 16,64,128 [--json rows.json]
    python benchmarks/fanout.py DATA --engine edge --engine milvus --segments 64 --k 10

DATA is what ``benchmarks/routing.py`` takes. An engine that keeps a collection in S segments, each
with an HNSW graph over keys as they came, searches all S for every query. Here S is also the number
of cells, and each has a graph of its own:

one-graph
    A single graph over all keys: what nobody has who needs many segments, and the cheapest there
    is.
fan-out
    Keys at random in S graphs; every query searches all.
kmeans-nearest
    The graphs of the k-means cells whose centroids are nearest, the same number for every query.
routed
    Query-aware cells and a linear router, a threshold of priority for all queries.
routed-spill
    The same with keys in more than one cell (``export/votes.py``), up to ``--spill`` copies of a
    key on average, and a router trained for it.

The engine ``counts`` is HNSW of faiss with its own counter of distances, so that figures are the
same on any machine; the router's multiplications are counted in. How far a graph is searched (ef)
and how many graphs are chosen together: what costs the least of all that reach a recall on
calibration queries is read on test queries, which nothing was chosen on. ``two efforts`` are an ef
for the cells of the highest priority and a smaller one for the others. ``edge`` and ``milvus``
are engines (``fanout_engines.py``), whose CPU is counted: the choice is made in the same way with
their own graphs and what a visit costs them, and no query is asked twice of an engine that
remembers queries.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import click
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError, InvalidInput
from amips_plugins.export.cell_graphs import CellGraphs
from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.two_efforts import Graded, cheapest_pair
from amips_plugins.files import replace_file
from benchmarks.data import Source, load
from benchmarks.fanout_asked import engine_rows
from benchmarks.fanout_engines import engine
from benchmarks.fanout_ways import (
    FAR_ENOUGH,
    METHODS,
    RECALLS,
    FanoutRow,
    Way,
    chosen,
    deepened,
    efforts_for,
    way,
)
from benchmarks.protocols import pose

Name = Literal["counts", "edge", "milvus"]


VISITED = ", a visit "
"""Behind the name of a method where a visit costs something beside its distances."""


def measure(way: Way, graphs: CellGraphs, split: Split, efforts: Sequence[int]) -> Graded:
    """Search, with every effort and at every level."""
    levels, n_levels = way.levels(split)
    finds = graphs.search(split.unit, split.hits, levels < n_levels, efforts, show_progress)
    hit_cells = way.members[split.hits]
    return Graded(finds, levels, n_levels, hit_cells, way.model_keys, len(way.members))


def counted_rows(
    row: Callable[..., FanoutRow],
    task: TrainingTask,
    way: Way,
    ks: Sequence[int],
    visits: Sequence[float],
) -> list[FanoutRow]:
    """Measure one way to search by counting; ``row`` makes a row.

    ``visits`` are what to search a graph may cost beside its distances.
    """
    graphs = CellGraphs(task.lifted, way.members, way.n_cells, progress=show_progress)
    efforts = efforts_for(way, ks)
    calibration = measure(way, graphs, task.calibrate, efforts)
    test = measure(way, graphs, task.test, efforts)
    measured = []
    for visit in visits:
        name = f"{row().method}{VISITED}{visit:.0f}" if visit else row().method
        named = partial(row, method=name)
        measured += _priced_rows(named, way, ks, efforts, calibration, test, visit)
    return measured


def _priced_rows(
    row: Callable[..., FanoutRow],
    way: Way,
    ks: Sequence[int],
    efforts: Sequence[int],
    calibration: Graded,
    test: Graded,
    visit: float,
) -> list[FanoutRow]:
    """Choose by distances and visits; rows tell distances and graphs."""
    wanted = [(k, target) for k in ks for target in RECALLS]
    calibration = calibration.priced(visit)
    curves, tested = calibration.single(), test.single()
    measured = []
    for k, target in wanted:
        effort = chosen(curves, efforts, k, target)
        measured.append(row(k=k, target=target))
        if effort is not None:
            figures = _figures(curves[effort], tested[effort], k, target, len(way.members))
            measured[-1] = row(k=k, target=target, effort=efforts[effort], **figures)
    if not way.routed:
        return measured
    for (k, target), pair in zip(wanted, cheapest_pair(calibration, efforts, wanted), strict=True):
        two = partial(row, k=k, target=target, method=f"{row().method}, two efforts")
        measured.append(two())
        if pair is not None:
            curve = test.curve(pair)
            figures = _figures(calibration.curve(pair), curve, k, target, len(way.members))
            measured[-1] = two(
                effort=efforts[pair.near],
                far_effort=efforts[pair.far],
                near_graphs=float(curve.probes[pair.until]),
                **figures,
            )
    return measured


def _figures(
    calibration: Curve, test: Curve, k: int, target: float, n_keys: int
) -> dict[str, float]:
    """Read off the test queries what reaches a recall on the calibration queries."""
    level = int((calibration.mean_recall(k) >= target).argmax())
    cost = float(test.scanned[:, level].mean()) + test.model
    return {
        "recall": float(test.mean_recall(k)[level]),
        "distances": cost * n_keys,
        "graphs": float(test.probes[level]),
    }


def shown(found: Sequence[FanoutRow]) -> str:
    """Write rows as a table of Markdown: what each recall costs, graphs and ef."""
    counted = all(row.engine == "counts" for row in found)
    what = "distances" if counted else "CPU s per 1,000"
    header = ["k", "segments", "method", "storage"]
    header += [] if counted else ["batch"]
    for part in (what, "graphs, ef", "recall", *([] if counted else ["p50 ms"])):
        header += [f"{target:.2f}: {part}" for target in RECALLS]
    by = {(row.k, row.segments, row.method, row.batch, row.target): row for row in found}
    lines = []
    for k, segments, method, batch in sorted({key[:4] for key in by}, key=_place):
        parts = [by[k, segments, method, batch, target] for target in RECALLS]
        line = [str(k), str(segments), method, f"{parts[0].storage:.2f}"]
        line += [] if counted else [str(batch)]
        line += [
            _number(one.distances, ",.0f") if counted else _number(one.cpu_s_per_1000, ".2f")
            for one in parts
        ]
        line += [_searched(one) for one in parts]
        line += [_number(one.recall, ".3f") for one in parts]
        line += [] if counted else [_number(one.p50_ms, ".1f") for one in parts]
        lines.append(line)
    rule = [":--" if name == "method" else "--:" for name in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def _place(key: tuple[int, int, str, int]) -> tuple[bool, int, int, int, str]:
    k, segments, method, batch = key
    return batch > 1, k, segments, METHODS.index(method.partition(",")[0]), method


def _searched(row: FanoutRow) -> str:
    if row.graphs is None:
        return "-"
    if row.far_effort is None:
        return f"{row.graphs:.1f}, {row.effort}"
    return f"{row.near_graphs:.1f} of {row.graphs:.1f}, {row.effort} and {row.far_effort}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    return _listed(value, 1)


def _costs(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    return _listed(value, 0)


def _listed(value: str, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least:
        raise click.BadParameter(f"pass whole numbers of {least} or more, such as 16,64")
    return numbers


def _methods(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if not set(names) <= set(METHODS):
        raise click.BadParameter(f"the methods are {', '.join(METHODS)}")
    return names


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option(
    "--engine",
    "names",
    type=click.Choice(["counts", "edge", "milvus"]),
    multiple=True,
    default=["counts"],
    show_default=True,
    help="May be given several times: then a router is trained once for all.",
)
@click.option("--segments", default="16,64,128", show_default=True, callback=_numbers)
@click.option("--k", "ks", default="1,10,100", show_default=True, callback=_numbers)
@click.option("--only", default=",".join(METHODS), show_default=True, callback=_methods)
@click.option("--spill", default=0.27, show_default=True, help="Copies, as a share of the keys.")
@click.option("--max-cell", type=float, help="Largest cell, as a multiple of the mean.")
@click.option("--batch", default=512, show_default=True, help="Queries in a call, of an engine.")
@click.option(
    "--visit",
    "visits",
    default="0",
    show_default=True,
    callback=_costs,
    help="What searching one graph more costs beside its distances, in distances; of counts.",
)
@click.option("--queries", default=2_000, show_default=True, help="Counted of each split.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--quick", is_flag=True, help="Part of the data.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    names: tuple[Name, ...],
    segments: tuple[int, ...],
    ks: tuple[int, ...],
    only: tuple[str, ...],
    spill: float,
    max_cell: float | None,
    batch: int,
    visits: tuple[int, ...],
    queries: int,
    seed: int,
    json_file: Path | None,
    quick: bool,
    cache: Path,
) -> None:
    """Measure ways to search many graphs on DATA: a folder of arrays, pydocs, or beir:NAME.

    An interrupted run goes on where it was, if --json names the file of its rows.
    """
    try:
        found = _read(json_file)
        dataset = load(Source(data, cache, quick), show_progress)
        units = [(1, "one-graph"), *((s, m) for s in segments for m in METHODS[1:])]
        done = {
            (r.engine, r.data, r.seed, r.segments, r.method.partition(",")[0], r.max_cell)
            for r in found
        }
        missing = {
            (number, method): [
                name
                for name in names
                if (name, dataset.name, seed, number, method, max_cell) not in done
            ]
            for number, method in units
            if method in only
        }
        if any(missing.values()):
            task = pose(dataset, "unseen", seed, Path(), show_progress)
            deep = deepened(task, queries, max(*ks, *FAR_ENOUGH))
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=dataset.cache)))
            wanted = {name for some in missing.values() for name in some}
            running = {name: stack.enter_context(engine(name, work)) for name in sorted(wanted)}
            for (number, method), some in missing.items():
                if not some:
                    continue
                own = work / f"{number}-{method}"  # a training goes on from what it finds there
                own.mkdir()
                prepared = way(method, replace(deep, work=own), number, spill, max_cell)
                for name in some:
                    row = partial(
                        FanoutRow,
                        engine=name,
                        data=dataset.name,
                        seed=seed,
                        segments=number,
                        method=method,
                        storage=prepared.storage,
                        largest=prepared.largest,
                        max_cell=max_cell,
                    )
                    started = running[name]
                    if started is None:
                        found += counted_rows(row, deep, prepared, ks, visits)
                    else:
                        found += engine_rows(started, row, task, prepared, ks, batch)
                    if json_file is not None:
                        lines = b",\n".join(msgspec.json.encode(one) for one in found)
                        replace_file(json_file, b"[\n" + lines + b"\n]\n")
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc
    for name in names:
        here = (name, dataset.name, seed, max_cell)
        rows = [r for r in found if (r.engine, r.data, r.seed, r.max_cell) == here]
        click.echo(shown(rows))


def _read(path: Path | None) -> list[FanoutRow]:
    if path is None or not path.exists():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[FanoutRow])
    except msgspec.MsgspecError as exc:
        raise InvalidInput(f"{path} holds no rows of this benchmark ({exc}).") from exc


if __name__ == "__main__":
    main()
