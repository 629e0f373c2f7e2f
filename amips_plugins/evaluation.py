"""Recall, scanned share and time of native and learned search, on the user's own queries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.collection import Collection, Hit, Id
from amips_plugins.errors import InvalidInput
from amips_plugins.health.recall import recall_at_k
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import Target
from amips_plugins.progress import Progress, no_progress
from amips_plugins.routing.checks import check_target
from amips_plugins.routing.router import LearnedRouter
from amips_plugins.vectors import FloatArray, as_queries, lift_keys, lift_queries, native_scores

if TYPE_CHECKING:
    from amips_plugins.routing.router import Hits

__all__ = ["Measurement", "evaluate", "exact_neighbours"]

_BATCH = 64
_FETCHED = 500  # keys read at a time
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
    """

    search: str
    recall_at_1: float
    recall_at_k: float
    n_probes: float | None
    scanned: float | None
    milliseconds: float
    fallbacks: int


def exact_neighbours(
    collection: Collection, queries: FloatArray, k: int, progress: Progress = no_progress
) -> list[list[Id]]:
    """Find the true top keys by reading every key once, in bounded memory.

    Parameters
    ----------
    collection
        The collection.
    queries
        ``(n_queries, dim)`` float32.
    k
        Keys wanted for each query.
    progress
        Watches the work.

    Returns
    -------
    list
        For each query the ids of its k best keys, best first; of all keys where there are fewer.
    """
    metric = collection.info.metric
    centre = queries.mean(axis=0)  # near the keys, where 32 bits tell L2 distances apart
    lifted = lift_queries(queries, metric, centre)
    ids: list[Id] = []
    best: npt.NDArray[np.float32] = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows: npt.NDArray[np.int64] = np.zeros((len(queries), k), dtype=np.int64)
    with progress("exact answers", collection.count(), 0, "keys") as step:
        for batch in collection.scan(5_000):
            scores = lifted @ lift_keys(batch.vectors, metric, centre).T
            places = np.arange(len(ids), len(ids) + len(batch.ids))
            ids.extend(batch.ids)
            both = np.hstack([best, scores])
            kept = np.argsort(-both, axis=1, kind="stable")[:, :k]
            best = np.take_along_axis(both, kept, axis=1)
            all_rows = np.hstack([rows, np.broadcast_to(places, scores.shape)])
            rows = np.take_along_axis(all_rows, kept, axis=1)
            step.advance(len(batch.ids))
    return [[ids[row] for row in chosen[: len(ids)]] for chosen in rows.tolist()]


def evaluate(
    router: LearnedRouter,
    queries: FloatArray,
    k: int = 10,
    recalls: Sequence[float] = (0.80, 0.90, 0.95),
    probes: Sequence[int] = (),
    progress: Progress = no_progress,
) -> list[Measurement]:
    """Compare the native with the learned search.

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
    truth = exact_neighbours(collection, rows, k, progress)
    native = LearnedRouter(collection, hook=NativeHook(), refresh=None)
    result = [_measure("native", native, rows, Target(k), truth, progress)]
    if not router.learned:
        return result
    targets = {"learned": Target(k)}
    if router.manifest is not None and router.manifest.layout:
        targets = {f"learned, recall {recall:.2f}": Target(k, recall) for recall in recalls}
    if probes:
        targets = {f"learned, {count} cells": Target(k, n_probes=count) for count in probes}
    for name, target in targets.items():
        result.append(_measure(name, router, rows, target, truth, progress))
    return result


def _measure(
    name: str,
    router: LearnedRouter,
    queries: FloatArray,
    target: Target,
    truth: list[list[Id]],
    progress: Progress,
) -> Measurement:
    def search(vectors: FloatArray, *, explain: bool) -> Any:
        return router.search(
            vectors, target.k, recall=target.recall, n_probes=target.n_probes, explain=explain
        )

    answers: list[Hits] = []
    seconds = []
    with progress(name, len(queries), 0, "queries") as step:
        for low in range(0, len(queries), _BATCH):
            batch = queries[low : low + _BATCH]
            answers += search(batch, explain=True)
            step.advance(len(batch))
        for query in queries[: min(_TIMED, max(10, len(queries) // 5))]:
            started = time.perf_counter()
            search(query, explain=False)
            seconds.append(time.perf_counter() - started)
    at_1, at_k = _recalls(router.collection, queries, truth, answers)
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
        false = [hit.id for hit in hits if hit.id not in true]
        looked_at.append(dict.fromkeys([true[0], true[-1], *(h.id for h in hits[:1]), *false]))
    wanted = list(dict.fromkeys(key for keys in looked_at for key in keys))
    vectors: dict[Id, FloatArray] = {}
    for low in range(0, len(wanted), _FETCHED):
        batch = collection.fetch(wanted[low : low + _FETCHED])
        vectors.update(zip(batch.ids, batch.vectors, strict=True))
    larger = metric.larger_is_better
    recalls = []
    for query, true, keys, hits in zip(queries, truth, looked_at, answers, strict=True):
        there = [key for key in keys if key in vectors]
        scores = native_scores(query, np.stack([vectors[key] for key in there]), metric)
        known = dict(zip(there, scores.tolist(), strict=True))
        worst = -np.inf if larger else np.inf  # of what is gone; a true key needs no score
        found = [Hit(hit.id, known.get(hit.id, worst)) for hit in hits]
        best = [Hit(key, known.get(key, worst)) for key in true]
        recalls.append(
            [recall_at_k(found, best, k, larger_is_better=larger) for k in (1, len(best))]
        )
    at_1, at_k = np.mean(recalls, axis=0).tolist()
    return at_1, at_k
