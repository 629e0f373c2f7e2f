"""What searches of rising effort find, and what may be promised of it. Nothing is asked here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amips_plugins.collection import Hit, Id
from amips_plugins.export.cost_curves import calibrate
from amips_plugins.models.calibration import Calibration
from amips_plugins.vectors import FloatArray, IntArray, as_good_as

__all__ = ["CONFIDENCE", "EffortCurve", "Truth", "promise", "smallest_k"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Truth:
    """The true best keys of some queries.

    Attributes
    ----------
    ranks
        For each query the rank of each of its best keys, from 1 on.
    scores
        ``(n_queries, depth)`` their scores, larger is better, by which a key as good as the k-th
        counts for k; None where no scores are to be trusted.
    depth
        How many there are for each query.
    """

    ranks: Sequence[dict[Id, int]]
    scores: FloatArray | None
    depth: int

    def top(self, k: int) -> Truth:
        """Return the best k of them alone."""
        return Truth(self.ranks, None if self.scores is None else self.scores[:, :k], k)

    def by_ids(self) -> Truth:
        """Return the same, to be compared by ids alone."""
        return Truth(self.ranks, None, self.depth)


def smallest_k(
    truth: Truth, found: Sequence[Sequence[Hit]], *, larger_is_better: bool
) -> npt.NDArray[np.int16]:
    """Return for each query and hit the smallest k that it counts for, ``(n_queries, depth)``.

    That is where it is one of the best k keys, and one of the first k hits; ``depth + 1`` for one
    that counts for none, or is not there.
    """
    never = truth.depth + 1
    first = np.full((len(found), truth.depth), never, dtype=np.int16)
    sign = 1.0 if larger_is_better else -1.0
    for row, hits in enumerate(found):
        some, ranks = hits[: truth.depth], truth.ranks[row]
        if not some:
            continue
        rank = np.array([ranks.get(hit.id, never) for hit in some])
        if truth.scores is not None:
            scores = np.array([sign * hit.score for hit in some])
            enough = as_good_as(truth.scores[row].astype(np.float64))
            # The first k whose k-th best key is no better than this hit; ``enough`` falls with k.
            good = np.searchsorted(-enough, -scores, side="left") + 1
            rank = np.minimum(rank, good)
        first[row, : len(some)] = np.maximum(rank, np.arange(1, len(some) + 1))
    return first


@dataclass(frozen=True)
class EffortCurve:
    """Recall of the same queries at rising efforts, and past them that of an exact search.

    Attributes
    ----------
    efforts
        ``(n_efforts,)`` rising.
    first
        ``(n_efforts, n_queries, depth)``, see ``smallest_k``.
    """

    efforts: IntArray
    first: npt.NDArray[np.int16]

    @property
    def depth(self) -> int:
        """Largest k there is."""
        return int(self.first.shape[2])

    @property
    def n_levels(self) -> int:
        """Number of efforts, and one for the exact search."""
        return len(self.efforts) + 1

    def recall(self, k: int) -> npt.NDArray[np.float64]:
        """Return ``(n_queries, n_levels)``: recall@k of each query by level."""
        counts = np.minimum((self.first <= k).sum(axis=2), k) / k
        every = np.concatenate([counts, np.ones((1, counts.shape[1]))])
        recall: npt.NDArray[np.float64] = every.T
        return recall

    @property
    def scanned(self) -> npt.NDArray[np.float64]:
        """Return ``(n_queries, n_levels)``: efforts as shares of one that stands for all keys."""
        shares = np.append(self.efforts / (2.0 * self.efforts[-1]), 1.0)
        return np.broadcast_to(shares, (self.first.shape[1], self.n_levels))

    def take(self, rows: IntArray) -> EffortCurve:
        """Return the curve of some of the queries."""
        return EffortCurve(self.efforts, self.first[:, rows])


def promise(measured: EffortCurve, confidence: float = CONFIDENCE) -> Calibration:
    """Turn the curve of queries that nothing else has seen into recalls that may be promised."""
    efforts = measured.efforts.astype(np.int64)
    thresholds = np.append(-efforts.astype(np.float32), np.float32(-np.inf))
    made = calibrate(measured, thresholds, measured.depth, confidence)
    return Calibration(
        made.thresholds,
        made.recall,
        made.guaranteed,
        made.scanned.astype(np.float32),
        confidence,
        np.append(efforts, efforts[-1]),
    )
