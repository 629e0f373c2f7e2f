"""Cells of bounded size: what crowded cells lose of their nearness until they are so no longer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["capped_offsets"]

_ROUNDS = 200
_SPARE = 50  # a part of it stays free: sums in another order move keys at the border


def capped_offsets(
    choose: Callable[[FloatArray], tuple[IntArray, FloatArray]], offsets: FloatArray, most: int
) -> FloatArray:
    """Lower the offsets of crowded cells until none holds more than it may.

    Keys go where centroid and offset make them, so the rule that cut the cells stays the rule for
    keys to come. In each round a crowded cell gives up the keys that lose least by it. As in an
    auction offsets only fall, so that cells that fill up in turn pass keys on.

    Parameters
    ----------
    choose
        Returns the cell of every key with some offsets, and by how much it is nearer than the
        second.
    offsets
        ``(n_cells,)`` what is added to a key's inner product with each centroid.
    most
        Keys in a cell.

    Returns
    -------
    numpy.ndarray
        Offsets whose largest cell is the smallest of all that were tried; the first that keep to
        ``most``.
    """
    now, best, smallest = offsets.copy(), offsets, np.inf
    for _ in range(_ROUNDS):
        cells, margins = choose(now)
        sizes = np.bincount(cells, minlength=len(offsets))
        if sizes.max() < smallest:
            smallest, best = float(sizes.max()), now.copy()
        if smallest <= most:
            break
        spare = max(most // _SPARE, min(2, most - sizes.sum() // len(sizes)), 0)
        for cell in np.flatnonzero(sizes > most):
            last = min(sizes[cell] - most + spare, sizes[cell]) - 1
            here = margins[cells == cell]
            # What fell by its margin is as near to either cell, and may have stayed.
            least = here.min(where=here > 0.0, initial=np.inf)
            now[cell] -= max(np.partition(here, last)[last], least if np.isfinite(least) else 0.0)
    return best
