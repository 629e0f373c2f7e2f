"""An orthogonal map that spreads every vector evenly over its coordinates.

Codes of few bits have the same steps for every coordinate, which suits vectors of which no
coordinate holds more than others. Signs by chance and Hadamard transforms in turn make them so, and
keep all inner products; the map is the same for every file of a dimension, and nothing of it is
stored.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from amips_plugins.vectors import FloatArray

__all__ = ["rotated"]

_ROUNDS = 3
_SEED = 0x414D495053  # of raw bits, which numpy promises to keep as they are
_ROWS = 4096  # turned at once


def rotated(vectors: FloatArray) -> FloatArray:
    """Return vectors, ``(n, dim)``, turned about."""
    count, dim = vectors.shape
    width = 1 << (dim.bit_length() - 1)  # a transform takes a power of two: the first, the last
    turned = np.array(vectors, dtype=np.float32)
    for low in range(0, count, _ROWS):
        part = turned[low : low + _ROWS]
        for signs in _signs(dim):
            part *= signs
            part[:, :width] = _transformed(part[:, :width])
            if width < dim:
                part[:, dim - width :] = _transformed(part[:, dim - width :])
    return turned


@lru_cache(maxsize=16)
def _signs(dim: int) -> FloatArray:
    raw = np.random.PCG64(_SEED).random_raw(_ROUNDS * dim).reshape(_ROUNDS, dim)
    signs: FloatArray = np.where(raw >> np.uint64(63), np.float32(1.0), np.float32(-1.0))
    return signs


def _transformed(part: FloatArray) -> FloatArray:
    """Return the Hadamard transform of rows, whose length is a power of two."""
    count, width = part.shape
    here: FloatArray = np.ascontiguousarray(part)
    step = 1
    while step < width:
        pairs = here.reshape(count, width // (2 * step), 2, step)
        one, other = pairs[:, :, 0], pairs[:, :, 1]
        here = np.stack([one + other, one - other], axis=2).reshape(count, width)
        step *= 2
    here *= np.float32(width**-0.5)
    return here
