"""Searching a collection with parameters on trial: what is found, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.collection import Collection, Failure, Hit, KeyBatch, SearchRequest
from amips_plugins.evaluation import nearest_ids
from amips_plugins.models.tuned import EffortParameter
from amips_plugins.plan import QueryPlan
from amips_plugins.progress import Progress, no_progress
from amips_plugins.tune.recalls import EffortCurve, Truth, smallest_k
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["AGAIN", "Trial", "effort_curve", "exact_truth", "scanned_truth", "try_both"]

AGAIN = 4
"""How often to compare by the CPU of this process, which other processes disturb by a tenth."""

_LONG = 5.0  # seconds that searches take before they are not repeated
_BATCH = 32  # queries a call, where only what is found matters
_WARM = 5  # queries whose time is not taken
_SPIKE = 3.0
_LIMITED = (Failure.REQUEST, Failure.SIZE)  # what asking for too much is
_TURN = 10  # queries that each way searches before it is another's turn
_COUNTED = 100  # queries whose work an engine is asked for, where it counts it


@dataclass(frozen=True)
class Trial:
    """Single searches: recall@k and cost in seconds of each query, ``(n_queries,)``.

    ``scored`` is the mean of the bytes of vectors that an engine says it has scored for a query;
    None where it does not tell.
    """

    recall: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]
    scored: float | None = None

    @property
    def calm(self) -> npt.NDArray[np.float64]:
        """Costs, none of them above three times the median: that much the machine did besides."""
        middle = float(np.median(self.seconds))
        return np.minimum(self.seconds, _SPIKE * middle) if middle > 0 else self.seconds


def exact_truth(
    collection: Collection, queries: FloatArray, depth: int, progress: Progress = no_progress
) -> Truth:
    """Find the best keys by the database's own exact search, which looks at all of them."""
    ranks = []
    scores = np.empty((len(queries), depth), dtype=np.float32)
    sign = 1.0 if collection.info.metric.larger_is_better else -1.0
    with progress("exact answers", len(queries), 0, "queries") as step:
        for low in range(0, len(queries), _BATCH):
            some = queries[low : low + _BATCH]
            for row, hits in enumerate(collection.exact(SearchRequest(some, depth)), low):
                ranks.append({hit.id: rank for rank, hit in enumerate(hits, 1)})
                found = [sign * hit.score for hit in hits]
                # Where keys went meanwhile: what is not there, any hit is as good as.
                scores[row] = np.array(found + [-np.inf] * (depth - len(found)))
            step.advance(len(some))
    return Truth(ranks, scores, depth)


def scanned_truth(
    batches: Iterable[KeyBatch],
    metric: Metric,
    queries: FloatArray,
    depth: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Truth:
    """Find the best of the keys that are passed by; they are told apart by their ids alone."""
    best = nearest_ids(batches, metric, queries, depth, advance)
    ranks = [{key: rank for rank, key in enumerate(ids, 1)} for ids in best]
    return Truth(ranks, None, depth)


def effort_curve(
    collection: Collection,
    parameter: EffortParameter,
    efforts: Sequence[int],
    queries: FloatArray,
    truth: Truth,
    progress: Progress = no_progress,
    go_on: Callable[[EffortCurve], bool] = lambda _: True,
) -> EffortCurve:
    """Search with rising efforts, for as long as it is told to go on; the first is always tried.

    Rising, since an index may remember what wider searches have found.
    """
    larger = collection.info.metric.larger_is_better
    tried: list[npt.NDArray[np.int16]] = []
    with progress(f"try {parameter.name}", len(efforts) * len(queries), 0, "searches") as step:
        for effort in efforts:
            limit = min(effort, truth.depth) if parameter.holds_hits else truth.depth
            plan = QueryPlan(params=parameter.params(effort, limit))
            found: list[list[Hit]] = []
            try:
                for low in range(0, len(queries), _BATCH):
                    some = queries[low : low + _BATCH]
                    found += collection.search(SearchRequest(some, limit), plan)
                    step.advance(len(some), f"{parameter.name} {effort}")
            except Exception as exc:
                # As far as the database allows, which may limit the parameter.
                if not tried or collection.failure(exc) not in _LIMITED:
                    raise
                break
            tried.append(smallest_k(truth, found, larger_is_better=larger))
            done = EffortCurve(np.array(efforts[: len(tried)], dtype=np.int64), np.stack(tried))
            if not go_on(done):
                break
    return done


def try_both(
    ways: Sequence[tuple[Collection, QueryPlan, Truth]],
    queries: FloatArray,
    k: int,
    clock: Callable[[], float],
    progress: Progress = no_progress,
    title: str = "compare",
    again: int = 1,
) -> list[Trial]:
    """Search in several ways, one query after the other as an application does, turn by turn.

    What else the machine does then falls on all of them. Where it is done ``again`` the least that
    each search has taken counts, so that little of it is left; a long comparison is not repeated.
    """
    spent, found = 0.0, list[list[list[Hit]]]()
    seconds = np.full((len(ways), len(queries)), np.inf)
    for collection, plan, _ in ways:
        for query in queries[:_WARM]:
            collection.search(SearchRequest(query[None], k), plan)
    for _ in range(again):
        hits, took = _turns(ways, queries, k, clock, progress, title)
        found, seconds = found or hits, np.minimum(seconds, took)
        spent += float(took.sum())  # by the clock that counts, which a busy machine does not stop
        if spent > _LONG:
            break
    trials = []
    for number, (collection, plan, truth) in enumerate(ways):
        larger = collection.info.metric.larger_is_better
        first = smallest_k(truth.top(k), found[number], larger_is_better=larger)
        recall = np.minimum((first <= k).sum(axis=1), k) / k
        scored = _bytes_scored(collection, plan, queries[:_COUNTED], k)
        trials.append(Trial(recall, seconds[number], scored))
    return trials


def _turns(
    ways: Sequence[tuple[Collection, QueryPlan, Truth]],
    queries: FloatArray,
    k: int,
    clock: Callable[[], float],
    progress: Progress,
    title: str,
) -> tuple[list[list[list[Hit]]], npt.NDArray[np.float64]]:
    """Return hits of each way and query, and seconds, ``(n_ways, n_queries)``."""
    found: list[list[list[Hit]]] = [[[] for _ in queries] for _ in ways]
    seconds = np.empty((len(ways), len(queries)))
    with progress(title, len(ways) * len(queries), 0, "searches") as step:
        for turn, low in enumerate(range(0, len(queries), _TURN)):
            rows = range(low, min(low + _TURN, len(queries)))
            for number in range(len(ways)) if turn % 2 else reversed(range(len(ways))):
                collection, plan, _ = ways[number]
                for row in rows:
                    request = SearchRequest(queries[row][None], k)
                    started = clock()
                    (found[number][row],) = collection.search(request, plan)
                    seconds[number, row] = clock() - started
                step.advance(len(rows))
    return found, seconds


def _bytes_scored(
    collection: Collection, plan: QueryPlan, queries: FloatArray, k: int
) -> float | None:
    """Ask the engine's own counter, without a clock beside it: reading it takes time, too."""
    engine: Any = collection
    with getattr(engine, "metered", nullcontext)() as counted:
        if counted is None:
            return None
        for low in range(0, len(queries), _BATCH):
            collection.search(SearchRequest(queries[low : low + _BATCH], k), plan)
            if counted.total is None:
                return None
    return float(counted.total) / len(queries)
