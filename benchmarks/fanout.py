"""What a search costs where an engine searches many graphs: all of them, or those of some cells.

    python benchmarks/fanout.py DATA --segments 16,64,128 [--json rows.json]

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
calibration queries is read on test queries, which nothing was chosen on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError, InvalidInput
from amips_plugins.export.cell_graphs import CellGraphs, joint_curves
from amips_plugins.export.clustering import native_cells, query_aware_cells
from amips_plugins.export.cost_curves import (
    Curve,
    levels_by_rank,
    levels_by_threshold,
    thresholds_for,
)
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.targets import top_keys
from amips_plugins.export.votes import members_by_votes, with_members
from amips_plugins.files import replace_file
from amips_plugins.vectors import FloatArray, IntArray
from benchmarks.data import Source, load
from benchmarks.protocols import pose

METHODS = ("one-graph", "fan-out", "kmeans-nearest", "routed", "routed-spill")
RECALLS = (0.90, 0.95, 0.98)
_EFFORTS = (10, 16, 24, 32, 48, 64)
# Where there is nothing but ef to choose, steps as fine as those of a threshold.
_FINE = (10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64)
_ONE_GRAPH = (72, 80, 90, 100, 120, 140, 160, 180, 200, 250, 300, 400)
_MANY_KEYS = (100, 150, 200)
# Cells are looked into until this share of the k best could be found: beyond it no target lies.
_FAR_ENOUGH = {10: 0.996, 100: 0.993}


class FanoutRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one way to search costs to reach one recall.

    Attributes
    ----------
    engine, data, seed
        What was searched, and the seed of split, cells and training.
    segments
        Number of graphs.
    method
        One of ``METHODS``.
    k, target
        The target: recall@k.
    recall
        Recall on the test queries at the setting that reaches the target on calibration queries;
        None where none does, and so are the following.
    distances
        Computed a query, the router's multiplications included.
    graphs
        Searched a query.
    effort
        HNSW's ef.
    storage
        Keys stored, copies counted, as a multiple of the keys.
    """

    engine: str
    data: str
    seed: int
    segments: int
    method: str
    k: int
    target: float
    storage: float
    recall: float | None = None
    distances: float | None = None
    graphs: float | None = None
    effort: int | None = None


Levels = Callable[[Split], tuple[IntArray, int]]
"""Says at which level a query searches each cell, and how many levels there are."""


@dataclass(frozen=True)
class Way:
    """A way to search: the cells of every key, and the order in which a query searches them."""

    members: IntArray
    n_cells: int
    model_keys: float
    levels: Levels
    efforts: tuple[int, ...] = _EFFORTS

    @property
    def storage(self) -> float:
        """Keys stored, copies counted, as a multiple of the keys."""
        copies = sum(int((column != self.members[:, 0]).sum()) for column in self.members.T)
        return 1.0 + copies / len(self.members)


