"""What trainings of more keys would take, worked out from what ``scale.py`` has measured.

    python benchmarks/scale_sizing.py rows.json

Nothing here is measured but the rates: how many operations a second one processor does in the
exact answers of the largest training in the file, and how many when it cuts cells; how fast it
reads keys; what everything else takes a key; and how memory grows from the smallest training to
the largest. The operations of every step are counted (``work``), with as many cells as the square
root of the keys, and what they predict for the trainings in the file is printed beside what these
took. Time on several workers is that of what is done key by key, divided among them, and of the
rest, which one process does.

The law: the keys that a search of some recall costs, the router's own among them, as a power of
the number of keys, fitted by least squares of the logarithms.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.cli.output import table
from benchmarks.scale import READ, Row

_SIZES = (10_000_000, 100_000_000, 1_000_000_000)
_WORKERS = (1, 8, 64)
_PASSES = 6  # over the keys: answers, equals, popularity, two cuts, sketches
ANSWERS = "exact answers"
_CELLS = ("cut cells", "cut cells as queries see them")
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
    most = work(last, queries, dim)
    answering = most.answers / by[last, ANSWERS].cpu_s
    cutting = (most.passes + most.k_means) / _cells(by, last)
    reading = 4.0 * dim * last / by[last, READ].cpu_s
    other = by[last, "all"].cpu_s - by[last, ANSWERS].cpu_s - _cells(by, last)
    click.echo(
        f"one processor: {answering / 1e9:.1f} GFLOP/s in exact answers, {cutting / 1e9:.1f} in "
        f"cells, {reading / 1e6:.0f} MB/s read; the rest of the largest takes {other:.0f} s\n"
    )
    header = ["keys", "answers: counted s", "measured", "cells: counted s", "measured"]
    checked = []
    for count in counts:
        todo = work(count, queries, dim)
        cells = (todo.passes + todo.k_means) / cutting
        taken = by[count, ANSWERS].cpu_s, _cells(by, count)
        numbers = [todo.answers / answering, taken[0], cells, taken[1]]
        checked.append([f"{count:,}", *(f"{number:.0f}" for number in numbers)])
    click.echo(table(header, checked) + "\n")
    low, high = by[counts[0], "all"].peak_mb, by[last, "all"].peak_mb
    per_key = max(0.0, high - low) * 2**20 / max(1, last - counts[0])
    sized = []
    for count in _SIZES:
        todo = work(count, queries, dim)
        shared = todo.answers / answering + todo.passes / cutting
        shared += _PASSES * 4.0 * dim * count / reading
        alone = todo.k_means / cutting + other * count / last
        memory = (high + per_key * (count - last) / 2**20) / 1024
        times = [_time(shared / workers + alone) for workers in _WORKERS]
        sized.append([f"{count:,}", f"{count**0.5:,.0f}", *times, f"{memory:.0f} GiB"])
    header = ["keys", "cells", *(f"{workers} workers" for workers in _WORKERS), "first process"]
    click.echo(table(header, sized) + "\n")
    for recall in (90, 95):
        costs = [getattr(by[count, "all"], f"total_{recall}") for count in counts]
        if len(counts) > 1 and None not in costs:
            power = np.polyfit(np.log(counts), np.log(np.multiply(counts, costs)), 1)[0]
            click.echo(f"keys that recall@10 .{recall} costs grow as n^{power:.2f}")


def _cells(by: dict[tuple[int, str], Row], count: int) -> float:
    return sum(by[count, stage].cpu_s for stage in _CELLS)


def _time(seconds: float) -> str:
    if seconds >= 48 * 3600:
        return f"{seconds / 86_400:.1f} days"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    main()
