"""Recall, scanned share and time of native and learned search, on the user's own queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.collection import Collection, Hit, Id, KeyBatch, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.health.recall import recall_at_k
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import Target
from amips_plugins.progress import Progress, no_progress
from amips_plugins.routing.checks import check_target
from amips_plugins.routing.router import LearnedRouter
from amips_plugins.vectors import (
    FloatArray,
    Metric,
    as_queries,
    lift_keys,
    lift_queries,
    native_scores,
)

if TYPE_CHECKING:
    from amips_plugins.routing.router import Hits

__all__ = ["Measurement", "evaluate", "exact_neighbours", "nearest_ids"]

_BATCH = 64
_FETCHED = 500  # keys read at a time
_NEAR = 100  # best keys that say how selective a filter is where the answers are
_TIMED = 200  # single queries whose time is taken


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One way to search, measured.

    Attributes
    ----------
    search
        Its name: ``native``, or the learned one and its target.
    recall_at_1, recall_at_k
        Mean over the queries, against the exact answer.
    n_probes
        Mean number of cells searched; None without cells.
    scanned
        Share of the keys in the cells searched, plus the model's own cost; None where the
        database's index decides and does not tell.
    milliseconds
        Median time of one query searched by itself, model and client included.
    fallbacks
        Queries that the native search answered in place of the model.
    passing
        Of a filtered search, the share of the 100 best keys of each query that pass: the filter's
        selectivity where the answers are, which is less than that among all keys where the filter
        keeps out what the queries ask for. None without a filter.
    bytes_scored
        Bytes of vectors that the engine says it has scored for a query, on average; what filters
        cost is not in it. None where the engine does not tell.
    """

    search: str
    recall_at_1: float
    recall_at_k: float
    n_probes: float | None
    scanned: float | None
    milliseconds: float
    fallbacks: int
    passing: float | None = None
    bytes_scored: float | None = None


def exact_neighbours(
    collection: Collection, queries: FloatArray, k: int, progress: Progress = no_progress
) -> list[list[Id]]:
    """Find the k true top keys by reading every key once, in bounded memory.

    Queries are ``(n_queries, dim)`` float32. Returns each one's ids, best first; of fewer keys all.
    """
    with progress("exact answers", collection.count(), 0, "keys") as step:
        batches = collection.scan(5_000)
        return nearest_ids(batches, collection.info.metric, queries, k, step.advance)


