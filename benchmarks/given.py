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
the same number. With ``--seed`` another part of the queries calibrates, and routers begin
elsewhere. With ``--engine`` the CPU of engines that hold a graph for each partition is measured in
place of all that (``given_costs.py``).
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

from amips_plugins.export.candidates import Candidate
from amips_plugins.export.clustering import cell_means, native_cells
from amips_plugins.export.cost_curves import calibrate, thresholds_for
from amips_plugins.export.dataset import Split, TrainingTask, choose_device, pose
from amips_plugins.export.executors import LOCAL
from amips_plugins.export.given import Given, many_heads, with_keys
from amips_plugins.export.promises import MAX_K, _at_thresholds
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
from benchmarks.given_costs import EngineRow, Priorities, measure_engine
from benchmarks.given_qdrant import ENGINES

__all__ = ["Row", "main", "measure", "rows_of"]

K = 10
RECALLS = (0.90, 0.95, 0.98)
HELD_OUT = 2_000  # queries to validate with, and as many to calibrate
HEADS = 16
_NEAREST, _SHARE = 100, 0.2  # keys that vote, out of this share of all

Priority = Callable[[Split], FloatArray]
Measured = Iterator[tuple[float, float, float, float]]
"""For each recall: what was found, partitions searched, and the share of the keys."""


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
    seed: int = 0


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


def measure(priority: Priority, task: TrainingTask, given: Given) -> Measured:
    """Measure above the threshold that reaches each recall on calibration queries."""
    tuned, fresh = priority(task.calibrate), priority(task.test)
    wanted = given.assignment[task.calibrate.hits[:, :K]]
    at_hits = np.take_along_axis(tuned, wanted, axis=1).ravel()
    hit_cells = given.assignment[task.test.hits[:, :K]]
    for recall in RECALLS:
        least = float(np.quantile(at_hits, 1 - recall))
        yield recall, *searched(fresh, least, hit_cells, given)


def searched(
    priority: FloatArray, least: float, hit_cells: IntArray, given: Given
) -> tuple[float, float, float]:
    """Return what is found above a threshold, partitions searched, and the share of the keys."""
    chosen = priority >= least
    chosen[np.arange(len(chosen)), priority.argmax(axis=1)] = True
    found = float(np.take_along_axis(chosen, hit_cells, axis=1).mean())
    share = float((chosen @ given.cells.sizes).mean() / len(given.assignment))
    return found, float(chosen.sum(axis=1).mean()), share


def promised(router: Candidate, task: TrainingTask, given: Given) -> Measured:
    """Measure the same with the thresholds that carry the guarantee (``amips train``)."""
    assert router.priority is not None
    validated = given.assignment[task.validate.hits[:, :K]]
    thresholds = thresholds_for(router.priority(task.validate), validated)
    calibration = calibrate(_at_thresholds(router, task.calibrate, thresholds), thresholds, MAX_K)
    fresh, hit_cells = router.priority(task.test), given.assignment[task.test.hits[:, :K]]
    for recall in RECALLS:
        if calibration.unpromised(K, recall) is not None:
            continue
        yield recall, *searched(fresh, calibration.threshold(K, recall), hit_cells, given)


def votes(task: TrainingTask, given: Given) -> tuple[Priority, int]:
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


def trained_heads(task: TrainingTask, given: Given) -> Candidate:
    """Train the router that ``amips train`` publishes."""
    return train_router(
        "supportnet",
        PRESETS["default"]["heads"],
        with_keys(task),
        given.as_cells(task),
        given.assignment,
        begun=many_heads(task, given, HEADS),
        size_power=0.0,
    )


