"""What a training takes as the keys grow: seconds, processor time and memory, stage by stage.

    python benchmarks/scale.py DATA --keys 100000,300000 --engine local --json rows.json

DATA is a folder with ``keys.npy``, ``queries_train.npy`` and ``queries_test.npy`` (or the variable
AMIPS_BENCH_DATA names it). More keys than it has are repeats with noise (``enlarge``). There are as
many cells as the square root of the keys, or ``--cells``; with few of them, and few ``--queries``,
what is left is what grows with the keys alone. Every training is a process of its own, over a
snapshot in shards, and tells of its stages on stderr as they end.

``peak_mb`` is the anonymous memory of the largest process, ours or a worker's, of which the imports
of torch and of the rest take what the stage ``start`` says; pages of files are not counted, for the
system may drop them. ``total`` is what the published router costs on the held-out queries, in full
scans, its own cost included.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.output import table
from amips_plugins.collection import CollectionInfo, Cursor, KeyBatch
from amips_plugins.export.keys import Shard, blocks
from amips_plugins.export.sharded_snapshot import take_sharded_snapshot
from amips_plugins.export.snapshot import Snapshot, finished
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.files import replace_file
from amips_plugins.vectors import FloatArray, Metric
from benchmarks.data import Source, load
from benchmarks.enlarge import enlarge
from benchmarks.stages import Stages

READ = "read the keys once"
_READERS = 2
_TARGETS = (0.90, 0.95)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one training.

    Attributes
    ----------
    keys, engine, workers
        What was trained on, by whom, and how many worked at once.
    cells, queries
        How many there were, queries of all splits.
    stage
        Its title; ``all`` for the whole.
    seconds, cpu_s
        Wall clock, and processor time of all processes.
    peak_mb
        Largest anonymous memory of one process, in 2^20 bytes.
    total_90, total_95
        Of the whole: what recall@10 of .90 and .95 cost; None where out of reach.
    """

    keys: int
    engine: str
    workers: int
    stage: str
    seconds: float
    cpu_s: float
    peak_mb: float
    cells: int = 0
    queries: int = 0
    total_90: float | None = None
    total_95: float | None = None


