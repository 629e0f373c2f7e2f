"""Whether a recall target holds, for whom, and what it costs beside the native search.

    python benchmarks/promises.py DATA --json promises.json

DATA is a folder as for ``routing.py``. Every situation is trained as ``amips train`` trains and
planned as a service plans; recall and cost are of test queries that no training has seen. The
native search is as many k-means cells, of which as many are probed as just reach the target.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.contents import KNOWN_CELLS
from amips_plugins.bundle.loading import load_hook
from amips_plugins.bundle.package import Bundle
from amips_plugins.cli.progress import show_progress
from amips_plugins.errors import InvalidInput
from amips_plugins.export.clustering import centre_of, native_cells
from amips_plugins.export.dataset import Split, TrainingTask, pose
from amips_plugins.export.queries import QuerySplits
from amips_plugins.export.routers import native_candidate
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.models.hooks import RouteHook
from amips_plugins.plan import Target
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys
from benchmarks.data import Source, load
from benchmarks.live_promises import World, filtered, traffic
from benchmarks.promise_rows import HEADER, Row, show

_TARGETS = (0.90, 0.93, 0.95)
_COPIES = 5
_SHIFT = np.float32(1_000.0)


@dataclass(frozen=True)
class Situation:
    """What is trained on, and asked.

    Attributes
    ----------
    name
        What its rows say.
    keys, train, test
        ``(n, dim)`` float32; ``train`` with repeats, as a log has them.
    ks
        Numbers of keys asked for.
    metric
        How keys are compared.
    asked
        ``(n_test,)`` how often each test query is asked; None for once.
    """

    name: str
    keys: FloatArray
    train: FloatArray
    test: FloatArray
    ks: tuple[int, ...] = (10,)
    metric: Metric = Metric.COSINE
    asked: IntArray | None = None


def situations(
    keys: FloatArray, train: FloatArray, test: FloatArray, counts: Sequence[int]
) -> Iterator[Situation]:
    """Return what is tried."""
    for count in counts:
        ks = (10,) if count < max(counts) else (1, 10, 50, 100)
        yield Situation(f"{count} queries", keys, train[:count], test, ks)
    some = max(min(counts), min(1_000, max(counts)))
    fewer = keys[: len(keys) // _COPIES]
    repeated = np.repeat(fewer, _COPIES, axis=0)
    yield Situation(f"each key {_COPIES} times", repeated, train[:some], test)
    # Vague is what lies far from every key; such queries are asked five times.
    vague, vague_test = (_vague(queries, keys) for queries in (train[:some], test))
    log = np.concatenate([train[:some], *[train[:some][vague]] * 4])
    asked = np.where(vague_test, 5, 1)
    yield Situation("vague queries are popular", keys, log, test, asked=asked)
    for shift, name in ((np.float32(0.0), "L2"), (_SHIFT, f"L2, {_SHIFT:,.0f} off the origin")):
        yield Situation(name, keys + shift, train[:some] + shift, test + shift, metric=Metric.L2)


def measure(situation: Situation, n_cells: int, work: Path) -> list[Row]:
    """Train, and ask the test queries at every target."""
    folder = work / "".join(c if c.isalnum() else "-" for c in situation.name)
    collection = MemoryCollection(situation.keys, metric=situation.metric)
    snapshot = take_snapshot(collection, folder / "snap", progress=show_progress)
    options = TrainOptions(model="linear", n_cells=n_cells, spill=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = train(snapshot, situation.train, folder / "run", options, show_progress)
    task = _judge(situation, folder)
    native = native_candidate(task, *native_cells(task.keys, task.metric, n_cells, 0))
    probed = native.measure(task.test)
    weights = np.ones(len(situation.test)) if situation.asked is None else situation.asked
    weights = weights / weights.sum()
    rows = []
    for k in situation.ks:
        native_by_level = weights @ probed.recall(k)
        for target in _TARGETS:
            level = int((native_by_level >= target).argmax())
            native_cost = float(weights @ probed.scanned[:, level]) + probed.model
            recalls, costs = _served(run, task.test, k, target)
            learned = costs is not None
            row = Row(
                situation=situation.name,
                target=target,
                k=k,
                recall=float(weights @ recalls),
                native_recall=float(native_by_level[level]),
                cost_ratio=float(weights @ costs) / native_cost if costs is not None else 1.0,
                answered_by="learned" if learned else "native",
            )
            rows.append(row)
            click.echo(show(row))
    return rows


def _served(run: Run, test: Split, k: int, target: float) -> tuple[FloatArray, FloatArray | None]:
    """Return recall@k and cost of every query as a service plans it; no cost if natively."""
    bundle = Bundle.in_folder(run.bundle)
    hook = load_hook(bundle)
    exact = np.ones(len(test.queries), dtype=np.float32)
    try:
        plan = hook.plan(test.queries, Target(k, target))
    except InvalidInput:
        return exact, None
    if plan.cells is None or plan.shares is None or not isinstance(hook, RouteHook):
        return exact, None
    assignment = np.load(run.bundle / KNOWN_CELLS, allow_pickle=False)[:, 0]
    hit_cells = assignment[test.hits]
    found = (hit_cells[:, :, None] == plan.cells[:, None, :]).any(axis=2)
    as_good = test.hits.shape[1] if test.as_good is None else test.as_good[:, k - 1, None]
    good = found & (np.arange(found.shape[1]) < as_good)
    recalls = np.minimum(good.sum(axis=1), k).astype(np.float32) / k
    model = run.manifest.parameters / test.unit.shape[1] / len(assignment)
    return recalls, plan.shares + np.float32(model)


def _judge(situation: Situation, folder: Path) -> TrainingTask:
    """Look up the exact answers of the test queries."""
    nobody = situation.test[:0]
    splits = QuerySplits(nobody, nobody, nobody, situation.test, "log")
    metric, centre = situation.metric, centre_of(situation.keys, situation.metric)
    return pose(
        situation.keys,
        lift_keys(situation.keys, metric, centre),
        metric,
        splits,
        k=max(situation.ks),
        recall=_TARGETS[-1],
        seed=0,
        device=torch.device("cpu"),
        work=folder,
        progress=no_progress,
        centre=centre,
    )


def _vague(queries: FloatArray, keys: FloatArray) -> np.typing.NDArray[np.bool_]:
    best = np.concatenate([(part @ keys.T).max(axis=1) for part in np.array_split(queries, 16)])
    vague: np.typing.NDArray[np.bool_] = best < np.median(best)
    return vague


def _live(
    keys: FloatArray,
    queries: FloatArray,
    test: FloatArray,
    cells: int,
    work: Path,
    only: str,
    n_asked: int,
) -> Iterator[Row]:
    """Serve a shard; a fifth of the test queries are measured under filters, the others teach."""
    kept = len(test) // 5
    with World.built(keys, queries, cells, work) as world:
        if not only.startswith("traffic"):
            yield from filtered(world, test[kept : 3 * kept], test[:kept])
        if not only.startswith("filter"):
            yield from traffic(world, test, n_asked)


def _write(out: Path | None, rows: list[Row]) -> None:
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2))


@click.command()
@click.argument("data")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the rows here.")
@click.option("--queries", default="300,500,600,1000,5000", show_default=True)
@click.option("--keys", "n_keys", default=100_000, show_default=True)
@click.option("--test", "n_test", default=1_000, show_default=True)
@click.option("--cells", default=64, show_default=True)
@click.option("--served", "n_served", default=40_000, show_default=True, help="Keys of the shard.")
@click.option("--asked", "n_asked", default=50_000, show_default=True, help="Queries of traffic.")
@click.option("--only", default="", help="Situations that begin like this; live: those served.")
def main(
    data: str,
    out: Path | None,
    queries: str,
    n_keys: int,
    n_test: int,
    cells: int,
    n_served: int,
    n_asked: int,
    only: str,
) -> None:
    """Measure every situation on DATA."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="amips-promises-") as work:
        dataset = load(Source(data, Path(work)), show_progress)
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.permutation(len(dataset.keys))[:n_keys])
        counts = [int(count) for count in queries.split(",")]
        shuffled = dataset.train[rng.permutation(len(dataset.train))[: max(counts)]]
        rows: list[Row] = []
        click.echo(HEADER)
        keys = np.asarray(dataset.keys[chosen], dtype=np.float32)
        for situation in situations(keys, shuffled, dataset.test[:n_test], counts):
            if situation.name.startswith(only):
                rows += measure(situation, cells, Path(work))
        served = keys[:: max(1, len(keys) // n_served)][:n_served]
        if only in ("", "live") or only.startswith(("filter", "traffic")):
            for row in _live(served, shuffled, dataset.test, cells, Path(work), only, n_asked):
                rows.append(row)
                click.echo(show(row))
                _write(out, rows)
        _write(out, rows)


if __name__ == "__main__":
    main()