def methods(
    task: TrainingTask, given: Given, *, quick: bool, only_heads: bool = False
) -> Iterator[tuple[str, Measured, int]]:
    """Yield names, figures and multiplications, the cheapest to find out first."""

    def measured(priority: Priority) -> Measured:
        return measure(priority, task, given)

    n_cells, sizes = given.cells.n_cells, given.cells.sizes
    few = len(task.train.queries) < 10_000
    cells, presets = given.as_cells(task), PRESETS["default"]
    if not (few or only_heads):
        held = np.bincount(
            given.assignment[task.train.hits[:, :K]].ravel(), minlength=n_cells
        ).astype(np.float32)
        none = np.zeros(n_cells, dtype=np.float32)
        yield "all", measured(lambda split: np.tile(none, (len(split.unit), 1))), 0
        yield "largest first", measured(lambda split: np.tile(held, (len(split.unit), 1))), 0
        means = normalise(cell_means(task.keys, given.assignment, n_cells))
        yield "nearest mean", measured(lambda split: split.unit @ means.T), means.size
    if not only_heads:
        linear = train_router(
            "linear", presets["linear"], task, cells, given.assignment, size_power=0.0
        )
        assert linear.priority is not None
        yield "linear", measured(linear.priority), linear.parameters
    if quick:
        return
    heads = trained_heads(task, given)
    assert heads.priority is not None
    by_heads = heads.priority
    half = 0.5 * np.log(sizes).astype(np.float32)
    for name, router in (
        (f"heads ({HEADS})", heads),
        (f"heads ({HEADS}), keys", replace(heads, priority=lambda split: by_heads(split) - half)),
    ):
        assert router.priority is not None
        yield name, measured(router.priority), heads.parameters
        yield f"{name}, promised", promised(router, task, given), heads.parameters
    if few or only_heads:
        return
    priority, multiplications = votes(task, given)
    yield "votes", measured(priority), multiplications
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
    yield "mlp", measured(mlp.priority), mlp.parameters


def cut_by(labels: IntArray) -> Given:
    """Return the partitions that labels tell apart."""
    names, counts = np.unique(labels, return_counts=True)
    partitions = Partitions("section", tuple(names.tolist()))
    return Given(GivenCells(partitions, counts), partitions.cells_of(labels.tolist()))


