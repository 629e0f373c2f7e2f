"""Routers over thousands of cells: one product, a low rank, and two levels.

    python benchmarks/many_cells.py DATA --cells 2048,8192,32768 --json rows.json

DATA is a folder with ``keys.npy``, ``queries_train.npy`` and ``queries_test.npy`` (or the variable
AMIPS_BENCH_DATA names it). All routers of a number of cells are trained on the same query-aware
cells, by the same recipe, and chosen on validation queries; ``total`` is read off the curve of
test queries, which nothing has seen: scanned keys plus the router's own multiplications, as a share
of all keys. Times are those of the graph that is served, on one thread: the median of many runs of
one query, and the same of a batch, a query. ``flat`` is one product in float32, ``flat, 8 bits`` in
whole numbers. With ``--times`` nothing is trained, which takes seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.output import table
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.clustering import QueryAware, centroid_weights, query_aware_cells
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.export.nets import (
    LinearRouter,
    LowRankRouter,
    Router,
    TwoLevelRouter,
    multiplications,
)
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import INITIAL_SCALE, train_router
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.export.two_level import new_two_level
from amips_plugins.files import replace_file
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.hooks import RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.plan import Target
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, Metric, normalise
from benchmarks.data import Source, load
from benchmarks.protocols import pose

_RANK = 128
_BATCH = 64
_RUNS = 200
_K, _CHOSEN = 10, 16
_VISITED = 16  # groups, where nothing is trained
_TARGETS = (0.90, 0.95)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One router.

    Attributes
    ----------
    cells, router
        What it chooses among, and its kind.
    model_keys
        Its multiplications of a query, in keys.
    alone_us, batch_us
        Microseconds of a query alone, and of one in a batch of 64.
    flat
        ``alone_us`` as a share of that of one flat product in float32.
    plan_us
        Microseconds of a query's plan: the graph, and choosing some 16 cells by a threshold.
    megabytes
        Of the model's file.
    visited
        Groups whose cells a query scores; 0 of routers without, which ``two levels`` becomes where
        they do not pay on validation queries.
    total_90, total_95
        Cost of recall@10 .90 and .95; None where nothing was trained, or out of reach.
    """

    cells: int
    router: str
    model_keys: float
    alone_us: float
    batch_us: float
    flat: float
    plan_us: float
    megabytes: float
    visited: int = 0
    total_90: float | None = None
    total_95: float | None = None


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA", required=False)
@click.option("--cells", default="2048,8192,32768", show_default=True, help="With commas between.")
@click.option("--times", is_flag=True, help="Train nothing.")
@click.option("--quick", is_flag=True, help="Part of the data.")
@click.option("--iterations", default=12, show_default=True, help="Of k-means.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the rows.")
def main(
    data: str | None,
    cells: str,
    times: bool,
    quick: bool,
    iterations: int,
    cache: Path,
    out: Path | None,
) -> None:
    """Measure routers over many cells of the keys in DATA."""
    rows: list[Row] = []
    for n_cells in map(int, cells.split(",")):
        if times or data is None:
            rows += timed(normalise(_random(n_cells)))
        else:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as work:
                task = pose(load(Source(data, cache, quick)), "unseen", 0, Path(work), no_progress)
                rows += trained(task, n_cells, iterations)
        click.echo(shown([row for row in rows if row.cells == n_cells]) + "\n")
        if out is not None:
            replace_file(out, msgspec.json.format(msgspec.json.encode(rows), indent=1))


def routers(start: FloatArray) -> Iterator[tuple[str, Router]]:
    """Yield untrained routers that order cells as these centroids do."""
    n_cells, dim = start.shape
    scaled = torch.from_numpy(INITIAL_SCALE * normalise(start))
    flat = LinearRouter(dim, n_cells)
    flat.weight.data.copy_(scaled)
    yield "flat", flat
    low = LowRankRouter(dim, n_cells, _RANK)
    left, singular, right = torch.linalg.svd(scaled, full_matrices=False)
    roots = singular[:_RANK].sqrt()
    low.up.data.copy_(left[:, :_RANK] * roots)
    low.down.data.copy_(roots[:, None] * right[:_RANK])
    yield f"rank {_RANK}", low
    yield "two levels", new_two_level(scaled.numpy(), _RANK, 0)


def timed(start: FloatArray) -> list[Row]:
    """Time the graphs of routers that nothing has trained."""
    n_cells = len(start)
    order = Order(1.0, np.zeros(n_cells, np.float32), np.full(n_cells, -20.0, np.float32))
    rows = []
    for name, net in routers(start):
        if isinstance(net, TwoLevelRouter):
            net.visited = _VISITED
        rows.append(_row(name, net, order))
        if name == "flat":
            rows.append(_row("flat, 8 bits", net, order, int8=True))
    return _with_shares(rows)


