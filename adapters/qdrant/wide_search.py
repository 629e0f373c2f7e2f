"""How far a graph is followed where it stands for a comparison with all keys.

A query whose cells hold most of the keys would score twenty times the bytes that a search of the
graph does. What the graph misses is not in what a router has calibrated, so it has to be little of
what the target allows (docs/performance.md).
"""

from __future__ import annotations

import math

__all__ = ["wide_effort"]

_CANDIDATES, _RECALL = 384, 0.98  # kept by a search, at recalls up to this one
_UNSAID = 0.99  # the recall where a plan names none
_PER_HIT = 16  # candidates at least for every hit
_MOST = 4096  # a recall that takes more is an exact scan's


def wide_effort(k: int, recall: float | None, asked: int, most: int | None) -> int | None:
    """Return how many candidates to keep, ``asked`` at least, or None for an exact scan.

    ``most`` are those that the database allows.
    """
    missed = 1.0 - (_UNSAID if recall is None else recall)
    stricter = max(1.0, (1.0 - _RECALL) / max(1e-9, missed))
    # Half the misses take more than twice the candidates, and of more queries at that.
    candidates = _CANDIDATES * stricter**2
    effort = max(asked, math.ceil(candidates - 1e-6), _PER_HIT * k)
    allowed = candidates <= _MOST and (most is None or effort <= most)
    return effort if allowed else None
