"""Confidence bounds of means that hold whatever the distribution."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["IGNORANCE", "Guess", "betting_bound"]


class Guess(NamedTuple):
    """What a gambler takes mean and variance for before the first value, worth so many values.

    A bound holds whatever is guessed; a good guess makes it narrower where there are few values.
    """

    mean: float
    variance: float
    values: float
    most: float
    """The largest stake, below 1."""


IGNORANCE = Guess(0.5, 0.25, 1.0, 0.75)


def betting_bound(
    values: npt.NDArray[np.float64],
    delta: float,
    guess: Guess = IGNORANCE,
    weights: npt.NDArray[np.floating] | None = None,
    *,
    stop: bool = True,
) -> npt.NDArray[np.float64]:
    """Lower confidence bounds of the means of columns, ``(n, columns)``, of values in [0, 1].

    The values of a column are independent. A gambler bets on the mean being above m, with stakes
    that only look back; were the mean m or less, the fortune would exceed 1/delta with probability
    delta at most (Ville). The bound is the largest m that the fortune refutes (Waudby-Smith and
    Ramdas, 2024, arXiv 2010.09686, section 4), and never more than the mean that was seen.

    The first stakes go by ``guess``; ``weights``, ``(n,)`` in (0, 1], say how much each value
    counts. A gambler who may ``stop`` while ahead makes the bound narrower, and lets a lucky
    beginning decide.
    """
    n = len(values)
    counts = np.ones((n, 1)) if weights is None else np.asarray(weights, dtype=float)[:, None]
    seen = guess.values + counts.cumsum(axis=0)
    mean = (guess.values * guess.mean + (counts * values).cumsum(axis=0)) / seen
    spread = np.square(counts * (values - mean)).cumsum(axis=0)
    variance = (guess.values * guess.variance + spread) / (
        guess.values + np.arange(1, n + 1)[:, None]
    )
    before = np.vstack([np.full((1, values.shape[1]), guess.variance), variance[:-1]])
    # A stake below 1 keeps the fortune positive for every m, and decreasing in m.
    stakes = np.minimum(guess.most, np.sqrt(2 * math.log(1 / delta) / (n * before))) * counts
    low = np.zeros(values.shape[1])
    high = (counts * values).sum(axis=0) / counts.sum()
    for _ in range(14):
        middle = (low + high) / 2
        gains = np.log1p(stakes * (values - middle))
        fortune = gains.cumsum(axis=0).max(axis=0) if stop else gains.sum(axis=0)
        refuted = fortune >= math.log(1 / delta)
        low = np.where(refuted, middle, low)
        high = np.where(refuted, high, middle)
    return low
