"""What routing saves: recall against total cost, on queries that nothing was tuned on.

    python benchmarks/routing.py DATA [--json rows.json]

DATA is a folder with ``keys.npy``, ``queries_train.npy`` and ``queries_test.npy`` (or the variable
AMIPS_BENCH_DATA names it), ``pydocs`` for the docstrings of the installed packages, or
``beir:NAME`` for a BEIR set with its generated queries.

Training, early stopping, every choice of a setting and the grids of thresholds see the training
queries only. Test queries are reported on: the threshold that a recall takes is read off their
curve, exactly as the number of probes is for the centroids, so that neither side is measured at a
recall that it misses by chance. A second table says what recall a threshold gives on the test
queries that was chosen on calibration queries alone.

Every total is scanned keys plus the router's own multiplications in keys (parameters / dim), as a
share of all keys. Baselines:

centroids
    Spherical k-means, a fixed number of probes, as an IVF index has it.
centroids-kmeans
    Standard k-means, its cells searched by distance.
centroids-threshold
    The former with a threshold per query and a penalty for large cells, both tuned on validation
    queries: what the learned routers have besides what they learn.
ivf, keynet
    A faiss IndexIVFFlat over inner products, asked with the query or with what the KeyNet makes of
    it (then rescored with the query, which costs one key a candidate). The KeyNet has never seen
    the centroids of this index. The cost includes the comparison with all centroids, for both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError, InvalidInput
from amips_plugins.export.clustering import centroid_weights, native_cells, query_aware_cells
from amips_plugins.export.cost_curves import Curve, calibrate, figures
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.keynet import train_keynet
from amips_plugins.export.recipes import PRESETS, Preset
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.to_onnx import to_onnx
from amips_plugins.models.cells import Cells
from amips_plugins.models.hooks import RewriteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.plan import Target
from amips_plugins.vectors import IntArray, Metric
from benchmarks.data import Dataset, Source, load
from benchmarks.measuring import TARGETS, Points, ivf_index, points, search_ivf, tuned_centroids
from benchmarks.plot import draw
from benchmarks.protocols import PROTOCOLS, Protocol, as_l2, pose
from benchmarks.report import TITLES, cost_table, promise_table
from benchmarks.rows import Row, Store, Unit

ROUTERS = ("centroids", "centroids-threshold", "centroids-kmeans", "linear", "supportnet")
REWRITERS = ("ivf", "keynet")
_SEED_OF_STOPPING = 104_729
_SEED_OF_INDEX = 15_485_863
_QUICK_EPOCHS = 3

Partition = tuple[Cells, IntArray]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    protocols, cells, seeds
        For each of these.
    routers
        Which of ``ROUTERS`` and ``REWRITERS``.
    lists
        Lists of the IVF index.
    preset
        Training recipe.
    epochs
        Passes over the training queries; None for the recipe's own.
    """

    protocols: tuple[Protocol, ...]
    cells: tuple[int, ...]
    seeds: int
    routers: tuple[str, ...]
    lists: int
    preset: str
    epochs: int | None

    def units(self, data: str) -> list[Unit]:
        """List everything to measure, in order."""
        return [
            Unit(data=data, protocol=protocol, cells=cells, layout=layout, router=router, seed=seed)
            for protocol in self.protocols
            for cells, layouts, routers in self._sizes()
            for seed in range(self.seeds)
            for layout in layouts
            for router in routers
            if router in self.routers and not (layout != "native" and router == "centroids-kmeans")
        ]

    def _sizes(self) -> Iterator[tuple[int, tuple[str, ...], tuple[str, ...]]]:
        for cells in self.cells:
            yield cells, ("native", "query-aware"), ROUTERS
        yield self.lists, ("native",), REWRITERS

    def recipe(self, kind: str) -> Preset:
        """Return how a net is trained."""
        preset = PRESETS[self.preset][kind]
        if self.epochs is None:
            return preset
        return replace(preset, schedule=replace(preset.schedule, epochs=self.epochs))


