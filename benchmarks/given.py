"""What a search costs over partitions that people have cut: how many of them, and what they hold.

DATA is a folder with keys.npy (n, dim), sections.npy (n,), queries_train.npy and queries_test.npy.
A method's threshold is the one that reaches the recall on 2,000 calibration queries; figures are
of the test queries, which nothing has been chosen on.

Methods
-------
all
    Every partition: what is done today.
largest first
    Those that held the most hits, whatever is asked: what permuted labels can teach.
nearest mean
    By the mean key of each.
votes
    Of the 100 nearest keys in a fifth of all keys.
linear, mlp
    One score for each partition: linear, or behind 256 hidden units.
heads
    Several linear scores for each, of which the largest counts (``amips train``).
heads, keys
    The same less half the log of a partition's size (``--count keys``).

Situations: ``sections`` as they are, ``permuted`` among the keys, and ``topical``: k-means cells of
the same number.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.export.clustering import cell_means, native_cells
from amips_plugins.export.dataset import Split, TrainingTask, choose_device, pose
from amips_plugins.export.executors import LOCAL
from amips_plugins.export.given import Given, many_heads, with_keys
from amips_plugins.export.queries import QuerySplits
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import train_router
from amips_plugins.export.run_folder import RunFolder
from amips_plugins.export.targets import top_keys
from amips_plugins.export.training_loop import Schedule
from amips_plugins.models.given import GivenCells
from amips_plugins.partitions import Partitions
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, normalise

__all__ = ["Row", "main", "measure", "rows_of"]

K = 10
RECALLS = (0.90, 0.95, 0.98)
HELD_OUT = 2_000  # queries to validate with, and as many to calibrate
HEADS = 16
_NEAREST, _SHARE = 100, 0.2  # keys that vote, out of this share of all

Priorities = Callable[[Split], FloatArray]


@dataclass(frozen=True)
class Row:
    """One method at one recall."""

    situation: str
    method: str
    k: int
    recall: float
    found: float
    searches: float
    keys: float
    model: float
    storage: float
    train_queries: int


class Mlp(nn.Module):
    """A hidden layer, to compare with."""

    def __init__(self, dim: int, n_cells: int, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.second = nn.Parameter(torch.randn(n_cells, width) * width**-0.5)

    def forward(self, u: Tensor) -> Tensor:
        """Map unit queries to scores."""
        return torch.relu(nn.functional.linear(u, self.first, self.bias)) @ self.second.T

    def constrain(self) -> None:
        """Do nothing."""


def measure(
    priority: Priorities, task: TrainingTask, given: Given
) -> Iterator[tuple[float, float, float, float]]:
    """Yield for each recall: what was found, partitions searched, and the share of the keys."""
    tuned, fresh = priority(task.calibrate), priority(task.test)
    wanted = given.assignment[task.calibrate.hits[:, :K]]
    at_hits = np.take_along_axis(tuned, wanted, axis=1).ravel()
    hit_cells = given.assignment[task.test.hits[:, :K]]
    for recall in RECALLS:
        chosen = fresh >= np.quantile(at_hits, 1 - recall)
        chosen[np.arange(len(chosen)), fresh.argmax(axis=1)] = True
        found = float(np.take_along_axis(chosen, hit_cells, axis=1).mean())
        share = float((chosen @ given.cells.sizes).mean() / len(given.assignment))
        yield recall, found, float(chosen.sum(axis=1).mean()), share


def votes(task: TrainingTask, given: Given) -> tuple[Priorities, int]:
    """Let the nearest keys of a sample vote."""
    count = int(_SHARE * len(task.keys))
    rows = np.sort(np.random.default_rng(task.seed).permutation(len(task.keys))[:count])
    sample = np.asarray(task.lifted[rows])
    prior = (given.cells.sizes / len(task.keys)).astype(np.float32)

    def priority(split: Split) -> FloatArray:
        nearest, _ = top_keys(split.unit, sample, _NEAREST, task.device)
        found = np.tile(prior, (len(nearest), 1))  # where nobody votes, the largest first
        for column in range(_NEAREST):
            cells = given.assignment[rows[nearest[:, column]]]
            found[np.arange(len(nearest)), cells] += 1
        shares: FloatArray = np.log(found / found.sum(axis=1, keepdims=True))
        return shares

    return priority, count * task.lifted.shape[1]


def methods(
    task: TrainingTask, given: Given, *, quick: bool
) -> Iterator[tuple[str, Priorities, int]]:
    """Yield names, priorities and multiplications, the cheapest to find out first."""
    n_cells, sizes = given.cells.n_cells, given.cells.sizes
    few = len(task.train.queries) < 10_000
    cells, presets = given.as_cells(task), PRESETS["default"]
    if not few:
        held = np.bincount(
            given.assignment[task.train.hits[:, :K]].ravel(), minlength=n_cells
        ).astype(np.float32)
        yield "all", lambda split: np.zeros((len(split.unit), n_cells), dtype=np.float32), 0
        yield "largest first", lambda split: np.tile(held, (len(split.unit), 1)), 0
        means = normalise(cell_means(task.keys, given.assignment, n_cells))
        yield "nearest mean", lambda split: split.unit @ means.T, means.size
    linear = train_router(
        "linear", presets["linear"], task, cells, given.assignment, size_power=0.0
    )
    assert linear.priority is not None
    yield "linear", linear.priority, linear.parameters
    if quick:
        return
    heads = train_router(
        "supportnet",
        presets["heads"],
        with_keys(task),
        cells,
        given.assignment,
        begun=many_heads(task, given, HEADS),
        size_power=0.0,
    )
    assert heads.priority is not None
    by_heads = heads.priority
    yield f"heads ({HEADS})", by_heads, heads.parameters
    half = 0.5 * np.log(sizes).astype(np.float32)
    yield f"heads ({HEADS}), keys", lambda split: by_heads(split) - half, heads.parameters
    if few:
        return
    yield "votes", *votes(task, given)
    torch.manual_seed(task.seed)
    net = Mlp(task.lifted.shape[1], n_cells)
    preset = replace(presets["linear"], schedule=Schedule(epochs=12, learning_rate=5e-3))
    mlp = train_router(
        "linear",
        preset,
        task,
        cells,
        given.assignment,
        begun=net,  # type: ignore[arg-type]  # has what is used of a router
        size_power=0.0,
        name="mlp",
    )
    assert mlp.priority is not None
    yield "mlp", mlp.priority, mlp.parameters


def rows_of(
    situation: str, task: TrainingTask, labels: IntArray, *, quick: bool = False
) -> Iterator[Row]:
    """Measure every method over partitions."""
    names, counts = np.unique(labels, return_counts=True)
    partitions = Partitions("section", tuple(names.tolist()))
    given = Given(GivenCells(partitions, counts), partitions.cells_of(labels.tolist()))
    for method, priority, multiplications in methods(task, given, quick=quick):
        model = multiplications / task.lifted.shape[1] / len(task.keys)
        for recall, found, searches, keys in measure(priority, task, given):
            count = len(task.train.queries)
            yield Row(
                situation=situation,
                method=method,
                k=K,
                recall=recall,
                found=round(found, 4),
                searches=round(searches, 2),
                keys=round(keys, 4),
                model=round(model, 5),
                storage=1.0,
                train_queries=count,
            )


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the rows.")
@click.option("--few", multiple=True, type=int, default=(2_000, 500), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep exact answers here.")
def main(data: Path, out: Path | None, few: tuple[int, ...], work: Path | None) -> None:
    """Measure given partitions on the vectors in DATA."""
    keys, train, test = (
        normalise(np.load(data / f"{name}.npy").astype(np.float32))
        for name in ("keys", "queries_train", "queries_test")
    )
    sections = np.load(data / "sections.npy").astype(np.int64)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        answers = RunFolder(work or place, {})
        answers.work.mkdir(parents=True, exist_ok=True)
        learn, validate, calibrate = np.split(
            train, [len(train) - 2 * HELD_OUT, len(train) - HELD_OUT]
        )
        splits = QuerySplits(learn, validate, calibrate, test, "log")
        lifted, device = lift_keys(keys, Metric.COSINE), choose_device()
        task = pose(
            keys,
            lifted,
            Metric.COSINE,
            splits,
            k=K,
            recall=RECALLS[1],
            seed=0,
            device=device,
            work=place,
            progress=no_progress,
            look_up=answers.look_up(lifted, device, no_progress, LOCAL),
        )
        rng = np.random.default_rng(0)
        n_cells = len(np.unique(sections))
        permuted = sections[rng.permutation(len(sections))]
        asked: list[tuple[str, TrainingTask, IntArray, bool]] = [
            ("sections", task, sections, False),
            *(
                (
                    "sections",
                    replace(task, train=task.train.take(np.arange(count))),
                    sections,
                    False,
                )
                for count in few
            ),
            ("permuted", task, permuted, True),
            ("topical", task, native_cells(keys, Metric.COSINE, n_cells, 0)[1], True),
        ]
        for number, (situation, one, labels, quick) in enumerate(asked):
            folder = place / str(number)
            folder.mkdir()
            for row in rows_of(situation, replace(one, work=folder), labels, quick=quick):
                rows.append(row)
                click.echo(json.dumps(asdict(row)))
                if out is not None:
                    out.write_text(json.dumps([asdict(one) for one in rows], indent=1))


if __name__ == "__main__":
    main()
