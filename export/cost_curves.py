"""What a router costs to reach a recall, and what may be promised about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from amips_plugins.bundle.manifest import CandidateCost
from amips_plugins.health.confidence import Guess, betting_bound
from amips_plugins.models.calibration import Calibration
from amips_plugins.vectors import FloatArray, IntArray

__all__ = [
    "TARGETS",
    "Curve",
    "Measured",
    "calibrate",
    "curve",
    "expected",
    "figures",
    "joined",
    "levels_by_rank",
    "levels_by_threshold",
    "resample_weights",
    "resampled_costs",
    "thresholds_for",
]

TARGETS = (0.80, 0.90, 0.95, 0.99)
_BOOTSTRAPS = 200
_MOST_CALIBRATED = 2_000  # queries: more of them hardly move a bound
_MOST_ASKED = 10.0  # times the mean, that a query counts for at most
_LEAST_RECALL = 0.3  # below it nothing is promised
_STEPS_OF_K = (*range(1, 11), 12, 15, 20, 25, 30, 40, 50, 75, 100)  # with bounds of their own
_COST_STEPS = 50


@dataclass(frozen=True)
class Curve:
    """Recall and cost of one router, per query and level.

    A level is a number of probes, the same for every query (what an IVF index offers), or a
    threshold of priority, which lets every query have its own number. Level by level more cells
    are searched; at the last level all of them.

    Attributes
    ----------
    found
        ``(n_queries, max_k)`` int64: the level that first searches the cell of each of the query's
        true top keys, best key first; ``n_levels`` for a key that is never found.
    scanned
        ``(n_queries, n_levels)`` float32: share of the keys in the cells searched.
    probes
        ``(n_levels,)`` float64: mean number of cells searched.
    model
        The router's own multiplications, expressed as a share of the keys.
    as_good
        ``(n_queries, max_k)``: for each k, how many keys are as good as the k-th best; None where
        no two are. Recall goes by score: any k of them are the best k.
    """

    found: IntArray
    scanned: FloatArray
    probes: npt.NDArray[np.float64]
    model: float
    as_good: IntArray | None = None

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        return int(self.scanned.shape[1])

    def cost(self, k: int, recall: float) -> float:
        """Return scanned and model share at the first level that reaches the recall, or inf."""
        mean = self.mean_recall(k)
        if mean[-1] < recall:
            return math.inf
        return float(self.scanned[:, (mean >= recall).argmax()].mean()) + self.model

    def mean_recall(self, k: int) -> npt.NDArray[np.float64]:
        """Return ``(n_levels,)``: mean recall@k by level."""
        counts = np.bincount(self._found_at(k).ravel(), minlength=self.n_levels + 1)
        return counts[: self.n_levels].cumsum() / (k * len(self.found))

    def recall(self, k: int) -> npt.NDArray[np.float64]:
        """Return ``(n_queries, n_levels)``: recall@k of each query by level."""
        width = self.n_levels + 1
        places = self._found_at(k) + np.arange(len(self.found))[:, None] * width
        counts = np.bincount(places.ravel(), minlength=len(self.found) * width)
        recall: npt.NDArray[np.float64] = counts.reshape(-1, width)[:, :-1].cumsum(axis=1) / k
        return recall

    def _found_at(self, k: int) -> IntArray:
        """Return ``(n_queries, k)``: the levels that find the first k of the keys good enough."""
        found = self.found[:, :k]
        ties = () if self.as_good is None else np.flatnonzero(self.as_good[:, k - 1] > k)
        if self.as_good is not None and len(ties):
            enough = np.arange(self.found.shape[1]) < self.as_good[ties, k - 1 : k]
            found = found.copy()
            found[ties] = np.sort(np.where(enough, self.found[ties], self.n_levels))[:, :k]
        return found


def levels_by_rank(priority: FloatArray) -> IntArray:
    """Return at which level each cell is searched when level p searches the best p + 1 cells."""
    order = np.argsort(-priority, axis=1, kind="stable")
    levels = np.empty_like(order)
    np.put_along_axis(levels, order, np.arange(order.shape[1])[None, :], axis=1)
    return levels


def levels_by_threshold(priority: FloatArray, thresholds: FloatArray) -> IntArray:
    """Return at which level each cell is searched when level t searches all above a threshold.

    Thresholds fall, the last to minus infinity; the best cell is searched at any level.
    """
    levels = np.searchsorted(-thresholds, -priority, side="left")
    levels[np.arange(len(levels)), priority.argmax(axis=1)] = 0
    return levels


def thresholds_for(priority: FloatArray, hit_cells: IntArray) -> FloatArray:
    """Choose falling thresholds that step through the useful recalls, finest where it is high."""
    hits = _at_best(priority, hit_cells, np.max)
    hits = hits.ravel() if hit_cells.ndim > 2 else hits[hit_cells >= 0]
    recalls = np.concatenate([np.arange(0.3, 0.7, 0.02), np.arange(0.7, 0.9999, 0.0025)])
    # Few queries leave gaps where recall is high: there the steps are even ones of cost.
    costs = np.quantile(priority, np.arange(1, _COST_STEPS) / _COST_STEPS)
    steps = np.append(np.quantile(hits, 1.0 - recalls), costs[costs < hits.max(initial=-np.inf)])
    return np.append(np.unique(steps.astype(np.float32))[::-1], np.float32(-np.inf))


def curve(
    levels: IntArray,
    n_levels: int,
    hit_cells: IntArray,
    sizes: IntArray,
    model_keys: float,
    as_good: IntArray | None = None,
    n_keys: int | None = None,
    always: int = 0,
) -> Curve:
    """Measure a router by the levels at which it searches each cell, and the hits' cells.

    Hits may have several cells, on a third axis; ``n_keys`` then says how many keys there are, for
    ``sizes`` count their copies. ``always`` keys have no cell (-1): every query searches them.
    """
    count = float(sizes.sum()) + always if n_keys is None else float(n_keys)
    places = (levels + np.arange(len(levels))[:, None] * n_levels).ravel()
    total = len(levels) * n_levels
    keys = np.bincount(places, np.tile(sizes, len(levels)), total).reshape(-1, n_levels)
    cells = np.bincount(levels.ravel(), minlength=n_levels)
    found = _at_best(levels, hit_cells, np.min)
    if always:
        found[hit_cells < 0] = 0
    return Curve(
        found=found,
        scanned=((keys.cumsum(axis=1) + always) / count).astype(np.float32),
        probes=cells.cumsum() / len(levels),
        model=model_keys / count,
        as_good=as_good,
    )


def _at_best(values: Any, hit_cells: IntArray, best: Any) -> Any:
    """Look the hits' cells up in ``(n_queries, n_cells)``; of a hit's several cells the best."""
    if hit_cells.ndim == 2:
        return np.take_along_axis(values, hit_cells, axis=1)
    flat = np.take_along_axis(values, hit_cells.reshape(len(hit_cells), -1), axis=1)
    return best(flat.reshape(hit_cells.shape), axis=2)


def figures(
    candidate: str, measured: Curve, ks: tuple[int, ...], seed: int = 0
) -> list[CandidateCost]:
    """Summarise a curve at the usual recalls, with bootstrap intervals over the queries."""
    scanned = measured.scanned.mean(axis=0, dtype=np.float64)
    result = []
    for k in ks:
        mean = measured.mean_recall(k)
        resampled = resampled_costs(measured, k, TARGETS, seed)
        for target, totals in zip(TARGETS, resampled, strict=True):
            if mean[-1] < target:
                result.append(_out_of_reach(candidate, k, target, measured.model))
                continue
            level = int((mean >= target).argmax())
            low, high = np.quantile(totals, [0.025, 0.975])
            result.append(
                CandidateCost(
                    candidate=candidate,
                    k=k,
                    recall=target,
                    n_probes=float(measured.probes[level]),
                    scanned=float(scanned[level]),
                    model=measured.model,
                    total=float(scanned[level]) + measured.model,
                    low=float(low),
                    high=float(high),
                )
            )
    return result


def joined(curves: Sequence[Curve]) -> Curve:
    """Join the curves of different queries at the same levels."""
    first = curves[0]
    as_good = [c.as_good for c in curves if c.as_good is not None]
    return Curve(
        np.concatenate([c.found for c in curves]),
        np.concatenate([c.scanned for c in curves]),
        np.average([c.probes for c in curves], axis=0, weights=[len(c.found) for c in curves]),
        first.model,
        np.concatenate(as_good) if len(as_good) == len(curves) else None,
    )


def resampled_costs(
    measured: Curve, k: int, targets: Sequence[float], seed: int = 0
) -> npt.NDArray[np.float64]:
    """Return what resamples of the queries cost, scanned and model share, at some recalls.

    Curves of as many queries draw the same resamples from the same seed, so that two searches of
    the same queries can be compared resample by resample.
    """
    weights = resample_weights(len(measured.found), seed)
    scanned, recall = weights @ measured.scanned, weights @ measured.recall(k)
    costs = np.empty((len(targets), _BOOTSTRAPS))
    for place, target in enumerate(targets):
        enough = recall >= target - 1e-12
        # A resample may miss what the whole split just reaches: it then searches every cell.
        reached = np.where(enough[:, -1], enough.argmax(axis=1), measured.n_levels - 1)
        costs[place] = scanned[np.arange(_BOOTSTRAPS), reached] + measured.model
    return costs


def resample_weights(n_queries: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Return ``(n_resamples, n_queries)``: the weights of the queries in bootstrap resamples."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), _BOOTSTRAPS)
    return counts / n_queries


def _out_of_reach(candidate: str, k: int, recall: float, model: float) -> CandidateCost:
    return CandidateCost(
        candidate=candidate,
        k=k,
        recall=recall,
        n_probes=None,
        scanned=None,
        model=model,
        total=None,
        low=None,
        high=None,
    )


def expected(k: int) -> Guess:
    """Guess what recalls that are worth promising are like: a query's hits go together."""
    return Guess(mean=0.95, variance=max(0.0475 / k**0.8, 0.005), values=5.0, most=0.95)


