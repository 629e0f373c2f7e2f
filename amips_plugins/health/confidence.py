"""Confidence bounds of means that hold whatever the distribution."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["betting_bound"]


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
