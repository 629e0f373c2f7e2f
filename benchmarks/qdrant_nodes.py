"""What routing to shards saves a Qdrant cluster of three nodes, with a replica of every shard.

    python benchmarks/qdrant_nodes.py npm2pypi --json nodes.json

Starts the program ``qdrant`` that is on PATH three times, on loopback. A collection of six shards,
each on two nodes, is searched as it is, with and without int8 codes, and laid out in shard keys, as
the product does it, with as many replicas. CPU is that of all nodes together. Efforts and cells are
chosen on calibration queries, every setting on some of its own; what is reported are test queries,
each asked once of each method.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import AmipsError
from benchmarks.data import Source, load
from benchmarks.learned import train_routing
from benchmarks.protocols import pose
from benchmarks.qdrant_bench import INT8, Bench, first_keys
from benchmarks.qdrant_shards import (
    RESCORED,
    Queries,
    asking_over_grpc,
    cells_in_shards,
    followed,
    in_shards,
    measure,
)
from integration_tests.servers import QdrantProcess

_NODES, _SHARDS, _REPLICAS = 3, 6, 2


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default=100_000, show_default=True, help="Keys, from the first.")
@click.option("--cells", default=64, show_default=True, help="Cells, a shard key for each.")
@click.option("--queries", default=2_000, show_default=True, help="Test queries.")
@click.option("--each", default=100, show_default=True, help="Calibration queries a setting.")
@click.option("--epochs", type=int, help="Of training; default the recipe's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    keys: int,
    cells: int,
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
            task = pose(dataset, "unseen", 0, Path(work), show_progress)
            routing = train_routing(task, cells, epochs)
            first = stack.enter_context(QdrantProcess(settings, cluster=True))
            nodes = [first]
            while len(nodes) < _NODES:
                nodes.append(stack.enter_context(QdrantProcess(settings, joins=first)))
            client = first.address.client(timeout=600)
            bench = Bench(nodes, client, np.asarray(dataset.keys), [], json_file)
            tuning = Queries(task.calibrate, each)
            spread = {"shard_number": _SHARDS, "replication_factor": _REPLICAS}
            laid_out = cells_in_shards(bench, routing, **spread)
            with bench.work("load", "int8 codes"):
                bench.fill("codes", INT8, **spread)
            half, test = queries // 2, task.test
            measure(
                bench,
                [
                    ("six shards", followed(bench, tuning, "docs", shards=_SHARDS)),
                    (
                        "six shards, int8 rescored",
                        followed(bench, tuning, "codes", RESCORED, shards=_SHARDS),
                    ),
                    ("routed to shards", in_shards(bench, tuning, laid_out, routing)),
                ],
                replace(test, queries=test.queries[:half], hits=test.hits[:half]),
                replace(test, queries=test.queries[half:queries], hits=test.hits[half:queries]),
                lambda: asking_over_grpc(bench, laid_out),
            )
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main()