def way(method: str, task: TrainingTask, segments: int, spill: float) -> Way:
    """Prepare a way to search; nothing of it sees the calibration or the test queries."""
    n_keys, train = len(task.keys), task.train
    if method in ("one-graph", "fan-out"):
        members = np.random.default_rng(task.seed).permutation(n_keys) % segments

        def all_at_once(split: Split) -> tuple[IntArray, int]:
            return np.zeros((len(split.queries), segments), dtype=np.int64), 1

        efforts = _FINE + (_ONE_GRAPH if segments == 1 else ())
        return Way(members[:, None], segments, 0.0, all_at_once, efforts)
    if method == "kmeans-nearest":
        cells, assignment = native_cells(task.keys, task.metric, segments, task.seed)
        candidate = native_candidate(task, cells, assignment)
    else:
        cells, assignment = query_aware_cells(
            task.keys, task.metric, segments, task.seed, train.queries, train.hits
        )
        members = assignment[:, None]
        if method == "routed-spill":
            members = members_by_votes(assignment, train.hits[:, : task.k], cells.n_cells, spill)
            cells = with_members(cells, members)
        preset = PRESETS["default"]["linear"]
        candidate = train_router("linear", preset, task, cells, members, graphs=True)
    members = candidate.assignment.reshape(n_keys, -1)
    priority = candidate.priority
    assert priority is not None
    validated = priority(task.validate)
    if method == "kmeans-nearest":
        ranks = levels_by_rank(validated)
        most = 1 + max(
            int(np.quantile(np.take_along_axis(ranks, members[hits, 0], axis=1), share))
            for hits, share in _far(task.validate)
        )

        def by_rank(split: Split) -> tuple[IntArray, int]:
            return np.minimum(levels_by_rank(priority(split)), most), most

        return Way(members, cells.n_cells, float(cells.n_cells), by_rank)
    lowest = min(
        float(np.quantile(_best(validated, members[hits]), 1.0 - share))
        for hits, share in _far(task.validate)
    )
    thresholds = thresholds_for(validated, members[task.validate.hits[:, : task.k]])
    thresholds = thresholds[thresholds >= lowest]

    def by_threshold(split: Split) -> tuple[IntArray, int]:
        return levels_by_threshold(priority(split), thresholds), len(thresholds)

    return Way(members, cells.n_cells, candidate.parameters / task.keys.shape[1], by_threshold)


def _far(split: Split) -> list[tuple[IntArray, float]]:
    """Return the hits that are to be reachable, and which share of them."""
    return [(split.hits[:, :k], share) for k, share in _FAR_ENOUGH.items()]


def _best(priority: FloatArray, hit_cells: IntArray) -> FloatArray:
    flat = np.take_along_axis(priority, hit_cells.reshape(len(priority), -1), axis=1)
    best: FloatArray = flat.reshape(hit_cells.shape).max(axis=2)
    return best


def measure(way: Way, graphs: CellGraphs, split: Split, efforts: Sequence[int]) -> list[Curve]:
    """Search, with every effort and at every level."""
    levels, n_levels = way.levels(split)
    finds = graphs.search(split.unit, split.hits, levels < n_levels, efforts, show_progress)
    hit_cells = way.members[split.hits]
    return joint_curves(finds, levels, n_levels, hit_cells, way.model_keys, len(way.members))


def chosen(curves: list[Curve], efforts: Sequence[int], k: int, target: float) -> int | None:
    """Return which effort reaches a recall at the least cost; an engine's ef is k at least."""
    costs = [
        curve.cost(k, target) if effort >= min(k, 100) else np.inf
        for curve, effort in zip(curves, efforts, strict=True)
    ]
    return int(np.argmin(costs)) if np.isfinite(min(costs)) else None


def rows(
    task: TrainingTask, data: str, segments: int, method: str, spill: float, ks: Sequence[int]
) -> list[FanoutRow]:
    """Measure one way to search."""
    prepared = way(method, task, segments, spill)
    graphs = CellGraphs(task.lifted, prepared.members, prepared.n_cells, progress=show_progress)
    efforts = prepared.efforts
    if segments > 1 and max(ks) > min(efforts):
        efforts += _MANY_KEYS
    calibration = measure(prepared, graphs, task.calibrate, efforts)
    test = measure(prepared, graphs, task.test, efforts)
    measured = []
    for k in ks:
        for target in RECALLS:
            row = FanoutRow(
                engine="counts",
                data=data,
                seed=task.seed,
                segments=segments,
                method=method,
                k=k,
                target=target,
                storage=prepared.storage,
            )
            effort = chosen(calibration, efforts, k, target)
            if effort is not None:
                level = int((calibration[effort].mean_recall(k) >= target).argmax())
                curve = test[effort]
                cost = float(curve.scanned[:, level].mean()) + curve.model
                row = msgspec.structs.replace(
                    row,
                    recall=float(curve.mean_recall(k)[level]),
                    distances=cost * len(prepared.members),
                    graphs=float(curve.probes[level]),
                    effort=efforts[effort],
                )
            measured.append(row)
    return measured