@dataclass
class Mapped:
    """A collection whose keys lie in a file: their ids are their rows."""

    keys: FloatArray
    partitions: None = None

    @property
    def info(self) -> CollectionInfo:
        """Say what it is."""
        return CollectionInfo("memory", "docs", "", Metric.COSINE, self.keys.shape[1])

    def count(self) -> int:
        """Count the keys."""
        return len(self.keys)

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read the keys behind a row."""
        for low in range(0 if after is None else int(after) + 1, len(self.keys), batch_size):
            high = min(low + batch_size, len(self.keys))
            yield KeyBatch(list(range(low, high)), np.array(self.keys[low:high]), high - 1)


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--keys", default="100000,300000", show_default=True, help="With commas between.")
@click.option("--engine", default="local", show_default=True, help="local, or ray[:ADDRESS].")
@click.option("--memory", default=2.0, show_default=True, help="GiB of the workers.")
@click.option("--model", default="linear", show_default=True)
@click.option("--cells", type=int, help="The root of the keys where left out.")
@click.option("--queries", type=int, help="The first of those in DATA; all where left out.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench"), show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the rows.")
@click.option("--one", type=int, hidden=True, help="Measure this many keys here.")
def main(
    data: str,
    keys: str,
    engine: str,
    memory: float,
    model: str,
    cells: int | None,
    queries: int | None,
    cache: Path,
    out: Path | None,
    one: int | None,
) -> None:
    """Train on growing numbers of the keys in DATA."""
    if one is not None:
        rows = measure(data, one, engine, memory, model, cache, cells, queries)
        sys.stdout.buffer.write(msgspec.json.encode(rows))
        return
    rows = []
    for count in map(int, keys.split(",")):
        prepare(data, count, cache)
        command = [sys.executable, __file__, data, "--one", str(count), "--engine", engine]
        command += ["--memory", str(memory), "--model", model, "--cache", str(cache)]
        asked = {"--cells": cells, "--queries": queries}
        command += [str(word) for pair in asked.items() if pair[1] is not None for word in pair]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603 - ours
        rows += msgspec.json.decode(done.stdout, type=list[Row])
        click.echo(shown([row for row in rows if row.keys == count]) + "\n")
        if out is not None:
            replace_file(out, msgspec.json.format(msgspec.json.encode(rows), indent=1))


def prepare(data: str, count: int, cache: Path) -> Path:
    """Take the snapshot, unless it is there; return its folder."""
    folder = cache / f"snapshot-{Path(data).name}-{count}"
    if not finished(folder):
        enlarged = enlarge(load(Source(data, cache)), count)
        take_sharded_snapshot(Mapped(enlarged.keys), folder, _READERS)  # type: ignore[arg-type] # all that is read of one
    return folder


def measure(
    data: str,
    count: int,
    engine: str,
    memory: float,
    model: str,
    cache: Path,
    n_cells: int | None = None,
    n_queries: int | None = None,
) -> list[Row]:
    """Train once, watched."""
    snapshot = Snapshot.open(prepare(data, count, cache))
    queries = load(Source(data, cache)).train[:n_queries]
    n_cells = round(count**0.5) if n_cells is None else n_cells
    options = TrainOptions(model=model, n_cells=n_cells)  # type: ignore[arg-type] # the command's own check
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        watch = Stages(workers=engine != "local", verbose=True)
        with watch(READ, count):
            for _ in blocks(snapshot.keys(), Shard(0, count)):
                pass
        run = train(
            snapshot, queries, Path(folder) / "run", options, watch, engine=engine, memory=memory
        )
        stages = watch.end()
        workers = watch.most_workers if engine != "local" else _threads(memory, snapshot)
        costs = [_cost(run, recall) for recall in _TARGETS]
    rows = [
        Row(
            keys=count,
            engine=engine,
            workers=workers,
            stage=stage.name,
            seconds=round(stage.seconds, 2),
            cpu_s=round(stage.cpu_s, 2),
            peak_mb=round(stage.peak / 2**20, 1),
            cells=n_cells,
            queries=len(queries),
        )
        for stage in stages
    ]
    return [
        *rows,
        Row(
            keys=count,
            engine=engine,
            workers=workers,
            stage="all",
            seconds=round(sum(row.seconds for row in rows), 2),
            cpu_s=round(sum(row.cpu_s for row in rows), 2),
            peak_mb=max(row.peak_mb for row in rows),
            cells=n_cells,
            queries=len(queries),
            total_90=costs[0],
            total_95=costs[1],
        ),
    ]


def _threads(memory: float, snapshot: Snapshot) -> int:
    from amips_plugins.export.executors import LocalExecutor

    return LocalExecutor(memory, snapshot.manifest.dim).workers


def _cost(run: Run, recall: float) -> float | None:
    found = next(
        figure
        for figure in run.manifest.figures
        if (figure.candidate, figure.k, figure.recall) == (run.manifest.model, 10, recall)
    )
    return None if found.total is None else round(found.total, 5)


def shown(rows: list[Row]) -> str:
    """Return a table of one training."""
    header = ["keys", "engine", "workers", "stage", "seconds", "cpu s", "peak MB", "@.90", "@.95"]
    lines = [
        [
            f"{row.keys:,}",
            row.engine,
            str(row.workers),
            row.stage,
            f"{row.seconds:.1f}",
            f"{row.cpu_s:.1f}",
            f"{row.peak_mb:.0f}",
            "-" if row.total_90 is None else f"{row.total_90:.4f}",
            "-" if row.total_95 is None else f"{row.total_95:.4f}",
        ]
        for row in rows
        if row.stage == "all" or row.seconds >= 0.5
    ]
    return table(header, lines)


if __name__ == "__main__":
    main()
