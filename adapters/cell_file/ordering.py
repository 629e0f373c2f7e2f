"""The order of the keys of a run: near ones side by side.

The best candidates of a query are near each other, too, so that some of their vectors lie on the
same pages, or on neighbouring ones, and come with one read.
"""

from __future__ import annotations

import numpy as np

from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise

__all__ = ["near_ones_together"]

_BLOCK = 1024  # keys put in order together: all pairs of these are compared


def near_ones_together(keys: FloatArray, metric: Metric) -> IntArray:
    """Return an order of keys, ``(n, dim)``, in which each is followed by one near it, ``(n,)``.

    A path from key to nearest key that is left.
    """
    placed = normalise(keys) if metric is Metric.COSINE else np.asarray(keys, dtype=np.float32)
    parts = [
        low + _path(placed[low : low + _BLOCK] - placed.mean(axis=0))
        for low in range(0, len(placed), _BLOCK)
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _path(keys: FloatArray) -> IntArray:
    near = keys @ keys.T
    near -= 0.5 * np.diagonal(near)[None, :].copy()  # as squared distances have it
    path = np.zeros(len(keys), dtype=np.int64)
    for step in range(1, len(keys)):
        near[:, path[step - 1]] = -np.inf
        path[step] = near[path[step - 1]].argmax()
    return path
