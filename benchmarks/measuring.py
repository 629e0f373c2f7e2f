"""Measuring what is not the product's own code: tuned centroids, and a real IVF index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import Curve, curve, levels_by_threshold, thresholds_for
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.to_onnx import Order
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["TARGETS", "Points", "ivf_index", "points", "search_ivf", "tuned_centroids"]

TARGETS = tuple((k, recall) for k in (1, 10) for recall in (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99))
"""What rows are written for: k and recall@k."""

_SCALES = (5.0, 10.0, 20.0, 40.0, 80.0)
_SIZE_POWERS = (0.0, 0.5, 0.75, 1.0)
_BLOCK = 16_384


@dataclass(frozen=True)
class Points:
    """Mean recall and cost by level, where a level is a number of probes or a threshold.

    Attributes
    ----------
    recall
        For each k ``(n_levels,)``.
    scanned, probes
        ``(n_levels,)``: mean share of the keys, and mean number of cells, searched.
    model
        The router's own cost as a share of the keys.
    """

    recall: dict[int, npt.NDArray[np.float64]]
    scanned: npt.NDArray[np.float64]
    probes: npt.NDArray[np.float64]
    model: float

    def level(self, k: int, recall: float) -> int | None:
        """Return the first level that reaches a recall, or None."""
        reached = self.recall[k] >= recall
        return int(reached.argmax()) if reached.any() else None


def points(measured: Curve) -> Points:
    """Average a curve over its queries."""
    return Points(
        recall={k: measured.mean_recall(k) for k in (1, 10)},
        scanned=measured.scanned.mean(axis=0, dtype=np.float64),
        probes=measured.probes,
        model=measured.model,
    )


def tuned_centroids(native: Candidate, task: TrainingTask) -> Callable[[Split], Curve]:
    """Give centroids what the learned routers have: a threshold per query, and a size penalty.

    Their sharpness and the penalty are those that do best on the validation queries.

    Parameters
    ----------
    native
        The baseline with a fixed number of probes.
    task
        What it is measured on.
    """
    assert native.priority is not None
    products = native.priority
    log_sizes = np.log(np.maximum(native.cells.sizes, 1)).astype(np.float32)
    assignment = native.assignment

    def with_order(order: Order) -> Callable[[Split], Curve]:
        validated = order.priority(products(task.validate))
        thresholds = thresholds_for(validated, assignment[task.validate.hits[:, : task.k]])

        def measure(split: Split) -> Curve:
            levels = levels_by_threshold(order.priority(products(split)), thresholds)
            hit_cells = assignment[split.hits]
            n_cells = native.cells.n_cells
            return curve(levels, len(thresholds), hit_cells, native.cells.sizes, n_cells)

        return measure

    def cost(measure: Callable[[Split], Curve]) -> float:
        measured = measure(task.validate)
        return float(
            np.mean([np.log(measured.cost(k, recall)) for k in (1, 10) for recall in (0.9, 0.95)])
        )

    orders = [Order(scale, -power * log_sizes) for scale in _SCALES for power in _SIZE_POWERS]
    return min(map(with_order, orders), key=cost)


def ivf_index(keys: FloatArray, centroids: FloatArray) -> Any:
    """Build an IVF index for inner products.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32 unit rows.
    centroids
        ``(nlist, dim)`` float32 unit rows.
    """
    quantizer = faiss.IndexFlatIP(keys.shape[1])
    quantizer.add(centroids)
    index = faiss.IndexIVFFlat(quantizer, keys.shape[1], len(centroids), faiss.METRIC_INNER_PRODUCT)
    index.train(np.asarray(keys[:1]))  # the centroids are there: nothing is learned
    for low in range(0, len(keys), _BLOCK):
        index.add(np.ascontiguousarray(keys[low : low + _BLOCK]))
    return index


def search_ivf(
    index: Any,
    queries: FloatArray,
    hits: IntArray,
    fetched: int,
    model_keys: float,
    progress: Progress = no_progress,
) -> Points:
    """Search with every nprobe there is, and rescore what was fetched with the original queries.

    Lists are scanned by the index itself, each once: what nprobe = p + 1 fetches is the best of
    what p fetched and of one list more. Rescoring ranks any true top key above all others, so that
    recall is the share of the true top keys that were fetched.

    Parameters
    ----------
    index
        The index; faiss types its methods as they are in C++.
    queries
        ``(n_queries, dim)`` float32 as sent to the index, rewritten or not.
    hits
        ``(n_queries, depth)`` int64 true top keys of the original queries.
    fetched
        Keys that the index is asked for.
    model_keys
        What the rewriting and the choice of the lists cost, in keys.
    progress
        Watches the work.
    """
    nlist, count = index.nlist, index.ntotal
    near, lists = index.quantizer.search(queries, nlist)
    sizes = np.array([index.invlists.list_size(cell) for cell in range(nlist)])
    scores = np.full((len(queries), fetched), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), fetched), -1, dtype=np.int64)
    recall = {k: np.zeros(nlist) for k in (1, 10)}
    index.nprobe = 1
    with progress("search lists", nlist, 0, "lists") as step:
        for place in range(nlist):
            more_scores, more_rows = index.search_preassigned(
                queries, fetched, lists[:, place : place + 1], near[:, place : place + 1]
            )
            more_scores[more_rows < 0] = -np.inf  # a list with fewer keys
            scores, rows = _best(
                np.hstack([scores, more_scores]), np.hstack([rows, more_rows]), fetched
            )
            for k in recall:
                found = (hits[:, :k, None] == rows[:, None, :]).any(axis=2)
                recall[k][place] = found.mean()
            step.advance()
    return Points(
        recall=recall,
        scanned=sizes[lists].mean(axis=0).cumsum() / count,
        probes=np.arange(1, nlist + 1, dtype=np.float64),
        model=model_keys / count,
    )


def _best(scores: FloatArray, rows: IntArray, count: int) -> tuple[FloatArray, IntArray]:
    kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
