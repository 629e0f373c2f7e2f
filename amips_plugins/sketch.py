"""Sketches: 32 bits of a vector that tell whether a key still has the vector it once had.

Three bytes are random projections of the vector's direction, one is its length. What a database
does to a vector on the way (scaling for cosine, rounding to float16) moves a byte by one at most;
of vectors at a cosine of .91 fewer than one in a thousand are taken for each other, of unrelated
ones one in fifty thousand.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from amips_plugins.vectors import FloatArray, Metric, normalise

__all__ = ["same_vectors", "sketch"]

_BLOCK = 16_384
_PROJECTIONS = 3
_STEPS = 32  # to a standard deviation of the projections of unrelated directions
_LENGTH_STEPS = 16  # to a doubling of the length


@lru_cache(maxsize=8)
def _directions(dim: int) -> FloatArray:
    # RandomState: its numbers are the same in every version of numpy, a Generator's need not be.
    drawn = np.random.RandomState(1).standard_normal((dim, _PROJECTIONS))
    return drawn.astype(np.float32)


def sketch(vectors: FloatArray, metric: Metric) -> npt.NDArray[np.int32]:
    """Return the sketch of each vector, ``(n,)`` int32; under cosine lengths mean nothing."""
    packed = np.zeros((len(vectors), 4), dtype=np.uint8)
    for start in range(0, len(vectors), _BLOCK):
        block = np.asarray(vectors[start : start + _BLOCK], dtype=np.float32)
        rows = packed[start : start + _BLOCK]
        projected = normalise(block) @ _directions(block.shape[1]) * _STEPS
        rows[:, :_PROJECTIONS] = np.floor(projected).astype(np.int64) % 256
        if metric is not Metric.COSINE:
            lengths = np.linalg.norm(block.astype(np.float64), axis=1)
            steps = np.log2(lengths, out=np.zeros_like(lengths), where=lengths > 0) * _LENGTH_STEPS
            rows[:, _PROJECTIONS] = np.floor(steps).astype(np.int64) % 256
    return packed.view("<i4")[:, 0].astype(np.int32)


def same_vectors(
    first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Tell of which pairs of sketches the vectors are about the same."""
    one, other = (
        np.ascontiguousarray(each, dtype="<i4").view(np.uint8).reshape(-1, 4)
        for each in (first, second)
    )
    apart = (one - other).view(np.int8)  # around the circle of a byte
    distances = np.abs(apart.astype(np.int16))
    same: npt.NDArray[np.bool_] = distances.max(axis=1, initial=0) <= 1
    return same
