"""A router over given partitions as it serves: its promise, its plan's time, and calls saved.

DATA is that of ``benchmarks/given.py``. One router with several heads for each partition is trained
and written as a bundle has it; then

resampled
    20 times 2,000 queries are drawn from a pool that nothing has learned from, and calibrated on;
    mean recall@k of the test queries is taken at every target.
plan
    Microseconds of a plan of one query: the least and the median of many rounds.
many values
    The same of 10,000 values with one score each (made up, since their time does not depend on what
    they are), and the bytes of the model; all that is measured with ``--many``.
calls
    Milliseconds of a query over as many collections, each of which takes 5 ms a call, 8 at a time:
    all of them, and those that the router chooses.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins import MemoryCollection, SeveralCollections
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.export.bundle_writer import served_model
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import calibrate, thresholds_for
from amips_plugins.export.dataset import Split, TrainingTask, choose_device, pose
from amips_plugins.export.given import Given, many_heads, with_keys
from amips_plugins.export.nets import LinearRouter
from amips_plugins.export.promises import MAX_K, _at_thresholds
from amips_plugins.export.queries import QuerySplits
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import train_router
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.given import GivenCells
from amips_plugins.models.hooks import RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, Metric, lift_keys, normalise
from benchmarks.given import HEADS, RECALLS

__all__ = ["Row", "main"]

KS = (1, 10, 100)
RESAMPLED, CALIBRATED, HELD_OUT, POOL = 20, 2_000, 2_000, 8_000
CALL, AT_ONCE, TIMED = 5e-3, 8, 100
ROUNDS, REPEATED = 200, 50
MANY = 10_000


@dataclass(frozen=True)
class Row:
    """One figure; ``least`` and ``value`` are a minimum and a mean or median."""

    situation: str
    what: str
    k: int
    recall: float
    least: float
    value: float
    searches: float
    below: int = 0
    megabytes: float = 0.0


class Slow(MemoryCollection):
    """A collection that takes as long as a call over a network, and finds nothing."""

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:  # noqa: ARG002 - its time alone counts
        """Wait."""
        time.sleep(CALL)
        return [[Hit(0, 0.0)] for _ in request.queries]


def trained(task: TrainingTask, given: Given) -> Candidate:
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


def priorities(model: OnnxModel, split: Split) -> FloatArray:
    """Return what a model says of queries."""
    (found,) = model.run(["priority"], {"queries": split.queries})
    return found


def calibrations(
    candidate: Candidate, model: OnnxModel, task: TrainingTask, given: Given
) -> list[Calibration]:
    """Calibrate on one sample after the other."""
    validated = given.assignment[task.validate.hits[:, : task.k]]
    thresholds = thresholds_for(priorities(model, task.validate), validated)
    served = replace(candidate, priority=lambda split: priorities(model, split))
    rng = np.random.default_rng(0)
    made = []
    for _ in range(RESAMPLED):
        rows = np.sort(rng.permutation(len(task.calibrate.queries))[:CALIBRATED])
        measured = _at_thresholds(served, task.calibrate.take(rows), thresholds)
        made.append(calibrate(measured, thresholds, MAX_K))
    return made


def resampled(
    model: OnnxModel, task: TrainingTask, given: Given, made: list[Calibration]
) -> Iterator[Row]:
    """Measure what each of them finds at every target."""
    fresh = priorities(model, task.test)
    best = fresh.max(axis=1, keepdims=True)
    for k in KS:
        at_hits = np.take_along_axis(fresh, given.assignment[task.test.hits[:, :k]], axis=1)
        for recall in RECALLS:
            found, searches = [], []
            for calibration in made:
                least = calibration.threshold(k, recall)
                found.append(float(((at_hits >= least) | (at_hits == best)).mean()))
                searches.append(float(np.maximum((fresh >= least).sum(axis=1), 1).mean()))
            yield Row(
                situation="resampled",
                what=f"heads ({HEADS})",
                k=k,
                recall=recall,
                least=round(min(found), 4),
                value=round(float(np.mean(found)), 4),
                searches=round(float(np.mean(searches)), 2),
                below=sum(one < recall for one in found),
            )


def plan_times(hook: RouteHook, queries: FloatArray, what: str) -> Row:
    """Take the time of plans of one query."""
    target = Target(10, RECALLS[1])
    rounds = []
    for number in range(ROUNDS):
        query = queries[number % len(queries)][None]
        started = time.perf_counter()
        for _ in range(REPEATED):
            hook.plan(query, target)
        rounds.append((time.perf_counter() - started) / REPEATED * 1e6)
    return Row("plan", what, 10, target.recall or 0.0, min(rounds), float(np.median(rounds)), 0.0)


def many_values(queries: FloatArray) -> Iterator[Row]:
    """Take the time of plans over many values, of which some twenty are chosen."""
    dim = queries.shape[1]
    net = LinearRouter(dim, MANY)
    net.weight.data.normal_(std=0.1)
    order = Order(10.0, np.zeros(MANY, dtype=np.float32))
    shares = np.append(np.full(MANY, 1 / MANY), 0.0).astype(np.float32)
    for int8 in (True, False):
        written = to_onnx(net, dim, Metric.COSINE, order, int8=int8)
        model = OnnxModel(written)
        (found,) = model.run(["priority"], {"queries": queries})
        least = np.float32(np.quantile(found, 1 - 20 / MANY))
        levels = np.array([least, -np.inf], dtype=np.float32)
        recall = np.tile(np.array([0.96, 1.0], dtype=np.float32), (MAX_K, 1))
        scanned = np.array([20 / MANY, 1.0], dtype=np.float32)
        calibration = Calibration(levels, recall, recall, scanned, 0.95)
        hook = RouteHook(model, calibration, "given", 0.95, shares)
        row = plan_times(hook, queries, f"{MANY:,} values, {8 if int8 else 32} bits")
        yield replace(row, megabytes=round(len(written) / 1e6, 2))


def call_times(hook: RouteHook, names: tuple[Any, ...], queries: FloatArray) -> Iterator[Row]:
    """Take the time of queries over collections that are slow to answer."""
    nothing = np.zeros((1, queries.shape[1]), dtype=np.float32)
    members = {str(name): Slow(nothing) for name in names}
    seen = SeveralCollections(members, at_once=AT_ONCE).partitioned(
        Partitions(None, tuple(members))
    )

    def timed(what: str, recall: float, planned: Callable[[FloatArray], QueryPlan]) -> Row:
        taken, searches = [], []
        for query in queries[:TIMED, None]:
            started = time.perf_counter()
            plan = planned(query)
            seen.search(SearchRequest(query, 10), plan)
            taken.append((time.perf_counter() - started) * 1e3)
            searches.append(len(members) if plan.cells is None else plan.cells.shape[1])
        mean = float(np.mean(searches))
        return Row("calls", what, 10, recall, min(taken), float(np.mean(taken)), mean)

    yield timed("all", 1.0, lambda _: NATIVE)
    for recall in RECALLS:
        yield timed(f"heads ({HEADS})", recall, partial(_planned, hook, seen.layout(), recall))


def _planned(hook: RouteHook, layout: str | None, recall: float, query: FloatArray) -> QueryPlan:
    return replace(hook.plan(query, Target(10, recall)), layout=layout)


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the rows.")
@click.option("--many", is_flag=True, help="Measure the plans of many values, and nothing else.")
def main(data: Path, out: Path | None, many: bool) -> None:
    """Measure a router over the partitions in DATA as it serves."""
    keys, train, test = (
        normalise(np.load(data / f"{name}.npy").astype(np.float32))
        for name in ("keys", "queries_train", "queries_test")
    )
    sections = np.load(data / "sections.npy").astype(np.int64)
    names, counts = np.unique(sections, return_counts=True)
    partitions = Partitions("section", tuple(names.tolist()))
    given = Given(GivenCells(partitions, counts), partitions.cells_of(sections.tolist()))
    learn, validate, pool = np.split(train, [len(train) - HELD_OUT - POOL, len(train) - POOL])
    rows: list[Row] = []

    def say(row: Row) -> None:
        rows.append(row)
        click.echo(json.dumps(asdict(row)))
        if out is not None:
            out.write_text(json.dumps([asdict(one) for one in rows], indent=1))

    if many:
        for row in many_values(test):
            say(row)
        return
    with tempfile.TemporaryDirectory() as work:
        task = pose(
            keys,
            lift_keys(keys, Metric.COSINE),
            Metric.COSINE,
            QuerySplits(learn, validate, pool, test, "log"),
            k=10,
            recall=RECALLS[1],
            seed=0,
            device=choose_device(),
            work=Path(work),
            progress=no_progress,
        )
        candidate = trained(task, given)
        data_served = served_model(candidate, task)
        model = OnnxModel(data_served)
        made = calibrations(candidate, model, task, given)
        for row in resampled(model, task, given, made):
            say(row)
        calibration = made[0]
        shares = np.append(counts / len(keys), 0.0).astype(np.float32)
        dim, order = keys.shape[1], candidate.order
        for what, written in (
            ("as served", data_served),
            ("8 bits", to_onnx(candidate.net, dim, Metric.COSINE, order, int8=True)),
            ("32 bits", to_onnx(candidate.net, dim, Metric.COSINE, order)),
        ):
            hook = RouteHook(OnnxModel(written), calibration, partitions.layout, 0.95, shares)
            say(plan_times(hook, test, what))
        hook = RouteHook(model, calibration, partitions.layout, 0.95, shares)
        for row in call_times(hook, partitions.values, test):
            say(row)


if __name__ == "__main__":
    main()
