"""What routing to shards saves a Qdrant cluster of three nodes, with a replica of every shard.

    python benchmarks/qdrant_nodes.py npm2pypi --json nodes.json

Starts the program ``qdrant`` that is on PATH three times, on loopback. A collection of some shards,
each on two nodes, is searched as it is, with and without int8 codes, and laid out in shard keys, as
the product does it, with as many replicas, for one number of cells after another. CPU is that of
all nodes together. Efforts and cells are chosen on calibration queries, every setting on some of
its own; what is reported are test queries, each asked once of each method. ``visit`` are searches
of some shard keys, whichever they are: what one of them costs.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from qdrant_client import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError
from amips_plugins.export.dataset import TrainingTask
from amips_plugins.vectors import FloatArray
from benchmarks.data import Source, load
from benchmarks.learned import Routing, train_routing
from benchmarks.protocols import pose
from benchmarks.qdrant_bench import INT8, Bench, K, Search, Way, first_keys
from benchmarks.qdrant_shards import (
    RESCORED,
    Queries,
    asking_over_grpc,
    followed,
    in_shards,
    laid_out_in_shards,
    measure,
)
from integration_tests.servers import QdrantProcess

_NODES, _REPLICAS = 3, 2
_VISITS = 1, 2, 4, 8


def visiting(collection: QdrantCollection, number: int) -> Way:
    """Ask some shard keys, others for every query, by the client itself."""
    client, name = collection._client, collection.info.name
    keys = [one.key for one in client.list_shard_keys(name).shard_keys or ()]
    params = models.SearchParams(hnsw_ef=16)

    def search(query: FloatArray) -> list[list[int]]:
        first = int(abs(float(query[0, 0])) * 1e6)
        chosen = [keys[(first + one) % len(keys)] for one in range(number)]
        client.query_points(
            name, query[0].tolist(), limit=K, search_params=params, shard_key_selector=chosen
        )
        return [[]]

    made: Search = search
    return Way(made, lambda _: number)


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default=100_000, show_default=True, help="Keys, from the first.")
@click.option("--cells", default="64,24,12", show_default=True, help="Cells, a shard key each.")
@click.option("--shards", default=6, show_default=True, help="Of the collection as it is.")
@click.option("--spill", default=0.0, show_default=True, help="Share of further copies of keys.")
@click.option("--queries", default=2_000, show_default=True, help="Test queries.")
@click.option("--each", default=100, show_default=True, help="Calibration queries a setting.")
@click.option("--epochs", type=int, help="Of training; default the recipe's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    keys: int,
    cells: str,
    shards: int,
    spill: float,
    queries: int,
    each: int,
    epochs: int | None,
    json_file: Path | None,
    cache: Path,
) -> None:
    """Measure on DATA: a folder of arrays, pydocs, or beir:NAME."""
    settings = {"service__hardware_reporting": "true"}
    try:
        dataset = first_keys(load(Source(data, cache), show_progress), keys)
        with tempfile.TemporaryDirectory(dir=dataset.cache) as work, ExitStack() as stack:
            first = stack.enter_context(QdrantProcess(settings, cluster=True))
            nodes = [first]
            while len(nodes) < _NODES:
                nodes.append(stack.enter_context(QdrantProcess(settings, joins=first)))
            client = first.address.client(timeout=600)
            bench = Bench(nodes, client, np.asarray(dataset.keys), [], json_file)
            spread: dict[str, Any] = {"shard_number": shards, "replication_factor": _REPLICAS}
            with bench.work("load", "first load and graph"):
                bench.fill("docs", **spread)
            with bench.work("load", "int8 codes"):
                bench.fill("codes", INT8, **spread)
            for number in [int(one) for one in cells.split(",")]:
                folder = Path(work, str(number))
                folder.mkdir()
                task = pose(dataset, "unseen", 0, folder, show_progress)
                routing = train_routing(task, number, epochs, graphs=True, spill=spill)
                tuning = Queries(task.calibrate, each)
                measure_cells(bench, task, routing, shards, queries, tuning)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc


def measure_cells(
    bench: Bench,
    task: TrainingTask,
    routing: Routing,
    shards: int,
    queries: int,
    tuning: Queries,
) -> None:
    """Lay out in its cells, compare with the collection as it is, and remove them."""
    number = routing.n_cells
    native = [
        (f"{shards} shards", followed(bench, tuning, "docs", shards=shards)),
        (
            f"{shards} shards, int8 rescored",
            followed(bench, tuning, "codes", RESCORED, shards=shards),
        ),
    ]
    half, test = queries // 2, task.test
    singles = replace(test, queries=test.queries[:half], hits=test.hits[:half])
    batches = replace(test, queries=test.queries[half:queries], hits=test.hits[half:queries])
    laid_out = laid_out_in_shards(bench, routing, "docs")
    bench.rest()
    visits = {f"{some} of {number} shards": visiting(laid_out, some) for some in _VISITS}
    bench.compare("visit", visits, None, singles, 1)
    routed = (f"routed to {number} shards", in_shards(bench, tuning, laid_out, routing))
    over_grpc = partial(asking_over_grpc, bench, laid_out)
    measure(bench, [*native, routed], singles, batches, over_grpc)
    bench.client.delete_collection(laid_out.info.name)  # its alias goes with it


if __name__ == "__main__":
    main()
