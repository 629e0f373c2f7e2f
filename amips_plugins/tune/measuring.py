"""Searching a collection with parameters on trial: what is found, and what it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amips_plugins.collection import Collection, Hit, SearchRequest
from amips_plugins.models.tuned import EffortParameter
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.progress import Progress, no_progress
from amips_plugins.tune.recalls import EffortCurve, Truth, smallest_k
from amips_plugins.vectors import FloatArray

__all__ = ["Trial", "effort_curve", "exact_truth", "try_plan"]

_BATCH = 32  # queries a call, where only what is found matters
_WARM = 5  # queries whose time is not taken


@dataclass(frozen=True)
class Trial:
    """Single searches: recall@k and cost in seconds of each query, ``(n_queries,)``."""

    recall: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]


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
    larger, tried = collection.info.metric.larger_is_better, []
    with progress(f"try {parameter.name}", len(efforts) * len(queries), 0, "searches") as step:
        for effort in efforts:
            limit = min(effort, truth.depth) if parameter.holds_hits else truth.depth
            plan = QueryPlan(params=parameter.params(effort, limit))
            found: list[list[Hit]] = []
            for low in range(0, len(queries), _BATCH):
                some = queries[low : low + _BATCH]
                found += collection.search(SearchRequest(some, limit), plan)
                step.advance(len(some), f"{parameter.name} {effort}")
            tried.append(smallest_k(truth, found, larger_is_better=larger))
            done = EffortCurve(np.array(efforts[: len(tried)], dtype=np.int64), np.stack(tried))
            if not go_on(done):
                break
    return done


def try_plan(
    collection: Collection,
    plan: QueryPlan,
    queries: FloatArray,
    truth: Truth,
    k: int,
    clock: Callable[[], float] = time.process_time,
    progress: Progress = no_progress,
    title: str = "evaluate",
) -> Trial:
    """Search one by one, as an application does."""
    larger = collection.info.metric.larger_is_better
    found: list[list[Hit]] = []
    seconds = np.empty(len(queries))
    for query in queries[:_WARM]:
        collection.search(SearchRequest(query[None], k), NATIVE)
    with progress(title, len(queries), 0, "queries") as step:
        for row, query in enumerate(queries):
            request = SearchRequest(query[None], k)
            started = clock()
            found += collection.search(request, plan)
            seconds[row] = clock() - started
            step.advance(1)
    first = smallest_k(truth, [hits[:k] for hits in found], larger_is_better=larger)
    return Trial(np.minimum((first <= k).sum(axis=1), k) / k, seconds)