def deepened(task: TrainingTask, queries: int, depth: int) -> TrainingTask:
    """Look up as many answers as the largest k needs, of some of the queries."""

    def deep(split: Split) -> Split:
        some = split.take(np.arange(min(queries, len(split.queries))))
        hits, _ = top_keys(some.unit, task.lifted, depth, task.device, show_progress)
        return replace(some, hits=hits)

    return replace(
        task,
        validate=deep(task.validate),
        calibrate=deep(task.calibrate),
        test=deep(task.test),
    )


def shown(found: Sequence[FanoutRow]) -> str:
    """Write rows as a table of Markdown: distances, graphs and ef at each recall."""
    header = ["k", "segments", "method", "storage"]
    header += [f"{target:.2f}: distances" for target in RECALLS]
    header += [f"{target:.2f}: graphs, ef" for target in RECALLS]
    header += [f"{target:.2f}: recall" for target in RECALLS]
    by = {(row.k, row.segments, row.method, row.target): row for row in found}
    lines = []
    for k, segments, method in sorted(
        {key[:3] for key in by}, key=lambda key: (key[0], key[1], METHODS.index(key[2]))
    ):
        parts = [by[k, segments, method, target] for target in RECALLS]
        line = [str(k), str(segments), method, f"{parts[0].storage:.2f}"]
        line += ["-" if one.distances is None else f"{one.distances:,.0f}" for one in parts]
        line += ["-" if one.graphs is None else f"{one.graphs:.1f}, {one.effort}" for one in parts]
        line += ["-" if one.recall is None else f"{one.recall:.3f}" for one in parts]
        lines.append(line)
    rule = [":--" if name == "method" else "--:" for name in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter("pass whole numbers of 1 or more, such as 16,64")
    return numbers


def _methods(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if not set(names) <= set(METHODS):
        raise click.BadParameter(f"the methods are {', '.join(METHODS)}")
    return names


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--engine", type=click.Choice(["counts"]), default="counts", show_default=True)
@click.option("--segments", default="16,64,128", show_default=True, callback=_numbers)
@click.option("--k", "ks", default="1,10,100", show_default=True, callback=_numbers)
@click.option("--only", default=",".join(METHODS), show_default=True, callback=_methods)
@click.option("--spill", default=0.27, show_default=True, help="Copies, as a share of the keys.")
@click.option("--queries", default=2_000, show_default=True, help="Of each split, at most.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--quick", is_flag=True, help="Part of the data.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    engine: str,
    segments: tuple[int, ...],
    ks: tuple[int, ...],
    only: tuple[str, ...],
    spill: float,
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
        task = None
        units = [(1, "one-graph"), *((s, m) for s in segments for m in METHODS[1:])]
        for number, method in (unit for unit in units if unit[1] in only):
            key = (engine, dataset.name, seed, number, method)
            if any((r.engine, r.data, r.seed, r.segments, r.method) == key for r in found):
                continue
            if task is None:
                task = pose(dataset, "unseen", seed, Path(), show_progress)
                task = deepened(task, queries, max(*ks, *_FAR_ENOUGH))
            with tempfile.TemporaryDirectory(dir=dataset.cache) as work:
                here = replace(task, work=Path(work))
                found += rows(here, dataset.name, number, method, spill, ks)
            if json_file is not None:
                lines = b",\n".join(msgspec.json.encode(row) for row in found)
                replace_file(json_file, b"[\n" + lines + b"\n]\n")
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(shown([row for row in found if row.data == dataset.name and row.seed == seed]))


def _read(path: Path | None) -> list[FanoutRow]:
    if path is None or not path.exists():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[FanoutRow])
    except msgspec.MsgspecError as exc:
        raise InvalidInput(f"{path} holds no rows of this benchmark ({exc}).") from exc


if __name__ == "__main__":
    main()
