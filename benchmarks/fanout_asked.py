"""Choosing how an engine's graphs are searched, and asking it.

Threshold and ef are chosen by what the engine's visits cost, which is more than their distances:
for batches as the calibration queries' own calls tell, for single queries as calls of others tell,
with few and with more graphs. Two efforts are Edge's, where each graph is asked by itself anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import click
import msgspec
import numpy as np

from amips_plugins.errors import InvalidInput
from amips_plugins.export.cell_graphs import Finds
from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.two_efforts import Graded, TwoEfforts, cheapest_pair
from amips_plugins.vectors import BoolArray, FloatArray, IntArray
from benchmarks.fanout_engines import Engine, Graphs, Scored
from benchmarks.fanout_ways import RECALLS, FanoutRow, Way, chosen

__all__ = ["engine_rows"]

_MANY = (10, 16, 24, 32, 48, 64, 96)
_ALL = (10, 13, 16, 20, 24, 32, 40, 48, 64)  # where nothing is chosen but the effort
_ONE = (16, 24, 32, 48, 64, 80, 100, 128, 160, 200)
_CALIBRATED = 1_000  # queries with every effort
_TIMED = 2_000  # queries at most, that tell what a visit of a single query costs
_FEW, _MORE = 1, 16  # graphs that they ask
_ASKED = 1_024  # queries for each setting, of an engine that does not remember
_SINGLE = 300  # queries of each setting at least are asked one by one, if a batch is left of it


def engine_rows(
    running: Engine,
    row: Callable[..., FanoutRow],
    task: TrainingTask,
    way: Way,
    ks: Sequence[int],
    batch: int,
) -> list[FanoutRow]:
    """Measure one way on an engine, with single queries and in batches; ``row`` makes a row."""
    slots = len(ks) * len(RECALLS)
    # Others for each setting, where a query that is asked again is answered better.
    share = len(task.test.queries) // (slots if running.remembers else 1)
    if share <= batch:
        raise InvalidInput(
            f"{len(task.test.queries)} test queries are too few for {slots} settings with a batch "
            f"of {batch} and single queries each; pass a smaller --batch."
        )
    grid = _ONE if way.n_cells == 1 else _MANY if way.model_keys else _ALL
    efforts = [one for one in grid if one >= max(ks)]
    if not efforts:
        raise InvalidInput(f"The engines are searched for {max(_MANY)} keys at most.")
    measured = []
    wanted = [(k, target) for k in ks for target in RECALLS]
    with running.graphs(task.keys, way) as graphs:
        answered = _calibrated(running, graphs, way, task.calibrate, efforts, max(ks))
        visits = {batch: answered.visits}
        visits[1] = _single_visits(graphs, way, task.validate, efforts, max(ks))
        for size in (1, batch):
            told = zip(efforts, visits[size].tolist(), strict=True)
            costs = ", ".join(f"{effort}: {spent * 1e6:.0f}" for effort, spent in told)
            click.echo(f"{row().engine}, {row().method}, {size} in a call, µs by ef: {costs}")
            graded = answered.graded(visits[size])
            curves = [one for part in graded for one in part.single()]
            pairs: list[TwoEfforts | None] = [None] * slots
            if way.routed and not running.remembers:
                pairs = cheapest_pair(graded[0], efforts, wanted)
            for slot, ((k, target), pair) in enumerate(zip(wanted, pairs, strict=True)):
                some = task.test.take(_own(running, slot, share, size, batch))
                levels = way.levels(some)[0]
                here = partial(row, k=k, target=target, batch=size)
                ask = partial(_asked, running, graphs, some, k=k, batch=size)
                measured.append(here())
                place = chosen(curves, efforts, k, target)
                if place is not None:
                    level = _level(curves[place], k, target)
                    figures = ask(asked=[(levels <= level, efforts[place])])
                    measured[-1] = here(effort=efforts[place], **figures)
                if pair is not None:
                    level = _level(graded[0].curve(pair), k, target)
                    near = levels <= min(pair.until, level)
                    far = (levels <= level) & ~near
                    figures = ask(asked=[(near, efforts[pair.near]), (far, efforts[pair.far])])
                    measured.append(
                        here(
                            method=f"{row().method}, two efforts",
                            effort=efforts[pair.near],
                            far_effort=efforts[pair.far],
                            near_graphs=float(near.sum() / len(near)),
                            **figures,
                        )
                    )
                for one in measured[-1 if pair is None else -2 :]:
                    click.echo(msgspec.json.encode(one).decode())
    return measured


def _own(running: Engine, slot: int, share: int, size: int, batch: int) -> IntArray:
    """Return which test queries are asked for a setting, in calls of this size."""
    if not running.remembers:
        return np.arange(min(share, _ASKED))
    full = batch * max(1, (share - _SINGLE) // batch)
    return slot * share + (np.arange(full) if size > 1 else np.arange(full, share))


def _level(curve: Curve, k: int, target: float) -> int:
    return int((curve.mean_recall(k) >= target).argmax())


@dataclass(frozen=True)
class _Answered:
    """What single graphs found of calibration queries, with every effort.

    Attributes
    ----------
    parts
        The same queries with all efforts; of an engine that remembers, others with each. They cost
        nothing yet.
    visits
        CPU seconds of a visit with each effort, in calls of many queries.
    """

    parts: list[Graded]
    visits: FloatArray

    def graded(self, visits: FloatArray) -> list[Graded]:
        """Return the parts, where a visit with each effort costs so much."""
        found, done = [], 0
        for part in self.parts:
            efforts = len(part.finds.found)
            costs = visits[done : done + efforts, None, None] * (part.levels < part.n_levels)
            finds = replace(part.finds, distances=costs.astype(np.float32))
            found.append(replace(part, finds=finds))
            done += efforts
        return found


def _calibrated(
    running: Engine, graphs: Graphs, way: Way, split: Split, efforts: Sequence[int], k: int
) -> _Answered:
    """Search single graphs with every effort, all queries that chose one in a call."""
    parts = [(split.take(np.arange(min(_CALIBRATED, len(split.queries)))), list(efforts))]
    if running.remembers:
        rows = np.array_split(np.arange(len(split.queries)), len(efforts))
        parts = [(split.take(some), [one]) for some, one in zip(rows, efforts, strict=True)]
    graded, visits = [], []
    for some, tried in parts:
        levels, n_levels = way.levels(some)
        visited, hit_cells = levels < n_levels, way.members[some.hits]
        found = np.zeros((len(tried), *hit_cells.shape), dtype=np.bool_)
        for place, effort in enumerate(tried):
            spent = 0.0
            for cell in range(way.n_cells):
                asking = np.flatnonzero(visited[:, cell])
                if not len(asking):
                    continue
                before = graphs.cpu()
                answers = graphs.ask(some.queries[asking], [cell], k, effort)
                spent += graphs.cpu() - before
                for row, answer in zip(asking, answers, strict=True):
                    there = np.isin(some.hits[row], [key for _, key in answer])
                    found[place, row] |= there[:, None] & (hit_cells[row] == cell)
            visits.append(spent / visited.sum())
        finds = Finds(found, np.zeros((len(tried), *levels.shape), dtype=np.float32))
        graded.append(Graded(finds, levels, n_levels, hit_cells, 0.0, 1))
    return _Answered(graded, _rising(visits))


def _single_visits(
    graphs: Graphs, way: Way, split: Split, efforts: Sequence[int], k: int
) -> FloatArray:
    """Return CPU seconds of a visit with each effort, where each query is a call.

    It is what further graphs of a query's best cost: what a call takes whatever it asks is no part.
    """
    more = min(_MORE, way.n_cells)
    parts = np.array_split(np.arange(min(_TIMED, len(split.queries))), 2 * len(efforts))
    visits = []
    for place, effort in enumerate(efforts):
        costs = []
        for rows, count in zip(parts[2 * place :], (_FEW, more), strict=False):
            some = split.take(rows)
            order = np.argsort(way.levels(some)[0], axis=1, kind="stable")
            before = graphs.cpu()
            for query, cells in zip(some.queries, order[:, :count].tolist(), strict=True):
                graphs.ask(query[None], cells, k, effort)
            costs.append((graphs.cpu() - before) / len(rows))
        visits.append((costs[1] - costs[0]) / (more - _FEW) if more > _FEW else costs[0])
    return _rising(visits)


def _rising(costs: Sequence[float]) -> FloatArray:
    """Return costs that never fall and are never nothing, for a process' clock is a coarse one."""
    rising = np.maximum.accumulate(np.maximum(np.asarray(costs), 1e-6))
    return rising.astype(np.float32)


