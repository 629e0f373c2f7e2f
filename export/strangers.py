"""Whether the keys of several collections can come from one model of embedding.

No database records the model. But the vectors of one model, whatever the texts, lie in some
directions more than in others, and those of another model in other ones.
"""

from __future__ import annotations

import numpy as np

from amips_plugins.export.keys import Keys
from amips_plugins.export.targets import cell_order
from amips_plugins.vectors import FloatArray, IntArray, normalise

__all__ = ["strangers"]

_SAMPLE = 1_000  # keys of each side
_LEAST = 100
_DIMENSION = 64  # of vectors that may have such directions
_PART = 8  # of the directions one is taken
_TELLING = 2.5  # times what random directions hold, that those of the others have to hold of them
_LIKE_CHANCE = 1.4
# Times what random directions hold. Between any two sections of Debian's package descriptions it is
# 1.9 and more with 300 keys, after a rotation of one of them .9 to 1.1.


def strangers(keys: Keys, assignment: IntArray, n_cells: int, seed: int = 0) -> list[int]:
    """Return the cells whose keys lie as if the others had nothing to do with them.

    Keys are ``(n, dim)``, the assignment ``(n,)``. Cells of few keys are taken for what they seem.
    """
    rng = np.random.default_rng(seed)
    order, bounds = cell_order(assignment, n_cells)
    n_directions = max(1, keys.shape[1] // _PART)

    def sample(rows: IntArray) -> FloatArray:
        chosen = rng.permutation(len(rows))[:_SAMPLE]
        return normalise(np.asarray(keys[np.sort(rows[chosen])], dtype=np.float32))

    found: list[int] = []
    for cell in range(n_cells if keys.shape[1] >= _DIMENSION else 0):
        own, others = order[bounds[cell] : bounds[cell + 1]], np.flatnonzero(assignment != cell)
        if min(len(own), len(others)) < max(_LEAST, n_directions):
            continue
        those, alike = np.array_split(sample(others), 2)
        directions = np.linalg.svd(those, full_matrices=False)[2][:n_directions]
        chance = n_directions / keys.shape[1]
        if _held(alike, directions) < _TELLING * chance:
            continue  # they themselves lie in all directions
        if _held(sample(own), directions) < _LIKE_CHANCE * chance:
            found.append(cell)
    return found


def _held(keys: FloatArray, directions: FloatArray) -> float:
    """Return the share of unit keys' squared length that lies in some directions."""
    return float(((keys @ directions.T) ** 2).sum(axis=1).mean())