def rows_of(
    situation: str,
    task: TrainingTask,
    labels: IntArray,
    *,
    quick: bool = False,
    heads: bool = False,
) -> Iterator[Row]:
    """Measure every method over partitions."""
    asked = methods(task, cut_by(labels), quick=quick, only_heads=heads)
    for method, measured, multiplications in asked:
        model = multiplications / task.lifted.shape[1] / len(task.keys)
        for recall, found, searches, keys in measured:
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
                seed=task.seed,
            )


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the rows.")
@click.option("--few", multiple=True, type=int, default=(2_000, 500), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep exact answers here.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True)
@click.option("--only-heads", is_flag=True, help="Measure the routers that are published alone.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(list(ENGINES)))
@click.option("--asked", default=(1_000, 2_000), type=(int, int), help="Calibration, test queries.")
def main(
    data: Path,
    out: Path | None,
    few: tuple[int, ...],
    work: Path | None,
    seeds: tuple[int, ...],
    only_heads: bool,
    engines: tuple[str, ...],
    asked: tuple[int, int],
) -> None:
    """Measure given partitions on the vectors in DATA."""
    keys, train, test = (
        normalise(np.load(data / f"{name}.npy").astype(np.float32))
        for name in ("keys", "queries_train", "queries_test")
    )
    sections = np.load(data / "sections.npy").astype(np.int64)
    rows: list[Row | EngineRow] = []

    def say(row: Row | EngineRow) -> None:
        rows.append(row)
        click.echo(json.dumps(asdict(row)))
        if out is not None:
            out.write_text(json.dumps([asdict(one) for one in rows], indent=1))

    with tempfile.TemporaryDirectory() as temporary:
        for seed in seeds:
            place = Path(temporary) / str(seed)
            place.mkdir()
            kept = place if work is None else work / str(seed)
            task = posed(keys, train, test, seed, place, kept)
            if engines:
                for row in on_engines(engines, task, sections, asked, kept):
                    say(row)
                continue
            for number, one in enumerate(situations(task, sections, few, only_heads=only_heads)):
                folder = place / f"situation{number}"
                folder.mkdir()
                there = replace(one.task, work=folder)
                quick = one.quick
                for found in rows_of(one.name, there, one.labels, quick=quick, heads=only_heads):
                    say(found)


def posed(
    keys: FloatArray, train: FloatArray, test: FloatArray, seed: int, place: Path, kept: Path
) -> TrainingTask:
    """Split the queries, and look their exact answers up."""
    mixed = train if seed == 0 else train[np.random.default_rng(seed).permutation(len(train))]
    learn, validate, calibrate = np.split(mixed, [len(train) - 2 * HELD_OUT, len(train) - HELD_OUT])
    answers = RunFolder(kept, {})
    answers.work.mkdir(parents=True, exist_ok=True)
    lifted, device = lift_keys(keys, Metric.COSINE), choose_device()
    return pose(
        keys,
        lifted,
        Metric.COSINE,
        QuerySplits(learn, validate, calibrate, test, "log"),
        k=K,
        recall=RECALLS[1],
        seed=seed,
        device=device,
        work=place,
        progress=no_progress,
        look_up=answers.look_up(lifted, device, no_progress, LOCAL),
    )


@dataclass(frozen=True)
class Situation:
    """Labels of the keys, and who learns them from what."""

    name: str
    task: TrainingTask
    labels: IntArray
    quick: bool = False


def situations(
    task: TrainingTask, sections: IntArray, few: tuple[int, ...], *, only_heads: bool
) -> Iterator[Situation]:
    """Yield the sections, with all queries and with few, and what they are compared with."""
    yield Situation("sections", task, sections)
    for count in few:
        some = replace(task, train=task.train.take(np.arange(count)))
        yield Situation("sections", some, sections)
    if not only_heads:
        permuted = sections[np.random.default_rng(0).permutation(len(sections))]
        yield Situation("permuted", task, permuted, quick=True)
        n_cells = len(np.unique(sections))
        topical = native_cells(task.keys, Metric.COSINE, n_cells, 0)[1]
        yield Situation("topical", task, topical, quick=True)


def on_engines(
    names: tuple[str, ...],
    task: TrainingTask,
    sections: IntArray,
    asked: tuple[int, int],
    kept: Path,
) -> Iterator[EngineRow]:
    """Measure what searches of the sections cost engines."""
    given = cut_by(sections)
    calibrate = task.calibrate.take(np.arange(min(asked[0], len(task.calibrate.queries))))
    test = task.test.take(np.arange(min(asked[1], len(task.test.queries))))
    hits = given.assignment[task.train.hits[:, :K]].ravel()
    held = np.bincount(hits, minlength=given.cells.n_cells) + given.cells.sizes / 1e3
    prior = np.log(held / held.sum())
    by = {
        "largest first": Priorities(
            np.tile(prior, (len(calibrate.queries), 1)), np.tile(prior, (len(test.queries), 1))
        ),
        "routed": routed_by_heads(task, given, calibrate, test, kept / "heads.npz"),
    }
    for name in names:
        with tempfile.TemporaryDirectory() as folder, ENGINES[name](Path(folder)) as engine:
            engine.load(np.asarray(task.keys), given.assignment)
            yield from measure_engine(name, engine, calibrate, test, given.assignment, by, RECALLS)


def routed_by_heads(
    task: TrainingTask, given: Given, calibrate: Split, test: Split, file: Path
) -> Priorities:
    """Train the router, or read what one said of the same queries."""
    if not file.exists():
        heads = trained_heads(task, given)
        assert heads.priority is not None
        np.savez(file, calibrate=heads.priority(task.calibrate), test=heads.priority(task.test))
    with np.load(file, allow_pickle=False) as said:
        counts = len(calibrate.queries), len(test.queries)
        return Priorities(said["calibrate"][: counts[0]], said["test"][: counts[1]])


if __name__ == "__main__":
    main()