def _asked(
    running: Engine,
    graphs: Graphs,
    split: Split,
    *,
    asked: Sequence[tuple[BoolArray, int]],
    k: int,
    batch: int,
) -> dict[str, float]:
    """Ask queries, each once, and return the figures of a row.

    ``asked`` are the graphs that each query searches, and with which ef.
    """
    found, times = 0, []
    started = graphs.cpu()
    for low in range(0, len(split.queries), batch):
        rows = np.arange(low, min(low + batch, len(split.queries)))
        some = split.take(rows)
        began = time.perf_counter()
        here = [(visited[rows], effort) for visited, effort in asked]
        answers = _search(running, graphs, some.queries, here, k)
        times.append(time.perf_counter() - began)
        for answer, true in zip(answers, some.hits[:, :k].tolist(), strict=True):
            found += len({*answer} & {*true})
    count = len(split.queries)
    return {
        "recall": found / (k * count),
        "cpu_s_per_1000": (graphs.cpu() - started) / count * 1e3,
        "p50_ms": float(np.median(times)) * 1e3,
        "graphs": sum(int(visited.sum()) for visited, _ in asked) / count,
    }


def _search(
    running: Engine,
    graphs: Graphs,
    queries: FloatArray,
    asked: Sequence[tuple[BoolArray, int]],
    k: int,
) -> list[list[int]]:
    """Ask every query's graphs, and merge what they answer: of a key with copies the best."""
    found: list[Scored] = [[] for _ in queries]
    calls = [(*call, effort) for visited, effort in asked for call in _calls(visited)]
    for cells, asking, effort in calls:
        answers = graphs.ask(queries[asking], cells, k, effort)
        for row, answer in zip(asking.tolist(), answers, strict=True):
            found[row] += answer
    if running.together and len(calls) == 1:
        return [[key for _, key in answer] for answer in found]
    best = []
    for answer in found:
        keys = dict.fromkeys(key for _, key in sorted(answer, key=lambda one: -one[0]))
        best.append(list(keys)[:k])
    return best


def _calls(visited: BoolArray) -> list[tuple[list[int] | None, IntArray]]:
    """Say which graphs a call asks, all for None, and for which of the queries."""
    everyone: IntArray = np.arange(len(visited))
    if visited.all():
        return [(None, everyone)]
    if len(visited) == 1:
        cells = np.flatnonzero(visited[0]).tolist()
        return [(cells, everyone)] if cells else []
    by_cell = ((cell, np.flatnonzero(visited[:, cell])) for cell in range(visited.shape[1]))
    return [([cell], asking) for cell, asking in by_cell if len(asking)]
