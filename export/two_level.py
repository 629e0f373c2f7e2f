"""Routers over thousands of cells: cells in groups, and how many groups a query looks into."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from amips_plugins.export.clustering import k_means
from amips_plugins.export.nets import TwoLevelRouter
from amips_plugins.vectors import FloatArray, IntArray, normalise

__all__ = ["VISITED", "cell_groups", "fewest_groups", "new_two_level", "unscored_shares"]

VISITED = (4, 8, 16, 32, 64)
"""Numbers of groups that are compared, once the router is trained."""

_ITERATIONS = 10  # of k-means over the cells
_GROUPS = 2.0  # times the root of the number of cells: small ones waste less on cells beside
_MOST_COPIED = 1 << 18  # weights a query: more take longer than one product with all, in 8 bits


def cell_groups(weights: FloatArray, n_groups: int, seed: int) -> IntArray:
    """Put cells that answer the same queries into groups of one size.

    Groups of one size are rows of one table. A group that is full leaves the cells that are least
    its own to others.

    Parameters
    ----------
    weights
        ``(n_cells, dim)`` what a linear router multiplies queries with.
    n_groups
        How many groups, at most.
    seed
        Of k-means.

    Returns
    -------
    IntArray
        ``(n_groups, size)`` int64 cells, ascending; -1 in unused places at the end.
    """
    n_cells = len(weights)
    size = -(-n_cells // n_groups)
    n_groups = -(-n_cells // size)
    unit = normalise(weights)
    centroids = k_means(unit, n_groups, seed, spherical=True, iterations=_ITERATIONS)
    nearness = unit @ centroids.T
    group = np.full(n_cells, -1, dtype=np.int64)
    room = np.full(n_groups, size)
    while (group < 0).any():
        rest = np.flatnonzero(group < 0)
        open_ones = np.where(room > 0, nearness[rest], -np.inf)
        wanted = open_ones.argmax(axis=1)
        # The nearest first; whoever comes when the group is full asks again.
        order = np.lexsort((-open_ones[np.arange(len(rest)), wanted], wanted))
        place = np.arange(len(rest)) - np.searchsorted(wanted[order], wanted[order])
        taken = order[place < room[wanted[order]]]
        group[rest[taken]] = wanted[taken]
        room -= np.bincount(wanted[taken], minlength=n_groups)
    groups = np.full((n_groups, size), -1, dtype=np.int64)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(n_groups))
    groups[group[order], np.arange(n_cells) - starts[group[order]]] = order
    return groups


def new_two_level(start: FloatArray, rank: int, seed: int) -> TwoLevelRouter:
    """Return a router whose cells' scores are a product with ``start``, as well as a rank allows.

    A group begins with the mean of its cells. All groups are visited while it trains.
    """
    n_cells, dim = start.shape
    rank = min(rank, dim, n_cells)
    groups = cell_groups(start, round(_GROUPS * n_cells**0.5), seed)
    net = TwoLevelRouter(dim, groups, rank, visited=len(groups))
    left, singular, right = torch.linalg.svd(torch.from_numpy(start), full_matrices=False)
    roots = singular[:rank].sqrt()
    net.up.data.copy_(left[:, :rank] * roots)
    net.down.data.copy_(roots[:, None] * right[:rank])
    sums = torch.zeros_like(net.group_up).index_add_(0, net.group_of, net.up.data)
    net.group_up.data.copy_(sums / torch.bincount(net.group_of)[:, None])
    return net


def fewest_groups(net: TwoLevelRouter, score: Callable[[], float]) -> float:
    """Let a router visit as many groups as score best, and return that score.

    ``score`` measures the router as it is; minus infinity where no number of groups is few.
    """
    scores = {}
    for visited in VISITED:
        copied = visited * net.members.shape[1] * net.up.shape[1]
        if visited < len(net.members) and copied <= _MOST_COPIED:
            net.visited = visited
            scores[visited] = score()
    if not scores:
        return -np.inf
    net.visited = max(scores, key=lambda visited: scores[visited])
    return scores[net.visited]


def unscored_shares(
    net: TwoLevelRouter, unit: FloatArray, hit_cells: IntArray, known: IntArray
) -> FloatArray:
    """Return the log of each cell's share of the top keys, ``(n_cells,)``, where it is not scored.

    What the queries with these ``hit_cells`` (-1 for none) leave in groups that they do not visit
    is shared among the cells as ``known`` hits are.
    """
    with torch.no_grad():
        scores = net.group_scores(torch.from_numpy(unit).to(net.down.device))
    chosen = scores.topk(net.visited, dim=1).indices.cpu().numpy()
    placed = hit_cells >= 0
    group = net.group_of.cpu().numpy()[hit_cells]
    missed = (group[..., None] != chosen[:, None, :]).all(axis=-1) & placed
    left = max(missed.sum(), 1) / max(placed.sum(), 1)
    counts = np.bincount(known[known >= 0], minlength=len(net.bias)) + 1.0
    shares: FloatArray = np.log(left * counts / counts.sum()).astype(np.float32)
    return shares
