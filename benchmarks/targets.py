"""What a router loses that learns from fewer targets: of a sample of the keys, or approximate ones.

    python benchmarks/targets.py DATA --cells 512 --json rows.json

DATA is a folder with ``keys.npy``, ``queries_train.npy`` and ``queries_test.npy`` (or the variable
AMIPS_BENCH_DATA names it). For every row the cells are cut and a linear router is trained on the
same training queries; only where their best keys come from differs:

exact
    30 best keys of all.
sample
    The best keys of a share of the keys, as many fewer.
sample, map
    The same, and cells that see every key by the map alone: those of the sample, which have hits,
    then do not lie apart from the others.
index
    30 best keys of the nearest lists of an IVF index, by plain k-means with as many lists as cells,
    that hold the share of the keys on average.

``total`` is what recall@10 costs on the test queries, whose answers are exact. ``found`` is the
share of the training queries' ten best keys that are among their targets.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.output import table
from amips_plugins.export.clustering import (
    QueryAware,
    centroid_weights,
    native_cells,
    query_aware_cells,
)
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import train_router
from amips_plugins.export.targets import top_keys
from amips_plugins.files import replace_file
from amips_plugins.progress import no_progress
from amips_plugins.vectors import IntArray
from benchmarks.data import Source, load
from benchmarks.enlarge import enlarge
from benchmarks.measuring import ivf_index
from benchmarks.protocols import pose

_DEPTH = 30
_TARGETS = (0.90, 0.95)
_SHARES = (0.5, 0.25, 0.1)
_BY_THE_MAP = QueryAware(trust=0.0, popularity=0.0, power=0.0)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One router.

    Attributes
    ----------
    keys, cells, seed
        What it was trained on.
    targets, share
        Where its targets come from, and the share of the products that they took.
    found
        Share of the training queries' ten best keys that are among the targets.
    total_90, total_95
        Cost of recall@10 .90 and .95 on the test queries; None where out of reach.
    """

    keys: int
    cells: int
    seed: int
    targets: str
    share: float
    found: float
    total_90: float | None
    total_95: float | None


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--cells", default=512, show_default=True)
@click.option("--keys", type=int, help="Enlarge to so many.  [default: those of the data]")
@click.option("--seeds", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="Part of the data.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the rows.")
def main(
    data: str, cells: int, keys: int | None, seeds: int, quick: bool, cache: Path, out: Path | None
) -> None:
    """Train routers on the keys in DATA from exact and from fewer targets."""
    dataset = load(Source(data, cache, quick))
    if keys is not None:
        dataset = enlarge(dataset, keys)
    rows: list[Row] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(dir=cache) as work:
            task = pose(dataset, "unseen", seed, Path(work), no_progress)
            for targets, share, hits, recipe in found_by(task, cells):
                rows.append(measure(task, cells, targets, share, hits, recipe))
                click.echo(shown(rows[-1:]), err=True)
                if out is not None:
                    replace_file(out, msgspec.json.format(msgspec.json.encode(rows), indent=1))
    click.echo(shown(rows))


def found_by(task: TrainingTask, n_cells: int) -> list[tuple[str, float, IntArray, QueryAware]]:
    """Return the training queries' targets, what they took, and how cells are cut with them."""
    unit, recipe = task.train.unit, QueryAware()
    result = [("exact", 1.0, task.train.hits, recipe)]
    for share in _SHARES:
        order = np.random.default_rng(task.seed).permutation(len(task.keys))
        rows = np.sort(order[: int(share * len(order))])
        keys = np.asarray(task.lifted[rows])
        hits, _ = top_keys(unit, keys, round(share * _DEPTH), task.device)
        result.append(("sample", share, rows[hits], recipe))
        result.append(("sample, map", share, rows[hits], _BY_THE_MAP))
    cells, assignment = native_cells(task.keys, task.metric, n_cells, task.seed)
    keys = np.asarray(task.keys)
    index = ivf_index(keys, centroid_weights(keys, assignment, cells, task.metric))
    for share in _SHARES[1:]:
        index.nprobe = max(1, round(share * n_cells))
        _, rows = index.search(unit, _DEPTH)
        result.append(("index", share, np.where(rows < 0, rows[:, :1], rows), recipe))
    return result


def measure(
    task: TrainingTask,
    n_cells: int,
    targets: str,
    share: float,
    hits: IntArray,
    recipe: QueryAware,
) -> Row:
    """Cut cells and train a router on these targets."""
    exact = task.train.hits[:, : task.k]
    part = replace(task, train=Split(task.train.queries, task.train.unit, hits))
    with tempfile.TemporaryDirectory(dir=task.work) as work:
        part = replace(part, work=Path(work))
        cut = query_aware_cells(
            task.keys, task.metric, n_cells, task.seed, part.train.queries, hits, recipe
        )
        router = train_router("linear", PRESETS["default"]["linear"], part, *cut)
    costs = [router.measure(task.test).cost(task.k, recall) for recall in _TARGETS]
    reached = [round(cost, 5) if np.isfinite(cost) else None for cost in costs]
    among = (exact[:, :, None] == hits[:, None, :]).any(axis=2)
    return Row(
        keys=len(task.keys),
        cells=n_cells,
        seed=task.seed,
        targets=targets,
        share=share,
        found=round(float(among.mean()), 3),
        total_90=reached[0],
        total_95=reached[1],
    )


def shown(rows: list[Row]) -> str:
    """Return a table."""
    header = ["keys", "cells", "seed", "targets", "share", "found", "@.90", "@.95"]
    lines = [
        [
            f"{row.keys:,}",
            f"{row.cells:,}",
            str(row.seed),
            row.targets,
            f"{row.share:g}",
            f"{row.found:.2f}",
            "-" if row.total_90 is None else f"{row.total_90:.4f}",
            "-" if row.total_95 is None else f"{row.total_95:.4f}",
        ]
        for row in rows
    ]
    return table(header, lines)


if __name__ == "__main__":
    main()
