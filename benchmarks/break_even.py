"""The share of the keys above which a full exact scan is cheaper than a search of cells.

    python benchmarks/break_even.py edge [--keys 100000] [--dim 128] [--cells 128]
    python benchmarks/break_even.py milvus-field
    python benchmarks/break_even.py milvus-partitions --cells 64

Builds a collection of clustered keys in a folder of its own, lays it out, and times searches of
more and more cells against the full scan that the adapter does in their place: one query alone,
and a query of 64. The share where both cost the same is the adapter's ``break_even``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cell_layout import LayoutSpec, Storage
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, IntArray, normalise

_BATCH = 64
_REPEATS = 7
_SHARES = (0.01, 0.03, 0.06, 0.12, 0.25, 0.37, 0.5, 0.75, 1.0)
_NOISE = 0.7  # of a key around its centroid, in standard deviations of the centroids


@contextmanager
def open_edge(folder: Path, keys: FloatArray) -> Iterator[Collection]:
    """Create a Qdrant Edge shard of these keys."""
    import qdrant_edge as edge

    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    params = edge.EdgeVectorParams(size=keys.shape[1], distance=edge.Distance.Cosine)
    edge.EdgeShard.create(str(folder / "docs"), edge.EdgeConfig(vectors=params)).close()
    collection = QdrantEdgeCollection.connect(str(folder), "docs")
    try:
        for low in range(0, len(keys), 2000):
            some = keys[low : low + 2000]
            collection.upsert(range(low, low + len(some)), some)
        yield collection
    finally:
        collection.close()


@contextmanager
def open_milvus(folder: Path, keys: FloatArray) -> Iterator[Collection]:  # noqa: ARG001
    """Start a Milvus server with a collection of these keys."""
    from benchmarks.engines import Milvus

    with Milvus() as server:
        server.index("docs", keys, lists=128)
        yield server.collection("docs")


@dataclass(frozen=True)
class Engine:
    """Where cells are measured.

    Attributes
    ----------
    open
        Makes a collection, with integer ids from 0, of ``(n, dim)`` keys in an empty folder.
    storage
        Where the cells go.
    """

    open: Callable[[Path, FloatArray], AbstractContextManager[Collection]]
    storage: Storage | None = None


ENGINES = {
    "edge": Engine(open_edge),
    "milvus-field": Engine(open_milvus, "field"),
    "milvus-partitions": Engine(open_milvus, "partitions"),
}


def clustered(
    n_keys: int, dim: int, n_cells: int, seed: int = 0
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray]:
    """Draw keys around centroids; return keys, queries, the keys' cells and the centroids."""
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal((n_cells, dim), dtype=np.float32)

    def around(cells: IntArray) -> FloatArray:
        noise = rng.standard_normal((len(cells), dim), dtype=np.float32)
        return normalise(centroids[cells] + np.float32(_NOISE) * noise)

    cells = rng.integers(0, n_cells, n_keys)
    return around(cells), around(rng.integers(0, n_cells, _BATCH)), cells, centroids


def times(collection: Collection, queries: FloatArray, plan: QueryPlan) -> tuple[float, float]:
    """Time a plan: median milliseconds of one query alone, and of a query of all of them.

    Each is the best of some repetitions: whatever else the machine does only adds to a time.
    """

    def part(rows: slice) -> QueryPlan:
        return QueryPlan(
            cells=None if plan.cells is None else plan.cells[rows],
            layout=plan.layout,
            shares=None if plan.shares is None else plan.shares[rows],
        )

    def clock(rows: slice) -> float:
        started = time.perf_counter()
        collection.search(SearchRequest(queries[rows], k=10), part(rows))
        return (time.perf_counter() - started) * 1e3

    clock(slice(0, 4))
    alone = [
        min(clock(slice(row, row + 1)) for _ in range(_REPEATS)) for row in range(len(queries))
    ]
    together = min(clock(slice(None)) for _ in range(_REPEATS)) / len(queries)
    return float(np.median(alone)), together


def crossing(shares: list[float], costs: list[float], full: float) -> float:
    """Interpolate the share at which cells cost what the full scan costs; 1 where they never do."""
    for place, cost in enumerate(costs):
        if cost >= full:
            if place == 0:
                return 0.0
            below = costs[place - 1]
            step = (full - below) / (cost - below)
            return shares[place - 1] + step * (shares[place] - shares[place - 1])
    return 1.0


@click.command()
@click.argument("engine", type=click.Choice(sorted(ENGINES)))
@click.option("--keys", "n_keys", default=100_000, show_default=True)
@click.option("--dim", default=128, show_default=True)
@click.option("--cells", "n_cells", default=128, show_default=True)
def main(engine: str, n_keys: int, dim: int, n_cells: int) -> None:
    """Time cells against a full scan of ENGINE."""
    keys, queries, cells, centroids = clustered(n_keys, dim, n_cells)
    best = np.argsort(-(queries @ centroids.T), axis=1)
    chosen = ENGINES[engine]
    with tempfile.TemporaryDirectory() as folder, chosen.open(Path(folder), keys) as collection:
        spec = LayoutSpec(
            "measured", n_cells, lambda ids, _: cells[np.asarray(ids)], storage=chosen.storage
        )
        built = collection.layouts.build(spec)
        rows = [("native", *times(built, queries, NATIVE))]
        everything = np.full(len(queries), 2.0, dtype=np.float32)
        full = QueryPlan(cells=best[:, :1], layout="measured", shares=everything)
        scan = times(built, queries, full)
        rows.append(("full exact scan", *scan))
        counts = sorted({max(1, round(share * n_cells)) for share in _SHARES})
        measured = [
            times(built, queries, QueryPlan(cells=best[:, :count], layout="measured"))
            for count in counts
        ]
    shares = [count / n_cells for count in counts]
    rows += [
        (f"{share:.1%} of the keys", *found) for share, found in zip(shares, measured, strict=True)
    ]
    click.echo(f"{engine}: milliseconds a query, {n_keys:,} keys x {dim}, {n_cells} cells\n")
    click.echo(f"| search | alone | of {_BATCH} |\n| --- | --- | --- |")
    for name, alone, together in rows:
        click.echo(f"| {name} | {alone:.2f} | {together:.2f} |")
    alone, together = (
        crossing(shares, [found[which] for found in measured], scan[which]) for which in (0, 1)
    )
    click.echo(f"| break-even share | {alone:.2f} | {together:.2f} |")


if __name__ == "__main__":
    main()