class Bench:
    """Measures units, keeping the task and the cells of the last one.

    Parameters
    ----------
    dataset
        The data.
    plan
        The training recipe is read from it.
    """

    def __init__(self, dataset: Dataset, plan: Plan) -> None:
        self._dataset = dataset
        self._plan = plan
        self._problems: dict[tuple[Protocol, int], TrainingTask] = {}
        self._partitions: dict[tuple[Unit, str], Partition] = {}

    def measure(self, unit: Unit, work: Path) -> list[Row]:
        """Measure one unit; ``work`` is an empty folder."""
        task = replace(self._task(unit.protocol, unit.seed), work=work)
        if unit.router in REWRITERS:
            started = time.perf_counter()
            measured = self._rewriter(unit, task)
            return _rows(unit, measured, None, None, time.perf_counter() - started)
        cells, assignment = self._cells(unit, task)
        started = time.perf_counter()
        test, calibration = self._router(unit, task, cells, assignment)
        return _rows(unit, points(test), test, calibration, time.perf_counter() - started)

    def _task(self, protocol: Protocol, seed: int) -> TrainingTask:
        if (protocol, seed) not in self._problems:
            self._problems = {
                (protocol, seed): pose(self._dataset, protocol, seed, Path(), show_progress)
            }
        return self._problems[protocol, seed]

    def _cells(self, unit: Unit, task: TrainingTask) -> Partition:
        """Cut the keys; all routers of a layout get the same cells."""
        kind = "k-means" if unit.router == "centroids-kmeans" else unit.layout
        same = msgspec.structs.replace(unit, router="", layout="")
        if (same, kind) not in self._partitions:
            metric = Metric.L2 if kind == "k-means" else task.metric
            if kind == "query-aware":
                train = task.train
                cut = query_aware_cells(
                    task.keys, metric, unit.cells, unit.seed, train.queries, train.hits
                )
            else:
                cut = native_cells(task.keys, metric, unit.cells, unit.seed)
            self._partitions = {
                key: value for key, value in self._partitions.items() if key[0] == same
            }
            self._partitions[same, kind] = cut
        return self._partitions[same, kind]

    def _router(
        self, unit: Unit, task: TrainingTask, cells: Cells, assignment: IntArray
    ) -> tuple[Curve, Curve]:
        if unit.router == "centroids-kmeans":
            task = as_l2(task)
        if unit.router in ("linear", "supportnet"):
            kind: Literal["linear", "supportnet"] = (
                "linear" if unit.router == "linear" else "supportnet"
            )
            candidate = train_router(kind, self._plan.recipe(kind), task, cells, assignment)
            measure = candidate.measure
        else:
            native = native_candidate(task, cells, assignment)
            measure = native.measure
            if unit.router == "centroids-threshold":
                measure = tuned_centroids(native, task)
        return measure(task.test), measure(task.calibrate)

    def _rewriter(self, unit: Unit, task: TrainingTask) -> Points:
        """Ask an IVF index that no training has seen, nor any early stopping."""
        keys, test = np.asarray(task.keys), task.test
        cells, assignment = native_cells(keys, task.metric, unit.cells, unit.seed + _SEED_OF_INDEX)
        index = ivf_index(keys, centroid_weights(keys, assignment, cells, task.metric))
        sent, cost = test.queries, float(index.nlist)
        fetched = RewriteHook.candidates(max(k for k, _ in TARGETS))
        if unit.router == "keynet":
            stopping = native_cells(keys, task.metric, unit.cells, unit.seed + _SEED_OF_STOPPING)
            candidate = train_keynet(self._plan.recipe("keynet"), task, *stopping, fetched)
            model = OnnxModel(to_onnx(candidate.net, keys.shape[1], task.metric))
            plan = RewriteHook(model).plan(test.queries, Target(k=10))
            assert plan.rewritten is not None
            # Rescoring looks at every candidate once more.
            sent, cost = plan.rewritten, cost + candidate.parameters / keys.shape[1] + fetched
        return search_ivf(index, sent, test.hits, fetched, cost, show_progress)


def _rows(
    unit: Unit, measured: Points, test: Curve | None, calibration: Curve | None, seconds: float
) -> list[Row]:
    found = [] if test is None else figures(unit.router, test, (1, 10), unit.seed)
    intervals = {(figure.k, figure.recall): figure for figure in found}
    rows = []
    for k, recall in TARGETS:
        interval = intervals.get((k, recall))
        row = Row(
            **msgspec.structs.asdict(unit),
            k=k,
            recall=recall,
            model=measured.model,
            low=None if interval is None else interval.low,
            high=None if interval is None else interval.high,
            seconds=seconds,
        )
        level = measured.level(k, recall)
        if level is not None:
            scanned, probes = float(measured.scanned[level]), float(measured.probes[level])
            total = scanned + measured.model
            row = msgspec.structs.replace(row, scanned=scanned, probes=probes, total=total)
        rows.append(row)
    return rows if calibration is None else _with_promises(rows, measured, calibration)


