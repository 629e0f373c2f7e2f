"""Recall@k of single answers against exact ones, and its mean over the latest of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amips_plugins.collection import Hit, Id
from amips_plugins.health.confidence import betting_bound
from amips_plugins.vectors import as_good_as

__all__ = ["Recall", "RecallWindow", "recall_at_k"]

_WIDTH = 1_000  # answers
_WRONG = 0.05  # probability that the mean lies outside its bounds


def recall_at_k(
    found: Sequence[Hit], exact: Sequence[Hit], k: int, *, larger_is_better: bool
) -> float:
    """Return the share of the best k keys that an answer has.

    A key as good as the last of the best k counts, too: among equals the order is chance.
    """
    best = exact[:k]
    if not best:
        return 1.0
    sign = 1.0 if larger_is_better else -1.0
    enough = float(as_good_as(sign * best[-1].score))
    keys = {_key(hit) for hit in best}
    good = sum(_key(hit) in keys or sign * hit.score >= enough for hit in found[:k])
    return min(good, len(best)) / len(best)


def _key(hit: Any) -> Id:
    """Return what tells a hit from others; a routed client's are the database's own."""
    found: Id = hit.key if isinstance(hit, Hit) else hit.id
    return found


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall over some answers.

    Attributes
    ----------
    n
        Number of answers.
    mean
        Their mean recall@k.
    low, high
        Where the mean of all answers like them lies, with 95 % confidence.
    p5
        The recall that one answer in twenty stays below or at.
    """

    n: int
    mean: float
    low: float
    high: float
    p5: float


class RecallWindow:
    """The recall of the latest answers."""

    def __init__(self, width: int = _WIDTH) -> None:
        self._latest: deque[float] = deque(maxlen=width)

    def add(self, recall: float) -> None:
        """Add an answer's recall."""
        self._latest.append(recall)

    def summary(self) -> Recall | None:
        """Return the recall over the window; None while it is empty.

        The bounds are betting bounds (``bounds.betting_bound``), which are narrower than the
        empirical Bernstein bounds of Maurer and Pontil (2009, arXiv 0907.3740, theorem 4), the
        more so while there are few answers.
        """
        if not self._latest:
            return None
        values = np.array(self._latest)
        # One column from below, and its mirror image from above.
        low, missed = betting_bound(np.stack([values, 1.0 - values], axis=1), _WRONG / 2)
        mean = float(values.mean())
        return Recall(
            n=len(values),
            mean=mean,
            # The gambler may stop while ahead; no bound lies on the far side of what was seen.
            low=min(float(low), mean),
            high=max(float(1.0 - missed), mean),
            p5=float(np.quantile(values, 0.05, method="inverted_cdf")),
        )