def trained(task: TrainingTask, n_cells: int, iterations: int) -> list[Row]:
    """Cut cells, train every router over them, and measure it."""
    recipe, train = QueryAware(iterations=iterations), task.train
    cells, assignment = query_aware_cells(
        task.keys, task.metric, n_cells, task.seed, train.queries, train.hits, recipe
    )
    start = centroid_weights(task.keys, assignment, cells, task.metric)
    rows = []
    for name, net in routers(start):
        made: Candidate = train_router(
            "linear",
            PRESETS["default"]["linear"],
            task,
            cells,
            assignment,
            begun=net,
            name=name,
        )
        assert made.order is not None
        costs = [made.measure(task.test).cost(task.k, recall) for recall in _TARGETS]
        reached = [round(cost, 5) if np.isfinite(cost) else None for cost in costs]
        assert isinstance(made.net, (LinearRouter, LowRankRouter, TwoLevelRouter))
        found = [_row(name, made.net, made.order)]
        if name == "flat":
            found.append(_row("flat, 8 bits", net, made.order, int8=True))
        rows += [
            msgspec.structs.replace(row, total_90=reached[0], total_95=reached[1]) for row in found
        ]
        click.echo(f"{n_cells} {name}: {reached}", err=True)
    return _with_shares(rows)


def _row(name: str, net: Router, order: Order, *, int8: bool = False) -> Row:
    first = net.weight if isinstance(net, LinearRouter) else net.down
    assert isinstance(first, torch.Tensor)
    dim, n_cells = first.shape[1], len(order.offset)
    data = to_onnx(net, dim, Metric.COSINE, order, int8=int8)
    model = OnnxModel(data)
    query = normalise(_random(1, dim))
    return Row(
        cells=n_cells,
        router=name,
        model_keys=round(multiplications(net) / dim, 1),
        alone_us=_run(model, dim, 1),
        batch_us=_run(model, dim, _BATCH),
        flat=1.0,
        plan_us=_time(partial(_hook(model, n_cells, dim).plan, query, Target(_K))),
        megabytes=round(len(data) / 1e6, 2),
        visited=net.visited if isinstance(net, TwoLevelRouter) else 0,
    )


def _with_shares(rows: list[Row]) -> list[Row]:
    flat = rows[0].alone_us
    return [msgspec.structs.replace(row, flat=round(row.alone_us / flat, 3)) for row in rows]


def _random(n_cells: int, dim: int = 384) -> FloatArray:
    return np.random.default_rng(0).standard_normal((n_cells, dim), dtype=np.float32)


def _hook(model: OnnxModel, n_cells: int, dim: int) -> RouteHook:
    """Return a hook whose target takes the threshold that some cells of a query reach."""
    (priority,) = model.run(["priority"], {"queries": normalise(_random(_BATCH, dim))})
    levels = np.array([np.quantile(priority, 1.0 - _CHOSEN / n_cells), -np.inf], np.float32)
    recall = np.tile(np.array([0.95, 1.0], np.float32), (_K, 1))
    calibration = Calibration(levels, recall, recall, recall[0], 0.95)
    shares = np.append(np.full(n_cells, 1.0 / n_cells), 0.0).astype(np.float32)
    return RouteHook(model, calibration, "cells", 0.9, shares)


def _run(model: OnnxModel, dim: int, batch: int) -> float:
    queries = {"queries": normalise(_random(batch, dim))}
    return round(_time(partial(model.run, ["priority"], queries)) / batch, 2)


def _time(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_RUNS):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return round(float(np.median(seconds[_RUNS // 10 :])) * 1e6, 2)


def shown(rows: list[Row]) -> str:
    """Return a table."""
    header = ["cells", "router", "keys", "MB", "groups"]
    header += ["us alone", "of flat", "us of 64", "plan us", "@.90", "@.95"]
    lines = [
        [
            f"{row.cells:,}",
            row.router,
            f"{row.model_keys:,.0f}",
            f"{row.megabytes:.1f}",
            str(row.visited or "-"),
            f"{row.alone_us:.0f}",
            f"{row.flat:.2f}",
            f"{row.batch_us:.1f}",
            f"{row.plan_us:.0f}",
            "-" if row.total_90 is None else f"{row.total_90:.4f}",
            "-" if row.total_95 is None else f"{row.total_95:.4f}",
        ]
        for row in rows
    ]
    return table(header, lines)


if __name__ == "__main__":
    main()
