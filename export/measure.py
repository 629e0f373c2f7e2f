"""What a router costs to reach a recall, and what may be promised about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amips_plugins.bundle import Figure
from amips_plugins.calibration import Calibration
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["TARGETS", "Curve", "betting_bound", "calibrate", "curve", "figures"]

TARGETS = (0.80, 0.90, 0.95, 0.99)
_BOOTSTRAPS = 200


@dataclass(frozen=True)
class Curve:
    """Recall and cost of one router, per query and number of probes.

    Attributes
    ----------
    ranks
        ``(n_queries, max_k)`` int64: at which place (from 0) the router puts the cell of each of
        the query's true top keys, best key first; ``n_cells`` for a key that is never found.
    scanned
        ``(n_queries, n_cells)`` float32: share of the keys in the best (column + 1) cells.
    model
        The router's own multiplications, expressed as a share of the keys.
    """

    ranks: IntArray
    scanned: FloatArray
    model: float

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.scanned.shape[1])

    def cost(self, k: int, recall: float) -> float:
        """Return scanned and model share at the fewest probes that reach the recall, or inf."""
        mean = self.recall(k).mean(axis=0)
        if mean[-1] < recall:
            return math.inf
        return float(self.scanned[:, (mean >= recall).argmax()].mean()) + self.model

    def recall(self, k: int) -> npt.NDArray[np.float64]:
        """Return ``(n_queries, n_cells)``: recall@k of each query by number of probes."""
        found = np.zeros((len(self.ranks), self.n_cells + 1))
        rows = np.arange(len(self.ranks))
        for place in range(k):
            np.add.at(found, (rows, self.ranks[:, place]), 1.0 / k)
        # Sums of k times 1/k may end a hair below 1.
        recall: npt.NDArray[np.float64] = found[:, :-1].cumsum(axis=1).round(9)
        return np.minimum(recall, 1.0)


def curve(priority: FloatArray, hit_cells: IntArray, sizes: IntArray, model_keys: float) -> Curve:
    """Measure a router.

    Parameters
    ----------
    priority
        ``(n_queries, n_cells)``: in which order the cells would be searched, largest first.
    hit_cells
        ``(n_queries, max_k)``: cells of the true top keys, best key first.
    sizes
        ``(n_cells,)`` keys in each cell.
    model_keys
        The router's cost, in keys: multiplications divided by the dimension.
    """
    count = float(sizes.sum())
    order = np.argsort(-priority, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None, :], axis=1)
    return Curve(
        ranks=np.take_along_axis(rank, hit_cells, axis=1),
        scanned=(sizes[order].cumsum(axis=1) / count).astype(np.float32),
        model=model_keys / count,
    )


def figures(candidate: str, measured: Curve, ks: tuple[int, ...], seed: int = 0) -> list[Figure]:
    """Summarise a curve at the usual recalls, with bootstrap intervals over the queries.

    Parameters
    ----------
    candidate
        Name of the router.
    measured
        Its curve.
    ks
        Which recall@k.
    seed
        Of the bootstrap.
    """
    n_queries = len(measured.ranks)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_queries, np.full(n_queries, 1 / n_queries), _BOOTSTRAPS) / n_queries
    scanned = measured.scanned.mean(axis=0, dtype=np.float64)
    sampled_scanned = weights @ measured.scanned
    result = []
    for k in ks:
        recalls = measured.recall(k)
        mean = recalls.mean(axis=0)
        sampled = weights @ recalls
        for target in TARGETS:
            if mean[-1] < target:
                result.append(_out_of_reach(candidate, k, target, measured.model))
                continue
            probes = int((mean >= target).argmax())
            enough = sampled >= target - 1e-12
            # A resample may miss what the whole split just reaches: it then searches every cell.
            reached = np.where(enough[:, -1], enough.argmax(axis=1), measured.n_cells - 1)
            totals = sampled_scanned[np.arange(_BOOTSTRAPS), reached] + measured.model
            low, high = np.quantile(totals, [0.025, 0.975])
            result.append(
                Figure(
                    candidate=candidate,
                    k=k,
                    recall=target,
                    n_probes=probes + 1,
                    scanned=float(scanned[probes]),
                    model=measured.model,
                    total=float(scanned[probes]) + measured.model,
                    low=float(low),
                    high=float(high),
                )
            )
    return result


def _out_of_reach(candidate: str, k: int, recall: float, model: float) -> Figure:
    return Figure(
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


def calibrate(measured: Curve, max_k: int, confidence: float = 0.95) -> Calibration:
    """Turn the curve of the calibration split into recalls that may be promised.

    Parameters
    ----------
    measured
        The curve on queries that nothing else has seen, in an order that means nothing.
    max_k
        Largest k to promise for.
    confidence
        Probability that a promise holds.
    """
    n_cells = measured.n_cells
    grid = probe_grid(n_cells)
    recall = np.empty((max_k, n_cells), dtype=np.float32)
    guaranteed = np.empty((max_k, n_cells), dtype=np.float32)
    for k in range(1, max_k + 1):
        recalls = measured.recall(k)
        bounds = betting_bound(recalls[:, grid], 1.0 - confidence)
        bounds[-1] = 1.0  # every cell searched is every key searched
        # Fixed-sequence testing from all cells downwards: a bound counts only while all wider
        # ones hold, so fewer probes can never promise more than more probes do.
        bounds = np.minimum.accumulate(bounds[::-1])[::-1]
        # Between two places of the grid the smaller one's bound holds: more probes find more.
        guaranteed[k - 1] = bounds[np.searchsorted(grid, np.arange(n_cells), side="right") - 1]
        recall[k - 1] = recalls.mean(axis=0)
    return Calibration(recall, guaranteed, measured.scanned.mean(axis=0), confidence)


def probe_grid(n_cells: int) -> IntArray:
    """Return the numbers of probes (less 1) that are tested: all small ones, then 3 % apart."""
    places = np.unique(np.round(1.03 ** np.arange(0, 1 + math.log(n_cells) / math.log(1.03))))
    grid: IntArray = np.unique(np.append(places[places <= n_cells], n_cells)).astype(np.int64) - 1
    return grid


def betting_bound(values: npt.NDArray[np.float64], delta: float) -> npt.NDArray[np.float64]:
    """Lower confidence bounds of the means of columns of independent values in [0, 1].

    A gambler bets on the mean being above m, with stakes that only look back; were the mean m or
    less, the fortune would exceed 1/delta with probability delta at most (Ville). The bound is the
    largest m that the fortune refutes (Waudby-Smith and Ramdas, 2024, arXiv 2010.09686, section 4).

    Parameters
    ----------
    values
        ``(n, columns)``.
    delta
        Probability that one bound is wrong.
    """
    n = len(values)
    steps = np.arange(1, n + 1)[:, None]
    mean = (0.5 + values.cumsum(axis=0)) / (steps + 1)
    variance = (0.25 + np.square(values - mean).cumsum(axis=0)) / (steps + 1)
    before = np.vstack([np.full((1, values.shape[1]), 0.25), variance[:-1]])
    # A stake of at most 3/4 keeps the fortune positive for every m, and decreasing in m.
    stakes = np.minimum(0.75, np.sqrt(2 * math.log(1 / delta) / (n * before)))
    low = np.zeros(values.shape[1])
    high = np.ones(values.shape[1])
    for _ in range(20):
        middle = (low + high) / 2
        fortune = np.log1p(stakes * (values - middle)).cumsum(axis=0).max(axis=0)
        refuted = fortune >= math.log(1 / delta)
        low = np.where(refuted, middle, low)
        high = np.where(refuted, high, middle)
    return low