class Measured(Protocol):
    """Recall and cost of the same queries, level by level; at the last one every key is found."""

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        ...

    @property
    def scanned(self) -> Any:
        """Cost of each query at each level, ``(n_queries, n_levels)``, at most 1."""
        ...

    def recall(self, k: int) -> npt.NDArray[np.float64]:
        """Return ``(n_queries, n_levels)``: recall@k."""
        ...


def calibrate(
    measured: Measured,
    thresholds: FloatArray,
    max_k: int,
    confidence: float = 0.95,
    asked: IntArray | None = None,
) -> Calibration:
    """Turn the curve of queries that nothing else has seen into recalls that may be promised.

    A promise holds for distinct queries, and for queries as often as they were ``asked``.
    """
    seen = slice(_MOST_CALIBRATED)
    populations: list[npt.NDArray[np.float64] | None] = [None]
    if asked is not None and asked.max() > 1:
        # One query of a thousand askers is one query: it cannot speak for the others.
        counts = np.minimum(asked[seen], _MOST_ASKED * asked.mean())
        populations.append(counts / counts.max())
    recall = np.empty((max_k, measured.n_levels), dtype=np.float32)
    guaranteed = np.zeros((max_k, measured.n_levels), dtype=np.float32)
    for k in range(max_k, 0, -1):
        recalls = measured.recall(k)
        recall[k - 1] = recalls.mean(axis=0)
        if k not in _STEPS_OF_K and k < max_k:
            # What is missed of the best k is missed of the best k + 1, too.
            guaranteed[k - 1] = np.maximum(0.0, 1.0 - (k + 1) / k * (1.0 - guaranteed[k]))
            continue
        useful = slice(int((recall[k - 1] < _LEAST_RECALL).sum()), -1)
        bounds = [
            betting_bound(recalls[seen, useful], 1.0 - confidence, expected(k), weights, stop=False)
            for weights in populations
        ]
        guaranteed[k - 1, useful] = np.min(bounds, axis=0)
        guaranteed[k - 1, -1] = 1.0  # every cell searched is every key searched
        # Fixed-sequence testing from all cells downwards: a bound counts only while all wider
        # ones hold, so searching less can never promise more.
        guaranteed[k - 1] = np.minimum.accumulate(guaranteed[k - 1, ::-1])[::-1]
    scanned = measured.scanned.mean(axis=0)
    return Calibration(thresholds, recall, np.minimum(guaranteed, recall), scanned, confidence)
