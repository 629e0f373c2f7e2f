"""What trainings of more keys would take, worked out from what ``scale.py`` has measured.

    python benchmarks/scale_sizing.py rows.json

Nothing here is measured but the rates: how many operations a second one processor does in the exact
answers of the largest training in the file, how fast it reads keys, and how memory grows from the
smallest training to the largest. The operations of every other step are counted (``work``), with as
many cells as the square root of the keys, and what they predict for the trainings in the file is
printed beside what these took. Time on several workers is that of what is done key by key, divided
among them, and of k-means and the nets, which one process does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.output import table
from benchmarks.scale import READ, Row

_SIZES = (10_000_000, 100_000_000, 1_000_000_000)
_WORKERS = (1, 8, 64)
_PASSES = 6  # over the keys: answers, equals, popularity, two cuts, sketches
_KEY_BY_KEY = ("exact answers", "cut cells", "cut cells as queries see them")
_LLOYD, _FAISS = 12, 25  # iterations of the two kinds of k-means
_SAMPLE = 256  # keys a cell


@dataclass(frozen=True)
class Work:
    """Operations: of the exact answers, of the other passes over the keys, and of k-means."""

    answers: float
    passes: float
    k_means: float


def work(keys: int, queries: int, dim: int) -> Work:
    """Count the operations of a training."""
    cells = keys**0.5
    sample = min(keys, max(100_000, _SAMPLE * cells))
    return Work(
        answers=2.0 * keys * queries * dim,
        passes=keys * (4.0 * cells * dim + 4.0 * dim * dim),  # two cuts; the map and its moments
        k_means=2.0 * sample * cells * dim * (_LLOYD + _FAISS),
    )


@click.command()
@click.argument("rows", type=click.Path(path_type=Path, exists=True))
@click.option("--queries", default=40_000, show_default=True)
@click.option("--dim", default=384, show_default=True)
def main(rows: Path, queries: int, dim: int) -> None:
    """Work out sizes from the ROWS of a local run."""
    measured = msgspec.json.decode(rows.read_bytes(), type=list[Row])
    counts = sorted({row.keys for row in measured})
    by = {(row.keys, row.stage): row for row in measured}
    last = counts[-1]
    rate = work(last, queries, dim).answers / by[last, "exact answers"].cpu_s
    reading = 4.0 * dim * last / by[last, READ].cpu_s
    click.echo(f"one processor: {rate / 1e9:.1f} GFLOP/s, {reading / 1e6:.0f} MB/s read\n")
    header = ["keys", "answers: counted s", "measured", "cells: counted s", "measured"]
    checked = []
    for count in counts:
        todo = work(count, queries, dim)
        taken = [by[count, stage].cpu_s for stage in _KEY_BY_KEY]
        cells = (todo.passes + todo.k_means) / rate
        numbers = [todo.answers / rate, taken[0], cells, sum(taken[1:])]
        checked.append([f"{count:,}", *(f"{number:.0f}" for number in numbers)])
    click.echo(table(header, checked) + "\n")
    low, high = by[counts[0], "all"].peak_mb, by[last, "all"].peak_mb
    per_key = max(0.0, high - low) * 2**20 / max(1, last - counts[0])
    nets = sum(row.cpu_s for row in measured if row.keys == last and row.stage.startswith("train "))
    sized = []
    for count in _SIZES:
        todo = work(count, queries, dim)
        shared = (todo.answers + todo.passes) / rate + _PASSES * 4.0 * dim * count / reading
        alone = todo.k_means / rate + nets
        memory = (high + per_key * (count - last) / 2**20) / 1024
        times = [_time(shared / workers + alone) for workers in _WORKERS]
        sized.append([f"{count:,}", f"{count**0.5:,.0f}", *times, f"{memory:.0f} GiB"])
    header = ["keys", "cells", *(f"{workers} workers" for workers in _WORKERS), "first process"]
    click.echo(table(header, sized))


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    main()