def _with_promises(rows: list[Row], measured: Points, calibration: Curve) -> list[Row]:
    """Add what levels give on the test queries that were chosen on the calibration queries."""
    calibrated = points(calibration)
    guarantee = None
    if rows[0].router in ("linear", "supportnet"):
        # Levels take the place of thresholds, so that what is looked up is a level.
        levels = np.arange(calibration.n_levels, dtype=np.float32)
        guarantee = calibrate(calibration, levels, max(k for k, _ in TARGETS))
    result = []
    for row in rows:
        level = calibrated.level(row.k, row.recall)
        recall = None if level is None else float(measured.recall[row.k][level])
        row = msgspec.structs.replace(row, calibrated=recall)
        if guarantee is not None:
            try:
                level = int(guarantee.threshold(row.k, row.recall))
            except InvalidInput:
                level = None  # more calibration queries are needed to promise so much
            if level is not None:
                row = msgspec.structs.replace(
                    row,
                    promised=float(measured.recall[row.k][level]),
                    promised_total=float(measured.scanned[level]) + measured.model,
                )
        result.append(row)
    return result


def run(dataset: Dataset, plan: Plan, store: Store) -> None:
    """Measure what the store does not have yet."""
    units = plan.units(dataset.name)
    missing = [unit for unit in units if unit not in store]
    bench = Bench(dataset, plan)
    done = len(units) - len(missing)
    with show_progress("benchmark", len(units), done, "routers") as step:
        for unit in missing:
            # A folder of its own: no checkpoint of other code or data is ever resumed.
            with tempfile.TemporaryDirectory(dir=dataset.cache) as work:
                rows = bench.measure(unit, Path(work))
            store.add(rows)
            cost = next(row.total for row in rows if (row.k, row.recall) == (10, 0.9))
            shown = "never" if cost is None else f"at {cost:.2%}"
            step.advance(
                note=f"{unit.protocol}, {unit.cells} {unit.layout} cells, {unit.router}, seed "
                f"{unit.seed}: recall@10 .90 {shown}"
            )


def show(dataset: Dataset, plan: Plan, store: Store, out: Path) -> None:
    """Print the tables and draw the pictures of all rows of the data."""
    rows = [row for row in store.rows if row.data == dataset.name]
    count, dim = dataset.keys.shape
    for protocol in plan.protocols:
        click.echo(f"\n### {TITLES[protocol]}: {dataset.name}, {count:,} keys\n")
        click.echo("Total cost (scanned + model), share of the keys: mean ± deviation over seeds\n")
        click.echo(cost_table(rows, protocol))
        click.echo(
            "\nRecall on the test queries where calibration queries reach the target (and recall "
            "at cost where calibration guarantees it with 95 % confidence)\n"
        )
        click.echo(promise_table(rows, protocol))
        for k in (1, 10):
            name = f"{dataset.name.replace(' ', '-')}-{protocol}-{k}"
            draw(rows, protocol, k, count, dim, out / name)
    click.echo(f"\nPictures: {out}", err=True)


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 2:
        raise click.BadParameter("pass whole numbers of 2 or more, such as 64,512")
    return numbers


def _names(allowed: Sequence[str]) -> Callable[..., tuple[str, ...]]:
    def parse(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
        names = tuple(allowed) if value is None else tuple(value.split(","))
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise click.BadParameter(f"there is no {unknown[0]!r}; there are {', '.join(allowed)}")
        return names

    return parse


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--seeds", default=3, show_default=True, help="Number of seeds, from 0.")
@click.option("--cells", default="512,64,2048,256", show_default=True, callback=_numbers)
@click.option("--protocols", callback=_names(PROTOCOLS), help="Comma-separated; default all.")
@click.option("--only", callback=_names(ROUTERS + REWRITERS), help="Routers, comma-separated.")
@click.option("--lists", default=256, show_default=True, help="Lists of the IVF index.")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="default", show_default=True)
@click.option("--quick", is_flag=True, help="Part of the data, few epochs, one seed, 64 cells.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
@click.option("--limit", default=50_000, show_default=True, help="Pairs of pydocs, at most.")
@click.option("--beir-root", type=click.Path(path_type=Path), help="Local copies of BEIR sets.")
def main(
    data: str,
    json_file: Path | None,
    seeds: int,
    cells: tuple[int, ...],
    protocols: tuple[Protocol, ...],
    only: tuple[str, ...],
    lists: int,
    preset: str,
    quick: bool,
    out: Path,
    cache: Path,
    limit: int,
    beir_root: Path | None,
) -> None:
    """Measure routers on DATA: a folder of arrays, pydocs, or beir:NAME.

    An interrupted run goes on where it was, if --json names the file of its rows.
    """
    plan = Plan(protocols, cells, seeds, only, lists, preset, None)
    if quick:
        plan = replace(plan, cells=(64,), seeds=1, lists=64, epochs=_QUICK_EPOCHS)
    try:
        store = Store(json_file)
        dataset = load(Source(data, cache, quick, limit, beir_root), show_progress)
        run(dataset, plan, store)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc
    show(dataset, plan, store, out)


if __name__ == "__main__":
    main()