def nearest_ids(
    batches: Iterable[KeyBatch],
    metric: Metric,
    queries: FloatArray,
    k: int,
    advance: Callable[[int], object] = lambda _: None,
) -> list[list[Id]]:
    """Find the k best of the keys that are passed by, and tell how many have been."""
    centre = queries.mean(axis=0)  # near the keys, where 32 bits tell L2 distances apart
    lifted = lift_queries(queries, metric, centre)
    ids: list[Id] = []
    best: npt.NDArray[np.float32] = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows: npt.NDArray[np.int64] = np.zeros((len(queries), k), dtype=np.int64)
    for batch in batches:
        scores = lifted @ lift_keys(batch.vectors, metric, centre).T
        places = np.arange(len(ids), len(ids) + len(batch.ids))
        ids.extend(batch.ids)
        both = np.hstack([best, scores])
        kept = np.argsort(-both, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(both, kept, axis=1)
        all_rows = np.hstack([rows, np.broadcast_to(places, scores.shape)])
        rows = np.take_along_axis(all_rows, kept, axis=1)
        advance(len(batch.ids))
    return [[ids[row] for row in chosen[: len(ids)]] for chosen in rows.tolist()]


def evaluate(
    router: LearnedRouter,
    queries: FloatArray,
    k: int = 10,
    recalls: Sequence[float] = (0.80, 0.90, 0.95),
    probes: Sequence[int] = (),
    progress: Progress = no_progress,
    filter: Any = None,  # noqa: A002 - both databases call it so
) -> list[Measurement]:
    """Compare the native with the learned search.

    Under a filter the learned search is that of a router that knows the filter's class (see
    ``HealthMonitor``); any other router answers natively, which ``fallbacks`` counts.

    Parameters
    ----------
    router
        The router, with the collection it searches.
    queries
        ``(n_queries, dim)`` queries that no training has seen.
    k
        Recall@k is measured beside recall@1.
    recalls
        Recall targets of a routing model, in (0, 1]; one that calibration cannot promise is left
        out.
    probes
        Numbers of cells to search in place of recall targets, the same for every query.
    progress
        Watches the work.
    filter
        The database's own filter. Then the exact answers are those of ``Collection.exact``.

    Raises
    ------
    InvalidInput
        The queries cannot be used, k is no number of keys, or a recall is no share.
    """
    collection = router.collection
    for wanted in recalls:
        check_target(wanted, None)
    rows, _ = as_queries(queries, collection.info.dim)
    count = collection.count()
    if not 1 <= k <= count:
        raise InvalidInput(f"k={k} does not fit the {count} keys of {collection.info.name!r}.")
    asked = _Asked(rows, filter)
    if filter is None:
        asked.truth = exact_neighbours(collection, rows, k, progress)
    else:
        asked.look_up(collection, k)
    native = LearnedRouter(collection, hook=NativeHook(), refresh=None)
    result = [_measure("native", native, asked, Target(k), progress)]
    if not router.learned:
        return result
    targets = {"learned": Target(k)}
    manifest = router.manifest
    if manifest is not None and (manifest.layout or manifest.model == "tuned"):
        targets = {f"learned, recall {recall:.2f}": Target(k, recall) for recall in recalls}
    if probes:
        targets = {f"learned, {count} cells": Target(k, n_probes=count) for count in probes}
    for name, target in targets.items():
        result.append(_measure(name, router, asked, target, progress))
    return result


@dataclass(slots=True)
class _Asked:
    """Queries, the filter they are asked under, and their exact answers."""

    queries: FloatArray
    filter: Any = None
    truth: list[list[Id]] = field(default_factory=list)
    passing: float | None = None

    def look_up(self, collection: Collection, k: int) -> None:
        """Have the database say what passes the filter."""
        passed = best = 0
        for query in self.queries:
            request = SearchRequest(query[None], max(k, _NEAR))
            (there,) = collection.exact(replace(request, filter=self.filter))
            (near,) = collection.exact(replace(request, k=_NEAR))
            passed += len({hit.key for hit in there} & {hit.key for hit in near})
            best += len(near)
            self.truth.append([hit.key for hit in there[:k]])
        self.passing = passed / max(1, best)


def _measure(
    name: str,
    router: LearnedRouter,
    asked: _Asked,
    target: Target,
    progress: Progress,
) -> Measurement:
    def search(vectors: FloatArray, *, explain: bool) -> Any:
        return router.search(
            vectors,
            target.k,
            recall=target.recall,
            n_probes=target.n_probes,
            filter=asked.filter,
            explain=explain,
        )

    queries = asked.queries

    answers: list[Hits] = []
    seconds = []
    collection: Any = router.collection
    metered = getattr(collection, "metered", nullcontext)
    with metered() as counted, progress(name, len(queries), 0, "queries") as step:
        for low in range(0, len(queries), _BATCH):
            batch = queries[low : low + _BATCH]
            answers += search(batch, explain=True)
            step.advance(len(batch))
        told = None if counted is None else counted.total
        for query in queries[: min(_TIMED, max(10, len(queries) // 5))]:
            started = time.perf_counter()
            search(query, explain=False)
            seconds.append(time.perf_counter() - started)
    at_1, at_k = _recalls(router.collection, queries, asked.truth, answers)
    traces = [hits.trace for hits in answers]
    cells = [trace.n_probes for trace in traces if trace.n_probes is not None]
    known = [trace.scanned for trace in traces if trace.scanned is not None]
    return Measurement(
        search=name,
        recall_at_1=at_1,
        recall_at_k=at_k,
        n_probes=float(np.mean(cells)) if len(cells) == len(traces) else None,
        scanned=float(np.mean(known)) if len(known) == len(traces) else None,
        milliseconds=float(np.median(seconds) * 1e3),
        fallbacks=sum(hits.trace.fallback is not None for hits in answers),
        passing=asked.passing,
        bytes_scored=None if told is None else told / len(queries),
    )


def _recalls(
    collection: Collection, queries: FloatArray, truth: list[list[Id]], answers: Sequence[Hits]
) -> tuple[float, float]:
    """Return mean recall@1 and recall@k by score: a key as good as the last true one is found.

    An exact search may break ties otherwise than reading every key does. Only the vectors that
    this takes are read: of the first and last true key, of the first hit and of false ones.
    """
    metric = collection.info.metric
    looked_at = []
    for true, hits in zip(truth, answers, strict=True):
        false = [hit.key for hit in hits if hit.key not in true]
        looked_at.append(dict.fromkeys([*true[:1], *true[-1:], *(h.key for h in hits[:1]), *false]))
    wanted = list(dict.fromkeys(key for keys in looked_at for key in keys))
    vectors: dict[Id, FloatArray] = {}
    for low in range(0, len(wanted), _FETCHED):
        batch = collection.fetch(wanted[low : low + _FETCHED])
        vectors.update(zip(batch.ids, batch.vectors, strict=True))
    larger = metric.larger_is_better
    recalls = []
    for query, true, keys, hits in zip(queries, truth, looked_at, answers, strict=True):
        if not true:  # nothing passes the filter
            recalls.append([1.0, 1.0])
            continue
        there = [key for key in keys if key in vectors]
        scores = native_scores(query, np.stack([vectors[key] for key in there]), metric)
        known = dict(zip(there, scores.tolist(), strict=True))
        worst = -np.inf if larger else np.inf  # of what is gone; a true key needs no score
        found = [Hit(hit.key, known.get(hit.key, worst)) for hit in hits]
        best = [Hit(key, known.get(key, worst)) for key in true]
        recalls.append(
            [recall_at_k(found, best, k, larger_is_better=larger) for k in (1, len(best))]
        )
    at_1, at_k = np.mean(recalls, axis=0).tolist()
    return at_1, at_k
