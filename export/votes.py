"""Keys in more than one cell: where training queries would have looked for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from amips_plugins.models.cells import Cells
from amips_plugins.vectors import IntArray

__all__ = ["members_by_votes", "with_members"]

_MOST_CELLS = 3  # of one key


def members_by_votes(
    assignment: IntArray,
    hits: IntArray,
    n_cells: int,
    share: float,
    most: int = _MOST_CELLS,
    max_cell: float | None = None,
) -> IntArray:
    """Give the keys that queries look for elsewhere further cells.

    A query votes for the cells of its best keys, for each by the share of them that lie there, and
    it votes so for each of these keys; so a key gets votes for the cells that are searched anyway
    by whoever looks for it. The largest votes of all win a copy.

    Parameters
    ----------
    assignment
        ``(n,)`` int64: the cell of every key.
    hits
        ``(n_queries, depth)`` int64: rows of the best keys of training queries.
    n_cells
        Number of cells.
    share
        Copies allowed, as a share of the keys.
    most
        Cells that one key may have.
    max_cell
        Largest cell, copies counted, as a multiple of the mean; None for any.

    Returns
    -------
    numpy.ndarray
        ``(n, most)`` int64, or fewer columns where no key needs them: all cells of every key, its
        own first; this one again in unused places.
    """
    count = int(share * len(assignment))
    rows, cells = _most_voted(assignment, hits, n_cells)
    if max_cell is not None:
        largest = max_cell * (len(assignment) + count) / n_cells
        room = largest - np.bincount(assignment[assignment >= 0], minlength=n_cells)
        fits = _places(cells) <= room[cells]
        rows, cells = rows[fits], cells[fits]
    place = _places(rows)
    allowed = np.flatnonzero(place < most)[:count]
    rows, cells, place = rows[allowed], cells[allowed], place[allowed]
    width = 1 + int(place.max(initial=0)) if len(rows) else 1
    members = np.repeat(assignment[:, None].astype(np.int64), width, axis=1)
    members[rows, place] = cells
    return members


def with_members(cells: Cells, members: IntArray) -> Cells:
    """Return the cells with sizes that count copies."""
    sizes = np.bincount(members[:, 0], minlength=cells.n_cells)
    for column in members.T[1:]:
        copied = column != members[:, 0]
        sizes += np.bincount(column[copied], minlength=cells.n_cells)
    return replace(cells, sizes=sizes)


def _most_voted(assignment: IntArray, hits: IntArray, n_cells: int) -> tuple[IntArray, IntArray]:
    """Return keys and cells that are not theirs, by falling votes."""
    found = assignment[hits]
    depth = hits.shape[1]
    pairs: IntArray = np.empty(0, dtype=np.int64)
    votes: npt.NDArray[np.float64] = np.empty(0)
    for column in range(depth):  # blockwise: all pairs at once would be depth times as many
        other = found != found[:, column : column + 1]
        pair = hits * np.int64(n_cells) + found[:, column : column + 1]
        pairs = np.concatenate([pairs, pair[other]])
        votes = np.concatenate([votes, np.full(int(other.sum()), 1.0 / depth)])
        pairs, inverse = np.unique(pairs, return_inverse=True)
        votes = np.bincount(inverse.ravel(), votes, len(pairs)).astype(np.float64)
    order = np.argsort(-votes, kind="stable")
    return pairs[order] // n_cells, pairs[order] % n_cells


def _places(rows: IntArray) -> IntArray:
    """Return for every entry which one of its key's it is, from 1."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.searchsorted(ordered, ordered)
    places = np.empty(len(rows), dtype=np.int64)
    places[order] = np.arange(len(rows)) - starts + 1
    return places
