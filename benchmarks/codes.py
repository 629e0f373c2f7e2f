"""What quantised codes save a search of cells on Qdrant Edge, and how much they lose.

Cells of k-means are searched exactly and by their codes, with the best candidates scored by their
vectors; the exact answer is what the others are compared with.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import faiss
import msgspec
import numpy as np
import qdrant_edge as edge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError
from amips_plugins.files import replace_file
from amips_plugins.vectors import FloatArray, IntArray
from benchmarks.data import Source, load

K = 10
_BATCH = 1_000
_OVERSAMPLING = (1.0, 1.5, 2.0, 4.0, 8.0, 16.0)
_BITS = edge.TurboQuantBitSize


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to search: share of the exact ten found again, and CPU of a query."""

    codes: str
    oversampling: float | None
    agreement: float
    cpu_ms: float
    keys: int


def kinds() -> dict[str, Any]:
    """Return the codes to compare."""
    return {
        "int8": edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8),
        "4 bits": edge.TurboQuantQuantizationConfig(bits=_BITS.Bits4),
        "2 bits": edge.TurboQuantQuantizationConfig(bits=_BITS.Bits2),
        "1 bit": edge.TurboQuantQuantizationConfig(bits=_BITS.Bits1),
    }


def build(folder: str, keys: FloatArray, cells: IntArray, codes: Any) -> edge.EdgeShard:
    """Make a shard without a graph, with codes."""
    vectors = edge.EdgeVectorParams(
        size=keys.shape[1],
        distance=edge.Distance.Cosine,
        hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10_000),
        quantization_config=codes,
    )
    shard = edge.EdgeShard.create(folder, edge.EdgeConfig(vectors={"": vectors}))
    update = edge.UpdateOperation
    shard.update(update.create_field_index("cell", edge.PayloadSchemaType.Integer))
    for start in range(0, len(keys), _BATCH):
        rows = range(start, min(start + _BATCH, len(keys)))
        points = [edge.Point(i, keys[i].tolist(), {"cell": int(cells[i])}) for i in rows]
        shard.update(update.upsert_points(points))
    shard.optimize()
    return shard


def ask(
    shard: edge.EdgeShard, queries: FloatArray, probes: IntArray, params: edge.SearchParams
) -> tuple[list[set[int]], float]:
    """Return what every query finds, and its CPU in milliseconds."""
    began, found = time.process_time(), []
    for query, cells in zip(queries, probes, strict=True):
        inside = edge.FieldCondition(key="cell", match=edge.MatchAny(cells.tolist()))
        request = edge.QueryRequest(
            K,
            query=edge.Query.Nearest(query.tolist()),
            filter=edge.Filter(must=[inside]),
            params=params,
        )
        found.append({int(point.id) for point in shard.query(request)})
    return found, 1e3 * (time.process_time() - began) / len(queries)


def measure(keys: FloatArray, queries: FloatArray, n_cells: int, probes: int) -> list[Row]:
    """Compare the ways on one collection; every way is asked the same queries."""
    kmeans = faiss.Kmeans(keys.shape[1], n_cells, niter=8, seed=1)
    kmeans.train(keys)
    cells: IntArray = kmeans.index.search(keys, 1)[1][:, 0]
    chosen: IntArray = kmeans.index.search(queries, probes)[1]
    rows = []
    for name, codes in kinds().items():
        with tempfile.TemporaryDirectory() as folder:
            shard = build(folder, keys, cells, codes)
            exact, cpu = ask(shard, queries, chosen, edge.SearchParams(exact=True))
            rows.append(_row(name, None, exact, exact, cpu, len(keys)))
            for wanted in _OVERSAMPLING:
                by_codes = edge.QuantizationSearchParams(rescore=True, oversampling=wanted)
                params = edge.SearchParams(quantization=by_codes)
                found, cpu = ask(shard, queries, chosen, params)
                rows.append(_row(name, wanted, found, exact, cpu, len(keys)))
            shard.close()
    return rows


def _row(
    name: str,
    wanted: float | None,
    found: list[set[int]],
    exact: list[set[int]],
    cpu: float,
    keys: int,
) -> Row:
    pairs = zip(found, exact, strict=True)
    agreement = float(np.mean([len(one & other) / K for one, other in pairs]))
    row = Row(codes=name, oversampling=wanted, agreement=agreement, cpu_ms=cpu, keys=keys)
    how = "exact" if wanted is None else f"x {wanted:g}"
    click.echo(f"{name:<7} {how:<6} {agreement:.4f} {cpu:6.2f} ms")
    return row


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default=50_000, show_default=True, help="Keys, from the first.")
@click.option("--queries", default=500, show_default=True, help="Test queries.")
@click.option("--cells", default=64, show_default=True)
@click.option("--probes", default=12, show_default=True, help="Cells a query searches.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    keys: int,
    queries: int,
    cells: int,
    probes: int,
    json_file: Path | None,
    cache: Path,
) -> None:
    """Measure on DATA: a folder of arrays, pydocs, or beir:NAME."""
    try:
        found = load(Source(data, cache), show_progress)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc
    some = np.ascontiguousarray(found.keys[:keys], dtype=np.float32)
    rows = measure(some, found.test[:queries], cells, probes)
    if json_file is not None:
        replace_file(json_file, msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    main()
